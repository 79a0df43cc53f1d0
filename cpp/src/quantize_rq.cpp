#include "polyvec/quantize_rq.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "polyvec/topk.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t rows_at_once = 64;  // whose products with a level's codewords stay in the cache

/// The codewords as the register tile takes them, and their offsets -|c|^2 / 2.
struct RqLevels {
    explicit RqLevels(const Array& codebooks, std::int64_t first)
        : k(codebooks.dim(1)),
          d(codebooks.dim(2)),
          width(kernels().scan->panel_width),
          panels((k + width - 1) / width),
          first_(first),
          packed_(aligned<float>((codebooks.dim(0) - first) * panels * width * d)) {
        const std::int64_t levels = codebooks.dim(0) - first;
        const float* codewords = codebooks.as<const float>() + first * k * d;
        for (std::int64_t i = 0; i < levels * k; ++i) {
            const float* c = codewords + i * d;
            offsets_.push_back(static_cast<float>(-0.5 * std::inner_product(c, c + d, c, 0.0)));
        }
        for (std::int64_t p = 0; p < levels * panels; ++p) {
            const std::int64_t begin = p % panels * width;
            kernels().scan->f32.pack(codewords + (p / panels * k + begin) * d, std::min(width, k - begin), d, d,
                                     packed_.get() + p * width * d);
        }
    }

    const float* panel(std::int64_t level, std::int64_t p) const {
        return packed_.get() + ((level - first_) * panels + p) * width * d;
    }
    const float* offsets(std::int64_t level) const { return offsets_.data() + (level - first_) * k; }

    const std::int64_t k, d, width, panels;

private:
    std::int64_t first_;
    Aligned<float> packed_;
    std::vector<float> offsets_;
};

/// The beams of a few rows, from level to level.
class RqSearcher {
public:
    RqSearcher(const RqExtend& op, const RqLevels& levels)
        : op_(op),
          levels_(levels),
          m_(op.codebooks.dim(0)),
          width_(op.out_scores.dim(1)),
          products_(aligned<float>(levels.panels * levels.width * rows_at_once)),
          crossings_(width(op) * m_),
          best_(width_),
          codes_(width(op) * m_ * rows_at_once),
          next_(width(op) * m_),
          scores_(width(op) * rows_at_once) {}

    void operator()(std::int64_t first, std::int64_t n) {
        std::int64_t sums = op_.beams.dim(1);
        const std::int64_t known = op_.beams.dim(2), kept = op_.out_beams.dim(1);
        for (std::int64_t i = 0; i < n; ++i) {
            std::copy_n(op_.scores.as<const float>() + (first + i) * sums, sums, scores(i));
            for (std::int64_t s = 0; s < sums; ++s)
                std::copy_n(op_.beams.as<const std::uint8_t>() + ((first + i) * sums + s) * known, known,
                            codes(i) + s * m_);
        }
        for (std::int64_t level = known; level < m_; ++level) {
            for (std::int64_t p = 0; p < levels_.panels; ++p)
                kernels().scan->f32.values({levels_.panel(level, p), op_.x.as<const float>() + first * levels_.d,
                                            static_cast<std::size_t>(n), static_cast<std::size_t>(levels_.d)},
                                           products_.get() + p * rows_at_once * levels_.width);
            const std::int64_t wanted = std::min(width_, sums * levels_.k);
            for (std::int64_t i = 0; i < n; ++i) extend(i, level, sums, wanted);
            sums = wanted;
        }
        for (std::int64_t i = 0; i < n; ++i) {
            std::copy_n(codes(i), kept * m_, op_.out_beams.as<std::uint8_t>() + (first + i) * kept * m_);
            std::copy_n(scores(i), width_, op_.out_scores.as<float>() + (first + i) * width_);
        }
    }

private:
    static std::int64_t width(const RqExtend& op) { return std::max(op.beams.dim(1), op.out_scores.dim(1)); }
    std::uint8_t* codes(std::int64_t i) { return codes_.data() + i * static_cast<std::int64_t>(next_.size()); }
    float* scores(std::int64_t i) { return scores_.data() + i * width(op_); }

