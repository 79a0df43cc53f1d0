#include "polyvec/scan.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
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
constexpr std::int64_t batch_bytes = 1 << 22;  // panels of the queries that are searched together
constexpr std::int64_t piece_flops = 1 << 30;  // a piece of work: about 10 ms
constexpr std::int64_t max_group = 8, min_block = 64, max_block = 1024;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

/// Items whose rows of width d fill a block.
std::int64_t block_rows(std::int64_t d) {
    return std::clamp<std::int64_t>(block_bytes / (4 * std::max<std::int64_t>(d, 1)), min_block, max_block);
}

/// Panels of `panel_size` floats that share a block of items.
std::int64_t group_panels(std::int64_t panel_size) {
    return std::clamp<std::int64_t>(group_bytes / (4 * std::max<std::int64_t>(panel_size, 1)), 1, max_group);
}

/// squares[i] = |rows[i]|^2.
void squared_norms(const Array& rows, int num_threads, float* squares) {
    const auto dot = kernels().distance->i64.dot;
    const std::int64_t d = rows.dim(1), zero = 0;
    parallel_for(rows.dim(0), block_rows(d), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
            const float* row = rows.as<const float>() + i * d;
            dot(row, row, &zero, 1, d, squares + i);
        }
    });
}

float inverse_norm(float square) {
    return square > 0 ? 1 / std::sqrt(square) : 0;
}

/// What makes values of products with the items: value = product * scale + offset, higher is better. Both are empty
/// where a product is a value. For l2 it is q . x - (|x|^2 - bias) / 2, which orders items as -(|q - x|^2 - bias) does.
struct Factors {
    std::vector<float> scale, offset;

    Factors(Metric metric, const Array& items, const Array& bias, int num_threads) {
        if (metric == Metric::ip && !bias) return;
        const std::int64_t n = items.dim(0);
        scale.assign(n, 1);
        offset.assign(n, 0);
        if (bias) std::copy_n(bias.as<const float>(), n, offset.begin());
        if (metric == Metric::ip) return;
        std::vector<float> squares(n);
        squared_norms(items, num_threads, squares.data());
        for (std::int64_t i = 0; i < n; ++i) {
            if (metric == Metric::l2) {
                offset[i] = (offset[i] - squares[i]) / 2;
            } else {
                scale[i] = inverse_norm(squares[i]);
            }
        }
    }

    /// `panel` against `n` rows of `items` from `first` on.
    ScanBlock block(const float* panel, const Array& items, std::int64_t first, std::int64_t n) const {
        ScanBlock block;
        block.panel = panel;
        block.rows = items.as<const float>() + first * items.dim(1);
        block.n = n;
        block.d = items.dim(1);
        block.scale = scale.empty() ? nullptr : scale.data() + first;
        block.offset = offset.empty() ? nullptr : offset.data() + first;
        block.first_row = first;
        return block;
    }
};

/// Some of the queries, ready to be compared with items.
class Batch {
public:
    const std::int64_t first, n, d, width;
    const std::int64_t panels = ceil_div(n, width);

    /// Queries first, first + 1, ... as many as fill a batch.
    Batch(const Array& queries, std::int64_t first, Metric metric, int num_threads)
        : first(first),
          n(std::min(queries.dim(0) - first, size(queries.dim(1)))),
          d(queries.dim(1)),
          width(kernels().scan->panel_width),
          rows_(queries.as<const float>() + first * d),
          packed_(aligned<float>(panels * width * d)) {
        if (metric == Metric::cosine) normalize(num_threads);
        parallel_for(panels, 1, num_threads, [&](std::int64_t p, std::int64_t, int) {
            kernels().scan->pack(row(p * width), lanes(p), d, d, packed_.get() + p * width * d);
        });
    }

    const float* row(std::int64_t i) const { return rows_ + i * d; }
    const float* panel(std::int64_t p) const { return packed_.get() + p * width * d; }
    std::int64_t lanes(std::int64_t p) const { return std::min(width, n - p * width); }

