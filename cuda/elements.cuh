/// Elements of fewer bits as floats.
#pragma once

#include <cuda_runtime.h>

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

/// The bits of `x` rounded to float16, to even; beyond 65504 it becomes infinity, NaN stays NaN.
__device__ inline std::uint16_t rounded_to_float16(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u)  // subnormal: the sum rounds to multiples of 2^-24
        return static_cast<std::uint16_t>(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u));
    return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}

/// `x` rounded to bfloat16, to even; NaN stays NaN.
__device__ inline float rounded_to_bfloat16(float x) {
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return x;
    return __uint_as_float((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

}  // namespace polyvec
