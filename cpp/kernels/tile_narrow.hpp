// Register tiles over tokens stored in fewer bits: bfloat16, float16, int8, residual codes.
//
//     pack_narrow_panel<Format, R>(panel, queries, n_queries, stride, d, largest_weight);  // once
//     for_each_narrow_tile<Format, R>(panel, tokens, d, [&]<int J>(size_t first, const Vec<float> (&product)[J][R]) {
//         // product[j][r] * lane_scale<Format, R>(panel, d, r): token first + j with the queries of register r. The
//         // scale of a query is positive, so it can wait until after a maximum.
//     });
//
// Rows are the tokens one after another, in no order of the tile's own, so that documents can be mapped from a file,
// taken and appended as they are. A row holds d elements, padded with zeros to a multiple of 2 (bfloat16) or 4 (int8,
// residual):
//
//   bfloat16, float16
//   int8        elements + 128; a token is its float scale times the elements. As signed bytes, too
//   residual    codes of 4 or 2 bits, the first in the highest bits of a byte, each with its lowest bit first, as
//               ColBERTv2 packs them; a token is its float scale times (centroid + the weights that its codes select)
//
// A step of the tile multiplies one word of each row, of one, two or four elements, with R words of queries. Where the
// level has no such product, or where words are codes, a block of rows is expanded first, once for all queries of the
// panel, into a scratch that stays in the level-1 cache:
//
//   format      avx512_bf16, amx                  other levels
//   bfloat16    pairs, as stored                  float, expanded
//   float16     float, expanded                   float, expanded
//   int8        bytes, as stored                  pairs of 16 bits, expanded
//   residual    bytes, expanded by a permute      pairs of 16 bits, expanded by a byte shuffle; without one, through a
//                                                 table of each byte's weights
//
// With AMX the products of words are those of matrices (tile_matrix.hpp).
//
// Against int8 and residual codes a query is quantised too, to 127 steps of its largest element, and a weight to 127
// steps of the largest weight; the sums are integers, exact up to d = 2^17. The bits of a product depend on the token
// and the query alone, as in tile.hpp.
#pragma once

#include "elements.hpp"
#include "tables.hpp"
#include "tile.hpp"
#include "tile_matrix.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

using Word = uint32_t;

// ---- products

#if defined(POLYVEC_NARROW_PRODUCTS)

// Shapes measured, GCC 12, documents of 180 tokens streamed from memory; d = 48, 128, 768; G operations a second.
// Zen4, one tile prefetched, of 237 possible in pairs of bfloat16 and 473 in bytes:
//   pairs   12 x 2: 216 218 214   6 x 2: 230 230 209   4 x 2: 228 231 228   12 x 1: 177 179 183   8 x 1: 199 183 184
//   bytes   12 x 2: 366 406 413   6 x 2: 415 446 419   4 x 2: 400 441 462   12 x 1: 279 343 300   8 x 1: 334 394 355
// Zen5, four tiles prefetched, of about 530 and 1060. A sum of pairs takes 6 cycles there and one of bytes 4, of two
// products each: 12 sums of pairs just fill them, 16 do.
//   pairs   6 x 2: 475 463 475    4 x 2: 372 350 350    with one tile prefetched   6 x 2: 414 395 466
//   bytes   6 x 2: 864 938 1050   4 x 2: 819 841 876                               6 x 2: 815 679 1039
//   pairs   8 x 2, beside 6 x 2 in the same run: 489 of 437    12 x 2: 481
struct Bfloat16Pairs {
    using Sum = float;
    template <int R>
    static constexpr int rows = 8;

    POLYVEC_INLINE static Vec<float> start(const Word*, int) noexcept { return Vec<float>{}; }
    POLYVEC_INLINE static Vec<float> add(Vec<Word> x, Vec<Word> query, Vec<float> sum) noexcept {
        return add_bfloat16_pairs(sum, x, query);
    }
#if defined(POLYVEC_MATRIX_UNIT)
    template <int S>
    POLYVEC_INLINE static void start_matrix(const Word*) noexcept {
        zero_matrix<S>();
    }
    template <int S, int A, int B>
    POLYVEC_INLINE static void multiply() noexcept {
        multiply_bfloat16_matrices<S, A, B>();
    }
#endif
};

