// Tables and scans for product quantisation.
//
// Scans in registers: the entries of a query's tables are rounded down to 8 bits, and a code's score becomes a sum of
// bytes. Codes lie in blocks, byte by byte: the register that holds one byte of many codes is the index of a byte
// shuffle, which looks all of them up at once (Andre, Kermarrec and Le Scouarnec 2015: Cache locality is not enough,
// section 4). What the driver wants of a sum is whether it reaches a floor; the few that do are rescored in float32.
//
//     4 bits   16 codes a block. AVX-512 VBMI: 4 bytes of a code become one lane, an index of 8 bits is the code and
//              its place in the lane, `vpermb` looks up 4 subspaces of 16 codes, `vpdpbusd` adds them up.
//              AVX2, AVX-512: a shuffle an entry. The two entries of a byte are added, four such sums averaged in
//              bytes, which rounds off less than tables of fewer bits would, and only then added up in 16 bits. For
//              several queries nibbles are unpacked once, into the nearest cache: 256 entries take 15 operations and
//              half a dozen for the 16 bits. On Zen 3 shuffles start twice a cycle and averages partly in their place:
//              42 entries a cycle. Tables kept for two queries, each step for itself, and sums of 16 bits in registers
//              were no faster; averaging eight sums saves what more candidates cost.
//     8 bits   64 codes a block, sums of 16 bits. AVX-512 VBMI: two `vpermi2b` look up a byte of 64 codes. AVX2: a
//              tree of 16 shuffles and 15 blends looks up a byte of 32 codes, which pays for a few queries.
//
// Scans in memory, else: 4-bit sums one by one; 8-bit codes by float tables, one addition a byte. For a batch, lanes
// are queries: the entries of one code for all lanes lie side by side, and one vector addition serves them all. A
// single query runs through the same code with V = float. Both take the subspaces in groups whose tables stay in the
// nearest cache that holds them.
//
// Every score is the float32 sum of a code's entries in the order of the subspaces, so that it has the same bits by
// every way, alone and in a batch.
#include "tables.hpp"
#include "tile.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t L = lanes<float>;

// ---- tables

/// `columns` elements of L codewords, transposed, against those of a query.
template <bool Squared, size_t N>
POLYVEC_INLINE Vec<float> add_entries(Vec<float> sum, const float* query, const Vec<float> (&block)[N],
                                      size_t columns) noexcept {
#pragma GCC unroll 16
    for (size_t u = 0; u < columns; ++u) {
        if constexpr (Squared) {
            const Vec<float> x = broadcast(query[u]) - block[u];
            sum -= x * x;
        } else {
            sum += broadcast(query[u]) * block[u];
        }
    }
    return sum;
}

template <bool Squared>
POLYVEC_INLINE void entries_by(const PqTables& t, float* out) noexcept {
    const size_t d = t.m * t.dsub;
    for (size_t k = 0; k < t.n_subspaces; ++k) {
        const size_t s = static_cast<size_t>(t.subspaces[k]);
        for (size_t c = 0; c < t.ksub; c += L) {
            const float* codewords = t.codebooks + (s * t.ksub + c) * t.dsub;
            for (size_t i = 0; i < t.dsub; i += L) {
                const size_t columns = t.dsub - i < L ? t.dsub - i : L;
                Vec<float> block[L];
                for (size_t j = 0; j < L; ++j)
                    block[j] = columns == L ? load(codewords + j * t.dsub + i)
                                            : load_first(codewords + j * t.dsub + i, columns);
                transpose(block, typename LaneRange<0, L>::type{});
                for (size_t q = 0; q < t.count; ++q) {
                    const float* query = t.queries + q * d + s * t.dsub + i;
                    float* at = out + q * t.stride + s * t.ksub + c;
                    const Vec<float> sum = i == 0 ? Vec<float>{} : load(at);
                    store(at, columns == L ? add_entries<Squared>(sum, query, block, L)
                                           : add_entries<Squared>(sum, query, block, columns));
                }
            }
        }
    }
}

/// Lanes are codewords; each is summed over its elements in order.
void entries(const PqTables& t, float* out) noexcept {
    t.squared ? entries_by<true>(t, out) : entries_by<false>(t, out);
}

/// Where the byte of entry c of subspace s lies: for nibbles the tables of 4 bytes side by side, the low ones first.
POLYVEC_INLINE size_t place(size_t s, bool nibbles) noexcept {
    return nibbles ? s / 8 * 128 + s % 2 * 64 + s / 2 % 4 * 16 : s * 256;
}

// Where a byte shuffle looks entries up, those of the two codes of a byte are added up, and four such sums averaged,
// two by two: a node. Averages are rounded up, so that four times a node is up to 4 more than its sums. A node takes in
// as many steps as a register has columns of 16 codes.
#if defined(POLYVEC_BYTE_SHUFFLE) && !defined(POLYVEC_NARROW_PRODUCTS)
constexpr bool has_nodes = true;
#else
constexpr bool has_nodes = false;
#endif
constexpr size_t sums_of_node = 4, columns_at_once = sizeof(Vec<uint8_t>) / 16, steps_of_node = columns_at_once;

/// The least entry of a table, and the greatest.
POLYVEC_INLINE float least_of(const float* table, size_t n, float& most) noexcept {
    Vec<float> low = load(table), high = low;
    for (size_t c = L; c < n; c += L) {
        const Vec<float> x = load(table + c);
        low = min(x, low);
        high = max(x, high);
    }
    most = reduce_max(high);
    return reduce_min(low);
}

