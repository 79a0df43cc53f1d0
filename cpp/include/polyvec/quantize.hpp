/// k-means and product quantisation.
///
/// k-means ops take `problems` independent problems of one size at once, (problems, n, d): one for a user's k-means,
/// one a subspace for the codebooks of a product quantizer.
/// Papers: k-means++ (Arthur and Vassilvitskii 2007), section 2.2; Product quantization for nearest neighbor search
/// (Jegou, Douze and Schmid 2011), section III.
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

/// Bytes of a code: m codes of 8 bits, or of 4 bits, the even subspaces in the low nibbles.
inline std::int64_t pq_code_size(const Array& codebooks) {
    return codebooks.dim(1) == 256 ? codebooks.dim(0) : (codebooks.dim(0) + 1) / 2;
}

inline void require_pq_codebooks(const char* op, const Array& codebooks) {
    require_ndim(op, codebooks, 3);
    require_dtype(op, codebooks, DType::f32);
    require_contiguous(op, codebooks);
    require(codebooks.dim(1) == 16 || codebooks.dim(1) == 256, op, codebooks.name,
            " must have 16 or 256 codewords a subspace, got ", codebooks.dim(1));
}

/// (n, m * dsub) float32 vectors and (n, code_size) uint8 codes; `codes` or `vectors` is what the op writes.
inline void require_pq_pair(const char* op, const Array& vectors, const Array& codes, const Array& codebooks) {
    require_pq_codebooks(op, codebooks);
    require_ndim(op, vectors, 2);
    require_ndim(op, codes, 2);
    require_dtype(op, vectors, DType::f32);
    require_dtype(op, codes, DType::u8);
    require_contiguous(op, vectors);
    require_contiguous(op, codes);
    require_dim(op, vectors, 1, codebooks.dim(0) * codebooks.dim(2), "the dim of the codebooks");
    require_dim(op, codes, 1, pq_code_size(codebooks), "the code size");
}

/// codes[i] = for each subspace, the codeword nearest to x[i].
struct PqEncode {
    static constexpr const char* op = "quantize.ProductQuantizer.encode";
    Array x, codebooks, codes;

    void validate() const {
        require_pq_pair(op, x, codes, codebooks);
        require_out(op, codes, DType::u8);
        require_dim(op, codes, 0, x.dim(0), "one row a row of x");
    }
};

/// out[i] = the codewords of codes[i], one after the other.
struct PqDecode {
    static constexpr const char* op = "quantize.ProductQuantizer.decode";
    Array codes, codebooks, out;

    void validate() const {
        require_pq_pair(op, out, codes, codebooks);
        require_out(op, out, DType::f32);
        require_dim(op, out, 0, codes.dim(0), "one row a code");
    }
};

/// The k codes whose decoded vectors score best against each query: inner products, or squared distances.
struct PqSearch {
    static constexpr const char* op = "quantize.ProductQuantizer.search";
    Array queries, codes, codebooks;
    Array scores, ids;     // (nq, k) float32, int64
    bool squared = false;  // squared distances, lower is better

    void validate() const {
        require_pq_pair(op, queries, codes, codebooks);
        require_out(op, scores, DType::f32);
        require_out(op, ids, DType::i64);
        require_ndim(op, scores, 2);
        require_dim(op, scores, 0, queries.dim(0), "one row a query");
        require(scores.dim(1) >= 1, op, "k must be at least 1, got ", scores.dim(1));
        require(ids.ndim == 2 && ids.shape == scores.shape, op, ids.name, " must have the shape of scores ",
                scores.shape_text(), ", got ", ids.shape_text());
    }
};

void run(const KMeansSeed&, Cpu);
void run(const KMeansStep&, Cpu);
void run(const PqEncode&, Cpu);
void run(const PqDecode&, Cpu);
void run(const PqSearch&, Cpu);

}  // namespace polyvec
