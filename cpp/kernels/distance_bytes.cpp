// Rows of one byte an element, and what one query is far from those that ids name.
//
// A value is (byte - 128) * scale of its row; queries are signed bytes. Products of an unsigned and a signed byte are
// what AVX-512 VNNI adds by fours; the share of the 128s depends on the query alone. Sums are exact in 32 bits up to
// byte_width_limit elements.
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

using Word = uint32_t;
constexpr size_t L = lanes<float>;
constexpr size_t group = 4;  // rows computed together

template <class T>
using Four = typename VecOf<T, 4 * sizeof(T)>::type;

/// sum + the products of the four bytes of each lane, those of x unsigned and those of y signed.
POLYVEC_INLINE Vec<int32_t> add_products(Vec<int32_t> sum, Vec<Word> x, Vec<Word> y) noexcept {
#if defined(POLYVEC_NARROW_PRODUCTS)
    return add_byte_quads(sum, x, y);
#else
    const auto signed_halves = (Vec<int16_t>)y;
    const auto even = (Vec<Word>)((signed_halves << 8) >> 8), odd = (Vec<Word>)(signed_halves >> 8);
    const Vec<Word> low_bytes = broadcast<Word>(0x00ff00ff);
    return sum + multiply_pairs(x & low_bytes, even) + multiply_pairs((x >> 8) & low_bytes, odd);
#endif
}

POLYVEC_INLINE Vec<Word> load_words(const uint8_t* p) noexcept {
    return load(reinterpret_cast<const Word*>(p));
}

ByteCode encode(const float* x, size_t d, size_t stride, int bias, int most, uint8_t* bytes) noexcept {
    const auto part = [&](size_t i) { return d - i >= L ? load(x + i) : load_first(x + i, d - i); };
    Vec<float> largest{};
    for (size_t i = 0; i < d; i += L) largest = max(abs(part(i)), largest);
    constexpr float least = 1e-36f;  // below it 127 / |x| is not finite
    const auto limit = static_cast<float>(most);
    const float size = reduce_max(largest), up = size > least ? limit / size : 0.0f;

    // Added to a small number, it leaves the number rounded to the nearest integer in the lowest bits of the sum.
    constexpr float rounder = 12582912.0f;
    constexpr int32_t rounder_bits = 0x4b400000;
    Vec<int32_t> sum{}, squares{};
    for (size_t i = 0; i < stride; i += L) {
        const Vec<float> scaled = (i < d ? part(i) : Vec<float>{}) * up;
        const Vec<int32_t> value = (Vec<int32_t>)(scaled + rounder) - rounder_bits;
        sum += value;
        squares += value * value;
        using Bytes = typename VecOf<uint8_t, L>::type;
        *reinterpret_cast<typename VecOf<uint8_t, L>::unaligned*>(bytes + i) =
            __builtin_convertvector(value + bias, Bytes);
    }
    const float scale = up > 0 ? size / limit : 0.0f;
    return {scale, static_cast<float>(reduce_add(squares)) * scale * scale, reduce_add(sum)};
}

int32_t query_of_row(const uint8_t* row, size_t stride, uint8_t* query) noexcept {
    Vec<int32_t> sum{};
    for (size_t i = 0; i < stride; i += 4 * L) {
        const Vec<Word> value = load_words(row + i) ^ broadcast<Word>(0x80808080);
        store(reinterpret_cast<Word*>(query + i), value);
        sum = add_products(sum, broadcast<Word>(0x01010101), value);
    }
    return reduce_add(sum);
}

template <size_t J>
POLYVEC_INLINE void products(const uint8_t* query, const uint8_t* const (&row)[J], size_t stride,
                             Vec<int32_t> (&sum)[J]) noexcept {
    for (size_t j = 0; j < J; ++j) sum[j] = Vec<int32_t>{};
    for (size_t i = 0; i < stride; i += 4 * L) {
        const Vec<Word> q = load_words(query + i);
        for (size_t j = 0; j < J; ++j) sum[j] = add_products(sum[j], load_words(row[j] + i), q);
    }
}

void distances(const ByteQuery& query, const ByteRows& rows, const uint32_t* ids, size_t n, float* out) noexcept {
    const size_t stride = rows.stride;
    const auto row_of = [&](size_t k) { return rows.bytes + ids[k] * stride; };
    const auto factors_of = [&](size_t k) { return rows.factors + ids[k] * size_t{2}; };
    size_t k = 0;
    for (; k + group <= n; k += group) {
        const uint8_t* const row[group] = {row_of(k), row_of(k + 1), row_of(k + 2), row_of(k + 3)};
        const float *a = factors_of(k), *b = factors_of(k + 1), *c = factors_of(k + 2), *e = factors_of(k + 3);
        Vec<int32_t> sum[group];
        products(query.values, row, stride, sum);
        const auto product = __builtin_convertvector(reduce_add(sum) - query.offset, Four<float>);
        const Four<float> scale = {a[0], b[0], c[0], e[0]}, square = {a[1], b[1], c[1], e[1]};
        *reinterpret_cast<typename VecOf<float, 4 * sizeof(float)>::unaligned*>(out + k) =
            query.constant + square + product * scale * query.factor;
    }
    for (; k < n; ++k) {
        const uint8_t* const row[1] = {row_of(k)};
        Vec<int32_t> sum[1];
        products(query.values, row, stride, sum);
        const auto product = static_cast<float>(reduce_add(sum[0]) - query.offset);
        out[k] = query.constant + factors_of(k)[1] + product * factors_of(k)[0] * query.factor;
    }
}

}  // namespace

extern const ByteDistanceKernels byte_distance_kernels;
const ByteDistanceKernels byte_distance_kernels{encode, query_of_row, distances};

}  // namespace polyvec::POLYVEC_ISA
