/// k-means. Its ops take `problems` independent problems of one size at once, (problems, n, d): one for a user's
/// k-means, one a subspace for the codebooks of a product quantizer. Paper: k-means++ (Arthur and Vassilvitskii 2007),
/// section 2.2.
#pragma once

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/metric.hpp"

namespace polyvec {

/// rows[p] = k rows of x[p] by D^2 sampling: the first uniformly, each next one with probability proportional to its
/// squared distance from the nearest row chosen before. Unless the metric is l2, distances are those of rows / |rows|.
struct KMeansSeed {
    static constexpr const char* op = "quantize.kmeans";
    Array x;     // (problems, n, d) float32
    Array rows;  // (problems, k) int64
    std::uint64_t seed = 0;
    Metric metric = Metric::l2;

    void validate() const {
        require_ndim(op, x, 3);
        require_dtype(op, x, DType::f32);
        require_contiguous(op, x);
        require_out(op, rows, DType::i64);
        require_ndim(op, rows, 2);
        require_dim(op, rows, 0, x.dim(0), "one row a problem");
        require(rows.dim(1) <= x.dim(1), op, "k must be at most the number of rows of x (", x.dim(1), "), got ",
                rows.dim(1));
    }
};

/// One iteration of Lloyd: labels[p][i] = the nearest of centroids[p], inertia[p] = the sum of the rows' losses, and
/// updated[p][c] = the mean of the rows with label c. The loss of a row is
///     l2  |x - c|^2        cosine  1 - <x, c> / (|x| |c|)        ip  |x| - <x, c> / |c|
/// and for the last two the mean is of x / |x|, or of x, and is divided by its norm (spherical k-means). Centroids
/// without rows move to the rows of greatest loss, the first of equals. No update raises the inertia.
struct KMeansStep {
    static constexpr const char* op = "quantize.kmeans";
    Array x;          // (problems, n, d) float32
    Array centroids;  // (problems, k, d) float32
    Array labels;     // (problems, n) int64
    Array inertia;    // (problems,) float64
    Array updated;    // (problems, k, d) float32, or absent
    Metric metric = Metric::l2;

    void validate() const {
        for (const Array* a : {&x, &centroids}) {
            require_ndim(op, *a, 3);
            require_dtype(op, *a, DType::f32);
            require_contiguous(op, *a);
        }
        require_dim(op, centroids, 0, x.dim(0), "one set a problem");
        require_dim(op, centroids, 2, x.dim(2), "the same d as x");
        require(centroids.dim(1) >= 1, op, "k must be at least 1, got ", centroids.dim(1));
        require_out(op, labels, DType::i64);
        require_ndim(op, labels, 2);
        require_dim(op, labels, 0, x.dim(0), "one row a problem");
        require_dim(op, labels, 1, x.dim(1), "one label a row of x");
        require_out(op, inertia, DType::f64);
        require_ndim(op, inertia, 1);
        require_dim(op, inertia, 0, x.dim(0), "one value a problem");
        if (updated) {
            require_out(op, updated, DType::f32);
            require(updated.ndim == 3 && updated.shape == centroids.shape, op, updated.name,
                    " must have the shape of centroids ", centroids.shape_text(), ", got ", updated.shape_text());
        }
    }
};

void run(const KMeansSeed&, Cpu);
void run(const KMeansStep&, Cpu);

}  // namespace polyvec
