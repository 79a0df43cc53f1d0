// The register tile: the product of many rows with a panel of queries, handed to an epilogue while it is
// still in registers, so that it is never stored.
//
//     constexpr int R = panel_registers;
//     pack_panel(panel, queries, n_queries, stride, d, R * lanes<float>);             // once
//     for_each_tile<R>(panel, Rows<float>{docs, n_docs, stride}, d,
//                      [&]<int J>(size_t first, const Vec<float> (&acc)[J][R]) {
//         // acc[j][r][lane] is the product of row first + j with query r * lanes<float> + lane
//     });
//
// A panel holds up to R * lanes queries transposed, [d][R * lanes]. A tile takes J rows: each step in d loads
// R vectors of queries, broadcasts one element of each row, and does J * R fused multiply-adds. Lanes without
// a query hold zeros (or NaN, where a row is not finite): the epilogue must not use them.
//
// Every sum runs over d from the first element to the last in one accumulator. The bits of a product
// therefore depend on the row and the query alone, never on the tile's shape, the row's place or the number
// of threads.
//
// Each cache line of the rows is prefetched once, 12 to 32 rows ahead: the hardware does not follow a dozen streams
// read one element at a time, and half the speed is lost on data from memory without it. One tile ahead is too late
// where a tile is short: at 5 queries x 48 on Zen 5 float32 took 6.2 ms, 4.2 ms with four. The prefetches are spread
// over the steps of a tile; all at once at the start of a line costs 15 %.
#pragma once

#include "simd.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

// Shape per ISA level: accumulators of a tile, registers of a full panel, steps in d per turn of the loop.
// Measured on Zen4, GCC 12, 32 queries x 128, documents of 180 tokens streamed from memory, GFLOP/s of 118
// possible:
//   avx512   12 x 2: 113   6 x 4: 115   12 x 1: 84    8 x 1: 100
//   avx2      6 x 2:  83    3 x 4: 107   12 x 1: 60   8 x 1:  65   (6 x 2 asks memory for twice the rate)
//   base      6 x 2:  38   3 x 4:  29
// 16 registers spill when the loop over d is unrolled, 32 registers gain 5 % by it.
#if POLYVEC_VECTOR_BYTES == 64
constexpr int tile_registers = 24;
constexpr int panel_registers = 2;
constexpr int tile_unroll = 4;
#elif POLYVEC_VECTOR_BYTES == 32
constexpr int tile_registers = 12;
constexpr int panel_registers = 4;
constexpr int tile_unroll = 1;
#elif defined(__aarch64__)
constexpr int tile_registers = 24;
constexpr int panel_registers = 4;
constexpr int tile_unroll = 4;
#else
constexpr int tile_registers = 12;
constexpr int panel_registers = 2;
constexpr int tile_unroll = 1;
#endif

// Queries in a full panel.
template <class T>
constexpr size_t panel_width = panel_registers * lanes<T>;

// Rows this many bytes apart (or a multiple of it) fall into one set of the level-1 cache, of 8 or 12 lines: more
// than 4 of them and the 4 prefetched next push each other out. 12 x 2 at d = 1024: 75, 4 x 2: 105.
constexpr size_t set_stride = 4096;

// Rows `stride` elements apart. `next` is where the reader goes afterwards: it is prefetched while the last
// tile is computed. By default these rows again (the next panel).
template <class T>
struct Rows {
    const T* first;
    size_t count;
    size_t stride;
    const T* next = first;

    POLYVEC_INLINE const T* operator[](size_t k) const noexcept {
        return k < count ? first + k * stride : next + (k - count) * stride;
    }
};

// Rows of a table named by their ids, in the order of the ids.
template <class T, class Id>
struct GatheredRows {
    const T* table;
    const Id* ids;
    size_t count;
    size_t stride;

    POLYVEC_INLINE const T* operator[](size_t k) const noexcept {
        return table + static_cast<size_t>(ids[k < count ? k : 0]) * stride;
    }
};

// What a step in d does with one element of a row and R vectors of the panel. Other products take T to be a word of
// several narrow numbers (tile_narrow.hpp).
template <class T>
struct Multiply {
    using Sum = T;

    // Rows of a tile whose panel is R registers wide.
    template <int R>
    static constexpr int rows = R == 1 ? 8 : tile_registers / R;

    POLYVEC_INLINE static Vec<T> start(const T*, int) noexcept { return Vec<T>{}; }
    POLYVEC_INLINE static Vec<T> add(Vec<T> x, Vec<T> query, Vec<T> sum) noexcept { return fma(x, query, sum); }
};

// One step in d: acc[j][r] += row[j][i] * panel[i][r].
template <class Product, int J, int R, class T>
POLYVEC_INLINE void multiply_step(const T* panel, const T* const (&row)[J], size_t i,
                                  Vec<typename Product::Sum> (&acc)[J][R]) noexcept {
    if constexpr (J >= R) {
        Vec<T> query[R];
        for (int r = 0; r < R; ++r) query[r] = load(panel + (i * R + r) * lanes<T>);
        for (int j = 0; j < J; ++j) {
            const Vec<T> x = broadcast(row[j][i]);
            for (int r = 0; r < R; ++r) {
                acc[j][r] = Product::add(x, query[r], acc[j][r]);
                keep_in_register(acc[j][r]);
            }
        }
    } else {
        Vec<T> x[J];
        for (int j = 0; j < J; ++j) x[j] = broadcast(row[j][i]);
        for (int r = 0; r < R; ++r) {
            const Vec<T> query = load(panel + (i * R + r) * lanes<T>);
            for (int j = 0; j < J; ++j) {
                acc[j][r] = Product::add(x[j], query, acc[j][r]);
                keep_in_register(acc[j][r]);
            }
        }
    }
}

