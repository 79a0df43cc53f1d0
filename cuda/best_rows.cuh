/// The k best of rows of scores, in the order of include/polyvec/topk.hpp: higher scores first, equal ones by smaller
/// id; NaN is never taken. A block keeps what passes its threshold in shared memory and sorts it when there is no room
/// for more, so that few of many scores cost more than their reading. The order of the pairs is total: what other
/// threads do changes no result.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "launch.cuh"

namespace polyvec {

/// Row r: scores[begin .. begin + n) of these ids, begin = begins[r] and n = begins[r + 1] - begin, or r * n and n
/// where begins is null; ids null: their positions in the row from first_id on. Negative ids are passed over.
struct ScoreRows {
    const float* scores;
    const std::int64_t *ids, *begins;
    std::int64_t n, rows, first_id = 0;

    __device__ std::int64_t begin(std::int64_t row) const { return begins ? begins[row] : row * n; }
    __device__ std::int64_t size(std::int64_t row) const { return begins ? begins[row + 1] - begins[row] : n; }
};

namespace selection {

constexpr int threads = 256;
constexpr std::int64_t most_k = 4096;  // whose sorted pairs fit into shared memory

/// Larger for larger floats; 0 for none. -0 is 0.
__device__ inline unsigned key_of(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float score_of(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ inline bool before(unsigned a, std::int64_t i, unsigned b, std::int64_t j) {
    return a != b ? a > b : i < j;
}

/// Sorts `room` pairs, a power of two, best first.
__device__ inline void sort(unsigned* keys, std::int64_t* ids, int room) {
    for (int size = 2; size <= room; size *= 2)
        for (int step = size / 2; step > 0; step /= 2) {
            for (int at = static_cast<int>(threadIdx.x); at < room / 2; at += threads) {
                const int i = at / step * 2 * step + at % step, j = i + step;
                const bool best_first = (i & size) == 0 || size == room;
                if (before(keys[j], ids[j], keys[i], ids[i]) == best_first) {
                    const unsigned key = keys[i];
                    const std::int64_t id = ids[i];
                    keys[i] = keys[j], ids[i] = ids[j];
                    keys[j] = key, ids[j] = id;
                }
            }
            __syncthreads();
        }
}

/// scores, ids: the k of a part at row * stride + part * k; where there are fewer, -inf times sign, -1. Blocks: (parts,
/// rows).
template <int = 0>
__global__ void __launch_bounds__(threads)
    kernel(const __grid_constant__ ScoreRows from, float* scores, std::int64_t* ids, std::int64_t stride,
           std::int64_t k, int room, float sign) {
    auto* kept_ids = reinterpret_cast<std::int64_t*>(dynamic_shared_memory);
    auto* keys = reinterpret_cast<unsigned*>(kept_ids + room);
    __shared__ int count;
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t parts = gridDim.x, part = blockIdx.x;
    for (std::int64_t row = blockIdx.y; row < from.rows; row += gridDim.y) {
        const std::int64_t start = from.begin(row), n = from.size(row), end = n * (part + 1) / parts;
        unsigned worst = 0;  // the k-th best so far: nothing behind it is kept
        std::int64_t worst_id = -1;
        const auto keep_best = [&] {
            for (int i = count + thread; i < room; i += threads) keys[i] = 0, kept_ids[i] = INT64_MAX;
            __syncthreads();
            sort(keys, kept_ids, room);
            if (thread == 0) count = count < k ? count : static_cast<int>(k);
            __syncthreads();
            if (count == k) worst = keys[k - 1], worst_id = kept_ids[k - 1];
        };
        if (thread == 0) count = 0;
        __syncthreads();
        for (std::int64_t base = n * part / parts; base < end; base += threads) {
            const std::int64_t i = base + thread;
            if (i < end) {
                const float score = from.scores[start + i];
                const std::int64_t id = from.ids ? from.ids[start + i] : from.first_id + i;
                const unsigned key = key_of(score);
                if (!isnan(score) && id >= 0 && (worst == 0 || before(key, id, worst, worst_id))) {
                    const int at = atomicAdd(&count, 1);
                    keys[at] = key, kept_ids[at] = id;
                }
            }
            __syncthreads();
            const bool full = count > room - threads;
            __syncthreads();  // before anyone counts on
            if (full) keep_best();
        }
        keep_best();
        for (std::int64_t i = thread; i < k; i += threads) {
            const std::int64_t at = row * stride + part * k + i;
            scores[at] = sign * (i < count ? score_of(keys[i]) : -HUGE_VALF);
            ids[at] = i < count ? kept_ids[i] : -1;
        }
        __syncthreads();
    }
}

}  // namespace selection

/// The k best of each row, k at most selection::most_k, at scores and ids from row * stride on. `sign` -1 turns scores
/// into distances.
inline void select_best(const char* op, Cuda cuda, const ScoreRows& from, float* scores, std::int64_t* ids,
                        std::int64_t k, float sign = 1, std::int64_t stride = 0) {
    if (from.rows == 0) return;
    if (stride == 0) stride = k;
    int room = 4 * selection::threads;
    while (room < 2 * k) room *= 2;
    const auto select = [&](const ScoreRows& rows, std::int64_t parts, float* to, std::int64_t* to_ids,
                            std::int64_t to_stride, float by) {
        const std::size_t bytes = static_cast<std::size_t>(room) * (sizeof(std::int64_t) + sizeof(unsigned));
        launch(op, cuda, blocks_for(parts, 1, rows.rows), dim3(selection::threads), bytes, selection::kernel<0>, rows,
               to, to_ids, to_stride, k, room, by);
    };
    // Parts of a row keep some hundred blocks busy, and are long against what they keep.
    const std::int64_t parts =
        std::clamp<std::int64_t>(std::min(from.n / std::max<std::int64_t>(4096, 8 * k), 512 / from.rows), 1, 256);
    if (parts == 1) {
        select(from, 1, scores, ids, stride, sign);
        return;
    }
    const Scratch<float> part_scores(op, cuda, from.rows * parts * k);
    const Scratch<std::int64_t> part_ids(op, cuda, from.rows * parts * k);
    select(from, parts, part_scores.get(), part_ids.get(), parts * k, 1);
    select({part_scores.get(), part_ids.get(), nullptr, parts * k, from.rows}, 1, scores, ids, stride, sign);
}

}  // namespace polyvec
