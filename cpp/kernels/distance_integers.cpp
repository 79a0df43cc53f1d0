// Rows of integers of 8 or 4 bits, and what one query is far from those that ids name.
//
// A value is (code - bias) * scale of its row; queries are signed bytes. Products of an unsigned and a signed byte are
// what AVX-512 VNNI adds by fours, and AVX2 by pairs into 16 bits, where only those of 4-bit codes fit; the share of
// the bias depends on the query alone. Sums are exact in 32 bits up to most_int8 elements.
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

using Word = uint32_t;
constexpr size_t L = lanes<float>;
constexpr size_t V = 4 * L;    // bytes of a register
constexpr size_t group = 4;    // rows computed together
constexpr size_t column = 64;  // bytes of a row of 4-bit codes: two runs of as many elements

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
POLYVEC_INLINE void store_words(uint8_t* p, Vec<Word> v) noexcept {
    store(reinterpret_cast<Word*>(p), v);
}
POLYVEC_INLINE Vec<Word> low_codes(Vec<Word> v) noexcept {
    return v & broadcast<Word>(0x0f0f0f0f);
}

/// The values of x (d,) over a scale, rounded, the largest of which is `most`; zeros from d on.
class Encoder {
public:
    Encoder(const float* x, size_t d, int most) : x_(x), d_(d), limit_(static_cast<float>(most)) {
        Vec<float> largest{};
        for (size_t i = 0; i < d; i += L) largest = max(abs(part(i)), largest);
        constexpr float least = 1e-36f;  // below it 127 / |x| is not finite
        size_ = reduce_max(largest);
        up_ = size_ > least ? limit_ / size_ : 0.0f;
    }

    POLYVEC_INLINE Vec<int32_t> values(size_t i) {
        // Added to a small number, it leaves the number rounded to the nearest integer in the lowest bits of the sum.
        constexpr float rounder = 12582912.0f;
        constexpr int32_t rounder_bits = 0x4b400000;
        Vec<float> scaled = (i < d_ ? part(i) : Vec<float>{}) * up_;
        keep_in_register(scaled);  // else one fused step, and other codes than where there is none
        const Vec<int32_t> value = (Vec<int32_t>)(scaled + rounder) - rounder_bits;
        sum_ += value;
        squares_ += value * value;
        return value;
    }

    /// Of all values so far.
    IntegerCode code() const {
        const float scale = up_ > 0 ? size_ / limit_ : 0.0f;
        return {scale, static_cast<float>(reduce_add(squares_)) * scale * scale, reduce_add(sum_)};
    }

private:
    POLYVEC_INLINE Vec<float> part(size_t i) const { return d_ - i >= L ? load(x_ + i) : load_first(x_ + i, d_ - i); }

    const float* x_;
    size_t d_;
    float limit_, size_, up_;
    Vec<int32_t> sum_{}, squares_{};
};

POLYVEC_INLINE void store_bytes(uint8_t* p, Vec<int32_t> v) noexcept {
    using Bytes = typename VecOf<uint8_t, L>::type;
    *reinterpret_cast<typename VecOf<uint8_t, L>::unaligned*>(p) = __builtin_convertvector(v, Bytes);
}

IntegerCode encode_query(const float* x, size_t d, size_t n, int most, uint8_t* values) noexcept {
    Encoder encoder(x, d, most);
    for (size_t i = 0; i < n; i += L) store_bytes(values + i, encoder.values(i));
    return encoder.code();
}

struct Int8 {
    static constexpr int bits = 8, bias = 128, most = 127;

    static IntegerCode encode(const float* x, size_t d, size_t stride, uint8_t* row) noexcept {
        Encoder encoder(x, d, most);
        for (size_t i = 0; i < stride; i += L) store_bytes(row + i, encoder.values(i) + bias);
        return encoder.code();
    }

    /// As signed bytes.
    POLYVEC_INLINE static Vec<Word> values_of(const uint8_t* row) noexcept {
        return load_words(row) ^ broadcast<Word>(0x80808080);
    }

    static int32_t query_of_row(const uint8_t* row, size_t stride, uint8_t* query) noexcept {
        Vec<int32_t> sum{};
        for (size_t i = 0; i < stride; i += V) {
            const Vec<Word> value = values_of(row + i);
            store_words(query + i, value);
            sum = add_products(sum, broadcast<Word>(0x01010101), value);
        }
        return reduce_add(sum);
    }

    template <size_t J>
    POLYVEC_INLINE static void products(const uint8_t* query, const uint8_t* const (&row)[J], size_t stride,
                                        Vec<int32_t> (&sum)[J]) noexcept {
        for (size_t j = 0; j < J; ++j) sum[j] = Vec<int32_t>{};
        for (size_t i = 0; i < stride; i += V) {
            const Vec<Word> q = load_words(query + i);
            for (size_t j = 0; j < J; ++j) sum[j] = add_products(sum[j], load_words(row[j] + i), q);
        }
    }
};

struct Int4 {
    static constexpr int bits = 4, bias = 8, most = 7;

    static IntegerCode encode(const float* x, size_t d, size_t stride, uint8_t* row) noexcept {
        Encoder encoder(x, d, most);
        for (size_t i = 0; i < stride; i += L) {
            const size_t element = i / column * column + i;
            const Vec<int32_t> low = encoder.values(element), high = encoder.values(element + column);
            store_bytes(row + i, (low + bias) | (high + bias) << 4);
        }
        return encoder.code();
    }

