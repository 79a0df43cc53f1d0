#include "polyvec/quantize_pq.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "polyvec/topk.hpp"
#include "short_codebook.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

std::int64_t rows_per_piece(std::int64_t row_size) {
    constexpr std::int64_t elements_per_piece = 1 << 17;  // a piece costs tens of microseconds
    return std::max<std::int64_t>(1, elements_per_piece / std::max<std::int64_t>(1, row_size));
}

}  // namespace

namespace {

/// Writes the code of subspace s; those of 4 bits in their order.
void put_code(std::uint8_t* code, std::int64_t s, bool nibbles, std::int32_t entry) {
    if (!nibbles) {
        code[s] = static_cast<std::uint8_t>(entry);
    } else {
        code[s / 2] = static_cast<std::uint8_t>(s % 2 == 1 ? code[s / 2] | entry << 4 : entry);
    }
}

void encode_short(const PqEncode& op, int num_threads) {
    constexpr std::int64_t rows_at_once = 256;  // whose pieces stay in the cache from subspace to subspace
    const std::int64_t m = op.codebooks.dim(0), ksub = op.codebooks.dim(1), dsub = op.codebooks.dim(2), d = m * dsub;
    const std::int64_t n = op.x.dim(0), code_size = op.codes.dim(1);
    std::vector<ShortCodebook> codebooks;
    codebooks.reserve(m);
    for (std::int64_t s = 0; s < m; ++s)
        codebooks.emplace_back(op.codebooks.as<const float>() + s * ksub * dsub, ksub, dsub);
    parallel_for(n, rows_at_once, num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        std::int32_t ids[rows_at_once];
        for (std::int64_t s = 0; s < m; ++s) {
            kernels().quantize->nearest_short(
                {op.x.as<const float>() + begin * d + s * dsub, static_cast<std::size_t>(end - begin),
                 static_cast<std::size_t>(d), static_cast<std::size_t>(dsub), codebooks[s].codewords,
                 codebooks[s].offsets.data(), static_cast<std::size_t>(ksub),
                 static_cast<std::size_t>(codebooks[s].width)},
                ids);
            for (std::int64_t i = begin; i < end; ++i)
                put_code(op.codes.as<std::uint8_t>() + i * code_size, s, ksub == 16, ids[i - begin]);
        }
    });
}

}  // namespace

void run(const PqEncode& op, Cpu cpu) {
    if (op.codebooks.dim(2) <= ShortCodebook::widest) return encode_short(op, cpu.num_threads);
    const ScanKernel& scan = kernels().scan->f32;
    const std::int64_t m = op.codebooks.dim(0), ksub = op.codebooks.dim(1), dsub = op.codebooks.dim(2), d = m * dsub;
    const std::int64_t code_size = op.codes.dim(1), width = static_cast<std::int64_t>(kernels().scan->panel_width);
    const float *x = op.x.as<const float>(), *codebooks = op.codebooks.as<const float>();
    // |x - c|^2 is least where <x, c> - |c|^2 / 2 is greatest.
    std::vector<float> scale(ksub, 1.0f), offset(m * ksub);
    for (std::int64_t c = 0; c < m * ksub; ++c) {
        const float* codeword = codebooks + c * dsub;
        offset[c] = static_cast<float>(-0.5 * std::inner_product(codeword, codeword + dsub, codeword, 0.0));
    }
    const std::int64_t panels = (op.x.dim(0) + width - 1) / width;
    parallel_for(panels, 4, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        const Aligned<float> panel = aligned<float>(dsub * width), best = aligned<float>(width);
        const Aligned<std::int32_t> nearest = aligned<std::int32_t>(width);
        for (std::int64_t p = begin; p < end; ++p) {
            const std::int64_t first = p * width, count = std::min(width, op.x.dim(0) - first);
            std::uint8_t* codes = op.codes.as<std::uint8_t>() + first * code_size;
            for (std::int64_t s = 0; s < m; ++s) {
                scan.pack(x + first * d + s * dsub, count, d, dsub, panel.get());
                std::fill_n(best.get(), width, -infinity);
                std::fill_n(nearest.get(), width, 0);
                ScanBlock block{panel.get(), codebooks + s * ksub * dsub, static_cast<std::size_t>(ksub),
                                static_cast<std::size_t>(dsub)};
                block.scale = scale.data();
                block.offset = offset.data() + s * ksub;
                scan.nearest(block, best.get(), nearest.get());
                for (std::int64_t i = 0; i < count; ++i) {
                    put_code(codes + i * code_size, s, ksub == 16, nearest[i]);
                }
            }
        }
    });
}