    /// Sorts the lists' pairs into panels, without the pair of a query and its `keep` (may be null).
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

    /// Gives `block` (of any panel's rows) the pairs of panel p that are excluded from it.
    void set_excluded(std::int64_t p, ScanBlock& block) const {
        const auto& pairs = excluded_[p];
        const auto from = [&](std::uint64_t row) {
            return pairs.data() + (std::lower_bound(pairs.begin(), pairs.end(), row * width) - pairs.begin());
        };
        block.excluded = from(block.first_row);
        block.excluded_end = from(block.first_row + block.n);
    }

private:
    static std::int64_t size(std::int64_t d) {
        const std::int64_t width = kernels().scan->panel_width;
        return width * std::max<std::int64_t>(1, batch_bytes / (4 * width * std::max<std::int64_t>(d, 1)));
    }

    void normalize(int num_threads) {
        unit_ = aligned<float>(n * d);
        const auto dot = kernels().distance->i64.dot;
        parallel_for(n, block_rows(d), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
            for (std::int64_t i = begin; i < end; ++i) {
                const std::int64_t zero = 0;
                float square;
                dot(row(i), row(i), &zero, 1, d, &square);
                const float scale = inverse_norm(square);
                std::transform(row(i), row(i) + d, unit_.get() + i * d, [&](float x) { return x * scale; });
            }
        });
        rows_ = unit_.get();
    }

    const float* rows_;
    Aligned<float> unit_, packed_;
    std::vector<std::vector<std::uint64_t>> excluded_;
};

/// The plan by which a batch meets n items: in groups of panels, and in ranges of items that run side by side where
/// the panels are too few to keep all threads busy. Results are kept for each range apart, and merged.
struct Sweep {
    std::int64_t items, block, panels, group, groups, ranges, range;

    Sweep(const Batch& batch, std::int64_t items, int num_threads)
        : items(items), block(block_rows(batch.d)), panels(batch.panels), flops_per_row_(2 * batch.width * batch.d) {
        const std::int64_t threads = workers_for(items, 1, num_threads);
        group = std::clamp<std::int64_t>(panels / (4 * threads), 1, group_panels(batch.width * batch.d));
        groups = ceil_div(panels, group);
        ranges = threads == 1 || groups >= threads ? 1 : ceil_div(2 * threads, groups);
        ranges = std::clamp<std::int64_t>(items / (4 * block), 1, ranges);
        range = ceil_div(items, ranges);
    }

    int workers(int num_threads) const { return workers_for(ranges * groups, 1, num_threads); }

    /// Calls visit(panel, range, first item, number of items, worker): each panel meets the items of a range in order.
    template <class Visit>
    void run(int num_threads, const Visit& visit) const {
        const std::int64_t most = std::max(block, piece_flops / std::max<std::int64_t>(1, flops_per_row_ * group));
        for (std::int64_t done = 0; done < range; done += most) {
            parallel_for(ranges * groups, 1, num_threads, [&](std::int64_t task, std::int64_t, int worker) {
                const std::int64_t r = task / groups, g = task % groups;
                const std::int64_t end = std::min({r * range + done + most, (r + 1) * range, items});
                for (std::int64_t row = r * range + done; row < end; row += block)
                    for (std::int64_t p = g * group; p < std::min((g + 1) * group, panels); ++p)
                        visit(p, r, row, std::min(block, end - row), worker);
            });
        }
    }

private:
    std::int64_t flops_per_row_;
};

/// Finds the best items of a panel's queries in one block at a time.
class Selector {
public:
    Selector(const Batch& batch, const Array& items, const Factors& factors, std::int64_t block)
        : batch_(batch),
          items_(items),
          factors_(factors),
          hits_(aligned<ScanHit>(block * batch.width)),
          floor_(batch.width, infinity),
          values_(block),
          iota_(block) {
        std::iota(iota_.begin(), iota_.end(), 0u);
    }

