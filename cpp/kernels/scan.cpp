// A panel of queries against a block of item rows: the product stays in registers, and an epilogue takes from it what
// the search wants: hits above a floor, counts against a target, or the best row of each query.
//
// Queries lie in lanes, so an epilogue is a handful of vector operations a row. What it keeps of each query lies in
// memory between two tiles: the tile needs every register, and one that is spilled in its loop halves the speed.
#include "elements.hpp"
#include "exp.hpp"
#include "tables.hpp"
#include "tile.hpp"
#include "tile_narrow.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr int R = panel_registers;
constexpr size_t L = lanes<float>;
constexpr size_t width = panel_width<float>;
static_assert(width <= max_panel_width);

// What rows store. The others lie in tile_narrow.hpp.
struct Float32 {
    static constexpr size_t align = 1, elements = 1;
    static constexpr bool integer = false;
};

template <class Format>
constexpr bool narrow = true;
template <>
constexpr bool narrow<Float32> = false;

template <class Format>
size_t words(size_t d) noexcept {
    if constexpr (narrow<Format>)
        return panel_words<Format>(d);
    else
        return d;
}

template <class Format>
void pack(const float* rows, size_t count, size_t stride, size_t d, void* panel) noexcept {
    if constexpr (Format::elements > 1)
        pack_narrow_panel<Format, R>(static_cast<Word*>(panel), rows, count, stride, d, 1);
    else
        pack_panel(static_cast<float*>(panel), rows, count, stride, d, width);
}

/// Rounds to bfloat16, or to 127 steps of a row's largest element.
template <class Format>
void round(float* rows, size_t n, size_t d) noexcept {
    for (float* row = rows; row != rows + n * d; row += d) {
        const float largest = Format::integer ? largest_magnitude(row, d) : 0;
        // Steps of what is too small for them are infinite: it counts as 0, as in a panel.
        const float step = largest / 127, steps = 127 / largest < __builtin_inff() ? 127 / largest : 0;
        for (size_t i = 0; i < d; i += L) {
            const size_t left = d - i < L ? d - i : L;
            Vec<float> x = load_first(row + i, left);
            if constexpr (Format::integer) {
                x *= steps;
                keep_in_register(x);  // never fused with the rounding, as in a panel
                x += 0x1.8p23f;
                keep_in_register(x);
                x = (x - 0x1.8p23f) * step;
            } else {
                x = (Vec<float>)(to_bfloat16(x) << 16);
            }
            store_first(row + i, x, left);
        }
    }
}

/// Turns the products of rows first, first + 1, ... into values. Every op does it here: their bits must agree.
template <class Format, int J>
POLYVEC_INLINE void to_values(const ScanBlock& block, size_t first, Vec<float> (&acc)[J][R]) noexcept {
    if constexpr (Format::integer) {  // the product has been scaled already, but for the query's part
        for (int r = 0; r < R; ++r) {
            const Vec<float> scale = lane_scale<Format, R>(static_cast<const Word*>(block.panel), block.d, r);
            for (int j = 0; j < J; ++j) acc[j][r] *= scale;
        }
    } else if (block.scale) {
        for (int j = 0; j < J; ++j) {
            const Vec<float> scale = broadcast(block.scale[first + j]), offset = broadcast(block.offset[first + j]);
            for (int r = 0; r < R; ++r) acc[j][r] = fma(acc[j][r], scale, offset);
        }
        return;
    }
    if (block.offset) {
        for (int j = 0; j < J; ++j) {
            for (int r = 0; r < R; ++r) acc[j][r] += broadcast(block.offset[first + j]);
        }
    }
}

/// Makes the excluded pairs of a tile NaN, which no comparison lets through. `next` walks block.excluded.
template <int J>
POLYVEC_INLINE void exclude(const ScanBlock& block, const uint64_t*& next, size_t first,
                            Vec<float> (&acc)[J][R]) noexcept {
    const uint64_t begin = (block.first_row + first) * width, end = begin + J * width;
    if (next == block.excluded_end || *next >= end) return;
    float nan[J * width] = {};
    for (; next != block.excluded_end && *next < end; ++next) nan[*next - begin] = __builtin_nanf("");
    for (int j = 0; j < J; ++j) {
        for (int r = 0; r < R; ++r) acc[j][r] += load(nan + (j * R + r) * L);
    }
}

