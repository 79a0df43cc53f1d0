#include "polyvec/scan.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "polyvec/topk.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

constexpr std::int64_t block_bytes = 1 << 18;  // items that stay in L2 while a group of panels passes over them
constexpr std::int64_t group_bytes = 1 << 19;  // panels of that group
constexpr std::int64_t batch_bytes = 1 << 24;  // queries that are searched together, and what is kept for them
constexpr std::int64_t piece_flops = 1 << 30;  // a piece of work: about 10 ms
constexpr std::int64_t max_group = 8, min_block = 64, max_block = 1024;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

/// Items of `bytes` that make a block.
std::int64_t block_rows(std::int64_t bytes) {
    return std::clamp<std::int64_t>(block_bytes / std::max<std::int64_t>(bytes, 1), min_block, max_block);
}

/// Panels of `bytes` that share a block of items.
std::int64_t group_panels(std::int64_t bytes) {
    return std::clamp<std::int64_t>(group_bytes / std::max<std::int64_t>(bytes, 1), 1, max_group);
}

/// 1 / |x| of a squared norm, 0 for a zero vector.
float inverse_root(float square) {
    return square > 0 ? 1 / std::sqrt(square) : 0;
}

float inverse_norm(const float* row, std::int64_t d) {
    float square;
    kernels().scan->f32.squares(row, 1, d, &square);
    return inverse_root(square);
}

const ScanKernel& kernel_of(const ScanItems& items) {
    const ScanKernels& scan = *kernels().scan;
    switch (items.rows.dtype) {
        case DType::f16:
            return scan.f16;
        case DType::i8:
            return scan.i8;
        case DType::f32:
            return scan.f32;
        default:
            return scan.bf16;
    }
}

/// Items, and what turns products with some of them into values: value = product * scale + offset, higher is better.
/// For l2 that is q . x - (|x|^2 - bias) / 2, which orders items as -(|q - x|^2 - bias) does.
class Factors {
public:
    const ScanKernel& kernel;
    const std::int64_t d, row_bytes;

    Factors(Metric metric, const ScanItems& items, const Array& bias)
        : kernel(kernel_of(items)),
          d(items.rows.dim(1)),
          row_bytes(d * static_cast<std::int64_t>(size_of(items.rows.dtype))),
          metric_(metric),
          items_(items),
          bias_(bias),
          padding_(row_bytes / std::max<std::int64_t>(d, 1) * (ceil_div(d, kernel.align) * kernel.align - d)) {}

    /// Chooses the items: `n` of them from `first` on.
    void compute(std::int64_t first, std::int64_t n) {
        first_ = first;
        if (padding_ > 0) pad(n);
        const bool scaled = items_.rows.dtype == DType::i8;
        if (metric_ == Metric::ip && !bias_ && !scaled) return;
        offset_.assign(n, 0);
        if (bias_) std::copy_n(bias_.as<const float>() + first, n, offset_.begin());
        if (scaled) {
            scale_.assign(n, 1);
            if (items_.scales) std::copy_n(items_.scales.as<const float>() + first, n, scale_.begin());
        }
        if (metric_ == Metric::ip) return;
        squares_.resize(n);
        kernel.squares(row(first), n, d, squares_.data());
        if (metric_ == Metric::l2) {
            for (std::int64_t i = 0; i < n; ++i) {
                const float scale = scaled ? scale_[i] : 1;
                offset_[i] = (offset_[i] - scale * scale * squares_[i]) / 2;
            }
        } else {
            for (std::int64_t i = 0; i < n; ++i) squares_[i] = inverse_root(squares_[i]);
            if (scaled) {  // of a scale nothing is left but its sign
                for (std::int64_t i = 0; i < n; ++i)
                    squares_[i] *= static_cast<float>((scale_[i] > 0) - (scale_[i] < 0));
            }
            scale_.swap(squares_);
        }
    }

    /// `panel` against `n` of the chosen items from `first` on.
    ScanBlock block(const void* panel, std::int64_t first, std::int64_t n) const {
        ScanBlock block;
        block.panel = panel;
        block.rows = padding_ > 0 ? padded_.data() + (first - first_) * (row_bytes + padding_) : row(first);
        block.n = n;
        block.d = d;
        block.scale = scale_.empty() ? nullptr : scale_.data() + (first - first_);
        block.offset = offset_.empty() ? nullptr : offset_.data() + (first - first_);
        block.first_row = first;
        return block;
    }

