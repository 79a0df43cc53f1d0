// Scans of integer codes: scalar quantisation and RaBitQ. Queries are rounded to signed bytes, so that a score is an
// integer dot product of bytes with codes, exact at every level, and one multiplication and addition or two.
//
// A batch takes a register tile: a block of rows is unpacked once, to bytes or to pairs of 16 bits, for all panels of
// queries. One query meets the codes as they are stored: a mask selects one field of every byte, and the byte product
// multiplies it with the elements of the query that the field's numbers belong to. The order of numbers within a plane
// (tables.hpp) makes these consecutive elements. Of packed codes a register holds the same word of several, so that one
// query needs no sum across lanes. What the products are:
//
//     amx            the same as below; a batch takes matrices of bytes
//     avx512_bf16    four of bytes, added to a sum of 32 bits
//     avx2, avx512   two of bytes, added to a sum of 16 bits, where numbers have up to 4 bits. Sums start from what
//                    makes the numbers signed and move to 32 bits before they can overflow. Else as below
//     base, neon     two of 16 bits; one query, too, meets unpacked rows
#include "tables.hpp"
#include "tile_narrow.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr int R = panel_registers;
constexpr size_t L = lanes<float>;
constexpr size_t width = panel_width<float>;
constexpr size_t chunk_bytes = 64;
constexpr size_t register_bytes = sizeof(Vec<Word>);

size_t plane_bytes(size_t d, int w) noexcept {
    return (d * static_cast<size_t>(w) + 7) / 8;
}

/// Calls visit(begin, bytes) for the chunks of a plane.
template <class Visit>
POLYVEC_INLINE void for_each_chunk(size_t d, int w, Visit visit) noexcept {
    const size_t bytes = plane_bytes(d, w);
#pragma GCC unroll 1
    for (size_t c = 0; c < bytes; c += chunk_bytes) visit(c, bytes - c < chunk_bytes ? bytes - c : chunk_bytes);
}

// ---- batches

// How rows are unpacked. A panel lies in chunks of words, each behind what its sums start from.

#if defined(POLYVEC_NARROW_PRODUCTS) || defined(POLYVEC_BYTE_PAIRS)
/// Bytes. With -2^(bits - 1) times the elements of the query a sum is that of the signed numbers.
struct AsQuads {
    using Number = uint8_t;
    static constexpr size_t elements = 4;
#if defined(POLYVEC_NARROW_PRODUCTS)
    using Product = IntegerProduct;
    static constexpr size_t chunk(int) noexcept { return ~size_t{}; }
    static Word start(const int32_t (&sums)[2], int bits) noexcept {
        return static_cast<Word>(-((sums[0] + sums[1]) << (bits - 1)));
    }
#else
    /// A word is two sums of 16 bits.
    struct Product {
        using Sum = int16_t;
        template <int N>
        static constexpr int rows = IntegerProduct::rows<N>;

        POLYVEC_INLINE static Vec<int16_t> start(const Word* panel, int r) noexcept {
            return (Vec<int16_t>)load(panel + r * static_cast<int>(lanes<Word>));
        }
        POLYVEC_INLINE static Vec<int16_t> add(Vec<Word> x, Vec<Word> query, Vec<int16_t> sum) noexcept {
            return sum + multiply_byte_pairs(x, query);
        }
    };
    /// |sum| <= 2 * 127 * 2^(bits - 1) a word.
    static constexpr size_t chunk(int bits) noexcept { return size_t{256} >> bits; }
    static Word start(const int32_t (&sums)[2], int bits) noexcept {
        return (static_cast<Word>(-(sums[0] << (bits - 1))) & 0xffff) | static_cast<Word>(-(sums[1] << (bits - 1)))
                                                                            << 16;
    }
#endif
};
#endif

#if !defined(POLYVEC_NARROW_PRODUCTS)
/// Pairs of 16 bits, less 2^(bits - 1).
struct AsPairs {
    using Number = int16_t;
    using Product = IntegerProduct;
    static constexpr size_t elements = 2;
    static constexpr size_t chunk(int) noexcept { return ~size_t{}; }
    static Word start(const int32_t (&)[2], int) noexcept { return 0; }
};
#endif

template <class F>
POLYVEC_INLINE auto with_form(int bits, F f) noexcept {
#if defined(POLYVEC_NARROW_PRODUCTS)
    (void)bits;
    return f(AsQuads{});
#elif defined(POLYVEC_BYTE_PAIRS)
    return bits <= 4 ? f(AsQuads{}) : f(AsPairs{});
#else
    (void)bits;
    return f(AsPairs{});
#endif
}

template <class Form>
constexpr size_t words_of(size_t d) noexcept {
    return (d + Form::elements - 1) / Form::elements;
}

size_t row_words(size_t d, int bits) noexcept {
    return with_form(bits, [&](auto form) { return words_of<decltype(form)>(d); });
}

size_t panel_words(size_t d, int bits) noexcept {
    return with_form(bits, [&](auto form) {
        const size_t words = words_of<decltype(form)>(d), chunk = form.chunk(bits);
        return (words + (words - 1) / chunk + 1) * width;
    });
}

template <int W, class Number>
POLYVEC_INLINE void unpack_chunk(const uint8_t* codes, size_t bytes, size_t numbers, bool append, int centre,
                                 Number* out) noexcept {
    constexpr int mask = (1 << W) - 1;
    for (int k = 0; k < 8 / W; ++k) {
        const size_t begin = static_cast<size_t>(k) * bytes;
        if (begin >= numbers) break;
        const size_t n = numbers - begin < bytes ? numbers - begin : bytes;
        Number* to = out + begin;
        if (append) {
            for (size_t t = 0; t < n; ++t)
                to[t] = static_cast<Number>((to[t] << W | (codes[t] >> k * W & mask)) - centre);
        } else {
            for (size_t t = 0; t < n; ++t) to[t] = static_cast<Number>((codes[t] >> k * W & mask) - centre);
        }
    }
}

template <int W, class Number>
POLYVEC_INLINE const uint8_t* unpack_plane(const uint8_t* plane, size_t d, int bits, Number* out) noexcept {
    if (!(bits & W)) return plane;
    const bool append = bits >= 2 * W, last = bits % W == 0;
    const int centre = sizeof(Number) == 2 && last ? 1 << (bits - 1) : 0;
    for_each_chunk(d, W, [&](size_t c, size_t bytes) {
        const size_t first = c * 8 / W, left = d - first;
        if (bytes == chunk_bytes && left >= chunk_bytes * 8 / W) {
            unpack_chunk<W>(plane + c, chunk_bytes, chunk_bytes * 8 / W, append, centre, out + first);
        } else {
            unpack_chunk<W>(plane + c, bytes, left, append, centre, out + first);
        }
    });
    return plane + plane_bytes(d, W);
}

