/// Floats rounded to fewer bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace polyvec {

/// Rounded to even; the values are finite.
inline std::uint16_t to_bfloat16(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/// Rounded to even; |x| < 65520.
inline std::uint16_t to_float16(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude < 0x38800000) {  // subnormal: the sum rounds to multiples of 2^-24
        const float sum = std::bit_cast<float>(magnitude) + 0.5f;
        return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(sum) - 0x3f000000));
    }
    return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

/// codes = zero + x / scale, rounded to even; `zero` where all of x is. Returns the scale; the values are finite.
template <int zero, class Code>
float to_int8(const float* x, std::int64_t d, Code* codes) {
    float largest = 0;
    for (std::int64_t i = 0; i < d; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float steps = largest > 0 ? 127 / largest : 0;
    for (std::int64_t i = 0; i < d; ++i) {
        const float rounded = x[i] * steps + 0x1.8p23f;  // the integer is in the lowest bits
        codes[i] = static_cast<Code>(std::bit_cast<std::uint32_t>(rounded) + zero);
    }
    return largest / 127;
}

}  // namespace polyvec