// Rows of bytes + 128, or of signed bytes, to which 128 is added on the way. Ahead of a panel lies what cancels the
// share of the 128s.
template <bool Signed>
struct ByteQuads {
    using Sum = int32_t;
    static constexpr size_t elements = 4;
    template <int R>
    static constexpr int rows = R == 1 ? 8 : 6;

    POLYVEC_INLINE static Vec<int32_t> start(const Word* panel, int r) noexcept {
        return (Vec<int32_t>)load(panel + r * static_cast<int>(lanes<Word>));
    }
    POLYVEC_INLINE static Vec<int32_t> add(Vec<Word> x, Vec<Word> query, Vec<int32_t> sum) noexcept {
        return add_byte_quads(sum, Signed ? x ^ 0x80808080 : x, query);
    }
    POLYVEC_INLINE static Vec<int32_t> add_share(Vec<Word> query, Vec<int32_t> share) noexcept {
        return add_byte_quads(share, broadcast<Word>(0x80808080), query);
    }
#if defined(POLYVEC_MATRIX_UNIT)
    template <int S>
    POLYVEC_INLINE static void start_matrix(const Word* start) noexcept {
        if constexpr (Signed)
            zero_matrix<S>();
        else
            load_matrix<S>(start, 0);
    }
    template <int S, int A, int B>
    POLYVEC_INLINE static void multiply() noexcept {
        multiply_byte_matrices<S, A, B, Signed>();
    }
#endif
};
using IntegerProduct = ByteQuads<false>;

#else

// A product and its addition are two operations for 16 multiplications of AVX2, of which a core does two each a cycle:
// at most twice as many as those of float32, and bfloat16, which is expanded to it, gains no arithmetic at all. Bytes
// times bytes would be no more: their 16-bit sums overflow, unless 32-bit ones take them up by another multiplication.
struct ShortPairs {
    using Sum = int32_t;
    static constexpr size_t elements = 2;
    template <int R>
    static constexpr int rows = Multiply<float>::rows<R>;

    POLYVEC_INLINE static Vec<int32_t> start(const Word*, int) noexcept { return Vec<int32_t>{}; }
    POLYVEC_INLINE static Vec<int32_t> add(Vec<Word> x, Vec<Word> query, Vec<int32_t> sum) noexcept {
        return sum + multiply_pairs(x, query);
    }
};
using IntegerProduct = ShortPairs;

#endif

// ---- formats: `elements` of a row make a word; rows are padded to a multiple of `align` elements of `bits`

template <class Elements>
POLYVEC_INLINE void expand_elements(const unsigned char* row, size_t n, float* out) noexcept {
    constexpr size_t bytes = Elements::bits / 8;
    size_t i = 0;
    for (; i + lanes<float> <= n; i += lanes<float>) store(out + i, Elements::load(row + bytes * i));
    if (i < n) store(out + i, load_elements<Elements>(row + bytes * i, n - i));
}

struct Bfloat16 {
    static constexpr size_t bits = 16, align = 2;
    static constexpr bool integer = false, residual = false;
#if defined(POLYVEC_NARROW_PRODUCTS)
    using Element = Word;
    using Product = Bfloat16Pairs;
    static constexpr size_t elements = 2;
    static constexpr bool as_stored = true;
#else
    using Element = float;
    using Product = Multiply<float>;
    static constexpr size_t elements = 1;
    static constexpr bool as_stored = false;

    POLYVEC_INLINE static void expand(const unsigned char* row, size_t n, const void*, float* out) noexcept {
        expand_elements<Bfloat16Elements>(row, n, out);
    }
#endif
};

struct Float16 {
    static constexpr size_t bits = 16, align = 1;
    static constexpr bool integer = false, residual = false;
    using Element = float;
    using Product = Multiply<float>;
    static constexpr size_t elements = 1;
    static constexpr bool as_stored = false;