/// Calls epilogue(first, values) tile by tile.
template <class Format, class Epilogue>
POLYVEC_INLINE void for_each_value(const ScanBlock& block, Epilogue&& epilogue) noexcept {
    const uint64_t* next = block.excluded;
    const auto finish = [&]<int J>(size_t first, Vec<float>(&acc)[J][R]) __attribute__((always_inline)) {
        to_values<Format>(block, first, acc);
        exclude(block, next, first, acc);
        epilogue(first, acc);
    };
    if constexpr (narrow<Format>) {
        [[maybe_unused]] const MatrixUnit<by_matrices<Format>> unit;
        const auto* rows = static_cast<const unsigned char*>(block.rows);
        for_each_narrow_tile<Format, R>(static_cast<const Word*>(block.panel),
                                        NarrowTokens{rows, block.n, rows, block.scale, nullptr, nullptr, nullptr},
                                        block.d, finish);
    } else {
        for_each_tile<R>(static_cast<const float*>(block.panel),
                         Rows<float>{static_cast<const float*>(block.rows), block.n, block.d}, block.d, finish);
    }
}

template <class Format>
void values(const ScanBlock& block, float* out) noexcept {
    for_each_value<Format>(block, [&]<int J>(size_t first, const Vec<float>(&value)[J][R]) {
        for (int j = 0; j < J; ++j) {
            for (int r = 0; r < R; ++r) store(out + (first + j) * width + r * L, value[j][r]);
        }
    });
}

template <class Format>
size_t select(const ScanBlock& block, const float* floor, ScanHit* hits) noexcept {
    ScanHit* hit = hits;
    for_each_value<Format>(block, [&]<int J>(size_t first, const Vec<float>(&value)[J][R]) {
        bool found = false;
        for (int r = 0; r < R; ++r) {
            Vec<float> best = load(floor + r * L);  // max keeps its second operand where the first is NaN
            for (int j = 0; j < J; ++j) best = max(value[j][r], best);
            found |= any(best > load(floor + r * L));
        }
        if (!found) return;
        float pairs[J * width];
        for (int j = 0; j < J; ++j) {
            for (int r = 0; r < R; ++r) store(pairs + (j * R + r) * L, value[j][r]);
        }
        for (size_t k = 0; k < J * width; k += L) {
            for (uint32_t set = bits(load(pairs + k) > load(floor + k % width)); set; set &= set - 1) {
                const size_t at = k + static_cast<size_t>(__builtin_ctz(set));
                *hit++ = {pairs[at], static_cast<uint32_t>(first * width + at)};
            }
        }
    });
    return static_cast<size_t>(hit - hits);
}

template <class Format>
void count(const ScanBlock& block, const float* target, int32_t* greater, int32_t* equal) noexcept {
    for_each_value<Format>(block, [&]<int J>(size_t, const Vec<float>(&value)[J][R]) {
        for (int r = 0; r < R; ++r) {
            const Vec<float> targets = load(target + r * L);
            Vec<int32_t> above = load(greater + r * L), same = load(equal + r * L);
            for (int j = 0; j < J; ++j) {  // a comparison that holds is -1
                above -= value[j][r] > targets;
                same -= value[j][r] == targets;
            }
            store(greater + r * L, above);
            store(equal + r * L, same);
        }
    });
}

template <class Format>
void nearest(const ScanBlock& block, float* best, int32_t* id) noexcept {
    for_each_value<Format>(block, [&]<int J>(size_t first, const Vec<float>(&value)[J][R]) {
        const auto row = static_cast<int32_t>(block.first_row + first);
        for (int r = 0; r < R; ++r) {
            Vec<float> top = load(best + r * L);
            Vec<int32_t> ids = load(id + r * L);
            for (int j = 0; j < J; ++j) {
                const Mask<float> better = value[j][r] > top;
                top = select(better, value[j][r], top);
                ids = select(better, broadcast(row + j), ids);
            }
            store(best + r * L, top);
            store(id + r * L, ids);
        }
    });
}

/// How far ahead of a single stream a line is asked for. Zen5, 115,659 x 384 float32, GB/s at best: 29 without, 33 at 2
/// KB, 36 at 8 KB, 37 at 32 KB.
constexpr size_t stream_ahead = 8192;