/// The lowest bytes of lanes of 32 bits. GCC 12 converts such lanes one by one.
template <int... K>
POLYVEC_INLINE auto first_bytes_of(Vec<uint8_t> v, Lanes<K...>) noexcept {
    return shuffle(v, v, Lanes<4 * K...>{});
}
POLYVEC_INLINE auto first_bytes(Vec<uint8_t> v) noexcept {
    return first_bytes_of(v, typename LaneRange<0, L>::type{});
}

void round_down(const PqTables& t, const float* tables, double near, uint8_t* out, PqRounding& rounding) noexcept {
    constexpr double reach = 32;  // a byte that saturates tells this many times what near codes differ on average
    const bool nibbles = t.ksub == 16, in_nodes = nibbles && has_nodes;
    float widest = 0, width = 0, most;  // of what is added up in one byte
    double best = 0;
    size_t rounded = 0, n_bytes = 0, steps = 0, previous = ~size_t{};
    const auto shares_byte = [&](size_t k) {  // with the one before
        return in_nodes && 0 < k && k < t.n_subspaces && t.subspaces[k] / 2 == t.subspaces[k - 1] / 2;
    };
    rounding = {};
    for (size_t k = 0; k < t.n_subspaces; ++k) {
        const size_t s = static_cast<size_t>(t.subspaces[k]);
        const float least = least_of(tables + s * t.ksub, t.ksub, most);
        rounding.offset += static_cast<double>(least);
        rounding.size += static_cast<double>(-least > most ? -least : most);
        best += static_cast<double>(most);
        rounded += most > least;
        steps += k == 0 || s / 8 != previous / 8;
        n_bytes += !shares_byte(k);
        width = (shares_byte(k) ? width : 0) + (most - least);
        if (width > widest) widest = width;
        previous = s;
    }
    const double range = reach * (best - near) / static_cast<double>(n_bytes);
    const bool saturates = range < static_cast<double>(widest) && range > 0x1p-20 * static_cast<double>(widest);
    if (saturates) widest = static_cast<float>(range);
    rounding.step = static_cast<double>(widest) / 255;
    rounding.lost = static_cast<double>(rounded);
    rounding.most = static_cast<int32_t>(255 * rounded);
    if (in_nodes) {
        // Each step may lie in a node of its own, with steps that only other queries need.
        const size_t all = ((t.m + 7) / 8 + steps_of_node - 1) / steps_of_node;
        const size_t nodes = columns_at_once * (steps < all ? steps : all);
        rounding.offset -= rounding.step * static_cast<double>(sums_of_node * nodes);
        rounding.step *= sums_of_node;
        rounding.lost = static_cast<double>(rounded) / sums_of_node + static_cast<double>(nodes);
        rounding.most = static_cast<int32_t>(255 * nodes);
    }
    const float scale = widest > 0 ? 255 / widest : 0;
    float taken = 0;  // of the byte by the first of two
    for (size_t k = 0; k < t.n_subspaces; ++k) {
        const size_t s = static_cast<size_t>(t.subspaces[k]);
        const float* table = tables + s * t.ksub;
        uint8_t* bytes = out + place(s, nibbles);
        float least = least_of(table, t.ksub, most);
        if (saturates) {
            float room = widest - (shares_byte(k) ? taken : 0);
            if (shares_byte(k + 1)) {
                float next_most;
                const float next_least = least_of(table + t.ksub, t.ksub, next_most);
                room -= min(next_most - next_least, widest / 2);
            }
            taken = min(most - least, room);
            least = most - taken;
        }
        for (size_t c = 0; c < t.ksub; c += L) {
            const Vec<float> over = max(load(table + c) - broadcast(least), Vec<float>{});
            const Vec<float> steps = min(over * broadcast(scale), broadcast(255.0f));
            const auto whole = (Vec<uint8_t>)__builtin_convertvector(steps, Vec<int32_t>);
            *reinterpret_cast<typename VecOf<uint8_t, L>::unaligned*>(bytes + c) = first_bytes(whole);
        }
    }
}

// ---- blocks

/// out[c][r] = in[r][c].
void transpose_bytes(const uint8_t* in, size_t rows, size_t columns, size_t in_stride, uint8_t* out,
                     size_t out_stride) noexcept {
    using Row = VecOf<uint8_t, 16>;
    for (size_t r = 0; r < rows; r += 16) {
        for (size_t c = 0; c < columns; c += 16) {
            const size_t height = rows - r < 16 ? rows - r : 16, width = columns - c < 16 ? columns - c : 16;
            if (height < 16 || width < 16) {
                for (size_t j = 0; j < height; ++j) {
                    for (size_t i = 0; i < width; ++i)
                        out[(c + i) * out_stride + r + j] = in[(r + j) * in_stride + c + i];
                }
                continue;
            }
            typename Row::type tile[16];
            for (size_t j = 0; j < 16; ++j)
                tile[j] = *reinterpret_cast<const typename Row::unaligned*>(in + (r + j) * in_stride + c);
            transpose(tile, typename LaneRange<0, 16>::type{});
            for (size_t i = 0; i < 16; ++i)
                *reinterpret_cast<typename Row::unaligned*>(out + (c + i) * out_stride + r) = tile[i];
        }
    }
}

/// First, First + Distance, First + 1, First + 1 + Distance, ...: 2 Count lanes.
template <int First, int Count, int Distance, int... K>
struct Interleave : Interleave<First, Count - 1, Distance, First + Count - 1, First + Count - 1 + Distance, K...> {};
template <int First, int Distance, int... K>
struct Interleave<First, 0, Distance, K...> {
    using type = Lanes<K...>;
};

// ---- 4 bits

constexpr size_t nibble_block = 16;