// Adds to acc. `meanwhile` is called before every quarter of a line, for work that the products can hide.
template <class Product, int J, int R, class T, class Meanwhile>
POLYVEC_INLINE void multiply_tile(const T* panel, const T* const (&row)[J], const T* const (&ahead)[J], size_t d,
                                  Vec<typename Product::Sum> (&acc)[J][R], Meanwhile meanwhile) noexcept {
    constexpr size_t line = 64 / sizeof(T);
    constexpr size_t quarter = line / 4;
    constexpr int fetched = (J + 3) / 4;  // rows whose line is prefetched in each quarter
    size_t i = 0;
#pragma GCC unroll 1
    while (i + line <= d) {
        const size_t start = i;
#pragma GCC unroll 1
        for (int j = 0; j < 4 * fetched; j += fetched) {
            for (int k = 0; k < fetched; ++k) {
                if (J % 4 == 0 || j + k < J) prefetch(ahead[j + k] + start);
            }
            meanwhile();
#pragma GCC unroll tile_unroll
            for (size_t u = 0; u < quarter; ++u) multiply_step<Product>(panel, row, i + u, acc);
            i += quarter;
        }
    }
    if (i < d) {
        for (int j = 0; j < J; ++j) prefetch(ahead[j] + i);
#pragma GCC unroll 1
        for (; i < d; ++i) multiply_step<Product>(panel, row, i, acc);
    }
}

// How many rows ahead of their use the tiles of `Product` prefetch.
template <class Product, int R>
constexpr int rows_ahead = (Product::template rows<R> > 8 ? 1 : 4) * Product::template rows<R>;

// Tiles of J rows from `first` on, then narrower ones for the rows that remain; narrow ones alone when the rows fall
// into one set of the cache.
template <int J, int R, class Product, class T, class RowSource, class Epilogue>
POLYVEC_INLINE void tiles_from(size_t first, const T* panel, RowSource rows, size_t d, Epilogue& epilogue) noexcept {
    const bool crowded = rows.stride * sizeof(T) % set_stride == 0;
    const size_t distance = crowded ? J : rows_ahead<Product, R>;
    for (; !(crowded && J > 4) && first + J <= rows.count; first += J) {
        const T *row[J], *ahead[J];
#pragma GCC unroll 1
        for (int j = 0; j < J; ++j) {
            row[j] = rows[first + j];
            ahead[j] = rows[first + distance + j];
            asm("" : "+m"(row[j]), "+m"(ahead[j]));
        }
        Vec<typename Product::Sum> acc[J][R];
        for (int j = 0; j < J; ++j)
            for (int r = 0; r < R; ++r) acc[j][r] = Product::start(panel, r - R);
        multiply_tile<Product>(panel, row, ahead, d, acc, [] {});
        epilogue(first, acc);
    }
    if constexpr (J > 1) {
        constexpr int narrower = J > 4 ? 4 : (J + 1) / 2;
        tiles_from<narrower, R, Product>(first, panel, rows, d, epilogue);
    }
}

template <int R, class T, class RowSource, class Epilogue, class Product = Multiply<T>>
POLYVEC_INLINE void for_each_tile(const T* panel, RowSource rows, size_t d, Epilogue&& epilogue,
                                  Product = {}) noexcept {
    tiles_from<Product::template rows<R>, R, Product>(0, panel, rows, d, epilogue);
}

// Transpose a square block: log2(n) rounds, each of which interleaves the first half of the rows with the second.
template <class V, size_t N, int... K>
POLYVEC_INLINE void transpose(V (&row)[N], Lanes<K...>) noexcept {
    constexpr int n = N;
    static_assert(lanes_of<V> == N);
    for (int round = 1; round < n; round *= 2) {
        V mixed[N];
        for (int k = 0; k < n / 2; ++k) {
            mixed[2 * k] = shuffle(row[k], row[k + n / 2], Lanes<(K / 2 + K % 2 * n)...>{});
            mixed[2 * k + 1] = shuffle(row[k], row[k + n / 2], Lanes<((K + n) / 2 + K % 2 * n)...>{});
        }
        for (int k = 0; k < n; ++k) row[k] = mixed[k];
    }
}

// Transpose `count` rows into a panel [d][width], width a multiple of the lane count; lanes beyond count are zero.
template <class T>
inline void pack_panel(T* panel, const T* rows, size_t count, size_t stride, size_t d, size_t width) noexcept {
    constexpr size_t n = lanes<T>;
    for (size_t k = 0; k < width; k += n) {
        for (size_t i = 0; i < d; i += n) {
            const size_t columns = d - i < n ? d - i : n;
            Vec<T> block[n];
            for (size_t j = 0; j < n; ++j)
                block[j] = k + j < count ? load_first(rows + (k + j) * stride + i, columns) : Vec<T>{};
            transpose(block, typename LaneRange<0, n>::type{});
            for (size_t j = 0; j < columns; ++j) store(panel + (i + j) * width + k, block[j]);
        }
    }
}

}  // namespace
}  // namespace polyvec::POLYVEC_ISA
