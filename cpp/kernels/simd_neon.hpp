// The operations that vector extensions have no words for, mostly in plain C: aarch64 has no masked load, and a mask
// there has no cheap way to the integer side. Included by simd.hpp.
#pragma once

#include <arm_neon.h>

namespace polyvec::POLYVEC_ISA {
namespace {

// One bit per lane of a comparison, lane 0 lowest.
template <class M>
POLYVEC_INLINE uint32_t bits(M mask) noexcept {
    uint32_t set = 0;
    for (size_t k = 0; k < lanes_of<M>; ++k) set |= static_cast<uint32_t>(mask[k] & 1) << k;
    return set;
}

template <class M>
POLYVEC_INLINE bool any(M mask) noexcept {
    return bits(mask) != 0;
}

// The first n (at most lanes<T>) elements at p, zeros after them; nothing behind them is touched.
template <class T>
POLYVEC_INLINE Vec<T> load_first(const T* p, size_t n) noexcept {
    Vec<T> v{};
    for (size_t k = 0; k < lanes<T>; ++k) {
        if (k < n) v[k] = p[k];
    }
    return v;
}

// Store the first n (at most lanes<T>) lanes; nothing behind them is touched.
template <class T>
POLYVEC_INLINE void store_first(T* p, Vec<T> v, size_t n) noexcept {
    for (size_t k = 0; k < lanes<T>; ++k) {
        if (k < n) p[k] = v[k];
    }
}

// a0 * b0 + a1 * b1 of the 16-bit halves of each lane.
POLYVEC_INLINE Vec<int32_t> multiply_pairs(Vec<uint32_t> a, Vec<uint32_t> b) noexcept {
    const auto x = (int16x8_t)a, y = (int16x8_t)b;
    return (Vec<int32_t>)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}

// Half a vector of signed bytes as 16 bits.
template <class Half>
POLYVEC_INLINE Vec<int16_t> widen_bytes(Half v) noexcept {
    return (Vec<int16_t>)vmovl_s8((int8x8_t)v);
}

// A vector's worth of bytes as floats.
POLYVEC_INLINE Vec<float> load_int8(const unsigned char* p) noexcept {
    uint32_t bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return (Vec<float>)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(bytes)))));
}

#define POLYVEC_BYTE_SHUFFLE 1

// In each 128-bit lane, the bytes of `table` that the bytes of `index`, 0 to 15, select.
POLYVEC_INLINE Vec<uint8_t> shuffle_bytes(Vec<uint8_t> table, Vec<uint8_t> index) noexcept {
    return (Vec<uint8_t>)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index);
}

// (a + b + 1) / 2.
POLYVEC_INLINE Vec<uint8_t> average_bytes(Vec<uint8_t> a, Vec<uint8_t> b) noexcept {
    return (Vec<uint8_t>)vrhaddq_u8((uint8x16_t)a, (uint8x16_t)b);
}

// Half a vector's worth of unsigned bytes as 16 bits.
POLYVEC_INLINE Vec<uint16_t> load_bytes_as_shorts(const unsigned char* p) noexcept {
    return (Vec<uint16_t>)vmovl_u8(vld1_u8(p));
}

}  // namespace
}  // namespace polyvec::POLYVEC_ISA