    /// best[lane]: the collector of a query of panel p.
    void operator()(std::int64_t p, std::int64_t row, std::int64_t n, TopK* best) {
        if (batch_.lanes(p) <= few) return by_row(p, row, n, best);
        for (std::int64_t done = 0, step; done < n; done += step) {
            // Until the collectors are full everything is a hit: a few rows at a time then.
            step = best[0].threshold() == -infinity ? std::min(min_block, n - done) : n - done;
            by_panel(p, row + done, step, best);
        }
    }

private:
    static constexpr std::int64_t few =
        8;  // queries that are faster one by one: a panel costs as much when it is empty

    void by_panel(std::int64_t p, std::int64_t row, std::int64_t n, TopK* best) {
        ScanBlock block = factors_.block(batch_.panel(p), items_, row, n);
        batch_.set_excluded(p, block);
        for (std::int64_t lane = 0; lane < batch_.width; ++lane)
            floor_[lane] = lane < batch_.lanes(p) ? best[lane].threshold() : infinity;
        const std::size_t found = kernels().scan->select(block, floor_.data(), hits_.get());
        for (std::size_t i = 0; i < found; ++i)
            best[hits_[i].at % batch_.width].push(hits_[i].value, row + hits_[i].at / batch_.width);
    }

    void by_row(std::int64_t p, std::int64_t row, std::int64_t n, TopK* best) {
        ScanBlock block = factors_.block(nullptr, items_, row, n);
        batch_.set_excluded(p, block);
        for (std::int64_t lane = 0; lane < batch_.lanes(p); ++lane) {
            kernels().distance->u32.dot(batch_.row(p * batch_.width + lane), block.rows, iota_.data(), n, batch_.d,
                                        values_.data());
            for (const auto* pair = block.excluded; pair != block.excluded_end; ++pair)
                if (static_cast<std::int64_t>(*pair % batch_.width) == lane)
                    values_[*pair / batch_.width - row] = std::numeric_limits<float>::quiet_NaN();
            for (std::int64_t i = 0; i < n; ++i) {
                const float value = block.scale ? values_[i] * block.scale[i] + block.offset[i] : values_[i];
                if (value > best[lane].threshold()) best[lane].push(value, row + i);
            }
        }
    }

    const Batch& batch_;
    const Array& items_;
    const Factors& factors_;
    Aligned<ScanHit> hits_;
    std::vector<float> floor_, values_;
    std::vector<std::uint32_t> iota_;
};

/// Replaces the values of `hits` by -(|q - x|^2 - bias), computed without cancellation.
void set_distances(const float* query, const ScanTopK& op, std::vector<Hit>& hits) {
    std::vector<std::int64_t> ids(hits.size());
    std::vector<float> distances(hits.size());
    std::transform(hits.begin(), hits.end(), ids.begin(), [](const Hit& hit) { return hit.id; });
    kernels().distance->i64.l2(query, op.items.as<const float>(), ids.data(), ids.size(), op.items.dim(1),
                               distances.data());
    for (std::size_t i = 0; i < hits.size(); ++i)
        hits[i].score = (op.bias ? op.bias.as<const float>()[ids[i]] : 0) - distances[i];
}

}  // namespace

void run(const ScanTopK& op, Cpu cpu) {
    const std::int64_t k = op.scores.dim(1), n = op.items.dim(0);
    const Factors factors(op.metric, op.items, op.bias, cpu.num_threads);
    for (std::int64_t first = 0; first < op.queries.dim(0);) {
        Batch batch(op.queries, first, op.metric, cpu.num_threads);
        batch.exclude(op.exclude, nullptr, cpu.num_threads);
        const Sweep sweep(batch, n, cpu.num_threads);
        std::vector<Selector> select;
        for (int i = 0; i < sweep.workers(cpu.num_threads); ++i)
            select.emplace_back(batch, op.items, factors, sweep.block);
        std::vector<TopK> best(sweep.ranges * batch.n, TopK(k));
        sweep.run(cpu.num_threads,
                  [&](std::int64_t p, std::int64_t range, std::int64_t row, std::int64_t rows, int worker) {
                      select[worker](p, row, rows, best.data() + range * batch.n + p * batch.width);
                  });
        parallel_for(batch.n, 16, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
            for (std::int64_t i = begin; i < end; ++i) {
                for (std::int64_t range = 1; range < sweep.ranges; ++range) best[i].merge(best[range * batch.n + i]);
                if (op.metric == Metric::l2) set_distances(batch.row(i), op, best[i].hits());
                best[i].write(op.scores.as<float>() + (first + i) * k, op.ids.as<std::int64_t>() + (first + i) * k,
                              op.metric == Metric::l2 ? -1.0f : 1.0f);
            }
        });
        first += batch.n;
    }
}