#if defined(POLYVEC_NARROW_PRODUCTS)

constexpr size_t most_queries = 8;
template <size_t Q>
constexpr size_t blocks_at_once = Q == 8 ? 2 : 4;  // up to 16 sums in registers

template <size_t Q, size_t G>
POLYVEC_INLINE void sum_nibbles(const PqScan& scan, const uint8_t* codes, [[maybe_unused]] size_t ahead,
                                int32_t* sums) noexcept {
    const auto quads = byte_transposition_4x16();
    const Vec<uint32_t> place_in_lane = broadcast(0x30201000u), ones = broadcast(0x01010101u);
    const Vec<uint32_t> nibble = broadcast(0x0f0f0f0fu);
    const size_t block = scan.columns * nibble_block;
    Vec<int32_t> sum[Q][G] = {};
    for (size_t k = 0; k < scan.n_steps; ++k) {
        const size_t step = static_cast<size_t>(scan.steps[k]);
        Vec<uint32_t> low[G], high[G];
        for (size_t g = 0; g < G; ++g) {
            const uint8_t* at = codes + g * block + step * 64;
            prefetch(at + ahead);
            const Vec<uint32_t> code = permute_bytes(load(reinterpret_cast<const uint32_t*>(at)), quads);
            low[g] = and_or(code, nibble, place_in_lane);
            high[g] = and_or(code >> 4, nibble, place_in_lane);
        }
        for (size_t q = 0; q < Q; ++q) {
            const auto* table = reinterpret_cast<const uint32_t*>(scan.tables[q] + step * 128);
            const Vec<uint32_t> low_table = load(table), high_table = load(table + 16);
            for (size_t g = 0; g < G; ++g) {
                sum[q][g] = add_byte_quads(sum[q][g], permute_bytes(low_table, low[g]), ones);
                sum[q][g] = add_byte_quads(sum[q][g], permute_bytes(high_table, high[g]), ones);
                keep_in_register(sum[q][g]);
            }
        }
    }
    for (size_t q = 0; q < Q; ++q) {
        for (size_t g = 0; g < G; ++g) store(sums + (q * G + g) * nibble_block, sum[q][g]);
    }
}

#elif defined(POLYVEC_BYTE_SHUFFLE)

constexpr size_t most_queries = 32;
constexpr size_t blocks_at_once = 8;
constexpr size_t shorts_last = 256;   // steps, each of at most 255: 65,280 at most
constexpr size_t steps_at_once = 16;  // 8 blocks: 16 KB of nibbles
constexpr size_t prefetched = 8;      // blocks ahead

/// The sums of a block in 16 bits: those of even codes, then those of odd ones.
using BlockSums = VecOf<uint16_t, 2 * nibble_block>;

/// From lanes of 16 bits: `even` and `odd` hold 8 codes each, as often as 128 bits fit in.
template <class V>
POLYVEC_INLINE BlockSums::type block_sums(V even, V odd) noexcept {
    if constexpr (sizeof even == 16) {
        return shuffle(even, odd, typename LaneRange<0, 16>::type{});
    } else if constexpr (sizeof even == 32) {
        return shuffle(even, odd, Lanes<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>{}) +
               shuffle(even, odd, Lanes<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>{});
    } else {
        return block_sums(lower_half(even) + upper_half(even), lower_half(odd) + upper_half(odd));
    }
}

constexpr size_t parts = 4 / columns_at_once;  // registers of a step of a block

POLYVEC_INLINE void unpack(const uint8_t* code, Vec<uint8_t> (&low)[parts], Vec<uint8_t> (&high)[parts]) noexcept {
    const Vec<uint8_t> nibble = broadcast(uint8_t{15});
    for (size_t p = 0; p < parts; ++p) {
        Vec<uint8_t> bytes = load(code + p * sizeof bytes);
        keep_in_register(bytes);  // or GCC loads them twice
        low[p] = bytes & nibble;
        high[p] = (Vec<uint8_t>)((Vec<uint16_t>)bytes >> 4) & nibble;
    }
}

/// What is fetched ahead of n steps of G blocks: the same of later blocks. Where that is all of them, lines are named
/// in their order in memory, which the hardware follows: one query reads at the rate of a plain sum, else at 3/4 of it.
POLYVEC_INLINE bool all_steps(size_t n, size_t stride) noexcept {
    return n * 64 == stride;
}

/// The nibbles of n steps of G blocks that lie `stride` bytes apart: step by step, and there block by block, 128 bytes
/// each, the low ones first.
template <size_t G>
POLYVEC_INLINE void unpack_steps(const uint8_t* codes, size_t stride, const int32_t* steps, size_t n,
                                 uint8_t* out) noexcept {
    const bool in_order = all_steps(n, stride);
    const uint8_t* next = codes + prefetched * stride;
    for (size_t k = 0; k < n; ++k) {
        for (size_t g = 0; g < G; ++g, out += 128, next += 64) {
            const uint8_t* code = codes + g * stride + static_cast<size_t>(steps[k]) * 64;
            prefetch(in_order ? next : code + prefetched * stride);
            Vec<uint8_t> low[parts], high[parts];
            unpack(code, low, high);
            for (size_t p = 0; p < parts; ++p) {
                store(out + p * sizeof low[p], low[p]);
                store(out + 64 + p * sizeof low[p], high[p]);
            }
        }
    }
}

