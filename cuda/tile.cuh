/// Products of many rows with many rows on tensor cores, a tile of 128 x 256 at a time, which an epilogue takes from
/// registers: no product is stored. Rows are 16-bit floats. A float32 is the sum of two of them, a high and a low part
/// (22 bits of its 24), and a product of two such rows three products of parts: the fourth is below 2^-22 of it.
///
/// A block of 8 warps walks over tiles of columns beside one tile of rows, in steps along d that are copied to shared
/// memory ahead of their use; copies for the next tile are under way while the epilogue takes this one.
#pragma once

#include <cstdint>

#include "elements.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace polyvec {

constexpr int tile_rows = 128, tile_columns = 256, tile_threads = 256, tile_alignment = 1024;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool tiles_by_wgmma = true;
#else
constexpr bool tiles_by_wgmma = false;
#endif
constexpr int tile_steps_ahead = 2;  // whose copies are under way

/// Rows of `stride` elements, a multiple of 8, from a 16-byte boundary; part p of a row is `plane` elements further.
struct TileOperand {
    const std::uint16_t* values;
    std::int64_t n, stride, plane;
};

/// All tiles of columns once, in an order in which any stretch is a sample of all: `step` and `tiles` have no common
/// divisor.
struct TileOrder {
    std::int64_t tiles, step;

    explicit TileOrder(std::int64_t columns) : tiles((columns + tile_columns - 1) / tile_columns), step(1) {
        const auto common = [](std::int64_t a, std::int64_t b) {
            while (b != 0) {
                const std::int64_t rest = a % b;
                a = b;
                b = rest;
            }
            return a;
        };
        step = tiles * 5 / 8 + 1;
        while (common(step, tiles) != 1) ++step;
    }

    __host__ __device__ std::int64_t first_column(std::int64_t position) const {
        return position * step % tiles * tile_columns;
    }
};

/// What becomes of a column's products: product * x * (the row's factor) + y.
struct Affine {
    float x, y;
};

/// The tiles at positions first ... end of an order. `packed`: the operand holds them alone, one after the other.
struct TileColumns {
    TileOperand operand;
    const Affine* affine;  // tile_columns of each position
    TileOrder order;
    std::int64_t first, end;
    bool packed, diagonal;  // diagonal: no tiles but those that have columns of the same numbers as the rows
};

/// Where the products of a thread lie in a tile: 8 slots of 16, each in one row.
struct TilePlace {
    int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // wgmma: 16 rows a warp
    __device__ int row(int slot) const { return warp * 16 + slot % 2 * 8 + lane / 4; }
    __device__ int part(int slot) const { return slot / 2; }
#else  // 64 rows and 64 columns a warp
    __device__ int row(int slot) const { return warp % 2 * 64 + slot / 2 * 16 + slot % 2 * 8 + lane / 4; }
    __device__ int part(int) const { return warp / 2; }
#endif
    /// Of four parts of 64.
    __device__ int column(int slot, int j) const { return part(slot) * 64 + j / 2 * 8 + lane % 4 * 2 + j % 2; }
};

/// The products of a thread by slot and j.
struct TileProducts {
    float at[128];

    __device__ float& operator()(int slot, int j) { return at[(slot / 2 * 8 + j / 2) * 4 + slot % 2 * 2 + j % 2]; }
};

/// Steps along d and the shared memory of a block. A row of all its parts takes 128 bytes of a step by wgmma; half that
/// otherwise, so that 83 KB do, of the 99 KB that the GPUs with the least give to a block.
struct TileSteps {
    int depth, stages;                                // by wgmma, two further steps are being multiplied, otherwise one
    int row_bytes, column_bytes, stage_bytes, bytes;  // of a part; of a step; of all

    __host__ __device__ constexpr TileSteps(int row_parts, int column_parts, bool wgmma)
        : depth((wgmma ? 64 : 32) / row_parts),
          stages(tile_steps_ahead + (wgmma ? 2 : 1)),
          row_bytes(tile_rows * depth * 2),
          column_bytes(tile_columns * depth * 2),
          stage_bytes(row_parts * row_bytes + column_parts * column_bytes +
                      tile_columns * static_cast<int>(sizeof(Affine))),
          bytes(stages * stage_bytes + tile_rows * tile_columns / 8 + tile_alignment) {}
};

/// Which parts the product p is of, where 0 is that of high parts.
template <int RowParts>
__host__ __device__ constexpr int row_part(int p) {
    return p == 1 && RowParts == 2;
}
template <int RowParts>
__host__ __device__ constexpr int column_part(int p) {
    return p == 2 || (p == 1 && RowParts == 1);
}

