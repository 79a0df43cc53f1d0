// The x86 instructions that vector extensions have no words for. Included by simd.hpp.
//
// Partial loads: rows whose width is no multiple of the lane count end in one on every row, and the portable
// form (a copy through the stack) costs more there than the row itself.
#pragma once

#include <immintrin.h>

namespace polyvec::POLYVEC_ISA {
namespace {

// One bit per lane of a comparison, lane 0 lowest.
template <class M>
POLYVEC_INLINE uint32_t bits(M mask) noexcept {
    constexpr bool narrow = sizeof(mask[0]) == 4;
#if POLYVEC_VECTOR_BYTES == 64
    if constexpr (narrow)
        return _mm512_movepi32_mask((__m512i)mask);
    else
        return _mm512_movepi64_mask((__m512i)mask);
#elif POLYVEC_VECTOR_BYTES == 32
    if constexpr (narrow)
        return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
    else
        return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#else
    if constexpr (narrow)
        return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
    else
        return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
#endif
}

template <class M>
POLYVEC_INLINE bool any(M mask) noexcept {
    return bits(mask) != 0;
}

// The first n (at most lanes<T>) elements at p, zeros after them; nothing behind them is touched.
template <class T>
POLYVEC_INLINE Vec<T> load_first(const T* p, size_t n) noexcept {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#if POLYVEC_VECTOR_BYTES == 64
    const uint32_t first = (1u << n) - 1;
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_maskz_loadu_epi32(static_cast<__mmask16>(first), p);
    else
        return (Vec<T>)_mm512_maskz_loadu_epi64(static_cast<__mmask8>(first), p);
#elif POLYVEC_VECTOR_BYTES == 32
    const auto first = (__m256i)first_lanes<T>(n);
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm256_maskload_epi32((const int*)p, first);
    else
        return (Vec<T>)_mm256_maskload_epi64((const long long*)p, first);
#else
    Vec<T> v{};
    for (size_t k = 0; k < lanes<T>; ++k) {
        if (k < n) v[k] = p[k];
    }
    return v;
#endif
}

// Store the first n (at most lanes<T>) lanes; nothing behind them is touched.
template <class T>
POLYVEC_INLINE void store_first(T* p, Vec<T> v, size_t n) noexcept {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#if POLYVEC_VECTOR_BYTES == 64
    const uint32_t first = (1u << n) - 1;
    if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(first), (__m512i)v);
    else
        _mm512_mask_storeu_epi64(p, static_cast<__mmask8>(first), (__m512i)v);
#elif POLYVEC_VECTOR_BYTES == 32
    const auto first = (__m256i)first_lanes<T>(n);
    if constexpr (sizeof(T) == 4)
        _mm256_maskstore_epi32((int*)p, first, (__m256i)v);
    else
        _mm256_maskstore_epi64((long long*)p, first, (__m256i)v);
#else
    for (size_t k = 0; k < lanes<T>; ++k) {
        if (k < n) p[k] = v[k];
    }
#endif
}

}  // namespace
}  // namespace polyvec::POLYVEC_ISA
