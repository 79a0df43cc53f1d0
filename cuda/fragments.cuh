/// Matrix products on tensor cores, nearly as exact as in float32: a factor is the sum of two TF32 numbers of 11 bits.
///
/// A warp multiplies 16 columns of a matrix with 8 rows of data. Lane 4 * g + t holds entries of columns g and g + 8,
/// or of row g; of the product, columns g and g + 8 of rows 2 * t and 2 * t + 1. Of each 16 entries of a row it holds
/// four neighbours, 4 * t ... 4 * t + 3, so that it reads them at once: sums over entries may run in any order.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <vector>

#include "mma.cuh"

namespace polyvec {

/// x = high + low, but for its last bits.
struct Tf32Pair {
    unsigned high, low;

    explicit __device__ Tf32Pair(float x) {
        high = rounded_to_tf32(x);
        low = rounded_to_tf32(x - __uint_as_float(high));
    }
};

/// c += columns a (16, 8) times rows b (8, 8), which the lanes of a warp hold together.
__device__ inline void mma(float (&c)[4], const uint4& a, unsigned b0, unsigned b1) {
    multiply_tf32(c, {a.x, a.y, a.z, a.w}, b0, b1);
}

/// A matrix (d, n) in the order in which lanes read it: [tile of 16 columns][16 entries][half of each four][high, low].
struct Fragments {
    static constexpr int lanes = 32, per_chunk = 4 * lanes;

    const uint4* at;
    int tiles, chunks;  // of 16 columns, of 16 entries
    bool exact;         // all entries are TF32 numbers: the low parts may be left out

    /// Of tile m, chunk k, half h; `lane` is the caller's.
    __device__ uint4 high(int m, int k, int h, unsigned lane) const {
        return at[(static_cast<std::int64_t>(m) * chunks + k) * per_chunk + 2 * h * lanes + lane];
    }
    __device__ uint4 low(int m, int k, int h, unsigned lane) const {
        return at[(static_cast<std::int64_t>(m) * chunks + k) * per_chunk + (2 * h + 1) * lanes + lane];
    }

    /// sums[i] + rest[i] += tile m times x[i], the half h of chunk k of the rows of i, for i < N.
    template <bool exact, int N>
    __device__ void multiply(float (&sums)[N][4], float (&rest)[N][4], int m, int k, int h, unsigned lane,
                             const Tf32Pair (&x)[N][2]) const {
        const uint4 a = high(m, k, h, lane);
        if constexpr (!exact) {
            const uint4 b = low(m, k, h, lane);
#pragma unroll
            for (int i = 0; i < N; ++i) mma(rest[i], b, x[i][0].high, x[i][1].high);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) mma(rest[i], a, x[i][0].low, x[i][1].low);
#pragma unroll
        for (int i = 0; i < N; ++i) mma(sums[i], a, x[i][0].high, x[i][1].high);
    }
};

constexpr int tiles_of(std::int64_t n) {
    return static_cast<int>((n + 15) / 16);
}

/// Appends a matrix (d, n) to `out`, whose entries are entry(column, i); returns whether it is exact.
template <class F>
bool append_fragments(std::vector<uint4>& out, std::int64_t n, std::int64_t d, F entry) {
    bool exact = true;
    for (int m = 0; m < tiles_of(n); ++m) {
        for (int k = 0; k < tiles_of(d); ++k) {
            for (int part = 0; part < 4; ++part) {
                for (int lane = 0; lane < Fragments::lanes; ++lane) {
                    const auto value = [&](int column, int i) {
                        const std::int64_t c = 16 * m + column, at = 16 * k + 4 * (lane % 4) + 2 * (part / 2) + i;
                        const float x = c < n && at < d ? entry(c, at) : 0;
                        const unsigned high = rounded_to_tf32(x);
                        const unsigned low = rounded_to_tf32(x - std::bit_cast<float>(high));
                        exact = exact && low << 1 == 0;
                        return part % 2 == 0 ? high : low;
                    };
                    const int g = lane / 4;
                    out.push_back({value(g, 0), value(g + 8, 0), value(g, 1), value(g + 8, 1)});
                }
            }
        }
    }
    return exact;
}

}  // namespace polyvec
