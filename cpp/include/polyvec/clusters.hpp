/// Clusters of many small sets at once: k-means and Ward's method on each set by itself.
/// Papers: CRISP (Veneroso et al. 2025), section 3: a document's tokens become the means of their clusters. Ward
/// (1963).
#pragma once

#include <tuple>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"

namespace polyvec {

/// labels[i] = the cluster of row i within its set, centroids = the means of the clusters, inertia = the sum over a
/// set's rows of |x - centroid|^2. Set s has as many clusters as mean_offsets says, at most as many as it has rows;
/// where it has as many, its rows are its means. A set with NaN or Inf is left out: its inertia is NaN.
///
/// k-means (Lloyd) starts from evenly spaced rows; a cluster without rows takes the row farthest from its mean. Ward's
/// method joins, again and again, the two clusters whose union raises the inertia least.
struct ClusterSets {
    static constexpr const char* op = "quantize.kmeans_sets";
    Array values, offsets;       // (T, d) float32, (n + 1,) int64
    Array mean_offsets;          // (n + 1,) int64
    Array means, labels;         // (K, d) float32, (T,) int64
    Array inertia, iterations;   // (n,) float64, (n,) int64
    std::int64_t max_iter = 25;  // of k-means
    double tolerance = 0;        // stops when an iteration lowers the inertia by no more than this fraction of it
    bool ward = false;

    void validate() const {
        require_ndim(op, values, 2);
        require_dtype(op, values, DType::f32);
        require_contiguous(op, values);
        require_offsets(op, offsets, values.dim(0));
        require_out(op, means, DType::f32);
        require_ndim(op, means, 2);
        require_dim(op, means, 1, values.dim(1), "the d of values");
        require_offsets(op, mean_offsets, means.dim(0));
        const std::int64_t n = offsets.dim(0) - 1;
        require_dim(op, mean_offsets, 0, n + 1, "as many entries as offsets");
        const auto *rows = offsets.as<const std::int64_t>(), *kept = mean_offsets.as<const std::int64_t>();
        for (std::int64_t s = 0; offsets.device == Device::cpu && s < n; ++s) {
            const std::int64_t size = rows[s + 1] - rows[s], k = kept[s + 1] - kept[s];
            require(k <= size && (k > 0 || size == 0), op, "k must be in [1, ", size, "] for set ", s, ", got ", k);
        }
        for (const auto& [a, dtype, count] :
             {std::tuple{&labels, DType::i64, values.dim(0)}, std::tuple{&inertia, DType::f64, n},
              std::tuple{&iterations, DType::i64, n}}) {
            require_out(op, *a, dtype);
            require_ndim(op, *a, 1);
            require_dim(op, *a, 0, count, "the right length");
        }
    }
};

void run(const ClusterSets&, Cpu);

// On a GPU a set with NaN or Inf has means of NaN, too.
void run(const ClusterSets&, Cuda);

}  // namespace polyvec