void run(const ScanNearest& op, Cpu cpu) {
    const auto& scan = *kernels().scan;
    const std::int64_t n = op.x.dim(0), d = op.x.dim(1), k = op.centroids.dim(0), width = scan.panel_width;
    const std::int64_t panels = ceil_div(n, width), group = group_panels(width * d), block = block_rows(d);
    const Factors factors(op.metric, op.centroids, Array(), cpu.num_threads);
    const auto row = [&](std::int64_t i) { return op.x.as<const float>() + i * op.x.stride(0); };

    struct Scratch {
        Aligned<float> panels, best;
        Aligned<std::int32_t> ids;
    };
    std::vector<Scratch> scratch(workers_for(panels, group, cpu.num_threads));
    for (Scratch& s : scratch)
        s = {aligned<float>(group * width * d), aligned<float>(group * width), aligned<std::int32_t>(group * width)};

    parallel_for(panels, group, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int worker) {
        const Scratch& s = scratch[worker];
        std::fill_n(s.best.get(), group * width, -infinity);
        std::fill_n(s.ids.get(), group * width, 0);
        for (std::int64_t p = begin; p < end; ++p)
            scan.pack(row(p * width), std::min(width, n - p * width), op.x.stride(0), d,
                      s.panels.get() + (p - begin) * width * d);
        for (std::int64_t c = 0; c < k; c += block)
            for (std::int64_t p = 0; p < end - begin; ++p)
                scan.nearest(factors.block(s.panels.get() + p * width * d, op.centroids, c, std::min(block, k - c)),
                             s.best.get() + p * width, s.ids.get() + p * width);
        for (std::int64_t i = begin * width; i < std::min(end * width, n); ++i) {
            const std::int64_t id = s.ids[i - begin * width], zero = 0;
            op.ids.as<std::int64_t>()[i] = id;
            if (!op.distances) continue;
            float* distance = op.distances.as<float>() + i;
            *distance = s.best[i - begin * width];
            if (op.metric == Metric::l2) {
                kernels().distance->i64.l2(row(i), op.centroids.as<const float>(), &id, 1, d, distance);
            } else if (op.metric == Metric::cosine) {
                float square;
                kernels().distance->i64.dot(row(i), row(i), &zero, 1, d, &square);
                *distance *= inverse_norm(square);
            }
        }
    });
}

