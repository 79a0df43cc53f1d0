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

// e^x = 2^n e^r, n the integer nearest to x / ln 2, |r| <= ln 2 / 2, and e^r its Taylor series. Each is a chain of a
// dozen operations: several side by side take the time of two or three.
template <class T, size_t N>
POLYVEC_INLINE void exp(Vec<T> (&x)[N]) noexcept {
    using C = ExpConstants<T>;
    constexpr T per_ln2 = static_cast<T>(1.44269504088896340736);
    T coefficient[C::terms + 1] = {1};
    for (int k = 1; k <= C::terms; ++k) coefficient[k] = coefficient[k - 1] / static_cast<T>(k);
    Vec<T> shifted[N], r[N], power[N];
    Vec<T> smallest = broadcast(C::smallest), largest = broadcast(C::largest);
    keep_in_register(smallest);  // or GCC compares and selects in place of a minimum and a maximum
    keep_in_register(largest);
    for (size_t j = 0; j < N; ++j) {
        const Vec<T> clamped = min(max(x[j], smallest), largest);
        shifted[j] = fma(clamped, broadcast(per_ln2), broadcast(C::magic));
        const Vec<T> n = shifted[j] - C::magic;
        r[j] = fma(n, broadcast(-C::ln2_low), fma(n, broadcast(-C::ln2_high), clamped));
        power[j] = broadcast(coefficient[C::terms]);
    }
    for (int k = C::terms - 1; k >= 0; --k) {
        for (size_t j = 0; j < N; ++j) power[j] = fma(power[j], r[j], broadcast(coefficient[k]));
    }
    for (size_t j = 0; j < N; ++j) {
        const auto result = (Vec<T>)((Mask<T>)power[j] + ((Mask<T>)shifted[j] << C::mantissa_bits));
        x[j] = select(x[j] < smallest, Vec<T>{}, result);
    }
}

template <class T>
POLYVEC_INLINE Vec<T> exp(Vec<T> x) noexcept {
    Vec<T> one[1] = {x};
    exp<T>(one);
    return one[0];
}

}  // namespace
}  // namespace polyvec::POLYVEC_ISA
