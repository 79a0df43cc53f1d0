/// The k best (score, id) pairs of many, in the order of include/polyvec/topk.hpp: higher scores first, equal ones by
/// smaller id; NaN is never taken. One thread fills one.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "launch.cuh"

namespace polyvec {

/// A heap with the worst pair at its root, in memory of the caller: k scores and ids.
struct Best {
    float* scores;
    std::int64_t* ids;
    std::int64_t k, n = 0;

    static __device__ bool before(float a, std::int64_t i, float b, std::int64_t j) { return a != b ? a > b : i < j; }

    /// Whether `push` would take it.
    __device__ bool takes(float score, std::int64_t id) const {
        if (isnan(score)) return false;
        return n < k || before(score, id, scores[0], ids[0]);
    }

    /// Of a pair that it takes.
    __device__ void push(float score, std::int64_t id) {
        if (n == k) {
            sink(0, score, id);
            return;
        }
        std::int64_t at = n++;
        for (; at > 0 && before(scores[(at - 1) / 2], ids[(at - 1) / 2], score, id); at = (at - 1) / 2)
            set(at, scores[(at - 1) / 2], ids[(at - 1) / 2]);
        set(at, score, id);
    }

    /// Puts the pairs in order, best first; missing ones are (-inf, -1). `sign` -1 turns scores into distances.
    __device__ void finish(float sign) {
        const std::int64_t found = n;
        while (n > 0) {
            const float score = scores[0];
            const std::int64_t id = ids[0];
            --n;
            sink(0, scores[n], ids[n]);
            set(n, sign * score, id);
        }
        for (std::int64_t i = found; i < k; ++i) set(i, sign * -HUGE_VALF, -1);
    }

private:
    __device__ void set(std::int64_t at, float score, std::int64_t id) {
        scores[at] = score;
        ids[at] = id;
    }

    /// Replaces the pair at `at` and moves it down to its place.
    __device__ void sink(std::int64_t at, float score, std::int64_t id) {
        for (std::int64_t child = 2 * at + 1; child < n; child = 2 * at + 1) {
            if (child + 1 < n && before(scores[child], ids[child], scores[child + 1], ids[child + 1])) ++child;
            if (!before(score, id, scores[child], ids[child])) break;
            set(at, scores[child], ids[child]);
            at = child;
        }
        if (n > 0) set(at, score, id);
    }
};

/// The candidates of each query are split into parts, a thread each, so that few queries fill a GPU, too.
struct Parts {
    std::int64_t count, size;

    Parts(std::int64_t queries, std::int64_t candidates, std::int64_t k) {
        constexpr std::int64_t threads = 1 << 17, least = 64, scratch = 1 << 24;  // pairs: 192 MB
        const std::int64_t rows = std::max<std::int64_t>(queries, 1);
        const std::int64_t wanted = std::min(threads / rows, candidates / std::max(least, 4 * k));
        count = std::max<std::int64_t>(1, std::min(wanted, scratch / std::max<std::int64_t>(1, rows * k)));
        size = (candidates + count - 1) / count;
    }
};

/// A template, so that every file may define it.
template <class Id>
__global__ void merge_kernel(const float* scores, const Id* ids, std::int64_t parts, float* out_scores, Id* out_ids,
                             std::int64_t queries, std::int64_t k, float sign) {
    for_each_position(queries, 1, [&](std::int64_t query, std::int64_t) {
        Best best{out_scores + query * k, out_ids + query * k, k};
        for (std::int64_t i = query * parts * k; i < (query + 1) * parts * k; ++i)
            if (ids[i] >= 0 && best.takes(scores[i], ids[i])) best.push(scores[i], ids[i]);
        best.finish(sign);
    });
}

/// Calls search(scores, ids, sign), which writes the best of each part, and merges them where parts are several.
/// scores, ids: (queries, k).
template <class Search>
void best_of_parts(const char* op, Cuda cuda, const Parts& parts, float* scores, std::int64_t* ids,
                   std::int64_t queries, std::int64_t k, float sign, Search search) {
    if (parts.count == 1) {
        search(scores, ids, sign);
        return;
    }
    const std::int64_t n = queries * parts.count * k;
    const Scratch<float> part_scores(op, cuda, n);
    const Scratch<std::int64_t> part_ids(op, cuda, n);
    search(part_scores.get(), part_ids.get(), 1.0f);
    launch_rows(op, cuda, queries, 1, merge_kernel<std::int64_t>, part_scores.get(), part_ids.get(), parts.count,
                scores, ids, queries, k, sign);
}

}  // namespace polyvec