void run(const ScanRank& op, Cpu cpu) {
    const auto& scan = *kernels().scan;
    const std::int64_t n = op.items.dim(0), d = op.items.dim(1);
    const Factors factors(op.metric, op.items, op.bias, cpu.num_threads);
    const auto* targets = op.targets.as<const std::int64_t>();
    for (std::int64_t first = 0; first < op.queries.dim(0);) {
        Batch batch(op.queries, first, op.metric, cpu.num_threads);
        batch.exclude(op.known, targets, cpu.num_threads);
        const std::int64_t width = batch.width, lanes = batch.panels * width;

        // The value of each query's target: by the same kernel, so that it is the very number that the sweep meets.
        std::vector<float> value(lanes);
        parallel_for(batch.panels, 1, cpu.num_threads, [&](std::int64_t p, std::int64_t, int) {
            std::vector<float> rows(batch.lanes(p) * d), scale(width), offset(width), values(batch.lanes(p) * width);
            ScanBlock block;
            block.panel = batch.panel(p);
            block.rows = rows.data();
            block.n = batch.lanes(p);
            block.d = d;
            if (!factors.scale.empty()) block.scale = scale.data(), block.offset = offset.data();
            for (std::int64_t lane = 0; lane < batch.lanes(p); ++lane) {
                const std::int64_t target = targets[first + p * width + lane];
                std::copy_n(op.items.as<const float>() + target * d, d, rows.data() + lane * d);
                if (block.scale) scale[lane] = factors.scale[target], offset[lane] = factors.offset[target];
            }
            scan.values(block, values.data());
            for (std::int64_t lane = 0; lane < batch.lanes(p); ++lane) {
                const std::int64_t i = p * width + lane;
                value[i] = values[lane * width + lane];
                if (std::isnan(value[i]))
                    fail(op.op, "targets must have scores that are numbers, got NaN for query ", first + i);
            }
        });

        const Sweep sweep(batch, n, cpu.num_threads);
        std::vector<std::int32_t> greater(sweep.ranges * lanes), equal(sweep.ranges * lanes);
        sweep.run(cpu.num_threads, [&](std::int64_t p, std::int64_t range, std::int64_t row, std::int64_t rows, int) {
            ScanBlock block = factors.block(batch.panel(p), op.items, row, rows);
            batch.set_excluded(p, block);
            const std::int64_t at = range * lanes + p * width;
            scan.count(block, value.data() + p * width, greater.data() + at, equal.data() + at);
        });
        for (std::int64_t i = 0; i < batch.n; ++i) {
            double ahead = 0, tied = 0;  // tied: with the target itself
            for (std::int64_t range = 0; range < sweep.ranges; ++range) {
                ahead += greater[range * lanes + i];
                tied += equal[range * lanes + i];
            }
            using Ties = ScanRank::Ties;
            op.ranks.as<double>()[first + i] = ahead + (op.ties == Ties::optimistic    ? 1
                                                        : op.ties == Ties::pessimistic ? tied
                                                                                       : (1 + tied) / 2);
        }
        first += batch.n;
    }
}

void run(const ScanPairs& op, Cpu cpu) {
    constexpr std::int64_t chunk = 1024;  // ids a piece
    const std::int64_t m = op.ids.dim(1), d = op.items.dim(1), chunks = ceil_div(m, chunk);
    const auto& distance = kernels().distance->i64;
    const float *queries = op.queries.as<const float>(), *items = op.items.as<const float>();
    const float* bias = op.bias ? op.bias.as<const float>() : nullptr;
    const auto inverse = [&](const float* row) {
        const std::int64_t zero = 0;
        float square;
        distance.dot(row, row, &zero, 1, d, &square);
        return inverse_norm(square);
    };
    const std::int64_t grain = std::max<std::int64_t>(1, (1 << 18) / (std::min(m, chunk) * d + 1));
    parallel_for(op.ids.dim(0) * chunks, grain, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t piece = begin; piece < end; ++piece) {
            const std::int64_t i = piece / chunks, j = piece % chunks * chunk, n = std::min(chunk, m - j);
            const float* query = queries + i * d;
            const std::int64_t* ids = op.ids.as<const std::int64_t>() + i * m + j;
            float* out = op.out.as<float>() + i * m + j;
            (op.metric == Metric::l2 ? distance.l2 : distance.dot)(query, items, ids, n, d, out);
            if (op.metric == Metric::cosine) {
                const float scale = inverse(query);
                for (std::int64_t c = 0; c < n; ++c) out[c] *= scale * inverse(items + ids[c] * d);
            }
            if (!bias) continue;
            for (std::int64_t c = 0; c < n; ++c) out[c] += op.metric == Metric::l2 ? -bias[ids[c]] : bias[ids[c]];
        }
    });
}

}  // namespace polyvec
