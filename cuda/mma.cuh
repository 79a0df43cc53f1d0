/// Matrix products by warps: mma.sync in words of 32 bits, which hold a float, two halves or four bytes; and, for tiles
/// in shared memory on sm_90a, wgmma.
///
/// A product m16n8 of A (16 rows) and B (8 rows) takes 4 words of A and 2 of B from each lane. Lane 4 g + t gives words
/// of rows g and g + 8 of A, and of row g of B; it gets the entries (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t +
/// 1). A sum over words may run in any order, so that a lane reads 4 neighbouring words of a row, 16 bytes, and gives
/// them to two products as (0, 1) and (2, 3).
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "elements.cuh"
#include "warp.cuh"

namespace polyvec {

constexpr int words_per_chunk = 16;  // of a row: what the four lanes of a row give to two products

/// How words multiply, and what sums are kept in.
enum class Words { f32, bf16, f16, s8 };

template <Words words>
struct SumOf {
    using type = float;
};
template <>
struct SumOf<Words::s8> {
    using type = int;
};
template <Words words>
using Sum = typename SumOf<words>::type;

/// To 11 bits, ties away from zero; NaN stays NaN.
__host__ __device__ inline unsigned rounded_to_tf32(float x) {
#ifdef __CUDA_ARCH__
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
#else
    const auto bits = std::bit_cast<unsigned>(x);
    return x != x ? bits : (bits + 0x1000u) & 0xffffe000u;
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

#ifndef __CUDACC__  // on_host

/// Of TF32 numbers the first 11 bits.
template <Words words>
inline Sum<words> product_of_words(unsigned x, unsigned y) {
    if constexpr (words == Words::f32) {
        return __uint_as_float(x & 0xffffe000u) * __uint_as_float(y & 0xffffe000u);
    } else if constexpr (words == Words::s8) {
        int sum = 0;
        for (int i = 0; i < 32; i += 8) sum += static_cast<std::int8_t>(x >> i) * static_cast<std::int8_t>(y >> i);
        return sum;
    } else {
        using T = std::conditional_t<words == Words::bf16, BFloat16, Float16>;
        const auto at = [](unsigned word, int i) { return value_of(T{static_cast<std::uint16_t>(word >> i)}); };
        return at(x, 0) * at(y, 0) + at(x, 16) * at(y, 16);
    }
}

#endif

/// Adds one product; of floats, which are TF32 numbers here, it reads the first 11 bits.
template <Words words>
__device__ inline void multiply_words(Sum<words>* sum, const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifdef __CUDACC__
#define POLYVEC_MMA(instruction, constraint)                                                             \
    asm(instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                             \
        : "+" constraint(sum[0]), "+" constraint(sum[1]), "+" constraint(sum[2]), "+" constraint(sum[3]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (words == Words::f32) {
        POLYVEC_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "f");
    } else if constexpr (words == Words::bf16) {
        POLYVEC_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "f");
    } else if constexpr (words == Words::f16) {
        POLYVEC_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "f");
    } else {
        POLYVEC_MMA("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "r");
    }
#undef POLYVEC_MMA
#else
    struct Given {
        unsigned a[4], b[2];
    };
    const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    on_host::Block::current().exchange(whole_warp, Given{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](auto given) {
        for (unsigned other = 0; other < 4; ++other) {
            const Given row = given(4 * g + other), columns[2] = {given(8 * t + other), given(8 * t + 4 + other)};
            for (int i = 0; i < 4; ++i)
                for (int k = 0; k < 2; ++k)
                    sum[i] += product_of_words<words>(row.a[i / 2 + 2 * k], columns[i % 2].b[k]);
        }
        return 0;
    });
#endif
}

/// Words as a product takes them. float32 is split into two numbers of 11 bits, which lose the last of its bits.
template <Words words, int n>
struct Operand {
    unsigned at[n];

    __device__ void set(int i, unsigned word) { at[i] = word; }
};

template <int n>
struct Operand<Words::f32, n> {
    unsigned at[n], small[n];

    __device__ void set(int i, unsigned word) {
        const float x = __uint_as_float(word);
        at[i] = rounded_to_tf32(x);
        const float rest = x - __uint_as_float(at[i]);  // 12 bits: what a product does not read is the last one
        small[i] = fabsf(rest) < HUGE_VALF ? __float_as_uint(rest) : 0;  // Inf - Inf
    }
};

/// Adds the product of `a` and `b`; of float32 three, all but that of the small parts.
template <Words words>
__device__ inline void multiply(Sum<words> (&sum)[4], const Operand<words, 4>& a, const Operand<words, 2>& b) {
    if constexpr (words == Words::f32) {
        multiply_words<words>(sum, a.small, b.at[0], b.at[1]);
        multiply_words<words>(sum, a.at, b.small[0], b.small[1]);
    }
    multiply_words<words>(sum, a.at, b.at[0], b.at[1]);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// What wgmma takes for rows of `Bytes` bytes (64 or 128), swizzled alike, from a multiple of 1024 on.
template <int Bytes>
__device__ inline std::uint64_t matrix_at(unsigned address) {
    return std::uint64_t((address & 0x3ffffu) >> 4) | std::uint64_t(1) << 16 | std::uint64_t(Bytes / 2) << 32 |
           std::uint64_t(Bytes == 128 ? 1 : 2) << 62;
}

/// sum (64 x 256) = rows (64 x 16) times columns (16 x 256), added to what it was if `add`: 4 warps have 16 rows each,
/// in 8 columns at a time as `multiply_words` has them. Done after `wait_for_products`.
template <Words words>
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
    if constexpr (words == Words::f16) {
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
