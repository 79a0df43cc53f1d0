// Labels of product quantisation that lose least of the inner products that count.
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t L = lanes<float>;

void improve(const PqLoss& loss, size_t most_passes, uint8_t* labels) noexcept {
    size_t settled = 0;  // subspaces, one after the other, whose labels are the best beside all others
    for (size_t pass = 0; pass < most_passes && settled < loss.m; ++pass) {
        float along = loss.square;  // <x, x - decoded>
        for (size_t s = 0; s < loss.m; ++s) along -= loss.products[s * loss.k + labels[s]];
        for (size_t s = 0; s < loss.m && settled < loss.m; ++s) {
            const float *products = loss.products + s * loss.k, *squares = loss.squares + s * loss.k;
            const float others = along + products[labels[s]];
            Vec<float> least = broadcast(__builtin_inff());
            Vec<int32_t> at{}, c = lane_numbers<float>();
            for (size_t i = 0; i < loss.k; i += L, c += static_cast<int32_t>(L)) {
                const Vec<float> product = load(products + i), left = others - product;
                const Vec<float> value =
                    fma(left * loss.weight, left, fma(product, broadcast(-2.0f), load(squares + i)));
                const Mask<float> better = value < least;
                least = select(better, value, least);
                at = select(better, c, at);
            }
            const Vec<int32_t> best = select(least == broadcast(reduce_min(least)), at, broadcast(INT32_MAX));
            const int32_t label = reduce_min(best);
            settled = label == labels[s] ? settled + 1 : 1;
            labels[s] = static_cast<uint8_t>(label);
            along = others - products[label];
        }
    }
}

}  // namespace

extern const PqLossKernels pq_loss_kernels;
const PqLossKernels pq_loss_kernels{improve};

}  // namespace polyvec::POLYVEC_ISA
