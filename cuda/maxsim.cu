// MaxSim on a GPU. Tokens of up to 32 bits meet on the tensor cores: by maxsim_streams.cuh whatever the format and the
// number of queries, by maxsim_tiles.cuh where many queries meet all documents. float64, and rows too wide for shared
// memory, take the plain form: a thread a pair, which computes one inner product after the other. Products are summed
// in float32 (float64 for float64), maxima in float64, as on a CPU.
#include <cmath>

#include "best_rows.cuh"
#include "launch.cuh"
#include "maxsim_centroids.cuh"
#include "maxsim_certified.cuh"
#include "maxsim_streams.cuh"
#include "maxsim_tiles.cuh"
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

/// Scores by Work::place, a thread for `columns` of a query's documents; rows (null, or as MaxsimMatch says).
template <class T, class Score>
__global__ void score_kernel(const __grid_constant__ Pairs<T> score, const __grid_constant__ streams::Work work,
                             Score* out, std::int32_t* rows, std::int64_t query_tokens, std::int64_t queries,
                             std::int64_t columns) {
    for_each_position(queries, columns, [&](std::int64_t q, std::int64_t i) {
        for (; i < work.count(q); i += columns) {
            const std::int64_t doc = work.id(q, i);
            std::int32_t* found =
                rows ? rows + (work.pairs ? 0 : doc * query_tokens) + score.queries.offsets[q] : nullptr;
            out[work.place(q, i)] =
                doc >= 0 && doc < work.docs ? static_cast<Score>(score(q, doc, found)) : static_cast<Score>(NAN);
        }
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

/// The set that row `i` belongs to.
__device__ std::int64_t set_of(const std::int64_t* offsets, std::int64_t sets, std::int64_t i) {
    std::int64_t below = 0, above = sets;
    while (above - below > 1) {
        const std::int64_t middle = (below + above) / 2;
        (offsets[middle] <= i ? below : above) = middle;
    }
    return below;
}

/// Sums of products of tokens, and a sum as a token.
template <class T>
using SumOfTokens = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ T token_of(SumOfTokens<T> x) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        return {bfloat16_bits(x)};
    } else if constexpr (std::is_same_v<T, Float16>) {
        return rounded_to_float16(x);
    } else {
        return x;
    }
}

/// What gradients need: tokens of both sides and the rows that MaxsimMatch wrote.
template <class T>
struct Matches {
    Sets<T> queries, docs;
    std::int64_t n_queries, n_docs, query_tokens, d;
    const SumOfTokens<T>* weights;  // the gradient of the scores
    const std::int32_t* rows;
    bool all;
};

constexpr int columns_per_lane = 4;

/// A warp a query token and 128 columns: sums over documents in their order.
template <class T>
__global__ void query_gradient_kernel(const __grid_constant__ Matches<T> m, T* gradient) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::int64_t i = std::int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (i >= m.query_tokens) return;
    const std::int64_t query = set_of(m.queries.offsets, m.n_queries, i);
    const std::int64_t begin = m.all ? 0 : query, end = m.all ? m.n_docs : query + 1;
    for (std::int64_t first = std::int64_t(blockIdx.y) * 32 * columns_per_lane; first < m.d;
         first += std::int64_t(gridDim.y) * 32 * columns_per_lane) {
        SumOfTokens<T> sums[columns_per_lane] = {};
        for (std::int64_t base = begin; base < end; base += 32) {
            const std::int64_t doc = base + lane;
            std::int32_t row = -1;
            std::int64_t at = 0;
            SumOfTokens<T> weight = 0;
            if (doc < end) {
                row = m.rows[(m.all ? doc * m.query_tokens : 0) + i];
                at = m.docs.offsets[doc] + row;
                weight = m.weights[m.all ? query * m.n_docs + doc : query];
            }
            for (unsigned left = __ballot_sync(whole_warp, row >= 0); left; left &= left - 1) {
                const int from = __ffs(static_cast<int>(left)) - 1;
                const T* token = m.docs.tokens + __shfl_sync(whole_warp, at, from) * m.d;
                const SumOfTokens<T> by = __shfl_sync(whole_warp, weight, from);
                for (int c = 0; c < columns_per_lane; ++c) {
                    const std::int64_t column = first + c * 32 + lane;
                    if (column < m.d) sums[c] = fma(by, static_cast<SumOfTokens<T>>(value_of(token[column])), sums[c]);
                }
            }
        }
        for (int c = 0; c < columns_per_lane; ++c) {
            const std::int64_t column = first + c * 32 + lane;
            if (column < m.d) gradient[i * m.d + column] = token_of<T>(sums[c]);
        }
    }
}