    POLYVEC_INLINE static void expand(const unsigned char* row, size_t n, const void*, float* out) noexcept {
        expand_elements<Float16Elements>(row, n, out);
    }
};

// Byte: uint8_t for elements + 128, int8_t for the elements themselves.
template <class Byte>
struct Bytes {
    static constexpr size_t bits = 8, align = 4;
    static constexpr bool integer = true, residual = false;
    static constexpr bool is_signed = Byte(-1) < Byte(0);
    using Element = Word;
#if defined(POLYVEC_NARROW_PRODUCTS)
    using Product = ByteQuads<is_signed>;
    static constexpr size_t elements = Product::elements;
    static constexpr bool as_stored = true;
#else
    using Product = ShortPairs;
    static constexpr size_t elements = Product::elements;
    static constexpr bool as_stored = false;

    // N elements; a vector's worth by widen_bytes: GCC 12 makes twice the work of a conversion.
    template <size_t N>
    POLYVEC_INLINE static void widen(const unsigned char* p, Word* out) noexcept {
        const auto bytes = (Some<int8_t, N>)(*reinterpret_cast<const Some<Byte, N>*>(p) ^ Byte(is_signed ? 0 : 128));
        if constexpr (N == lanes<int16_t>)
            store(reinterpret_cast<int16_t*>(out), widen_bytes(bytes));
        else
            *reinterpret_cast<Some<int16_t, N>*>(out) = __builtin_convertvector(bytes, Some<int16_t, N>);
    }
    POLYVEC_INLINE static void expand(const unsigned char* row, size_t n, const void*, Word* out) noexcept {
        size_t i = 0;
        for (; i + lanes<int16_t> <= n; i += lanes<int16_t>) widen<lanes<int16_t>>(row + i, out + i / 2);
        for (; i < n; i += 4) widen<4>(row + i, out + i / 2);
    }
#endif
};

using Int8 = Bytes<uint8_t>;
using SignedInt8 = Bytes<int8_t>;

template <int Bits>
struct Residual {
    static constexpr size_t bits = Bits, align = 4;
    static constexpr bool integer = true, residual = true;
    using Element = Word;
    using Product = IntegerProduct;
    static constexpr size_t elements = Product::elements;
    static constexpr bool as_stored = false;
    static constexpr size_t codes = size_t{1} << Bits, per_byte = 8 / Bits;

    // The table that expand takes, of the weights of codes 0, 1, ...; a code is stored lowest bit first.
    static void pack_weights(const signed char* weights, unsigned char* table) noexcept {
        const auto weight = [&](size_t stored) {
            size_t code = 0;
            for (int b = 0; b < Bits; ++b) code |= (stored >> b & 1) << (Bits - 1 - b);
            return weights[code];
        };
#if defined(POLYVEC_NARROW_PRODUCTS)
        for (size_t k = 0; k < table_bytes; ++k) table[k] = static_cast<unsigned char>(weight(k % codes) + 128);
#elif defined(POLYVEC_BYTE_SHUFFLE)
        for (size_t k = 0; k < table_bytes; ++k) {
            const bool first = Bits == 2 && k < lanes<uint8_t>;
            table[k] = static_cast<unsigned char>(weight((k % 16 >> (first ? 2 : 0)) & (codes - 1)));
        }
#else
        auto* out = reinterpret_cast<Weights*>(table);
        for (size_t byte = 0; byte < 256; ++byte) {
            Weights w;
            for (size_t k = 0; k < per_byte; ++k) w[k] = weight(byte >> (8 - Bits * (k + 1)) & (codes - 1));
            out[byte] = w;
        }
#endif
    }

#if defined(POLYVEC_NARROW_PRODUCTS)
    static constexpr size_t table_bytes = 64;

    POLYVEC_INLINE static void expand(const unsigned char* row, size_t n, const void* table, Word* out) noexcept {
        size_t i = 0;
        for (; i + 64 <= n; i += 64) store(out + i / 4, look_up_codes<Bits>(row + i * Bits / 8, 64, table));
        if (i < n) store(out + i / 4, look_up_codes<Bits>(row + i * Bits / 8, n - i, table));
    }
#elif defined(POLYVEC_BYTE_SHUFFLE)
    // The weights of the first and of the second code of 4 bits: at 4 bits of codes one after the other, at 2 bits of
    // two.
    static constexpr size_t table_bytes = 2 * sizeof(Vec<uint8_t>);
    static constexpr size_t at_once = 2 * lanes<uint8_t>;  // codes

