// The scan engine on a GPU, in its plain form: a thread a pair, or a thread a query and part of the items. A score is
// one loop over d in float32, fused explicitly, so that a pair has the same bits wherever it is met. Squared distances
// are summed directly, so that nothing needs to be computed twice.
#include <cmath>

#include "best.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "polyvec/scan.hpp"

namespace polyvec {
namespace {

enum class Rounding { none, bfloat16, steps };

/// Queries as they meet items: of unit length for cosine, then rounded where items ask for it; one thread each.
__global__ void prepare_kernel(const float* queries, std::int64_t stride, float* out, std::int64_t n, std::int64_t d,
                               bool unit, Rounding rounding) {
    for_each_position(n, 1, [&](std::int64_t i, std::int64_t) {
        const float* from = queries + i * stride;
        float* to = out + i * d;
        float square = 0, largest = 0;
        if (unit)
            for (std::int64_t c = 0; c < d; ++c) square = fmaf(from[c], from[c], square);
        const float scale = !unit ? 1 : square > 0 ? 1 / sqrt(square) : 0;
        for (std::int64_t c = 0; c < d; ++c) {
            to[c] = from[c] * scale;
            largest = fmaxf(largest, fabsf(to[c]));
        }
        const float step = largest / 127, steps = largest > 0 ? 127 / largest : 0;
        for (std::int64_t c = 0; c < d; ++c) {
            if (rounding == Rounding::bfloat16) to[c] = rounded_to_bfloat16(to[c]);
            if (rounding == Rounding::steps) to[c] = rintf(to[c] * steps) * step;
        }
    });
}

/// Queries and items, and the score of a pair, higher is better: the negative of a distance.
template <class T>
struct Pairs {
    const float* queries;
    std::int64_t stride;
    const T* rows;
    const float *scales, *bias;  // null when absent
    std::int64_t items, d;
    Metric metric;

    __device__ bool has(std::int64_t item) const { return item >= 0 && item < items; }

    __device__ float operator()(std::int64_t query, std::int64_t item) const {
        const float* q = queries + query * stride;
        const T* x = rows + item * d;
        const float scale = scales ? scales[item] : 1, offset = bias ? bias[item] : 0;
        float sum = 0, square = 0;
        if (metric == Metric::l2) {
            for (std::int64_t c = 0; c < d; ++c) {
                const float difference = fmaf(-scale, value_of(x[c]), q[c]);
                sum = fmaf(difference, difference, sum);
            }
            return offset - sum;
        }
        for (std::int64_t c = 0; c < d; ++c) {
            const float element = value_of(x[c]);
            sum = fmaf(q[c], element, sum);
            square = fmaf(element, element, square);
        }
        if (metric == Metric::ip) return fmaf(sum, scale, offset);
        const float sign = static_cast<float>((scale > 0) - (scale < 0));  // all that a cosine leaves of a scale
        return fmaf(sum, square > 0 ? sign / sqrt(square) : 0, offset);
    }
};

/// A list of ids a query; offsets: null when absent.
struct Lists {
    const std::int64_t *offsets, *ids;