/// Nodes of `Steps` steps for G blocks that lie `stride` bytes apart: of a query's tables, `table` holds those of each
/// step, of the codes, `code` each step of the first block, and `next` what to fetch, at every block `next_stride`
/// bytes further. Unpacked nibbles are the indices that a shuffle reads from memory in the same operation; the tables
/// stay in registers for all blocks.
template <size_t G, bool Unpacked, size_t Steps>
POLYVEC_INLINE void add_nodes(const uint8_t* const (&code)[steps_of_node], size_t stride,
                              const uint8_t* const (&table)[steps_of_node], const uint8_t* const (&next)[steps_of_node],
                              size_t next_stride, Vec<uint8_t>* nodes) noexcept {
    constexpr size_t B = sizeof(Vec<uint8_t>);
    Vec<uint8_t> low_table[Steps * parts], high_table[Steps * parts];
    for (size_t i = 0; i < Steps * parts; ++i) {
        low_table[i] = load(table[i / parts] + i % parts * B);
        high_table[i] = load(table[i / parts] + 64 + i % parts * B);
    }
#pragma GCC unroll 1
    for (size_t at = 0, next_at = 0; at < G * stride; at += stride, next_at += next_stride) {
        Vec<uint8_t> low[parts], high[parts], half[2];
        for (size_t i = 0; i < sums_of_node; ++i) {
            Vec<uint8_t> sum{};
            if (i < Steps * parts) {
                const size_t k = i / parts, p = i % parts;
                if constexpr (Unpacked) {
                    low[p] = load(code[k] + at + p * B);
                    high[p] = load(code[k] + at + 64 + p * B);
                } else if (p == 0) {
                    prefetch(next[k] + next_at);
                    unpack(code[k] + at, low, high);
                }
                sum = shuffle_bytes(low_table[i], low[p]) + shuffle_bytes(high_table[i], high[p]);
            }
            half[i / 2] = i % 2 == 0 ? sum : average_bytes(half[i / 2], sum);
            keep_in_register(half[i / 2]);  // in this order, or the tables do not stay in registers
        }
        *nodes++ = average_bytes(half[0], half[1]);
    }
}

/// Calls f(Lanes<n>) for n, which is from 1 to Most.
template <int Most, class F>
POLYVEC_INLINE void with_constant(size_t n, F&& f) noexcept {
    if constexpr (Most > 1) {
        if (n < Most) return with_constant<Most - 1>(n, f);
    }
    f(Lanes<Most>{});
}

/// Adds what n steps of G blocks, `steps_at_once` at most, give one query to its sums, or sets them.
template <size_t G, bool Unpacked>
POLYVEC_INLINE void sum_steps(const uint8_t* codes, size_t stride, const uint8_t* tables, const int32_t* steps,
                              size_t n, bool add, BlockSums::type* sums) noexcept {
    Vec<uint8_t> nodes[steps_at_once / steps_of_node * G];
    const bool in_order = all_steps(n, stride);
    size_t end = 0;
    for (size_t k = 0; k < n; k += steps_of_node, end += G) {
        const size_t count = n - k < steps_of_node ? n - k : steps_of_node;
        const uint8_t *code[steps_of_node] = {}, *table[steps_of_node] = {}, *next[steps_of_node] = {};
        for (size_t j = 0; j < count; ++j) {
            const size_t step = static_cast<size_t>(steps[k + j]);
            code[j] = codes + (Unpacked ? (k + j) * G * 128 : step * 64);
            table[j] = tables + step * 128;
            next[j] = (in_order ? codes + (k * G + j) * 64 : code[j]) + prefetched * stride;
        }
        with_constant<steps_of_node>(count, [&]<int Steps>(Lanes<Steps>) __attribute__((always_inline)) {
            add_nodes<G, Unpacked, Steps>(code, stride, table, next, in_order ? count * 64 : stride, nodes + end);
        });
    }
    constexpr size_t together = G < 4 ? G : 4;
    for (size_t first = 0; first < G; first += together) {
        Vec<uint16_t> all[together] = {}, odd[together] = {};
        for (size_t i = first; i < end; i += G) {
            for (size_t g = 0; g < together; ++g) {
                const auto node = (Vec<uint16_t>)nodes[i + g];
                all[g] += node;
                odd[g] += node >> 8;
            }
        }
        for (size_t g = 0; g < together; ++g) {
            const auto sum = block_sums(all[g] - (odd[g] << 8), odd[g]);  // `all` has the odd ones 256 times
            sums[first + g] = add ? sums[first + g] + sum : sum;
        }
    }
}

/// sums[q * G + g]: steps [first, last), `shorts_last` of them at most, of G blocks that lie `stride` bytes apart.
template <size_t G>
POLYVEC_INLINE void sum_in_shorts(const PqScan& scan, const uint8_t* codes, size_t stride, size_t first, size_t last,
                                  BlockSums::type* sums) noexcept {
    const bool unpacks = scan.queries >= 4;  // fewer are too few to unpack for
    alignas(64) uint8_t nibbles[steps_at_once * G * 128];
    for (size_t k = first; k == first || k < last; k += steps_at_once) {
        const size_t n = last - k < steps_at_once ? last - k : steps_at_once;
        if (unpacks) unpack_steps<G>(codes, stride, scan.steps + k, n, nibbles);
        for (size_t q = 0; q < scan.queries; ++q) {
            if (unpacks) {
                sum_steps<G, true>(nibbles, 128, scan.tables[q], scan.steps + k, n, k > first, sums + q * G);
            } else {
                sum_steps<G, false>(codes, stride, scan.tables[q], scan.steps + k, n, k > first, sums + q * G);
            }
        }
    }
}

