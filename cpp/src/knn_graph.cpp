#include "polyvec/knn_graph.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t block_codes = 16;

/// The nearest so far of each row of a group, by sums of bytes: pools of some more than are kept, cut back when full.
class Candidates {
public:
    Candidates(std::int64_t rows, std::int64_t kept, int sum_bits)
        : kept_(kept),
          room_(kept + std::max<std::int64_t>(32, kept / 4)),
          sum_bits_(sum_bits),
          kernel_(*kernels().pq),
          sums_(rows * room_),
          rows_(rows * room_),
          best_(kept),
          sizes_(rows),
          floors_(rows) {}

    void clear() {
        std::fill(sizes_.begin(), sizes_.end(), 0);
        std::fill(floors_.begin(), floors_.end(), 0);
    }

    /// What a sum must be at least.
    std::int32_t floor(std::int64_t own) const { return floors_[own]; }

    /// Begins with the sums of rows `first`, first + 1, ...
    void start(std::int64_t own, const std::int32_t* sums, std::int64_t n, std::int64_t first) {
        if (n <= kept_) {
            std::iota(best_.begin(), best_.begin() + n, 0);
        } else {
            floors_[own] = 1 + kernel_.best_sums(sums, n, kept_, sum_bits_, best_.data());
        }
        sizes_[own] = std::min(n, kept_);
        for (std::int64_t i = 0, at = own * room_; i < sizes_[own]; ++i, ++at) {
            sums_[at] = sums[best_[i]];
            rows_[at] = static_cast<std::int32_t>(first) + best_[i];
        }
    }

    void push(std::int64_t own, std::int32_t sum, std::int64_t row) {
        if (sum < floors_[own]) return;
        const std::int64_t at = own * room_ + sizes_[own]++;
        sums_[at] = sum;
        rows_[at] = static_cast<std::int32_t>(row);
        if (sizes_[own] == room_) cut(own);
    }

    /// Calls visit(row) for the best of one, at most as many as are kept.
    template <class Visit>
    void take(std::int64_t own, Visit visit) {
        if (sizes_[own] > kept_) cut(own);
        std::for_each_n(rows_.begin() + own * room_, sizes_[own], visit);
    }

private:
    void cut(std::int64_t own) {
        std::int32_t *sums = sums_.data() + own * room_, *rows = rows_.data() + own * room_;
        floors_[own] = 1 + kernel_.best_sums(sums, sizes_[own], kept_, sum_bits_, best_.data());
        sizes_[own] = kept_;
        for (std::int64_t i = 0; i < kept_; ++i) {
            sums[i] = sums[best_[i]];
            rows[i] = rows[best_[i]];
        }
    }

    std::int64_t kept_, room_;
    int sum_bits_;
    const PqKernels& kernel_;
    std::vector<std::int32_t> sums_, rows_, best_;
    std::vector<std::int64_t> sizes_;
    std::vector<std::int32_t> floors_;
};

/// One thread's part of a scan: a group of rows at a time.
class GroupScan {
public:
    GroupScan(const KnnScan& op, std::int64_t rows)
        : op_(op),
          kernel_(*kernels().pq),
          m_(op.codebooks.dim(0)),
          columns_(pq_columns(op.codebooks)),
          clusters_(op.begins.dim(0) - 1),
          most_(static_cast<std::int64_t>(kernel_.most_queries)),
          sum_bits_(std::bit_width(static_cast<std::uint32_t>(255 * m_))),
          begins_(op.begins.as<const std::int64_t>()),
          subspaces_(m_),
          steps_(columns_ / 4),
          entries_(aligned<float>(tables_at_once * table_size(op))),
          tables_(aligned<std::uint8_t>(rows * table_size(op))),
          candidates_(rows, op.ids.dim(1), sum_bits_),
          sums_(most_ * std::max(op.centroids.dim(0), most_blocks) * block_codes),
          hits_(most_ * most_blocks * block_codes),
          probes_(rows * op.probes),
          queries_(rows * op.probes),
          ends_(clusters_),
          together_(most_),
          floor_(most_) {
        std::fill_n(entries_.get(), tables_at_once * table_size(op), 0.0f);  // codes are padded
        std::iota(subspaces_.begin(), subspaces_.end(), 0);
        std::iota(steps_.begin(), steps_.end(), 0);
    }

    static std::int64_t table_size(const KnnScan& op) { return pq_columns(op.codebooks) * 32; }