void run(const PqDecode& op, Cpu cpu) {
    const std::int64_t m = op.codebooks.dim(0), ksub = op.codebooks.dim(1), dsub = op.codebooks.dim(2), d = m * dsub;
    const float* codebooks = op.codebooks.as<const float>();
    parallel_for(op.codes.dim(0), rows_per_piece(d), cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
            const std::uint8_t* code = op.codes.as<const std::uint8_t>() + i * op.codes.dim(1);
            for (std::int64_t s = 0; s < m; ++s) {
                const int entry = ksub == 256 ? code[s] : code[s / 2] >> (s % 2 * 4) & 15;
                std::memcpy(op.out.as<float>() + i * d + s * dsub, codebooks + (s * ksub + entry) * dsub,
                            static_cast<std::size_t>(dsub) * sizeof(float));
            }
        }
    });
}

void run(const PqDecodeGradient& op, Cpu cpu) {
    const std::int64_t m = op.dcodebooks.dim(0), ksub = op.dcodebooks.dim(1), dsub = op.dcodebooks.dim(2), d = m * dsub;
    constexpr std::int64_t subspaces = 16;  // of a piece: a cache line of codes or less, gradients of a few lines
    parallel_for(m, subspaces, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = 0; i < op.codes.dim(0); ++i) {
            const std::uint8_t* code = op.codes.as<const std::uint8_t>() + i * op.codes.dim(1);
            const float* grad = op.grad.as<const float>() + i * d + begin * dsub;
            for (std::int64_t s = begin; s < end; ++s, grad += dsub) {
                const int entry = ksub == 256 ? code[s] : code[s / 2] >> (s % 2 * 4) & 15;
                float* sum = op.dcodebooks.as<float>() + (s * ksub + entry) * dsub;
                for (std::int64_t j = 0; j < dsub; ++j) sum[j] += grad[j];
            }
        }
    });
}

namespace {

/// Blocks `first`, ..., first + count of the codes (n, code_size).
void pack_blocks(const std::uint8_t* codes, std::int64_t n, std::int64_t code_size, std::int64_t first,
                 std::int64_t count, std::int64_t columns, std::int64_t block, std::uint8_t* out) {
    for (std::int64_t b = first; b < first + count; ++b, out += columns * block) {
        const std::int64_t rows = std::min(block, n - b * block);
        if (rows < block || code_size < columns) std::fill_n(out, columns * block, std::uint8_t{0});
        kernels().pq->transpose_bytes(codes + b * block * code_size, static_cast<std::size_t>(rows),
                                      static_cast<std::size_t>(code_size), static_cast<std::size_t>(code_size), out,
                                      static_cast<std::size_t>(block));
    }
}

/// The bits of the codes that take part; empty: all.
std::vector<std::uint8_t> included_bits(const Array& include, std::int64_t n) {
    if (!include) return {};
    std::vector<std::uint8_t> bits((n + 63) / 64 * 8);
    if (include.dtype == DType::i64) {
        const auto* ids = include.as<const std::int64_t>();
        for (std::int64_t i = 0; i < include.dim(0); ++i)
            bits[ids[i] / 8] |= static_cast<std::uint8_t>(1 << ids[i] % 8);
    } else {
        const auto* values = include.as<const std::uint8_t>();
        std::int64_t i = 0;
        if constexpr (std::endian::native == std::endian::little) {
            for (; i + 8 <= n; i += 8) {
                constexpr std::uint64_t low_bits = 0x7f7f7f7f7f7f7f7f;
                std::uint64_t eight;
                std::memcpy(&eight, values + i, 8);
                const std::uint64_t set = (((eight & low_bits) + low_bits) | eight) >> 7 & 0x0101010101010101;
                bits[i / 8] = static_cast<std::uint8_t>(set * 0x0102040810204080 >> 56);  // its bit k is byte k of set
            }
        }
        for (; i < n; ++i) bits[i / 8] |= static_cast<std::uint8_t>(static_cast<int>(values[i] != 0) << i % 8);
    }
    return bits;
}

/// The shapes of a search, and its queries' tables.
struct PqShape {
    explicit PqShape(const PqSearch& op)
        : n(op.n),
          k(op.scores.dim(1)),
          d(op.queries.dim(1)),
          m(op.codebooks.dim(0)),
          ksub(op.codebooks.dim(1)),
          dsub(op.codebooks.dim(2)),
          code_size(pq_code_size(op.codebooks)),
          columns(pq_columns(op.codebooks)),
          block(pq_block(op.codebooks)),
          nibbles(ksub == 16),
          squared(op.squared),
          packed(op.codes.ndim == 3),
          queries(op.queries.as<const float>()),
          codebooks(op.codebooks.as<const float>()),
          codes(op.codes.as<const std::uint8_t>()) {}

