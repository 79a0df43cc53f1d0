/// The part of CUDA that polyvec uses, on a CPU: a launch runs its blocks one after the other.
///
/// It lets the tests run the code of the kernels, and their callers, where there is no GPU. It shows wrong indices,
/// wrong arithmetic and barriers that not all threads reach; it says nothing about races, memory spaces or rounding on
/// a GPU. For tests only: no wheel contains it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "block.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

using std::abs, std::exp, std::fma, std::isnan, std::log, std::log1p, std::max, std::min, std::sqrt;

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __fmul_rn(float x, float y) {
    return x * y;
}
inline float __fadd_rn(float x, float y) {
    return x + y;
}
inline double __dmul_rn(double x, double y) {
    return x * y;
}
inline double __dadd_rn(double x, double y) {
    return x + y;
}

inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __ffs(unsigned x) {
    return __builtin_ffs(static_cast<int>(x));
}

template <class T>
T __ldg(const T* x) {
    return *x;
}

/// Bytes of x (0 to 3) and y (4 to 7) by the lowest three bits of each of four hexadecimal digits.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned digits) {
    const std::uint64_t both = std::uint64_t(y) << 32 | x;
    unsigned bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= static_cast<unsigned>(both >> 8 * (digits >> 4 * i & 7) & 0xff) << 8 * i;
    return bytes;
}

template <class T>
T atomicAdd(T* sum, T x) {
    const T before = *sum;
    *sum += x;
    return before;
}

template <class T>
T atomicMax(T* largest, T x) {
    const T before = *largest;
    if (x > before) *largest = x;
    return before;
}
template <class T>
T atomicMin(T* least, T x) {
    const T before = *least;
    if (x < before) *least = x;
    return before;
}
inline unsigned atomicOr(unsigned* bits, unsigned x) {
    const unsigned before = *bits;
    *bits |= x;
    return before;
}

inline void __syncthreads() {
    on_host::Block::current().sync();
}
inline void __syncwarp(unsigned mask = ~0u) {
    on_host::Block::current().sync_warp(mask);
}

template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
    return on_host::Block::current().exchange(mask, x, [&](auto of) { return of(static_cast<unsigned>(lane) % 32); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits) {
    return __shfl_sync(mask, x, static_cast<int>(on_host::Block::current().lane()) ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned distance) {
    const unsigned lane = on_host::Block::current().lane();
    return __shfl_sync(mask, x, static_cast<int>(lane < distance ? lane : lane - distance));
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned distance) {
    const unsigned lane = on_host::Block::current().lane();
    return __shfl_sync(mask, x, static_cast<int>(lane + distance < 32 ? lane + distance : lane));
}

/// The lanes of `mask` whose value, or this lane's value and theirs, fulfil a condition, as bits.
template <class T, class F>
unsigned lanes_that(unsigned mask, T x, F condition) {
    return on_host::Block::current().exchange(mask, x, [&](auto of) {
        unsigned found = 0;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1 && condition(of(lane))) found |= 1u << lane;
        return found;
    });
}
inline unsigned __ballot_sync(unsigned mask, int condition) {
    return lanes_that(mask, condition, [](int other) { return other != 0; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T x) {
    return lanes_that(mask, x, [&](T other) { return other == x; });
}
inline int __any_sync(unsigned mask, int condition) {
    return __ballot_sync(mask, condition) != 0;
}
inline int __all_sync(unsigned mask, int condition) {
    return __ballot_sync(mask, !condition) == 0;
}

enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidValue,
    cudaErrorMemoryAllocation,
    cudaErrorInsufficientDriver = 35,
    cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToDevice };
using cudaStream_t = struct Stream*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

constexpr std::size_t shared_memory_limit = 99 << 10;  // of the GPUs that have the least
/// What kernels declare as `extern __shared__`.
alignas(16) inline thread_local unsigned char dynamic_shared_memory[shared_memory_limit];

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
    const dim3 grid = gridDim = config->gridDim, block = blockDim = config->blockDim;
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024 || config->dynamicSmemBytes > shared_memory_limit) return cudaErrorInvalidValue;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                std::memset(dynamic_shared_memory, 0xff, config->dynamicSmemBytes);  // NaN
                const bool ended = on_host::Block::current().run(
                    threads, [&] { kernel(args...); },
                    [&](unsigned i) { threadIdx = {i % block.x, i / block.x % block.y, i / block.x / block.y}; });
                if (!ended) return cudaErrorLaunchFailure;
            }
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
    *memory = std::malloc(bytes);
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* memory) {
    std::free(memory);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
    if (bytes) std::memcpy(to, from, bytes);
    return cudaSuccess;
}
using cudaMemPool_t = int*;
enum cudaMemAllocationType { cudaMemAllocationTypePinned };
enum cudaMemLocationType { cudaMemLocationTypeDevice };
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold };
struct cudaMemPoolProps {
    cudaMemAllocationType allocType;
    struct {
        cudaMemLocationType type;
        int id;
    } location;
};
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
    static int only = 0;
    *pool = &only;
    return cudaSuccess;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
    return cudaSuccess;
}
inline cudaError_t cudaMallocFromPoolAsync(void** memory, std::size_t bytes, cudaMemPool_t, cudaStream_t) {
    return cudaMalloc(memory, bytes);
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
    std::free(memory);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
    if (bytes) std::memset(memory, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return cudaSuccess;
}

struct cudaDeviceProp {
    char name[16];
};
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : static_cast<int>(shared_memory_limit);
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* device, int) {
    std::strcpy(device->name, "this CPU");
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t status) {
    return status == cudaSuccess                 ? "no error"
           : status == cudaErrorMemoryAllocation ? "out of memory"
           : status == cudaErrorLaunchFailure    ? "threads wait for one another"
                                                 : "invalid argument";
}
inline const char* cudaGetErrorName(cudaError_t status) {
    return status == cudaSuccess                 ? "cudaSuccess"
           : status == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation"
           : status == cudaErrorLaunchFailure    ? "cudaErrorLaunchFailure"
                                                 : "cudaErrorInvalidValue";
}
