#include "polyvec/finite.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>

#include "polyvec/parallel.hpp"

namespace polyvec {
namespace {

/// An exponent of all ones means NaN or Inf. Integer tests vectorise at the baseline, where float ones would not.
template <class T>
bool finite(const T* x, std::int64_t n) {
    using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
    constexpr Bits exponent = sizeof(T) == 4 ? Bits(0x7f800000u) : Bits(0x7ff0000000000000u);
    const Bits* bits = reinterpret_cast<const Bits*>(x);
    bool bad = false;
    for (std::int64_t i = 0; i < n; ++i) bad |= (bits[i] & exponent) == exponent;
    return !bad;
}

template <class T>
std::int64_t search(const Array& x, int num_threads) {
    const std::int64_t n = x.dim(0), width = n ? x.size() / n : 0;
    const T* data = x.as<const T>();
    std::atomic<std::int64_t> first{std::numeric_limits<std::int64_t>::max()};
    parallel_for(n, std::max<std::int64_t>(1, (1 << 16) / std::max<std::int64_t>(1, width)), num_threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     if (begin > first || finite(data + begin * width, (end - begin) * width)) return;
                     std::int64_t row = begin;
                     while (finite(data + row * width, width)) ++row;
                     std::int64_t seen = first;
                     while (row < seen && !first.compare_exchange_weak(seen, row)) {
                     }
                 });
    return first == std::numeric_limits<std::int64_t>::max() ? -1 : first.load();
}

}  // namespace

std::int64_t first_nonfinite_row(const Array& x, Cpu cpu) {
    return x.dtype == DType::f32 ? search<float>(x, cpu.num_threads) : search<double>(x, cpu.num_threads);
}

}  // namespace polyvec
