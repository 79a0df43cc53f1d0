/// What threads of a warp do together, and the instructions that C++ has no names for (compute capability 8.0).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace polyvec {

constexpr unsigned whole_warp = 0xffffffffu;

/// Of each `lanes` neighbouring threads, a power of two.
template <class T>
__device__ T sum_of_warp(T x, int lanes = 32) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(whole_warp, x, distance);
    return x;
}

__device__ inline float largest_of_warp(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(whole_warp, x, distance));
    return x;
}

/// The larger one; NaN if one is.
__device__ inline float larger_or_nan(float x, float y) {
#ifdef __CUDACC__
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
    return larger;
#else  // on_host, as below
    return x != x || x > y ? x : y;
#endif
}

/// An address in shared memory.
#ifdef __CUDACC__
using SharedAddress = unsigned;
__device__ inline SharedAddress shared_address(void* x) {
    return static_cast<unsigned>(__cvta_generic_to_shared(x));
}
#else
using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* x) {
    return static_cast<unsigned char*>(x);
}
#endif

/// Copies 4, 8 or 16 bytes to shared memory, or zeros; done after `wait_for_copies`.
template <int bytes = 16>
__device__ inline void copy_async(SharedAddress to, const void* from, bool copied) {
#ifdef __CUDACC__
    const int size = copied ? bytes : 0;
    if constexpr (bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(bytes), "r"(size)
                     : "memory");
    }
#else
    copied ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes);
#endif
}

__device__ inline void end_of_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits for all copies of this thread but those of the last N groups.
template <int N>
__device__ void wait_for_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace polyvec