/// sums[q * distance + code] of G blocks that lie `stride` bytes apart, any number of steps.
template <size_t G>
POLYVEC_INLINE void sum_nibbles(const PqScan& scan, const uint8_t* codes, size_t stride, int32_t* sums,
                                size_t distance) noexcept {
    BlockSums::type some[most_queries * G];
    for (size_t first = 0; first == 0 || first < scan.n_steps; first += shorts_last) {
        const size_t last = scan.n_steps - first < shorts_last ? scan.n_steps : first + shorts_last;
        sum_in_shorts<G>(scan, codes, stride, first, last, some);
        for (size_t i = 0; i < scan.queries * G; ++i) {
            const auto in_order = shuffle(some[i], some[i], typename Interleave<0, 8, 8>::type{});
            int32_t* to = sums + i / G * distance + i % G * nibble_block;
            for (size_t v = 0; v < nibble_block; ++v) to[v] = (first > 0 ? to[v] : 0) + in_order[v];
        }
    }
}

#else

constexpr size_t most_queries = 1;
template <size_t Q>
constexpr size_t blocks_at_once = 1;

template <size_t Q, size_t G>
POLYVEC_INLINE void sum_nibbles(const PqScan& scan, const uint8_t* codes, [[maybe_unused]] size_t ahead,
                                int32_t* sums) noexcept {
    for (size_t v = 0; v < nibble_block; ++v) sums[v] = 0;
    for (size_t k = 0; k < scan.n_steps; ++k) {
        const size_t step = static_cast<size_t>(scan.steps[k]);
        for (size_t j = 0; j < 4; ++j) {
            const uint8_t *code = codes + step * 64 + j * 16, *table = scan.tables[0] + step * 128 + j * 16;
            for (size_t v = 0; v < nibble_block; ++v) sums[v] += table[code[v] & 15] + table[64 + (code[v] >> 4)];
        }
    }
}

#endif

// ---- 8 bits

constexpr size_t byte_block = 64;

#if defined(POLYVEC_BYTE_TABLES)

/// One query and G blocks.
template <size_t G>
POLYVEC_INLINE void sum_bytes(const PqScan& scan, const uint8_t* codes, int32_t* sums) noexcept {
    constexpr size_t B = sizeof(Vec<uint8_t>), parts = G * byte_block / B, steps_at_once = 256;  // 65,280 at most
    const size_t block = scan.columns * byte_block;
    for (size_t first = 0; first == 0 || first < scan.n_steps; first += steps_at_once) {
        const size_t last = scan.n_steps - first < steps_at_once ? scan.n_steps : first + steps_at_once;
        Vec<uint16_t> all[parts] = {}, high[parts] = {};
        for (size_t k = first; k < last; ++k) {
            const size_t step = static_cast<size_t>(scan.steps[k]);
            const ByteTable table = load_byte_table(scan.tables[0] + step * 256);
            for (size_t p = 0; p < parts; ++p) {
                const size_t code = p * B;
                const auto entry = (Vec<uint16_t>)look_up_bytes(
                    table, codes + code / byte_block * block + step * byte_block + code % byte_block);
                all[p] += entry;
                high[p] += entry >> 8;
                keep_in_register(all[p]);
                keep_in_register(high[p]);
            }
        }
        for (size_t p = 0; p < parts; ++p) {
            const Vec<uint16_t> even = all[p] - (high[p] << 8);
            // Lane i holds codes 2 i (even) and 2 i + 1 (high).
            const Vec<uint16_t> ordered[2] = {shuffle(even, high[p], typename Interleave<0, L, 2 * L>::type{}),
                                              shuffle(even, high[p], typename Interleave<L, L, 2 * L>::type{})};
            for (size_t q = 0; q < 4; ++q) {
                const auto half = q % 2 ? upper_half(ordered[q / 2]) : lower_half(ordered[q / 2]);
                int32_t* at = sums + p * B + q * L;
                const auto wide = __builtin_convertvector(half, Vec<int32_t>);
                store(at, first == 0 ? wide : load(at) + wide);
            }
        }
    }
}

#endif

// ---- which sums reach the floor

template <size_t Block, size_t Q, size_t G>
POLYVEC_INLINE PqHit* emit(const PqScan& scan, const int32_t* sums, const uint8_t* allowed, size_t first,
                           PqHit* hit) noexcept {
    constexpr size_t n = G * Block, W = n < 64 ? n : 64;  // codes, and those of one word of bits
    uint64_t set[Q][n / W] = {}, all = 0;
    for (size_t q = 0; q < Q; ++q) {
        const Vec<int32_t> floor = broadcast(scan.floor[q]);
        for (size_t k = 0; k < n; k += L) set[q][k / W] |= uint64_t{bits(load(sums + q * n + k) >= floor)} << k % W;
        for (const uint64_t word : set[q]) all |= word;
    }
    if (!all) return hit;  // one branch for all queries
    for (size_t q = 0; q < Q; ++q) {
        for (size_t k = 0; k < n; k += W) {
            uint64_t word = set[q][k / W];
            if (allowed) {
                uint64_t bits = 0;
                __builtin_memcpy(&bits, allowed + k / 8, W / 8);
                word &= bits;
            }
            for (; word; word &= word - 1) {
                const size_t j = k + static_cast<size_t>(__builtin_ctzll(word));
                *hit++ = {sums[q * n + j], static_cast<uint32_t>((first + j) * most_queries + q)};
            }
        }
    }
    return hit;
}

/// Whether a filter lets none of the codes of these bytes through.
POLYVEC_INLINE bool none_allowed(const uint8_t* allowed, size_t bytes) noexcept {
    uint8_t any = 0;
    for (size_t i = 0; i < bytes; ++i) any |= allowed[i];
    return any == 0;
}