    template <int... K>
    POLYVEC_INLINE static void expand_some(const unsigned char* p, const Vec<uint8_t> (&tables)[2], Word* out,
                                           Lanes<K...>) noexcept {
        constexpr int n = lanes<uint8_t>;
        Vec<uint8_t> index[2];
        if constexpr (Bits == 4) {
            const Vec<uint8_t> bytes = load(p);
            index[0] = bytes >> 4;
            index[1] = bytes & 15;
        } else {
            const Vec<uint16_t> bytes = load_bytes_as_shorts(p);
            index[0] = index[1] = (Vec<uint8_t>)(bytes >> 4 | (bytes << 8 & 0x0f00));
        }
        const auto first = shuffle_bytes(tables[0], index[0]), second = shuffle_bytes(tables[1], index[1]);
        const auto low = shuffle(first, second, Lanes<(K / 2 + K % 2 * n)...>{});
        const auto high = shuffle(first, second, Lanes<((K + n) / 2 + K % 2 * n)...>{});
        auto* to = reinterpret_cast<int16_t*>(out);
        store(to, widen_bytes(lower_half(low)));
        store(to + n / 2, widen_bytes(upper_half(low)));
        store(to + n, widen_bytes(lower_half(high)));
        store(to + n + n / 2, widen_bytes(upper_half(high)));
    }

    POLYVEC_INLINE static void expand(const unsigned char* row, size_t n, const void* table, Word* out) noexcept {
        const auto* p = static_cast<const uint8_t*>(table);
        const Vec<uint8_t> tables[2] = {load(p), load(p + lanes<uint8_t>)};
        const auto numbers = typename LaneRange<0, lanes<uint8_t>>::type{};
        size_t i = 0;
        for (; i + at_once <= n; i += at_once) expand_some(row + i / per_byte, tables, out + i / 2, numbers);
        if (i == n) return;
        unsigned char last[at_once / per_byte] = {};
        for (size_t k = 0; k < (n - i) / per_byte; ++k) last[k] = row[i / per_byte + k];
        expand_some(last, tables, out + i / 2, numbers);  // a chunk has room for whole vectors
    }
#else
    using Weights = Some<int16_t, per_byte>;
    static constexpr size_t table_bytes = 256 * sizeof(Weights);

    POLYVEC_INLINE static void expand(const unsigned char* row, size_t n, const void* table, Word* out) noexcept {
        const auto* weights = static_cast<const Weights*>(table);
        auto* wide = reinterpret_cast<Weights*>(out);
        for (size_t i = 0; i < n / per_byte; ++i) wide[i] = weights[row[i]];
    }
#endif
};

template <class Format>
constexpr size_t padded(size_t d) {
    return (d + Format::align - 1) / Format::align * Format::align;
}

// Words of a row, and of a panel for each of its queries: ahead of an integer panel lies what sums start from, behind
// it the scales.
template <class Format>
constexpr size_t row_words(size_t d) {
    return Format::elements == 1 ? d : padded<Format>(d) / Format::elements;
}
template <class Format>
constexpr size_t panel_words(size_t d) {
    return row_words<Format>(d) + 2 * Format::integer;
}

// ---- queries

// Words i, i + 1, ... of a row of d, a vector for each of their N elements; zeros behind d.
template <size_t N>
POLYVEC_INLINE void load_words(const float* row, size_t d, size_t i, Vec<float> (&x)[N]) noexcept {
    constexpr size_t n = lanes<float>;
    for (size_t k = 0; k < N; ++k) {
        const size_t at = i * N + k * n;
        x[k] = at >= d ? Vec<float>{} : load_first(row + at, d - at < n ? d - at : n);
    }
    for (size_t round = 1; round < N; round *= 2) {
        Vec<float> apart[N];
        for (size_t k = 0; k < N; ++k)
            apart[k] = every_second(x[2 * k % N], x[2 * k % N + 1], 2 * k >= N, typename LaneRange<0, n>::type{});
        for (size_t k = 0; k < N; ++k) x[k] = apart[k];
    }
}

