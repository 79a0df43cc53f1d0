// MaxSim on a GPU, in its plain form: a thread a pair of a query and a document, which computes one inner product after
// the other. Products are summed in the tokens' dtype, maxima in float64, as on a CPU.
#include <cmath>

#include "best.cuh"
#include "launch.cuh"
#include "polyvec/maxsim.hpp"

namespace polyvec {
namespace {

template <class T>
struct Sets {
    const T* tokens;
    const std::int64_t* offsets;

    __device__ std::int64_t length(std::int64_t i) const { return offsets[i + 1] - offsets[i]; }
};

template <class T>
Sets<T> sets_of(const TokenSets& sets) {
    return {sets.tokens.as<const T>(), sets.offsets.as<const std::int64_t>()};
}

/// The most similar of a token's products with the rows of a document, and the first of equal rows.
template <class T>
struct Match {
    T similarity;
    std::int64_t row;
};

template <class T>
__device__ T product(const T* x, const T* y, std::int64_t d) {
    T sum = 0;
    for (std::int64_t c = 0; c < d; ++c) sum = fma(x[c], y[c], sum);
    return sum;
}

template <class T>
__device__ Match<T> match(const T* token, const T* rows, std::int64_t n, std::int64_t d) {
    Match<T> best{static_cast<T>(-HUGE_VAL), -1};
    for (std::int64_t j = 0; j < n; ++j) {
        const T similarity = product(token, rows + j * d, d);
        if (similarity > best.similarity || (best.row < 0 && similarity == best.similarity)) best = {similarity, j};
    }
    return best;
}

template <class T>
struct Pairs {
    Sets<T> queries, docs;
    std::int64_t d;
    Missing missing;