    /// Rows [begin, end) of x.
    void operator()(std::int64_t begin, std::int64_t end) {
        first_ = op_.first + begin;
        count_ = end - begin;
        build_tables(begin);
        find_probes();
        candidates_.clear();
        start();
        meet();
        const std::int64_t kept = op_.ids.dim(1);
        const auto* order = op_.order.as<const std::int64_t>();
        for (std::int64_t own = 0; own < count_; ++own) {
            std::int64_t *ids = op_.ids.as<std::int64_t>() + (begin + own) * kept, *id = ids;
            candidates_.take(own, [&](std::int32_t row) { *id++ = order[row]; });
            std::fill(id, ids + kept, order[first_ + own]);
        }
    }

private:
    static constexpr std::int64_t tables_at_once = 16, most_blocks = 512, some_members = 8;

    std::uint8_t* table(std::int64_t own) { return tables_.get() + own * table_size(op_); }

    void build_tables(std::int64_t begin) {
        const std::int64_t d = op_.x.dim(1), size = table_size(op_);
        if (size > m_ * 16) std::fill_n(table(0), count_ * size, std::uint8_t{0});
        for (std::int64_t i = 0; i < count_; i += tables_at_once) {
            const std::int64_t count = std::min(tables_at_once, count_ - i);
            const PqTables tables{op_.x.as<const float>() + (begin + i) * d,
                                  static_cast<std::size_t>(count),
                                  op_.codebooks.as<const float>(),
                                  static_cast<std::size_t>(m_),
                                  16,
                                  static_cast<std::size_t>(op_.codebooks.dim(2)),
                                  true,
                                  subspaces_.data(),
                                  subspaces_.size(),
                                  static_cast<std::size_t>(size)};
            kernel_.entries(tables, entries_.get());
            PqRounding rounding;
            for (std::int64_t q = 0; q < count; ++q) {
                const float* entries = entries_.get() + q * size;
                kernel_.round_down(tables, entries, score_of_near(first_ + i + q, entries), table(i + q), rounding);
            }
        }
    }

    /// The median score of some codes of the row's own cluster.
    double score_of_near(std::int64_t row, const float* entries) {
        std::int64_t members[some_members];
        float scores[some_members];
        const std::int64_t cluster = std::upper_bound(begins_, begins_ + clusters_, row) - begins_ - 1;
        const std::int64_t begin = begins_[cluster], size = begins_[cluster + 1] - begin;
        const std::int64_t count = std::min(size, some_members);
        for (std::int64_t i = 0; i < count; ++i) members[i] = begin + i * size / count;
        const PqScores codes{op_.blocks.as<const std::uint8_t>(),
                             static_cast<std::size_t>(columns_),
                             static_cast<std::size_t>(block_codes),
                             entries,
                             steps_.data(),
                             steps_.size()};
        kernel_.score_nibbles(codes, members, static_cast<std::size_t>(count), scores);
        std::nth_element(scores, scores + count / 2, scores + count);
        return static_cast<double>(scores[count / 2]);
    }

