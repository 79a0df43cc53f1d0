/// Exact search: every query is compared with every item, and the queries x items product is never stored.
///
/// Queries are float32. With a bias (one number an item, added to the score) the score of a pair is
///     ip      q . x + bias                cosine  q . x / (|q| |x|) + bias, 0 + bias for a zero vector
///     l2      |q - x|^2 - bias, lower is better
/// A pair whose score is NaN never takes part. Where items are bfloat16 or int8, q is the query (for cosine: divided by
/// |q|) rounded to bfloat16, or to 127 steps of its largest element.
#pragma once

#include <cmath>
#include <limits>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/id_lists.hpp"
#include "polyvec/metric.hpp"

namespace polyvec {

/// `rows` (n, d); rows may be strided where `strided`.
inline void require_rows(const char* op, const Array& rows, bool strided = false) {
    require_ndim(op, rows, 2);
    require(rows.dense(strided ? 1 : 2), op, rows.name, " must be contiguous");
    require(rows.dim(0) <= std::numeric_limits<std::int32_t>::max(), op, rows.name,
            " must have fewer than 2^31 rows, got ", rows.dim(0));
}

/// Which blocks of block-sparse queries are stored; all others are zero. Absent beside dense queries.
struct StoredBlocks {
    Array ids;      // (total,) int32, ascending within a query
    Array offsets;  // (nq + 1,) int64: query i has the blocks offsets[i] to offsets[i + 1]

    explicit operator bool() const { return static_cast<bool>(offsets); }

    /// Of queries `values` (total, block) of width d.
    void validate(const char* op, const Array& values, std::int64_t d) const {
        require_ndim(op, ids, 1);
        require_dtype(op, ids, DType::i32);
        require_contiguous(op, ids);
        require_dim(op, ids, 0, values.dim(0), concat("one entry a row of ", values.name).c_str());
        require_offsets(op, offsets, ids.dim(0));
        const std::int64_t block = values.dim(1);
        require(block > 0 && d % block == 0, op, "items must have a width that is a multiple of a block's (", block,
                "), got ", d);
        if (ids.device != Device::cpu) return;
        const auto* id = ids.as<const std::int32_t>();
        const auto* begins = offsets.as<const std::int64_t>();
        for (std::int64_t query = 0; query + 1 < offsets.dim(0); ++query) {
            std::int64_t next = 0;
            for (std::int64_t j = begins[query]; j < begins[query + 1]; next = std::int64_t{id[j++]} + 1)
                require(id[j] >= next && id[j] < d / block, op, ids.name, " must be ascending in [0, ", d / block,
                        "), got ", id[j], " at position ", j);
        }
    }
};

/// Vectors to compare with: float32, bfloat16 (or its bits as uint16), float16, or int8 with an optional factor a row.
struct ScanItems {
    Array rows;    // (n, d)
    Array scales;  // (n,) float32 beside int8, or absent: 1

