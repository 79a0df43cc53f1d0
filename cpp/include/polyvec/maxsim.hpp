/// MaxSim, the score of late interaction: score(q, d) = sum over the tokens i of q of max over the tokens j of d of
/// <q_i, d_j>.
///
/// A query without tokens scores 0. A similarity that is NaN is never the maximum. Paper: ColBERT (Khattab and Zaharia
/// 2020), section 3.2.
#pragma once

#include <limits>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/id_lists.hpp"
#include "polyvec/packed_tokens.hpp"
#include "polyvec/stored_tokens.hpp"
#include "polyvec/token_sets.hpp"

namespace polyvec {

inline void require_pair(const char* op, const TokenSets& queries, const StoredTokens& docs) {
    queries.validate(op);
    docs.validate(op, queries.dim(), queries.tokens.dtype);
}

/// What documents score where tokens are missing.
struct Missing {
    std::int64_t full = 0;  // a zero vector takes part in every document of fewer tokens
    double empty = -std::numeric_limits<double>::infinity();  // the score of a document in which nothing takes part
};

/// out[q][d] = score(query q, document d).
struct MaxsimScore {
    static constexpr const char* op = "maxsim.score";
    TokenSets queries;
    StoredTokens docs;
    Missing missing;
    Array out;  // (queries, docs), their dtype; float32 for those of 16 bits

    void validate() const {
        require_pair(op, queries, docs);
        require_out(op, out, sum_type(queries.tokens.dtype));
        require_ndim(op, out, 2);
        require_dim(op, out, 0, queries.size(), "one row a query");
        require_dim(op, out, 1, docs.size(), "one column a document");
    }
};

/// out[i] = score(query i, document i).
struct MaxsimScorePairs {
    static constexpr const char* op = "maxsim.score_pairs";
    TokenSets queries;
    StoredTokens docs;
    Missing missing;
    Array out;  // (n,), their dtype

    void validate() const {
        require_pair(op, queries, docs);
        require(docs.size() == queries.size(), op, "docs must have one document a query (", queries.size(), "), got ",
                docs.size());
        require_out(op, out, sum_type(queries.tokens.dtype));
        require_ndim(op, out, 1);
        require_dim(op, out, 0, queries.size(), "one entry a query");
    }
};

/// out[i][j] = <query_i, doc_j>; -inf where it is NaN.
struct MaxsimScoreMatrix {
    static constexpr const char* op = "maxsim.score_matrix";
    Array query, doc;  // (tq, d), (td, d)
    Array out;         // (tq, td), their dtype

    void validate() const {
        require_float(op, query);
        require_dtype(op, doc, query.dtype);
        for (const Array* a : {&query, &doc}) {
            require_ndim(op, *a, 2);
            require_contiguous(op, *a);
        }
        require_dim(op, doc, 1, query.dim(1), "the same d as query");
        require_out(op, out, query.dtype);
        require_ndim(op, out, 2);
        require_dim(op, out, 0, query.dim(0), "one row a query token");
        require_dim(op, out, 1, doc.dim(0), "one column a document token");
    }
};

inline void require_topk(const char* op, const Array& scores, const Array& ids, std::int64_t queries) {
    require_out(op, scores, DType::f32);
    require_out(op, ids, DType::i64);
    require_ndim(op, scores, 2);
    require_dim(op, scores, 0, queries, "one row a query");
    require(ids.ndim == 2 && ids.shape == scores.shape, op, "ids must have the shape of scores ", scores.shape_text(),
            ", got ", ids.shape_text());
}

/// The k best documents of each query, equal scores by the smaller id: of all documents, of its candidates, or of those
/// that are included for all queries.
struct MaxsimTopk {
    static constexpr const char* op = "maxsim.topk";
    TokenSets queries;
    StoredTokens docs;
    Missing missing;
    IdLists candidates;
    Array include;      // (c,) int64, or absent; on a GPU always
    Array scores, ids;  // (queries, k) float32, int64

    void validate() const {
        require_pair(op, queries, docs);
        candidates.validate(op, queries.size(), docs.size());
        if (include) {
            require(!candidates.offsets, op, "candidates must be None with include");
            require_ndim(op, include, 1);
            require_dtype(op, include, DType::i64);
            require_contiguous(op, include);
            require_ids(op, include, docs.size());
        }
        require_topk(op, scores, ids, queries.size());
    }
};

/// MaxsimTopk of the documents `exact`, bit for bit. All are scored as stored; a score is off by no more than the
/// bounds and the rounding of the query allow, so that only documents whose score plus that can reach the k-th best
/// score are scored exactly. rescored[q] = how many.
struct MaxsimCertifiedTopk {
    static constexpr const char* op = "maxsim.certified_topk";
    TokenSets queries;
    StoredTokens docs;
    Array bounds;  // of MaxsimBounds
    TokenSets exact;
    Array scores, ids, rescored;  // (queries, k) float32, int64; (queries,) int64

