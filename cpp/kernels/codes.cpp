// Scans of integer codes: scalar quantisation and RaBitQ. Queries are rounded to signed bytes, so that a score is an
// integer dot product of bytes with codes, exact at every level, and one multiplication and addition or two.
//
// A batch takes the tile of tile_narrow.hpp: a block of rows is unpacked once, to bytes or to pairs of 16 bits, for all
// panels of queries. One query meets the codes as they are stored (avx512_bf16): a mask selects one field of every
// byte, and the byte product multiplies it with the elements of the query that the field's numbers belong to. The order
// of numbers within a plane (tables.hpp) makes these 64 consecutive elements.
#include "tables.hpp"
#include "tile_narrow.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr int R = panel_registers;
constexpr size_t L = lanes<float>;
constexpr size_t width = panel_width<float>;
constexpr size_t chunk_bytes = 64;

#if defined(POLYVEC_NARROW_PRODUCTS)
using Unpacked = uint8_t;  // the number
#else
using Unpacked = int16_t;  // less 2^(bits - 1)
#endif

constexpr size_t elements = sizeof(Word) / sizeof(Unpacked);

size_t row_words(size_t d) noexcept {
    return (d + elements - 1) / elements;
}

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

template <int W>
POLYVEC_INLINE void unpack_chunk(const uint8_t* codes, size_t bytes, size_t numbers, bool append, int centre,
                                 Unpacked* out) noexcept {
    constexpr int mask = (1 << W) - 1;
    for (int k = 0; k < 8 / W; ++k) {
        const size_t begin = static_cast<size_t>(k) * bytes;
        if (begin >= numbers) break;
        const size_t n = numbers - begin < bytes ? numbers - begin : bytes;
        Unpacked* to = out + begin;
        if (append) {
            for (size_t t = 0; t < n; ++t)
                to[t] = static_cast<Unpacked>((to[t] << W | (codes[t] >> k * W & mask)) - centre);
        } else {
            for (size_t t = 0; t < n; ++t) to[t] = static_cast<Unpacked>((codes[t] >> k * W & mask) - centre);
        }
    }
}