    void validate(const char* op, const Array& queries, bool sparse = false) const {
        require_dtype(op, queries, DType::f32);
        const DType dtype = rows.dtype;
        require<TypeError>(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::u16 || dtype == DType::f16 ||
                               dtype == DType::i8,
                           op, rows.name, " must be float32, bfloat16, float16 or int8, got ", name_of(dtype));
        require_rows(op, rows);
        if (!sparse) require_dim(op, rows, 1, queries.dim(1), concat("the same d as ", queries.name).c_str());
        if (!scales) return;
        require(dtype == DType::i8, op, "scales must come with int8 ", rows.name, ", got ", name_of(dtype));
        require_dtype(op, scales, DType::f32);
        require_ndim(op, scales, 1);
        require_contiguous(op, scales);
        require_dim(op, scales, 0, rows.dim(0), concat("one entry a row of ", rows.name).c_str());
    }
};

inline void require_summable(const char* op, const ScanItems& items) {
    require(items.rows.dtype != DType::i8 || items.rows.dim(1) <= most_int8, op, items.rows.name,
            " must have a width of at most ", most_int8, " in int8, got ", items.rows.dim(1));
}

/// What all but nearest have in common. `in_panels`: queries share the items' products.
inline void require_scan(const char* op, const Array& queries, const ScanItems& items, const Array& bias,
                         const StoredBlocks& blocks = {}, bool in_panels = true) {
    require_rows(op, queries);
    items.validate(op, queries, static_cast<bool>(blocks));
    if (in_panels) require_summable(op, items);
    if (blocks) blocks.validate(op, queries, items.rows.dim(1));
    if (!bias) return;
    require_dtype(op, bias, DType::f32);
    require_ndim(op, bias, 1);
    require_contiguous(op, bias);
    require_dim(op, bias, 0, items.rows.dim(0), "one entry an item");
}

/// One item a query.
inline void require_targets(const char* op, const Array& targets, const Array& queries, const ScanItems& items) {
    require_ndim(op, targets, 1);
    require_dtype(op, targets, DType::i64);
    require_contiguous(op, targets);
    require_dim(op, targets, 0, queries.dim(0), "one entry a query");
    require_ids(op, targets, items.rows.dim(0));
}

/// The k best items of each query, best first; equal scores by smaller id. Missing ones are id -1, score -inf (l2:
/// inf).
struct ScanTopK {
    static constexpr const char* op = "scan.topk";
    Array queries;  // (nq, d), or the blocks of block-sparse ones
    StoredBlocks blocks;
    ScanItems items;
    Array bias;         // (n,), or absent
    IdLists exclude;    // items that a query must not get
    Array scores, ids;  // (nq, k) float32 and int64
    Metric metric = Metric::ip;

    void validate() const {
        require_scan(op, queries, items, bias, blocks);
        const std::int64_t nq = blocks ? blocks.offsets.dim(0) - 1 : queries.dim(0);
        exclude.validate(op, nq, items.rows.dim(0));
        require_out(op, scores, DType::f32);
        require_out(op, ids, DType::i64);
        for (const Array* out : {&scores, &ids}) {
            require_ndim(op, *out, 2);
            require_dim(op, *out, 0, nq, "one row a query");
        }
        require_dim(op, ids, 1, scores.dim(1), "as many columns as scores");
    }
};

/// The best centroid of each row of x, the smaller id of equals, and its distance (l2) or similarity.
/// x may be a strided view, e.g. a slice of the columns of a wider array. With no centroid better than NaN: id 0.
struct ScanNearest {
    static constexpr const char* op = "scan.nearest";
    Array x;               // (n, d)
    ScanItems centroids;   // (k, d)
    Array ids, distances;  // (n,) int64, (n,) float32 or absent
    Metric metric = Metric::l2;

    void validate() const {
        require_rows(op, x, true);
        centroids.validate(op, x);
        require_summable(op, centroids);
        require(centroids.rows.dim(0) >= 1, op, "centroids must have at least 1 row, got 0");
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
    Array queries;  // (nq, d)
    ScanItems items;
    Array targets;  // (nq,) int64
    Array bias;     // (n,), or absent
    IdLists known;  // items that do not count, except the target
    Array ranks;    // (nq,) float64
    Metric metric = Metric::ip;
    Ties ties = Ties::realistic;

    void validate() const {
        require_scan(op, queries, items, bias);
        require_targets(op, targets, queries, items);
        known.validate(op, queries.dim(0), items.rows.dim(0));
        require_out(op, ranks, DType::f64);
        require_ndim(op, ranks, 1);
        require_dim(op, ranks, 0, queries.dim(0), "one entry a query");
    }
};

/// out[i][j]: the score of query i and item ids[i][j].
struct ScanPairs {
    static constexpr const char* op = "scan.score_pairs";
    Array queries;  // (nq, d), or the blocks of block-sparse ones
    StoredBlocks blocks;
    ScanItems items;
    Array ids;   // (nq, m) int64
    Array bias;  // (n,), or absent
    Array out;   // (nq, m) float32
    Metric metric = Metric::ip;

    void validate() const {
        require_scan(op, queries, items, bias, blocks, false);
        require_ndim(op, ids, 2);
        require_dtype(op, ids, DType::i64);
        require_contiguous(op, ids);
        require_dim(op, ids, 0, blocks ? blocks.offsets.dim(0) - 1 : queries.dim(0), "one row a query");
        require_ids(op, ids, items.rows.dim(0));
        require_out(op, out, DType::f32);
        require(out.shape == ids.shape && out.ndim == 2, op, "out must have the shape of ids ", ids.shape_text(),
                ", got ", out.shape_text());
    }
};

/// out[i]: the log of the sum over all items of exp(scale * score), of which the l2 score is -(|q - x|^2 - bias).
struct ScanLogSumExp {
    static constexpr const char* op = "scan.logsumexp";
    Array queries;  // (nq, d)
    ScanItems items;
    Array bias;       // (n,), or absent
    IdLists exclude;  // items that do not take part
    Array out;        // (nq,) float32
    float scale = 1;
    Metric metric = Metric::ip;