// The 16 highest bits of a float, rounded to even, NaN kept; in the lower half of a lane.
POLYVEC_INLINE Vec<Word> to_bfloat16(Vec<float> v) noexcept {
    const Vec<Word> word = (Vec<Word>)v, rounded = word + 0x7fff + (word >> 16 & 1);
    return select(v == v, rounded, word | 0x400000) >> 16;
}

// Rounded to even; |v| at most 2^15, in the 16 lower bits of a lane. NaN becomes 0.
POLYVEC_INLINE Vec<Word> to_integer(Vec<float> v) noexcept {
    return (Vec<Word>)(v + 0x1.8p23f) & 0xffff;
}

POLYVEC_INLINE float largest_magnitude(const float* row, size_t d) noexcept {
    Vec<float> largest{};
    for (size_t i = 0; i < d; i += lanes<float>)
        largest = max(abs(load_first(row + i, d - i < lanes<float> ? d - i : lanes<float>)), largest);
    return reduce_max(largest);
}

// Pack `count` rows of d, `stride` elements apart, into a panel of R registers; of its lanes, those beyond count are
// zero. `unit` is what one step of the stored integers stands for, where they have no scale of their own: the largest
// weight / 127.
template <class Format, int R>
inline void pack_narrow_panel(Word* panel, const float* rows, size_t count, size_t stride, size_t d,
                              float unit) noexcept {
    constexpr size_t n = lanes<Word>, width = R * n, elements = Format::elements;
    const size_t end = row_words<Format>(d);
    float steps[width];  // of a query's quantisation, to the unit
    if constexpr (Format::integer) {
        for (size_t k = 0; k < width; k += n) {
            Vec<float> scale = broadcast(unit);
            for (size_t j = 0; j < n; ++j) {
                const float largest = k + j < count ? largest_magnitude(rows + (k + j) * stride, d) : 0;
                const float step = largest / 127 * unit;
                const bool some = step > 0 && 127 / largest < __builtin_inff();
                steps[k + j] = some ? 127 / largest : 0;
                if (some) scale[j] = step;
            }
            store(panel + (end + 1) * width + k, (Vec<Word>)scale);
        }
        panel += width;
    }
    const auto words_of = [&](size_t q, size_t i) {
        Vec<float> x[elements];
        load_words(rows + q * stride, d, i, x);
        if constexpr (!Format::integer) return to_bfloat16(x[0]) | to_bfloat16(x[1]) << 16;
        Vec<Word> word{};
        for (size_t e = 0; e < elements; ++e) {
            x[e] *= steps[q];
            keep_in_register(x[e]);  // never fused with the rounding: the same integers at every level
            const Vec<Word> value = to_integer(x[e]);
            word |= (elements == 4 ? value & 0xff : value) << 32 / elements * e;
        }
        return word;
    };
    for (size_t k = 0; k < width; k += n) {
        Vec<int32_t> share{};
        for (size_t i = 0; i < end; i += n) {
            Vec<Word> block[n];
            for (size_t j = 0; j < n; ++j) block[j] = k + j < count ? words_of(k + j, i) : Vec<Word>{};
            transpose(block, typename LaneRange<0, n>::type{});
            for (size_t j = 0; j < n && i + j < end; ++j) {
                store(panel + (i + j) * width + k, block[j]);
                if constexpr (elements == 4) share = Format::Product::add_share(block[j], share);
            }
        }
        if constexpr (elements == 4) store(panel - width + k, (Vec<Word>)-share);
    }
}

template <class Format, int R>
POLYVEC_INLINE Vec<float> lane_scale(const Word* panel, size_t d, int r) noexcept {
    return (Vec<float>)load(panel + ((row_words<Format>(d) + 1) * R + r) * lanes<Word>);
}