    /// Tables of `count` queries from `first` on, of these subspaces.
    PqTables tables(std::int64_t first, std::int64_t count, const std::vector<std::int32_t>& subspaces) const {
        return {queries + first * d,
                static_cast<std::size_t>(count),
                codebooks,
                static_cast<std::size_t>(m),
                static_cast<std::size_t>(ksub),
                static_cast<std::size_t>(dsub),
                squared,
                subspaces.data(),
                subspaces.size(),
                static_cast<std::size_t>(stride())};
    }

    /// Floats of a query's tables, those of bytes that pad 4-bit codes as well.
    std::int64_t stride() const { return columns * (nibbles ? 32 : 256); }

    std::int64_t n, k, d, m, ksub, dsub, code_size, columns, block;
    bool nibbles, squared, packed;
    const float *queries, *codebooks;
    const std::uint8_t* codes;
};

/// The candidates of one query among the codes seen so far: those whose sum of bytes leaves open whether they are
/// among the k best. The sums so far are counted by value, so that the k-th best is known at every moment.
class Candidates {
public:
    Candidates(const PqRounding& rounding, std::int64_t k, float threshold) : rounding_(rounding), k_(k) {
        constexpr double slack = 1e-4;  // of a step, for the rounding of an entry itself
        exact_ = std::isfinite(rounding.offset) && std::isfinite(rounding.step) && std::isfinite(rounding.size);
        most_ = rounding.lost * (1 + slack) + size_in_steps();
        const double margin = std::ceil(rounding.lost * (1 + 2 * slack) + 2 * size_in_steps());
        exact_ = exact_ && margin < 1 << 30;
        margin_ = exact_ ? static_cast<std::int32_t>(margin) : 0;
        shift_ = std::max(0, sum_bits() - 10);
        counts_.assign((rounding.most >> shift_) + 1, 0);
        limit_ = 8 * static_cast<std::size_t>(k) + 4096;
        found_.reserve(std::min<std::size_t>(limit_, 1024));
        raise_to(threshold);
    }

    /// No code with a lower sum is wanted. Everything is, where tables are not finite.
    std::int32_t floor() const { return std::max(floor_, guess_); }

    /// k codes have sums as high as this. Lower ones are left out by what is usually rounded off, half of what may be
    /// and a little more, which `complete` tells in the end; once restarted, by all that may be.
    void reached(std::int32_t sum) {
        const std::int32_t usual = std::min(margin_, margin_ / 2 + margin_ / 8 + 2);
        if (exact_) guess_ = std::max(guess_, sum - (guesses_ ? usual : margin_));
    }
    bool complete() const { return !guesses_ || floor_ >= guess_; }

    /// Forgets the guess and the sums. What was found keeps the floor where it is.
    void restart() {
        guesses_ = false;
        guess_ = std::numeric_limits<std::int32_t>::min();
        std::fill(counts_.begin(), counts_.end(), 0u);
        top_ = 0;
        above_ = 0;
    }

    /// Every sum is below 2^this.
    int sum_bits() const { return std::bit_width(static_cast<std::uint32_t>(rounding_.most)); }

    /// Sums are counted in buckets of 2^this values.
    int bucket_bits() const { return shift_; }

    /// Whether the candidates are so many that they should be rescored.
    bool push(std::int32_t sum, std::int64_t id) {
        if (sum < floor()) return false;
        found_.push_back({id, sum});
        if (exact_) {
            const auto bucket = static_cast<std::size_t>(sum >> shift_);
            ++counts_[bucket];
            above_ += bucket > top_;
            if (above_ >= k_) {
                while (above_ >= k_) above_ -= counts_[++top_];
                reached(static_cast<std::int32_t>(top_ << shift_));
            }
        }
        return found_.size() >= limit_;
    }

