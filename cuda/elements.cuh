/// Elements of fewer bits as floats.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

namespace polyvec {

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

__device__ inline float value_of(float x) {
    return x;
}
__device__ inline double value_of(double x) {
    return x;
}
__device__ inline float value_of(std::int8_t x) {
    return __uint_as_float(0x4b000000u | (static_cast<unsigned char>(x) ^ 0x80u)) - 8388736.0f;  // 2^23 + 128
}
__device__ inline float value_of(BFloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ inline float value_of(Float16 x) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
#else  // on_host
    const unsigned magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | magnitude << 13);  // Inf, NaN
    const float scale = x.bits & 0x8000u ? -0x1p112f : 0x1p112f;  // the difference of the exponents' biases
    return __uint_as_float(magnitude << 13) * scale;              // exact, of subnormal numbers too
#endif
}

/// `x` rounded to float16, to even; beyond 65504 it becomes infinity, NaN stays NaN.
__device__ inline Float16 rounded_to_float16(float x) {
#ifdef __CUDACC__
    Float16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
    return half;
#else
    return std::bit_cast<Float16>(static_cast<_Float16>(x));
#endif
}

/// `x` rounded to bfloat16, to even; NaN stays NaN.
__device__ inline float rounded_to_bfloat16(float x) {
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return x;
    return __uint_as_float((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}
__device__ inline std::uint16_t bfloat16_bits(float x) {
    return static_cast<std::uint16_t>(__float_as_uint(rounded_to_bfloat16(x)) >> 16);
}

}  // namespace polyvec