// ---- tiles

// Words of a row that are expanded at a time. Two pieces of a tile of vectors stay well below 4096 bytes, where stores
// and loads would be taken for one another.
constexpr size_t chunk = 64;

// Asks for what the centroids of `count` tokens score.
template <int R>
POLYVEC_INLINE void fetch_centroid_scores(const NarrowTokens& tokens, size_t first, size_t count) noexcept {
#pragma GCC unroll 1
    for (size_t j = 0; j < count; ++j) {
        const float* scores = tokens.centroid_scores + tokens.centroids[first + j] * R * lanes<float>;
        for (int r = 0; r < R; ++r) prefetch(scores + r * lanes<float>);
    }
}

// Like tiles_from, of rows that are expanded, a piece of the tile at a time. A row of the next piece is expanded beside
// each part of the products of this one: their first words would wait for what was just stored, and the products for
// the shuffles. Residual codes, Zen5, of 1024 possible: 665, and 725 so.
template <class Format, int J, int R, class Epilogue>
POLYVEC_INLINE void expanded_tiles_from(size_t first, const typename Format::Element* panel, const NarrowTokens& tokens,
                                        size_t d, Epilogue& epilogue) noexcept {
    using Element = typename Format::Element;
    using Product = typename Format::Product;
    const size_t row_bytes = padded<Format>(d) * Format::bits / 8, end = row_words<Format>(d);
    const auto words_from = [&](size_t i) { return end - i < chunk ? end - i : chunk; };
    const auto bytes_before = [](size_t i) { return i * Format::elements * Format::bits / 8; };
    const Rows<unsigned char> rows{tokens.first, tokens.count, row_bytes, tokens.next};
    alignas(64) Element pieces[2][J * chunk];
    Element *here = pieces[0], *other = pieces[1];
    if (first + J <= tokens.count) {
#pragma GCC unroll 1
        for (size_t j = 0; j < J; ++j)
            Format::expand(tokens.first + (first + j) * row_bytes, words_from(0) * Format::elements, tokens.weights,
                           here + j * chunk);
    }
    for (; first + J <= tokens.count; first += J) {
        if constexpr (Format::residual) fetch_centroid_scores<R>(tokens, first, J);
        Vec<typename Product::Sum> acc[J][R];
        for (int j = 0; j < J; ++j)
            for (int r = 0; r < R; ++r) acc[j][r] = Product::start(panel, r - R);
        for (size_t i = 0; i < end; i += chunk) {
            const bool last = i + chunk >= end;
            const size_t next = last ? first + J : first, next_i = last ? 0 : i + chunk;
            const unsigned char* from = tokens.first + next * row_bytes + bytes_before(next_i);
            Element* to = other;
            Element* const to_end = next + J <= tokens.count ? to + J * chunk : to;
            const auto expand_next = [&]() __attribute__((always_inline)) {
                if (to == to_end) return;
                Format::expand(from, words_from(next_i) * Format::elements, tokens.weights, to);
                to += chunk;
                from += row_bytes;
            };
            const unsigned char* there = rows[first + rows_ahead<Product, R>] + bytes_before(i);
            const Element *row[J], *ahead[J];
#pragma GCC unroll 1
            for (int j = 0; j < J; ++j, there += row_bytes) {
                ahead[j] = reinterpret_cast<const Element*>(there);
                asm("" : "+m"(ahead[j]));
            }
            for (int j = 0; j < J; ++j) row[j] = here + j * chunk;
            multiply_tile<Product>(panel + i * R * lanes<Element>, row, ahead, words_from(i), acc, expand_next);
            while (to != to_end) expand_next();
            Element* const done = here;
            here = other;
            other = done;
        }
        epilogue(first, acc);
    }
    if constexpr (J > 1) {
        constexpr int narrower = J > 4 ? 4 : (J + 1) / 2;
        expanded_tiles_from<Format, narrower, R>(first, panel, tokens, d, epilogue);
    }
}

#if defined(POLYVEC_MATRIX_UNIT)

