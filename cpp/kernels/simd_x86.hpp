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

#if POLYVEC_VECTOR_BYTES >= 32
POLYVEC_INLINE uint32_t bits(VecOf<int16_t, 32>::type mask) noexcept {
    return static_cast<uint32_t>(
        _mm_movemask_epi8(_mm_packs_epi16((__m128i)lower_half(mask), (__m128i)upper_half(mask))));
}
#endif

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

// ---- products of narrow numbers, several to a 32-bit lane

// a0 * b0 + a1 * b1 of the 16-bit halves of each lane, in registers of any width that the level has.
template <class V>
POLYVEC_INLINE typename VecOf<int32_t, sizeof(V)>::type multiply_pairs(V a, V b) noexcept {
    using Out = typename VecOf<int32_t, sizeof(V)>::type;
#if POLYVEC_VECTOR_BYTES == 64
    if constexpr (sizeof(V) == 64) return (Out)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
#if POLYVEC_VECTOR_BYTES >= 32
    if constexpr (sizeof(V) == 32) return (Out)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
    if constexpr (sizeof(V) == 16) return (Out)_mm_madd_epi16((__m128i)a, (__m128i)b);
}

#if defined(__AVX2__)
#define POLYVEC_BYTE_PAIRS 1

// a0 * b0 + a1 * b1 of the bytes of each 16 bits, those of a unsigned and those of b signed; saturates.
template <class V>
POLYVEC_INLINE typename VecOf<int16_t, sizeof(V)>::type multiply_byte_pairs(V a, V b) noexcept {
    using Out = typename VecOf<int16_t, sizeof(V)>::type;
#if POLYVEC_VECTOR_BYTES == 64
    if constexpr (sizeof(V) == 64) return (Out)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
#endif
    if constexpr (sizeof(V) == 32) return (Out)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define POLYVEC_NARROW_PRODUCTS 1

// sum + the products of the two bfloat16 of each lane.
POLYVEC_INLINE Vec<float> add_bfloat16_pairs(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) noexcept {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// sum + the products of the four bytes of each lane, those of a unsigned and those of b signed.
POLYVEC_INLINE Vec<int32_t> add_byte_quads(Vec<int32_t> sum, Vec<uint32_t> a, Vec<uint32_t> b) noexcept {
    return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}

// The first n (at most 64) bytes at p, zeros after them; nothing behind them is touched.
POLYVEC_INLINE Vec<uint32_t> load_first_bytes(const unsigned char* p, size_t n) noexcept {
    return (Vec<uint32_t>)_mm512_maskz_loadu_epi8(~__mmask64{} >> (64 - n), p);
}

// The bytes of v that 64 bits at p select, zeros elsewhere.
POLYVEC_INLINE Vec<uint32_t> select_bytes(const unsigned char* p, Vec<uint32_t> v) noexcept {
    uint64_t selected;
    __builtin_memcpy(&selected, p, sizeof selected);
    return (Vec<uint32_t>)_mm512_maskz_mov_epi8(selected, (__m512i)v);
}

// The bytes of a 64-byte table that the low 6 bits of the bytes of `index` select.
POLYVEC_INLINE Vec<uint32_t> permute_bytes(Vec<uint32_t> table, Vec<uint32_t> index) noexcept {
    return (Vec<uint32_t>)_mm512_maskz_permutexvar_epi8(~__mmask64{}, (__m512i)index, (__m512i)table);
}

// For permute_bytes: byte i of lane v becomes byte v of 128-bit lane i of the argument.
POLYVEC_INLINE Vec<uint32_t> byte_transposition_4x16() noexcept {
    const Vec<uint32_t> first = broadcast(0x30201000u), lane = (Vec<uint32_t>)lane_numbers<float>();
    return first + lane * broadcast(0x01010101u);
}

// 16 bytes from each of four places.
POLYVEC_INLINE Vec<uint32_t> load_quarters(const unsigned char* a, const unsigned char* b, const unsigned char* c,
                                           const unsigned char* d) noexcept {
    const auto quarter = [](const unsigned char* p) __attribute__((always_inline)) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    };
    __m512i v = _mm512_castsi128_si512(quarter(a));
    v = _mm512_maskz_inserti32x4(0xffff, v, quarter(b), 1);
    v = _mm512_maskz_inserti32x4(0xffff, v, quarter(c), 2);
    return (Vec<uint32_t>)_mm512_maskz_inserti32x4(0xffff, v, quarter(d), 3);
}

// The lanes that `selected` has bits for, next to one another, then zeros.
POLYVEC_INLINE Vec<uint32_t> compress(Vec<uint32_t> v, uint32_t selected) noexcept {
    return (Vec<uint32_t>)_mm512_maskz_compress_epi32(static_cast<__mmask16>(selected), (__m512i)v);
}

// (a & b) | c; GCC makes two instructions of it.
POLYVEC_INLINE Vec<uint32_t> and_or(Vec<uint32_t> a, Vec<uint32_t> b, Vec<uint32_t> c) noexcept {
    return (Vec<uint32_t>)_mm512_maskz_ternarylogic_epi32(0xffff, (__m512i)a, (__m512i)b, (__m512i)c, 0xea);
}

#define POLYVEC_BYTE_TABLES 1

struct ByteTable {
    __m512i quarter[4];
};

POLYVEC_INLINE ByteTable load_byte_table(const unsigned char* p) noexcept {
    return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64), _mm512_loadu_si512(p + 128),
            _mm512_loadu_si512(p + 192)};
}