/// A warp a document token and 128 columns: of the query tokens that found it, in their order. sets: each query
/// token's.
template <class T>
__global__ void doc_gradient_kernel(const __grid_constant__ Matches<T> m, const std::int32_t* sets,
                                    std::int64_t doc_tokens, T* gradient) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::int64_t j = std::int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (j >= doc_tokens) return;
    const std::int64_t doc = set_of(m.docs.offsets, m.n_docs, j), row = j - m.docs.offsets[doc];
    const std::int64_t begin = m.all ? 0 : m.queries.offsets[doc];
    const std::int64_t end = m.all ? m.query_tokens : m.queries.offsets[doc + 1];
    const std::int32_t* found = m.rows + (m.all ? doc * m.query_tokens : 0);
    for (std::int64_t first = std::int64_t(blockIdx.y) * 32 * columns_per_lane; first < m.d;
         first += std::int64_t(gridDim.y) * 32 * columns_per_lane) {
        SumOfTokens<T> sums[columns_per_lane] = {};
        constexpr int at_once = 4;  // few of the rows are this one: reading them is what takes time
        for (std::int64_t base = begin; base < end; base += 32 * at_once) {
            bool here[at_once];
#pragma unroll
            for (int u = 0; u < at_once; ++u) {
                const std::int64_t i = base + u * 32 + lane;
                here[u] = i < end && found[i] == row;
            }
#pragma unroll
            for (int u = 0; u < at_once; ++u) {
                unsigned left = __ballot_sync(whole_warp, here[u]);
                if (left == 0) continue;
                const std::int64_t i = base + u * 32 + lane;
                SumOfTokens<T> weight = 0;
                if (here[u]) weight = m.weights[m.all ? sets[i] * m.n_docs + doc : doc];
                for (; left; left &= left - 1) {
                    const int from = __ffs(static_cast<int>(left)) - 1;
                    const T* token = m.queries.tokens + (base + u * 32 + from) * m.d;
                    const SumOfTokens<T> by = __shfl_sync(whole_warp, weight, from);
                    for (int c = 0; c < columns_per_lane; ++c) {
                        const std::int64_t column = first + c * 32 + lane;
                        if (column < m.d)
                            sums[c] = fma(by, static_cast<SumOfTokens<T>>(value_of(token[column])), sums[c]);
                    }
                }
            }
        }
        for (int c = 0; c < columns_per_lane; ++c) {
            const std::int64_t column = first + c * 32 + lane;
            if (column < m.d) gradient[j * m.d + column] = token_of<T>(sums[c]);
        }
    }
}

__global__ void sets_kernel(const std::int64_t* offsets, std::int64_t sets, std::int64_t tokens, std::int32_t* out) {
    for_each_position(
        tokens, 1, [&](std::int64_t i, std::int64_t) { out[i] = static_cast<std::int32_t>(set_of(offsets, sets, i)); });
}

/// The scores of a call and, where they are wanted, the rows that they are of.
struct Scores {
    const char* op;
    Cuda cuda;
    TokenSets queries;
    StoredTokens docs;
    Missing missing;
    streams::Work work;
    std::int64_t columns;  // documents a query, about
    DType dtype;           // of the scores: float32, or float64 for float64 tokens
    void* out;             // by Work::place
    std::int32_t* rows;    // null when not wanted
};

template <class F>
void with_float(DType dtype, F f) {
    dtype == DType::f32 ? f.template operator()<float>() : f.template operator()<double>();
}

