/// The k best of rows of scores, in the order of include/polyvec/topk.hpp: higher scores first, equal ones by smaller
/// id; NaN is never taken. A block keeps what passes its threshold in shared memory and sorts it when there is no room
/// for more, so that few of many scores cost more than their reading. The order of the pairs is total: what other
/// threads do changes no result.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "launch.cuh"
#include "select.cuh"

namespace polyvec {

/// Row r: scores[begin .. begin + n) of these ids, begin = begins[r] and n = begins[r + 1] - begin, or r * n and n
/// where begins is null; ids null: their positions in the row from first_id on. Negative ids are passed over; others
/// are below 2^32.
struct ScoreRows {
    const float* scores;
    const std::int64_t *ids, *begins;
    std::int64_t n, rows, first_id = 0;

    __device__ std::int64_t begin(std::int64_t row) const { return begins ? begins[row] : row * n; }
    __device__ std::int64_t size(std::int64_t row) const { return begins ? begins[row + 1] - begins[row] : n; }
};

constexpr std::int64_t most_best = 4096;  // whose sorted keys fit into shared memory

/// scores, ids: the k of a part at row * stride + part * k; where there are fewer, -inf, -1. Blocks: (parts,
/// rows). room: keys in shared memory, a power of two.
template <class = void>
__global__ void __launch_bounds__(select_threads)
    best_rows_kernel(const __grid_constant__ ScoreRows from, float* scores, std::int64_t* ids, std::int64_t stride,
                     unsigned k, unsigned room) {
    auto* keys = reinterpret_cast<Key*>(dynamic_shared_memory);
    __shared__ unsigned count;
    const unsigned thread = threadIdx.x;
    const std::int64_t parts = gridDim.x, part = blockIdx.x;
    for (std::int64_t row = blockIdx.y; row < from.rows; row += gridDim.y) {
        const std::int64_t start = from.begin(row), n = from.size(row), end = n * (part + 1) / parts;
        Key limit = 0;  // the k-th best so far: nothing behind it is kept
        const auto keep_best = [&] {
            for (unsigned i = count + thread; i < room; i += select_threads) keys[i] = 0;
            sort_keys(keys, room);
            if (thread == 0 && count > k) count = k;
            __syncthreads();
            if (count == k) limit = keys[k - 1];
        };
        if (thread == 0) count = 0;
        __syncthreads();
        for (std::int64_t base = n * part / parts; base < end; base += select_threads) {
            const std::int64_t i = base + thread;
            if (i < end) {
                const float score = from.scores[start + i];
                const std::int64_t id = from.ids ? from.ids[start + i] : from.first_id + i;
                const Key key = isnan(score) || id < 0 ? 0 : key_of(score, id);
                if (key > limit) keys[atomicAdd(&count, 1u)] = key;
            }
            __syncthreads();
            const bool full = count > room - select_threads;
            __syncthreads();  // before anyone counts on
            if (full) keep_best();
        }
        keep_best();
        for (unsigned i = thread; i < k; i += select_threads) {
            const std::int64_t at = row * stride + part * k + i;
            scores[at] = i < count ? score_of(keys[i]) : -HUGE_VALF;
            ids[at] = i < count ? id_of(keys[i]) : -1;
        }
        __syncthreads();
    }
}

/// The k best of each row, k at most most_best, at scores and ids from row * stride on.
inline void select_best(const char* op, Cuda cuda, const ScoreRows& from, float* scores, std::int64_t* ids,
                        std::int64_t k, std::int64_t stride = 0) {
    if (from.rows == 0) return;
    if (stride == 0) stride = k;
    const unsigned room = std::max(4 * select_threads, 2 * std::bit_ceil(static_cast<unsigned>(k)));
    const auto select = [&](const ScoreRows& rows, std::int64_t parts, float* to, std::int64_t* to_ids,
                            std::int64_t to_stride) {
        launch(op, cuda, blocks_for(parts, 1, rows.rows), dim3(select_threads), room * sizeof(Key), best_rows_kernel<>,
               rows, to, to_ids, to_stride, static_cast<unsigned>(k), room);
    };
    // Parts of a row keep some hundred blocks busy, and are long against what they keep.
    const std::int64_t parts =
        std::clamp<std::int64_t>(std::min(from.n / std::max<std::int64_t>(4096, 8 * k), 512 / from.rows), 1, 256);
    if (parts == 1) {
        select(from, 1, scores, ids, stride);
        return;
    }
    const Scratch<float> part_scores(op, cuda, from.rows * parts * k);
    const Scratch<std::int64_t> part_ids(op, cuda, from.rows * parts * k);
    select(from, parts, part_scores.get(), part_ids.get(), parts * k);
    select({part_scores.get(), part_ids.get(), nullptr, parts * k, from.rows}, 1, scores, ids, stride);
}

}  // namespace polyvec