// The bytes of a 256-byte table that 64 bytes at p select.
POLYVEC_INLINE __m512i look_up_bytes(const ByteTable& table, const unsigned char* p) noexcept {
    const __m512i index = _mm512_loadu_si512(p);
    const __m512i low = _mm512_permutex2var_epi8(table.quarter[0], index, table.quarter[1]);
    const __m512i high = _mm512_permutex2var_epi8(table.quarter[2], index, table.quarter[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
}

// The bytes of a 64-byte table that the first n (at most 64) codes at p select; codes of Bits (4 or 2) bits, the
// first in the highest bits of a byte. A code's higher neighbours reach into the index, so the table repeats itself
// every 1 << Bits bytes.
template <int Bits>
POLYVEC_INLINE Vec<uint32_t> look_up_codes(const unsigned char* p, size_t n, const void* table) noexcept {
    // The forms that zero what a mask leaves out, with masks that leave out nothing: GCC 12 warns of the plain ones.
    const auto loaded = static_cast<__mmask32>((uint64_t{1} << (n * Bits / 8)) - 1);
    __m512i codes, windows;
    if constexpr (Bits == 4) {
        const __m256i bytes =
            n == 64 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi8(loaded, p);
        codes = _mm512_maskz_cvtepu32_epi64(0xff, bytes);
        windows = _mm512_set1_epi64(0x181c1014080c0004);
    } else {
        const __m128i bytes = n == 64 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                      : _mm_maskz_loadu_epi8(static_cast<__mmask16>(loaded), p);
        codes = _mm512_maskz_cvtepu16_epi64(0xff, bytes);
        windows = _mm512_set1_epi64(0x080a0c0e00020406);
    }
    codes = _mm512_maskz_multishift_epi64_epi8(~__mmask64{}, windows, codes);
    return (Vec<uint32_t>)_mm512_maskz_permutexvar_epi8(~__mmask64{}, codes, _mm512_loadu_si512(table));
}
#endif

// The first names are those of GCC, the others those of older versions of Clang.
#if (defined(__AMX_INT8__) && defined(__AMX_BF16__)) || (defined(__AMXINT8__) && defined(__AMXBF16__))
#define POLYVEC_MATRIX_UNIT 1

// Its eight registers, matrices of 16 rows of 64 bytes, may be used while one of these lives (false: it does nothing).
// Assembly, as the intrinsics of GCC 12 take literals alone for registers and do not say that they read memory. To
// begin and to end takes 140 ns.
template <bool Used>
class MatrixUnit {
public:
    POLYVEC_INLINE MatrixUnit() noexcept {
        struct Shape {
            unsigned char palette = 1, others[15] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        };
        static_assert(sizeof(Shape) == 64);
        static constexpr Shape shape;
        if constexpr (Used) asm volatile("ldtilecfg %0" : : "m"(shape));
    }
    POLYVEC_INLINE ~MatrixUnit() {
        if constexpr (Used) asm volatile("tilerelease");
    }
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;
};

template <int M>
POLYVEC_INLINE void zero_matrix() noexcept {
    asm volatile("tilezero %%tmm%c0" : : "i"(M));
}

// Rows `stride` elements apart.
template <int M, class T>
POLYVEC_INLINE void load_matrix(const T* p, size_t stride) noexcept {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(M), "r"(p), "r"(stride * sizeof(T)) : "memory");
}
template <int M, class T>
POLYVEC_INLINE void store_matrix(T* p, size_t stride) noexcept {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(M), "r"(p), "r"(stride * sizeof(T)) : "memory");
}

// S[i][j] += the products of the words k of row i of A and the words j of row k of B: pairs of bfloat16, or quads of
// bytes, those of A unsigned or signed and those of B signed.
template <int S, int A, int B>
POLYVEC_INLINE void multiply_bfloat16_matrices() noexcept {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(S), "i"(A), "i"(B));
}
template <int S, int A, int B, bool Signed>
POLYVEC_INLINE void multiply_byte_matrices() noexcept {
    if constexpr (Signed)
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(S), "i"(A), "i"(B));
    else
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(S), "i"(A), "i"(B));
}
#endif

// Half a vector of signed bytes as 16 bits; from vector extensions GCC 12 makes twice the work of it.
template <class Half>
POLYVEC_INLINE Vec<int16_t> widen_bytes(Half v) noexcept {
#if POLYVEC_VECTOR_BYTES == 64
    return (Vec<int16_t>)_mm512_cvtepi8_epi16((__m256i)v);
#elif POLYVEC_VECTOR_BYTES == 32
    return (Vec<int16_t>)_mm256_cvtepi8_epi16((__m128i)v);
#else
    const __m128i low = _mm_cvtsi64_si128((long long)v);
    return (Vec<int16_t>)_mm_srai_epi16(_mm_unpacklo_epi8(low, low), 8);
#endif
}

