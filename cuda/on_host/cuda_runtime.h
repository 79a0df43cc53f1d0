/// The part of CUDA that polyvec uses, on a CPU: a launch calls the kernel once a thread, one after the other.
///
/// It lets the tests run the code of the kernels, and their callers, where there is no GPU. It shows wrong indices and
/// wrong arithmetic; it says nothing about races, memory spaces, launch limits or rounding on a GPU. Kernels that share
/// memory or wait for one another cannot run here. For tests only: no wheel contains it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __grid_constant__

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

using std::abs, std::exp, std::fma, std::isnan, std::log, std::log1p, std::sqrt;

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

template <class T>
T atomicAdd(T* sum, T x) {
    const T before = *sum;
    *sum += x;
    return before;
}

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation = 2, cudaErrorInsufficientDriver = 35 };
using cudaStream_t = struct Stream*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
    const auto for_each = [](const dim3& n, dim3& at, auto f) {
        for (at.z = 0; at.z < n.z; ++at.z)
            for (at.y = 0; at.y < n.y; ++at.y)
                for (at.x = 0; at.x < n.x; ++at.x) f();
    };
    gridDim = config->gridDim, blockDim = config->blockDim;
    for_each(gridDim, blockIdx, [&] { for_each(blockDim, threadIdx, [&] { kernel(args...); }); });
    return cudaSuccess;
}

inline cudaError_t cudaMallocAsync(void** memory, std::size_t bytes, cudaStream_t) {
    *memory = std::malloc(bytes);
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
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
    return status == cudaErrorMemoryAllocation ? "out of memory" : "no error";
}
inline const char* cudaGetErrorName(cudaError_t status) {
    return status == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaSuccess";
}
