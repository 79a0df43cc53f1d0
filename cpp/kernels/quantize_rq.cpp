// The best sums of codewords for residual quantisation.
//
// A vector's products with the codewords are the same for every sum of its beam: what a sum adds is a row of inner
// products for each codeword it has, which a table holds. A beam costs additions, not products.
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t L = lanes<float>;
constexpr size_t most_codewords = 256;

/// Puts a hit in its place among the `found` best, of which there are never more than `wanted`.
POLYVEC_INLINE size_t insert(ScanHit* best, size_t found, size_t wanted, float value, uint32_t at) noexcept {
    size_t place = found < wanted ? found : wanted - 1;
    found = place + 1;
    for (; place > 0 && best[place - 1].value < value; --place) best[place] = best[place - 1];
    best[place] = {value, at};
    return found;
}

/// U vectors of codewords with one sum.
template <size_t U>
POLYVEC_INLINE size_t extend_sum(const RqBeam& beam, const float* values, size_t sum, size_t c, size_t wanted,
                                 ScanHit* best, size_t found) noexcept {
    Vec<float> value[U];
    for (size_t u = 0; u < U; ++u) {
        value[u] = load(values + c + u * L) + broadcast(beam.scores[sum]);
        keep_in_register(value[u]);
    }
    const float* const* rows = beam.crossings + sum * beam.levels;
    for (size_t l = 0; l < beam.levels; ++l) {
        for (size_t u = 0; u < U; ++u) {
            value[u] -= load(rows[l] + c + u * L);
            keep_in_register(value[u]);
        }
    }
    for (size_t u = 0; u < U; ++u) {
        const float floor = found < wanted ? -__builtin_inff() : best[wanted - 1].value;
        for (uint32_t set = bits(value[u] > broadcast(floor)); set; set &= set - 1) {
            const auto lane = static_cast<size_t>(__builtin_ctz(set));
            if (found < wanted || value[u][lane] > best[wanted - 1].value)
                found =
                    insert(best, found, wanted, value[u][lane], static_cast<uint32_t>(sum * beam.k + c + u * L + lane));
        }
    }
    return found;
}

size_t extend(const RqBeam& beam, size_t wanted, ScanHit* best) noexcept {
    alignas(64) float values[most_codewords];
    for (size_t c = 0, piece = 0; c < beam.k; ++piece) {
        const float* products = beam.products + piece * beam.stride;
        for (size_t i = 0; i < beam.width && c < beam.k; i += L, c += L)
            store(values + c, load(products + i) + load(beam.offsets + c));
    }
    constexpr size_t U = L == 16 ? 1 : 16 / L;  // at most 16 codewords: there may be no more
    size_t found = 0;
    for (size_t sum = 0; sum < beam.sums; ++sum) {
        if (beam.k == most_codewords) {
            for (size_t c = 0; c < most_codewords; c += 8 * L)
                found = extend_sum<8>(beam, values, sum, c, wanted, best, found);
        } else {
            for (size_t c = 0; c < beam.k; c += U * L) found = extend_sum<U>(beam, values, sum, c, wanted, best, found);
        }
    }
    for (; found < wanted; ++found) best[found] = {-__builtin_inff(), 0};  // values that overflow beat nothing
    return found;
}

}  // namespace

extern const RqKernels rq_kernels;
const RqKernels rq_kernels{extend};

}  // namespace polyvec::POLYVEC_ISA
