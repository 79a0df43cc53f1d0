/// Matrix products by warps: mma.sync in words of 32 bits, which hold a float, two halves or four bytes.
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

#ifdef __CUDACC__

#define POLYVEC_MMA(instruction, constraint)                                                             \
    asm(instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                             \
        : "+" constraint(sum[0]), "+" constraint(sum[1]), "+" constraint(sum[2]), "+" constraint(sum[3]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

__device__ inline void multiply_tf32(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    POLYVEC_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "f");
}
__device__ inline void multiply_bf16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    POLYVEC_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "f");
}
__device__ inline void multiply_f16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    POLYVEC_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "f");
}
__device__ inline void multiply_s8(int (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    POLYVEC_MMA("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "r");
}
#undef POLYVEC_MMA

#else  // on a CPU: for tests

template <Words words>
__device__ inline Sum<words> product_of_words(unsigned x, unsigned y) {
    if constexpr (words == Words::f32) {
        return __uint_as_float(x) * __uint_as_float(y);
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

struct Given {
    unsigned a[4], b[2];
};

template <Words words>
__device__ inline void multiply_on_host(Sum<words> (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
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
}

__device__ inline void multiply_tf32(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_on_host<Words::f32>(sum, a, b0, b1);
}
__device__ inline void multiply_bf16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_on_host<Words::bf16>(sum, a, b0, b1);
}
__device__ inline void multiply_f16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_on_host<Words::f16>(sum, a, b0, b1);
}
__device__ inline void multiply_s8(int (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_on_host<Words::s8>(sum, a, b0, b1);
}

#endif

/// Words as a product takes them. float32 is split into two numbers of 11 bits, which lose 2^-22 of it.
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
        const float rest = x - __uint_as_float(at[i]);
        small[i] = fabsf(rest) < HUGE_VALF ? rounded_to_tf32(rest) : 0;  // Inf - Inf
    }
};

/// Adds the product of `a` and `b`; of float32 three, all but that of the small parts.
template <Words words>
__device__ inline void multiply(Sum<words> (&sum)[4], const Operand<words, 4>& a, const Operand<words, 2>& b) {
    if constexpr (words == Words::f32) {
        multiply_tf32(sum, a.small, b.at[0], b.at[1]);
        multiply_tf32(sum, a.at, b.small[0], b.small[1]);
        multiply_tf32(sum, a.at, b.at[0], b.at[1]);
    } else if constexpr (words == Words::bf16) {
        multiply_bf16(sum, a.at, b.at[0], b.at[1]);
    } else if constexpr (words == Words::f16) {
        multiply_f16(sum, a.at, b.at[0], b.at[1]);
    } else {
        multiply_s8(sum, a.at, b.at[0], b.at[1]);
    }
}

}  // namespace polyvec