    void extend(std::int64_t i, std::int64_t level, std::int64_t sums, std::int64_t wanted) {
        const std::int64_t k = levels_.k;
        const float* table = op_.products.as<const float>() + k * k * level * (level - 1) / 2;
        for (std::int64_t s = 0; s < sums; ++s)
            for (std::int64_t l = 0; l < level; ++l)
                crossings_[s * level + l] = table + (l * k + codes(i)[s * m_ + l]) * k;
        kernels().rq->extend({products_.get() + i * levels_.width, static_cast<std::size_t>(levels_.width),
                              static_cast<std::size_t>(rows_at_once * levels_.width), levels_.offsets(level),
                              static_cast<std::size_t>(k), scores(i), static_cast<std::size_t>(sums), crossings_.data(),
                              static_cast<std::size_t>(level)},
                             static_cast<std::size_t>(wanted), best_.data());
        for (std::int64_t b = 0; b < wanted; ++b) {
            std::copy_n(codes(i) + best_[b].at / k * m_, level, next_.data() + b * m_);
            next_[b * m_ + level] = static_cast<std::uint8_t>(best_[b].at % k);
            scores(i)[b] = best_[b].value;
        }
        std::copy_n(next_.data(), wanted * m_, codes(i));
    }

    const RqExtend& op_;
    const RqLevels& levels_;
    const std::int64_t m_, width_;
    Aligned<float> products_;  // (panels, rows, width)
    std::vector<const float*> crossings_;
    std::vector<ScanHit> best_;
    std::vector<std::uint8_t> codes_, next_;  // (rows, sums, m), (sums, m)
    std::vector<float> scores_;
};

/// The tables of a few queries, side by side: entry (column, codeword, query) is what that codeword adds to its score.
/// They are the codebooks of a product quantizer, one subspace a column, and query q is its q-th unit vector.
class RqTables {
public:
    static constexpr std::int64_t most = 8;

    RqTables(const RqSearch& op, std::int64_t first, std::int64_t count)
        : count_(count),
          levels_(op.codebooks.dim(0)),
          k_(op.codebooks.dim(1)),
          columns_(op.columns().dim(0)),
          units_(count * columns_ * count),
          entries_(columns_ * k_ * count),
          finite_(count, true) {
        const std::int64_t d = op.queries.dim(1), codewords = levels_ * k_;
        std::vector<float> products(codewords * count);
        kernels().scan->f32.products(op.queries.as<const float>() + first * d, static_cast<std::size_t>(count),
                                     op.codebooks.data, static_cast<std::size_t>(codewords),
                                     static_cast<std::size_t>(d), products.data());
        for (std::int64_t q = 0; q < count; ++q) {
            const float *row = products.data() + q * codewords, scale = op.squared ? 2.0f : 1.0f;
            finite_[q] = std::all_of(row, row + codewords, [=](float x) { return std::isfinite(scale * x); });
            for (std::int64_t i = 0; i < codewords; ++i) entries_[i * count + q] = finite_[q] ? scale * row[i] : 0;
            for (std::int64_t c = 0; c < columns_; ++c) units_[(q * columns_ + c) * count + q] = 1;
        }
        double digit = op.norm_step;
        for (std::int64_t c = levels_; c < columns_; ++c, digit *= static_cast<double>(k_))
            for (std::int64_t i = 0; i < k_ * count; ++i)
                entries_[c * k_ * count + i] = static_cast<float>(-digit * static_cast<double>(i / count));
    }

    /// The queries (count, columns * count), and the codebooks (columns, k, count).
    Array queries() { return view("queries", units_, {count_, columns_ * count_}); }
    Array codebooks() { return view("codebooks", entries_, {columns_, k_, count_}); }

