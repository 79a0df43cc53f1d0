#include "polyvec/finite.hpp"

#include <algorithm>
#include <atomic>
#include <limits>

#include "polyvec/parallel.hpp"

namespace polyvec {
namespace {

/// `exponent`: its bits, all ones in NaN and Inf. Integer tests vectorise at the baseline, where float ones would not.
template <class Bits>
bool finite(const Bits* bits, std::int64_t n, Bits exponent) {
    bool bad = false;
    for (std::int64_t i = 0; i < n; ++i) bad |= (bits[i] & exponent) == exponent;
    return !bad;
}

template <class Bits>
std::int64_t search(const Array& x, Bits exponent, int num_threads) {
    const std::int64_t n = x.dim(0), width = n ? x.size() / n : 0;
    const Bits* data = x.as<const Bits>();
    std::atomic<std::int64_t> first{std::numeric_limits<std::int64_t>::max()};
    parallel_for(n, std::max<std::int64_t>(1, (1 << 16) / std::max<std::int64_t>(1, width)), num_threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     if (begin > first || finite(data + begin * width, (end - begin) * width, exponent)) return;
                     std::int64_t row = begin;
                     while (finite(data + row * width, width, exponent)) ++row;
                     std::int64_t seen = first;
                     while (row < seen && !first.compare_exchange_weak(seen, row)) {
                     }
                 });
    return first == std::numeric_limits<std::int64_t>::max() ? -1 : first.load();
}

}  // namespace

std::int64_t first_nonfinite_row(const Array& x, Cpu cpu) {
    switch (x.dtype) {
        case DType::f64:
            return search<std::uint64_t>(x, 0x7ff0000000000000, cpu.num_threads);
        case DType::f32:
            return search<std::uint32_t>(x, 0x7f800000, cpu.num_threads);
        case DType::f16:
            return search<std::uint16_t>(x, 0x7c00, cpu.num_threads);
        default:
            return search<std::uint16_t>(x, 0x7f80, cpu.num_threads);
    }
}

}  // namespace polyvec
