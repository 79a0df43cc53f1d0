/// What certifies the best documents: how far scores of int8 tokens can be from those of float tokens, and the
/// documents that this leaves. For maxsim.cu alone.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "launch.cuh"
#include "maxsim_streams.cuh"
#include "warp.cuh"

namespace polyvec {
namespace certified {

constexpr unsigned threads = 256;  // of a block, which has a query

/// Sums over the tokens of a query: of norms, and of what these lose when tokens are rounded to 127 steps of their
/// largest element, as streams::bytes_kernel does.
struct QueryNorms {
    double exact, lost;
};

/// A warp a query.
__global__ void norms_kernel(const float* tokens, const std::int64_t* offsets, std::int64_t queries, std::int64_t d,
                             QueryNorms* out) {
    const std::int64_t q = std::int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (q >= queries) return;
    QueryNorms sum{0, 0};
    for (std::int64_t t = offsets[q]; t < offsets[q + 1]; ++t) {
        const float* const x = tokens + t * d;
        float largest = 0;
        for (std::int64_t i = lane; i < d; i += 32) largest = fmaxf(largest, fabsf(x[i]));
        largest = largest_of_warp(largest);
        const float steps = streams::steps_of(largest), scale = largest / 127;
        double squares = 0, lost = 0;
        for (std::int64_t i = lane; i < d; i += 32) {
            const double value = x[i], error = value - static_cast<double>(rintf(x[i] * steps)) * scale;
            squares += value * value;
            lost += error * error;
        }
        sum.exact += sqrt(sum_of_warp(squares));
        sum.lost += sqrt(sum_of_warp(lost));
    }
    if (lane == 0) out[q] = sum;
}

/// bounds: of MaxsimBounds. As on a CPU (cpp/src/maxsim.cpp says why), with more rounding: a float32 product is one of
/// three parts here, and sums may be cut off instead of rounded.
__device__ inline double largest_error(const QueryNorms& query, const float* bounds, std::int64_t tokens,
                                       std::int64_t d) {
    const double error = bounds[0], rounded = bounds[1], size = bounds[2];
    const double magnitude = (query.exact + query.lost) * size, terms = 2.0 * static_cast<double>(d + 32);
    if (!(magnitude < 1e37)) return HUGE_VAL;
    return query.exact * error + query.lost * rounded +
           terms * (0x1p-23 * magnitude + 0x1p-126 * static_cast<double>(tokens));
}

/// The estimate of a document that is among the first: a NaN that no sum yields.
constexpr unsigned taken = 0xffffffffu;

/// Per query: its documents by their estimates (k ids of `first`, -1 behind the last) are marked, and `enough` becomes
/// the k-th best of their exact scores: -inf where there are fewer.
__global__ void mark_kernel(const std::int64_t* first, const float* exact, std::int64_t queries, std::int64_t k,
                            std::int64_t docs, float* estimates, float* enough, std::int64_t* rescored) {
    __shared__ float least[threads];
    __shared__ unsigned missing, known;
    for (std::int64_t q = blockIdx.x; q < queries; q += gridDim.x) {
        if (threadIdx.x == 0) missing = known = 0;
        __syncthreads();
        float own = HUGE_VALF;
        for (std::int64_t i = q * k + threadIdx.x; i < (q + 1) * k; i += threads) {
            if (isnan(exact[i]) || first[i] < 0) atomicAdd(&missing, 1u);
            if (!isnan(exact[i])) own = fminf(own, exact[i]);
            if (first[i] < 0) continue;
            atomicAdd(&known, 1u);
            estimates[q * docs + first[i]] = __uint_as_float(taken);
        }
        least[threadIdx.x] = own;
        for (unsigned half = threads / 2; half > 0; half /= 2) {
            __syncthreads();
            if (threadIdx.x < half) least[threadIdx.x] = fminf(least[threadIdx.x], least[threadIdx.x + half]);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            enough[q] = missing ? -HUGE_VALF : least[0];
            rescored[q] = known;
        }
        __syncthreads();
    }
}

/// Documents that may reach `enough` beside those marked. Without ids: counts them, in begins[q + 1]; else writes them
/// from begins[q] on, in any order.
__global__ void others_kernel(const float* estimates, const float* bounds, const QueryNorms* norms,
                              const std::int64_t* query_offsets, const float* enough, std::int64_t queries,
                              std::int64_t docs, std::int64_t d, std::int64_t* begins, std::int64_t* ids) {
    __shared__ unsigned found;
    for (std::int64_t q = blockIdx.x; q < queries; q += gridDim.x) {
        if (threadIdx.x == 0) found = 0;
        __syncthreads();
        const std::int64_t tokens = query_offsets[q + 1] - query_offsets[q];
        for (std::int64_t i = threadIdx.x; i < docs; i += threads) {
            const float estimate = estimates[q * docs + i];
            if (__float_as_uint(estimate) == taken) continue;
            const double highest = estimate + largest_error(norms[q], bounds + 3 * i, tokens, d);
            if (highest < static_cast<double>(enough[q])) continue;
            const unsigned at = atomicAdd(&found, 1u);
            if (ids) ids[begins[q] + at] = i;
        }
        __syncthreads();
        if (threadIdx.x == 0 && !ids) begins[q + 1] = found;
        __syncthreads();
    }
}

/// Counts in begins[1 ..] become where lists begin, and are added to `rescored`. One warp.
__global__ void begins_kernel(std::int64_t queries, std::int64_t* begins, std::int64_t* rescored) {
    const std::int64_t lane = threadIdx.x;
    std::int64_t before = 0;
    if (lane == 0) begins[0] = 0;
    for (std::int64_t base = 0; base < queries; base += 32) {
        const std::int64_t q = base + lane;
        std::int64_t sum = q < queries ? begins[q + 1] : 0;
        if (q < queries) rescored[q] += sum;
        for (int distance = 1; distance < 32; distance *= 2) {
            const std::int64_t below = __shfl_up_sync(whole_warp, sum, static_cast<unsigned>(distance));
            if (lane >= distance) sum += below;
        }
        if (q < queries) begins[q + 1] = before + sum;
        before += __shfl_sync(whole_warp, sum, 31);
    }
}

/// out[q] = q * k.
__global__ void steps_kernel(std::int64_t n, std::int64_t k, std::int64_t* out) {
    for_each_position(n, 1, [&](std::int64_t q, std::int64_t) { out[q] = q * k; });
}

}  // namespace certified
}  // namespace polyvec