    /// Moves out those that reach the floor, of them only the best by their sums (about k) unless `all`.
    void take(bool all, std::vector<std::int64_t>& ids) {
        const std::int32_t least = all ? floor() : std::max(floor(), static_cast<std::int32_t>(top_ << shift_));
        std::size_t taken = 0, kept = 0;
        ids.resize(found_.size());
        for (const Found found : found_) {  // without a branch
            ids[taken] = found.id;
            found_[kept] = found;
            taken += found.sum >= least;
            kept += found.sum < least;
        }
        ids.resize(taken);
        found_.resize(all ? 0 : kept);
    }

    /// Sums that cannot reach `score` are below the floor.
    void raise_to(float score) {
        if (!exact_ || !(rounding_.step > 0) || !std::isfinite(score)) return;
        const double sum = std::floor((score - rounding_.offset) / rounding_.step - most_);
        if (sum > floor_) floor_ = static_cast<std::int32_t>(std::min(sum, 2e9));
    }

private:
    struct Found {
        std::int64_t id;
        std::int32_t sum;
    };

    double size_in_steps() const { return rounding_.step > 0 ? rounding_.size / rounding_.step : 0; }

    PqRounding rounding_;
    std::int64_t k_;
    bool exact_, guesses_ = true;
    double most_;
    std::int32_t margin_, floor_ = std::numeric_limits<std::int32_t>::min(), guess_ = floor_;
    int shift_;
    std::size_t limit_, top_ = 0;
    std::int64_t above_ = 0;
    std::vector<std::uint32_t> counts_;
    std::vector<Found> found_;
};

/// What both ways of searching share: the codes that take part, and the best of each query so far.
class PqSearcher {
protected:
    PqSearcher(const PqSearch& op, const PqShape& shape)
        : op_(op), shape_(shape), allowed_(included_bits(op.include, op.n)), best_(op.queries.dim(0), TopK(shape.k)) {}

    bool allows(std::int64_t id) const {
        return id < shape_.n && (allowed_.empty() || (allowed_[id / 8] >> id % 8 & 1) != 0);
    }

    /// Codes [begin, end) that take part; begin is a multiple of 8.
    std::int64_t count_allowed(std::int64_t begin, std::int64_t end) const {
        if (allowed_.empty()) return end - begin;
        return std::transform_reduce(allowed_.begin() + begin / 8, allowed_.begin() + (end + 7) / 8, std::int64_t{0},
                                     std::plus<>(), [](std::uint8_t bits) { return std::popcount(bits); });
    }

    void merge(std::int64_t first, const std::vector<TopK>& found) {
        const std::lock_guard lock(merging_);
        for (std::size_t q = 0; q < found.size(); ++q) best_[first + q].merge(found[q]);
    }

    float threshold(std::int64_t q) {
        const std::lock_guard lock(merging_);
        return best_[q].threshold();
    }

    void write() {
        for (std::size_t q = 0; q < best_.size(); ++q)
            best_[q].write(op_.scores.as<float>() + q * shape_.k, op_.ids.as<std::int64_t>() + q * shape_.k,
                           shape_.squared ? -1.0f : 1.0f);
    }

    const PqSearch& op_;
    const PqShape& shape_;
    const std::vector<std::uint8_t> allowed_;

private:
    std::vector<TopK> best_;
    std::mutex merging_;
};

/// Search by tables in registers.
class RegisterSearch : PqSearcher {
public:
    RegisterSearch(const PqSearch& op, const PqShape& shape) : PqSearcher(op, shape), kernel_(*kernels().pq) {}

