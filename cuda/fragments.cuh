/// Matrix products on tensor cores, nearly as exact as in float32: a factor is the sum of two TF32 numbers of 11 bits,
/// or, less exactly and in half the time, of two bfloat16 numbers.
///
/// A warp multiplies 16 columns of a matrix with 8 rows of data. Lane 4 * g + t holds entries of columns g and g + 8,
/// or of row g; of the product, columns g and g + 8 of rows 2 * t and 2 * t + 1. Of each 16 entries of a row it holds
/// four neighbours, 4 * t ... 4 * t + 3, so that it reads them at once: sums over entries may run in any order.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <vector>

#include "elements.cuh"
#include "mma.cuh"

namespace polyvec {

/// 16 columns of 8 entries each, of a matrix. exact: all entries are bfloat16 numbers, so that there are no low parts.
template <bool exact = false>
struct Fragment {
    static constexpr int lanes = 32, size = 2 * lanes;  // high and low parts of all lanes

    uint4 high, low;

    /// `at` is of the lane that calls.
    explicit __device__ Fragment(const uint4* at) : high(at[0]), low(at[lanes]) {}

    /// Of pairs of bfloat16 numbers.
    __device__ Fragment(unsigned first, unsigned second)
        : high{first << 16, first & 0xffff0000u, second << 16, second & 0xffff0000u}, low{} {}

    /// sum + rest += these columns times a row. Two sums, so that neither waits for the other.
    __device__ void multiply(float (&sum)[4], float (&rest)[4], const Operand<Words::f32, 2>& x) const {
        const unsigned first[] = {high.x, high.y, high.z, high.w}, second[] = {low.x, low.y, low.z, low.w};
        if constexpr (!exact) multiply_words<Words::f32>(rest, second, x.at[0], x.at[1]);
        multiply_words<Words::f32>(rest, first, x.small[0], x.small[1]);
        multiply_words<Words::f32>(sum, first, x.at[0], x.at[1]);
    }
};

/// Two numbers as pairs of bfloat16 numbers of 8 bits: x, y = high + low, but for 2^-16 of them.
struct Bf16Pairs {
    unsigned high, low;

    explicit __device__ Bf16Pairs(float x, float y) {
        high = rounded(x, y);
        low = rounded(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u));
    }

    static __device__ unsigned rounded(float x, float y) {
#ifdef __CUDACC__
        unsigned pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
        return pair;
#else
        return __float_as_uint(rounded_to_bfloat16(x)) >> 16 | (__float_as_uint(rounded_to_bfloat16(y)) & 0xffff0000u);
#endif
    }
};

/// 16 columns of 16 entries each: half as exact as a Fragment, and in half the time.
struct Bf16Fragment {
    static constexpr int lanes = 32, size = 2 * lanes;

    uint4 high, low;

    explicit __device__ Bf16Fragment(const uint4* at) : high(at[0]), low(at[lanes]) {}

    /// sums[i] += these columns times the rows x[i], for i < N.
    template <int N>
    __device__ void multiply(float (&sums)[N][4], const Bf16Pairs (&x)[N][2]) const {
        const unsigned first[] = {high.x, high.y, high.z, high.w}, second[] = {low.x, low.y, low.z, low.w};
#pragma unroll
        for (int i = 0; i < N; ++i) multiply_words<Words::bf16>(sums[i], second, x[i][0].high, x[i][1].high);
#pragma unroll
        for (int i = 0; i < N; ++i) multiply_words<Words::bf16>(sums[i], first, x[i][0].low, x[i][1].low);
#pragma unroll
        for (int i = 0; i < N; ++i) multiply_words<Words::bf16>(sums[i], first, x[i][0].high, x[i][1].high);
    }
};

/// A matrix (d, n) as fragments, one after the other: [16 entries][first, second half of each four][16 columns].
struct Fragments {
    const uint4 *at, *exact;  // the second one as bfloat16 numbers, both halves together; null where they are others
    int tiles, chunks;        // of 16 columns, of 16 entries

