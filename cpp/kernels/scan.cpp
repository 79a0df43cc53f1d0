// A panel of queries against a block of item rows: the product stays in registers, and an epilogue takes from it what
// the search wants: hits above a floor, counts against a target, or the best row of each query.
//
// Queries lie in lanes, so an epilogue is a handful of vector operations a row. What it keeps of each query lies in
// memory between two tiles: the tile needs every register, and one that is spilled in its loop halves the speed.
#include "tables.hpp"
#include "tile.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr int R = panel_registers;
constexpr size_t L = lanes<float>;
constexpr size_t width = panel_width<float>;

void pack(const float* rows, size_t count, size_t stride, size_t d, float* panel) noexcept {
    pack_panel(panel, rows, count, stride, d, width);
}

/// Turns the products of rows first, first + 1, ... into values. Every op does it here: their bits must agree.
template <int J>
POLYVEC_INLINE void to_values(const ScanBlock& block, size_t first, Vec<float> (&acc)[J][R]) noexcept {
    if (block.scale) {
        for (int j = 0; j < J; ++j) {
            const Vec<float> scale = broadcast(block.scale[first + j]), offset = broadcast(block.offset[first + j]);
            for (int r = 0; r < R; ++r) acc[j][r] = fma(acc[j][r], scale, offset);
        }
    } else if (block.offset) {
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
template <class Epilogue>
POLYVEC_INLINE void for_each_value(const ScanBlock& block, Epilogue&& epilogue) noexcept {
    const uint64_t* next = block.excluded;
    for_each_tile<R>(block.panel, Rows<float>{block.rows, block.n, block.d}, block.d,
                     [&]<int J>(size_t first, Vec<float>(&acc)[J][R]) {
                         to_values(block, first, acc);
                         exclude(block, next, first, acc);
                         epilogue(first, acc);
                     });
}

void values(const ScanBlock& block, float* out) noexcept {
    for_each_value(block, [&]<int J>(size_t first, const Vec<float>(&value)[J][R]) {
        for (int j = 0; j < J; ++j) {
            for (int r = 0; r < R; ++r) store(out + (first + j) * width + r * L, value[j][r]);
        }
    });
}

size_t select(const ScanBlock& block, const float* floor, ScanHit* hits) noexcept {
    ScanHit* hit = hits;
    for_each_value(block, [&]<int J>(size_t first, const Vec<float>(&value)[J][R]) {
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

void count(const ScanBlock& block, const float* target, int32_t* greater, int32_t* equal) noexcept {
    for_each_value(block, [&]<int J>(size_t, const Vec<float>(&value)[J][R]) {
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

void nearest(const ScanBlock& block, float* best, int32_t* id) noexcept {
    for_each_value(block, [&]<int J>(size_t first, const Vec<float>(&value)[J][R]) {
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

/// Q queries with each row in turn: a single stream, which the hardware prefetches to the full rate of the memory; four
/// rows side by side get half of it.
template <size_t Q>
void products_by_row(const float* queries, const float* rows, size_t n, size_t d, float* out) noexcept {
    for (size_t k = 0; k < n; ++k, rows += d) {
        Vec<float> sum[Q][2] = {};
        size_t i = 0;
        for (; i + 2 * L <= d; i += 2 * L) {
            for (size_t u = 0; u < 2; ++u) {
                const Vec<float> x = load(rows + i + u * L);
                for (size_t q = 0; q < Q; ++q) sum[q][u] = fma(x, load(queries + q * d + i + u * L), sum[q][u]);
            }
        }
        for (size_t u = 0; i < d; i += L, ++u) {
            const size_t left = d - i < L ? d - i : L;
            const Vec<float> x = load_first(rows + i, left);
            for (size_t q = 0; q < Q; ++q) sum[q][u] = fma(x, load_first(queries + q * d + i, left), sum[q][u]);
        }
        for (size_t q = 0; q < Q; ++q) out[q * n + k] = reduce_add(sum[q][0] + sum[q][1]);
    }
}

void products(const float* queries, size_t count, const float* rows, size_t n, size_t d, float* out) noexcept {
    size_t q = 0;
    for (; q + 4 <= count; q += 4) products_by_row<4>(queries + q * d, rows, n, d, out + q * n);
    for (; q + 2 <= count; q += 2) products_by_row<2>(queries + q * d, rows, n, d, out + q * n);
    for (; q < count; ++q) products_by_row<1>(queries + q * d, rows, n, d, out + q * n);
}

void squares(const float* rows, size_t n, size_t d, float* out) noexcept {
    for (size_t k = 0; k < n; ++k) products_by_row<1>(rows + k * d, rows + k * d, 1, d, out + k);
}

}  // namespace

extern const ScanKernels scan_kernels;
const ScanKernels scan_kernels{width, pack, values, select, count, nearest, products, squares};

}  // namespace polyvec::POLYVEC_ISA