    /// 1 / |x| of item i, 0 for a zero vector.
    float inverse_size(std::int64_t i) const {
        const float scale = items_.scales ? std::fabs(items_.scales.as<const float>()[i]) : 1;
        float square;
        kernel.squares(row(i), 1, d, &square);
        return scale > 0 ? inverse_root(square) / scale : 0;
    }

    const unsigned char* row(std::int64_t i) const { return items_.rows.as<const unsigned char>() + i * row_bytes; }

private:
    void pad(std::int64_t n) {
        padded_.assign(n * (row_bytes + padding_), 0);
        for (std::int64_t i = 0; i < n; ++i)
            std::copy_n(row(first_ + i), row_bytes, padded_.data() + i * (row_bytes + padding_));
    }

    Metric metric_;
    ScanItems items_;
    Array bias_;
    std::int64_t padding_;  // bytes that kernels need behind each row
    std::int64_t first_ = 0;
    std::vector<float> scale_, offset_, squares_;
    std::vector<unsigned char> padded_;
};

/// out[i] = the inner product, or the squared distance (l2), of `query` and item ids[i]; without bias or norms.
void compare(bool l2, const float* query, const ScanItems& items, const std::int64_t* ids, std::int64_t n, float* out) {
    const DistanceKernels& distance = *kernels().distance;
    const std::int64_t d = items.rows.dim(1);
    if (items.rows.dtype == DType::f32) {
        (l2 ? distance.i64.l2 : distance.i64.dot)(query, items.rows.as<const float>(), ids, n, d, out);
        return;
    }
    const NarrowDistanceKernel& kernel = items.rows.dtype == DType::f16  ? distance.f16
                                         : items.rows.dtype == DType::i8 ? distance.i8
                                                                         : distance.bf16;
    (l2 ? kernel.l2 : kernel.dot)(query, items.rows.data, items.scales ? items.scales.as<const float>() : nullptr, ids,
                                  n, d, out);
}

/// Queries as they meet items: of unit length for cosine, then rounded where items ask for it.
class Prepared {
public:
    const float* rows;
    std::int64_t stride;

    /// `rows` (n, d), `stride` apart, which must outlive this.
    Prepared(const float* rows, std::int64_t n, std::int64_t stride, std::int64_t d, Metric metric,
             const ScanKernel& kernel)
        : rows(rows), stride(stride) {
        if (metric != Metric::cosine && !kernel.round) return;
        changed_ = aligned<float>(n * d);
        for (std::int64_t i = 0; i < n; ++i) {
            const float* row = rows + i * stride;
            const float scale = metric == Metric::cosine ? inverse_norm(row, d) : 1;
            std::transform(row, row + d, changed_.get() + i * d, [=](float x) { return x * scale; });
        }
        if (kernel.round) kernel.round(changed_.get(), n, d);
        this->rows = changed_.get();
        this->stride = d;
    }

private:
    Aligned<float> changed_;
};

/// Some of the queries, packed.
class Batch {
public:
    const std::int64_t first, n, d, width, panels;

    /// As many queries as fill a batch, from `first` on; `kept` bytes are needed for each beside its panel.
    Batch(const Array& queries, std::int64_t first, std::int64_t kept, Metric metric, const ScanItems& items,
          int num_threads)
        : first(first),
          n(std::min(queries.dim(0) - first, most(4 * queries.dim(1) + kept))),
          d(queries.dim(1)),
          width(kernels().scan->panel_width),
          panels(ceil_div(n, width)),
          panel_words_(width * kernel_of(items).panel_words(d)),
          packed_(aligned<std::uint32_t>(panels * panel_words_)),
          prepared_(panels) {
        const ScanKernel& kernel = kernel_of(items);
        parallel_for(panels, 1, num_threads, [&](std::int64_t p, std::int64_t, int) {
            const float* rows = queries.as<const float>() + (first + p * width) * d;
            prepared_[p].emplace(rows, lanes(p), d, d, metric, kernel);
            kernel.pack(prepared_[p]->rows, lanes(p), d, d, packed_.get() + p * panel_words_);
        });
    }

