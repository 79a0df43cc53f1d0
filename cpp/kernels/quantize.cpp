// Sums of clusters for k-means.
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t L = lanes<float>;

template <class Half>
POLYVEC_INLINE Vec<double> widen(Half v) noexcept {
    return __builtin_convertvector(v, Vec<double>);
}

void sum_rows(const float* x, const int64_t* rows, size_t n, size_t d, const float* scale, double* sum) noexcept {
    constexpr size_t half = L / 2;
    for (size_t i = 0; i < d; i += L) {
        const size_t width = d - i < L ? d - i : L;
        Vec<double> low{}, high{};
        for (size_t k = 0; k < n; ++k) {
            const size_t row = static_cast<size_t>(rows[k]);
            const float* at = x + row * d + i;
            const Vec<float> v = width == L ? load(at) : load_first(at, width);
            const Vec<double> factor = broadcast(scale ? static_cast<double>(scale[row]) : 1.0);
            low = fma(widen(lower_half(v)), factor, low);
            high = fma(widen(upper_half(v)), factor, high);
        }
        store_first(sum + i, low, width < half ? width : half);
        if (width > half) store_first(sum + i + half, high, width - half);
    }
}

}  // namespace

extern const QuantizeKernels quantize_kernels;
const QuantizeKernels quantize_kernels{sum_rows};

}  // namespace polyvec::POLYVEC_ISA
