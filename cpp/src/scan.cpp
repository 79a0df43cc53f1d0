#include "polyvec/scan.hpp"

#include <numeric>

#include "polyvec/topk.hpp"
#include "scan_sweep.hpp"

namespace polyvec {
namespace {

using namespace scanning;

/// One worker's part in finding the best items of a batch.
class Selector {
public:
    Selector(const Batch& batch, const ScanTopK& op, std::int64_t block)
        : batch_(batch),
          factors_(op.metric, op.items, op.bias),
          hits_(aligned<ScanHit>(block * batch.width)),
          floor_(batch.width) {}

    /// best: the collectors of the batch's queries.
    void operator()(const Sweep::Step& step, TopK* best) {
        factors_.compute(step.first, step.n);
        for (std::int64_t p = step.begin; p < step.end; ++p) {
            if (batch_.by_row(p)) {
                by_row(p, step.first, step.n, best + p * batch_.width);
            } else {
                by_panel(p, step.first, step.n, best + p * batch_.width);
            }
        }
    }

private:
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
        values_.resize(batch_.lanes(p) * n);
        values_by_row(factors_, batch_, p, first, n, values_.data());
        for (std::int64_t lane = 0; lane < batch_.lanes(p); ++lane) {
            for (std::int64_t i = 0; i < n; ++i) {
                const float value = values_[lane * n + i];
                if (value > best[lane].threshold()) best[lane].push(value, first + i);
            }
        }
    }