/// Sums of `Blocks` blocks from `block` on, for Q queries, and the hits among them.
template <size_t Block, size_t Q, size_t G, class Sum>
POLYVEC_INLINE PqHit* scan_group(const PqScan& scan, size_t block, PqHit* hit, Sum&& sum) noexcept {
    const size_t first = block * Block;
    const uint8_t* allowed = scan.allowed ? scan.allowed + first / 8 : nullptr;
    if (allowed && none_allowed(allowed, G * Block / 8)) return hit;
    alignas(64) int32_t sums[Q * G * Block];
    sum(scan, scan.codes + first * scan.columns, sums);
    return emit<Block, Q, G>(scan, sums, allowed, first, hit);
}

#if defined(POLYVEC_BYTE_SHUFFLE) && !defined(POLYVEC_NARROW_PRODUCTS)

/// Out of line: few blocks have a hit. The order of the hits is that of the lanes.
template <size_t G>
[[gnu::noinline]] PqHit* emit_shorts(const BlockSums::type* sums, uint16_t floor, size_t query, const uint8_t* allowed,
                                     size_t first, PqHit* hit) noexcept {
    for (size_t g = 0; g < G; ++g) {
        for (uint32_t set = bits(sums[g] >= floor - BlockSums::type{}); set; set &= set - 1) {
            const auto lane = static_cast<size_t>(__builtin_ctz(set));
            const size_t code = g * nibble_block + lane % 8 * 2 + lane / 8;
            if (allowed && !(allowed[code / 8] >> code % 8 & 1)) continue;
            *hit++ = {sums[g][lane], static_cast<uint32_t>((first + code) * most_queries + query)};
        }
    }
    return hit;
}

template <size_t G>
POLYVEC_INLINE PqHit* select_blocks(const PqScan& scan, const uint16_t* floor, size_t block, PqHit* hit) noexcept {
    const size_t first = block * nibble_block, stride = scan.columns * nibble_block;
    const uint8_t* allowed = scan.allowed ? scan.allowed + first / 8 : nullptr;
    if (allowed && none_allowed(allowed, G * nibble_block / 8)) return hit;
    const uint8_t* codes = scan.codes + block * stride;
    if (scan.n_steps <= shorts_last) {
        BlockSums::type sums[most_queries * G];
        sum_in_shorts<G>(scan, codes, stride, 0, scan.n_steps, sums);
        for (size_t q = 0; q < scan.queries; ++q) {
            BlockSums::type most = sums[q * G];
            for (size_t g = 1; g < G; ++g) most = sums[q * G + g] > most ? sums[q * G + g] : most;
            if (bits(most >= floor[q] - BlockSums::type{}))
                hit = emit_shorts<G>(sums + q * G, floor[q], q, allowed, first, hit);
        }
        return hit;
    }
    constexpr size_t n = G * nibble_block;
    int32_t sums[most_queries * n];
    sum_nibbles<G>(scan, codes, stride, sums, n);
    for (size_t i = 0; i < scan.queries * n; ++i) {
        const size_t q = i / n, code = i % n;
        if (sums[i] >= scan.floor[q] && (!allowed || (allowed[code / 8] >> code % 8 & 1) != 0))
            *hit++ = {sums[i], static_cast<uint32_t>((first + code) * most_queries + q)};
    }
    return hit;
}

size_t select_nibbles(const PqScan& scan, PqHit* hits) noexcept {
    uint16_t floor[most_queries];
    for (size_t q = 0; q < scan.queries; ++q) {
        const int32_t x = scan.floor[q];
        floor[q] = static_cast<uint16_t>(x < 0 ? 0 : x > 65535 ? 65535 : x);
    }
    PqHit* hit = hits;
    size_t block = 0;
    const auto one_by_one = [&](size_t end) {
        for (; block < end; ++block) hit = select_blocks<1>(scan, floor, block, hit);
    };
    while (block + blocks_at_once <= scan.blocks) {
        size_t wanted = blocks_at_once;
        for (size_t g = 0; scan.allowed && g < blocks_at_once; ++g)
            wanted -= none_allowed(scan.allowed + (block + g) * nibble_block / 8, nibble_block / 8);
        if (wanted > blocks_at_once / 2) {
            hit = select_blocks<blocks_at_once>(scan, floor, block, hit);
            block += blocks_at_once;
        } else {
            one_by_one(block + blocks_at_once);
        }
    }
    if (!scan.allowed && block + 4 <= scan.blocks) {  // clusters are often shorter than blocks_at_once
        hit = select_blocks<4>(scan, floor, block, hit);
        block += 4;
    }
    one_by_one(scan.blocks);
    return static_cast<size_t>(hit - hits);
}

void sums_of_nibbles(const PqScan& scan, size_t distance, int32_t* sums, size_t stride) noexcept {
    const size_t bytes = distance * scan.columns * nibble_block;
    size_t block = 0;
    for (; block + blocks_at_once <= scan.blocks; block += blocks_at_once)
        sum_nibbles<blocks_at_once>(scan, scan.codes + block * bytes, bytes, sums + block * nibble_block, stride);
    for (; block + 4 <= scan.blocks; block += 4)
        sum_nibbles<4>(scan, scan.codes + block * bytes, bytes, sums + block * nibble_block, stride);
    for (; block < scan.blocks; ++block)
        sum_nibbles<1>(scan, scan.codes + block * bytes, bytes, sums + block * nibble_block, stride);
}

#else

/// Fetches twice what one query takes in while the level-3 cache answers.
template <size_t Q, size_t G>
POLYVEC_INLINE void sum_nibbles_in_order(const PqScan& scan, const uint8_t* codes, int32_t* sums) noexcept {
    sum_nibbles<Q, G>(scan, codes, 12288, sums);
}

