// The register tile of narrow rows by the matrix unit of Intel's CPUs (AMX).
//
// A matrix register holds 16 rows of 16 words. A product takes 16 rows of one, 16 words of each, times 16 words of 16
// queries in the other, which lie word by word, as a panel has them: neither is moved before. Two by two of them, 32
// rows and 32 queries, need 8 registers, which are all. Sums leave through memory, for the vector registers have no
// other way to them, and reach the epilogue in the shape of any tile.
//
// Integers are the same as by vector products. Those of bfloat16 are rounded in an order of the unit's own, over steps
// of 16 words that are the same for every row: here, too, the bits of a product depend on the row and the query alone.
// Subnormal numbers count as 0.
//
// Emerald Rapids at 2.5 GHz, G operations a second that the units can do: bytes 5100 (vector products 620), bfloat16
// 2600 (81, and float32 163). MaxSim of cached documents of 180 tokens reaches 1500 at 128 bytes and 2300 at 384, of
// 1200 at 128 bfloat16: what 32 x 32 sums cost beside their products is 64 vectors to store, to load and to compare. To
// begin the products of the next rows before the sums of the last ones are looked at gained nothing, nor did another
// order of loads. Rows across two cache lines cost 15 to 25 %.
#pragma once

#include "tables.hpp"
#include "tile.hpp"

#if defined(POLYVEC_MATRIX_UNIT)

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t matrix_rows = 16, matrix_words = 16;
constexpr size_t block_rows = 2 * matrix_rows;
static_assert(matrix_words == lanes<uint32_t> && panel_registers == 2);

// Sums of `Matrices` times 16 rows with a panel of R registers: matrices 0 to 3. Rows are in 4 and 5, the panel in 6
// and 7.
template <class Product, int Matrices, int R>
struct MatrixSums {
    using Sum = typename Product::Sum;
    static constexpr size_t width = R * matrix_words;

    // What tiles start from is the same for every row, and where there is none, zero.
    POLYVEC_INLINE static void start(const uint32_t* panel) noexcept {
        Product::template start_matrix<0>(panel - width);
        if constexpr (R == 2) Product::template start_matrix<1>(panel - matrix_words);
        if constexpr (Matrices == 2) Product::template start_matrix<2>(panel - width);
        if constexpr (Matrices == 2 && R == 2) Product::template start_matrix<3>(panel - matrix_words);
    }

    // Adds the products of matrix_words words of rows `stride` words apart with those of a panel.
    POLYVEC_INLINE static void add(const uint32_t* row, size_t stride, const uint32_t* panel) noexcept {
        load_matrix<6>(panel, width);
        load_matrix<4>(row, stride);
        Product::template multiply<0, 4, 6>();
        if constexpr (R == 2) {
            load_matrix<7>(panel + matrix_words, width);
            Product::template multiply<1, 4, 7>();
        }
        if constexpr (Matrices == 2) {
            load_matrix<5>(row + matrix_rows * stride, stride);
            Product::template multiply<2, 5, 6>();
        }
        if constexpr (Matrices == 2 && R == 2) Product::template multiply<3, 5, 7>();
    }

    // out[row][width].
    POLYVEC_INLINE static void store(Sum* out) noexcept {
        store_matrix<0>(out, width);
        if constexpr (R == 2) store_matrix<1>(out + matrix_words, width);
        if constexpr (Matrices == 2) store_matrix<2>(out + matrix_rows * width, width);
        if constexpr (Matrices == 2 && R == 2) store_matrix<3>(out + matrix_rows * width + matrix_words, width);
    }
};

// The epilogue takes `count` rows of sums, J at a time.
template <int J, int R, class Sum, class Epilogue>
POLYVEC_INLINE void hand_over(size_t first, const Sum* sums, size_t count, Epilogue& epilogue) noexcept {
    for (; count >= J; count -= J, first += J, sums += J * R * lanes<Sum>) {
        Vec<Sum> acc[J][R];
        for (int j = 0; j < J; ++j) {
            for (int r = 0; r < R; ++r) acc[j][r] = load(sums + (j * R + r) * lanes<Sum>);
        }
        epilogue(first, acc);
    }
    if constexpr (J > 1) hand_over<J / 2, R>(first, sums, count, epilogue);
}