// A vector's worth of bytes as floats; from vector extensions GCC 12 makes twice the work of it.
POLYVEC_INLINE Vec<float> load_int8(const unsigned char* p) noexcept {
#if POLYVEC_VECTOR_BYTES == 64
    return (Vec<float>)_mm512_maskz_cvtepi32_ps(0xffff,
                                                _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p)));
#elif POLYVEC_VECTOR_BYTES == 32
    return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    __m128i v = _mm_loadu_si32(p);
    v = _mm_unpacklo_epi8(v, v);
    v = _mm_unpacklo_epi16(v, v);
    return (Vec<float>)_mm_cvtepi32_ps(_mm_srai_epi32(v, 24));
#endif
}

#if POLYVEC_VECTOR_BYTES >= 32
#define POLYVEC_BYTE_SHUFFLE 1

// In each 128-bit lane, the bytes of `table` that the bytes of `index`, 0 to 15, select; 255 selects 0.
POLYVEC_INLINE Vec<uint8_t> shuffle_bytes(Vec<uint8_t> table, Vec<uint8_t> index) noexcept {
#if POLYVEC_VECTOR_BYTES == 64
    return (Vec<uint8_t>)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#else
    return (Vec<uint8_t>)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#endif
}

// (a + b + 1) / 2.
POLYVEC_INLINE Vec<uint8_t> average_bytes(Vec<uint8_t> a, Vec<uint8_t> b) noexcept {
#if POLYVEC_VECTOR_BYTES == 64
    return (Vec<uint8_t>)_mm512_avg_epu8((__m512i)a, (__m512i)b);
#else
    return (Vec<uint8_t>)_mm256_avg_epu8((__m256i)a, (__m256i)b);
#endif
}

// Half a vector's worth of unsigned bytes as 16 bits.
POLYVEC_INLINE Vec<uint16_t> load_bytes_as_shorts(const unsigned char* p) noexcept {
#if POLYVEC_VECTOR_BYTES == 64
    return (Vec<uint16_t>)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
#else
    return (Vec<uint16_t>)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
#endif
}
#endif

#if POLYVEC_VECTOR_BYTES == 32
// 16 bytes from each of two places; from vector extensions GCC 12 makes a shuffle more of it.
POLYVEC_INLINE Vec<uint8_t> load_halves(const unsigned char* first, const unsigned char* second) noexcept {
    const __m256i half = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)first));
    return (Vec<uint8_t>)_mm256_inserti128_si256(half, _mm_loadu_si128((const __m128i*)second), 1);
}

// In each 128-bit lane, the bytes of its first or second half in turn with those of b.
POLYVEC_INLINE Vec<uint8_t> interleave_first_bytes(Vec<uint8_t> a, Vec<uint8_t> b) noexcept {
    return (Vec<uint8_t>)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
}
POLYVEC_INLINE Vec<uint8_t> interleave_second_bytes(Vec<uint8_t> a, Vec<uint8_t> b) noexcept {
    return (Vec<uint8_t>)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
}

#define POLYVEC_BYTE_TABLES 1

struct ByteTable {
    const unsigned char* first;
};

POLYVEC_INLINE ByteTable load_byte_table(const unsigned char* p) noexcept {
    return {p};
}

// The bytes of the 2^Bits * 16 ones at p that the low 4 bits of `index` and the Bits lowest of `high` select.
template <int Bits>
POLYVEC_INLINE __m256i select_of(const unsigned char* p, __m256i index, const __m256i (&high)[4]) noexcept {
    if constexpr (Bits == 0) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)), index);
    } else {
        const __m256i low = select_of<Bits - 1>(p, index, high);
        return _mm256_blendv_epi8(low, select_of<Bits - 1>(p + (8 << Bits), index, high), high[Bits - 1]);
    }
}

// The bytes of a 256-byte table that 32 bytes at p select.
POLYVEC_INLINE __m256i look_up_bytes(const ByteTable& table, const unsigned char* p) noexcept {
    const __m256i code = _mm256_loadu_si256((const __m256i*)p);
    const __m256i high[4] = {_mm256_slli_epi16(code, 3), _mm256_slli_epi16(code, 2), _mm256_add_epi8(code, code), code};
    return select_of<4>(table.first, _mm256_and_si256(code, _mm256_set1_epi8(15)), high);
}
#endif

#if defined(__F16C__)
#define POLYVEC_FLOAT16_CONVERSION 1

POLYVEC_INLINE Vec<float> load_float16(const unsigned char* p) noexcept {
#if POLYVEC_VECTOR_BYTES == 64
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#else
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
}
#endif

}  // namespace
}  // namespace polyvec::POLYVEC_ISA