template <size_t Q>
PqHit* scan_nibbles(const PqScan& scan, PqHit* hit) noexcept {
    constexpr size_t G = blocks_at_once<Q>;
    size_t block = 0;
    for (; block + G <= scan.blocks; block += G)
        hit = scan_group<nibble_block, Q, G>(scan, block, hit, sum_nibbles_in_order<Q, G>);
    for (; block < scan.blocks; ++block)
        hit = scan_group<nibble_block, Q, 1>(scan, block, hit, sum_nibbles_in_order<Q, 1>);
    return hit;
}

/// f(Lanes<Q>) for the number of queries Q.
template <class F>
POLYVEC_INLINE void for_queries(size_t queries, F&& f) noexcept {
    if constexpr (most_queries >= 8) {
        if (queries == 8) f(Lanes<8>{});
    }
    if constexpr (most_queries >= 4) {
        if (queries == 4) f(Lanes<4>{});
        if (queries == 2) f(Lanes<2>{});
    }
    if (queries == 1) f(Lanes<1>{});
}

size_t select_nibbles(const PqScan& scan, PqHit* hits) noexcept {
    PqHit* end = hits;
    for_queries(scan.queries, [&]<int Q>(Lanes<Q>) { end = scan_nibbles<Q>(scan, hits); });
    return static_cast<size_t>(end - hits);
}

void sums_of_nibbles(const PqScan& scan, size_t distance, int32_t* sums, size_t stride) noexcept {
    for_queries(scan.queries, [&]<int Q>(Lanes<Q>) {
        const size_t bytes = distance * scan.columns * nibble_block;
        for (size_t block = 0; block < scan.blocks; ++block) {
            alignas(64) int32_t some[Q * nibble_block];
            sum_nibbles<Q, 1>(scan, scan.codes + block * bytes, 4 * bytes, some);
            for (size_t q = 0; q < Q; ++q) {
                for (size_t v = 0; v < nibble_block; ++v)
                    sums[q * stride + block * nibble_block + v] = some[q * nibble_block + v];
            }
        }
    });
}

#endif

int32_t value_of_rank(const int32_t* sums, size_t n, size_t rank, int32_t bits, int32_t zeros) noexcept {
    int32_t value = 0;
    for (int32_t bit = bits - 1; bit >= zeros; --bit) {
        const int32_t higher = value | int32_t{1} << bit;
        uint32_t reached = 0;
        for (size_t i = 0; i < n; ++i) reached += sums[i] >= higher;
        if (reached >= rank) value = higher;
    }
    return value;
}

int32_t best_sums(const int32_t* sums, size_t n, size_t count, int32_t bits_of_sums, int32_t* places) noexcept {
    const int32_t least = value_of_rank(sums, n, count, bits_of_sums, 0);
    size_t equals = count;
    for (size_t i = 0; i < n; ++i) equals -= sums[i] > least;
    for (size_t i = 0; i < n; i += L) {
        const size_t some = n - i < L ? n - i : L;
        auto reached = load_first(sums + i, some) >= broadcast(least);
        if (some < L) reached &= first_lanes<int32_t>(some);
        for (uint32_t set = bits(reached); set; set &= set - 1) {
            const size_t at = i + static_cast<size_t>(__builtin_ctz(set));
            if (sums[at] == least && equals-- == 0) {
                ++equals;
                continue;
            }
            *places++ = static_cast<int32_t>(at);
        }
    }
    return least;
}

#if defined(POLYVEC_BYTE_TABLES)
constexpr size_t few_for_bytes = sizeof(Vec<uint8_t>) == 64 ? ~size_t{} : L - 1;

size_t select_bytes(const PqScan& scan, PqHit* hits) noexcept {
    constexpr size_t G = sizeof(Vec<uint8_t>) == 64 ? 4 : 1;
    PqHit* hit = hits;
    size_t block = 0;
    for (; block + G <= scan.blocks; block += G) hit = scan_group<byte_block, 1, G>(scan, block, hit, sum_bytes<G>);
    for (; block < scan.blocks; ++block) hit = scan_group<byte_block, 1, 1>(scan, block, hit, sum_bytes<1>);
    return static_cast<size_t>(hit - hits);
}
#else
constexpr size_t few_for_bytes = 0;
constexpr auto select_bytes = nullptr;
#endif

// ---- scores of the few

/// Byte 0 of a code; the number of codes in a block is a power of 2.
POLYVEC_INLINE const uint8_t* code_of(const PqScores& codes, int64_t id) noexcept {
    const auto i = static_cast<size_t>(id), first = i & ~(codes.block - 1);
    return codes.codes + first * codes.columns + (i - first);
}

