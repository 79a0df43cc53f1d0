/// The nearest other rows of every row: candidates by 4-bit codes of product quantisation among the rows of a few
/// clusters, then, by exact distances, the best of a row's candidates and of the rows that have it among theirs.
#pragma once

#include <utility>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/quantize_pq.hpp"

namespace polyvec {

/// Fills ids with the nearest rows by their codes of each of some rows, in any order: of those in its own cluster and
/// in the nearest others by the codes of their centroids, without itself. Where these are fewer, the rest is itself.
struct KnnScan {
    static constexpr const char* op = "hnsw.knn_graph";
    Array x;                     // (m, d) float32: rows order[first], order[first + 1], ...
    Array codebooks;             // (., 16, .)
    Array blocks;                // the codes of all rows in the order of their clusters, as PqPack writes them
    Array centroids;             // those of the centroids
    Array order;                 // (n,) int64: these rows
    Array begins;                // (clusters + 1,) int64: where those of each begin
    std::int64_t first, probes;  // clusters that a row is compared with
    Array ids;                   // (m, kept) int64

    void validate() const {
        require_pq_codebooks(op, codebooks);
        require(codebooks.dim(1) == 16, op, "codebooks must have 16 codewords a subspace");
        require_ndim(op, x, 2);
        require_dtype(op, x, DType::f32);
        require_contiguous(op, x);
        require_dim(op, x, 1, codebooks.dim(0) * codebooks.dim(2), "the dim of the codebooks");
        require_ndim(op, order, 1);
        require_dtype(op, order, DType::i64);
        require_contiguous(op, order);
        const std::int64_t n = order.dim(0), m = x.dim(0);
        require_ids(op, order, n);
        require(n < std::int64_t{1} << 31, op, "x must have fewer than 2^31 rows, got ", n);
        require(0 <= first && first <= n - m, op, "x must be rows of the order");
        require_offsets(op, begins, n);
        const std::int64_t clusters = begins.dim(0) - 1;
        require(1 <= probes && probes <= clusters, op, "probes must be at most the number of clusters");
        for (const auto& [codes, rows] : {std::pair{&blocks, n}, std::pair{&centroids, clusters}}) {
            require_ndim(op, *codes, 3);
            require_dtype(op, *codes, DType::u8);
            require_contiguous(op, *codes);
            require(codes->dim(0) == (rows + 15) / 16 && codes->dim(1) == pq_columns(codebooks) && codes->dim(2) == 16,
                    op, codes->name, " must hold a code a row");
        }
        require_ndim(op, ids, 2);
        require_dtype(op, ids, DType::i64);
        require_contiguous(op, ids);
        require_dim(op, ids, 0, m, "one row a row of x");
    }
};

/// Fills row order[i] of neighbors and nearest, for every i, with the best of the candidates ids[i] and of the rows
/// that have it among theirs: nearest first, equal distances by the lower row; missing ones are -1, at infinity.
struct KnnMerge {
    static constexpr const char* op = "hnsw.knn_graph";
    Array order;               // (n,) int64: each row once
    Array ids, distances;      // (n, kept) int64 and float32
    Array neighbors, nearest;  // (n, k) int64 and float32

    void validate() const {
        require_ndim(op, order, 1);
        require_dtype(op, order, DType::i64);
        require_contiguous(op, order);
        const std::int64_t n = order.dim(0);
        require_ids(op, order, n);
        for (const auto& [rows, values] : {std::pair{&ids, &distances}, std::pair{&neighbors, &nearest}}) {
            require_ndim(op, *rows, 2);
            require_dtype(op, *rows, DType::i64);
            require_contiguous(op, *rows);
            require_dim(op, *rows, 0, n, "one row a row of x");
            require_dtype(op, *values, DType::f32);
            require_contiguous(op, *values);
            require(values->ndim == 2 && values->shape == rows->shape, op, "distances must have the shape of ids");
        }
        require_ids(op, ids, n);
    }
};

void run(const KnnScan&, Cpu);
void run(const KnnMerge&, Cpu);

}  // namespace polyvec