// Tiles of rows, which `block` makes ready: block(first, count, add) calls add(i, row, stride) for the words i, i + 16,
// ... of `count` rows from `first` on. Behind the words lies what the panel's zeros make 0, of floats zeros; behind the
// rows anything, up to 16 or 32 of them. The last rows come with some before them, so that matrices are full.
template <class Product, int R, class Block, class Epilogue>
POLYVEC_INLINE void matrix_tiles(const uint32_t* panel, size_t n, size_t words, Block&& block,
                                 Epilogue& epilogue) noexcept {
    using Sum = typename Product::Sum;
    constexpr size_t width = R * matrix_words;
    alignas(64) Sum sums[block_rows * width];
    alignas(64) uint32_t last[matrix_words * width];  // the words of a panel behind its last whole step, and zeros
    const size_t rest = words % matrix_words;
    if (rest > 0) {
        for (size_t i = 0; i < matrix_words; ++i) {
            for (int r = 0; r < R; ++r) {
                const size_t at = i * width + r * lanes<uint32_t>;
                store(last + at, i < rest ? load(panel + (words - rest) * width + at) : Vec<uint32_t>{});
            }
        }
    }
    const auto multiply = [&]<int Matrices>(Lanes<Matrices>, size_t first, size_t end) __attribute__((always_inline)) {
        using Sums = MatrixSums<Product, Matrices, R>;
        constexpr size_t rows = Matrices * matrix_rows;
        const size_t begin = end >= rows && end - rows < first ? end - rows : first;
        Sums::start(panel);
        block(begin, end - begin, [&](size_t i, const uint32_t* row, size_t stride) __attribute__((always_inline)) {
            Sums::add(row, stride, i + matrix_words <= words ? panel + i * width : last);
        });
        Sums::store(sums);
        hand_over<8, R>(first, sums + (first - begin) * width, end - first, epilogue);
    };
    for (size_t first = 0; first < n; first += block_rows) {
        if (n - first > matrix_rows)
            multiply(Lanes<2>{}, first, n - first < block_rows ? n : first + block_rows);
        else
            multiply(Lanes<1>{}, first, n);
    }
}

// Like for_each_tile, of rows as they are stored. Needs a MatrixUnit.
template <class Product, int R, class Epilogue>
POLYVEC_INLINE void for_each_matrix_tile(const uint32_t* panel, Rows<uint32_t> rows, size_t words,
                                         Epilogue&& epilogue) noexcept {
    alignas(64) uint32_t copy[block_rows * matrix_words];
    const auto block = [&](size_t first, size_t count, auto&& add) __attribute__((always_inline)) {
        const uint32_t *const row = rows.first + first * rows.stride, *const next = rows[first + block_rows];
        const bool whole = count % matrix_rows == 0;
        size_t i = 0;
        if (whole) {
            // The lines of the next rows in their order in memory: from the level-3 cache 1.3 to 2 times as fast.
            constexpr size_t line = 64, lines = block_rows;  // of a step
            const auto* ahead = reinterpret_cast<const unsigned char*>(next);
            for (; i + matrix_words <= words; i += matrix_words, ahead += lines * line) {
#pragma GCC unroll 8
                for (size_t k = 0; k < lines; ++k) prefetch(ahead + k * line);
                add(i, row + i, rows.stride);
            }
        }
        if (i == words) return;
        if (!whole) {
            for (size_t k = 0; k < block_rows; ++k) store(copy + k * matrix_words, Vec<uint32_t>{});
        }
        for (; i < words; i += matrix_words) {  // nothing behind a row or behind the last of them is read
            const size_t bytes = (words - i < matrix_words ? words - i : matrix_words) * sizeof(uint32_t);
            for (size_t j = 0; j < count; ++j) {
                prefetch(next + j * rows.stride + i);
                const auto* p = reinterpret_cast<const unsigned char*>(row + j * rows.stride + i);
                store(copy + j * matrix_words, load_first_bytes(p, bytes));
            }
            add(i, copy, matrix_words);
        }
    };
    matrix_tiles<Product, R>(panel, rows.count, words, block, epilogue);
}

}  // namespace
}  // namespace polyvec::POLYVEC_ISA

#endif
