/// What every engine's .cu needs: checked calls, the device guard, and one launch geometry.
///
/// A launch is queued on the caller's stream and not waited for: an error inside a kernel shows at the caller's next
/// synchronisation. POLYVEC_CUDA_SYNC=1 waits after each launch, to find the op that failed.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include "polyvec/exec.hpp"
#include "status.hpp"

alignas(16) extern __shared__ unsigned char dynamic_shared_memory[];  // what a launch gives to each block

namespace polyvec {

/// Makes `device` current, and the caller's own again at the end.
class DeviceGuard {
public:
    DeviceGuard(const char* op, int device) : device_(device) {
        check(op, cudaGetDevice(&before_));
        check(op, cudaSetDevice(device));
    }
    ~DeviceGuard() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int device_, before_ = 0;
};

inline bool wait_after_launch() {
    static const bool wait = [] {
        const char* text = std::getenv("POLYVEC_CUDA_SYNC");
        return text && *text == '1';
    }();
    return wait;
}

/// Queues `kernel(args...)` in blocks of threads, each with `bytes` of `dynamic_shared_memory`.
template <class... Params, class... Args>
void launch(const char* op, Cuda cuda, dim3 grid, dim3 block, std::size_t bytes, void (*kernel)(Params...),
            const Args&... args) {
    constexpr std::size_t granted = 40 << 10;  // of 48 KB, with what kernels declare; more must be asked for
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = bytes;
    config.stream = reinterpret_cast<cudaStream_t>(cuda.stream);
    const DeviceGuard guard(op, cuda.device);
    if (bytes > granted) {
        check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
        check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));  // per cent
    }
    check(op, cudaLaunchKernelEx(&config, kernel, args...));
    check(op, cudaGetLastError());
    if (wait_after_launch()) check(op, cudaStreamSynchronize(config.stream));
}

constexpr unsigned threads_per_block = 256;
constexpr unsigned max_grid_y = 65535;

/// Enough blocks for n items, `per_block` in each, in x; `rows` of them in y, where kernels go on in steps.
inline dim3 blocks_for(std::int64_t n, std::int64_t per_block, std::int64_t rows = 1) {
    return dim3(static_cast<unsigned>((n + per_block - 1) / per_block),
                static_cast<unsigned>(std::min<std::int64_t>(rows, max_grid_y)));
}

/// What the device has of `attribute`.
inline std::int64_t attribute_of(const char* op, Cuda cuda, cudaDeviceAttr attribute) {
    int value = 0;
    check(op, cudaDeviceGetAttribute(&value, attribute, cuda.device));
    return value;
}

/// Queues `kernel(args...)` with a thread for each of `rows` x `d` positions; the kernel visits its own by
/// `for_each_position`. Neighbouring threads have neighbouring positions of a row, or neighbouring rows when d is
/// small.
template <class... Params, class... Args>
void launch_rows(const char* op, Cuda cuda, std::int64_t rows, std::int64_t d, void (*kernel)(Params...),
                 const Args&... args) {
    if (rows == 0 || d == 0) return;  // CUDA refuses an empty grid
    unsigned lanes = 1;
    while (lanes < d && lanes < threads_per_block / 2) lanes *= 2;
    const dim3 block(lanes, threads_per_block / lanes);
    const dim3 grid(static_cast<unsigned>((rows + block.y - 1) / block.y),
                    static_cast<unsigned>(std::min<std::int64_t>((d + lanes - 1) / lanes, max_grid_y)));
    launch(op, cuda, grid, block, 0, kernel, args...);
}

