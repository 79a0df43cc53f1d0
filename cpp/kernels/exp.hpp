// exp, to within 2 units in the last place where the result is a normal number, and 0 below that.
#pragma once

#include "simd.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
    static constexpr int terms = 7, mantissa_bits = 23;
    static constexpr float smallest = -87.33654f, largest = 88.72283f;          // exp beyond them is no normal number
    static constexpr float magic = 12582912.0f;                                 // 1.5 * 2^23: x + magic rounds x
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // the product of high and n is exact
};

template <>
struct ExpConstants<double> {
    static constexpr int terms = 13, mantissa_bits = 52;
    static constexpr double smallest = -708.3964185322641, largest = 709.782712893384;
    static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
};

// e^x = 2^n e^r, n the integer nearest to x / ln 2, |r| <= ln 2 / 2, and e^r its Taylor series.
template <class T>
POLYVEC_INLINE Vec<T> exp(Vec<T> x) noexcept {
    using C = ExpConstants<T>;
    constexpr T per_ln2 = static_cast<T>(1.44269504088896340736);
    const Vec<T> largest = broadcast(C::largest), clamped = min(max(x, broadcast(C::smallest)), largest);
    const Vec<T> shifted = fma(clamped, broadcast(per_ln2), broadcast(C::magic)), n = shifted - C::magic;
    const Vec<T> r = fma(n, broadcast(-C::ln2_low), fma(n, broadcast(-C::ln2_high), clamped));
    T coefficient[C::terms + 1] = {1};
    for (int k = 1; k <= C::terms; ++k) coefficient[k] = coefficient[k - 1] / static_cast<T>(k);
    Vec<T> power = broadcast(coefficient[C::terms]);
    for (int k = C::terms - 1; k >= 0; --k) power = fma(power, r, broadcast(coefficient[k]));
    const Vec<T> result = (Vec<T>)((Mask<T>)power + ((Mask<T>)shifted << C::mantissa_bits));
    return select(x < C::smallest - Vec<T>{}, Vec<T>{}, result);
}

}  // namespace
}  // namespace polyvec::POLYVEC_ISA