    /// Whether a query's tables are: one with NaN or Inf finds nothing.
    bool finite(std::int64_t q) const { return finite_[q]; }

private:
    static Array view(const char* name, std::vector<float>& data, const std::vector<std::int64_t>& shape) {
        Array a;
        a.name = name;
        a.data = data.data();
        a.ndim = static_cast<int>(shape.size());
        std::int64_t stride = 1;
        for (int i = a.ndim - 1; i >= 0; --i) {
            a.shape[i] = shape[i];
            a.strides[i] = stride;
            stride *= shape[i];
        }
        return a;
    }

    std::int64_t count_, levels_, k_, columns_;
    std::vector<float> units_, entries_;
    std::vector<bool> finite_;
};

/// Rows first, ..., first + count of an array.
Array rows(const Array& a, std::int64_t first, std::int64_t count) {
    Array part = a;
    part.data = a.as<char>() + static_cast<std::size_t>(first * a.stride(0)) * size_of(a.dtype);
    part.shape[0] = count;
    return part;
}

}  // namespace

void run(const RqExtend& op, Cpu cpu) {
    const RqLevels levels(op.codebooks, op.beams.dim(2));
    std::vector<RqSearcher> workers;
    for (int i = 0; i < workers_for(op.x.dim(0), rows_at_once, cpu.num_threads); ++i) workers.emplace_back(op, levels);
    parallel_for(op.x.dim(0), rows_at_once, cpu.num_threads,
                 [&](std::int64_t begin, std::int64_t end, int worker) { workers[worker](begin, end - begin); });
}

void run(const RqDecode& op, Cpu cpu) {
    const std::int64_t m = op.codebooks.dim(0), k = op.codebooks.dim(1), d = op.codebooks.dim(2);
    const std::int64_t grain = std::max<std::int64_t>(1, (1 << 17) / std::max<std::int64_t>(1, m * d));
    parallel_for(op.codes.dim(0), grain, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        std::vector<std::int64_t> codewords(m);
        std::vector<double> sum(d);
        for (std::int64_t i = begin; i < end; ++i) {
            const std::uint8_t* code = op.codes.as<const std::uint8_t>() + i * op.codes.dim(1);
            for (std::int64_t l = 0; l < m; ++l)
                codewords[l] = l * k + (k == 256 ? code[l] : code[l / 2] >> (l % 2 * 4) & 15);
            kernels().quantize->sum_rows(op.codebooks.as<const float>(), codewords.data(), static_cast<std::size_t>(m),
                                         static_cast<std::size_t>(d), nullptr, sum.data());
            std::transform(sum.begin(), sum.end(), op.out.as<float>() + i * d,
                           [](double x) { return static_cast<float>(x); });
        }
    });
}

void run(const RqSearch& op, Cpu cpu) {
    const std::int64_t nq = op.queries.dim(0), d = op.queries.dim(1), k = op.scores.dim(1);
    const float infinity = std::numeric_limits<float>::infinity();
    for (std::int64_t first = 0; first < nq; first += RqTables::most) {
        const std::int64_t count = std::min(RqTables::most, nq - first);
        RqTables tables(op, first, count);
        run(PqSearch{tables.queries(), op.codes, op.n, tables.codebooks(), op.include, rows(op.scores, first, count),
                     rows(op.ids, first, count)},
            cpu);
        for (std::int64_t q = 0; q < count; ++q) {
            float* scores = op.scores.as<float>() + (first + q) * k;
            std::int64_t* ids = op.ids.as<std::int64_t>() + (first + q) * k;
            if (!tables.finite(q)) {
                std::fill_n(scores, k, -infinity);
                std::fill_n(ids, k, -1);
            }
            if (!op.squared) continue;
            const float* query = op.queries.as<const float>() + (first + q) * d;
            const double square = std::inner_product(query, query + d, query, 0.0);
            for (std::int64_t i = 0; i < k; ++i)
                scores[i] = ids[i] < 0 ? infinity : std::max(0.0f, static_cast<float>(square - scores[i]));
            sort_equal(scores, ids, std::find(ids, ids + k, -1) - ids);
        }
    }
}

}  // namespace polyvec
