/// What threads of a warp do together, and the instructions that C++ has no names for (compute capability 8.0).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "elements.cuh"

namespace polyvec {

constexpr unsigned whole_warp = 0xffffffffu;

/// Of each `lanes` neighbouring threads, a power of two.
__device__ inline float sum_of_warp(float x, int lanes = 32) {
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

/// Four 8 x 8 matrices of 16-bit elements in shared memory: thread 8 i + j says where row j of matrix i is, and gets
/// two neighbours of row `lane / 4` of each.
__device__ inline void load_matrices(unsigned (&to)[4], SharedAddress from) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
#else
    auto& block = on_host::Block::current();
    block.exchange(whole_warp, from, [&](auto of) {
        for (unsigned i = 0; i < 4; ++i) std::memcpy(&to[i], of(8 * i + block.lane() / 4) + block.lane() % 4 * 4, 4);
        return 0;
    });
#endif
}

/// sum (16 x 8) += rows (16 x 16) times columns (8 x 16): thread 4 g + t has entries 2 t, 2 t + 1, 2 t + 8 and 2 t + 9
/// of rows g and g + 8, which alternate, and of column g; of the sum, columns 2 t and 2 t + 1 of rows g and g + 8.
template <class Half>
__device__ void multiply_add(float* sum, const unsigned (&rows)[4], const unsigned* columns) {
#ifdef __CUDACC__
    if constexpr (std::is_same_v<Half, Float16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]));
    }
#else
    struct Factors {
        float rows[2][4], columns[4];  // two neighbours, and two 8 further
    } mine;
    const auto half = [](unsigned pair, int i) {
        return value_of(Half{static_cast<std::uint16_t>(i == 0 ? pair & 0xffffu : pair >> 16)});
    };
    for (int i = 0; i < 4; ++i) {
        for (int r = 0; r < 2; ++r) mine.rows[r][i] = half(rows[r + i / 2 * 2], i % 2);
        mine.columns[i] = half(columns[i / 2], i % 2);
    }
    auto& block = on_host::Block::current();
    const unsigned g = block.lane() / 4, t = block.lane() % 4;
    block.exchange(whole_warp, mine, [&](auto of) {
        for (unsigned from = 0; from < 4; ++from) {
            const Factors row = of(4 * g + from);
            for (unsigned i = 0; i < 2; ++i) {
                const Factors column = of(4 * (2 * t + i) + from);
                for (int k = 0; k < 4; ++k) {
                    sum[i] += row.rows[0][k] * column.columns[k];
                    sum[i + 2] += row.rows[1][k] * column.columns[k];
                }
            }
        }
        return 0;
    });
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// What wgmma takes for rows of `Bytes` bytes (64 or 128), swizzled alike, from a multiple of 1024 on.
template <int Bytes>
__device__ inline std::uint64_t matrix_at(unsigned address) {
    return std::uint64_t((address & 0x3ffffu) >> 4) | std::uint64_t(1) << 16 | std::uint64_t(Bytes / 2) << 32 |
           std::uint64_t(Bytes == 128 ? 1 : 2) << 62;
}

/// sum (64 x 256) = rows (64 x 16) times columns (16 x 256), added to what it was if `add`: 4 warps have 16 rows each,
/// in 8 columns at a time as `multiply_add` has them. Done after `wait_for_products`.
template <class Half>
__device__ inline void multiply_matrices(float (&sum)[128], std::uint64_t rows, std::uint64_t columns, bool add) {
#define POLYVEC_SUMS                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
    "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
    "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
    "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "     \
    "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "     \
    "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define POLYVEC_FOUR(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define POLYVEC_16(i) POLYVEC_FOUR(i), POLYVEC_FOUR(i + 4), POLYVEC_FOUR(i + 8), POLYVEC_FOUR(i + 12)
#define POLYVEC_64(i) POLYVEC_16(i), POLYVEC_16(i + 16), POLYVEC_16(i + 32), POLYVEC_16(i + 48)
#define POLYVEC_WGMMA(type)                                                                                     \
    asm volatile("{.reg .pred add; setp.ne.b32 add, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." type \
                 "." type " {" POLYVEC_SUMS "}, %128, %129, add, 1, 1, 0, 0;}"                                  \
                 : POLYVEC_64(0), POLYVEC_64(64)                                                                \
                 : "l"(rows), "l"(columns), "r"(static_cast<int>(add)))
    if constexpr (std::is_same_v<Half, Float16>) {
        POLYVEC_WGMMA("f16");
    } else {
        POLYVEC_WGMMA("bf16");
    }
#undef POLYVEC_WGMMA
#undef POLYVEC_64
#undef POLYVEC_16
#undef POLYVEC_FOUR
#undef POLYVEC_SUMS
}

/// Lets products read what copies wrote to shared memory, those of this thread or those that it waited for.
__device__ inline void show_copies_to_products() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Orders what was written to sums before the products that add to them.
__device__ inline void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most `Left` groups of products are under way.
template <int Left>
__device__ inline void wait_for_products(float (&sum)[128]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
#pragma unroll
    for (int i = 0; Left == 0 && i < 128; ++i) asm volatile("" : "+f"(sum[i])::"memory");  // not read before
}

#endif

}  // namespace polyvec
