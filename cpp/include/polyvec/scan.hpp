/// Exact search: every query is compared with every item, and the queries x items product is never stored.
///
/// All ops take float32. With a bias (one number an item, added to the score) the score of a pair is
///     ip      q . x + bias                cosine  q . x / (|q| |x|) + bias, 0 + bias for a zero vector
///     l2      |q - x|^2 - bias, lower is better
/// A pair whose score is NaN never takes part.
#pragma once

#include <limits>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/id_lists.hpp"
#include "polyvec/metric.hpp"

namespace polyvec {

/// `rows` (n, d) of float32; rows may be strided where `strided`.
inline void require_rows(const char* op, const Array& rows, bool strided = false) {
    require_dtype(op, rows, DType::f32);
    require_ndim(op, rows, 2);
    require(rows.dense(strided ? 1 : 2), op, rows.name, " must be contiguous");
    require(rows.dim(0) <= std::numeric_limits<std::int32_t>::max(), op, rows.name,
            " must have fewer than 2^31 rows, got ", rows.dim(0));
}

/// What topk, rank and score_pairs have in common.
inline void require_scan(const char* op, const Array& queries, const Array& items, const Array& bias) {
    require_rows(op, queries);
    require_rows(op, items);
    require_dim(op, items, 1, queries.dim(1), "the same d as queries");
    if (!bias) return;
    require_dtype(op, bias, DType::f32);
    require_ndim(op, bias, 1);
    require_contiguous(op, bias);
    require_dim(op, bias, 0, items.dim(0), "one entry an item");
}

/// The k best items of each query, best first; equal scores by smaller id. Missing ones are id -1, score -inf (l2:
/// inf).
struct ScanTopK {
    static constexpr const char* op = "scan.topk";
    Array queries, items;  // (nq, d), (n, d)
    Array bias;            // (n,), or absent
    IdLists exclude;       // items that a query must not get
    Array scores, ids;     // (nq, k) float32 and int64
    Metric metric = Metric::ip;

    void validate() const {
        require_scan(op, queries, items, bias);
        exclude.validate(op, queries.dim(0), items.dim(0));
        require_out(op, scores, DType::f32);
        require_out(op, ids, DType::i64);
        for (const Array* out : {&scores, &ids}) {
            require_ndim(op, *out, 2);
            require_dim(op, *out, 0, queries.dim(0), "one row a query");
        }
        require_dim(op, ids, 1, scores.dim(1), "as many columns as scores");
    }
};

/// The best centroid of each row of x, the smaller id of equals, and its distance (l2) or similarity.
/// x may be a strided view, e.g. a slice of the columns of a wider array. With no centroid better than NaN: id 0.
struct ScanNearest {
    static constexpr const char* op = "scan.nearest";
    Array x, centroids;    // (n, d), (k, d)
    Array ids, distances;  // (n,) int64, (n,) float32 or absent
    Metric metric = Metric::l2;

    void validate() const {
        require_rows(op, x, true);
        require_rows(op, centroids);
        require_dim(op, centroids, 1, x.dim(1), "the same d as x");
        require(centroids.dim(0) >= 1, op, "centroids must have at least 1 row, got 0");
        require_out(op, ids, DType::i64);
        require_ndim(op, ids, 1);
        require_dim(op, ids, 0, x.dim(0), "one entry a row of x");
        if (!distances) return;
        require_out(op, distances, DType::f32);
        require_ndim(op, distances, 1);
        require_dim(op, distances, 0, x.dim(0), "one entry a row of x");
    }
};

/// The rank of one item among all for each query, 1 the best, without the `known` ones other than the target.
struct ScanRank {
    enum class Ties { realistic, optimistic, pessimistic };

    static constexpr const char* op = "scan.rank";
    Array queries, items;  // (nq, d), (n, d)
    Array targets;         // (nq,) int64
    Array bias;            // (n,), or absent
    IdLists known;         // items that do not count, except the target
    Array ranks;           // (nq,) float64
    Metric metric = Metric::ip;
    Ties ties = Ties::realistic;

    void validate() const {
        require_scan(op, queries, items, bias);
        require_ndim(op, targets, 1);
        require_dtype(op, targets, DType::i64);
        require_contiguous(op, targets);
        require_dim(op, targets, 0, queries.dim(0), "one entry a query");
        require_ids(op, targets, items.dim(0));
        known.validate(op, queries.dim(0), items.dim(0));
        require_out(op, ranks, DType::f64);
        require_ndim(op, ranks, 1);
        require_dim(op, ranks, 0, queries.dim(0), "one entry a query");
    }
};

/// out[i][j]: the score of query i and item ids[i][j].
struct ScanPairs {
    static constexpr const char* op = "scan.score_pairs";
    Array queries, items;  // (nq, d), (n, d)
    Array ids;             // (nq, m) int64
    Array bias;            // (n,), or absent
    Array out;             // (nq, m) float32
    Metric metric = Metric::ip;

    void validate() const {
        require_scan(op, queries, items, bias);
        require_ndim(op, ids, 2);
        require_dtype(op, ids, DType::i64);
        require_contiguous(op, ids);
        require_dim(op, ids, 0, queries.dim(0), "one row a query");
        require_ids(op, ids, items.dim(0));
        require_out(op, out, DType::f32);
        require(out.shape == ids.shape && out.ndim == 2, op, "out must have the shape of ids ", ids.shape_text(),
                ", got ", out.shape_text());
    }
};

void run(const ScanTopK&, Cpu);
void run(const ScanNearest&, Cpu);
void run(const ScanRank&, Cpu);
void run(const ScanPairs&, Cpu);

}  // namespace polyvec