template <class Form>
void unpack_row(const uint8_t* row, size_t d, int bits, Word* words) noexcept {
    auto* out = reinterpret_cast<typename Form::Number*>(words);
    row = unpack_plane<8>(row, d, bits, out);
    row = unpack_plane<4>(row, d, bits, out);
    row = unpack_plane<2>(row, d, bits, out);
    unpack_plane<1>(row, d, bits, out);
    for (size_t i = d; i < words_of<Form>(d) * Form::elements; ++i) out[i] = 0;
}

void unpack(const CodeRows& rows, Word* words) noexcept {
    with_form(rows.bits, [&](auto form) {
        using Form = decltype(form);
        for (size_t j = 0; j < rows.n; ++j)
            unpack_row<Form>(rows.first + j * rows.stride, rows.d, rows.bits, words + j * words_of<Form>(rows.d));
    });
}

template <class Form>
void pack_as(const int8_t* queries, size_t count, size_t d, int bits, Word* panel) noexcept {
    constexpr size_t elements = Form::elements;
    const size_t words = words_of<Form>(d), chunk = Form::chunk(bits);
    for (size_t lane = 0; lane < width; ++lane) {
        const int8_t* query = queries + lane * d;
        Word *out = panel + lane, *start = out;
        int32_t sums[2] = {};
        for (size_t i = 0; i < words; ++i) {
            if (i % chunk == 0) {
                start = out;
                out += width;
                sums[0] = sums[1] = 0;
            }
            Word word = 0;
            for (size_t e = 0; e < elements && lane < count && i * elements + e < d; ++e) {
                const int8_t value = query[i * elements + e];
                sums[e / (elements / 2)] += value;
                word |= (static_cast<Word>(static_cast<int32_t>(value)) & (~Word{0} >> (32 - 32 / elements)))
                        << 32 / elements * e;
            }
            *out = word;
            out += width;
            *start = Form::start(sums, bits);
        }
    }
}

void pack(const int8_t* queries, size_t count, size_t d, int bits, Word* panel) noexcept {
    with_form(bits, [&](auto form) { pack_as<decltype(form)>(queries, count, d, bits, panel); });
}

