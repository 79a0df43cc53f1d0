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
__device__ void multiply_add(float (&sum)[4], const unsigned (&rows)[4], const unsigned* columns) {
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

}  // namespace polyvec