/// Calls f with a constant: the type of tokens as they are.
template <class F>
void with_tokens(DType dtype, F f) {
    if (dtype == DType::f32) {
        f.template operator()<float>();
    } else if (dtype == DType::f64) {
        f.template operator()<double>();
    } else if (dtype == DType::f16) {
        f.template operator()<Float16>();
    } else {
        f.template operator()<BFloat16>();
    }
}

template <class T, class Score>
void score_plainly(const Scores& call) {
    const Pairs<T> pairs{sets_of<T>(call.queries), sets_of<T>(call.docs), call.queries.dim(), call.missing};
    launch_rows(call.op, call.cuda, call.queries.size(), call.columns, score_kernel<T, Score>, pairs, call.work,
                static_cast<Score*>(call.out), call.rows, call.queries.tokens.dim(0), call.queries.size(),
                call.columns);
}

/// Rounds queries to 16 bits.
void round_queries(const Scores& call, Words to, std::uint16_t* out) {
    const std::int64_t n = call.queries.tokens.size();
    if (n == 0) return;
    with_tokens(call.queries.tokens.dtype, [&]<class T>() {
        launch(call.op, call.cuda, blocks_for(n, threads_per_block), dim3(threads_per_block), 0,
               streams::halves_kernel<T>, call.queries.tokens.as<const T>(), n, to, out);
    });
}

/// Calls f(Tokens()) for the form in which streams read the documents: copied ahead, or where rows do not lie as copies
/// take them or f says false, for want of shared memory, loaded. Returns what the last f did.
template <class F>
bool with_stored(const StoredTokens& docs, std::int64_t row_bytes, F f) {
    const auto in_form = [&](std::int64_t bytes, auto copied, auto loaded) {
        const bool whole = row_bytes % bytes == 0 && reinterpret_cast<std::uintptr_t>(docs.tokens.data) % bytes == 0;
        return (whole && f(copied)) || f(loaded);
    };
    using namespace streams;
    switch (docs.format()) {
        case StoredTokens::floats:
            return in_form(16, PlainTokens<Words::f32, true>(), PlainTokens<Words::f32, false>());
        case StoredTokens::bfloat16:
            return in_form(16, PlainTokens<Words::bf16, true>(), PlainTokens<Words::bf16, false>());
        case StoredTokens::float16:
            return in_form(16, PlainTokens<Words::f16, true>(), PlainTokens<Words::f16, false>());
        case StoredTokens::int8:
            return in_form(16, PlainTokens<Words::s8, true>(), PlainTokens<Words::s8, false>());
        case StoredTokens::residual4:
            return in_form(8, ResidualTokens<4, true>(), ResidualTokens<4, false>());
        default:
            return in_form(4, ResidualTokens<2, true>(), ResidualTokens<2, false>());
    }
}

/// The products of queries with the centroids of documents, as streams::Docs has them.
class CentroidScores : public Scratch<streams::HalfScores> {
public:
    /// None are computed unless `wanted`.
    CentroidScores(const Scores& call, bool wanted) : Scratch(call.op, call.cuda, wanted ? count(call) : 0) {
        const std::int64_t n = call.queries.size(), centroids = call.docs.centroids.dim(0);
        if (!wanted || call.queries.tokens.dim(0) == 0 || centroids == 0) return;
        with_tokens(call.queries.tokens.dtype, [&]<class T>() {
            launch(call.op, call.cuda, blocks_for(centroids * 8, threads_per_block, n), dim3(threads_per_block), 0,
                   streams::centroid_kernel<T>, call.queries.tokens.as<const T>(),
                   call.queries.offsets.as<const std::int64_t>(), n, call.docs.centroids.as<const float>(), centroids,
                   call.queries.dim(), get());
        });
    }

private:
    static std::int64_t count(const Scores& call) {
        return (call.queries.tokens.dim(0) / streams::rows + call.queries.size()) * call.docs.centroids.dim(0) * 8;
    }
};