    __device__ bool contain(std::int64_t query, std::int64_t id) const {
        if (!offsets) return false;
        for (std::int64_t i = offsets[query]; i < offsets[query + 1]; ++i)
            if (ids[i] == id) return true;
        return false;
    }
};

template <class T>
__global__ void topk_kernel(const __grid_constant__ Pairs<T> score, const __grid_constant__ Lists exclude,
                            const __grid_constant__ Parts parts, float* scores, std::int64_t* ids, std::int64_t queries,
                            std::int64_t k, float sign) {
    for_each_position(queries, parts.count, [&](std::int64_t query, std::int64_t part) {
        const std::int64_t at = (query * parts.count + part) * k, first = part * parts.size;
        const std::int64_t end = first + parts.size < score.items ? first + parts.size : score.items;
        Best best{scores + at, ids + at, k};
        for (std::int64_t item = first; item < end; ++item) {
            const float value = score(query, item);
            if (value > -HUGE_VALF && best.takes(value, item) && !exclude.contain(query, item)) best.push(value, item);
        }
        best.finish(sign);
    });
}

/// counts (queries, 2), zero before: how many items are better than the target, and how many equal. Sums of integers:
/// the same in any order.
template <class T>
__global__ void count_kernel(const __grid_constant__ Pairs<T> score, const __grid_constant__ Lists known,
                             const __grid_constant__ Parts parts, const std::int64_t* targets,
                             unsigned long long* counts, std::int64_t queries) {
    for_each_position(queries, parts.count, [&](std::int64_t query, std::int64_t part) {
        const std::int64_t target = targets[query], first = part * parts.size;
        const std::int64_t end = first + parts.size < score.items ? first + parts.size : score.items;
        if (!score.has(target)) return;
        const float limit = score(query, target);
        unsigned long long better = 0, equal = 0;
        for (std::int64_t item = first; item < end; ++item) {
            const float value = score(query, item);
            if (!(value >= limit) || (item != target && known.contain(query, item))) continue;
            ++(value > limit ? better : equal);
        }
        atomicAdd(counts + 2 * query, better);
        atomicAdd(counts + 2 * query + 1, equal);
    });
}

/// Nothing equals a target whose score is NaN, and nothing was counted for one outside the items.
__global__ void rank_kernel(const unsigned long long* counts, double* ranks, std::int64_t queries,
                            ScanRank::Ties ties) {
    for_each_position(queries, 1, [&](std::int64_t query, std::int64_t) {
        using Ties = ScanRank::Ties;
        const double better = static_cast<double>(counts[2 * query]);
        const double equal = static_cast<double>(counts[2 * query + 1]);
        const double place = ties == Ties::optimistic ? 1 : ties == Ties::pessimistic ? equal : (1 + equal) / 2;
        ranks[query] = equal > 0 ? better + place : static_cast<double>(NAN);
    });
}

template <class T>
__global__ void pairs_kernel(const __grid_constant__ Pairs<T> score, const std::int64_t* ids, float* out,
                             std::int64_t queries, std::int64_t m, float sign) {
    for_each_position(queries, m, [&](std::int64_t query, std::int64_t j) {
        const std::int64_t item = ids[query * m + j];
        out[query * m + j] = score.has(item) ? sign * score(query, item) : static_cast<float>(NAN);
    });
}

float sign_of(Metric metric) {
    return metric == Metric::l2 ? -1.0f : 1.0f;
}

/// Calls f with the element type of the items as a constant.
template <class F>
void with_items(DType dtype, F f) {
    if (dtype == DType::f32) {
        f.template operator()<float>(Rounding::none);
    } else if (dtype == DType::f16) {
        f.template operator()<Float16>(Rounding::none);
    } else if (dtype == DType::i8) {
        f.template operator()<std::int8_t>(Rounding::steps);
    } else {
        f.template operator()<BFloat16>(Rounding::bfloat16);
    }
}

/// Calls f(pairs) with the queries prepared.
template <class F>
void with_pairs(const char* op, Cuda cuda, const Array& queries, const ScanItems& items, const Array& bias,
                Metric metric, F f) {
    with_items(items.rows.dtype, [&]<class T>(Rounding rounding) {
        const std::int64_t n = queries.dim(0), d = queries.dim(1);
        const bool unit = metric == Metric::cosine, changed = unit || rounding != Rounding::none;
        const Scratch<float> prepared(op, cuda, changed ? n * d : 0);
        if (changed)
            launch_rows(op, cuda, n, 1, prepare_kernel, queries.as<const float>(), queries.stride(0), prepared.get(), n,
                        d, unit, rounding);
        f(Pairs<T>{changed ? prepared.get() : queries.as<const float>(), changed ? d : queries.stride(0),
                   items.rows.as<const T>(), items.scales.as<const float>(), bias.as<const float>(), items.rows.dim(0),
                   d, metric});
    });
}

Lists lists_of(const IdLists& lists) {
    return {lists.offsets.as<const std::int64_t>(), lists.ids.as<const std::int64_t>()};
}

/// Writes `scores` and `ids` (queries, k).
template <class T>
void search(const char* op, Cuda cuda, const Pairs<T>& score, Lists exclude, float* scores, std::int64_t* ids,
            std::int64_t queries, std::int64_t k) {
    const Parts parts(queries, score.items, k);
    best_of_parts(op, cuda, parts, scores, ids, queries, k, sign_of(score.metric),
                  [&](float* part_scores, std::int64_t* part_ids, float sign) {
                      launch_rows(op, cuda, queries, parts.count, topk_kernel<T>, score, exclude, parts, part_scores,
                                  part_ids, queries, k, sign);
                  });
}

}  // namespace

void run(const ScanTopK& op, Cuda cuda) {
    with_pairs(op.op, cuda, op.queries, op.items, op.bias, op.metric, [&](const auto& score) {
        search(op.op, cuda, score, lists_of(op.exclude), op.scores.as<float>(), op.ids.as<std::int64_t>(),
               op.queries.dim(0), op.scores.dim(1));
    });
}

void run(const ScanNearest& op, Cuda cuda) {
    const std::int64_t n = op.x.dim(0);
    const Scratch<float> unused(op.op, cuda, op.distances ? 0 : n);
    with_pairs(op.op, cuda, op.x, op.centroids, Array(), op.metric, [&](const auto& score) {
        search(op.op, cuda, score, Lists{nullptr, nullptr}, op.distances ? op.distances.as<float>() : unused.get(),
               op.ids.as<std::int64_t>(), n, 1);
    });
}

void run(const ScanRank& op, Cuda cuda) {
    const std::int64_t n = op.queries.dim(0);
    const Scratch<unsigned long long> counts(op.op, cuda, 2 * n);
    fill_with_zeros(op.op, cuda, counts.get(), 2 * n);
    with_pairs(op.op, cuda, op.queries, op.items, op.bias, op.metric, [&]<class T>(const Pairs<T>& score) {
        const Parts parts(n, score.items, 1);
        launch_rows(op.op, cuda, n, parts.count, count_kernel<T>, score, lists_of(op.known), parts,
                    op.targets.as<const std::int64_t>(), counts.get(), n);
    });
    launch_rows(op.op, cuda, n, 1, rank_kernel, counts.get(), op.ranks.as<double>(), n, op.ties);
}

void run(const ScanPairs& op, Cuda cuda) {
    const std::int64_t n = op.ids.dim(0), m = op.ids.dim(1);
    with_pairs(op.op, cuda, op.queries, op.items, op.bias, op.metric, [&]<class T>(const Pairs<T>& score) {
        launch_rows(op.op, cuda, n, m, pairs_kernel<T>, score, op.ids.as<const std::int64_t>(), op.out.as<float>(), n,
                    m, sign_of(op.metric));
    });
}

}  // namespace polyvec
