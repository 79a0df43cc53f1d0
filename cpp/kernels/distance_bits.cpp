// Rows of two to four bits an element, and what one query is far from those that ids name.
//
// A row of up to 192 elements is one cache line. One of 384 is two; the high bits are in the first one, and four of
// five rows turn out too far away by those alone.
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

/// Asks for the second parts of the rows that n ids name.
POLYVEC_INLINE void fetch_second(const BitRows& rows, const uint32_t* ids, size_t n) noexcept {
    constexpr size_t line = 64, most = 4 * line;
    for (size_t k = 0; k < n; ++k) {
        const uint8_t* const low = rows.second + ids[k] * rows.second_stride;
        for (size_t at = 0; at < rows.plane && at < most; at += line) prefetch(low + at);
    }
}

#if defined(POLYVEC_NARROW_PRODUCTS)

// Words of 16 rows are transposed into lanes, and a byte permutation looks up the sums of the values of four half bytes
// of each at once: by count 4 cycles a row of 384 elements, where products with single bits take 14.
constexpr size_t together = 16;  // rows
constexpr size_t word = 4;       // bytes of a plane, for which a query has two tables of four times 16 sums
constexpr size_t table_bytes = 64;
static_assert(lanes<uint32_t> == together);

using Word = uint32_t;

size_t query_bytes(size_t plane) noexcept {
    return plane / word * 2 * table_bytes;
}

/// For each word of a plane: the sums of the values where the low half of each byte has bits, then where the high one
/// has.
void prepare(const uint8_t* values, size_t plane, uint8_t* query) noexcept {
    for (size_t at = 0; at < plane; ++at) {
        for (size_t half = 0; half < 2; ++half) {
            uint8_t* const sums = query + (at / word * 2 + half) * table_bytes + at % word * 16;
            sums[0] = 0;
            for (size_t i = 1; i < 16; ++i) {
                const auto bit = 4 * half + static_cast<size_t>(__builtin_ctzll(i));
                sums[i] = static_cast<uint8_t>(sums[i & (i - 1)] + values[bit * plane + at]);
            }
        }
    }
}

/// The words at `byte` of the rows and the three behind it, a vector each: lane i belongs to row i.
POLYVEC_INLINE void load_words(const uint8_t* const (&rows)[together], size_t byte, Vec<Word> (&words)[4]) noexcept {
    Vec<Word> x[4];
    for (size_t i = 0; i < 4; ++i)
        x[i] = load_quarters(rows[i] + byte, rows[i + 4] + byte, rows[i + 8] + byte, rows[i + 12] + byte);
    const Lanes<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29> low{};
    const Lanes<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31> high{};
    const Lanes<0, 8, 2, 10, 4, 12, 6, 14> first{};
    const Lanes<1, 9, 3, 11, 5, 13, 7, 15> second{};
    const auto mix = [](Vec<Word> a, Vec<Word> b, auto order) __attribute__((always_inline)) {
        return (Vec<Word>)shuffle((Vec<uint64_t>)a, (Vec<uint64_t>)b, order);
    };
    for (size_t i = 0; i < 2; ++i) {
        const auto a = i == 0 ? shuffle(x[0], x[1], low) : shuffle(x[0], x[1], high);
        const auto b = i == 0 ? shuffle(x[2], x[3], low) : shuffle(x[2], x[3], high);
        words[2 * i] = mix(a, b, first);
        words[2 * i + 1] = mix(a, b, second);
    }
}