    void run(int num_threads) {
        const std::int64_t nq = op_.queries.dim(0), threads = workers_for(most_pieces, 1, num_threads);
        group_ = std::max<std::int64_t>(1, std::min({cache_bytes / shape_.stride(), most_in_group, nq}));
        const std::int64_t groups = (nq + group_ - 1) / group_;
        const std::int64_t wanted = threads > 1 ? (pieces_per_thread * threads) / std::max<std::int64_t>(1, groups) : 0;
        range_ = std::min(shape_.n / std::max<std::int64_t>(1, wanted), most_bytes / shape_.columns);
        range_ = (std::max(range_, least_range) + chunk - 1) / chunk * chunk;
        const std::int64_t ranges = (shape_.n + range_ - 1) / range_, pieces = groups * ranges;
        scratch_.resize(workers_for(pieces, 1, num_threads));
        parallel_for(pieces, 1, num_threads, [&](std::int64_t piece, std::int64_t, int worker) {
            const std::int64_t first = piece / ranges * group_;
            scan(first, std::min(group_, nq - first), piece % ranges * range_, scratch_[worker]);
        });
        write();
    }

private:
    static constexpr std::int64_t chunk = 512;   // codes between two looks at the hits
    static constexpr std::int64_t sampled = 32;  // one block of so many is in a sample
    static constexpr std::int64_t least_range = 16 * chunk, most_bytes = 1 << 26;  // a piece: tens of milliseconds
    static constexpr std::int64_t pieces_per_thread = 4, most_pieces = 1 << 20;
    // Queries that share a pass over the codes: as many as keep their tables in the level-2 cache. A quarter as many
    // waited longer for codes from the level-3 cache.
    static constexpr std::int64_t cache_bytes = 1 << 19, most_in_group = 64;

    /// Memory of one thread: tables of a group of queries, and codes that are packed on the way.
    struct Scratch {
        Aligned<float> entries;
        Aligned<std::uint8_t> tables, blocks;
        std::vector<const std::uint8_t*> table;        // of each query
        std::vector<std::vector<std::int32_t>> steps;  // the same
        Aligned<std::int32_t> floor;
        Aligned<PqHit> hits;
    };

    void scan(std::int64_t first, std::int64_t count, std::int64_t begin, Scratch& own) {
        const std::int64_t end = std::min(shape_.n, begin + range_);
        if (!own.entries) {
            own.entries = aligned<float>(shape_.stride() * group_);
            own.tables = aligned<std::uint8_t>(table_size() * group_);
            for (std::int64_t q = 0; q < group_; ++q) own.table.push_back(own.tables.get() + q * table_size());
            own.blocks = aligned<std::uint8_t>(shape_.packed ? 0 : chunk * shape_.columns);
            own.floor = aligned<std::int32_t>(most());
            own.hits = aligned<PqHit>(chunk * std::min(group_, most()));
        }
        std::vector<TopK> found(count, TopK(shape_.k));
        std::vector<Candidates> candidates = build_tables(first, count, own);
        if (shape_.nibbles && shape_.packed && shape_.k <= count_allowed(begin, end) / sampled)
            guess(begin, end, candidates, own);
        pass(begin, end, 0, count, candidates, own, found);
        for (std::int64_t q = 0; q < count; ++q) {
            if (candidates[q].complete()) continue;
            candidates[q].restart();
            found[q] = TopK(shape_.k);
            pass(begin, end, q, q + 1, candidates, own, found);
        }
        merge(first, found);
    }

    PqScan scan_of(const std::uint8_t* codes, std::int64_t blocks, std::int64_t q, std::int64_t queries,
                   const Scratch& own) const {
        return {codes,
                static_cast<std::size_t>(blocks),
                static_cast<std::size_t>(shape_.columns),
                own.table.data() + q,
                static_cast<std::size_t>(queries),
                own.steps[q].data(),
                own.steps[q].size(),
                nullptr,
                nullptr};
    }

    /// Starts the candidates from the sums of a sample of codes: without one, most of what reaches a floor does so
    /// while the floor is still low. The sum taken is one that far more than k of all codes should reach.
    void guess(std::int64_t begin, std::int64_t end, std::vector<Candidates>& candidates, const Scratch& own) const {
        const std::int64_t blocks = (end - begin) / (sampled * shape_.block), n = blocks * shape_.block;
        const double share = static_cast<double>(shape_.k) / sampled;
        const auto rank = static_cast<std::size_t>(share + 4 * std::sqrt(share) + 4);
        const auto count = static_cast<std::int64_t>(candidates.size());
        std::vector<std::int32_t> sums(std::min(count, most()) * n), counted(allowed_.empty() ? 0 : n);
        for (std::size_t v = 0; v < counted.size(); ++v) {
            const auto at = static_cast<std::int64_t>(v);
            counted[v] = allows(begin + at / shape_.block * sampled * shape_.block + at % shape_.block) ? -1 : 0;
        }
        for (std::int64_t q = 0; q < count;) {
            const std::int64_t queries = together(count - q);
            kernel_.sums_of_nibbles(scan_of(shape_.codes + begin * shape_.columns, blocks, q, queries, own), sampled,
                                    sums.data(), static_cast<std::size_t>(n));
            for (std::int64_t j = 0; j < queries; ++j) {
                std::int32_t* own_sums = sums.data() + j * n;
                for (std::size_t v = 0; v < counted.size(); ++v) own_sums[v] &= counted[v];
                candidates[q + j].reached(kernel_.value_of_rank(own_sums, static_cast<std::size_t>(n), rank,
                                                                candidates[q + j].sum_bits(),
                                                                candidates[q + j].bucket_bits()));
            }
            q += queries;
        }
    }