/// polyvec's own pool of a device's memory. It keeps up to 1 GB of what ops gave back: the device's default pool
/// returns all of it to the system whenever somebody waits for the stream, and must ask for it again.
inline cudaMemPool_t pool_of(const char* op, int device) {
    static std::mutex taken;
    static std::vector<cudaMemPool_t> pools;
    const std::lock_guard lock(taken);
    if (static_cast<std::size_t>(device) >= pools.size()) pools.resize(device + 1, nullptr);
    cudaMemPool_t& pool = pools[device];
    if (!pool) {
        cudaMemPoolProps properties{};
        properties.allocType = cudaMemAllocationTypePinned;
        properties.location.type = cudaMemLocationTypeDevice;
        properties.location.id = device;
        check(op, cudaMemPoolCreate(&pool, &properties));
        std::uint64_t kept = std::uint64_t(1) << 30;
        check(op, cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept));
    }
    return pool;
}

/// Memory that an op needs for itself: taken and given back in the order of the stream, so that nothing waits for it.
template <class T>
class Scratch {
public:
    Scratch(const char* op, Cuda cuda, std::int64_t n)
        : device_(cuda.device), stream_(reinterpret_cast<cudaStream_t>(cuda.stream)) {
        const DeviceGuard guard(op, device_);
        void* memory = nullptr;
        if (n > 0)
            check(op, cudaMallocFromPoolAsync(&memory, static_cast<std::size_t>(n) * sizeof(T), pool_of(op, device_),
                                              stream_));
        memory_ = static_cast<T*>(memory);
    }
    ~Scratch() {
        if (memory_) cudaFreeAsync(memory_, stream_);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    T* get() const { return memory_; }

private:
    int device_;
    cudaStream_t stream_;
    T* memory_;
};

/// Memory of DeviceArrays that are gone. Kernels on any stream may still read it, and to free it is to wait for them,
/// which nothing may do while a stream is captured: it is freed when further copies are made, which wait anyway.
class DroppedMemory {
public:
    static void add(void* memory) {
        const std::lock_guard lock(all().taken_);
        all().dropped_.push_back(memory);
    }
    static void free(const char* op) {
        const std::lock_guard lock(all().taken_);
        for (; !all().dropped_.empty(); all().dropped_.pop_back()) check(op, cudaFree(all().dropped_.back()));
    }

private:
    static DroppedMemory& all() {
        static auto* const only = new DroppedMemory();  // which outlives all that other files keep
        return *only;
    }

    std::mutex taken_;
    std::vector<void*> dropped_;
};

/// A copy of a vector, on a device as long as this lives. The copying is queued: the vector must outlive it.
template <class T>
class DeviceArray {
public:
    DeviceArray() = default;
    DeviceArray(const char* op, Cuda cuda, const std::vector<T>& x) {
        const DeviceGuard guard(op, cuda.device);
        const std::size_t bytes = x.size() * sizeof(T);
        void* memory = nullptr;
        if (bytes > 0) check(op, cudaMalloc(&memory, bytes));
        memory_ = static_cast<T*>(memory);
        if (bytes > 0)
            check(op, cudaMemcpyAsync(memory, x.data(), bytes, cudaMemcpyHostToDevice,
                                      reinterpret_cast<cudaStream_t>(cuda.stream)));
    }
    DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
    DeviceArray& operator=(DeviceArray&& other) noexcept {
        std::swap(memory_, other.memory_);
        return *this;
    }
    ~DeviceArray() {
        if (memory_) DroppedMemory::add(memory_);
    }

    const T* get() const { return memory_; }

private:
    T* memory_ = nullptr;
};

template <class T>
void fill_with_zeros(const char* op, Cuda cuda, T* x, std::int64_t n) {
    const DeviceGuard guard(op, cuda.device);
    check(op,
          cudaMemsetAsync(x, 0, static_cast<std::size_t>(n) * sizeof(T), reinterpret_cast<cudaStream_t>(cuda.stream)));
}

/// Calls f(row, v) for the positions of the calling thread, in a kernel started by `launch_rows`.
template <class F>
__device__ void for_each_position(std::int64_t rows, std::int64_t d, F f) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.y) * blockDim.x;
    for (std::int64_t v = first; v < d; v += step) f(row, v);
}

}  // namespace polyvec
