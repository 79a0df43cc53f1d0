// Rows of two bits an element, and what one query is far from those that ids name.
//
// A walk waits for memory. A row of 384 elements is two cache lines; the high bits are in the first one, and four of
// five rows turn out too far away by those alone. A byte holds a bit of eight elements; each of them times its byte of
// the query fits a 16-bit lane together with the next one's, and so do the sums of 64 bytes (8 * 4 * 127 at most).
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t block = 64;  // bytes of a plane that a block of the query's values belongs to
constexpr size_t group = 4;   // rows computed together
constexpr size_t line = 64, most_fetched = 4 * line;

using Word = uint32_t;

#if defined(POLYVEC_NARROW_PRODUCTS)
using Sums = Vec<int32_t>;

POLYVEC_INLINE Sums add_products(Sums sum, Vec<Word> bits, Vec<Word> query) noexcept {
    return add_byte_quads(sum, bits, query);
}
POLYVEC_INLINE Vec<int32_t> widen(Sums sum) noexcept {
    return sum;
}
#elif defined(POLYVEC_BYTE_PAIRS)
using Sums = Vec<int16_t>;

POLYVEC_INLINE Sums add_products(Sums sum, Vec<Word> bits, Vec<Word> query) noexcept {
    return sum + multiply_byte_pairs(bits, query);
}
POLYVEC_INLINE Vec<int32_t> widen(Sums sum) noexcept {
    return multiply_pairs((Vec<Word>)sum, broadcast<Word>(0x00010001));
}
#else
using Sums = Vec<int32_t>;

POLYVEC_INLINE Sums add_products(Sums sum, Vec<Word> bits, Vec<Word> query) noexcept {
    const auto pairs = (Vec<int16_t>)query;
    const auto even = (Vec<Word>)((pairs << 8) >> 8), odd = (Vec<Word>)(pairs >> 8);
    const Vec<Word> low_bytes = broadcast<Word>(0x00ff00ff);
    return sum + multiply_pairs(bits & low_bytes, even) + multiply_pairs((bits >> 8) & low_bytes, odd);
}
POLYVEC_INLINE Vec<int32_t> widen(Sums sum) noexcept {
    return sum;
}
#endif

/// The sums of the values where a plane has a bit, of J planes.
template <size_t J>
POLYVEC_INLINE void add_values(const uint8_t* values, const uint8_t* const (&plane)[J], size_t bytes,
                               Vec<int32_t> (&sum)[J]) noexcept {
    constexpr size_t width = POLYVEC_VECTOR_BYTES, word = sizeof(Word);
    const Vec<Word> lowest = broadcast<Word>(0x01010101);
    for (size_t j = 0; j < J; ++j) sum[j] = Vec<int32_t>{};
    for (size_t first = 0; first < bytes; first += block) {
        const size_t left = bytes - first;
        Sums part[J][2];
        for (size_t j = 0; j < J; ++j) part[j][0] = part[j][1] = Sums{};
        for (size_t at = 0; at < block && at < left; at += width) {
            const auto* const q = reinterpret_cast<const Word*>(values + 8 * first + at);
            Vec<Word> x[J];
            for (size_t j = 0; j < J; ++j) {
                const auto* const p = reinterpret_cast<const Word*>(plane[j] + first + at);
                x[j] = left - at >= width ? load(p) : load_first(p, (left - at) / word);
            }
            for (size_t bit = 0; bit < 8; ++bit) {
                const Vec<Word> v = load(q + bit * (block / word));
                for (size_t j = 0; j < J; ++j) {
                    part[j][bit % 2] = add_products(part[j][bit % 2], (x[j] >> bit) & lowest, v);
                    keep_in_register(part[j][bit % 2]);
                }
            }
        }
        for (size_t j = 0; j < J; ++j) sum[j] += widen(part[j][0] + part[j][1]);
    }
}

POLYVEC_INLINE float factor_of(const uint8_t* row, size_t plane, size_t i) noexcept {
    float factor;
    __builtin_memcpy(&factor, row + plane + i * sizeof(float), sizeof factor);
    return factor;
}

void distances(const BitQuery& query, const BitRows& rows, const uint32_t* ids, size_t n, float* out) noexcept {
    const size_t plane = rows.plane;
    const auto row_of = [&](size_t k) { return rows.first + ids[k] * rows.first_stride; };
    const auto low_of = [&](size_t k) { return rows.second + ids[k] * rows.second_stride; };
    const auto distance = [&](const uint8_t* row, int32_t high, int32_t low) {
        const auto product = static_cast<float>(4 * high + 2 * low - 3 * query.sum);
        return query.constant + factor_of(row, plane, 1) * query.weight +
               product * factor_of(row, plane, 2) * query.factor;
    };
    size_t k = 0;
    for (; k + 2 <= n; k += 2) {
        const uint8_t *const a = row_of(k), *const b = row_of(k + 1);
        const uint8_t* const planes[4] = {a, low_of(k), b, low_of(k + 1)};
        Vec<int32_t> sum[4];
        add_values(query.values, planes, plane, sum);
        const auto sums = reduce_add(sum);
        out[k] = distance(a, sums[0], sums[1]);
        out[k + 1] = distance(b, sums[2], sums[3]);
    }
    if (k < n) {
        const uint8_t* const row = row_of(k);
        const uint8_t* const planes[2] = {row, low_of(k)};
        Vec<int32_t> sum[2];
        add_values(query.values, planes, plane, sum);
        out[k] = distance(row, reduce_add(sum[0]), reduce_add(sum[1]));
    }
}

size_t select_near(const BitQuery& query, const BitRows& rows, const uint32_t* ids, size_t n, float most,
                   uint32_t* near) noexcept {
    constexpr size_t batch = 16;
    const size_t plane = rows.plane;
    int32_t sums[batch];
    float scale[batch], added[batch], least[batch];
    size_t count = 0;
    for (size_t first = 0; first < n; first += batch) {
        const size_t left = n - first < batch ? n - first : batch, kept = count;
        const auto row_of = [&](size_t k) { return rows.first + ids[first + k] * rows.first_stride; };
        for (size_t k = 0; k < left; k += group) {
            const uint8_t* row[group];
            for (size_t j = 0; j < group; ++j) {
                row[j] = row_of(k + j < left ? k + j : k);
                scale[k + j] = factor_of(row[j], plane, 0);
                added[k + j] = factor_of(row[j], plane, 1);
            }
            Vec<int32_t> sum[group];
            add_values(query.values, row, plane, sum);
            *reinterpret_cast<typename VecOf<int32_t, group * sizeof(int32_t)>::unaligned*>(sums + k) = reduce_add(sum);
        }
        for (size_t k = 0; k < batch; k += lanes<float>) {
            const Vec<float> product = __builtin_convertvector(2 * load(sums + k) - query.sum, Vec<float>);
            store(least + k, query.constant + load(added + k) * query.weight +
                                 (product * query.factor - query.slack) * load(scale + k));
        }
        for (size_t k = 0; k < left; ++k) {
            near[count] = ids[first + k];
            count += !(least[k] > most);
        }
        for (size_t k = kept; k < count; ++k) {
            const uint8_t* const low = rows.second + near[k] * rows.second_stride;
            for (size_t at = 0; at < plane && at < most_fetched; at += line) prefetch(low + at);
        }
    }
    return count;
}

}  // namespace

extern const BitDistanceKernels bit_distance_kernels;
const BitDistanceKernels bit_distance_kernels{distances, select_near};

}  // namespace polyvec::POLYVEC_ISA