    /// Codes [begin, end) against queries [from, to) of the group.
    void pass(std::int64_t begin, std::int64_t end, std::int64_t from, std::int64_t to,
              std::vector<Candidates>& candidates, const Scratch& own, std::vector<TopK>& found) const {
        const int lane_bits = std::countr_zero(kernel_.most_queries);
        for (std::int64_t i = begin; i < end; i += chunk) {
            const std::int64_t block = i / shape_.block, blocks = (std::min(chunk, end - i) - 1) / shape_.block + 1;
            const std::uint8_t* codes = shape_.codes + block * shape_.block * shape_.columns;
            if (!shape_.packed) {
                pack_blocks(shape_.codes, shape_.n, shape_.code_size, block, blocks, shape_.columns, shape_.block,
                            own.blocks.get());
                codes = own.blocks.get();
            }
            for (std::int64_t q = from; q < to;) {
                const std::int64_t queries = together(to - q);
                PqScan scan = scan_of(codes, blocks, q, queries, own);
                if (!allowed_.empty()) scan.allowed = allowed_.data() + i / 8;
                for (std::int64_t j = 0; j < queries; ++j) own.floor[j] = candidates[q + j].floor();
                scan.floor = own.floor.get();
                const std::size_t hits =
                    (shape_.nibbles ? kernel_.select_nibbles : kernel_.select_bytes)(scan, own.hits.get());
                for (std::size_t h = 0; h < hits; ++h) {
                    const auto [sum, at] = own.hits[h];
                    const std::int64_t id = i + (at >> lane_bits), lane = q + (at & (kernel_.most_queries - 1));
                    if (id < shape_.n && candidates[lane].push(sum, id))
                        rescore(lane, candidates[lane], own, found[lane]);
                }
                q += queries;
            }
        }
        for (std::int64_t q = from; q < to; ++q) rescore(q, candidates[q], own, found[q]);
    }

    /// How many of `left` queries are scanned together.
    std::int64_t together(std::int64_t left) const {
        return std::min<std::int64_t>(std::bit_floor<std::uint64_t>(left), most());
    }

    /// Moves the candidates to the best by their scores. Those of the k highest sums come first: their scores tell more
    /// than their sums do about which others can be among the best.
    void rescore(std::int64_t q, Candidates& candidates, const Scratch& own, TopK& found) const {
        const PqScores codes{shape_.codes,
                             static_cast<std::size_t>(shape_.packed ? shape_.columns : shape_.code_size),
                             static_cast<std::size_t>(shape_.packed ? shape_.block : 1),
                             own.entries.get() + q * shape_.stride(),
                             own.steps[q].data(),
                             own.steps[q].size()};
        std::vector<std::int64_t> ids;
        std::vector<float> scores;
        for (const bool all : {false, true}) {
            candidates.take(all, ids);
            scores.resize(ids.size());
            (shape_.nibbles ? kernel_.score_nibbles : kernel_.score_bytes)(codes, ids.data(), ids.size(),
                                                                           scores.data());
            for (std::size_t i = 0; i < ids.size(); ++i) found.push(scores[i], ids[i]);
            candidates.raise_to(found.raise_threshold());
        }
    }