/// false where a query of 32 tokens does not fit into shared memory.
bool score_by_streams(const Scores& call) {
    const auto& [op, cuda, queries, docs, missing, work, columns, dtype, out, found] = call;
    const std::int64_t d = queries.dim(), tokens = queries.tokens.dim(0), n = queries.size();
    const std::int64_t row_bytes = docs.tokens.dim(1) * static_cast<std::int64_t>(size_of(docs.tokens.dtype));
    return with_stored(docs, row_bytes, [&]<class Tokens>(Tokens) {
        constexpr bool bytes = Tokens::words == Words::s8;
        const std::int64_t words = bytes ? (d + 3) / 4 : Tokens::words == Words::f32 ? d : (d + 1) / 2;
        const auto chunks = static_cast<int>((words + words_per_chunk - 1) / words_per_chunk);
        constexpr std::int64_t fragment_bytes = streams::fragments_per_chunk * sizeof(uint4), budget = 32 << 10;
        const std::int64_t pass_bytes = std::max(1, chunks) * fragment_bytes,
                           passes = (tokens + streams::rows - 1) / streams::rows;
        const std::int64_t resident =
            std::clamp<std::int64_t>(budget / pass_bytes, 1, std::max<std::int64_t>(1, passes));
        if (streams::ring_bytes<Tokens> + resident * pass_bytes >
            attribute_of(op, cuda, cudaDevAttrMaxSharedMemoryPerBlockOptin) - 2048)
            return false;

        // Queries in the words of the documents.
        const DType own = Tokens::words == Words::bf16  ? DType::bf16
                          : Tokens::words == Words::f16 ? DType::f16
                                                        : DType::f32;
        const bool as_they_are = !bytes && queries.tokens.dtype == own;
        const Scratch<std::uint16_t> halves(op, cuda, as_they_are || bytes ? 0 : tokens * d);
        const Scratch<unsigned> quads(op, cuda, bytes ? tokens * words : 0);
        const Scratch<float> factors(op, cuda, bytes ? tokens : 0);
        streams::Queries rows{queries.tokens.data,
                              d,
                              Tokens::words == Words::f32 ? 4 : 2,
                              nullptr,
                              queries.offsets.as<const std::int64_t>(),
                              n,
                              tokens};
        streams::Docs stored{docs.tokens.as<const unsigned char>(),
                             row_bytes,
                             docs.offsets.as<const std::int64_t>(),
                             docs.size(),
                             docs.scales.as<const float>(),
                             docs.centroid_ids.as<const std::int32_t>(),
                             docs.centroids ? docs.centroids.dim(0) : 0,
                             docs.weights.as<const float>(),
                             nullptr};
        const CentroidScores centroid_scores(call, Tokens::residual);
        if constexpr (bytes) {
            rows = {quads.get(), words, 4, factors.get(), rows.offsets, n, tokens};
            stored.centroid_scores = centroid_scores.get();
            if (tokens > 0)
                with_tokens(queries.tokens.dtype, [&]<class T>() {
                    launch(op, cuda, blocks_for(tokens, streams::warps), dim3(streams::warps * 32), 0,
                           streams::bytes_kernel<Tokens, T>, queries.tokens.as<const T>(), tokens, d, words,
                           stored.weights, quads.get(), factors.get());
                });
        } else if (!as_they_are) {
            round_queries(call, Tokens::words, halves.get());
            rows.rows = halves.get();
        }

        // A block keeps its query and goes on to further documents; few documents are shared by the warps of a block.
        const std::int64_t blocks = 4 * attribute_of(op, cuda, cudaDevAttrMultiProcessorCount);
        const bool split = n * columns < 8 * blocks;
        const std::int64_t needed = split ? columns : (columns + streams::warps - 1) / streams::warps;
        const dim3 grid = blocks_for(std::clamp<std::int64_t>((4 * blocks + n - 1) / n, 1, needed), 1, n);
        const auto score = [&](auto* kernel) {
            launch(op, cuda, grid, dim3(streams::warps * 32), streams::ring_bytes<Tokens> + resident * pass_bytes,
                   kernel, rows, stored, work, chunks, resident * streams::rows, split, missing,
                   static_cast<float*>(out), found);
        };
        if constexpr (bytes) {
            score(streams::score_kernel<Tokens, false>);
        } else {
            score(found ? streams::score_kernel<Tokens, true> : streams::score_kernel<Tokens, false>);
        }
        return true;
    });
}