    static int32_t query_of_row(const uint8_t* row, size_t stride, uint8_t* query) noexcept {
        Vec<int32_t> sum{};
        for (size_t i = 0; i < stride; i += V) {
            uint8_t* const to = query + i / column * column + i;
            const auto take = [&](Vec<Word> codes, uint8_t* values) {
                const auto value = (Vec<Word>)((Vec<int8_t>)low_codes(codes) - static_cast<int8_t>(bias));
                store_words(values, value);
                sum = add_products(sum, broadcast<Word>(0x01010101), value);
            };
            const Vec<Word> codes = load_words(row + i);
            take(codes, to);
            take(codes >> 4, to + column);
        }
        return reduce_add(sum);
    }

    template <size_t J>
    POLYVEC_INLINE static void products(const uint8_t* query, const uint8_t* const (&row)[J], size_t stride,
                                        Vec<int32_t> (&sum)[J]) noexcept {
        for (size_t j = 0; j < J; ++j) sum[j] = Vec<int32_t>{};
        const auto each = [&](size_t i, auto add) {
            const uint8_t* const q = query + i / column * column + i;
            const Vec<Word> first = load_words(q), second = load_words(q + column);
            for (size_t j = 0; j < J; ++j) {
                const Vec<Word> codes = load_words(row[j] + i);
                add(j, low_codes(codes), first, low_codes(codes >> 4), second);
            }
        };
#if defined(POLYVEC_BYTE_PAIRS) && !defined(POLYVEC_NARROW_PRODUCTS)
        constexpr size_t most_steps = 4;  // of four products each: 16 * 15 * 127 fits into 16 bits
        for (size_t begin = 0; begin < stride; begin += most_steps * V) {
            Vec<int16_t> pairs[J]{};
            const size_t end = stride - begin < most_steps * V ? stride : begin + most_steps * V;
            for (size_t i = begin; i < end; i += V)
                each(i, [&](size_t j, Vec<Word> low, Vec<Word> first, Vec<Word> high, Vec<Word> second) {
                    pairs[j] += multiply_byte_pairs(low, first) + multiply_byte_pairs(high, second);
                });
            for (size_t j = 0; j < J; ++j) sum[j] += multiply_pairs((Vec<Word>)pairs[j], broadcast<Word>(0x00010001));
        }
#else
        for (size_t i = 0; i < stride; i += V)
            each(i, [&](size_t j, Vec<Word> low, Vec<Word> first, Vec<Word> high, Vec<Word> second) {
                sum[j] = add_products(add_products(sum[j], low, first), high, second);
            });
#endif
    }
};

template <class Code>
void distances(const IntegerQuery& query, const IntegerRows& rows, const uint32_t* ids, size_t n, float* out) noexcept {
    const size_t stride = rows.stride;
    const auto row_of = [&](size_t k) { return rows.codes + ids[k] * stride; };
    const auto factors_of = [&](size_t k) { return rows.factors + ids[k] * size_t{2}; };
    size_t k = 0;
    for (; k + group <= n; k += group) {
        const uint8_t* const row[group] = {row_of(k), row_of(k + 1), row_of(k + 2), row_of(k + 3)};
        const float *a = factors_of(k), *b = factors_of(k + 1), *c = factors_of(k + 2), *e = factors_of(k + 3);
        Vec<int32_t> sum[group];
        Code::products(query.values, row, stride, sum);
        const auto product = __builtin_convertvector(reduce_add(sum) - query.offset, Four<float>);
        const Four<float> scale = {a[0], b[0], c[0], e[0]}, square = {a[1], b[1], c[1], e[1]};
        *reinterpret_cast<typename VecOf<float, 4 * sizeof(float)>::unaligned*>(out + k) =
            query.constant + square + product * scale * query.factor;
    }
    for (; k < n; ++k) {
        const uint8_t* const row[1] = {row_of(k)};
        Vec<int32_t> sum[1];
        Code::products(query.values, row, stride, sum);
        const auto product = static_cast<float>(reduce_add(sum[0]) - query.offset);
        out[k] = query.constant + factors_of(k)[1] + product * factors_of(k)[0] * query.factor;
    }
}

void decode(const uint8_t* row, float scale, size_t d, float* out) noexcept {
    for (size_t begin = 0; begin < d; begin += V) {
        alignas(64) uint8_t values[V];
        store_words(values, Int8::values_of(row + begin));
        for (size_t i = begin; i < begin + V && i < d; i += L) {
            const Vec<float> x = load_int8(values + i - begin) * scale;
            d - i >= L ? store(out + i, x) : store_first(out + i, x, d - i);
        }
    }
}

template <class Code>
constexpr IntegerDistanceKernels kernels_of{Code::bits,
                                            Code::bias,
                                            Code::encode,
                                            encode_query,
                                            Code::query_of_row,
                                            distances<Code>,
                                            Code::bits == 8 ? decode : nullptr};

}  // namespace

extern const IntegerDistanceKernels int8_distance_kernels, int4_distance_kernels;
const IntegerDistanceKernels int8_distance_kernels = kernels_of<Int8>, int4_distance_kernels = kernels_of<Int4>;

}  // namespace polyvec::POLYVEC_ISA