    /// Writes the tables and the steps of `count` queries from `first` on.
    std::vector<Candidates> build_tables(std::int64_t first, std::int64_t count, Scratch& own) {
        own.steps.assign(count, {});
        std::vector<std::vector<std::int32_t>> active(count);
        bool all_active = true;
        for (std::int64_t q = 0; q < count; ++q) {
            active[q] = active_subspaces(shape_.queries + (first + q) * shape_.d);
            all_active &= static_cast<std::int64_t>(active[q].size()) == shape_.m;
        }
        if (shape_.nibbles && !(all_active && shape_.m % 8 == 0)) {  // a step has subspaces that a query lacks
            std::fill_n(own.entries.get(), shape_.stride() * count, 0.0f);
            std::fill_n(own.tables.get(), table_size() * count, std::uint8_t{0});
        }
        if (all_active) kernel_.entries(shape_.tables(first, count, active[0]), own.entries.get());
        std::vector<Candidates> candidates;
        for (std::int64_t q = 0; q < count; ++q) {
            float* entries = own.entries.get() + q * shape_.stride();
            const PqTables tables = shape_.tables(first + q, 1, active[q]);
            if (!all_active) kernel_.entries(tables, entries);
            PqRounding rounding;
            constexpr double near = -std::numeric_limits<double>::infinity();
            kernel_.round_down(tables, entries, near, own.tables.get() + q * table_size(), rounding);
            // float32 sums of m entries are off by less than this
            rounding.size *= static_cast<double>(shape_.m + 8) * std::numeric_limits<float>::epsilon();
            candidates.emplace_back(rounding, shape_.k, threshold(first + q));
        }
        for (std::int64_t q = 0; q < count; q += most()) {  // queries that are scanned together share their steps
            std::vector<bool> used(shape_.nibbles ? shape_.columns / 4 : shape_.columns);
            for (std::int64_t j = q; j < std::min(count, q + most()); ++j) {
                for (const std::int32_t s : active[j]) used[shape_.nibbles ? s / 8 : s] = true;
            }
            for (std::size_t step = 0; step < used.size(); ++step) {
                if (used[step]) own.steps[q].push_back(static_cast<std::int32_t>(step));
            }
            for (std::int64_t j = q + 1; j < std::min(count, q + most()); ++j) own.steps[j] = own.steps[q];
        }
        return candidates;
    }

    /// Subspaces in which a query is not zero: the others add nothing to an inner product.
    std::vector<std::int32_t> active_subspaces(const float* query) const {
        std::vector<std::int32_t> subspaces;
        for (std::int64_t s = 0; s < shape_.m; ++s) {
            const float* piece = query + s * shape_.dsub;
            if (shape_.squared || std::any_of(piece, piece + shape_.dsub, [](float x) { return x != 0; }))
                subspaces.push_back(static_cast<std::int32_t>(s));
        }
        return subspaces;
    }

    std::int64_t table_size() const { return shape_.columns * (shape_.nibbles ? 32 : 256); }
    std::int64_t most() const { return shape_.nibbles ? static_cast<std::int64_t>(kernel_.most_queries) : 1; }

    const PqKernels& kernel_;
    std::int64_t group_ = 1, range_ = 0;
    std::vector<Scratch> scratch_;
};

/// Search of 8-bit codes by float tables in memory.
class FloatSearch : PqSearcher {
public:
    FloatSearch(const PqSearch& op, const PqShape& shape) : PqSearcher(op, shape), kernel_(*kernels().pq) {
        subspaces_.resize(shape.m);
        std::iota(subspaces_.begin(), subspaces_.end(), 0);
    }

    void run(int num_threads) {
        constexpr std::int64_t lookups_per_piece = 1 << 21, least = 8192;  // so that tables cost little beside the scan
        range_ = std::max(least, lookups_per_piece / shape_.m) / block * block;
        const std::vector<Group> groups = query_groups();
        const std::int64_t ranges = (shape_.n + range_ - 1) / range_;
        const std::int64_t pieces = static_cast<std::int64_t>(groups.size()) * ranges;
        scratch_.resize(workers_for(pieces, 1, num_threads));
        parallel_for(pieces, 1, num_threads, [&](std::int64_t piece, std::int64_t, int worker) {
            scan(groups[piece / ranges], piece % ranges * range_, scratch_[worker]);
        });
        write();
    }

private:
    static constexpr std::int64_t block = 256;  // codes between two looks at the hits

    /// Queries that scan the codes together.
    struct Group {
        std::int64_t first, count, width;
    };

    struct Scratch {
        Aligned<float> entries, tables, floor;
        Aligned<std::uint8_t> codes;
        std::vector<ScanHit> hits;
    };