/// Many queries of 16 bits against all documents: false where they do not have the form that tiles take.
bool score_by_tiles(const Scores& call) {
#ifdef POLYVEC_SM_90A
    const auto& [op, cuda, queries, docs, missing, work, columns, dtype, out, found] = call;
    const std::int64_t d = queries.dim(), tokens = queries.tokens.dim(0), n_docs = docs.size();
    const StoredTokens::Format format = docs.format();
    if (format != StoredTokens::bfloat16 && format != StoredTokens::float16) return false;
    if (work.pairs || work.lists || tokens <= streams::rows || d % 8 != 0 || d > tiles::most_d || d == 0 ||
        docs.tokens.dim(1) != d || reinterpret_cast<std::uintptr_t>(docs.tokens.data) % 16 != 0)
        return false;
    if (attribute_of(op, cuda, cudaDevAttrComputeCapabilityMajor) != 9) return false;

    const Words words = format == StoredTokens::bfloat16 ? Words::bf16 : Words::f16;
    const bool as_they_are = queries.tokens.dtype == (words == Words::bf16 ? DType::bf16 : DType::f16);
    const Scratch<std::uint16_t> halves(op, cuda, as_they_are ? 0 : tokens * d);
    if (!as_they_are) round_queries(call, words, halves.get());
    const std::uint16_t* rows = as_they_are ? queries.tokens.as<const std::uint16_t>() : halves.get();

    // Documents in slices whose maxima take little memory.
    constexpr std::int64_t most_maxima = 1 << 26;
    const std::int64_t slice = std::clamp<std::int64_t>(most_maxima / tokens, 1, n_docs);
    const Scratch<float> best(op, cuda, slice * tokens);
    const int fragments = tokens <= tiles::rows_of<1> ? 1 : 2;
    const std::int64_t block_rows = fragments * tiles::rows_of<1>, row_blocks = (tokens + block_rows - 1) / block_rows;
    const std::int64_t blocks = 8 * attribute_of(op, cuda, cudaDevAttrMultiProcessorCount);
    for (std::int64_t first = 0; first < n_docs; first += slice) {
        const std::int64_t count = std::min(slice, n_docs - first);
        const auto* offsets = docs.offsets.as<const std::int64_t>() + first;
        std::int32_t* found_here = found ? found + first * tokens : nullptr;
        const tiles::Tokens sets{rows, docs.tokens.as<const std::uint16_t>(), offsets, tokens, count, d};
        const dim3 grid = blocks_for(row_blocks, 1, std::clamp<std::int64_t>(blocks / row_blocks, 1, count));
        const auto run = [&]<Words w, int steps, int f>() {
            launch(op, cuda, grid, dim3(tiles::threads), tiles::shared_bytes<steps>,
                   found ? tiles::row_maxima_kernel<w, f, steps, true> : tiles::row_maxima_kernel<w, f, steps, false>,
                   sets, best.get(), found_here);
        };
        const auto run_rows = [&]<Words w, int steps>() {
            fragments == 1 ? run.template operator()<w, steps, 1>() : run.template operator()<w, steps, 2>();
        };
        const auto run_width = [&]<Words w>() {
            d <= 64   ? run_rows.template operator()<w, 4>()
            : d <= 96 ? run_rows.template operator()<w, 6>()
                      : run_rows.template operator()<w, 8>();
        };
        words == Words::bf16 ? run_width.template operator()<Words::bf16>()
                             : run_width.template operator()<Words::f16>();
        launch(op, cuda, blocks_for(queries.size(), 128, count), dim3(128), 0,
               found ? tiles::sum_kernel<true> : tiles::sum_kernel<false>, best.get(), found_here,
               queries.offsets.as<const std::int64_t>(), offsets, queries.size(), count, tokens, missing,
               static_cast<float*>(out) + first, n_docs);
    }
    return true;
#else
    return static_cast<void>(call), false;
#endif
}