    void validate() const {
        require_scan(op, queries, items, bias);
        exclude.validate(op, queries.dim(0), items.rows.dim(0));
        require(scale > 0 && scale <= std::numeric_limits<float>::max(), op,
                "scale must be a positive finite number, got ", scale);
        require_out(op, out, DType::f32);
        require_ndim(op, out, 1);
        require_dim(op, out, 0, queries.dim(0), "one entry a query");
    }
};

/// The gradients of ScanLogSumExp for "ip", of float32 items: those of its result `grad`, and p_ij = exp(scale *
/// score(i, j) - result_i),
///     d_queries_i = scale grad_i sum_j p_ij x_j    d_items_j = sum_i scale grad_i p_ij q_i    d_bias_j = sum_i scale
///     grad_i p_ij
struct ScanLogSumExpGradient {
    static constexpr const char* op = "scan.logsumexp_gradient";
    Array queries, items;              // (nq, d), (n, d)
    Array bias;                        // (n,), or absent
    Array result, grad;                // (nq,)
    Array d_queries, d_items, d_bias;  // like queries, items, bias; each may be absent
    float scale = 1;

    void validate() const {
        require_scan(op, queries, {items, {}}, bias);
        require_dtype(op, items, DType::f32);
        for (const Array* of_queries : {&result, &grad}) {
            require_dtype(op, *of_queries, DType::f32);
            require_ndim(op, *of_queries, 1);
            require_contiguous(op, *of_queries);
            require_dim(op, *of_queries, 0, queries.dim(0), "one entry a query");
        }
        if (d_queries) require_like(op, d_queries, queries);
        if (d_items) require_like(op, d_items, items);
        if (!d_bias) return;
        require_out(op, d_bias, DType::f32);
        require_ndim(op, d_bias, 1);
        require_dim(op, d_bias, 0, items.dim(0), "one entry an item");
    }
};

/// out[i]: the sum over all items x but the target t and the `known` ones of max(0, margin - score(t) + score(x)), of
/// which the l2 score is -(|q - x|^2 - bias).
struct ScanHinge {
    static constexpr const char* op = "scan.hinge";
    Array queries;  // (nq, d)
    ScanItems items;
    Array targets;  // (nq,) int64
    Array bias;     // (n,), or absent
    IdLists known;  // items that do not take part
    Array out;      // (nq,) float32
    float margin = 1;
    Metric metric = Metric::ip;

    void validate() const {
        require_scan(op, queries, items, bias);
        require_targets(op, targets, queries, items);
        known.validate(op, queries.dim(0), items.rows.dim(0));
        require(std::abs(margin) <= std::numeric_limits<float>::max(), op, "margin must be a finite number, got ",
                margin);
        require_out(op, out, DType::f32);
        require_ndim(op, out, 1);
        require_dim(op, out, 0, queries.dim(0), "one entry a query");
    }
};

void run(const ScanTopK&, Cpu);
void run(const ScanNearest&, Cpu);
void run(const ScanRank&, Cpu);
void run(const ScanPairs&, Cpu);
void run(const ScanLogSumExp&, Cpu);
void run(const ScanLogSumExpGradient&, Cpu);
void run(const ScanHinge&, Cpu);

// On a GPU, where ids cannot be checked before: an excluded or known id outside the items names none, the rank of a
// target outside them or of score NaN is NaN, and so is the score of a pair; the nearest to a row with NaN is -1; a
// stored block outside the row is left out.
void run(const ScanTopK&, Cuda);
void run(const ScanNearest&, Cuda);
void run(const ScanRank&, Cuda);
void run(const ScanPairs&, Cuda);
void run(const ScanLogSumExp&, Cuda);
void run(const ScanHinge&, Cuda);

}  // namespace polyvec