/// Where 16 bytes of a row lie, so that 8 rows at the same chunk are in different banks. A row 16 further is 16 rows
/// of bytes further, and the chunk ^ c the offset ^ 16 c.
template <int Chunks>
__device__ int tile_offset(int row, int chunk) {
    return (row * Chunks + (chunk ^ (row / (8 / Chunks) % Chunks))) * 16;
}

/// `values`: of the first row, at the first chunk. Chunks from `width` on, and rows from n on, are zeros.
template <int Rows, int Chunks>
__device__ void copy_tile(SharedAddress to, const std::uint16_t* values, std::int64_t n, std::int64_t stride,
                          std::int64_t width) {
    constexpr int step = tile_threads / Chunks;  // rows at a time
    const int row = static_cast<int>(threadIdx.x) / Chunks, chunk = static_cast<int>(threadIdx.x) % Chunks;
    const std::uint16_t* from = values + row * stride + chunk * 8;
    to += tile_offset<Chunks>(row, chunk);
    const bool inside = chunk * 8 < width;
    const int rows = n < Rows ? static_cast<int>(n) : Rows;
#pragma unroll
    for (int i = 0; i < Rows / step; ++i, from += step * stride)
        copy_async(to + i * step * Chunks * 16, from, inside && row + i * step < rows);
}