/// Documents of which only centroids are kept.
void score_centroids(const Scores& call) {
    const CentroidScores table(call, true);
    const std::int64_t n = call.queries.size(), columns = std::min(call.columns, std::int64_t(1) << 20);
    launch(call.op, call.cuda, blocks_for(columns, centroids::warps, n), dim3(centroids::warps * 32), 0,
           centroids::score_kernel, call.queries.offsets.as<const std::int64_t>(), n,
           call.docs.tokens.as<const std::uint16_t>(), call.docs.offsets.as<const std::int64_t>(), call.work,
           table.get(), call.docs.centroids.dim(0), call.missing, static_cast<float*>(call.out));
}

void score(const Scores& call) {
    if (call.queries.size() == 0 || call.columns == 0) return;
    if (call.docs.format() == StoredTokens::centroid) return score_centroids(call);
    if (call.queries.tokens.dtype == DType::f64)
        return call.dtype == DType::f64 ? score_plainly<double, double>(call) : score_plainly<double, float>(call);
    if (score_by_tiles(call) || score_by_streams(call)) return;
    require(call.docs.format() == StoredTokens::floats, call.op,
            "queries must have a d that fits into shared memory, got ", call.queries.dim());
    score_plainly<float, float>(call);
}

streams::Work all_of(const StoredTokens& docs) {
    return {nullptr, nullptr, false, docs.size()};
}
streams::Work pairs_of(const StoredTokens& docs) {
    return {nullptr, nullptr, true, docs.size()};
}

}  // namespace

void run(const MaxsimScore& op, Cuda cuda) {
    score(Scores{op.op, cuda, op.queries, op.docs, op.missing, all_of(op.docs), op.docs.size(), op.out.dtype,
                 op.out.data, nullptr});
}

void run(const MaxsimScorePairs& op, Cuda cuda) {
    score(
        Scores{op.op, cuda, op.queries, op.docs, op.missing, pairs_of(op.docs), 1, op.out.dtype, op.out.data, nullptr});
}

void run(const MaxsimMatch& op, Cuda cuda) {
    const StoredTokens docs{op.docs, {}, {}, {}, {}};
    const bool all = op.out.ndim == 2;
    score(Scores{op.op,
                 cuda,
                 op.queries,
                 docs,
                 {},
                 all ? all_of(docs) : pairs_of(docs),
                 all ? docs.size() : 1,
                 op.out.dtype,
                 op.out.data,
                 op.rows.as<std::int32_t>()});
}

void run(const MaxsimScoreMatrix& op, Cuda cuda) {
    const std::int64_t rows = op.query.dim(0), columns = op.doc.dim(0);
    with_float(op.out.dtype, [&]<class T>() {
        launch_rows(op.op, cuda, rows, columns, matrix_kernel<T>, op.query.as<const T>(), op.doc.as<const T>(),
                    op.out.as<T>(), rows, columns, op.query.dim(1));
    });
}