/// Q queries with each row in turn: a single stream; four rows side by side get half of its rate.
template <class Elements, size_t Q>
void products_by_row(const float* queries, const unsigned char* row, size_t n, size_t d, float* out) noexcept {
    constexpr size_t bytes = Elements::bits / 8;
    for (size_t k = 0; k < n; ++k, row += d * bytes) {
        Vec<float> sum[Q][2] = {};
        size_t i = 0;
        for (; i + 2 * L <= d; i += 2 * L) {
            for (size_t at = 0; at < 2 * L * bytes; at += 64) prefetch(row + i * bytes + at + stream_ahead);
            for (size_t u = 0; u < 2; ++u) {
                const Vec<float> x = Elements::load(row + (i + u * L) * bytes);
                for (size_t q = 0; q < Q; ++q) sum[q][u] = fma(x, load(queries + q * d + i + u * L), sum[q][u]);
            }
        }
        for (size_t u = 0; i < d; i += L, ++u) {
            const size_t left = d - i < L ? d - i : L;
            const Vec<float> x =
                left == L ? Elements::load(row + i * bytes) : load_elements<Elements>(row + i * bytes, left);
            for (size_t q = 0; q < Q; ++q) sum[q][u] = fma(x, load_first(queries + q * d + i, left), sum[q][u]);
        }
        if constexpr (Q == 4) {
            const auto sums = reduce_add<Vec<float>>(
                {sum[0][0] + sum[0][1], sum[1][0] + sum[1][1], sum[2][0] + sum[2][1], sum[3][0] + sum[3][1]});
            for (size_t q = 0; q < Q; ++q) out[q * n + k] = sums[q];
        } else {
            for (size_t q = 0; q < Q; ++q) out[q * n + k] = reduce_add(sum[q][0] + sum[q][1]);
        }
    }
}

template <class Elements>
void products(const float* queries, size_t count, const void* rows, size_t n, size_t d, float* out) noexcept {
    const auto* row = static_cast<const unsigned char*>(rows);
    size_t q = 0;
    for (; q + 4 <= count; q += 4) products_by_row<Elements, 4>(queries + q * d, row, n, d, out + q * n);
    for (; q + 2 <= count; q += 2) products_by_row<Elements, 2>(queries + q * d, row, n, d, out + q * n);
    for (; q < count; ++q) products_by_row<Elements, 1>(queries + q * d, row, n, d, out + q * n);
}

/// Nothing is fetched ahead: enough chunks are under way at a time. A line in a gap often comes with its neighbour, so
/// that from memory a share p of the lines takes about 2 p of the time of all of them.
template <class Elements>
void chunk_products(const ScanChunks& query, const void* rows, const int64_t* ids, size_t n, size_t d,
                    float* out) noexcept {
    constexpr size_t bytes = Elements::bits / 8, vectors = scan_chunk / L, unroll = vectors < 4 ? 4 / vectors : 1;
    const bool cut = query.n > 0 && (query.at[query.n - 1] + size_t{1}) * scan_chunk > d;  // the last chunk
    const size_t whole = query.n - cut;
    for (size_t k = 0; k < n; ++k) {
        const unsigned char* row =
            static_cast<const unsigned char*>(rows) + static_cast<size_t>(ids ? ids[k] : k) * d * bytes;
        Vec<float> sum[unroll][vectors] = {};
        const auto add = [&](size_t c, size_t u) __attribute__((always_inline)) {
            const size_t at = query.at[c] * scan_chunk * bytes;
            for (size_t v = 0; v < vectors; ++v)
                sum[u][v] = fma(Elements::load(row + at + v * L * bytes), load(query.values + c * scan_chunk + v * L),
                                sum[u][v]);
        };
        size_t c = 0;
        for (; c + unroll <= whole; c += unroll) {
            for (size_t u = 0; u < unroll; ++u) add(c + u, u);
        }
        for (size_t u = 0; c < whole; ++c, ++u) add(c, u);
        if (cut) {
            const size_t at = query.at[c] * scan_chunk;
            for (size_t i = 0; at + i < d; i += L) {
                const size_t left = d - at - i;
                const unsigned char* p = row + (at + i) * bytes;
                const Vec<float> x = left < L ? load_elements<Elements>(p, left) : Elements::load(p);
                sum[0][0] = fma(x, load(query.values + c * scan_chunk + i), sum[0][0]);
            }
        }
        Vec<float> total{};
        for (size_t u = 0; u < unroll; ++u) {
            for (size_t v = 0; v < vectors; ++v) total += sum[u][v];
        }
        out[k] = reduce_add(total);
    }
}

template <class Elements>
void squares(const void* rows, size_t n, size_t d, float* out) noexcept {
    const auto* row = static_cast<const unsigned char*>(rows);
    for (size_t k = 0; k < n; ++k, row += d * Elements::bits / 8) {
        Vec<float> sum[2] = {};
        for (size_t i = 0, u = 0; i < d; i += L, u ^= 1) {
            const unsigned char* p = row + i * Elements::bits / 8;
            const Vec<float> x = d - i < L ? load_elements<Elements>(p, d - i) : Elements::load(p);
            sum[u] = fma(x, x, sum[u]);
        }
        out[k] = reduce_add(sum[0] + sum[1]);
    }
}

