/// MaxSim, the score of late interaction: score(q, d) = sum over the tokens i of q of max over the tokens j of d of
/// <q_i, d_j>.
///
/// A document without tokens scores -inf, a query without tokens scores 0. A similarity that is NaN is never the
/// maximum. Paper: ColBERT (Khattab and Zaharia 2020), section 3.2.
#pragma once

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/id_lists.hpp"
#include "polyvec/token_sets.hpp"

namespace polyvec {

inline void require_pair(const char* op, const TokenSets& queries, const TokenSets& docs) {
    queries.validate(op);
    docs.validate(op);
    require_dtype(op, docs.tokens, queries.tokens.dtype);
    require_dim(op, docs.tokens, 1, queries.dim(), "the same d as queries");
}

/// out[q][d] = score(query q, document d).
struct MaxsimScore {
    static constexpr const char* op = "maxsim.score";
    TokenSets queries, docs;
    Array out;  // (queries, docs), their dtype

    void validate() const {
        require_pair(op, queries, docs);
        require_out(op, out, queries.tokens.dtype);
        require_ndim(op, out, 2);
        require_dim(op, out, 0, queries.size(), "one row a query");
        require_dim(op, out, 1, docs.size(), "one column a document");
    }
};

/// The k best documents of each query, equal scores by the smaller id: of all documents, or of its candidates.
struct MaxsimTopk {
    static constexpr const char* op = "maxsim.topk";
    TokenSets queries, docs;
    IdLists candidates;
    Array scores, ids;  // (queries, k) float32, int64

    void validate() const {
        require_pair(op, queries, docs);
        candidates.validate(op, queries.size(), docs.size());
        require_out(op, scores, DType::f32);
        require_out(op, ids, DType::i64);
        require_ndim(op, scores, 2);
        require_dim(op, scores, 0, queries.size(), "one row a query");
        require(ids.ndim == 2 && ids.shape == scores.shape, op, "ids must have the shape of scores ",
                scores.shape_text(), ", got ", ids.shape_text());
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
void run(const MaxsimTopk&, Cpu);
void run(const MaxsimAlign&, Cpu);

}  // namespace polyvec