/// All scores of a slice of the documents, and the best of them.
void run(const MaxsimTopk& op, Cuda cuda) {
    const std::int64_t n = op.queries.size(), k = op.scores.dim(1), n_docs = op.docs.size();
    require(k <= most_best, op.op, "k must be at most ", most_best, " on a GPU, got ", k);
    require(n_docs <= UINT32_MAX, op.op, "docs must be fewer than 2^32 on a GPU, got ", n_docs);
    if (n == 0) return;
    if (op.candidates.offsets) {
        const auto *lists = op.candidates.offsets.as<const std::int64_t>(),
                   *ids = op.candidates.ids.as<const std::int64_t>();
        const std::int64_t candidates = op.candidates.ids.dim(0), columns = (candidates + n - 1) / n;
        const Scratch<float> scores(op.op, cuda, candidates);
        score(Scores{op.op,
                     cuda,
                     op.queries,
                     op.docs,
                     op.missing,
                     {lists, ids, false, n_docs},
                     columns,
                     DType::f32,
                     scores.get(),
                     nullptr});
        select_best(op.op, cuda, {scores.get(), ids, lists, columns, n}, op.scores.as<float>(),
                    op.ids.as<std::int64_t>(), k);
        return;
    }
    constexpr std::int64_t most_scores = 1 << 27;
    const std::int64_t slice = std::clamp<std::int64_t>(most_scores / n, 1, std::max<std::int64_t>(n_docs, 1));
    const std::int64_t slices = std::max<std::int64_t>(1, (n_docs + slice - 1) / slice);
    const Scratch<float> scores(op.op, cuda, n * slice), slice_scores(op.op, cuda, slices > 1 ? n * slices * k : 0);
    const Scratch<std::int64_t> slice_ids(op.op, cuda, slices > 1 ? n * slices * k : 0);
    float* best = slices > 1 ? slice_scores.get() : op.scores.as<float>();
    std::int64_t* best_ids = slices > 1 ? slice_ids.get() : op.ids.as<std::int64_t>();
    for (std::int64_t i = 0; i < slices; ++i) {
        StoredTokens docs = op.docs;
        docs.offsets.data = docs.offsets.as<std::int64_t>() + i * slice;
        docs.offsets.shape[0] = std::min(slice, n_docs - i * slice) + 1;
        score(Scores{op.op, cuda, op.queries, docs, op.missing, all_of(docs), docs.size(), DType::f32, scores.get(),
                     nullptr});
        select_best(op.op, cuda, {scores.get(), nullptr, nullptr, docs.size(), n, i * slice}, best + i * k,
                    best_ids + i * k, k, slices * k);
    }
    if (slices > 1)
        select_best(op.op, cuda, {best, best_ids, nullptr, slices * k, n}, op.scores.as<float>(),
                    op.ids.as<std::int64_t>(), k);
}

namespace {

/// Some of the queries.
void certify(const MaxsimCertifiedTopk& op, std::int64_t begin, std::int64_t n, Cuda cuda) {
    const std::int64_t k = op.scores.dim(1), nd = op.docs.size(), d = op.queries.dim();
    TokenSets queries = op.queries;
    queries.offsets.data = queries.offsets.as<std::int64_t>() + begin;
    queries.offsets.shape[0] = n + 1;
    const auto* offsets = queries.offsets.as<const std::int64_t>();
    const auto* bounds = op.bounds.as<const float>();
    const auto blocks = dim3(static_cast<unsigned>(std::min<std::int64_t>(n, 1 << 16)));
    const StoredTokens exact{op.exact, {}, {}, {}, {}};
    const auto score_lists = [&](const std::int64_t* lists, const std::int64_t* ids, std::int64_t columns, float* out) {
        score(Scores{op.op, cuda, queries, exact, {}, {lists, ids, false, nd}, columns, DType::f32, out, nullptr});
    };

    const Scratch<float> estimates(op.op, cuda, n * nd), first_scores(op.op, cuda, n * k), enough(op.op, cuda, n);
    const Scratch<std::int64_t> first(op.op, cuda, n * k), begins(op.op, cuda, n + 1);
    const Scratch<certified::QueryNorms> norms(op.op, cuda, n);
    std::int64_t* const rescored = op.rescored.as<std::int64_t>() + begin;
    score(Scores{op.op, cuda, queries, op.docs, {}, all_of(op.docs), nd, DType::f32, estimates.get(), nullptr});
    select_best(op.op, cuda, {estimates.get(), nullptr, nullptr, nd, n}, first_scores.get(), first.get(), k);
    launch_rows(op.op, cuda, n + 1, 1, certified::steps_kernel, n + 1, k, begins.get());
    score_lists(begins.get(), first.get(), k, first_scores.get());
    launch(op.op, cuda, blocks_for(n, 8), dim3(256), 0, certified::norms_kernel, op.queries.tokens.as<const float>(),
           offsets, n, d, norms.get());
    launch(op.op, cuda, blocks, dim3(certified::threads), 0, certified::mark_kernel, first.get(), first_scores.get(), n,
           k, nd, estimates.get(), enough.get(), rescored);

    // How many are left is known to the GPU alone: there is room for all.
    const Scratch<float> other_scores(op.op, cuda, n * nd), both(op.op, cuda, 2 * n * k);
    const Scratch<std::int64_t> others(op.op, cuda, n * nd), both_ids(op.op, cuda, 2 * n * k);
    const auto find_others = [&](std::int64_t* ids) {
        launch(op.op, cuda, blocks, dim3(certified::threads), 0, certified::others_kernel, estimates.get(), bounds,
               norms.get(), offsets, enough.get(), n, nd, d, begins.get(), ids);
    };
    find_others(nullptr);
    launch(op.op, cuda, dim3(1), dim3(32), 0, certified::begins_kernel, n, begins.get(), rescored);
    find_others(others.get());
    score_lists(begins.get(), others.get(), nd, other_scores.get());
    select_best(op.op, cuda, {first_scores.get(), first.get(), nullptr, k, n}, both.get(), both_ids.get(), k, 2 * k);
    select_best(op.op, cuda, {other_scores.get(), others.get(), begins.get(), nd, n}, both.get() + k,
                both_ids.get() + k, k, 2 * k);
    select_best(op.op, cuda, {both.get(), both_ids.get(), nullptr, 2 * k, n}, op.scores.as<float>() + begin * k,
                op.ids.as<std::int64_t>() + begin * k, k);
}

}  // namespace

