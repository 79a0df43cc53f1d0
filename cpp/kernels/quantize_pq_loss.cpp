// Labels of product quantisation that lose least of the inner products that count.
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t L = lanes<float>;

bool improve(const PqLoss& loss, uint8_t* labels) noexcept {
    float along = loss.square;  // <x, x - decoded>
    for (size_t s = 0; s < loss.m; ++s) along -= loss.products[s * loss.k + labels[s]];
    bool changed = false;
    for (size_t s = 0; s < loss.m; ++s) {
        const float *products = loss.products + s * loss.k, *squares = loss.squares + s * loss.k;
        const float others = along + products[labels[s]];
        Vec<float> least = broadcast(__builtin_inff());
        Vec<int32_t> at{}, c = lane_numbers<float>();
        for (size_t i = 0; i < loss.k; i += L, c += static_cast<int32_t>(L)) {
            const Vec<float> product = load(products + i), left = others - product;
            const Vec<float> value = fma(left * loss.weight, left, fma(product, broadcast(-2.0f), load(squares + i)));
            const Mask<float> better = value < least;
            least = select(better, value, least);
            at = select(better, c, at);
        }
        float best = least[0];
        int32_t label = at[0];
        for (size_t j = 1; j < L; ++j) {
            if (least[j] < best || (least[j] == best && at[j] < label)) {
                best = least[j];
                label = at[j];
            }
        }
        changed |= label != labels[s];
        labels[s] = static_cast<uint8_t>(label);
        along = others - products[label];
    }
    return changed;
}

}  // namespace

extern const PqLossKernels pq_loss_kernels;
const PqLossKernels pq_loss_kernels{improve};

}  // namespace polyvec::POLYVEC_ISA
