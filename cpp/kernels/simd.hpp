// The vector type of an ISA level and the operations that kernels need of it, on compiler vector extensions.
//
// The build compiles every kernel file once per ISA level and says which one by two macros: POLYVEC_ISA, the
// namespace, and POLYVEC_VECTOR_BYTES, the register width. A vector adds, multiplies, compares and indexes by
// the language itself (a + b, a < b, v[k]); the functions below are what the language cannot say, or says
// slowly.
//
// Everything a kernel uses lives in an unnamed namespace inside polyvec::POLYVEC_ISA, so that no object
// exports a function which another level's object could be given in its place; std templates would be such
// functions. Products contract to fused multiply-add where the level has it (-ffp-contract=fast).
#pragma once

#include <cstddef>
#include <cstdint>

#include "prefetch.hpp"

#if !defined(POLYVEC_ISA) || !defined(POLYVEC_VECTOR_BYTES)
#error "the build defines POLYVEC_ISA (a namespace) and POLYVEC_VECTOR_BYTES for every kernel file"
#endif

#define POLYVEC_INLINE [[gnu::always_inline]] inline

namespace polyvec::POLYVEC_ISA {
namespace {

using std::size_t;

template <class T, int Bytes = POLYVEC_VECTOR_BYTES>
struct VecOf {
    typedef T type __attribute__((vector_size(Bytes)));
    typedef T unaligned __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
};

template <class T>
using Vec = typename VecOf<T>::type;

// What a comparison of two Vec<T> yields: integers of T's size, -1 where true and 0 where false.
template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});

template <class T>
constexpr size_t lanes = POLYVEC_VECTOR_BYTES / sizeof(T);

template <class V>
constexpr size_t lanes_of = sizeof(V) / sizeof(V{}[0]);

// ---- constant lane numbers, for shuffles

template <int... K>
struct Lanes {};

template <int First, int Count, int... K>
struct LaneRange : LaneRange<First, Count - 1, First + Count - 1, K...> {};
template <int First, int... K>
struct LaneRange<First, 0, K...> {
    using type = Lanes<K...>;
};

template <class V, int... K>
POLYVEC_INLINE auto shuffle(V a, V b, Lanes<K...>) noexcept {
    return __builtin_shufflevector(a, b, K...);
}

// The lower and the upper half of a vector, as vectors of half the width.
template <class V>
POLYVEC_INLINE auto lower_half(V v) noexcept {
    return shuffle(v, v, typename LaneRange<0, lanes_of<V> / 2>::type{});
}
template <class V>
POLYVEC_INLINE auto upper_half(V v) noexcept {
    return shuffle(v, v, typename LaneRange<lanes_of<V> / 2, lanes_of<V> / 2>::type{});
}

// Every second lane of two vectors one after the other, from the first or the second on.
template <class V, int... K>
POLYVEC_INLINE V every_second(V a, V b, int from, Lanes<K...>) noexcept {
    return from == 0 ? shuffle(a, b, Lanes<2 * K...>{}) : shuffle(a, b, Lanes<2 * K + 1 ...>{});
}

// ---- memory

template <class T>
POLYVEC_INLINE Vec<T> load(const T* p) noexcept {
    return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}

template <class T>
POLYVEC_INLINE void store(T* p, Vec<T> v) noexcept {
    *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}

// Fetch the cache line of p for writing: a store that finds its line absent waits for it, and the stores after it wait
// too.
POLYVEC_INLINE void prefetch_to_write(void* p) noexcept {
#if defined(__x86_64__)
    asm volatile("prefetchw %0" : : "m"(*static_cast<char*>(p)));
#elif defined(__aarch64__)
    asm volatile("prfm pstl1keep, %a0" : : "p"(p));
#else
    __builtin_prefetch(p, 1);
#endif
}

// ---- arithmetic; V is a vector type, so that these serve every element type

// All lanes x. Written as a difference because x - 0 is x for every x, signed zeros too, so that one
// broadcast remains of it; x + 0 is not, and costs an addition.
template <class T>
POLYVEC_INLINE Vec<T> broadcast(T x) noexcept {
    return x - Vec<T>{};
}

// 0, 1, 2, ... in the integer type of T's size.
template <class T>
POLYVEC_INLINE Mask<T> lane_numbers() noexcept {
    Mask<T> v{};
    for (size_t k = 0; k < lanes<T>; ++k) v[k] = static_cast<int>(k);
    return v;
}