/// The sums of the values where the planes at `byte` of the rows have bits.
POLYVEC_INLINE Vec<int32_t> sums_of_values(const uint8_t* query, const uint8_t* const (&rows)[together], size_t byte,
                                           size_t plane) noexcept {
    const Vec<Word> places = broadcast<Word>(0x30201000), nibble = broadcast<Word>(0x0f0f0f0f);
    const Vec<Word> ones = broadcast<Word>(0x01010101);
    Vec<int32_t> sum[4] = {};
    const auto add = [&](size_t k, Vec<Word> codes) __attribute__((always_inline)) {
        const auto* const table = reinterpret_cast<const Word*>(query) + k * 2 * (table_bytes / sizeof(Word));
        const auto low = permute_bytes(load(table), and_or(codes, nibble, places));
        const auto high = permute_bytes(load(table + table_bytes / sizeof(Word)), and_or(codes >> 4, nibble, places));
        sum[k % 2 * 2] = add_byte_quads(sum[k % 2 * 2], ones, low);
        sum[k % 2 * 2 + 1] = add_byte_quads(sum[k % 2 * 2 + 1], ones, high);
    };
    Vec<Word> words[4];
    size_t k = 0;
    for (; k + 4 <= plane / word; k += 4) {
        load_words(rows, byte + k * word, words);
        for (size_t i = 0; i < 4; ++i) add(k + i, words[i]);
    }
    if (k < plane / word) {
        load_words(rows, byte + k * word, words);
        for (size_t i = 0; k + i < plane / word; ++i) add(k + i, words[i]);
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/// Rough scales, what is added, and scales: the floats behind the planes.
POLYVEC_INLINE void load_factors(const uint8_t* const (&rows)[together], size_t byte,
                                 Vec<float> (&factors)[3]) noexcept {
    Vec<Word> words[4];
    load_words(rows, byte - word, words);  // nothing behind the row
    for (size_t i = 0; i < 3; ++i) factors[i] = (Vec<float>)words[i + 1];
}

template <class F>
POLYVEC_INLINE void name_rows(const uint32_t* ids, size_t n, const uint8_t* (&rows)[together], F row) noexcept {
    for (size_t k = 0; k < together; ++k) rows[k] = row(size_t{ids[k < n ? k : 0]});
}

template <size_t Bits, bool Split>
void distances_of(const BitQuery& query, const BitRows& rows, const uint32_t* ids, size_t n, float* out) noexcept {
    const size_t plane = rows.plane;
    for (size_t first = 0; first < n; first += together) {
        const size_t left = n - first < together ? n - first : together;
        const uint8_t* row[together];
        name_rows(ids + first, left, row, [&](size_t id) { return rows.first + id * rows.first_stride; });
        Vec<float> factors[3];
        load_factors(row, Split ? plane : Bits * plane, factors);
        Vec<int32_t> sum = sums_of_values(query.values, row, 0, plane);
        if constexpr (Split)
            name_rows(ids + first, left, row, [&](size_t id) { return rows.second + id * rows.second_stride; });
        for (size_t j = 1; j < Bits; ++j)
            sum = 2 * sum + sums_of_values(query.values, row, Split ? 0 : j * plane, plane);
        const auto product = __builtin_convertvector(2 * sum - ((1 << Bits) - 1) * query.sum, Vec<float>);
        const Vec<float> distance = query.constant + factors[1] * query.weight + product * factors[2] * query.factor;
        store_first(out + first, distance, left);
    }
}

size_t select_near(const BitQuery& query, const BitRows& rows, const uint32_t* ids, size_t n, float most,
                   uint32_t* near) noexcept {
    const size_t plane = rows.plane;
    size_t count = 0;
    for (size_t first = 0; first < n; first += together) {
        const size_t left = n - first < together ? n - first : together, kept = count;
        const uint8_t* row[together];
        name_rows(ids + first, left, row, [&](size_t id) { return rows.first + id * rows.first_stride; });
        Vec<float> factors[3];
        load_factors(row, plane, factors);
        const Vec<int32_t> sum = sums_of_values(query.values, row, 0, plane);
        const auto product = __builtin_convertvector(2 * sum - query.sum, Vec<float>);
        const Vec<float> least =
            query.constant + factors[1] * query.weight + (product * query.factor - query.slack) * factors[0];
        const uint32_t taken = ~bits(least > most) & ((1u << left) - 1);
        count += static_cast<size_t>(__builtin_popcount(taken));
        store_first(near + kept, compress(load_first(ids + first, left), taken), count - kept);
        fetch_second(rows, near + kept, count - kept);
    }
    return count;
}

#elif POLYVEC_VECTOR_BYTES == 32

// Shuffles look up the sum of the values of half a byte, in 16 planes at once, whose bytes are transposed on the way: a
// third of the time that the form below takes, which made up for half of a walk.
constexpr size_t together = 16;  // planes
constexpr size_t column = 16;    // bytes of a plane, and of a table
constexpr size_t header = 32;    // of a query: the sum of its negative values, which tables count from

using Bytes = Vec<uint8_t>;

// Of the tables for the low halves of a plane's bytes; those for the high ones follow.
size_t table_bytes(size_t plane) noexcept {
    return (plane + column - 1) / column * column * column;
}

size_t query_bytes(size_t plane) noexcept {
    return header + 2 * table_bytes(plane);
}

// Of each register half: so many times that Count rows of bytes become their columns, one behind the other.
template <size_t Count>
POLYVEC_INLINE void interleave_rows(Bytes (&row)[Count]) noexcept {
    for (size_t n = 1; n < Count; n *= 2) {
        Bytes next[Count];
        for (size_t i = 0; i < Count / 2; ++i) {
            next[2 * i] = interleave_first_bytes(row[i], row[i + Count / 2]);
            next[2 * i + 1] = interleave_second_bytes(row[i], row[i + Count / 2]);
        }
        for (size_t i = 0; i < Count; ++i) row[i] = next[i];
    }
}

void prepare(const uint8_t* values, size_t plane, uint8_t* query) noexcept {
    int32_t least = 0;
    for (size_t i = 0; i < 8 * plane; ++i) {
        const auto value = static_cast<int8_t>(values[i]);
        least += value < 0 ? value : 0;
    }
    __builtin_memcpy(query, &least, sizeof least);
    for (size_t first = 0; first < plane; first += column) {
        const Bytes left = broadcast(static_cast<uint8_t>(plane - first < column ? plane - first : column));
        const Bytes inside = (Bytes)(((Bytes)lane_numbers<uint8_t>() & uint8_t{column - 1}) < left);
        Bytes value[4], sum[column] = {};
        for (size_t bit = 0; bit < 4; ++bit) {
            const uint8_t* const at = values + bit * plane + first;
            value[bit] = load_halves(at, at + 4 * plane) & inside;
            sum[0] -= value[bit] & (Bytes)((Vec<int8_t>)value[bit] < 0);
        }
        for (size_t i = 1; i < column; ++i) sum[i] = sum[i & (i - 1)] + value[__builtin_ctzll(i)];
        interleave_rows(sum);
        uint8_t* const table = query + header + first * column;
        for (size_t i = 0; i < column; ++i) {
            using Half = typename VecOf<uint8_t, column>::unaligned;
            *reinterpret_cast<Half*>(table + i * column) = lower_half(sum[i]);
            *reinterpret_cast<Half*>(table + table_bytes(plane) + i * column) = upper_half(sum[i]);
        }
    }
}

/// The sums of the values where a plane has a bit, of `together` planes.
void add_values(const uint8_t* query, const uint8_t* const* planes, size_t bytes, int32_t* sums) noexcept {
    constexpr size_t most = 256;  // bytes whose sums fit into 16 bits: 8 values of up to 31 each
    int32_t least;
    __builtin_memcpy(&least, query, sizeof least);
    const uint8_t *const lows = query + header, *const highs = lows + table_bytes(bytes);
    Vec<int32_t> sum[2] = {broadcast(least), broadcast(least)};
    for (size_t first = 0; first < bytes; first += most) {
        const size_t end = bytes - first < most ? bytes : first + most;
        Vec<uint16_t> all{}, odd{};  // a byte of an odd row is the higher one of 16 bits
        for (size_t at = first; at < end; at += column) {
            Bytes row[8];
            for (size_t i = 0; i < 8; ++i) row[i] = load_halves(planes[i] + at, planes[i + 8] + at);
            interleave_rows(row);
            for (size_t i = 0; i < 8; ++i) {
                const auto pairs = (Vec<uint64_t>)row[i];
                const auto codes = (Bytes)shuffle(pairs, pairs, Lanes<0, 2, 1, 3>{});  // a byte of all rows, the next
                const size_t table = (at + 2 * i) * column;
                const auto half = broadcast(uint8_t{15});
                const Bytes low = shuffle_bytes(load(lows + table), codes & half);
                const Bytes high = shuffle_bytes(load(highs + table), (Bytes)((Vec<uint16_t>)codes >> 4) & half);
                const auto added = (Vec<uint16_t>)(low + high);
                all += added;
                odd += added >> 8;
            }
        }
        all -= odd << 8;
        const auto evens = lower_half(all) + upper_half(all), odds = lower_half(odd) + upper_half(odd);
        using Sums = Vec<int32_t>;
        sum[0] += __builtin_convertvector(shuffle(evens, odds, Lanes<0, 8, 1, 9, 2, 10, 3, 11>{}), Sums);
        sum[1] += __builtin_convertvector(shuffle(evens, odds, Lanes<4, 12, 5, 13, 6, 14, 7, 15>{}), Sums);
    }
    store(sums, sum[0]);
    store(sums + lanes<int32_t>, sum[1]);
}

#else

// A byte holds a bit of eight elements; each of them times its byte of the query fits a 16-bit lane together with the
// next one's, and so do the sums of 64 bytes (8 * 4 * 31 at most).
constexpr size_t together = 4;  // planes
constexpr size_t block = 64;    // bytes of a plane that a block of the query's values belongs to

using Word = uint32_t;

#if defined(POLYVEC_BYTE_PAIRS)
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

size_t query_bytes(size_t plane) noexcept {
    return (plane + block - 1) / block * 8 * block;
}

/// For each block of a plane, and for each bit of a byte: the values of the elements there, or 0.
void prepare(const uint8_t* values, size_t plane, uint8_t* query) noexcept {
    for (size_t first = 0; first < plane; first += block) {
        const size_t left = plane - first < block ? plane - first : block;
        for (size_t bit = 0; bit < 8; ++bit) {
            uint8_t* const to = query + 8 * first + block * bit;
            __builtin_memcpy(to, values + bit * plane + first, left);
            __builtin_memset(to + left, 0, block - left);
        }
    }
}

/// The sums of the values where a plane has a bit, of `together` planes.
POLYVEC_INLINE void add_values(const uint8_t* query, const uint8_t* const* planes, size_t bytes,
                               int32_t* sums) noexcept {
    constexpr size_t width = POLYVEC_VECTOR_BYTES, word = sizeof(Word), J = together;
    const Vec<Word> lowest = broadcast<Word>(0x01010101);
    Vec<int32_t> sum[J] = {};
    for (size_t first = 0; first < bytes; first += block) {
        const size_t left = bytes - first;
        Sums part[J][2];
        for (size_t j = 0; j < J; ++j) part[j][0] = part[j][1] = Sums{};
        for (size_t at = 0; at < block && at < left; at += width) {
            const auto* const q = reinterpret_cast<const Word*>(query + 8 * first + at);
            Vec<Word> x[J];
            for (size_t j = 0; j < J; ++j) {
                const auto* const p = reinterpret_cast<const Word*>(planes[j] + first + at);
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
    *reinterpret_cast<typename VecOf<int32_t, J * sizeof(int32_t)>::unaligned*>(sums) = reduce_add(sum);
}

#endif

#if !defined(POLYVEC_NARROW_PRODUCTS)

POLYVEC_INLINE float factor_of(const uint8_t* row, size_t factors, size_t i) noexcept {
    float factor;
    __builtin_memcpy(&factor, row + factors + i * sizeof(float), sizeof factor);
    return factor;
}

template <size_t Bits, bool Split>
void distances_of(const BitQuery& query, const BitRows& rows, const uint32_t* ids, size_t n, float* out) noexcept {
    constexpr size_t group = together / Bits;
    const size_t plane = rows.plane, factors = Split ? plane : Bits * plane;
    for (size_t first = 0; first < n; first += group) {
        const size_t left = n - first < group ? n - first : group;
        const uint8_t* planes[together];
        for (size_t k = 0, p = 0; p < together; ++k) {
            const size_t id = ids[first + (k < left ? k : 0)];
            const uint8_t* const row = rows.first + id * rows.first_stride;
            planes[p++] = row;
            for (size_t j = 1; j < Bits && p < together; ++j)
                planes[p++] = Split ? rows.second + id * rows.second_stride : row + j * plane;
        }
        int32_t sums[together];
        add_values(query.values, planes, plane, sums);
        for (size_t k = 0; k < left; ++k) {
            int32_t sum = 0;
            for (size_t j = 0; j < Bits; ++j) sum = 2 * sum + sums[k * Bits + j];
            const auto product = static_cast<float>(2 * sum - ((1 << Bits) - 1) * query.sum);
            const uint8_t* const row = planes[k * Bits];
            out[first + k] = query.constant + factor_of(row, factors, 1) * query.weight +
                             product * factor_of(row, factors, 2) * query.factor;
        }
    }
}

size_t select_near(const BitQuery& query, const BitRows& rows, const uint32_t* ids, size_t n, float most,
                   uint32_t* near) noexcept {
    const size_t plane = rows.plane;
    size_t count = 0;
    for (size_t first = 0; first < n; first += together) {
        const size_t left = n - first < together ? n - first : together, kept = count;
        const uint8_t* planes[together];
        for (size_t k = 0; k < together; ++k)
            planes[k] = rows.first + ids[first + (k < left ? k : 0)] * rows.first_stride;
        int32_t sums[together];
        add_values(query.values, planes, plane, sums);
        for (size_t k = 0; k < left; ++k) {
            const auto product = static_cast<float>(2 * sums[k] - query.sum);
            const float least = query.constant + factor_of(planes[k], plane, 1) * query.weight +
                                (product * query.factor - query.slack) * factor_of(planes[k], plane, 0);
            near[count] = ids[first + k];
            count += !(least > most);
        }
        fetch_second(rows, near + kept, count - kept);
    }
    return count;
}

#endif

void distances(const BitQuery& query, const BitRows& rows, const uint32_t* ids, size_t n, float* out) noexcept {
    if (rows.second) return distances_of<2, true>(query, rows, ids, n, out);
    if (rows.bits == 2) return distances_of<2, false>(query, rows, ids, n, out);
    rows.bits == 3 ? distances_of<3, false>(query, rows, ids, n, out)
                   : distances_of<4, false>(query, rows, ids, n, out);
}

}  // namespace

extern const BitDistanceKernels bit_distance_kernels;
const BitDistanceKernels bit_distance_kernels{query_bytes, prepare, distances, select_near};

}  // namespace polyvec::POLYVEC_ISA
