/// The k best of many candidates by blocks of threads: a candidate is a key, whose order is that of
/// include/polyvec/topk.hpp: higher scores first, equal ones by smaller id.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "warp.cuh"

namespace polyvec {

using Key = unsigned long long;  // 0: none, behind all others

/// Of a score that is not NaN, and an id below 2^32.
__device__ inline Key key_of(float score, std::int64_t id) {
    const unsigned bits = __float_as_uint(score + 0.0f);  // -0 equals 0
    return static_cast<Key>(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~static_cast<unsigned>(id);
}

__device__ inline std::int64_t id_of(Key key) {
    return static_cast<std::int64_t>(~static_cast<unsigned>(key));
}

__device__ inline float score_of(Key key) {
    const unsigned bits = static_cast<unsigned>(key >> 32);
    return key == 0 ? -HUGE_VALF : __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

constexpr unsigned select_threads = 256;

/// Shared memory of `keep_best`.
struct Selection {
    unsigned at_least[select_threads + 1];  // how many keys have this digit or a higher one
    unsigned digit, kept;
    Key least;
};

/// Moves the k best of n keys to the front, in no order. Afterwards s.kept says how many there are, and s.least is the
/// least of them, or 0 while there are fewer than k.
__device__ inline void keep_best(Key* keys, unsigned n, unsigned k, Selection& s) {
    const unsigned thread = threadIdx.x;
    Key prefix = 0, mask = 0;
    if (n > k) {
        unsigned wanted = k;
        for (int shift = 56; shift >= 0 && wanted > 0; shift -= 8) {
            s.at_least[thread] = 0;
            if (thread == 0) s.at_least[select_threads] = 0;
            __syncthreads();
            for (unsigned i = thread; i < n; i += select_threads)
                if ((keys[i] & mask) == prefix) atomicAdd(&s.at_least[keys[i] >> shift & 255], 1u);
            for (unsigned distance = 1; distance < select_threads; distance *= 2) {
                __syncthreads();
                const unsigned more = thread + distance < select_threads ? s.at_least[thread + distance] : 0;
                __syncthreads();
                s.at_least[thread] += more;
            }
            __syncthreads();
            if (s.at_least[thread] >= wanted && s.at_least[thread + 1] < wanted) s.digit = thread;
            __syncthreads();
            const unsigned above = s.at_least[s.digit + 1], here = s.at_least[s.digit] - above;
            prefix |= static_cast<Key>(s.digit) << shift;
            mask |= static_cast<Key>(255) << shift;
            wanted -= above;
            __syncthreads();
            if (here == wanted) break;  // all that have these digits
        }
    }
    if (thread == 0) {
        s.kept = 0;
        s.least = ~static_cast<Key>(0);
    }
    Key least = ~static_cast<Key>(0);
    for (unsigned first = 0; first < n; first += select_threads) {
        const Key key = first + thread < n ? keys[first + thread] : 0;
        const bool taken = key != 0 && key >= prefix;
        __syncthreads();  // all of these are read, and what is kept of them goes no further
        const unsigned warp = __ballot_sync(whole_warp, taken), before = warp & ((1u << thread % 32) - 1);
        unsigned to = 0;
        if (thread % 32 == 0) to = atomicAdd(&s.kept, static_cast<unsigned>(__popc(warp)));
        to = __shfl_sync(whole_warp, to, 0) + static_cast<unsigned>(__popc(before));
        if (taken) {
            keys[to] = key;
            least = key < least ? key : least;
        }
    }
    __syncthreads();
    if (least != ~static_cast<Key>(0)) atomicMin(&s.least, least);
    __syncthreads();
    if (thread == 0 && s.kept < k) s.least = 0;
    __syncthreads();
}

/// Puts keys in shared memory in order, best first; n: a power of two.
__device__ inline void sort_keys(Key* keys, unsigned n) {
    for (unsigned size = 2; size <= n; size *= 2) {
        for (unsigned distance = size / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (unsigned i = threadIdx.x; i < n / 2; i += select_threads) {
                const unsigned a = i / distance * 2 * distance + i % distance, b = a + distance;
                const Key x = keys[a], y = keys[b];
                if ((x < y) != ((a & size) != 0)) {
                    keys[a] = y;
                    keys[b] = x;
                }
            }
        }
    }
    __syncthreads();
}

/// A list of candidates a query. A key that is not above the query's limit cannot be among its k best. What does not
/// fit is counted, but lost: the count then stays above the capacity.
struct Candidates {
    Key* keys;         // (queries, capacity)
    unsigned* counts;  // 0 before
    Key* limits;       // 0 before
    std::int64_t capacity;
    unsigned k;

    __device__ void add(std::int64_t query, Key key) const {
        const unsigned at = atomicAdd(counts + query, 1u);
        if (at < capacity) keys[query * capacity + at] = key;
    }

    __device__ bool complete(std::int64_t query) const { return counts[query] <= capacity; }
};

/// A block a query; a template, so that every file may define it.
template <class = void>
__global__ void __launch_bounds__(select_threads) select_kernel(const __grid_constant__ Candidates candidates) {
    __shared__ Selection selection;
    const std::int64_t query = blockIdx.x;
    if (!candidates.complete(query)) return;
    keep_best(candidates.keys + query * candidates.capacity, candidates.counts[query], candidates.k, selection);
    if (threadIdx.x != 0) return;
    candidates.counts[query] = selection.kept;
    candidates.limits[query] = selection.least;
}

/// Candidates for `capacity` to hold, and the rounds in which they are sought, each among more: the k best of those
/// before set the limit, so that `more` times as many leave some k times `more` candidates.
struct Rounds {
    std::int64_t capacity;
    double more;

    explicit Rounds(std::int64_t k) : capacity(std::max<std::int64_t>(8192, (4 * k + 255) / 256 * 256)) {
        const double expected = static_cast<double>(k);
        more = (static_cast<double>(capacity) - expected) / (expected + 8 * std::sqrt(expected) + 16);
    }

    std::int64_t next(std::int64_t seen) const {
        return seen == 0 ? capacity : seen + static_cast<std::int64_t>(more * static_cast<double>(seen));
    }
};

}  // namespace polyvec