    const float* row(std::int64_t i) const { return prepared_[i / width]->rows + i % width * d; }
    const void* panel(std::int64_t p) const { return packed_.get() + p * panel_words_; }
    std::int64_t panel_bytes() const { return panel_words_ * 4; }
    std::int64_t lanes(std::int64_t p) const { return std::min(width, n - p * width); }

    /// Sorts the pairs of the lists into panels, all but those of a query and its `keep` (may be null).
    void exclude(const IdLists& lists, const std::int64_t* keep, int num_threads) {
        excluded_.resize(panels);
        if (!lists.offsets) return;
        const auto* offsets = lists.offsets.as<const std::int64_t>() + first;
        const auto* ids = lists.ids.as<const std::int64_t>();
        parallel_for(panels, 1, num_threads, [&](std::int64_t p, std::int64_t, int) {
            for (std::int64_t lane = 0; lane < lanes(p); ++lane) {
                const std::int64_t query = p * width + lane;
                for (std::int64_t i = offsets[query]; i < offsets[query + 1]; ++i)
                    if (!keep || ids[i] != keep[first + query]) excluded_[p].push_back(ids[i] * width + lane);
            }
            std::sort(excluded_[p].begin(), excluded_[p].end());
        });
    }

    /// Gives `block` its part of the pairs that are excluded from panel p.
    void set_excluded(std::int64_t p, ScanBlock& block) const {
        const auto& pairs = excluded_[p];
        const auto from = [&](std::uint64_t item) {
            return pairs.data() + (std::lower_bound(pairs.begin(), pairs.end(), item * width) - pairs.begin());
        };
        block.excluded = from(block.first_row);
        block.excluded_end = from(block.first_row + block.n);
    }

private:
    static std::int64_t most(std::int64_t bytes) {
        const std::int64_t width = kernels().scan->panel_width;
        return width * std::max<std::int64_t>(1, batch_bytes / (width * std::max<std::int64_t>(bytes, 1)));
    }

    std::int64_t panel_words_;
    Aligned<std::uint32_t> packed_;
    std::vector<std::optional<Prepared>> prepared_;  // the queries of each panel
    std::vector<std::vector<std::uint64_t>> excluded_;
};

/// How a batch meets n items: in groups of panels, which share each block of items, and in ranges of items that run
/// side by side where groups are too few to keep all threads busy. Results are kept for each range apart, and merged.
class Sweep {
public:
    /// What is done at a time: panels [begin, end) meet `n` items from `first` on, a block of a range.
    struct Step {
        std::int64_t range, begin, end, first, n;
    };

    const std::int64_t block, panels, items;

    Sweep(const Batch& batch, const ScanItems& items, int num_threads)
        : block(block_rows(batch.d * static_cast<std::int64_t>(size_of(items.rows.dtype)))),
          panels(batch.panels),
          items(items.rows.dim(0)),
          num_threads_(num_threads) {
        const std::int64_t threads = workers_for(std::max<std::int64_t>(this->items, 1), 1, num_threads);
        group_ = std::clamp<std::int64_t>(panels / (4 * threads), 1, group_panels(batch.panel_bytes()));
        groups_ = ceil_div(panels, group_);
        const std::int64_t wanted = threads == 1 || groups_ >= threads ? 1 : ceil_div(2 * threads, groups_);
        ranges_ = std::clamp<std::int64_t>(this->items / (4 * block), 1, wanted);
        piece_ = std::max(block, piece_flops / (2 * batch.width * std::max<std::int64_t>(batch.d, 1) * group_));
    }

    std::int64_t ranges() const { return ranges_; }
    int workers() const { return workers_for(ranges_ * groups_, 1, num_threads_); }

    /// Calls visit(step, worker). A panel meets the items of a range in order.
    template <class Visit>
    void run(const Visit& visit) const {
        const std::int64_t range_size = ceil_div(items, ranges_);
        for (std::int64_t done = 0; done < range_size; done += piece_) {
            parallel_for(ranges_ * groups_, 1, num_threads_, [&](std::int64_t task, std::int64_t, int worker) {
                const std::int64_t range = task / groups_, group = task % groups_;
                const std::int64_t first = range * range_size + done;
                const std::int64_t end = std::min({first + piece_, (range + 1) * range_size, items});
                for (std::int64_t item = first; item < end; item += block)
                    visit(Step{range, group * group_, std::min((group + 1) * group_, panels), item,
                               std::min(block, end - item)},
                          worker);
            });
        }
    }

private:
    int num_threads_;
    std::int64_t group_, groups_, ranges_, piece_;
};