    const Batch& batch_;
    Factors factors_;
    Aligned<ScanHit> hits_;
    std::vector<float> floor_, values_;
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
template <class Op>
std::vector<float> target_values(const Op& op, const Batch& batch, int num_threads) {
    std::vector<float> values(batch.panels * batch.width);
    parallel_for(batch.panels, 1, num_threads, [&](std::int64_t p, std::int64_t, int) {
        Factors factors(op.metric, op.items, op.bias);
        std::vector<float> lanes(batch.width);
        for (std::int64_t lane = 0; lane < batch.lanes(p); ++lane) {
            const std::int64_t i = p * batch.width + lane;
            const std::int64_t target = op.targets.template as<const std::int64_t>()[batch.first + i];
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

/// Calls add(values, n, lane, range) with the values (n, panel width) of every block of items and panel of queries,
/// which start with query `lane`; values of a range come in order. NaN where a pair does not take part.
template <class Op, class Add>
void for_each_block_of_values(const Op& op, const Batch& batch, const Sweep& sweep, const Add& add) {
    struct Scratch {
        Factors factors;
        Aligned<float> values;
        std::vector<float> by_row;
    };
    std::vector<Scratch> scratch;
    for (int i = 0; i < sweep.workers(); ++i) {
        scratch.push_back({Factors(op.metric, op.items, op.bias), aligned<float>(sweep.block * batch.width), {}});
        std::fill_n(scratch.back().values.get(), sweep.block * batch.width, 0.0f);
    }
    sweep.run([&](const Sweep::Step& step, int worker) {
        auto& [factors, values, by_row] = scratch[worker];
        factors.compute(step.first, step.n);
        for (std::int64_t p = step.begin; p < step.end; ++p) {
            const std::int64_t lanes = batch.lanes(p);
            if (batch.by_row(p)) {
                by_row.resize(step.n * lanes);
                values_by_row(factors, batch, p, step.first, step.n, by_row.data());
                for (std::int64_t i = 0; i < step.n; ++i) {
                    for (std::int64_t lane = 0; lane < lanes; ++lane)
                        values[i * batch.width + lane] = by_row[lane * step.n + i];
                }
            } else {
                ScanBlock block = factors.block(batch.panel(p), step.first, step.n);
                batch.set_excluded(p, block);
                factors.kernel.values(block, values.get());
            }
            add(values.get(), step.n, p * batch.width, step.range);
        }
    });
}

/// A value's share in the score that sums are made of: l2 values are half of it, but for what depends on the query.
double score_factor(Metric metric) {
    return metric == Metric::l2 ? 2 : 1;
}

/// sum * exp(largest), of exponentials that do not fit a number.
struct ScaledSum {
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;

    void add(double other_largest, double other_sum) {
        if (std::isinf(other_largest)) {  // nothing, or everything
            largest = std::max(largest, other_largest);
        } else if (other_largest > largest) {
            sum = sum * std::exp(largest - other_largest) + other_sum;
            largest = other_largest;
        } else {
            sum += other_sum * std::exp(other_largest - largest);
        }
    }
    double log() const { return std::isinf(largest) ? largest : largest + std::log(sum); }
};

void logsumexp(const ScanLogSumExp& op, const Batch& batch, int num_threads) {
    const Sweep sweep(batch, op.items, num_threads, Sweep::Ranges::fixed);
    const std::int64_t lanes = batch.panels * batch.width;
    const double scale = score_factor(op.metric) * op.scale;
    std::vector<ScaledSum> sums(sweep.ranges() * lanes);
    for_each_block_of_values(op, batch, sweep,
                             [&](const float* values, std::int64_t n, std::int64_t lane, std::int64_t range) {
                                 float largest[max_panel_width], sum[max_panel_width];
                                 kernels().scan->exponentials(values, n, static_cast<float>(scale), largest, sum);
                                 for (std::int64_t i = 0; i < batch.width; ++i)
                                     sums[range * lanes + lane + i].add(scale * largest[i], sum[i]);
                             });
    for (std::int64_t i = 0; i < batch.n; ++i) {
        ScaledSum all;
        for (std::int64_t range = 0; range < sweep.ranges(); ++range)
            all.add(sums[range * lanes + i].largest, sums[range * lanes + i].sum);
        const float* query = batch.row(i);
        const double square = op.metric == Metric::l2 ? std::inner_product(query, query + batch.d, query, 0.0) : 0;
        op.out.as<float>()[batch.first + i] = static_cast<float>(all.log() - op.scale * square);
    }
}

/// Gradients of log-sum-exp for a batch of queries. A block of them meets a block of items: their probabilities are
/// computed once, in two layouts, for a sum over the block's queries and one over its items, while they lie in the
/// cache. Threads share the outputs of each step, so that every sum has one order.
class SoftmaxGradient {
public:
    static constexpr std::int64_t most_queries = 512, most_items = 480;  // of a block; whole panels and registers

    SoftmaxGradient(const ScanLogSumExpGradient& op, std::int64_t first, std::int64_t n, int num_threads)
        : op_(op),
          first_(first),
          n_(n),
          d_(op.queries.dim(1)),
          width_(scan_.panel_width),
          panels_(ceil_div(n, width_)),
          num_threads_(num_threads),
          packed_(aligned<float>(panels_ * width_ * d_)),
          less_(panels_ * width_, infinity),  // of a lane without a query: its probabilities are 0
          weights_(aligned<float>(n * scan_.lanes)),
          weighted_(aligned<float>(op.d_items ? n * ceil_div(d_, lanes()) * lanes() : 0)),
          d_panels_(aligned<float>(op.d_queries ? panels_ * width_ * d_ : 0)),
          transposed_(aligned<float>(op.d_queries ? most_items * d_ : 0)),
          by_lane_(aligned<float>(most_queries * most_items)),
          by_row_(aligned<float>(row_ * most_items)) {
        const float* queries = op.queries.as<const float>() + first * d_;
        parallel_for(panels_, 1, num_threads, [&](std::int64_t p, std::int64_t, int) {
            const std::int64_t begin = p * width_, count = std::min(width_, n - begin);
            scan_.f32.pack(queries + begin * d_, count, d_, d_, packed_.get() + p * width_ * d_);
            if (op.d_queries) std::fill_n(d_panels_.get() + begin * d_, width_ * d_, 0.0f);
            for (std::int64_t i = begin; i < begin + count; ++i) {
                less_[i] = op.result.as<const float>()[first + i];
                const float weight = op.scale * op.grad.as<const float>()[first + i];
                std::fill_n(weights_.get() + i * lanes(), lanes(), 0.0f);
                weights_[i * lanes()] = weight;
                for (std::int64_t c = 0; op.d_items && c < d_; c += width_) {
                    float* row = weighted_.get() + c * n + i * padded(c);
                    for (std::int64_t k = 0; k < padded(c); ++k)
                        row[k] = c + k < d_ ? weight * queries[i * d_ + c + k] : 0;
                }
            }
        });
    }

    void run() {
        const std::int64_t items = op_.items.dim(0);
        for (std::int64_t item = 0; item < items; item += most_items) {
            const std::int64_t count = std::min(most_items, items - item);
            if (op_.d_queries) transpose(item, count);
            for (std::int64_t query = 0; query < n_; query += most_queries) {
                compute(item, count, query);
                add(item, count, query);
            }
        }
        if (op_.d_queries) write();
    }

private:
    static constexpr std::int64_t row_ = most_queries + 16;  // floats between rows, which do not fall into one set
    static constexpr std::int64_t some = 96;                 // dims or items of a task: whole tiles of any height
    static constexpr std::int64_t terms = 128;               // of a sum at a time: a panel in the level-1 cache
    static_assert(most_queries % max_panel_width == 0);

    std::int64_t lanes() const { return scan_.lanes; }
    /// Columns of the panel that begins with column c.
    std::int64_t columns(std::int64_t c) const { return std::min(width_, d_ - c); }
    std::int64_t padded(std::int64_t c) const { return ceil_div(columns(c), lanes()) * lanes(); }
    std::int64_t panels_from(std::int64_t query) const { return ceil_div(std::min(most_queries, n_ - query), width_); }
    float* of_panel(std::int64_t p) const { return by_lane_.get() + p * width_ * most_items; }
    const float* item(std::int64_t i) const { return op_.items.as<const float>() + i * d_; }

    void transpose(std::int64_t first, std::int64_t count) {
        parallel_for(d_, some, num_threads_, [&](std::int64_t begin, std::int64_t end, int) {
            scan_.transpose(item(first) + begin, count, d_, end - begin, most_items,
                            transposed_.get() + begin * most_items);
        });
    }

    void compute(std::int64_t first, std::int64_t count, std::int64_t query) {
        const std::int64_t pieces = ceil_div(count, some);
        parallel_for(panels_from(query) * pieces, 1, num_threads_, [&](std::int64_t task, std::int64_t, int) {
            const std::int64_t p = task / pieces, begin = task % pieces * some, lane = query + p * width_;
            const std::int64_t n = std::min(some, count - begin);
            ScanBlock block{packed_.get() + lane * d_, item(first + begin), static_cast<std::size_t>(n),
                            static_cast<std::size_t>(d_)};
            if (op_.bias) block.offset = op_.bias.as<const float>() + first + begin;
            float* const values = of_panel(p) + begin * width_;
            scan_.f32.values(block, values);
            scan_.probabilities(values, n, op_.scale, &less_[lane], by_row_.get() + begin * row_ + p * width_, row_);
        });
    }

    void add(std::int64_t first, std::int64_t count, std::int64_t query) {
        const std::int64_t columns = (op_.d_items ? ceil_div(d_, width_) : 0) + (op_.d_bias ? 1 : 0);
        const std::int64_t pieces = op_.d_queries ? ceil_div(d_, some) : 0, of_items = ceil_div(count, some) * columns;
        parallel_for(of_items + panels_from(query) * pieces, 1, num_threads_,
                     [&](std::int64_t task, std::int64_t, int) {
                         if (task < of_items) {
                             add_to_items(first, task / columns * some, count, query, task % columns * width_);
                         } else {
                             task -= of_items;
                             add_to_queries(query, task / pieces, task % pieces * some, count);
                         }
                     });
    }

    /// Of one panel of columns; behind the last of d_items lies that of d_bias.
    void add_to_items(std::int64_t first, std::int64_t begin, std::int64_t count, std::int64_t query, std::int64_t c) {
        const std::int64_t n = std::min(some, count - begin), queries = std::min(most_queries, n_ - query);
        const bool of_bias = !op_.d_items || c >= d_;
        const std::int64_t width = of_bias ? lanes() : padded(c), used = of_bias ? 1 : columns(c);
        const std::int64_t stride = of_bias ? 1 : d_;
        const float* const panel = of_bias ? weights_.get() : weighted_.get() + c * n_;
        float* const out = (of_bias ? op_.d_bias.as<float>() : op_.d_items.as<float>() + c) + (first + begin) * stride;
        if (first_ + query == 0) {
            for (std::int64_t i = 0; i < n; ++i) std::fill_n(out + i * stride, used, 0.0f);
        }
        for (std::int64_t k = 0; k < queries; k += terms)
            scan_.add_products(by_row_.get() + begin * row_ + k, n, row_, std::min(terms, queries - k),
                               panel + (query + k) * width, used, out, stride);
    }

    void add_to_queries(std::int64_t query, std::int64_t p, std::int64_t dim, std::int64_t count) {
        for (std::int64_t k = 0; k < count; k += terms)
            scan_.add_products(transposed_.get() + dim * most_items + k, std::min(some, d_ - dim), most_items,
                               std::min(terms, count - k), of_panel(p) + k * width_, width_,
                               d_panels_.get() + (query + p * width_) * d_ + dim * width_, width_);
    }

    void write() {
        parallel_for(n_, width_, num_threads_, [&](std::int64_t begin, std::int64_t end, int) {
            for (std::int64_t i = begin; i < end; ++i) {
                const float* const sums = d_panels_.get() + begin * d_ + (i - begin);
                float* const out = op_.d_queries.as<float>() + (first_ + i) * d_;
                for (std::int64_t k = 0; k < d_; ++k) out[k] = weights_[i * lanes()] * sums[k * width_];
            }
        });
    }

    const ScanKernels& scan_ = *kernels().scan;
    const ScanLogSumExpGradient& op_;
    const std::int64_t first_, n_, d_, width_, panels_;
    const int num_threads_;
    Aligned<float> packed_;
    std::vector<float> less_;
    Aligned<float> weights_;     // (n, lanes): one column of a panel
    Aligned<float> weighted_;    // queries times their weights, in panels of columns
    Aligned<float> d_panels_;    // panels as the queries', (d, width)
    Aligned<float> transposed_;  // items of a block, (d, most_items)
    Aligned<float> by_lane_;     // probabilities of a block: panels (most_items, width)
    Aligned<float> by_row_;      // the same: (most_items, row_)
};

void hinge(const ScanHinge& op, const Batch& batch, int num_threads) {
    const Sweep sweep(batch, op.items, num_threads, Sweep::Ranges::fixed);
    const std::int64_t lanes = batch.panels * batch.width;
    const double factor = score_factor(op.metric);
    std::vector<float> thresholds = target_values(op, batch, num_threads);
    for (float& value : thresholds) value -= static_cast<float>(op.margin / factor);
    std::vector<double> sums(sweep.ranges() * lanes);
    for_each_block_of_values(op, batch, sweep,
                             [&](const float* values, std::int64_t n, std::int64_t lane, std::int64_t range) {
                                 float sum[max_panel_width];
                                 kernels().scan->excesses(values, n, &thresholds[lane], sum);
                                 for (std::int64_t i = 0; i < batch.width; ++i)
                                     sums[range * lanes + lane + i] += sum[i];
                             });
    for (std::int64_t i = 0; i < batch.n; ++i) {
        double all = 0;
        for (std::int64_t range = 0; range < sweep.ranges(); ++range) all += sums[range * lanes + i];
        op.out.as<float>()[batch.first + i] = static_cast<float>(factor * all);
    }
}

}  // namespace

void run(const ScanTopK& op, Cpu cpu) {
    const std::int64_t kept = 32 * op.scores.dim(1);  // a collector holds twice k hits
    const Queries queries{op.queries, op.blocks, op.items.rows.dim(1)};
    for (std::int64_t first = 0; first < queries.size();) {
        Batch batch(queries, first, kept, op.metric, op.items, cpu.num_threads);
        batch.exclude(op.exclude, Batch::Targets::none, {}, cpu.num_threads);
        topk(op, batch, cpu.num_threads);
        first += batch.n;
    }
}

void run(const ScanRank& op, Cpu cpu) {
    const Queries queries{op.queries, {}, op.queries.dim(1)};
    for (std::int64_t first = 0; first < queries.size();) {
        Batch batch(queries, first, 0, op.metric, op.items, cpu.num_threads);
        batch.exclude(op.known, Batch::Targets::keep, op.targets, cpu.num_threads);
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
    const float* scales = op.items.scales ? op.items.scales.as<const float>() : nullptr;
    const Queries queries{op.queries, op.blocks, d};
    const std::int64_t grain = std::max<std::int64_t>(1, (1 << 18) / (std::min(m, chunk) * d + 1));
    parallel_for(op.ids.dim(0) * chunks, grain, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t piece = begin; piece < end; ++piece) {
            const std::int64_t i = piece / chunks, j = piece % chunks * chunk, n = std::min(chunk, m - j);
            const Prepared query(queries, i, 1, op.metric, factors.kernel);
            const std::int64_t* ids = op.ids.as<const std::int64_t>() + i * m + j;
            float* out = op.out.as<float>() + i * m + j;
            if (queries.blocks && op.metric != Metric::l2) {
                factors.kernel.chunk_products(queries.chunks(i, query.rows).view(), op.items.rows.data, ids, n, d, out);
                for (std::int64_t c = 0; scales && c < n; ++c) out[c] *= scales[ids[c]];
            } else {
                compare(op.metric == Metric::l2, query.rows, op.items, ids, n, out);
            }
            if (op.metric == Metric::cosine) {
                for (std::int64_t c = 0; c < n; ++c) out[c] *= factors.inverse_size(ids[c]);
            }
            if (!bias) continue;
            for (std::int64_t c = 0; c < n; ++c) out[c] += op.metric == Metric::l2 ? -bias[ids[c]] : bias[ids[c]];
        }
    });
}

void run(const ScanLogSumExp& op, Cpu cpu) {
    const Queries queries{op.queries, {}, op.queries.dim(1)};
    for (std::int64_t first = 0; first < queries.size();) {
        Batch batch(queries, first, Sweep::max_ranges * sizeof(ScaledSum), op.metric, op.items, cpu.num_threads);
        batch.exclude(op.exclude, Batch::Targets::none, {}, cpu.num_threads);
        logsumexp(op, batch, cpu.num_threads);
        first += batch.n;
    }
}

void run(const ScanLogSumExpGradient& op, Cpu cpu) {
    constexpr std::int64_t block = SoftmaxGradient::most_queries;
    const std::int64_t n = op.queries.dim(0), d = op.queries.dim(1);
    const std::int64_t batch =
        block * std::max<std::int64_t>(1, batch_bytes / (4 * block * std::max<std::int64_t>(d, 16)));
    if (n == 0) {
        if (op.d_items) std::fill_n(op.d_items.as<float>(), op.d_items.size(), 0.0f);
        if (op.d_bias) std::fill_n(op.d_bias.as<float>(), op.d_bias.size(), 0.0f);
    }
    for (std::int64_t first = 0; first < n; first += batch)
        SoftmaxGradient(op, first, std::min(batch, n - first), cpu.num_threads).run();
}

void run(const ScanHinge& op, Cpu cpu) {
    const Queries queries{op.queries, {}, op.queries.dim(1)};
    for (std::int64_t first = 0; first < queries.size();) {
        Batch batch(queries, first, Sweep::max_ranges * sizeof(double), op.metric, op.items, cpu.num_threads);
        batch.exclude(op.known, Batch::Targets::exclude, op.targets, cpu.num_threads);
        hinge(op, batch, cpu.num_threads);
        first += batch.n;
    }
}

}  // namespace polyvec