template <int W>
POLYVEC_INLINE const uint8_t* unpack_plane(const uint8_t* plane, size_t d, int bits, Unpacked* out) noexcept {
    if (!(bits & W)) return plane;
    const bool append = bits >= 2 * W, last = bits % W == 0;
    const int centre = sizeof(Unpacked) == 2 && last ? 1 << (bits - 1) : 0;
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

void unpack_row(const uint8_t* row, size_t d, int bits, Unpacked* out) noexcept {
    row = unpack_plane<8>(row, d, bits, out);
    row = unpack_plane<4>(row, d, bits, out);
    row = unpack_plane<2>(row, d, bits, out);
    unpack_plane<1>(row, d, bits, out);
    for (size_t i = d; i < row_words(d) * elements; ++i) out[i] = 0;
}

void unpack(const CodeRows& rows, Word* words) noexcept {
    for (size_t j = 0; j < rows.n; ++j)
        unpack_row(rows.first + j * rows.stride, rows.d, rows.bits,
                   reinterpret_cast<Unpacked*>(words + j * row_words(rows.d)));
}

void pack(const int8_t* queries, size_t count, size_t d, int bits, Word* panel) noexcept {
    using Start = int32_t;
    for (size_t lane = 0; lane < width; ++lane) {
        const int8_t* query = queries + lane * d;
        Start sum = 0;
        for (size_t i = 0; i < row_words(d); ++i) {
            Word word = 0;
            for (size_t e = 0; e < elements && lane < count && i * elements + e < d; ++e) {
                const int8_t value = query[i * elements + e];
                sum += value;
                word |= (static_cast<Word>(static_cast<int32_t>(value)) & (~Word{0} >> (32 - 32 / elements)))
                        << 32 / elements * e;
            }
            panel[(i + 1) * width + lane] = word;
        }
        panel[lane] = static_cast<Word>(-(sum << (bits - 1)));  // what sums of unsigned bytes start from
    }
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

size_t select(const CodeRows& rows, const Word* words, const CodeQueries& panel, const float* floor,
              ScanHit* hits) noexcept {
    ScanHit* hit = hits;
    const uint8_t* factors = rows.first + factors_begin(rows);
    const size_t row = row_words(rows.d);
    for_each_tile<R>(
        panel.packed + width, Rows<Word>{words, rows.n, row}, row,
        [&]<int J>(size_t first, const Vec<int32_t>(&dot)[J][R]) __attribute__((always_inline)) {
            int32_t dots[J * width];  // from here on in memory: the tile keeps its registers
            for (int j = 0; j < J; ++j) {
                for (int r = 0; r < R; ++r) store(dots + (j * R + r) * L, dot[j][r]);
            }
            float values[J * width];
            bool found = false;
#pragma GCC unroll 1
            for (int j = 0; j < J; ++j) {
                const uint8_t* own = factors + (first + j) * rows.stride;
                const auto factor = [&](int k) __attribute__((always_inline)) {
                    return broadcast(factor_at(own + k * sizeof(float)));
                };
                for (int r = 0; r < R; ++r) {
                    const Vec<float> value = to_value(load(dots + (j * R + r) * L), rows, load(panel.scale + r * L),
                                                      load(panel.shift + r * L), load(panel.mean + r * L), factor);
                    store(values + (j * R + r) * L, value);
                    found |= any(value >= load(floor + r * L));
                }
            }
            if (!found) return;
            for (size_t k = 0; k < J * width; k += L) {
                for (uint32_t set = bits(load(values + k) >= load(floor + k % width)); set; set &= set - 1) {
                    const size_t at = k + static_cast<size_t>(__builtin_ctz(set));
                    *hit++ = {values[at], static_cast<uint32_t>(first * width + at)};
                }
            }
        },
        IntegerProduct{});
    return static_cast<size_t>(hit - hits);
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

// A query lies as the fields of a row do: plane by plane, the highest field of a byte first, each field's elements of
// all chunks, padded with zeros to whole chunks.
template <class Visit>
void for_each_field(size_t d, int bits, Visit visit) noexcept {
    for (int w = 8; w >= 1; w /= 2) {
        if (!(bits & w)) continue;
        for (int k = 8 / w - 1; k >= 0; --k)
            for_each_chunk(d, w, [&](size_t c, size_t bytes) {
                const size_t first = c * 8 / static_cast<size_t>(w) + static_cast<size_t>(k) * bytes;
                visit(first, first >= d ? 0 : d - first < bytes ? d - first : bytes);
            });
    }
}

size_t query_words(size_t d, int bits) noexcept {
    size_t words = 1;
    for_each_field(d, bits, [&](size_t, size_t) { words += chunk_bytes / sizeof(Word); });
    return words;
}

void pack_one(const int8_t* query, size_t d, int bits, Word* out) noexcept {
    int32_t sum = 0;
    for (size_t i = 0; i < d; ++i) sum += query[i];
    *out++ = static_cast<Word>(-(sum << (bits - 1)));
    auto* to = reinterpret_cast<int8_t*>(out);
    for_each_field(d, bits, [&](size_t first, size_t n) {
        for (size_t t = 0; t < chunk_bytes; ++t) *to++ = t < n ? query[first + t] : int8_t{0};
    });
}

/// Half of L rows meet the plane that begins at byte `plane`. Two fields of a byte are taken at a time, of each row as
/// it is loaded. Rows are named one by one: GCC unrolls a loop over them too late to keep the sums in registers.
template <int W, int... J>
POLYVEC_INLINE Vec<int32_t> plane_dots(RowGroup rows, size_t plane, size_t d, const Word* query, Lanes<J...>) noexcept {
    constexpr int fields = 8 / W;
    Vec<int32_t> odd[L / 2] = {}, even[L / 2] = {};
    const size_t bytes = plane_bytes(d, W), chunks = (bytes + chunk_bytes - 1) / chunk_bytes;
    const auto mask = [](int k) __attribute__((always_inline)) {
        return broadcast<Word>(0x01010101u * static_cast<Word>(((1 << W) - 1) << k * W & 0xff));
    };
#pragma GCC unroll 1
    for (int k = fields - 1; k > 0; k -= 2) {
        const Vec<Word> upper = mask(k), lower = mask(k - 1);
        const auto add = [&](Vec<int32_t>& u, Vec<int32_t>& l, Vec<Word> x, Vec<Word> q, Vec<Word> r)
                             __attribute__((always_inline)) {
                                 u = add_byte_quads(u, x & upper, q);
                                 l = add_byte_quads(l, x & lower, r);
                                 keep_in_register(u);
                                 keep_in_register(l);
                             };
        const Word *q = query, *r = query + chunks * L;
        size_t c = plane;
#pragma GCC unroll 1
        for (; c + chunk_bytes <= plane + bytes; c += chunk_bytes, q += L, r += L)
            (add(odd[J], even[J], load(rows.words(J, c)), load(q), load(r)), ...);
        if (c < plane + bytes)
            (add(odd[J], even[J], load_first_bytes(rows[J] + c, plane + bytes - c), load(q), load(r)), ...);
        query += 2 * chunks * L;
        if (k > 1) ((odd[J] >>= 2 * W, even[J] >>= 2 * W), ...);  // exact: all fields so far lie 2 W bits higher
    }
    if constexpr (fields == 1) {
        const auto add = [](Vec<int32_t>& sum, Vec<Word> x, Vec<Word> q) __attribute__((always_inline)) {
            sum = add_byte_quads(sum, x, q);
            keep_in_register(sum);
        };
        size_t c = plane;
#pragma GCC unroll 1
        for (; c + chunk_bytes <= plane + bytes; c += chunk_bytes, query += L)
            (add(even[J], load(rows.words(J, c)), load(query)), ...);
        if (c < plane + bytes) (add(even[J], load_first_bytes(rows[J] + c, plane + bytes - c), load(query)), ...);
    } else {
        ((even[J] += odd[J] >> W), ...);
    }
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
        plane += plane_bytes(rows.d, W);
        query += (plane_bytes(rows.d, W) + chunk_bytes - 1) / chunk_bytes * (8 / W) * L;
    };
    add(Lanes<8>{});
    add(Lanes<4>{});
    add(Lanes<2>{});
    add(Lanes<1>{});
    return total + start;
}

#else

size_t query_words(size_t d, int) noexcept {
    return (row_words(d) + L - 1) / L * L;
}

void pack_one(const int8_t* query, size_t d, int, Word* out) noexcept {
    auto* to = reinterpret_cast<int16_t*>(out);
    for (size_t i = 0; i < 2 * query_words(d, 0); ++i) to[i] = i < d ? query[i] : int16_t{0};
}

POLYVEC_INLINE Vec<int32_t> dots(RowGroup group, const CodeRows& rows, const Word* query, Word* words) noexcept {
    const size_t n = row_words(rows.d);
    Vec<int32_t> sum[L];
#pragma GCC unroll 1
    for (size_t j = 0; j < L; ++j) {
        unpack_row(group[j], rows.d, rows.bits, reinterpret_cast<Unpacked*>(words));
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

size_t select_one(const CodeRows& rows, const CodeQueries& query, Word* words, float floor, ScanHit* hits) noexcept {
    ScanHit* hit = hits;
    const size_t factors = factors_begin(rows);
    const Vec<float> scale = broadcast(*query.scale), shift = broadcast(*query.shift), mean = broadcast(*query.mean);
    for (size_t begin = 0; begin < rows.n; begin += L) {
        const size_t first = begin + L <= rows.n || rows.n < L ? begin : rows.n - L;  // the last L rows, some again
        const RowGroup group{rows.first + first * rows.stride, rows.stride};
        const Vec<int32_t> dot = dots(group, rows, query.packed, words);
        const auto factor = [&](int k) __attribute__((always_inline)) {
            return factors_of(group, factors + static_cast<size_t>(k) * sizeof(float),
                              typename LaneRange<0, L>::type{});
        };
        const Vec<float> value = to_value(dot, rows, scale, shift, mean, factor);
        uint32_t set = bits(value >= broadcast(floor));
        if (!set) continue;
        float values[L];
        store(values, value);
        set &= ~((1u << (begin - first)) - 1);
        if (rows.n < L) set &= (1u << rows.n) - 1;
        for (; set; set &= set - 1) {
            const auto at = static_cast<uint32_t>(__builtin_ctz(set));
            *hit++ = {values[at], static_cast<uint32_t>(first) + at};
        }
    }
    return static_cast<size_t>(hit - hits);
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

void hadamard(float* x, size_t n) noexcept {
    for (size_t h = 1; h < n; h *= 2) {
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

}  // namespace

extern const CodesKernels codes_kernels;
const CodesKernels codes_kernels{width,       width / 2 + 4, row_words,  unpack,     pack,  select,
                                 query_words, pack_one,      select_one, fit_levels, rotate};

}  // namespace polyvec::POLYVEC_ISA