/// One worker's part in finding the best items of a batch.
class Selector {
public:
    Selector(const Batch& batch, const ScanTopK& op, std::int64_t block)
        : batch_(batch),
          factors_(op.metric, op.items, op.bias),
          hits_(aligned<ScanHit>(block * batch.width)),
          floor_(batch.width),
          products_(block * few) {}

    /// best: the collectors of the batch's queries.
    void operator()(const Sweep::Step& step, TopK* best) {
        factors_.compute(step.first, step.n);
        for (std::int64_t p = step.begin; p < step.end; ++p) {
            if (batch_.lanes(p) <= few) {
                by_row(p, step.first, step.n, best + p * batch_.width);
            } else {
                by_panel(p, step.first, step.n, best + p * batch_.width);
            }
        }
    }

private:
    static constexpr std::int64_t few = 6;  // queries that are faster by themselves than as a panel

    void by_panel(std::int64_t p, std::int64_t first, std::int64_t n, TopK* best) {
        for (std::int64_t end = first + n, rows; first < end; first += rows) {
            // Until the collectors have seen enough, everything is a hit: a few items at a time then.
            rows = best[0].threshold() == -infinity ? std::min(min_block, end - first) : end - first;
            ScanBlock block = factors_.block(batch_.panel(p), first, rows);
            batch_.set_excluded(p, block);
            for (std::int64_t lane = 0; lane < batch_.width; ++lane)
                floor_[lane] = lane < batch_.lanes(p) ? best[lane].threshold() : infinity;
            const std::size_t found = factors_.kernel.select(block, floor_.data(), hits_.get());
            for (std::size_t i = 0; i < found; ++i)
                best[hits_[i].at % batch_.width].push(hits_[i].value, first + hits_[i].at / batch_.width);
        }
    }

    void by_row(std::int64_t p, std::int64_t first, std::int64_t n, TopK* best) {
        const std::int64_t lanes = batch_.lanes(p);
        ScanBlock block = factors_.block(nullptr, first, n);
        batch_.set_excluded(p, block);
        factors_.kernel.products(batch_.row(p * batch_.width), lanes, factors_.row(first), n, batch_.d,
                                 products_.data());
        for (const auto* pair = block.excluded; pair != block.excluded_end; ++pair)
            products_[*pair % batch_.width * n + *pair / batch_.width - first] = std::nanf("");
        for (std::int64_t lane = 0; lane < lanes; ++lane) {
            for (std::int64_t i = 0; i < n; ++i) {
                float value = products_[lane * n + i];
                if (block.scale) value *= block.scale[i];
                if (block.offset) value += block.offset[i];
                if (value > best[lane].threshold()) best[lane].push(value, first + i);
            }
        }
    }

    const Batch& batch_;
    Factors factors_;
    Aligned<ScanHit> hits_;
    std::vector<float> floor_, products_;
};

/// Replaces the values of `hits` by -(|query - x|^2 - bias), computed without cancellation.
void set_distances(const float* query, const ScanTopK& op, std::vector<Hit>& hits) {
    std::vector<std::int64_t> ids(hits.size());
    std::vector<float> distances(hits.size());
    std::transform(hits.begin(), hits.end(), ids.begin(), [](const Hit& hit) { return hit.id; });
    compare(true, query, op.items, ids.data(), ids.size(), distances.data());
    for (std::size_t i = 0; i < hits.size(); ++i)
        hits[i].score = (op.bias ? op.bias.as<const float>()[ids[i]] : 0) - distances[i];
}