    /// How many of `left` queries are scanned together.
    std::int64_t together(std::int64_t left) const {
        return std::min<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(left)), most_);
    }

    PqScan scan_of(const Array& codes, std::int64_t block, std::int64_t blocks, std::int64_t queries) const {
        return {codes.as<const std::uint8_t>() + block * block_codes * columns_,
                static_cast<std::size_t>(blocks),
                static_cast<std::size_t>(columns_),
                together_.data(),
                static_cast<std::size_t>(queries),
                steps_.data(),
                steps_.size(),
                floor_.data(),
                nullptr};
    }

    /// Calls visit(own, sums) for the rows [from, to) of the group: their sums with the codes of some blocks.
    template <class Visit>
    void for_each_sums(std::int64_t from, std::int64_t to, const Array& codes, std::int64_t block, std::int64_t blocks,
                       Visit visit) {
        const std::int64_t stride = blocks * block_codes;
        for (std::int64_t own = from; own < to;) {
            const std::int64_t queries = together(to - own);
            for (std::int64_t q = 0; q < queries; ++q) together_[q] = table(own + q);
            kernel_.sums_of_nibbles(scan_of(codes, block, blocks, queries), 1, sums_.data(), stride);
            for (std::int64_t q = 0; q < queries; ++q, ++own) visit(own, sums_.data() + q * stride);
        }
    }

    /// Calls visit(cluster, from, to) for the rows [from, to) of the group in each of their clusters.
    template <class Visit>
    void for_each_cluster(Visit visit) {
        std::int64_t cluster = std::upper_bound(begins_, begins_ + clusters_, first_) - begins_ - 1;
        for (std::int64_t own = 0; own < count_; ++cluster) {
            const std::int64_t end = std::min(count_, begins_[cluster + 1] - first_);
            if (end > own) visit(cluster, own, end);
            own = std::max(own, end);
        }
    }

    /// The clusters of each row, its own first.
    void find_probes() {
        const std::int64_t others = op_.probes - 1;
        for_each_cluster([&](std::int64_t cluster, std::int64_t from, std::int64_t to) {
            for_each_sums(from, to, op_.centroids, 0, op_.centroids.dim(0), [&](std::int64_t own, std::int32_t* sums) {
                std::int32_t* probe = probes_.data() + own * op_.probes;
                *probe++ = static_cast<std::int32_t>(cluster);
                sums[cluster] = -1;
                if (others > 0) kernel_.best_sums(sums, clusters_, others, sum_bits_, probe);
            });
        });
    }

    /// Compares each row with its own cluster, or the beginning of it, so that floors are high when it meets others.
    void start() {
        for_each_cluster([&](std::int64_t cluster, std::int64_t from, std::int64_t to) {
            const std::int64_t begin = begins_[cluster], end = begins_[cluster + 1], block = begin / block_codes;
            const std::int64_t last = std::min(end, (block + most_blocks) * block_codes);
            const std::int64_t blocks = (last - 1) / block_codes + 1 - block;
            for_each_sums(from, to, op_.blocks, block, blocks, [&](std::int64_t own, std::int32_t* sums) {
                sums += begin - block * block_codes;
                if (first_ + own < last) sums[first_ + own - begin] = -1;
                candidates_.start(own, sums, last - begin, begin);
            });
            std::iota(queries_.begin(), queries_.begin() + (to - from), from);
            scan(queries_.data(), to - from, last, end);
        });
    }

    /// Compares the rows of the group with the other clusters that they probe.
    void meet() {
        const auto for_each_probe = [&](auto visit) {
            for (std::int64_t own = 0; own < count_; ++own)
                for (std::int64_t k = 1; k < op_.probes; ++k) visit(own, probes_[own * op_.probes + k]);
        };
        std::fill(ends_.begin(), ends_.end(), 0);
        for_each_probe([&](std::int64_t, std::int32_t cluster) { ++ends_[cluster]; });
        std::exclusive_scan(ends_.begin(), ends_.end(), ends_.begin(), std::int64_t{0});
        for_each_probe([&](std::int64_t own, std::int32_t cluster) { queries_[ends_[cluster]++] = own; });
        for (std::int64_t cluster = 0, at = 0; cluster < clusters_; at = ends_[cluster++])
            scan(queries_.data() + at, ends_[cluster] - at, begins_[cluster], begins_[cluster + 1]);
    }

    /// Compares some rows of the group with rows [begin, end).
    void scan(const std::int64_t* queries, std::int64_t count, std::int64_t begin, std::int64_t end) {
        if (begin == end) return;
        const int lane_bits = std::countr_zero(kernel_.most_queries);
        for (std::int64_t block = begin / block_codes; block * block_codes < end; block += most_blocks) {
            const std::int64_t blocks = std::min(most_blocks, (end - 1) / block_codes + 1 - block);
            for (std::int64_t from = 0, some; from < count; from += some) {
                some = together(count - from);
                for (std::int64_t q = 0; q < some; ++q) {
                    together_[q] = table(queries[from + q]);
                    floor_[q] = candidates_.floor(queries[from + q]);
                }
                const std::size_t found =
                    kernel_.select_nibbles(scan_of(op_.blocks, block, blocks, some), hits_.data());
                for (std::size_t h = 0; h < found; ++h) {
                    const auto [sum, at] = hits_[h];
                    const std::int64_t row = block * block_codes + (at >> lane_bits);
                    const std::int64_t own = queries[from + (at & (most_ - 1))];
                    if (row >= begin && row < end && row != first_ + own) candidates_.push(own, sum, row);
                }
            }
        }
    }

    const KnnScan& op_;
    const PqKernels& kernel_;
    std::int64_t m_, columns_, clusters_, most_;
    int sum_bits_;
    const std::int64_t* begins_;
    std::vector<std::int32_t> subspaces_, steps_;
    Aligned<float> entries_;
    Aligned<std::uint8_t> tables_;
    Candidates candidates_;
    std::vector<std::int32_t> sums_;
    std::vector<PqHit> hits_;
    std::vector<std::int32_t> probes_;
    std::vector<std::int64_t> queries_, ends_;
    std::int64_t first_ = 0, count_ = 0;         // the group: these rows in the order of clusters
    std::vector<const std::uint8_t*> together_;  // tables of the queries that are scanned together
    std::vector<std::int32_t> floor_;            // of each
};

}  // namespace