void run(const MaxsimCertifiedTopk& op, Cuda cuda) {
    constexpr std::int64_t most = 1 << 24;  // documents of all queries at a time, 16 bytes each
    const std::int64_t n = op.queries.size(), k = op.scores.dim(1), nd = op.docs.size();
    require(k <= most_best, op.op, "k must be at most ", most_best, " on a GPU, got ", k);
    require<TypeError>(op.docs.format() == StoredTokens::int8, op.op, "packed must be int8 on a GPU");
    const std::int64_t step = std::max<std::int64_t>(1, most / (nd + 1));
    for (std::int64_t begin = 0; begin < n; begin += step) certify(op, begin, std::min(step, n - begin), cuda);
}

void run(const MaxsimAlign& op, Cuda cuda) {
    with_float(op.query.dtype, [&]<class T>() {
        launch_rows(op.op, cuda, op.query.dim(0), 1, align_kernel<T>, op.query.as<const T>(), op.doc.as<const T>(),
                    op.ids.as<std::int64_t>(), op.similarities.as<T>(), op.query.dim(0), op.doc.dim(0),
                    op.query.dim(1));
    });
}

void run(const MaxsimMatchGradient& op, Cuda cuda) {
    const std::int64_t d = op.queries.dim(), query_tokens = op.queries.tokens.dim(0),
                       doc_tokens = op.docs.tokens.dim(0);
    const std::int64_t rows = op.of_docs ? doc_tokens : query_tokens;
    if (rows == 0 || d == 0) return;
    const dim3 grid = blocks_for(rows, 4, (d + 32 * columns_per_lane - 1) / (32 * columns_per_lane)), block(128);
    const Scratch<std::int32_t> sets(op.op, cuda, op.of_docs ? query_tokens : 0);
    if (op.of_docs)
        launch_rows(op.op, cuda, query_tokens, 1, sets_kernel, op.queries.offsets.as<const std::int64_t>(),
                    op.queries.size(), query_tokens, sets.get());
    with_tokens(op.gradient.dtype, [&]<class T>() {
        const Matches<T> matches{sets_of<T>(op.queries),
                                 sets_of<T>(op.docs),
                                 op.queries.size(),
                                 op.docs.size(),
                                 query_tokens,
                                 d,
                                 op.out.as<const SumOfTokens<T>>(),
                                 op.rows.as<const std::int32_t>(),
                                 op.out.ndim == 2};
        if (op.of_docs) {
            launch(op.op, cuda, grid, block, 0, doc_gradient_kernel<T>, matches, sets.get(), doc_tokens,
                   op.gradient.as<T>());
        } else {
            launch(op.op, cuda, grid, block, 0, query_gradient_kernel<T>, matches, op.gradient.as<T>());
        }
    });
}

}  // namespace polyvec