// Like for_each_matrix_tile, of rows that are expanded.
template <class Format, int R, class Epilogue>
POLYVEC_INLINE void expanded_matrix_tiles(const Word* panel, const NarrowTokens& tokens, size_t d,
                                          Epilogue& epilogue) noexcept {
    using Product = typename Format::Product;
    const size_t row_bytes = padded<Format>(d) * Format::bits / 8, end = row_words<Format>(d);
    const Rows<unsigned char> rows{tokens.first, tokens.count, row_bytes, tokens.next};
    alignas(64) Word pieces[2][block_rows * chunk];  // what no row is expanded to meets zeros, or is not looked at
    size_t turn = 0;
    const auto block = [&](size_t first, size_t count, auto&& add) __attribute__((always_inline)) {
        const unsigned char* const ahead = rows[first + block_rows];
        for (size_t k = 0; k < count * row_bytes; k += 64) prefetch(ahead + k);
        fetch_centroid_scores<R>(tokens, first, count);
        for (size_t i = 0; i < end; i += chunk) {
            const size_t n = end - i < chunk ? end - i : chunk;
            Word* const piece = pieces[turn++ % 2];
            const unsigned char* row = tokens.first + first * row_bytes + i * Format::elements * Format::bits / 8;
            for (size_t j = 0; j < count; ++j, row += row_bytes)
                Format::expand(row, n * Format::elements, tokens.weights, piece + j * chunk);
            for (size_t k = 0; k < n; k += matrix_words) add(i + k, piece + k, chunk);
        }
    };
    matrix_tiles<Product, R>(panel, tokens.count, end, block, epilogue);
}

#endif

// Whether tiles of a format need a MatrixUnit.
template <class Format>
constexpr bool by_matrices = Format::elements > 1;

// Like for_each_tile, of a panel of words and rows of words.
template <class Product, int R, class Epilogue>
POLYVEC_INLINE void for_each_word_tile(const Word* panel, Rows<Word> rows, size_t words, Epilogue&& epilogue) noexcept {
#if defined(POLYVEC_MATRIX_UNIT)
    for_each_matrix_tile<Product, R>(panel, rows, words, epilogue);
#else
    for_each_tile<R>(panel, rows, words, epilogue, Product{});
#endif
}

template <class Format, int R, class Epilogue>
POLYVEC_INLINE void for_each_narrow_tile(const Word* panel, const NarrowTokens& tokens, size_t d,
                                         Epilogue&& epilogue) noexcept {
    using Product = typename Format::Product;
    using Element = typename Format::Element;
    const auto scaled = [&]<int J>(size_t first, Vec<typename Product::Sum>(&sum)[J][R]) {
        if constexpr (!Format::integer) {
            epilogue(first, sum);
        } else {
            Vec<float> product[J][R];
            for (int j = 0; j < J; ++j) {
                const Vec<float> scale = broadcast(tokens.scales[first + j]);
                for (int r = 0; r < R; ++r) {
                    Vec<float> value = __builtin_convertvector(sum[j][r], Vec<float>);
                    if constexpr (Format::residual)
                        value += load(tokens.centroid_scores +
                                      (static_cast<size_t>(tokens.centroids[first + j]) * R + r) * lanes<float>);
                    product[j][r] = value * scale;
                }
            }
            epilogue(first, product);
        }
    };
    const auto* queries = reinterpret_cast<const Element*>(panel + Format::integer * R * lanes<Word>);
    if constexpr (Format::as_stored) {
        const size_t words = row_words<Format>(d);
        for_each_word_tile<Product, R>(queries,
                                       Rows<Word>{reinterpret_cast<const Word*>(tokens.first), tokens.count, words,
                                                  reinterpret_cast<const Word*>(tokens.next)},
                                       words, scaled);
#if defined(POLYVEC_MATRIX_UNIT)
    } else if constexpr (by_matrices<Format>) {
        expanded_matrix_tiles<Format, R>(queries, tokens, d, scaled);
#endif
    } else {
        expanded_tiles_from<Format, Product::template rows<R>, R>(0, queries, tokens, d, scaled);
    }
}

}  // namespace
}  // namespace polyvec::POLYVEC_ISA