/// A float of a row, anywhere in memory.
POLYVEC_INLINE float factor_at(const uint8_t* p) noexcept {
    float value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

size_t factors_begin(const CodeRows& rows) noexcept {
    size_t bytes = 0;
    for (int w = 8; w >= 1; w /= 2) bytes += rows.bits & w ? plane_bytes(rows.d, w) : 0;
    return bytes;
}

/// Rounds the product by itself, so that scores have the same bits at every level.
template <class V>
POLYVEC_INLINE V rounded(V product) noexcept {
    keep_in_register(product);
    return product;
}

/// `factor(k)` is the k-th factor of the rows.
template <class Factor>
POLYVEC_INLINE Vec<float> to_value(Vec<int32_t> dot, const CodeRows& rows, Vec<float> scale, Vec<float> shift,
                                   Vec<float> mean, Factor factor) noexcept {
    int k = 0;
    Vec<float> value = rounded(__builtin_convertvector(dot, Vec<float>) * scale) + shift;
    if (rows.has_scale) value = rounded(value * factor(k++));
    if (rows.has_mean) value += rounded(mean * factor(k++));
    if (rows.has_offset) value += factor(k);
    return value;
}

/// Calls epilogue(first, dots) for tiles of J rows, then for narrower ones: dots[j * width + lane].
template <class Form, int J, class Epilogue>
POLYVEC_INLINE void for_each_dots(size_t first, const Word* panel, Rows<Word> rows, size_t words, size_t chunk,
                                  Epilogue& epilogue) noexcept {
    using Product = typename Form::Product;
    if constexpr (sizeof(typename Product::Sum) == 4) {
        for_each_word_tile<Product, R>(
            panel + width, rows, words,
            [&]<int N>(size_t tile, const Vec<int32_t>(&dot)[N][R]) __attribute__((always_inline)) {
                int32_t dots[N * width];  // from here on in memory: the tile keeps its registers
                for (int j = 0; j < N; ++j) {
                    for (int r = 0; r < R; ++r) store(dots + (j * R + r) * L, dot[j][r]);
                }
                epilogue(tile, dots);
            });
    } else {
        const Vec<Word> ones = broadcast<Word>(0x00010001);
        for (; first + J <= rows.count; first += J) {
            int32_t dots[J * width];
            const Word* part = panel + width;
            size_t i = 0;
            do {
                const Word *row[J], *ahead[J];
#pragma GCC unroll 1
                for (int j = 0; j < J; ++j) {
                    row[j] = rows[first + j] + i;
                    ahead[j] = rows[first + J + j] + i;
                    asm("" : "+m"(row[j]), "+m"(ahead[j]));
                }
                Vec<typename Product::Sum> acc[J][R];
                for (int j = 0; j < J; ++j)
                    for (int r = 0; r < R; ++r) acc[j][r] = Product::start(part, r - R);
                multiply_tile<Product>(part, row, ahead, words - i < chunk ? words - i : chunk, acc, [] {});
                for (int j = 0; j < J; ++j) {
                    for (int r = 0; r < R; ++r) {
                        int32_t* at = dots + (j * R + r) * L;
                        const Vec<int32_t> sum = multiply_pairs((Vec<Word>)acc[j][r], ones);
                        store(at, i == 0 ? sum : load(at) + sum);
                    }
                }
                i += chunk;
                part += (chunk + 1) * width;
            } while (i < words);
            epilogue(first, dots);
        }
        if constexpr (J > 1) for_each_dots<Form, (J + 1) / 2>(first, panel, rows, words, chunk, epilogue);
    }
}

/// Calls sink(first, values, found) for tiles of rows: values[j * width + lane], and whether one of them reaches its
/// floor.
template <class Form, class Sink>
POLYVEC_INLINE void for_each_values(const CodeRows& rows, const Word* words, const CodeQueries& panel,
                                    const float* floor, Sink sink) noexcept {
    [[maybe_unused]] const MatrixUnit<true> unit;
    const uint8_t* factors = rows.first + factors_begin(rows);
    const size_t row = words_of<Form>(rows.d);
    const auto evaluate = [&]<size_t N>(size_t first, const int32_t (&dots)[N]) __attribute__((always_inline)) {
        float values[N];
        bool found = false;
#pragma GCC unroll 1
        for (size_t j = 0; j < N / width; ++j) {
            const uint8_t* own = factors + (first + j) * rows.stride;
            const auto factor = [&](int k) __attribute__((always_inline)) {
                return broadcast(factor_at(own + k * sizeof(float)));
            };
            for (size_t r = 0; r < R; ++r) {
                const Vec<float> value = to_value(load(dots + (j * R + r) * L), rows, load(panel.scale + r * L),
                                                  load(panel.shift + r * L), load(panel.mean + r * L), factor);
                store(values + (j * R + r) * L, value);
                found |= any(value >= load(floor + r * L));
            }
        }
        sink(first, values, found);
    };
    for_each_dots<Form, Form::Product::template rows<R>>(0, panel.packed, Rows<Word>{words, rows.n, row}, row,
                                                         Form::chunk(rows.bits), evaluate);
}

size_t select(const CodeRows& rows, const Word* words, const CodeQueries& panel, const float* floor,
              ScanHit* hits) noexcept {
    ScanHit* hit = hits;
    const auto emit = [&]<size_t N>(size_t first, const float (&values)[N], bool found) __attribute__((always_inline)) {
        if (!found) return;
        for (size_t k = 0; k < N; k += L) {
            for (uint32_t set = bits(load(values + k) >= load(floor + k % width)); set; set &= set - 1) {
                const size_t at = k + static_cast<size_t>(__builtin_ctz(set));
                *hit++ = {values[at], static_cast<uint32_t>(first * width + at)};
            }
        }
    };
    with_form(rows.bits, [&](auto form) { for_each_values<decltype(form)>(rows, words, panel, floor, emit); });
    return static_cast<size_t>(hit - hits);
}

void values(const CodeRows& rows, const Word* words, const CodeQueries& panel, float* out) noexcept {
    const float none[width] = {};
    const auto keep = [&]<size_t N>(size_t first, const float (&values)[N], bool) __attribute__((always_inline)) {
        for (size_t k = 0; k < N; k += L) store(out + first * width + k, load(values + k));
    };
    with_form(rows.bits, [&](auto form) { for_each_values<decltype(form)>(rows, words, panel, none, keep); });
}

// ---- one query against L rows at a time

// Lane k of the result: the sum of the lanes of row[k]. Each round interleaves pairs of rows in two ways and adds: the
// first and the second within blocks of 128 bits, by elements and by pairs of them, the others by blocks.
template <int Round, size_t N, int... K>
POLYVEC_INLINE Vec<int32_t> sums_of(const Vec<int32_t> (&row)[N], Lanes<K...> all) noexcept {
    constexpr int n = lanes<int32_t>;
    const auto add = [](Vec<int32_t> a, Vec<int32_t> b) __attribute__((always_inline)) {
        if constexpr (Round == 0) {
            return shuffle(a, b, Lanes<(K / 4 * 4 + K % 4 / 2 + K % 2 * n)...>{}) +
                   shuffle(a, b, Lanes<(K / 4 * 4 + K % 4 / 2 + K % 2 * n + 2)...>{});
        } else if constexpr (Round == 1) {
            return shuffle(a, b, Lanes<(K / 4 * 4 + K % 2 + K % 4 / 2 * n)...>{}) +
                   shuffle(a, b, Lanes<(K / 4 * 4 + K % 2 + K % 4 / 2 * n + 2)...>{});
        } else {
            return shuffle(a, b, Lanes<(K / 4 * 8 + K % 4)...>{}) + shuffle(a, b, Lanes<(K / 4 * 8 + 4 + K % 4)...>{});
        }
    };
    if constexpr (N == 1) {
        return row[0];
    } else {
        return [&]<int... J>(Lanes<J...>) __attribute__((always_inline)) {
            const Vec<int32_t> half[] = {add(row[2 * J], row[2 * J + 1])...};
            return sums_of<Round + 1>(half, all);
        }(typename LaneRange<0, N / 2>::type{});
    }
}

/// L rows, `stride` bytes apart.
struct RowGroup {
    const uint8_t* first;
    size_t stride;

    POLYVEC_INLINE const uint8_t* operator[](size_t j) const noexcept { return first + j * stride; }

    /// The words at `byte` of row j; the line of the group after this one is fetched.
    POLYVEC_INLINE const Word* words(size_t j, size_t byte) const noexcept {
        prefetch(first + (j + L) * stride + byte);
        return reinterpret_cast<const Word*>(first + j * stride + byte);
    }
};

#if defined(POLYVEC_NARROW_PRODUCTS)

// A query lies as the numbers of a row are taken: plane by plane, register by register. A register of numbers of one
// bit is 8 bytes of the plane, whose bits select bytes of the query; of wider ones, a field of a chunk, the highest of
// each chunk first. Zeros lie where it reaches beyond the plane: they make what is read there harmless.

/// Calls visit(element) for the bytes of the query in this order; elements that do not exist are d.
template <class Visit>
void for_each_element(size_t d, int bits, Visit visit) noexcept {
    for (int w = 8; w >= 1; w /= 2) {
        if (!(bits & w)) continue;
        const size_t bytes = plane_bytes(d, w), fields = 8 / static_cast<size_t>(w), step = w == 1 ? 8 : chunk_bytes;
        /// The element of field k of byte t.
        const auto element = [&](size_t t, size_t k) {
            const size_t c = t / chunk_bytes * chunk_bytes, count = bytes - c < chunk_bytes ? bytes - c : chunk_bytes;
            const size_t i = c * fields + k * count + (t - c);
            return t < bytes && i < d ? i : d;
        };
        for (size_t first = 0; first < bytes; first += step) {
            if (w == 1) {
                for (size_t i = 0; i < chunk_bytes; ++i) visit(element(first + i / 8, i % 8));
            } else {
                for (size_t k = fields; k-- > 0;)
                    for (size_t i = 0; i < chunk_bytes; ++i) visit(element(first + i, k));
            }
        }
    }
}

constexpr size_t plane_registers(size_t bytes, int w) noexcept {
    return w == 1 ? (bytes + 7) / 8 : (bytes + chunk_bytes - 1) / chunk_bytes * (8 / static_cast<size_t>(w));
}

size_t row_query_words(size_t d, int bits) noexcept {
    size_t registers = 0;
    for (int w = 8; w >= 1; w /= 2) registers += bits & w ? plane_registers(plane_bytes(d, w), w) : 0;
    return 1 + registers * L;
}

void pack_for_rows(const int8_t* query, size_t d, int bits, Word* out) noexcept {
    int32_t sum = 0;
    for (size_t i = 0; i < d; ++i) sum += query[i];
    *out++ = static_cast<Word>(-(sum << (bits - 1)));
    auto* to = reinterpret_cast<int8_t*>(out);
    for_each_element(d, bits, [&](size_t i) { *to++ = i < d ? query[i] : int8_t{0}; });
}

/// Half of L rows meet the plane that begins at byte `plane`. Rows are named one by one: GCC unrolls a loop over them
/// too late to keep the sums in registers.
template <int W, int... J>
POLYVEC_INLINE Vec<int32_t> plane_dots(RowGroup rows, size_t plane, size_t d, const Word* query, Lanes<J...>) noexcept {
    constexpr size_t ahead = 16384;  // what is read in the time that the level-3 cache or memory takes
    constexpr size_t step = W == 1 ? 8 : chunk_bytes;
    constexpr Word field = 0x01010101u * static_cast<Word>((1 << W) - 1);
    const Vec<Word> low = broadcast(field), high = broadcast(field << W % 8);
    const size_t end = plane + plane_bytes(d, W);
    Vec<int32_t> even[L / 2] = {}, odd[L / 2] = {};  // sums of odd fields lie W bits higher
    size_t stride = rows.stride;
    const auto multiply = [](Vec<int32_t>& sum, Vec<Word> x, Vec<Word> q) __attribute__((always_inline)) {
        sum = add_byte_quads(sum, x, q);
        keep_in_register(sum);
    };
#pragma GCC unroll 1
    for (size_t c = plane; c < end; c += step, query += (W == 1 ? 1 : 8 / W) * L) {
        asm("" : "+r"(stride));  // or GCC keeps a pointer for each row, and those in memory
        const uint8_t* at = rows.first + c;
        const uint8_t* next = rows.first + ahead + c * (L / 2);
        Vec<Word> q[W == 1 ? 1 : 8 / W];
        for (size_t k = 0; k < sizeof q / sizeof *q; ++k) q[k] = load(query + k * L);
        const auto add = [&](size_t j) __attribute__((always_inline)) {
            if (W > 1 || j == 0) prefetch(next + j * chunk_bytes);
            if constexpr (W == 1) {
                multiply(even[j], low, select_bytes(at + j * stride, q[0]));
            } else {
                Vec<Word> x = load(reinterpret_cast<const Word*>(at + j * stride));
                keep_in_register(x);
                if constexpr (W == 8) {
                    multiply(even[j], x, q[0]);
                } else {
                    if constexpr (W == 2) {
                        const Vec<Word> upper = x >> 4;
                        multiply(odd[j], upper & high, q[0]);
                        multiply(even[j], upper & low, q[1]);
                    }
                    multiply(odd[j], x & high, q[8 / W - 2]);
                    multiply(even[j], x & low, q[8 / W - 1]);
                }
            }
        };
        (add(J), ...);
    }
    if constexpr (W == 2 || W == 4) ((even[J] += odd[J] >> W), ...);
    return sums_of<0>(even, typename LaneRange<0, L>::type{});
}

POLYVEC_INLINE Vec<int32_t> dots(RowGroup group, const CodeRows& rows, const Word* query, Word*) noexcept {
    Vec<int32_t> total{};
    const auto start = static_cast<int32_t>(*query++);
    size_t plane = 0;
    const auto add = [&]<int W>(Lanes<W>) __attribute__((always_inline)) {
        if (!(rows.bits & W)) return;
        const auto half = typename LaneRange<0, L / 2>::type{};
        const Vec<int32_t> both[] = {plane_dots<W>(group, plane, rows.d, query, half),
                                     plane_dots<W>({group[L / 2], group.stride}, plane, rows.d, query, half)};
        total = (total << W) + sums_of<3>(both, typename LaneRange<0, L>::type{});
        query += plane_registers(plane_bytes(rows.d, W), W) * L;
        plane += plane_bytes(rows.d, W);
    };
    add(Lanes<8>{});
    add(Lanes<4>{});
    add(Lanes<2>{});
    add(Lanes<1>{});
    return total + start;
}

#elif defined(POLYVEC_BYTE_PAIRS)

// A query lies in registers as the fields of a row do: plane by plane, register by register of the plane, the lowest
// field of a byte first; zeros where a register reaches beyond the row. What the sums of 16 bits start from lies ahead
// of the registers that they take, what the dot product starts from ahead of all.

constexpr size_t registers_of(size_t bytes) noexcept {
    return (bytes + register_bytes - 1) / register_bytes;
}

/// Registers of a plane of w bits whose products fit in a sum of 16 bits: |sum| <= 2 * 127 * 2^(w - 1) a field.
constexpr size_t registers_at_once(int w) noexcept {
    return (size_t{256} >> w) * static_cast<size_t>(w) / 8;
}

size_t row_query_words(size_t d, int bits) noexcept {
    size_t registers = 1;
    for (int w = 8; w >= 1; w /= 2) {
        const size_t n = bits & w ? registers_of(plane_bytes(d, w)) : 0;
        registers +=
            w == 8 ? 2 * n : n * 8 / static_cast<size_t>(w) + (n + registers_at_once(w) - 1) / registers_at_once(w);
    }
    return registers * L;
}

void pack_for_rows(const int8_t* query, size_t d, int bits, Word* out) noexcept {
    int32_t start = 0;
    Word* const first = out;
    out += L;
    for (int w = 8; w >= 1; w /= 2) {
        if (!(bits & w)) continue;
        const size_t bytes = plane_bytes(d, w);
        /// The element that field k of byte t of the plane belongs to, or 0.
        const auto element = [&](size_t t, size_t k) {
            const size_t c = t / chunk_bytes * chunk_bytes, count = bytes - c < chunk_bytes ? bytes - c : chunk_bytes;
            const size_t i = c * 8 / static_cast<size_t>(w) + k * count + (t - c);
            return t < bytes && i < d ? int32_t{query[i]} : 0;
        };
        int32_t plane_sum = 0;
        Word* starts = nullptr;
        for (size_t n = 0; n < registers_of(bytes); ++n) {
            const size_t t = n * register_bytes;
            if (w == 8) {
                auto* even = reinterpret_cast<int16_t*>(out);
                for (size_t i = 0; i < register_bytes; ++i) {
                    even[i % 2 * (register_bytes / 2) + i / 2] = static_cast<int16_t>(element(t + i, 0));
                    plane_sum += element(t + i, 0);
                }
                out += 2 * L;
                continue;
            }
            if (n % registers_at_once(w) == 0) {
                starts = out;
                for (size_t i = 0; i < L; ++i) *out++ = 0;
            }
            auto* sums = reinterpret_cast<int16_t*>(starts);
            for (size_t k = 0; k < 8 / static_cast<size_t>(w); ++k) {
                auto* to = reinterpret_cast<int8_t*>(out);
                for (size_t i = 0; i < register_bytes; ++i) {
                    const int32_t value = element(t + i, k);
                    to[i] = static_cast<int8_t>(value);
                    sums[i / 2] = static_cast<int16_t>(sums[i / 2] - (value << (w - 1)));
                    plane_sum += value;
                }
                out += L;
            }
        }
        // The plane was taken less 2^(w - 1), which for the highest one is what the numbers are taken less.
        if (w == 8) {
            start -= plane_sum << (w - 1);
        } else if (bits >= 2 * w) {
            start += plane_sum << (w - 1 + (bits & (w - 1)));
        }
    }
    for (size_t i = 0; i < L; ++i) first[i] = static_cast<Word>(start);
}

/// Adds the plane of W bits that begins at byte `plane` to 2^W times the totals of some rows. Rows are named one by
/// one: GCC unrolls a loop over them too late to keep the sums in registers.
template <int W, int... J>
POLYVEC_INLINE const Word* add_plane(RowGroup rows, size_t plane, size_t d, const Word* query, Vec<int32_t>* totals,
                                     Lanes<J...>) noexcept {
    constexpr Word mask = 0x01010101u * static_cast<Word>((1 << W) - 1);
    const size_t end = registers_of(plane_bytes(d, W));
    Vec<int32_t> total[] = {(totals[J] << W)...};
    if constexpr (W == 8) {
        const auto add = [](Vec<int32_t>& sum, Vec<Word> x, Vec<Word> even, Vec<Word> odd)
                             __attribute__((always_inline)) {
                                 sum += multiply_pairs(x & 0x00ff00ff, even);
                                 sum += multiply_pairs((Vec<Word>)((Vec<uint16_t>)x >> 8), odd);
                                 keep_in_register(sum);
                             };
#pragma GCC unroll 1
        for (size_t n = 0; n < end; ++n, query += 2 * L) {
            const Vec<Word> even = load(query), odd = load(query + L);
            (add(total[J], load(rows.words(J, plane + n * register_bytes)), even, odd), ...);
        }
    } else {
        constexpr size_t at_once = registers_at_once(W);
        const Vec<Word> ones = broadcast<Word>(0x00010001);
        for (size_t n = 0; n < end;) {
            Vec<int16_t> sum[] = {(Vec<int16_t>)load(query + 0 * J)...};
            query += L;
#pragma GCC unroll 1
            for (const size_t stop = end - n < at_once ? end : n + at_once; n < stop; ++n) {
                const Vec<Word> x[] = {load(rows.words(J, plane + n * register_bytes))...};
#pragma GCC unroll 8
                for (int k = 0; k < 8 / W; ++k, query += L) {
                    const Vec<Word> q = load(query);
                    const auto add = [&](Vec<int16_t>& s, Vec<Word> fields) __attribute__((always_inline)) {
                        s += multiply_byte_pairs(fields >> (k * W) & mask, q);
                        keep_in_register(s);
                    };
                    (add(sum[J], x[J]), ...);
                }
            }
            ((total[J] += multiply_pairs((Vec<Word>)sum[J], ones)), ...);
        }
    }
    ((totals[J] = total[J]), ...);
    return query;
}

POLYVEC_INLINE Vec<int32_t> dots(RowGroup group, const CodeRows& rows, const Word* query, Word*) noexcept {
    constexpr auto half = typename LaneRange<0, L / 2>::type{};
    Vec<int32_t> totals[L] = {};
    const auto start = (Vec<int32_t>)load(query);
    for (size_t first = 0; first < L; first += L / 2) {
        const RowGroup some{group[first], group.stride};
        const Word* q = query + L;
        size_t plane = 0;
        const auto add = [&]<int W>(Lanes<W>) __attribute__((always_inline)) {
            if (!(rows.bits & W)) return;
            q = add_plane<W>(some, plane, rows.d, q, totals + first, half);
            plane += plane_bytes(rows.d, W);
        };
        add(Lanes<8>{});
        add(Lanes<4>{});
        add(Lanes<2>{});
        add(Lanes<1>{});
    }
    return sums_of<0>(totals, typename LaneRange<0, L>::type{}) + start;
}

#else

size_t row_query_words(size_t d, int) noexcept {
    return (words_of<AsPairs>(d) + L - 1) / L * L;
}

void pack_for_rows(const int8_t* query, size_t d, int, Word* out) noexcept {
    auto* to = reinterpret_cast<int16_t*>(out);
    for (size_t i = 0; i < 2 * row_query_words(d, 0); ++i) to[i] = i < d ? query[i] : int16_t{0};
}

POLYVEC_INLINE Vec<int32_t> dots(RowGroup group, const CodeRows& rows, const Word* query, Word* words) noexcept {
    const size_t n = words_of<AsPairs>(rows.d);
    Vec<int32_t> sum[L];
#pragma GCC unroll 1
    for (size_t j = 0; j < L; ++j) {
        unpack_row<AsPairs>(group[j], rows.d, rows.bits, words);
        Vec<int32_t> a{};
        size_t i = 0;
        for (; i + L <= n; i += L) a += multiply_pairs(load(words + i), load(query + i));
        if (i < n) a += multiply_pairs(load_first(words + i, n - i), load(query + i));
        sum[j] = a;
    }
    return sums_of<0>(sum, typename LaneRange<0, L>::type{});
}

#endif

template <int... J>
POLYVEC_INLINE Vec<float> factors_of(RowGroup rows, size_t byte, Lanes<J...>) noexcept {
    return Vec<float>{factor_at(rows[J] + byte)...};
}

/// Calls sink(first, values) for groups of L rows, the last of which may hold some again.
template <class Sink>
POLYVEC_INLINE void for_each_group(const CodeRows& rows, const CodeQueries& query, Word* words, Sink sink) noexcept {
    const size_t factors = factors_begin(rows);
    const Vec<float> scale = broadcast(*query.scale), shift = broadcast(*query.shift), mean = broadcast(*query.mean);
    for (size_t begin = 0; begin < rows.n; begin += L) {
        const size_t first = begin + L <= rows.n || rows.n < L ? begin : rows.n - L;
        const RowGroup group{rows.first + first * rows.stride, rows.stride};
        const Vec<int32_t> dot = dots(group, rows, query.packed, words);
        const auto factor = [&](int k) __attribute__((always_inline)) {
            return factors_of(group, factors + static_cast<size_t>(k) * sizeof(float),
                              typename LaneRange<0, L>::type{});
        };
        sink(first, begin - first, to_value(dot, rows, scale, shift, mean, factor));
    }
}

size_t select_rows(const CodeRows& rows, const CodeQueries& query, Word* words, float floor, ScanHit* hits) noexcept {
    ScanHit* hit = hits;
    for_each_group(rows, query, words,
                   [&](size_t first, size_t again, Vec<float> value) __attribute__((always_inline)) {
                       uint32_t set = bits(value >= broadcast(floor));
                       if (!set) return;
                       float values[L];
                       store(values, value);
                       set &= ~((1u << again) - 1);
                       if (rows.n < L) set &= (1u << rows.n) - 1;
                       for (; set; set &= set - 1) {
                           const auto at = static_cast<uint32_t>(__builtin_ctz(set));
                           *hit++ = {values[at], static_cast<uint32_t>(first) + at};
                       }
                   });
    return static_cast<size_t>(hit - hits);
}

void values_of_rows(const CodeRows& rows, const CodeQueries& query, Word* words, float* out) noexcept {
    for_each_group(rows, query, words, [&](size_t first, size_t, Vec<float> value) __attribute__((always_inline)) {
        store(out + first, value);
    });
}

// ---- one query against blocks of interleaved codes

// A register holds a word of L codes: all of them meet the same bytes of the query, and no sum crosses lanes. The query
// lies as the words do, plane by plane, of each word the lowest field first, behind what a sum starts from. Zeros stand
// for what pads a plane.

constexpr size_t code_block = 16, column_bytes = code_block * sizeof(Word);
constexpr size_t registers = column_bytes / register_bytes;           // of a column of a block
constexpr size_t blocks_at_once = registers < 4 ? 4 / registers : 1;  // whose sums stay in registers

size_t plane_words(size_t d, int w) noexcept {
    return (plane_bytes(d, w) + sizeof(Word) - 1) / sizeof(Word);
}

/// Words of the query for a field of a word.
template <int W>
#if defined(POLYVEC_NARROW_PRODUCTS)
constexpr size_t field_words = 1;
#elif defined(POLYVEC_BYTE_PAIRS)
constexpr size_t field_words = W == 8 ? 2 : 1;
#else
constexpr size_t field_words = 2;
#endif

template <int W>
constexpr size_t plane_query_words = 8 / W * field_words<W>;

template <class Visit>
POLYVEC_INLINE void for_each_plane(int bits, Visit visit) noexcept {
    if (bits & 8) visit(Lanes<8>{});
    if (bits & 4) visit(Lanes<4>{});
    if (bits & 2) visit(Lanes<2>{});
    if (bits & 1) visit(Lanes<1>{});
}

size_t block_query_words(size_t d, int bits) noexcept {
    size_t words = 1;
    for_each_plane(bits, [&]<int W>(Lanes<W>) { words += plane_words(d, W) * plane_query_words<W>; });
    return words;
}

void pack_for_blocks(const int8_t* query, size_t d, int bits, Word* out) noexcept {
    int32_t sum = 0;
    for (size_t i = 0; i < d; ++i) sum += query[i];
    *out++ = static_cast<Word>(-(sum << (bits - 1)));
    for_each_plane(bits, [&]<int W>(Lanes<W>) {
        const size_t bytes = plane_bytes(d, W);
        for (size_t t = 0; t < plane_words(d, W) * sizeof(Word); t += sizeof(Word)) {
            for (size_t k = 0; k < 8 / W; ++k, out += field_words<W>) {
                auto* to = reinterpret_cast<int8_t*>(out);
                auto* pairs = reinterpret_cast<int16_t*>(out);
                for (size_t i = 0; i < sizeof(Word); ++i) {
                    const size_t c = (t + i) / chunk_bytes * chunk_bytes;
                    const size_t count = bytes - c < chunk_bytes ? bytes - c : chunk_bytes;
                    const size_t at = c * 8 / W + k * count + (t + i - c);
                    const int8_t value = t + i < bytes && at < d ? query[at] : int8_t{0};
                    if constexpr (field_words<W> == 1) {
                        to[i] = value;
                    } else {
                        pairs[i % 2 * 2 + i / 2] = value;
                    }
                }
            }
        }
    });
}

/// Some blocks: register j of a column belongs to block j / registers.
struct BlockGroup {
    const uint8_t* first;
    size_t stride;

    POLYVEC_INLINE const Word* column(size_t j, size_t byte) const noexcept {
        return reinterpret_cast<const Word*>(first + j / registers * stride + j % registers * register_bytes + byte);
    }
};

/// Adds the plane of W bits that begins at byte `plane` to 2^W times the totals.
template <int W, int... J>
POLYVEC_INLINE void add_plane(BlockGroup blocks, size_t plane, size_t words, const Word* query, Vec<int32_t>* totals,
                              Lanes<J...>) noexcept {
    constexpr Word field = 0x01010101u * static_cast<Word>((1 << W) - 1);
    const size_t ahead = sizeof...(J) / registers * blocks.stride;
    const auto fetch = [&](size_t j, size_t w) __attribute__((always_inline)) {
        const Word* const column = blocks.column(j, plane + w * column_bytes);
        if (j % registers == 0) prefetch(column + ahead / sizeof(Word));
        return load(column);
    };
#if defined(POLYVEC_NARROW_PRODUCTS)
    constexpr int places = W == 8 ? 1 : W == 1 ? 4 : 2;  // sums of fields that lie higher are shifted in the end
    Vec<int32_t> sum[places][sizeof...(J)] = {};
    const auto add = [](Vec<int32_t>& s, Vec<Word> x, Vec<Word> q) __attribute__((always_inline)) {
        s = add_byte_quads(s, x, q);
        keep_in_register(s);
    };
#pragma GCC unroll 1
    for (size_t w = 0; w < words; ++w, query += plane_query_words<W>) {
        const Vec<Word> x[] = {fetch(J, w)...};
#pragma GCC unroll 8
        for (int k = 0; k < 8 / W; ++k) {
            const int place = k % places;
            const Vec<Word> q = broadcast(query[k]), mask = broadcast(field << place * W);
            (add(sum[place][J], W == 8 ? x[J] : x[J] >> (k - place) * W & mask, q), ...);
        }
    }
    for (int place = 1; place < places; ++place) ((sum[0][J] += sum[place][J] >> place * W), ...);
    ((totals[J] = (totals[J] << W) + sum[0][J]), ...);
#else
    Vec<int32_t> total[] = {(totals[J] << W)...};
#if defined(POLYVEC_BYTE_PAIRS)
    if constexpr (field_words<W> == 1) {
        // |a sum of 16 bits| <= 2 * 127 * (2^W - 1) a field
        constexpr size_t at_once = 32767 / (254 * ((1 << W) - 1)) / (8 / W);
        const Vec<Word> ones = broadcast<Word>(0x00010001);
        for (size_t w = 0; w < words;) {
            Vec<int16_t> sum[sizeof...(J)] = {};
#pragma GCC unroll 1
            for (const size_t stop = words - w < at_once ? words : w + at_once; w < stop; ++w) {
                const Vec<Word> x[] = {fetch(J, w)...};
#pragma GCC unroll 8
                for (int k = 0; k < 8 / W; ++k) {
                    const Vec<Word> q = broadcast(*query++);
                    const auto add = [&](Vec<int16_t>& s, Vec<Word> y) __attribute__((always_inline)) {
                        s += multiply_byte_pairs(y >> k * W & field, q);
                        keep_in_register(s);
                    };
                    (add(sum[J], x[J]), ...);
                }
            }
            ((total[J] += multiply_pairs((Vec<Word>)sum[J], ones)), ...);
        }
        ((totals[J] = total[J]), ...);
        return;
    }
#endif
    const auto add = [](Vec<int32_t>& s, Vec<Word> y, Vec<Word> even, Vec<Word> odd) __attribute__((always_inline)) {
        s += multiply_pairs(y & 0x00ff00ff, even);
        s += multiply_pairs((Vec<Word>)((Vec<uint16_t>)y >> 8), odd);
        keep_in_register(s);
    };
#pragma GCC unroll 1
    for (size_t w = 0; w < words; ++w) {
        const Vec<Word> x[] = {fetch(J, w)...};
#pragma GCC unroll 8
        for (int k = 0; k < 8 / W; ++k, query += 2) {
            const Vec<Word> even = broadcast(query[0]), odd = broadcast(query[1]);
            (add(total[J], W == 8 ? x[J] : x[J] >> k * W & field, even, odd), ...);
        }
    }
    ((totals[J] = total[J]), ...);
#endif
}

/// Calls sink(j, values) for the registers of some blocks.
template <class Sink, int... J>
POLYVEC_INLINE void meet_blocks(BlockGroup group, const CodeRows& rows, const CodeQueries& query, Lanes<J...>,
                                Sink sink) noexcept {
    Vec<int32_t> totals[sizeof...(J)] = {};
    const Word* q = query.packed;
    const auto start = static_cast<int32_t>(*q++);
    size_t plane = 0;
    for_each_plane(rows.bits, [&]<int W>(Lanes<W>) __attribute__((always_inline)) {
        const size_t words = plane_words(rows.d, W);
        add_plane<W>(group, plane, words, q, totals, Lanes<J...>{});
        q += words * plane_query_words<W>;
        plane += words * column_bytes;
    });
    const Vec<float> scale = broadcast(*query.scale), shift = broadcast(*query.shift), mean = broadcast(*query.mean);
    const auto value = [&](size_t j) __attribute__((always_inline)) {
        const auto factor = [&](int k) __attribute__((always_inline)) {
            return (Vec<float>)load(group.column(j, plane + static_cast<size_t>(k) * column_bytes));
        };
        return to_value(totals[j] + start, rows, scale, shift, mean, factor);
    };
    (sink(J, value(J)), ...);
}

/// Calls sink(first, values) for L codes at a time.
template <class Sink>
POLYVEC_INLINE void for_each_register(const CodeRows& blocks, const CodeQueries& query, Sink sink) noexcept {
    size_t b = 0;
    for (; b + blocks_at_once <= blocks.n; b += blocks_at_once) {
        meet_blocks({blocks.first + b * blocks.stride, blocks.stride}, blocks, query,
                    typename LaneRange<0, blocks_at_once * registers>::type{},
                    [&](size_t j, Vec<float> value)
                        __attribute__((always_inline)) { sink(b * code_block + j * L, value); });
    }
    for (; b < blocks.n; ++b) {
        meet_blocks(
            {blocks.first + b * blocks.stride, blocks.stride}, blocks, query, typename LaneRange<0, registers>::type{},
            [&](size_t j, Vec<float> value) __attribute__((always_inline)) { sink(b * code_block + j * L, value); });
    }
}

size_t select_blocks(const CodeRows& blocks, const CodeQueries& query, Word*, float floor, ScanHit* hits) noexcept {
    ScanHit* hit = hits;
    for_each_register(blocks, query, [&](size_t first, Vec<float> value) __attribute__((always_inline)) {
        uint32_t set = bits(value >= broadcast(floor));
        if (!set) return;
        float values[L];
        store(values, value);
        for (; set; set &= set - 1) {
            const auto at = static_cast<uint32_t>(__builtin_ctz(set));
            *hit++ = {values[at], static_cast<uint32_t>(first) + at};
        }
    });
    return static_cast<size_t>(hit - hits);
}

void values_of_blocks(const CodeRows& blocks, const CodeQueries& query, Word*, float* out) noexcept {
    for_each_register(blocks, query, [&](size_t first, Vec<float> value) __attribute__((always_inline)) {
        store(out + first, value);
    });
}

// ---- what a sample says of all

/// Integers in the order of floats, and back.
POLYVEC_INLINE Vec<int32_t> ordered(Vec<int32_t> bits) noexcept {
    return bits ^ (bits >> 31 & 0x7fffffff);
}

template <size_t Registers, bool One>
POLYVEC_INLINE void rank_values(float* values, size_t n, size_t rank, float* out) noexcept {
    constexpr int kept_bits = 24;
    auto* keys = reinterpret_cast<int32_t*>(values);
    for (size_t i = 0; i < n * Registers; ++i) store(keys + i * L, ordered((Vec<int32_t>)load(values + i * L)));
    for (size_t r = 0; r < Registers; ++r) {
        Vec<int32_t> found = broadcast(INT32_MIN);
        for (int bit = 31; bit >= 32 - kept_bits; --bit) {
            const auto higher = (Vec<int32_t>)((Vec<uint32_t>)found + (uint32_t{1} << bit));
            Vec<int32_t> reached{};
            for (size_t i = 0; i < n; ++i) reached -= load(keys + (i * Registers + r) * L) >= higher;
            if constexpr (One) reached = broadcast(reduce_add(reached));
            found = reached >= static_cast<int32_t>(rank) ? higher : found;
        }
        const auto value = (Vec<float>)ordered(found);
        if constexpr (One) {
            *out = value[0];
        } else {
            store(out + r * L, value);
        }
    }
}

void values_of_rank(float* values, size_t n, size_t rank, float* out) noexcept {
    rank_values<R, false>(values, n, rank, out);
}

void value_of_rank(float* values, size_t n, size_t rank, float* out) noexcept {
    rank_values<1, true>(values, n / L, rank, out);
}

// ---- encoding

constexpr uint32_t candidates = 24;  // values of t in each of two rounds

/// Levels of t / 2^16 times the magnitudes.
POLYVEC_INLINE uint32_t level_of(uint16_t magnitude, uint32_t t, uint32_t top) noexcept {
    const uint32_t level = magnitude * t >> 16;
    return level < top ? level : top;
}

/// The squared cosine between magnitudes and levels + 1/2, times what does not depend on t.
POLYVEC_INLINE double closeness(const uint16_t* magnitudes, size_t d, uint32_t top, uint32_t t) noexcept {
    constexpr size_t block = 1024;  // whose sums fit in 32 bits
    uint64_t product = 0, square = 0;
    for (size_t first = 0; first < d; first += block) {
        const size_t n = d - first < block ? d - first : block;
        uint32_t block_product = 0, block_square = 0;
        for (size_t i = first; i < first + n; ++i) {
            const uint32_t odd = 2 * level_of(magnitudes[i], t, top) + 1;
            block_product += magnitudes[i] * odd;
            block_square += odd * odd;
        }
        product += block_product;
        square += block_square;
    }
    return static_cast<double>(product) * static_cast<double>(product) / static_cast<double>(square);
}

void fit_levels(const uint16_t* magnitudes, size_t d, uint32_t top, uint8_t* levels) noexcept {
    // `even` maps the largest magnitude just above the last level. The fewer levels, the more it pays to clip.
    uint32_t largest = 1;
    for (size_t i = 0; i < d; ++i) largest = magnitudes[i] > largest ? magnitudes[i] : largest;
    const uint32_t even = ((top + 1) << 16) / largest;
    const uint32_t least = even - even / 8, most = even + 5 * (even / (top + 1)), step = (most - least) / candidates;
    uint32_t best_t = even;
    double best = -1;
    const auto consider = [&](uint32_t t) {
        const double found = closeness(magnitudes, d, top, t);
        if (found > best) {
            best = found;
            best_t = t;
        }
    };
    for (uint32_t c = 0; c <= candidates; ++c) consider(least + c * step);
    const uint32_t middle = best_t;
    for (uint32_t c = 1; c < candidates; ++c) consider(middle - step + c * (2 * step / candidates));
    for (size_t i = 0; i < d; ++i) levels[i] = static_cast<uint8_t>(level_of(magnitudes[i], best_t, top));
}

// One step of the transform among the lanes of a vector: those H apart become their sum and their difference.
template <int H, int... K>
POLYVEC_INLINE Vec<float> butterfly(Vec<float> v, Lanes<K...>) noexcept {
    const Vec<float> signs = {((K & H) != 0 ? -1.0f : 1.0f)...};
    return fma(v, signs, shuffle(v, v, Lanes<(K ^ H)...>{}));
}

template <int H>
POLYVEC_INLINE Vec<float> butterflies(Vec<float> v) noexcept {
    constexpr int L = lanes<float>;
    if constexpr (H < L) {
        return butterflies<2 * H>(butterfly<H>(v, typename LaneRange<0, L>::type{}));
    } else {
        return v;
    }
}

void hadamard(float* x, size_t n) noexcept {
    constexpr size_t L = lanes<float>;
    size_t h = 1;
    if (n >= L) {
        for (size_t i = 0; i < n; i += L) store(x + i, butterflies<1>(load(x + i)));
        h = L;
    }
    // Two steps at a time: half the loads and stores.
    for (; n >= 4 * L && 4 * h <= n && h >= L; h *= 4) {
        for (size_t i = 0; i < n; i += 4 * h) {
            for (size_t j = i; j < i + h; j += L) {
                const Vec<float> a = load(x + j), b = load(x + j + h), c = load(x + j + 2 * h), e = load(x + j + 3 * h);
                store(x + j, (a + b) + (c + e));
                store(x + j + h, (a - b) + (c - e));
                store(x + j + 2 * h, (a + b) - (c + e));
                store(x + j + 3 * h, (a - b) - (c - e));
            }
        }
    }
    for (; h < n; h *= 2) {
        for (size_t i = 0; i < n; i += 2 * h) {
            for (size_t j = i; j < i + h; ++j) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
        }
    }
}

void rotate(float* rows, size_t n, size_t d, const float* signs, bool inverse) noexcept {
    constexpr int rounds = 4;
    size_t power = 1;
    while (2 * power <= d) power *= 2;
    for (size_t j = 0; j < n; ++j) {
        float* x = rows + j * d;
        for (int k = 0; k < rounds; ++k) {
            const int round = inverse ? rounds - 1 - k : k;
            const float* factors = signs + static_cast<size_t>(round) * d;
            float* part = round % 2 == 0 ? x : x + d - power;
            if (inverse) hadamard(part, power);
            for (size_t i = 0; i < d; ++i) x[i] *= factors[i];
            if (!inverse) hadamard(part, power);
        }
    }
}

// Matrices multiply a panel in little more than the time that one query takes.
#if defined(POLYVEC_MATRIX_UNIT)
constexpr size_t most_one_by_one = 1;
#else
constexpr size_t most_one_by_one = width / 2 + 4;
#endif

}  // namespace

extern const CodesKernels codes_kernels;
const CodesKernels codes_kernels{width,
                                 most_one_by_one,
                                 row_words,
                                 panel_words,
                                 unpack,
                                 pack,
                                 select,
                                 values,
                                 values_of_rank,
                                 {row_query_words, pack_for_rows, select_rows, values_of_rows},
                                 {block_query_words, pack_for_blocks, select_blocks, values_of_blocks},
                                 value_of_rank,
                                 fit_levels,
                                 rotate};

}  // namespace polyvec::POLYVEC_ISA