void topk(const ScanTopK& op, const Batch& batch, int num_threads) {
    const std::int64_t k = op.scores.dim(1);
    const Sweep sweep(batch, op.items, num_threads);
    std::vector<Selector> selectors;
    for (int i = 0; i < sweep.workers(); ++i) selectors.emplace_back(batch, op, sweep.block);
    std::vector<TopK> best(sweep.ranges() * batch.n, TopK(k));
    sweep.run([&](const Sweep::Step& step, int worker) { selectors[worker](step, &best[step.range * batch.n]); });

    parallel_for(batch.n, 16, num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
            for (std::int64_t range = 1; range < sweep.ranges(); ++range) best[i].merge(best[range * batch.n + i]);
            if (op.metric == Metric::l2) set_distances(batch.row(i), op, best[i].hits());
            const std::int64_t at = (batch.first + i) * k;
            best[i].write(op.scores.as<float>() + at, op.ids.as<std::int64_t>() + at,
                          op.metric == Metric::l2 ? -1.0f : 1.0f);
        }
    });
}

/// The value of each query's target, of the same bits as the sweep will meet; lanes without a query hold 0.
std::vector<float> target_values(const ScanRank& op, const Batch& batch, int num_threads) {
    std::vector<float> values(batch.panels * batch.width);
    parallel_for(batch.panels, 1, num_threads, [&](std::int64_t p, std::int64_t, int) {
        Factors factors(op.metric, op.items, op.bias);
        std::vector<float> lanes(batch.width);
        for (std::int64_t lane = 0; lane < batch.lanes(p); ++lane) {
            const std::int64_t i = p * batch.width + lane;
            const std::int64_t target = op.targets.as<const std::int64_t>()[batch.first + i];
            factors.compute(target, 1);
            factors.kernel.values(factors.block(batch.panel(p), target, 1), lanes.data());
            values[i] = lanes[lane];
            if (std::isnan(values[i]))
                fail(op.op, "targets must have scores that are numbers, got NaN for query ", batch.first + i);
        }
    });
    return values;
}

void rank(const ScanRank& op, const Batch& batch, int num_threads) {
    const Sweep sweep(batch, op.items, num_threads);
    const std::vector<float> targets = target_values(op, batch, num_threads);
    const std::int64_t lanes = batch.panels * batch.width;
    std::vector<std::int32_t> greater(sweep.ranges() * lanes), equal(sweep.ranges() * lanes);
    std::vector<Factors> factors(sweep.workers(), Factors(op.metric, op.items, op.bias));
    const ScanKernel& kernel = kernel_of(op.items);
    sweep.run([&](const Sweep::Step& step, int worker) {
        factors[worker].compute(step.first, step.n);
        for (std::int64_t p = step.begin; p < step.end; ++p) {
            ScanBlock block = factors[worker].block(batch.panel(p), step.first, step.n);
            batch.set_excluded(p, block);
            const std::int64_t lane = p * batch.width, at = step.range * lanes + lane;
            kernel.count(block, &targets[lane], &greater[at], &equal[at]);
        }
    });

    for (std::int64_t i = 0; i < batch.n; ++i) {
        double ahead = 0, tied = 0;  // the target ties with itself
        for (std::int64_t range = 0; range < sweep.ranges(); ++range) {
            ahead += greater[range * lanes + i];
            tied += equal[range * lanes + i];
        }
        using Ties = ScanRank::Ties;
        const double place = op.ties == Ties::optimistic ? 1 : op.ties == Ties::pessimistic ? tied : (1 + tied) / 2;
        op.ranks.as<double>()[batch.first + i] = ahead + place;
    }
}

}  // namespace

void run(const ScanTopK& op, Cpu cpu) {
    const std::int64_t kept = 32 * op.scores.dim(1);  // a collector holds twice k hits
    for (std::int64_t first = 0; first < op.queries.dim(0);) {
        Batch batch(op.queries, first, kept, op.metric, op.items, cpu.num_threads);
        batch.exclude(op.exclude, nullptr, cpu.num_threads);
        topk(op, batch, cpu.num_threads);
        first += batch.n;
    }
}

void run(const ScanRank& op, Cpu cpu) {
    for (std::int64_t first = 0; first < op.queries.dim(0);) {
        Batch batch(op.queries, first, 0, op.metric, op.items, cpu.num_threads);
        batch.exclude(op.known, op.targets.as<const std::int64_t>(), cpu.num_threads);
        rank(op, batch, cpu.num_threads);
        first += batch.n;
    }
}

