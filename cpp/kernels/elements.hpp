// Elements as rows store them, read as vectors of floats: float, bfloat16, float16, int8.
//
//     Elements::load(p)            a vector's worth
//     load_elements<Elements>(p, n)   the first n of them, zeros after them
//     Elements::in_words   two are a word of 32 bits that holds them as floats, but for a shift and a mask
#pragma once

#include "simd.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

// N elements of T, anywhere in memory.
template <class T, size_t N>
using Some = typename VecOf<T, static_cast<int>(N * sizeof(T))>::unaligned;

POLYVEC_INLINE Vec<uint32_t> load_halves(const unsigned char* p) noexcept {
    return __builtin_convertvector(*reinterpret_cast<const Some<uint16_t, lanes<float>>*>(p), Vec<uint32_t>);
}

struct Float32Elements {
    static constexpr size_t bits = 32;
    static constexpr bool in_words = false;
    POLYVEC_INLINE static Vec<float> load(const unsigned char* p) noexcept {
        return (Vec<float>)*reinterpret_cast<const Some<float, lanes<float>>*>(p);
    }
};

struct Bfloat16Elements {
    static constexpr size_t bits = 16;
    static constexpr bool in_words = true;
    POLYVEC_INLINE static Vec<float> load(const unsigned char* p) noexcept {
        return (Vec<float>)(load_halves(p) << 16);
    }
};

struct Float16Elements {
    static constexpr size_t bits = 16;
    static constexpr bool in_words = false;
#if defined(POLYVEC_FLOAT16_CONVERSION)
    POLYVEC_INLINE static Vec<float> load(const unsigned char* p) noexcept { return load_float16(p); }
#else
    // Exponent and fraction move to their places; a product sets the bias right, exactly, subnormals too.
    POLYVEC_INLINE static Vec<float> load(const unsigned char* p) noexcept {
        const Vec<uint32_t> half = load_halves(p), magnitude = half & 0x7fff, sign = (half ^ magnitude) << 16;
        const Vec<uint32_t> not_finite = (Vec<uint32_t>)(magnitude > 0x7bff) & 0x7f800000;
        return (Vec<float>)((Vec<uint32_t>)((Vec<float>)(magnitude << 13) * 0x1p112f) | sign | not_finite);
    }
#endif
};

struct Int8Elements {
    static constexpr size_t bits = 8;
    static constexpr bool in_words = false;
    POLYVEC_INLINE static Vec<float> load(const unsigned char* p) noexcept { return load_int8(p); }
};

// The first n (fewer than lanes<float>) elements at p, zeros after them; nothing behind them is read.
template <class Elements>
POLYVEC_INLINE Vec<float> load_elements(const unsigned char* p, size_t n) noexcept {
    if constexpr (Elements::bits == 32) {
        return load_first(reinterpret_cast<const float*>(p), n);
    } else {
        unsigned char some[lanes<float> * Elements::bits / 8] = {};
        for (size_t k = 0; k < n * Elements::bits / 8; ++k) some[k] = p[k];
        return Elements::load(some);
    }
}

}  // namespace
}  // namespace polyvec::POLYVEC_ISA
