// Clusters of many small sets on a GPU: a block a set, in the plain form. Sums run in the order of the rows, and equal
// scores go to the first, so that results do not depend on the order in which threads run.
#include <cmath>

#include "launch.cuh"
#include "polyvec/clusters.hpp"
#include "warp.cuh"

namespace polyvec {
namespace {

constexpr int threads = 128, warps = threads / 32;

/// What all sets have, each at its own rows: arrays of T rows but for the means.
struct Clusters {
    const float* values;
    const std::int64_t *offsets, *mean_offsets;
    std::int64_t sets, d;
    bool ward;
    float* means;
    std::int64_t* labels;
    double* inertia;
    std::int64_t* iterations;
    // Scratch. Of clusters, which are no more than rows, the first of a set's.
    float *squares, *best, *half_squares;  // |x|^2, the best score, and |mean|^2 / 2
    std::int32_t *before, *counts, *moved;
    // Of Ward's method.
    float* centroids;  // (T, d)
    std::int32_t *chain, *joined, *into;
    double* heights;
};

/// The sum over the threads, in their order, for all of them.
__device__ double sum_of_block(double x) {
    __shared__ double parts[warps];
    x = sum_of_warp(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    double sum = 0;
    for (double part : parts) sum += part;
    return sum;
}

__device__ bool any_of_block(bool x) {
    return sum_of_block(x ? 1 : 0) > 0;
}

/// One set, and the block that works on it: every thread calls every function.
class Set {
public:
    __device__ Set(const Clusters& all, std::int64_t s)
        : d_(all.d), n_(all.offsets[s + 1] - all.offsets[s]), k_(all.mean_offsets[s + 1] - all.mean_offsets[s]) {
        const std::int64_t first = all.offsets[s];
        x_ = all.values + first * d_;
        means_ = all.means + all.mean_offsets[s] * d_;
        labels_ = all.labels + first;
        squares_ = all.squares + first, best_ = all.best + first, half_squares_ = all.half_squares + first;
        before_ = all.before + first, counts_ = all.counts + first, moved_ = all.moved + first;
        if (!all.ward) return;
        centroids_ = all.centroids + first * d_;
        chain_ = all.chain + first, joined_ = all.joined + first, into_ = all.into + first;
        heights_ = all.heights + first;
    }

    /// Writes |x|^2 of the rows; whether all are finite.
    __device__ bool measure() {
        bool finite = true;
        each(n_, [&](std::int64_t i) {
            squares_[i] = product(x_ + i * d_, x_ + i * d_);
            for (std::int64_t j = 0; j < d_; ++j) finite = finite && fabsf(x_[i * d_ + j]) < HUGE_VALF;  // and not NaN
        });
        return !any_of_block(!finite);
    }

    /// What a set that is not finite gets.
    __device__ void refuse() {
        each(k_ * d_, [&](std::int64_t i) { means_[i] = static_cast<float>(NAN); });
        each(n_, [&](std::int64_t i) { labels_[i] = 0; });
    }

    __device__ bool keeps_all() const { return k_ == n_; }
    __device__ void keep_all() {
        each(n_ * d_, [&](std::int64_t i) { means_[i] = x_[i]; });
        each(n_, [&](std::int64_t i) { labels_[i] = i; });
        __syncthreads();
    }

    /// Lloyd's iterations; returns their number.
    __device__ std::int64_t lloyd(std::int64_t max_iter, double tolerance) {
        each(k_ * d_, [&](std::int64_t i) { means_[i] = x_[i / d_ * n_ / k_ * d_ + i % d_]; });
        each(n_, [&](std::int64_t i) { before_[i] = -1; });
        double previous = HUGE_VAL;
        for (std::int64_t iteration = 0;; ++iteration) {
            const double loss = assign();
            if (!set_means()) return iteration;
            // Compared so that an unchanged sum ends it, whatever the tolerance.
            if (iteration == max_iter || previous <= (1 + tolerance) * loss) return iteration;
            previous = loss;
        }
    }

    /// Ward's method, by chains of nearest neighbours (Murtagh 1983). The rise of the inertia follows from the
    /// centroids of two clusters and their sizes: no distances are stored.
    __device__ void ward() {
        __shared__ std::int64_t length, joins, next;
        each(n_ * d_, [&](std::int64_t i) { centroids_[i] = x_[i]; });
        each(n_, [&](std::int64_t i) { counts_[i] = 1; });
        if (threadIdx.x == 0) length = joins = next = 0;
        __syncthreads();
        while (joins + 1 < n_) {
            if (threadIdx.x == 0 && length == 0) {
                while (counts_[next] == 0) ++next;
                chain_[length++] = static_cast<std::int32_t>(next);
            }
            __syncthreads();
            const std::int64_t a = chain_[length - 1], behind = length > 1 ? chain_[length - 2] : -1;
            const Nearest nearest = nearest_to(a, behind);
            __syncthreads();  // before thread 0 changes what the others have read
            if (nearest.cluster != behind) {
                if (threadIdx.x == 0) chain_[length++] = static_cast<std::int32_t>(nearest.cluster);
                __syncthreads();
                continue;
            }
            const std::int64_t b = behind;
            const float sa = static_cast<float>(counts_[a]), sb = static_cast<float>(counts_[b]);
            each(d_, [&](std::int64_t j) {
                float& to = centroids_[b * d_ + j];
                to = (sa * centroids_[a * d_ + j] + sb * to) / (sa + sb);
            });
            __syncthreads();
            if (threadIdx.x == 0) {
                counts_[b] += counts_[a];
                counts_[a] = 0;
                heights_[joins] = nearest.rise;
                joined_[joins] = static_cast<std::int32_t>(a), into_[joins++] = static_cast<std::int32_t>(b);
                length -= 2;
            }
            __syncthreads();
        }
        cut();
        each(n_, [&](std::int64_t i) { before_[i] = -1; });
        count();
        set_means();
    }

    __device__ double inertia() const {
        double sum = 0;
        each(n_, [&](std::int64_t i) {
            const float *row = x_ + i * d_, *mean = means_ + labels_[i] * d_;
            float square = 0;
            for (std::int64_t j = 0; j < d_; ++j) square = fmaf(row[j] - mean[j], row[j] - mean[j], square);
            sum += square;
        });
        return sum_of_block(sum);
    }

private:
    struct Nearest {
        double rise;
        std::int64_t cluster;

        __device__ void take(double other_rise, std::int64_t other) {
            if (other >= 0 && (cluster < 0 || other_rise < rise || (other_rise == rise && other < cluster)))
                rise = other_rise, cluster = other;
        }
    };

    template <class F>
    __device__ static void each(std::int64_t n, F f) {
        for (std::int64_t i = threadIdx.x; i < n; i += threads) f(i);
    }

    __device__ float product(const float* x, const float* y) const {
        float sum = 0;
        for (std::int64_t j = 0; j < d_; ++j) sum = fmaf(x[j], y[j], sum);
        return sum;
    }

    /// Labels the rows with their nearest mean; returns the sum of their squared distances, as rounded.
    __device__ double assign() {
        __syncthreads();
        each(k_, [&](std::int64_t c) { half_squares_[c] = product(means_ + c * d_, means_ + c * d_) / 2; });
        __syncthreads();
        double loss = 0;
        each(n_, [&](std::int64_t i) {
            best_[i] = -HUGE_VALF;
            labels_[i] = 0;
            for (std::int64_t c = 0; c < k_; ++c) {
                const float score = product(x_ + i * d_, means_ + c * d_) - half_squares_[c];
                if (score > best_[i]) best_[i] = score, labels_[i] = c;
            }
            loss += fmaxf(0.0f, squares_[i] - 2 * best_[i]);
        });
        loss = sum_of_block(loss);
        count();
        repair();
        return loss;
    }

    __device__ void count() {
        __syncthreads();
        each(k_, [&](std::int64_t c) { counts_[c] = 0; });
        __syncthreads();
        each(n_, [&](std::int64_t i) { atomicAdd(counts_ + labels_[i], 1); });
        __syncthreads();
    }

    /// Gives a cluster without rows the row farthest from its mean, of those whose cluster has others. Rare: one
    /// thread.
    __device__ void repair() {
        bool empty = false;
        each(k_, [&](std::int64_t c) { empty = empty || counts_[c] == 0; });
        if (!any_of_block(empty)) return;
        for (std::int64_t c = 0; threadIdx.x == 0 && c < k_; ++c) {
            if (counts_[c] > 0) continue;
            std::int64_t farthest = 0;  // fewer clusters than rows: there is one
            float most = -1;
            for (std::int64_t i = 0; i < n_; ++i) {
                const float loss = fmaxf(0.0f, squares_[i] - 2 * best_[i]);  // not below 0 by rounding, not NaN
                if (counts_[labels_[i]] > 1 && loss > most) most = loss, farthest = i;
            }
            --counts_[labels_[farthest]];
            labels_[farthest] = c;
            counts_[c] = 1;
            best_[farthest] = squares_[farthest] / 2;  // it is its own mean
        }
        __syncthreads();
    }

    /// The means of the rows of each label, where these are not the rows of before; whether any label changed.
    __device__ bool set_means() {
        __syncthreads();
        each(k_, [&](std::int64_t c) { moved_[c] = 0; });
        __syncthreads();
        bool changed = false;
        each(n_, [&](std::int64_t i) {
            if (labels_[i] == before_[i]) return;
            changed = true;
            atomicAdd(moved_ + labels_[i], 1);
            if (before_[i] >= 0) atomicAdd(moved_ + before_[i], 1);
            before_[i] = static_cast<std::int32_t>(labels_[i]);
        });
        if (!any_of_block(changed)) return false;
        each(k_ * d_, [&](std::int64_t at) {
            const std::int64_t c = at / d_, j = at % d_;
            if (moved_[c] == 0) return;
            double sum = 0;
            for (std::int64_t i = 0; i < n_; ++i)
                if (labels_[i] == c) sum += x_[i * d_ + j];
            means_[at] = static_cast<float>(sum * (1 / static_cast<double>(counts_[c])));
        });
        __syncthreads();
        return true;
    }

    /// The cluster whose union with a raises the inertia least: of equals the one behind a in the chain, so that chains
    /// end, or the first. Heights are twice the rise, as of squared distances. A warp a cluster.
    __device__ Nearest nearest_to(std::int64_t a, std::int64_t behind) const {
        __shared__ double rises[warps];
        __shared__ std::int64_t clusters[warps];
        const std::int64_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        Nearest best{HUGE_VAL, -1};
        double of_behind = HUGE_VAL;
        for (std::int64_t b = warp; b < n_; b += warps) {
            if (b == a || counts_[b] == 0) continue;
            double square = 0;
            for (std::int64_t j = lane; j < d_; j += 32) {
                const double gap = static_cast<double>(centroids_[a * d_ + j]) - centroids_[b * d_ + j];
                square += gap * gap;
            }
            const double sa = counts_[a], sb = counts_[b], rise = 2 * sa * sb / (sa + sb) * sum_of_warp(square);
            best.take(rise, b);
            if (b == behind) of_behind = rise;
        }
        __syncthreads();
        if (lane == 0) rises[warp] = best.rise, clusters[warp] = best.cluster;
        __syncthreads();
        for (int w = 0; w < warps; ++w) best.take(rises[w], clusters[w]);
        __syncthreads();
        if (lane == 0) rises[warp] = of_behind;
        __syncthreads();
        if (behind >= 0 && !(best.rise < rises[behind % warps])) best.cluster = behind;
        return best;
    }

    /// Labels by the n - k lowest joins, in the order of the clusters' first rows.
    __device__ void cut() {
        std::int32_t* const root = chain_;
        each(n_, [&](std::int64_t i) { root[i] = static_cast<std::int32_t>(i), before_[i] = -1; });
        each(n_ - 1, [&](std::int64_t j) {
            std::int64_t rank = 0;
            for (std::int64_t i = 0; i < n_ - 1; ++i)
                rank += heights_[i] < heights_[j] || (heights_[i] == heights_[j] && i < j);
            moved_[j] = rank < n_ - k_;
        });
        __syncthreads();
        if (threadIdx.x == 0) {
            const auto find = [&](std::int32_t i) {
                while (root[i] != i) i = root[i] = root[root[i]];
                return i;
            };
            for (std::int64_t j = 0; j < n_ - 1; ++j)
                if (moved_[j]) root[find(joined_[j])] = find(into_[j]);
            std::int32_t clusters = 0;
            for (std::int64_t i = 0; i < n_; ++i) {
                std::int32_t& own = before_[find(static_cast<std::int32_t>(i))];
                if (own < 0) own = clusters++;
                labels_[i] = own;
            }
        }
        __syncthreads();
    }

    std::int64_t d_, n_, k_;
    const float* x_;
    float* means_;
    std::int64_t* labels_;
    float *squares_, *best_, *half_squares_, *centroids_ = nullptr;
    std::int32_t *before_, *counts_, *moved_, *chain_ = nullptr, *joined_ = nullptr, *into_ = nullptr;
    double* heights_ = nullptr;
};

__global__ void __launch_bounds__(threads)
    cluster_kernel(const __grid_constant__ Clusters all, std::int64_t max_iter, double tolerance) {
    for (std::int64_t s = blockIdx.x; s < all.sets; s += gridDim.x) {
        Set set(all, s);
        std::int64_t iterations = 0;
        const bool finite = set.measure();
        if (!finite) {
            set.refuse();
        } else if (set.keeps_all()) {
            set.keep_all();
        } else if (all.ward) {
            set.ward();
        } else {
            iterations = set.lloyd(max_iter, tolerance);
        }
        const double inertia = finite ? set.inertia() : NAN;
        if (threadIdx.x == 0) all.inertia[s] = inertia, all.iterations[s] = iterations;
        __syncthreads();
    }
}

}  // namespace

void run(const ClusterSets& op, Cuda cuda) {
    const std::int64_t rows = op.values.dim(0), d = op.values.dim(1), sets = op.offsets.dim(0) - 1;
    if (sets == 0) return;
    const std::int64_t in_chains = op.ward ? rows : 0;
    const Scratch<float> floats(op.op, cuda, 3 * rows), centroids(op.op, cuda, in_chains * d);
    const Scratch<std::int32_t> ints(op.op, cuda, 3 * rows), chains(op.op, cuda, 3 * in_chains);
    const Scratch<double> heights(op.op, cuda, in_chains);
    const auto at = [](auto* x, std::int64_t i) { return x ? x + i : x; };
    const Clusters all{op.values.as<const float>(),
                       op.offsets.as<const std::int64_t>(),
                       op.mean_offsets.as<const std::int64_t>(),
                       sets,
                       d,
                       op.ward,
                       op.means.as<float>(),
                       op.labels.as<std::int64_t>(),
                       op.inertia.as<double>(),
                       op.iterations.as<std::int64_t>(),
                       floats.get(),
                       at(floats.get(), rows),
                       at(floats.get(), 2 * rows),
                       ints.get(),
                       at(ints.get(), rows),
                       at(ints.get(), 2 * rows),
                       centroids.get(),
                       chains.get(),
                       at(chains.get(), rows),
                       at(chains.get(), 2 * rows),
                       heights.get()};
    launch(op.op, cuda, dim3(static_cast<unsigned>(std::min<std::int64_t>(sets, 1 << 30))), dim3(threads), 0,
           cluster_kernel, all, op.max_iter, op.tolerance);
}

}  // namespace polyvec