    void validate() const {
        require_pair(op, queries, docs);
        require(static_cast<bool>(docs.scales), op, "packed must be int8 or residual codes");
        require_bounds(op, bounds, docs);
        require_pair(op, queries, {exact, {}, {}, {}, {}});
        require(exact.size() == docs.size(), op, "docs must have as many documents as packed (", docs.size(), "), got ",
                exact.size());
        require_topk(op, scores, ids, queries.size());
        require_out(op, rescored, DType::i64);
        require_ndim(op, rescored, 1);
        require_dim(op, rescored, 0, queries.size(), "one entry a query");
    }
};

/// Scores, and what a gradient needs of them: which row of its document each query token found, -1 where there is none.
/// Of query i and document i where `out` has one axis, of all queries and documents where it has two.
struct MaxsimMatch {
    static constexpr const char* op = "maxsim.match";
    TokenSets queries, docs;
    Array out;   // (n,) | (queries, docs), their dtype
    Array rows;  // (query tokens,) | (docs, query tokens) int32

    void validate() const { validate(op, *this); }

    template <class Op>
    static void validate(const char* op, const Op& a) {
        a.queries.validate(op);
        a.docs.validate(op);
        const std::int64_t nq = a.queries.size(), nd = a.docs.size(), tokens = a.queries.tokens.dim(0);
        require_dtype(op, a.docs.tokens, a.queries.tokens.dtype);
        require_dim(op, a.docs.tokens, 1, a.queries.dim(), "the same d as queries");
        require_dtype(op, a.out, sum_type(a.queries.tokens.dtype));
        require_dtype(op, a.rows, DType::i32);
        require_contiguous(op, a.out);
        require_contiguous(op, a.rows);
        require(a.out.ndim == 1 || a.out.ndim == 2, op, "out must have 1 or 2 axes, got shape ", a.out.shape_text());
        require_ndim(op, a.rows, a.out.ndim);
        require_dim(op, a.out, 0, nq, "one row a query");
        require_dim(op, a.rows, -1, tokens, "one entry a query token");
        require(a.out.ndim == 2 || nd == nq, op, "docs must have one document a query (", nq, "), got ", nd);
        if (a.out.ndim == 1) return;
        require_dim(op, a.out, 1, nd, "one column a document");
        require_dim(op, a.rows, 0, nd, "one row a document");
    }
};

/// The gradient for the tokens of the queries or of the documents, given that of the scores of MaxsimMatch. Sums run
/// over documents, over query tokens, in their order.
struct MaxsimMatchGradient {
    static constexpr const char* op = "maxsim.match_gradient";
    TokenSets queries, docs;
    Array out, rows;  // the scores' gradient; rows as MaxsimMatch wrote them
    bool of_docs;
    Array gradient;  // as the queries' or the documents' tokens

    void validate() const {
        MaxsimMatch::validate(op, *this);
        require_out(op, gradient, queries.tokens.dtype);
        const Array& tokens = (of_docs ? docs : queries).tokens;
        require(gradient.ndim == 2 && gradient.shape == tokens.shape, op, "gradient must have the shape of the tokens ",
                tokens.shape_text(), ", got ", gradient.shape_text());
    }
};

/// ids[i] = the row of doc that is most similar to row i of query, the first of equals; similarities[i] = their inner
/// product. -1 and -inf where doc has no rows.
struct MaxsimAlign {
    static constexpr const char* op = "maxsim.align";
    Array query, doc;         // (tq, d), (td, d)
    Array ids, similarities;  // (tq,) int64, (tq,) query's dtype

    void validate() const {
        require_float(op, query);
        require_dtype(op, doc, query.dtype);
        for (const Array* a : {&query, &doc}) {
            require_ndim(op, *a, 2);
            require_contiguous(op, *a);
        }
        require_dim(op, doc, 1, query.dim(1), "the same d as query");
        require_out(op, ids, DType::i64);
        require_out(op, similarities, query.dtype);
        for (const Array* a : {&ids, &similarities}) {
            require_ndim(op, *a, 1);
            require_dim(op, *a, 0, query.dim(0), "one entry a query token");
        }
    }
};

void run(const MaxsimScore&, Cpu);
void run(const MaxsimScorePairs&, Cpu);
void run(const MaxsimScoreMatrix&, Cpu);
void run(const MaxsimTopk&, Cpu);
void run(const MaxsimCertifiedTopk&, Cpu);
void run(const MaxsimAlign&, Cpu);
void run(const MaxsimMatch&, Cpu);
void run(const MaxsimMatchGradient&, Cpu);

// On a GPU a candidate outside the documents is left out, and k is at most 4096.
void run(const MaxsimScore&, Cuda);
void run(const MaxsimScorePairs&, Cuda);
void run(const MaxsimScoreMatrix&, Cuda);
void run(const MaxsimTopk&, Cuda);
void run(const MaxsimCertifiedTopk&, Cuda);  // of int8 tokens
void run(const MaxsimAlign&, Cuda);
void run(const MaxsimMatch&, Cuda);
void run(const MaxsimMatchGradient&, Cuda);

}  // namespace polyvec
