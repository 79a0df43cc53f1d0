/// The nearest other rows of every row: each is compared with the rows of a few clusters, then with the neighbours of
/// its neighbours. Paper: NN-descent (Dong, Charikar and Li 2011: Efficient k-nearest neighbor graph construction for
/// generic similarity measures), sections 2.2 to 2.4; its start is random, where this one's is the clusters.
///
/// Lists of neighbours are (n, kept) int32, nearest first, equal distances by the lower row: a row, and in the highest
/// bit whether it is new since the pass before. Distances are those of rows in one byte an element, squared, or minus
/// inner products. What is missing is no_neighbor, at infinity.
#pragma once

#include <algorithm>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"

namespace polyvec {

constexpr std::uint32_t no_neighbor = 0x7fffffff, new_neighbor = 0x80000000;

/// Rows of one byte an element: value i of a row is (byte i - 128) * its scale.
struct KnnRows {
    static constexpr std::int64_t align = 64;  // bytes that a row is padded to a multiple of, with 128

    Array codes;    // (n, d rounded up) uint8
    Array factors;  // (n, 2) float32: scale; squared length, or 0 beside inner products
    bool squared;   // else by inner product

    void validate(const char* op) const {
        require_ndim(op, codes, 2);
        require_dtype(op, codes, DType::u8);
        require_contiguous(op, codes);
        require(codes.dim(0) < no_neighbor, op, "x must have fewer than 2^31 - 1 rows, got ", codes.dim(0));
        require(codes.dim(1) % align == 0 && codes.dim(1) <= 1 << 17, op, "x must have a d of at most 131072");
        require_ndim(op, factors, 2);
        require_dtype(op, factors, DType::f32);
        require_contiguous(op, factors);
        require_dim(op, factors, 0, codes.dim(0), "one row a row of codes");
        require_dim(op, factors, 1, 2, "two factors");
    }
};

/// Rows [first, first + x.dim(0)) of `rows` from vectors.
struct KnnEncode {
    static constexpr const char* op = "hnsw.knn_graph";
    Array x;  // (m, d) float32
    std::int64_t first;
    KnnRows rows;

    void validate() const {
        rows.validate(op);
        require_ndim(op, x, 2);
        require_dtype(op, x, DType::f32);
        require_contiguous(op, x);
        require(rows.codes.dim(1) - KnnRows::align < x.dim(1) && x.dim(1) <= rows.codes.dim(1), op,
                "codes must be as wide as x, rounded up");
        require(0 <= first && first <= rows.codes.dim(0) - x.dim(0), op, "x must have rows of codes");
    }
};

inline void require_lists(const char* op, const Array& lists, std::int64_t n) {
    require_ndim(op, lists, 2);
    require_dtype(op, lists, DType::i32);
    require_contiguous(op, lists);
    require_dim(op, lists, 0, n, "one row a row of x");
}

inline void require_neighbors(const char* op, const Array& ids, const Array& distances, std::int64_t n) {
    require_lists(op, ids, n);
    require_dtype(op, distances, DType::f32);
    require_contiguous(op, distances);
    require(distances.ndim == 2 && distances.shape == ids.shape, op, "distances must have the shape of ids");
}

/// Fills rows [first, last) of ids and distances from the clusters that they probe.
struct KnnJoin {
    static constexpr const char* op = "hnsw.knn_graph";
    KnnRows rows;  // in the order of their clusters
    Array begins;  // (clusters + 1,) int64: where their rows begin
    Array probes;  // (n, p) int64: different clusters, its own first
    std::int64_t first, last;
    Array ids, distances;

    void validate() const {
        rows.validate(op);
        const std::int64_t n = rows.codes.dim(0);
        require_offsets(op, begins, n);
        require_ndim(op, probes, 2);
        require_dtype(op, probes, DType::i64);
        require_contiguous(op, probes);
        require_dim(op, probes, 0, n, "one row a row of x");
        require(0 <= first && first <= last && last <= n, op, "first and last must be rows of x");
        const auto* probe = probes.as<const std::int64_t>();
        require(std::all_of(probe + first * probes.dim(1), probe + last * probes.dim(1),
                            [&](std::int64_t c) { return c >= 0 && c < begins.dim(0) - 1; }),
                op, "probes must be clusters");
        require_neighbors(op, ids, distances, n);
    }
};

/// reverse (n, r): the first r rows that have a row among the first `degree` of their list, with the bit of that entry.
struct KnnReverse {
    static constexpr const char* op = "hnsw.knn_graph";
    Array ids;
    std::int64_t degree;
    Array reverse;

    void validate() const {
        require_lists(op, ids, ids.dim(0));
        require_lists(op, reverse, ids.dim(0));
        require(0 <= degree && degree <= ids.dim(1), op, "degree must be at most the length of a list");
    }
};

/// Fills rows [first, last) of better_ids and better_distances: the best of a row's list and of the neighbours of its
/// neighbours, where these are the first `degree` of a list and its reverse. Pairs without a new neighbour between them
/// were compared before.
struct KnnRefine {
    static constexpr const char* op = "hnsw.knn_graph";
    KnnRows rows;
    Array ids, distances, reverse;
    std::int64_t degree, first, last;
    Array better_ids, better_distances;

    void validate() const {
        rows.validate(op);
        const std::int64_t n = rows.codes.dim(0);
        require_neighbors(op, ids, distances, n);
        require_neighbors(op, better_ids, better_distances, n);
        require_dim(op, better_ids, 1, ids.dim(1), "lists as long as ids");
        require_lists(op, reverse, n);
        require(0 <= degree && degree <= ids.dim(1), op, "degree must be at most the length of a list");
        require(0 <= first && first <= last && last <= n, op, "first and last must be rows of x");
    }
};

/// Puts each list of ids (n, kept) int64 in the order of its distances, equal ones by the lower id.
struct KnnSort {
    static constexpr const char* op = "hnsw.knn_graph";
    Array ids, distances;

    void validate() const {
        require_ndim(op, ids, 2);
        require_dtype(op, ids, DType::i64);
        require_contiguous(op, ids);
        require_dtype(op, distances, DType::f32);
        require_contiguous(op, distances);
        require(distances.ndim == 2 && distances.shape == ids.shape, op, "distances must have the shape of ids");
    }
};

void run(const KnnEncode&, Cpu);
void run(const KnnJoin&, Cpu);
void run(const KnnReverse&, Cpu);
void run(const KnnRefine&, Cpu);
void run(const KnnSort&, Cpu);

}  // namespace polyvec