/// Sums of 16 rows are added up at a time: no sum runs over many terms of one size.
template <class Term>
POLYVEC_INLINE Vec<float> sum_of_lanes(const float* values, size_t n, Term&& term) noexcept {
    Vec<float> total{};
    for (size_t k = 0; k < n;) {
        Vec<float> sum{};
        for (const size_t end = n - k < 16 ? n : k + 16; k < end; ++k) sum += term(load(values + k * width));
        total += sum;
    }
    return total;
}

void exponentials(const float* values, size_t n, float scale, float* largest, float* sum) noexcept {
    for (size_t lane = 0; lane < width; lane += L) {
        Vec<float> top = broadcast(-__builtin_inff());
        for (size_t k = 0; k < n; ++k) top = max(load(values + k * width + lane), top);
        store(largest + lane, top);
        store(sum + lane, sum_of_lanes(values + lane, n, [=](Vec<float> value) __attribute__((always_inline)) {
                  return exp<float>(max((value - top) * scale, broadcast(-__builtin_inff())));  // NaN: 0
              }));
    }
}

void excesses(const float* values, size_t n, const float* threshold, float* sum) noexcept {
    for (size_t lane = 0; lane < width; lane += L) {
        const Vec<float> above = load(threshold + lane);
        store(sum + lane, sum_of_lanes(values + lane, n, [=](Vec<float> value) __attribute__((always_inline)) {
                  return max(value - above, Vec<float>{});
              }));
    }
}

void probabilities(float* values, size_t n, float scale, const float* less, float* rows, size_t stride) noexcept {
    for (size_t k = 0; k < n; ++k, values += width, rows += stride) {
        Vec<float> x[R];
        for (int r = 0; r < R; ++r) {
            x[r] = fma(load(values + r * L), broadcast(scale), -load(less + r * L));
            x[r] = max(x[r], broadcast(-__builtin_inff()));  // NaN: 0
        }
        exp<float>(x);
        for (int r = 0; r < R; ++r) {
            store(values + r * L, x[r]);
            store(rows + r * L, x[r]);
        }
    }
}

void transpose_rows(const float* rows, size_t count, size_t stride, size_t d, size_t columns, float* out) noexcept {
    pack_panel(out, rows, count, stride, d, columns);
}

/// A panel of C registers, the last of which may be used in part.
template <int C>
void add_products(const float* rows, size_t n, size_t stride, size_t k, const float* panel, size_t columns, float* out,
                  size_t out_stride) noexcept {
    if constexpr (C > 1) {
        if (columns <= (C - 1) * L) return add_products<C - 1>(rows, n, stride, k, panel, columns, out, out_stride);
    }
    const size_t last = columns - (C - 1) * L;
    for_each_tile<C>(panel, Rows<float>{rows, n, stride}, k,
                     [&]<int J>(size_t first, const Vec<float>(&sum)[J][C]) __attribute__((always_inline)) {
                         for (int j = 0; j < J; ++j) {
                             float* row = out + (first + j) * out_stride;
                             for (int c = 0; c < C - 1; ++c, row += L) store(row, load(row) + sum[j][c]);
                             if (last == L)
                                 store(row, load(row) + sum[j][C - 1]);
                             else
                                 store_first(row, load_first(row, last) + sum[j][C - 1], last);
                         }
                     });
}

template <class Format, class Elements>
constexpr ScanKernel make(decltype(ScanKernel::round) round) {
    return {Format::align,      words<Format>,
            pack<Format>,       round,
            values<Format>,     select<Format>,
            count<Format>,      nearest<Format>,
            products<Elements>, chunk_products<Elements>,
            squares<Elements>};
}

}  // namespace

extern const ScanKernels scan_kernels;
const ScanKernels scan_kernels{width,
                               L,
                               exponentials,
                               excesses,
                               probabilities,
                               transpose_rows,
                               add_products<R>,
                               make<Float32, Float32Elements>(nullptr),
                               make<Bfloat16, Bfloat16Elements>(round<Bfloat16>),
                               make<Float16, Float16Elements>(nullptr),
                               make<SignedInt8, Int8Elements>(round<SignedInt8>)};

}  // namespace polyvec::POLYVEC_ISA