/// `epilogue.thread(first_row, shared)` makes the state of a thread; it takes each tile by `take(products, affine,
/// first_column)`, and `finish()` ends it. d: a multiple of 8.
template <Words words, int RowParts, int ColumnParts, class Epilogue>
__global__ void __launch_bounds__(tile_threads, 1)
    tile_kernel(const __grid_constant__ TileOperand rows, const __grid_constant__ TileColumns columns, std::int64_t d,
                const __grid_constant__ Epilogue epilogue) {
    constexpr TileSteps shape(RowParts, ColumnParts, tiles_by_wgmma);
    constexpr int depth = shape.depth, chunks = depth / 8, stages = shape.stages;
    constexpr int row_bytes = shape.row_bytes, column_bytes = shape.column_bytes, stage_bytes = shape.stage_bytes;
    unsigned char* memory = dynamic_shared_memory;
    memory += (tile_alignment - reinterpret_cast<std::uintptr_t>(memory) % tile_alignment) % tile_alignment;
    const SharedAddress shared = shared_address(memory);
    const TilePlace place;
    [[maybe_unused]] const int row_offset = tile_offset<chunks>(place.warp % 2 * 64 + place.lane % 16, place.lane / 16);
    [[maybe_unused]] const int column_offset =
        tile_offset<chunks>(place.warp / 2 * 64 + place.lane / 16 * 8 + place.lane % 8, place.lane / 8 % 2);
    const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * tile_rows;
    const std::int64_t first = columns.diagonal ? first_row / tile_columns : columns.first + blockIdx.y;
    const std::int64_t end = columns.diagonal ? first + 1 : columns.end, stride = gridDim.y;
    const int depths = static_cast<int>((d + depth - 1) / depth);
    const std::int64_t steps = (end - first + stride - 1) / stride * depths;

    std::int64_t next_position = first;  // of the next copy
    int next_depth = 0, next_stage = 0;
    const auto copy = [&](std::int64_t step) {
        if (step < steps) {
            const SharedAddress to = shared + next_stage * stage_bytes;
            const std::int64_t at = static_cast<std::int64_t>(next_depth) * depth;
#pragma unroll
            for (int p = 0; p < RowParts; ++p)
                copy_tile<tile_rows, chunks>(to + p * row_bytes,
                                             rows.values + p * rows.plane + first_row * rows.stride + at,
                                             rows.n - first_row, rows.stride, d - at);
            const TileOperand& operand = columns.operand;
            const std::int64_t column = columns.packed ? (next_position - columns.first) * tile_columns
                                                       : columns.order.first_column(next_position);
#pragma unroll
            for (int p = 0; p < ColumnParts; ++p)
                copy_tile<tile_columns, chunks>(to + RowParts * row_bytes + p * column_bytes,
                                                operand.values + p * operand.plane + column * operand.stride + at,
                                                operand.n - column, operand.stride, d - at);
            if (++next_depth == depths) {
                constexpr int affine_chunks = tile_columns * sizeof(Affine) / 16;
                const Affine* from = columns.affine + (next_position - columns.first) * tile_columns;
                if (threadIdx.x < affine_chunks)
                    copy_async(to + RowParts * row_bytes + ColumnParts * column_bytes + threadIdx.x * 16,
                               from + threadIdx.x * 2, true);
                next_depth = 0;
                next_position += stride;
            }
            next_stage = next_stage + 1 == stages ? 0 : next_stage + 1;
        }
        end_of_copies();
    };

    auto state = epilogue.thread(first_row, memory + stages * stage_bytes);
    TileProducts products = {};
    for (int step = 0; step < tile_steps_ahead; ++step) copy(step);
    std::int64_t position = first;
    int at = 0, stage = 0;
    for (std::int64_t step = 0; step < steps; ++step) {
        const SharedAddress from = shared + stage * stage_bytes;
        wait_for_copies<tile_steps_ahead - 1>();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
        show_copies_to_products();
        wait_for_products<1>(products.at);
        __syncthreads();  // the copies of all threads are seen, and nobody multiplies the stage that is written next
        begin_products();
        const SharedAddress rows_of_group = from + place.warp / 4 * 64 * depth * 2;
#pragma unroll
        for (int k = 0; k < depth / 16; ++k)
#pragma unroll
            for (int p = RowParts + ColumnParts - 2; p >= 0; --p)  // the low parts first
                multiply_matrices<words>(
                    products.at, matrix_at<depth * 2>(rows_of_group + row_part<RowParts>(p) * row_bytes + k * 32),
                    matrix_at<depth * 2>(from + RowParts * row_bytes + column_part<RowParts>(p) * column_bytes +
                                         k * 32),
                    at > 0 || k > 0 || p < RowParts + ColumnParts - 2);
        end_products();
        copy(step + tile_steps_ahead);
#else
        __syncthreads();  // the copies of all threads are seen, and nobody reads the stage that is written next
        copy(step + tile_steps_ahead);
        if (at == 0) products = {};
#pragma unroll
        for (int k = 0; k < depth / 16; ++k) {
            unsigned row_parts[RowParts][4][4];
#pragma unroll
            for (int p = 0; p < RowParts; ++p)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    load_matrices(row_parts[p][i], from + p * row_bytes + i * 16 * chunks * 16 + (row_offset ^ k * 32));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                unsigned column_parts[ColumnParts][4];
#pragma unroll
                for (int p = 0; p < ColumnParts; ++p)
                    load_matrices(column_parts[p], from + RowParts * row_bytes + p * column_bytes +
                                                       j * 16 * chunks * 16 + (column_offset ^ k * 32));
#pragma unroll
                for (int p = RowParts + ColumnParts - 2; p >= 0; --p)  // the low parts first
#pragma unroll
                    for (int i = 0; i < 4; ++i)
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            multiply_words<words>(products.at + (i * 8 + j * 2 + h) * 4,
                                                  row_parts[row_part<RowParts>(p)][i],
                                                  column_parts[column_part<RowParts>(p)][2 * h],
                                                  column_parts[column_part<RowParts>(p)][2 * h + 1]);
            }
        }
#endif
        if (++at == depths) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
            wait_for_products<0>(products.at);
#endif
            const auto* affine = reinterpret_cast<const Affine*>(memory + stage * stage_bytes + RowParts * row_bytes +
                                                                 ColumnParts * column_bytes);
            state.take(products, affine, columns.order.first_column(position));
            position += stride;
            at = 0;
        }
        stage = stage + 1 == stages ? 0 : stage + 1;
    }
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    wait_for_products<0>(products.at);  // for none that are left
#endif
    state.finish();
}

/// Whether tiles are multiplied by wgmma there.
inline bool has_wgmma([[maybe_unused]] const char* op, [[maybe_unused]] Cuda cuda) {
#ifdef POLYVEC_SM_90A
    return attribute_of(op, cuda, cudaDevAttrComputeCapabilityMajor) == 9;
#else
    return false;
#endif
}

/// How many blocks share the columns' `tiles` beside each tile of rows, so that all multiprocessors are at work for
/// the shortest time.
inline std::int64_t tile_parts(int multiprocessors, std::int64_t row_tiles, std::int64_t tiles) {
    std::int64_t best = 1, least = INT64_MAX;
    for (std::int64_t parts = 1;
         parts <= std::min<std::int64_t>({tiles, 4 * multiprocessors / row_tiles + 1, max_grid_y}); ++parts) {
        const std::int64_t waves = (row_tiles * parts + multiprocessors - 1) / multiprocessors;
        const std::int64_t time = waves * ((tiles + parts - 1) / parts + 1);  // a start costs about a tile
        if (time < least) {
            least = time;
            best = parts;
        }
    }
    return best;
}

}  // namespace polyvec