// Set in the first n lanes (n at most lanes<T>).
template <class T>
POLYVEC_INLINE Mask<T> first_lanes(size_t n) noexcept {
    return lane_numbers<T>() < static_cast<int>(n) - Mask<T>{};
}

template <class V>
POLYVEC_INLINE V fma(V a, V b, V c) noexcept {
    return a * b + c;
}

// Tell the compiler that v changes here and lives in a register. An accumulator so kept is neither moved
// about nor spilled by an unrolled loop.
template <class V>
POLYVEC_INLINE void keep_in_register(V& v) noexcept {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
}

// yes where the mask is set, no elsewhere.
template <class M, class V>
POLYVEC_INLINE V select(M mask, V yes, V no) noexcept {
    return mask ? yes : no;
}

// The second operand where the comparison is false, hence where either is NaN: max(x, best) never lets a NaN
// in.
template <class V>
POLYVEC_INLINE V min(V a, V b) noexcept {
    return a < b ? a : b;
}
template <class V>
POLYVEC_INLINE V max(V a, V b) noexcept {
    return a > b ? a : b;
}

// Rounded correctly; GCC and Clang make one instruction of the loop.
template <class T>
POLYVEC_INLINE Vec<T> sqrt(Vec<T> v) noexcept {
    for (size_t k = 0; k < lanes<T>; ++k) {
        v[k] = sizeof(T) == sizeof(float) ? __builtin_sqrtf(v[k]) : __builtin_sqrt(v[k]);
    }
    return v;
}

// Absolute value of floating-point lanes: clears the sign bit.
template <class V>
POLYVEC_INLINE V abs(V v) noexcept {
    using Bits = decltype(v < v);
    return (V)((Bits)v & ~(Bits)(-V{}));
}

// ---- across lanes, by halving: the order of a sum depends on nothing but the lane count, and is the same for both
// forms of reduce_add

template <class V>
POLYVEC_INLINE auto reduce_add(V v) noexcept {
    if constexpr (lanes_of<V> == 2) {
        return v[0] + v[1];
    } else {
        return reduce_add(lower_half(v) + upper_half(v));
    }
}

// Of all segments of S lanes of a and b, the lower halves plus the upper halves.
template <int S, class V, int... K>
POLYVEC_INLINE auto add_halves(V a, V b, Lanes<K...>) noexcept {
    constexpr int half = S / 2;
    return __builtin_shufflevector(a, b, (K / half * S + K % half)...) +
           __builtin_shufflevector(a, b, (K / half * S + K % half + half)...);
}

// The sums of four vectors as one of four lanes.
template <class V>
POLYVEC_INLINE auto reduce_add(const V (&v)[4]) noexcept {
    constexpr int L = lanes_of<V>;
    const auto all = typename LaneRange<0, L>::type{};
    const V sums = add_halves<L / 2>(add_halves<L>(v[0], v[1], all), add_halves<L>(v[2], v[3], all), all);
    if constexpr (L == 4) {
        return sums;
    } else {
        const auto pairs = add_halves<L / 4>(sums, sums, typename LaneRange<0, L / 2>::type{});
        if constexpr (L == 8) {
            return pairs;
        } else {
            return add_halves<L / 8>(pairs, pairs, typename LaneRange<0, L / 4>::type{});
        }
    }
}

template <class V>
POLYVEC_INLINE auto reduce_min(V v) noexcept {
    if constexpr (lanes_of<V> == 2) {
        return v[0] < v[1] ? v[0] : v[1];
    } else {
        return reduce_min(min(lower_half(v), upper_half(v)));
    }
}
template <class V>
POLYVEC_INLINE auto reduce_max(V v) noexcept {
    if constexpr (lanes_of<V> == 2) {
        return v[0] > v[1] ? v[0] : v[1];
    } else {
        return reduce_max(max(lower_half(v), upper_half(v)));
    }
}

}  // namespace
}  // namespace polyvec::POLYVEC_ISA

// load_first, store_first, bits, any: what the vector extensions have no words for.
#if defined(__x86_64__)
#include "simd_x86.hpp"
#else
#include "simd_neon.hpp"
#endif

#if !defined(POLYVEC_MATRIX_UNIT)
namespace polyvec::POLYVEC_ISA {
namespace {

template <bool>
struct MatrixUnit {};  // simd_x86.hpp has one that is

}  // namespace
}  // namespace polyvec::POLYVEC_ISA
#endif