    std::vector<Group> query_groups() const {
        constexpr std::int64_t fewest = 3;  // a scan for one query takes a third of the time of one for many
        const std::int64_t n = op_.queries.dim(0), width = static_cast<std::int64_t>(kernel_.width);
        std::vector<Group> groups;
        for (std::int64_t first = 0; first < n; first += groups.back().count) {
            const bool many = n - first >= fewest;
            groups.push_back({first, many ? std::min(n - first, width) : 1, many ? width : 1});
        }
        return groups;
    }

    void scan(const Group& group, std::int64_t begin, Scratch& own) {
        const std::int64_t end = std::min(shape_.n, begin + range_), width = static_cast<std::int64_t>(kernel_.width);
        const std::int64_t stride = shape_.stride();
        if (!own.entries) {
            own.entries = aligned<float>(stride * width);
            own.tables = aligned<float>(stride * width);
            own.floor = aligned<float>(width);
            own.codes = aligned<std::uint8_t>(shape_.packed ? block * shape_.code_size : 0);
            own.hits.resize(block * width);
        }
        kernel_.entries(shape_.tables(group.first, group.count, subspaces_), own.entries.get());
        if (group.width > 1)
            kernel_.interleave(own.entries.get(), static_cast<std::size_t>(group.count),
                               static_cast<std::size_t>(stride), own.tables.get());
        const float* tables = group.width > 1 ? own.tables.get() : own.entries.get();
        std::vector<TopK> found(group.count, TopK(shape_.k));
        std::fill_n(own.floor.get(), group.width, std::numeric_limits<float>::quiet_NaN());  // lanes without a query
        for (std::int64_t q = 0; q < group.count; ++q) own.floor[q] = threshold(group.first + q);
        for (std::int64_t i = begin; i < end; i += block) {
            const std::int64_t count = std::min(block, end - i);
            const std::size_t hits = (group.width > 1 ? kernel_.scan_many : kernel_.scan_one)(
                tables, rows(i, count, own), static_cast<std::size_t>(count),
                static_cast<std::size_t>(shape_.code_size), own.floor.get(), own.hits.data());
            for (std::size_t h = 0; h < hits; ++h) {
                const auto [score, at] = own.hits[h];
                const std::int64_t id = i + at / group.width;
                if (allows(id)) found[at % group.width].push(score, id);
            }
            for (std::int64_t q = 0; q < group.count; ++q) own.floor[q] = std::max(own.floor[q], found[q].threshold());
        }
        merge(group.first, found);
    }

    /// Codes i, ..., i + count, a row each.
    const std::uint8_t* rows(std::int64_t i, std::int64_t count, Scratch& own) const {
        if (!shape_.packed) return shape_.codes + i * shape_.code_size;
        for (std::int64_t at = 0; at < count; at += shape_.block) {
            kernel_.transpose_bytes(shape_.codes + (i + at) * shape_.columns, static_cast<std::size_t>(shape_.columns),
                                    static_cast<std::size_t>(std::min(shape_.block, count - at)),
                                    static_cast<std::size_t>(shape_.block), own.codes.get() + at * shape_.code_size,
                                    static_cast<std::size_t>(shape_.code_size));
        }
        return own.codes.get();
    }

    const PqKernels& kernel_;
    std::vector<std::int32_t> subspaces_;
    std::int64_t range_ = 0;
    std::vector<Scratch> scratch_;
};

}  // namespace

void run(const PqPack& op, Cpu cpu) {
    const std::int64_t columns = op.blocks.dim(1), block = op.blocks.dim(2);
    parallel_for(op.blocks.dim(0), rows_per_piece(columns * block), cpu.num_threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     pack_blocks(op.codes.as<const std::uint8_t>(), op.codes.dim(0), op.codes.dim(1), begin,
                                 end - begin, columns, block, op.blocks.as<std::uint8_t>() + begin * columns * block);
                 });
}

void run(const PqSearch& op, Cpu cpu) {
    const PqShape shape(op);
    if (shape.nibbles || static_cast<std::size_t>(op.queries.dim(0)) <= kernels().pq->few_for_bytes) {
        RegisterSearch(op, shape).run(cpu.num_threads);
    } else {
        FloatSearch(op, shape).run(cpu.num_threads);
    }
}

}  // namespace polyvec