void run(const ScanNearest& op, Cpu cpu) {
    const std::int64_t n = op.x.dim(0), d = op.x.dim(1), k = op.centroids.rows.dim(0), stride = op.x.stride(0);
    Factors factors(op.metric, op.centroids, Array());
    factors.compute(0, k);
    const ScanKernel& kernel = factors.kernel;
    const std::int64_t width = kernels().scan->panel_width, panel_words = width * kernel.panel_words(d);
    const std::int64_t panels = ceil_div(n, width), group = group_panels(4 * panel_words);
    const std::int64_t block = block_rows(factors.row_bytes);

    struct Scratch {
        Aligned<std::uint32_t> panels;
        Aligned<float> best;
        Aligned<std::int32_t> ids;
    };
    std::vector<Scratch> scratch(workers_for(panels, group, cpu.num_threads));
    for (Scratch& s : scratch)
        s = {aligned<std::uint32_t>(group * panel_words), aligned<float>(group * width),
             aligned<std::int32_t>(group * width)};

    parallel_for(panels, group, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int worker) {
        const Scratch& s = scratch[worker];
        std::fill_n(s.best.get(), group * width, -infinity);
        std::fill_n(s.ids.get(), group * width, 0);
        const auto panel = [&](std::int64_t p) { return s.panels.get() + (p - begin) * panel_words; };
        // The length of a row changes no comparison of its cosines; but before it is rounded, it must be 1.
        const Metric metric = kernel.round ? op.metric : Metric::ip;
        const auto prepared = [&](std::int64_t i, std::int64_t count) {
            return Prepared(op.x.as<const float>() + i * stride, count, stride, d, metric, kernel);
        };
        for (std::int64_t p = begin; p < end; ++p) {
            const std::int64_t count = std::min(width, n - p * width);
            const Prepared x = prepared(p * width, count);
            kernel.pack(x.rows, count, x.stride, d, panel(p));
        }
        for (std::int64_t c = 0; c < k; c += block) {
            for (std::int64_t p = begin; p < end; ++p) {
                const std::int64_t lane = (p - begin) * width;
                kernel.nearest(factors.block(panel(p), c, std::min(block, k - c)), s.best.get() + lane,
                               s.ids.get() + lane);
            }
        }
        for (std::int64_t i = begin * width; i < std::min(end * width, n); ++i) {
            const std::int64_t id = s.ids[i - begin * width];
            op.ids.as<std::int64_t>()[i] = id;
            if (!op.distances) continue;
            float& distance = op.distances.as<float>()[i];
            distance = s.best[i - begin * width];
            if (op.metric == Metric::cosine && !kernel.round)
                distance *= inverse_norm(op.x.as<const float>() + i * stride, d);
            if (op.metric == Metric::l2) compare(true, prepared(i, 1).rows, op.centroids, &id, 1, &distance);
        }
    });
}

void run(const ScanPairs& op, Cpu cpu) {
    constexpr std::int64_t chunk = 1024;  // ids at a time
    const std::int64_t m = op.ids.dim(1), d = op.items.rows.dim(1), chunks = ceil_div(m, chunk);
    const Factors factors(op.metric, op.items, Array());
    const float* bias = op.bias ? op.bias.as<const float>() : nullptr;
    const std::int64_t grain = std::max<std::int64_t>(1, (1 << 18) / (std::min(m, chunk) * d + 1));
    parallel_for(op.ids.dim(0) * chunks, grain, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t piece = begin; piece < end; ++piece) {
            const std::int64_t i = piece / chunks, j = piece % chunks * chunk, n = std::min(chunk, m - j);
            const Prepared query(op.queries.as<const float>() + i * d, 1, d, d, op.metric, factors.kernel);
            const std::int64_t* ids = op.ids.as<const std::int64_t>() + i * m + j;
            float* out = op.out.as<float>() + i * m + j;
            compare(op.metric == Metric::l2, query.rows, op.items, ids, n, out);
            if (op.metric == Metric::cosine) {
                for (std::int64_t c = 0; c < n; ++c) out[c] *= factors.inverse_size(ids[c]);
            }
            if (!bias) continue;
            for (std::int64_t c = 0; c < n; ++c) out[c] += op.metric == Metric::l2 ? -bias[ids[c]] : bias[ids[c]];
        }
    });
}

}  // namespace polyvec