void run(const KnnScan& op, Cpu cpu) {
    // Rows that probe much the same clusters, and whose tables stay in the nearer caches.
    constexpr std::int64_t most_rows = 512, cache_bytes = 1 << 20;
    const std::int64_t rows = std::clamp<std::int64_t>(cache_bytes / GroupScan::table_size(op), 16, most_rows);
    std::vector<GroupScan> scans;
    scans.reserve(workers_for(op.x.dim(0), rows, cpu.num_threads));
    while (scans.size() < scans.capacity()) scans.emplace_back(op, rows);
    parallel_for(op.x.dim(0), rows, cpu.num_threads,
                 [&](std::int64_t begin, std::int64_t end, int worker) { scans[worker](begin, end); });
}

void run(const KnnMerge& op, Cpu cpu) {
    struct Neighbor {
        float distance;
        std::int64_t row;

        bool operator<(const Neighbor& b) const { return distance != b.distance ? distance < b.distance : row < b.row; }
    };
    const std::int64_t n = op.ids.dim(0), kept = op.ids.dim(1), k = op.neighbors.dim(1);
    const auto* order = op.order.as<const std::int64_t>();
    const auto* ids = op.ids.as<const std::int64_t>();
    const auto* distances = op.distances.as<const float>();

    std::vector<float> farthest(n);  // of the k best of a row's own candidates
    parallel_for(n, 4096, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        constexpr std::int32_t most = std::numeric_limits<std::int32_t>::max();
        std::vector<std::int32_t> keys(kept);  // higher for nearer ones: floats from 0 on compare as integers do
        for (std::int64_t i = begin; i < end; ++i) {
            std::int64_t size = 0;
            for (std::int64_t at = i * kept; at < (i + 1) * kept; ++at)
                if (ids[at] != order[i])
                    keys[size++] = most - std::bit_cast<std::int32_t>(std::max(distances[at], 0.0f));
            farthest[order[i]] =
                size < k ? std::numeric_limits<float>::infinity()
                         : std::bit_cast<float>(most - kernels().pq->value_of_rank(keys.data(), size, k, 31, 0));
        }
    });

    // Candidates that are near enough to the row they name.
    const auto for_each_offer = [&](auto visit) {
        for (std::int64_t at = 0; at < n * kept; ++at)
            if (distances[at] <= farthest[ids[at]]) visit(ids[at], Neighbor{distances[at], order[at / kept]});
    };
    std::vector<std::int64_t> ends(n + 1);
    for_each_offer([&](std::int64_t row, const Neighbor&) { ++ends[row]; });
    std::exclusive_scan(ends.begin(), ends.end(), ends.begin(), std::int64_t{0});
    std::vector<Neighbor> offers(ends[n]);
    for_each_offer([&](std::int64_t row, const Neighbor& offer) { offers[ends[row]++] = offer; });

    parallel_for(n, 4096, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        std::vector<Neighbor> found;
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t row = order[i];
            const std::int64_t *own = ids + i * kept, *own_end = own + kept;
            found.clear();
            for (std::int64_t j = 0; j < kept; ++j)
                if (own[j] != row && distances[i * kept + j] <= farthest[row])
                    found.push_back({distances[i * kept + j], own[j]});
            for (std::int64_t at = row > 0 ? ends[row - 1] : 0; at < ends[row]; ++at)
                if (std::find(own, own_end, offers[at].row) == own_end) found.push_back(offers[at]);
            const auto count = std::min<std::int64_t>(k, found.size());
            std::partial_sort(found.begin(), found.begin() + count, found.end());
            for (std::int64_t j = 0; j < k; ++j) {
                op.neighbors.as<std::int64_t>()[row * k + j] = j < count ? found[j].row : -1;
                op.nearest.as<float>()[row * k + j] =
                    j < count ? found[j].distance : std::numeric_limits<float>::infinity();
            }
        }
    });
}

}  // namespace polyvec