/// Codes of blocks lie over many lines: those of the `next` ones are fetched on the way.
template <size_t J, bool Nibbles>
POLYVEC_INLINE void add_scores(const PqScores& codes, const int64_t* ids, const int64_t* next, float* out) noexcept {
    constexpr size_t columns_of_step = Nibbles ? 4 : 1;
    const bool in_blocks = codes.block > 1;
    const uint8_t *code[J], *next_code[J];
    float sum[J] = {};
    for (size_t j = 0; j < J; ++j) {
        code[j] = code_of(codes, ids[j]);
        next_code[j] = code_of(codes, next[j]);
        keep_in_register(sum[j]);  // without it GCC gathers the scalars into one vector
    }
    for (size_t i = 0; i < codes.n_steps * columns_of_step; ++i) {
        const size_t step = static_cast<size_t>(codes.steps[i / columns_of_step]);
        const size_t column = step * columns_of_step + i % columns_of_step;
        if (Nibbles && column >= codes.columns) break;  // the last step of codes that are not padded
        const float* entries = codes.entries + column * (Nibbles ? 32 : 256);
        const size_t at = column * codes.block;
        if (in_blocks && i % columns_of_step == 0) {
            for (size_t j = 0; j < J; ++j) prefetch(next_code[j] + at);
        }
        for (size_t j = 0; j < J; ++j) {
            const size_t byte = code[j][at];
            if constexpr (Nibbles) {
                sum[j] += entries[byte & 15];
                sum[j] += entries[16 + (byte >> 4)];
            } else {
                sum[j] += entries[byte];
            }
            keep_in_register(sum[j]);
        }
    }
    for (size_t j = 0; j < J; ++j) out[j] = sum[j];
}

template <bool Nibbles>
void scores(const PqScores& codes, const int64_t* ids, size_t n, float* out) noexcept {
    constexpr size_t J = 8;
    for (size_t i = 0; i < n; i += J) {
        int64_t padded[2 * J];  // the last code again and again costs less than the last few one by one
        float some[J];
        for (size_t j = 0; j < 2 * J; ++j) padded[j] = ids[i + j < n ? i + j : n - 1];
        add_scores<J, Nibbles>(codes, padded, padded + J, some);
        for (size_t j = 0; j < J && i + j < n; ++j) out[i + j] = some[j];
    }
}

// ---- float tables, 8 bits; V is a vector of queries, or float for one

constexpr size_t group_bytes = 16;  // code bytes a group: 16 KB of tables for one query, 256 KB for 16
constexpr size_t block_rows = 256;  // codes whose sums stay on the stack between groups

template <class V>
constexpr size_t width_of = sizeof(V) / sizeof(float);

template <class V>
POLYVEC_INLINE V get(const float* p) noexcept {
    if constexpr (width_of<V> == 1) {
        return *p;
    } else {
        return load(p);
    }
}

template <class V>
POLYVEC_INLINE void put(float* p, V v) noexcept {
    if constexpr (width_of<V> == 1) {
        *p = v;
    } else {
        store(p, v);
    }
}

/// out[entry][query] = tables[query][entry].
void interleave(const float* tables, size_t count, size_t n, float* out) noexcept {
    for (size_t i = 0; i < n; i += L) {
        Vec<float> block[L];
        for (size_t j = 0; j < L; ++j) block[j] = j < count ? load(tables + j * n + i) : Vec<float>{};
        transpose(block, typename LaneRange<0, L>::type{});
        for (size_t j = 0; j < L; ++j) store(out + (i + j) * L, block[j]);
    }
}

/// sums[j] += the entries of code bytes begin .. end, for J codes.
template <class V, size_t J>
POLYVEC_INLINE void add_entries(const float* tables, const uint8_t* codes, size_t code_size, size_t begin, size_t end,
                                float* sums) noexcept {
    constexpr size_t W = width_of<V>;
    V sum[J];
    for (size_t j = 0; j < J; ++j) {
        sum[j] = get<V>(sums + j * W);
        keep_in_register(sum[j]);  // without it GCC gathers the J scalars of V = float into one vector
    }
    for (size_t s = begin; s < end; ++s) {
        const float* table = tables + s * 256 * W;
        for (size_t j = 0; j < J; ++j) sum[j] += get<V>(table + codes[j * code_size + s] * W);
    }
    for (size_t j = 0; j < J; ++j) {
        keep_in_register(sum[j]);
        put(sums + j * W, sum[j]);
    }
}

template <class V>
size_t scan_floats(const float* tables, const uint8_t* codes, size_t n, size_t code_size, const float* floor,
                   ScanHit* hits) noexcept {
    constexpr size_t W = width_of<V>, J = W == 1 ? 8 : 4;
    const Vec<float> floors = W == 1 ? broadcast(*floor) : load(floor);
    ScanHit* hit = hits;
    for (size_t first = 0; first < n; first += block_rows) {
        const size_t rows = n - first < block_rows ? n - first : block_rows;
        const uint8_t* block = codes + first * code_size;
        float sums[block_rows * W] = {};
        for (size_t s = 0; s < code_size; s += group_bytes) {
            const size_t end = code_size - s < group_bytes ? code_size : s + group_bytes;
            size_t r = 0;
            for (; r + J <= rows; r += J)
                add_entries<V, J>(tables, block + r * code_size, code_size, s, end, sums + r * W);
            for (; r < rows; ++r) add_entries<V, 1>(tables, block + r * code_size, code_size, s, end, sums + r * W);
        }
        for (size_t k = 0; k < rows * W; k += L) {
            Mask<float> above = load(sums + k) >= floors;
            if (rows * W - k < L) above &= first_lanes<float>(rows * W - k);
            for (uint32_t set = bits(above); set; set &= set - 1) {
                const size_t at = k + static_cast<size_t>(__builtin_ctz(set));
                *hit++ = {sums[at], static_cast<uint32_t>(first * W + at)};
            }
        }
    }
    return static_cast<size_t>(hit - hits);
}

}  // namespace

extern const PqKernels pq_kernels;
const PqKernels pq_kernels{most_queries,           entries,       round_down, transpose_bytes, select_nibbles,
                           sums_of_nibbles,        value_of_rank, best_sums,  select_bytes,    scores<true>,
                           scores<false>,          few_for_bytes, L,          interleave,      scan_floats<float>,
                           scan_floats<Vec<float>>};

}  // namespace polyvec::POLYVEC_ISA