    __host__ __device__ std::int64_t size() const {
        return static_cast<std::int64_t>(2) * chunks * tiles * Fragment<>::size;
    }
    __host__ __device__ std::int64_t exact_size() const { return size() / 4; }
};

constexpr int tiles_of(std::int64_t n) {
    return static_cast<int>((n + 15) / 16);
}

/// Appends a matrix (d, n) to `out`, whose entries are entry(column, i).
template <class F>
void append_fragments(std::vector<uint4>& out, std::int64_t n, std::int64_t d, F entry) {
    for (int half = 0; half < 2 * tiles_of(d); ++half) {
        for (int m = 0; m < tiles_of(n); ++m) {
            for (int lane = 0; lane < Fragment<>::size; ++lane) {
                const auto value = [&](int column, int i) {
                    const std::int64_t c = 16 * m + column, at = half / 2 * 16 + lane % 4 * 4 + half % 2 * 2 + i;
                    const float x = c < n && at < d ? entry(c, at) : 0;
                    const unsigned high = rounded_to_tf32(x);
                    return lane < Fragment<>::lanes ? high : rounded_to_tf32(x - std::bit_cast<float>(high));
                };
                const int g = lane % Fragment<>::lanes / 4;
                out.push_back({value(g, 0), value(g + 8, 0), value(g, 1), value(g + 8, 1)});
            }
        }
    }
}

/// Appends a matrix (d, n) as Bf16Fragments, [16 entries][16 columns].
template <class F>
void append_bf16_fragments(std::vector<uint4>& out, std::int64_t n, std::int64_t d, F entry) {
    const auto rounded = [](float x) {  // entries are finite
        const auto bits = std::bit_cast<std::uint32_t>(x);
        return (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    };
    for (int k = 0; k < tiles_of(d); ++k) {
        for (int m = 0; m < tiles_of(n); ++m) {
            for (int lane = 0; lane < Bf16Fragment::size; ++lane) {
                const auto value = [&](std::int64_t c, std::int64_t i) {
                    const float x = c < n && i < d ? entry(c, i) : 0;
                    const std::uint32_t high = rounded(x);
                    return lane < Bf16Fragment::lanes ? high : rounded(x - std::bit_cast<float>(high));
                };
                const auto pair = [&](int column, int i) {
                    const std::int64_t c = 16 * m + lane % Bf16Fragment::lanes / 4 + column,
                                       at = 16 * k + lane % 4 * 4 + i;
                    return value(c, at) >> 16 | value(c, at + 1);
                };
                out.push_back({pair(0, 0), pair(8, 0), pair(0, 2), pair(8, 2)});
            }
        }
    }
}

/// The same fragments, `tiles` a half, as bfloat16 numbers; none where they are others.
inline std::vector<uint4> exact_fragments(const std::vector<uint4>& fragments, int tiles) {
    constexpr std::size_t lanes = Fragment<>::lanes;
    const auto half = static_cast<std::size_t>(tiles * Fragment<>::size);
    const auto pair = [](unsigned first, unsigned second) { return first >> 16 | (second & 0xffff0000u); };
    std::vector<uint4> out;
    for (std::size_t k = 0; k < fragments.size(); k += 2 * half) {
        for (std::size_t at = k; at < k + half; ++at) {
            const uint4 &a = fragments[at], &b = fragments[at + half];
            if (at / lanes % 2 == 0) {
                if ((a.x | a.y | a.z | a.w | b.x | b.y | b.z | b.w) & 0xffffu) return {};
                out.push_back({pair(a.x, a.y), pair(a.z, a.w), pair(b.x, b.y), pair(b.z, b.w)});
            } else if ((a.x | a.y | a.z | a.w | b.x | b.y | b.z | b.w) << 1) {
                return {};  // a low part
            }
        }
    }
    return out;
}

}  // namespace polyvec