    /// The score of query q and document `doc`; writes the matches of the tokens to `rows` unless it is null.
    __device__ T operator()(std::int64_t q, std::int64_t doc, std::int32_t* rows = nullptr) const {
        const std::int64_t first = queries.offsets[q], length = docs.length(doc);
        const bool zero = length < missing.full;
        if (length == 0 && !zero && queries.length(q) > 0) {
            for (std::int64_t i = 0; rows && i < queries.length(q); ++i) rows[i] = -1;
            return static_cast<T>(missing.empty);
        }
        double sum = 0;
        for (std::int64_t i = 0; i < queries.length(q); ++i) {
            const Match<T> best =
                match(queries.tokens + (first + i) * d, docs.tokens + docs.offsets[doc] * d, length, d);
            sum += zero && !(best.similarity > 0) ? T(0) : best.similarity;
            if (rows) rows[i] = static_cast<std::int32_t>(best.row);
        }
        return static_cast<T>(sum);
    }
};

/// Of all queries and documents, or of those at the same position; rows (null, or as MaxsimMatch says).
template <class T>
__global__ void score_kernel(const __grid_constant__ Pairs<T> score, T* out, std::int32_t* rows,
                             std::int64_t query_tokens, std::int64_t queries, std::int64_t docs, bool all) {
    for_each_position(queries, all ? docs : 1, [&](std::int64_t q, std::int64_t column) {
        const std::int64_t doc = all ? column : q;
        std::int32_t* found = rows ? rows + (all ? doc * query_tokens : 0) + score.queries.offsets[q] : nullptr;
        out[all ? q * docs + doc : q] = score(q, doc, found);
    });
}

/// lists, ids: the candidates of each query, or null: all documents.
template <class T>
__global__ void topk_kernel(const __grid_constant__ Pairs<T> score, const std::int64_t* lists, const std::int64_t* ids,
                            std::int64_t docs, const __grid_constant__ Parts parts, float* scores, std::int64_t* found,
                            std::int64_t queries, std::int64_t k, float sign) {
    for_each_position(queries, parts.count, [&](std::int64_t q, std::int64_t part) {
        const std::int64_t begin = lists ? lists[q] : 0, n = lists ? lists[q + 1] - begin : docs;
        const std::int64_t at = (q * parts.count + part) * k;
        Best best{scores + at, found + at, k};
        for (std::int64_t i = n * part / parts.count; i < n * (part + 1) / parts.count; ++i) {
            const std::int64_t doc = ids ? ids[begin + i] : i;
            if (doc < 0 || doc >= docs) continue;
            const float value = static_cast<float>(score(q, doc));
            if (best.takes(value, doc)) best.push(value, doc);
        }
        best.finish(sign);
    });
}

template <class T>
__global__ void matrix_kernel(const T* query, const T* doc, T* out, std::int64_t rows, std::int64_t columns,
                              std::int64_t d) {
    for_each_position(rows, columns, [&](std::int64_t i, std::int64_t j) {
        const T similarity = product(query + i * d, doc + j * d, d);
        out[i * columns + j] = isnan(similarity) ? static_cast<T>(-HUGE_VAL) : similarity;
    });
}

template <class T>
__global__ void align_kernel(const T* query, const T* doc, std::int64_t* ids, T* similarities, std::int64_t rows,
                             std::int64_t doc_rows, std::int64_t d) {
    for_each_position(rows, 1, [&](std::int64_t i, std::int64_t) {
        const Match<T> best = match(query + i * d, doc, doc_rows, d);
        ids[i] = best.row;
        similarities[i] = best.similarity;
    });
}

/// A thread a set and a column: sums run over the other sets and over query tokens in their order.
template <class T>
__global__ void gradient_kernel(const __grid_constant__ Sets<T> queries, const __grid_constant__ Sets<T> docs,
                                const T* weights, const std::int32_t* rows, T* gradient, std::int64_t n_queries,
                                std::int64_t n_docs, std::int64_t query_tokens, std::int64_t d, bool of_docs,
                                bool all) {
    const Sets<T>&sets = of_docs ? docs : queries, &others = of_docs ? queries : docs;
    for_each_position(of_docs ? n_docs : n_queries, d, [&](std::int64_t set, std::int64_t c) {
        for (std::int64_t i = sets.offsets[set]; i < sets.offsets[set + 1]; ++i) gradient[i * d + c] = 0;
        const std::int64_t end = all ? (of_docs ? n_queries : n_docs) : set + 1;
        for (std::int64_t other = all ? 0 : set; other < end; ++other) {
            const std::int64_t query = of_docs ? other : set, doc = of_docs ? set : other;
            const T weight = weights[all ? query * n_docs + doc : query];
            const std::int32_t* found = rows + (all ? doc * query_tokens : 0);
            for (std::int64_t i = queries.offsets[query]; i < queries.offsets[query + 1]; ++i) {
                if (found[i] < 0) continue;
                const std::int64_t j = docs.offsets[doc] + found[i];
                T& sum = gradient[(of_docs ? j : i) * d + c];
                sum = fma(weight, others.tokens[(of_docs ? i : j) * d + c], sum);
            }
        }
    });
}

template <class F>
void with_float(DType dtype, F f) {
    dtype == DType::f32 ? f.template operator()<float>() : f.template operator()<double>();
}

void require_floats(const char* op, const StoredTokens& docs) {
    require<TypeError>(docs.format() == StoredTokens::floats, op,
                       "docs must be float32 or float64 on a GPU, got packed tokens");
}

template <class T>
void score(const char* op, Cuda cuda, const Pairs<T>& pairs, const TokenSets& queries, const TokenSets& docs,
           const Array& out, const Array& rows) {
    const bool all = out.ndim == 2;
    launch_rows(op, cuda, queries.size(), all ? docs.size() : 1, score_kernel<T>, pairs, out.as<T>(),
                rows.as<std::int32_t>(), queries.tokens.dim(0), queries.size(), docs.size(), all);
}

template <class Op>
void score(const Op& op, Cuda cuda) {
    require_floats(op.op, op.docs);
    with_float(op.out.dtype, [&]<class T>() {
        const Pairs<T> pairs{sets_of<T>(op.queries), sets_of<T>(op.docs), op.queries.dim(), op.missing};
        score(op.op, cuda, pairs, op.queries, op.docs, op.out, Array());
    });
}

}  // namespace

void run(const MaxsimScore& op, Cuda cuda) {
    score(op, cuda);
}

void run(const MaxsimScorePairs& op, Cuda cuda) {
    score(op, cuda);
}

void run(const MaxsimMatch& op, Cuda cuda) {
    with_float(op.out.dtype, [&]<class T>() {
        const Pairs<T> pairs{sets_of<T>(op.queries), sets_of<T>(op.docs), op.queries.dim(), {}};
        score(op.op, cuda, pairs, op.queries, op.docs, op.out, op.rows);
    });
}

void run(const MaxsimScoreMatrix& op, Cuda cuda) {
    const std::int64_t rows = op.query.dim(0), columns = op.doc.dim(0);
    with_float(op.out.dtype, [&]<class T>() {
        launch_rows(op.op, cuda, rows, columns, matrix_kernel<T>, op.query.as<const T>(), op.doc.as<const T>(),
                    op.out.as<T>(), rows, columns, op.query.dim(1));
    });
}

void run(const MaxsimTopk& op, Cuda cuda) {
    require_floats(op.op, op.docs);
    const std::int64_t n = op.queries.size(), docs = op.docs.size(), k = op.scores.dim(1);
    const auto& [lists, ids] = op.candidates;
    const std::int64_t candidates = lists ? ids.dim(0) / std::max<std::int64_t>(n, 1) : docs;
    const Parts parts(n, candidates, k);
    with_float(op.queries.tokens.dtype, [&]<class T>() {
        const Pairs<T> pairs{sets_of<T>(op.queries), sets_of<T>(op.docs), op.queries.dim(), op.missing};
        best_of_parts(op.op, cuda, parts, op.scores.as<float>(), op.ids.as<std::int64_t>(), n, k, 1,
                      [&, &lists = lists, &ids = ids](float* scores, std::int64_t* found, float sign) {
                          launch_rows(op.op, cuda, n, parts.count, topk_kernel<T>, pairs,
                                      lists.as<const std::int64_t>(), ids.as<const std::int64_t>(), docs, parts, scores,
                                      found, n, k, sign);
                      });
    });
}

void run(const MaxsimAlign& op, Cuda cuda) {
    with_float(op.query.dtype, [&]<class T>() {
        launch_rows(op.op, cuda, op.query.dim(0), 1, align_kernel<T>, op.query.as<const T>(), op.doc.as<const T>(),
                    op.ids.as<std::int64_t>(), op.similarities.as<T>(), op.query.dim(0), op.doc.dim(0),
                    op.query.dim(1));
    });
}

void run(const MaxsimMatchGradient& op, Cuda cuda) {
    const std::int64_t n_queries = op.queries.size(), n_docs = op.docs.size(), d = op.queries.dim();
    with_float(op.gradient.dtype, [&]<class T>() {
        launch_rows(op.op, cuda, op.of_docs ? n_docs : n_queries, d, gradient_kernel<T>, sets_of<T>(op.queries),
                    sets_of<T>(op.docs), op.out.as<const T>(), op.rows.as<const std::int32_t>(), op.gradient.as<T>(),
                    n_queries, n_docs, op.queries.tokens.dim(0), d, op.of_docs, op.out.ndim == 2);
    });
}

}  // namespace polyvec
