/// MaxSim by wgmma (sm_90a), for more query tokens than a pass of maxsim_streams.cuh takes: tokens of queries in
/// registers, of documents in shared memory.
///
/// A block has 128 or 256 rows of query tokens, whichever queries they belong to, and meets a slice of the documents 64
/// tokens at a time. Four warps copy tiles ahead, as one cannot issue the copies in the time of a tile's products; two
/// warpgroups multiply them, each its half of the rows, and are free to be at different tiles, so that one takes maxima
/// while the other's products are under way. The maxima of each row and document, with the document's rows that they
/// are of, go to memory; a second kernel sums them. 256 rows do 2 x 256 flops an element of a tile: the tensor cores
/// are the limit; for 128 rows and fewer it is memory.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "launch.cuh"
#include "mma.cuh"
#include "polyvec/maxsim.hpp"

namespace polyvec {
namespace tiles {

constexpr int groups = 2;  // warpgroups that multiply
constexpr int copiers = 128;
constexpr int threads = groups * 128 + copiers;
constexpr int tile = 64;  // document tokens
constexpr int stages = 4;

/// Query rows of a block whose warpgroups have this many fragments of 64 rows.
template <int fragments>
constexpr std::int64_t rows_of = groups * 64 * fragments;
constexpr int most_d = 128;

/// Of query tokens: rows of d elements of 16 bits; and documents alike, whose rows lie on multiples of 16 bytes.
struct Tokens {
    const std::uint16_t *queries, *docs;
    const std::int64_t* offsets;  // of documents
    std::int64_t query_tokens, sets, d;
};

/// Bytes of shared memory: each stage has its tile in halves of 64 columns, 128 bytes a row. They begin at a multiple
/// of 1024.
template <int steps>
constexpr int stage_bytes = tile * 128 * (steps > 4 ? 2 : 1);
template <int steps>
constexpr int shared_bytes = stages * stage_bytes<steps> + 1024;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define POLYVEC_FOUR(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define POLYVEC_OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add))
#define POLYVEC_WGMMA(shape, type, sums, a_b, p, ...)                                                           \
    asm volatile("{.reg .pred add; setp.ne.b32 add, " p ", 0; wgmma.mma_async.sync.aligned." shape ".f32." type \
                 "." type " {" sums "}, " a_b ", add, 1, 1, 0;}"                                                \
                 : __VA_ARGS__                                                                                  \
                 : POLYVEC_OPERANDS)

/// sum (64 x n: n / 2 numbers a thread) = a (64 x 16) times 16 columns of n rows, added to what it was if `add`.
template <Words words, int n>
__device__ inline void multiply_tile(float (&sum)[n / 2], const unsigned (&a)[4], std::uint64_t b, bool add) {
#define POLYVEC_BOTH(...)                   \
    if constexpr (words == Words::bf16) {   \
        POLYVEC_TYPED("bf16", __VA_ARGS__); \
    } else {                                \
        POLYVEC_TYPED("f16", __VA_ARGS__);  \
    }
    if constexpr (n == 16) {
#define POLYVEC_TYPED(type, ...) \
    POLYVEC_WGMMA("m64n16k16", type, "%0,%1,%2,%3,%4,%5,%6,%7", "{%8,%9,%10,%11}, %12", "%13", __VA_ARGS__)
        POLYVEC_BOTH(POLYVEC_FOUR(0), POLYVEC_FOUR(4))
#undef POLYVEC_TYPED
    } else if constexpr (n == 32) {
#define POLYVEC_TYPED(type, ...)                                                              \
    POLYVEC_WGMMA("m64n32k16", type, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", \
                  "{%16,%17,%18,%19}, %20", "%21", __VA_ARGS__)
        POLYVEC_BOTH(POLYVEC_FOUR(0), POLYVEC_FOUR(4), POLYVEC_FOUR(8), POLYVEC_FOUR(12))
#undef POLYVEC_TYPED
    } else if constexpr (n == 48) {
#define POLYVEC_TYPED(type, ...)                                                                           \
    POLYVEC_WGMMA("m64n48k16", type,                                                                       \
                  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23", \
                  "{%24,%25,%26,%27}, %28", "%29", __VA_ARGS__)
        POLYVEC_BOTH(POLYVEC_FOUR(0), POLYVEC_FOUR(4), POLYVEC_FOUR(8), POLYVEC_FOUR(12), POLYVEC_FOUR(16),
                     POLYVEC_FOUR(20))
#undef POLYVEC_TYPED
    } else {
        static_assert(n == 64);
#define POLYVEC_TYPED(type, ...)                                                                               \
    POLYVEC_WGMMA("m64n64k16", type,                                                                           \
                  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
                  "%25,%26,%27,%28,%29,%30,%31",                                                               \
                  "{%32,%33,%34,%35}, %36", "%37", __VA_ARGS__)
        POLYVEC_BOTH(POLYVEC_FOUR(0), POLYVEC_FOUR(4), POLYVEC_FOUR(8), POLYVEC_FOUR(12), POLYVEC_FOUR(16),
                     POLYVEC_FOUR(20), POLYVEC_FOUR(24), POLYVEC_FOUR(28))
#undef POLYVEC_TYPED
    }
#undef POLYVEC_BOTH
}
#undef POLYVEC_WGMMA
#undef POLYVEC_OPERANDS
#undef POLYVEC_FOUR

/// Waits until at most `left` groups of products are under way: `sum` is of none of them.
template <int left, int n>
__device__ inline void wait_to_read(float (&sum)[n]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(sum[i])::"memory");  // not read before
}

/// A place where threads wait until others have arrived, as often as it is passed.
class Barrier {
public:
    __device__ void begin(std::uint64_t* place, unsigned arrivals) {
        at_ = shared_address(place);
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at_), "r"(arrivals) : "memory");
    }
    __device__ void find(std::uint64_t* place) { at_ = shared_address(place); }
    __device__ void arrive() const {
        asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(at_) : "memory");
    }
    /// When the copies that this thread has begun are done.
    __device__ void arrive_with_copies() const {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at_) : "memory");
    }
    /// Until the phase of this parity has passed.
    __device__ void wait(unsigned parity) const {
        unsigned passed = 0;
        while (!passed)
            asm volatile(
                "{.reg .pred passed; mbarrier.try_wait.parity.shared::cta.b64 passed, [%1], %2; selp.u32 %0, 1, 0, "
                "passed;}"
                : "=r"(passed)
                : "r"(at_), "r"(parity)
                : "memory");
    }

private:
    unsigned at_;
};

/// What multiplies need to know of a tile.
struct Tile {
    std::int64_t doc;    // -1 behind the last tile
    std::int32_t at, n;  // its first row, and the document's rows
};

struct Shared {
    std::uint64_t full[stages], empty[stages];
    Tile tiles[stages];
};

/// Where the next stage is, and how often it has been met before.
struct Stage {
    int at = 0;
    unsigned parity = 0;

    __device__ void advance() {
        if (++at < stages) return;
        at = 0;
        parity ^= 1;
    }
};

/// A thread's maxima of two rows of each fragment, and which tokens they are of.
template <int fragments, bool with_rows>
struct RowMaxima {
    float best[fragments][2];
    std::int32_t row[fragments][2];

    __device__ void clear() {
        for (int m = 0; m < fragments; ++m)
            for (int h = 0; h < 2; ++h) best[m][h] = -HUGE_VALF, row[m][h] = -1;
    }
    __device__ void take(int m, int h, float value, std::int32_t at) {
        if constexpr (with_rows) {
            if (value > best[m][h]) best[m][h] = value, row[m][h] = at;
        } else {
            best[m][h] = fmaxf(best[m][h], value);
        }
    }
};

/// steps: products of 16 columns that a row takes. Calls done() when the tile has been read.
template <Words words, int fragments, int steps, int n, bool with_rows, class F>
__device__ inline void multiply_and_take(const unsigned (&a)[fragments][steps][4], unsigned address,
                                         const Tile& tile_of, RowMaxima<fragments, with_rows>& maxima, F done) {
    float sums[fragments][n / 2];
    begin_products();
#pragma unroll
    for (int m = 0; m < fragments; ++m) {
#pragma unroll
        for (int k = 0; k < steps; ++k)
            multiply_tile<words, n>(sums[m], a[m][k], matrix_at<128>(address + k / 4 * (tile * 128) + k % 4 * 32),
                                    k > 0);
        end_products();
    }
    const int t = static_cast<int>(threadIdx.x % 4);
    const std::int32_t last = tile_of.n - 1;
    const auto take = [&](int m) {
#pragma unroll
        for (int i = 0; i < n / 2; ++i) {
            const std::int32_t column = tile_of.at + i / 4 * 8 + 2 * t + i % 2;
            maxima.take(m, i / 2 % 2, sums[m][i], with_rows && column > last ? last : column);
        }
    };
    if constexpr (fragments == 2) {
        wait_to_read<1>(sums[0]);
        take(0);
    }
    wait_to_read<0>(sums[fragments - 1]);
    done();
    take(fragments - 1);
}

/// Copies the tiles of a slice of the documents, then one that says that there are no more.
template <int steps>
__device__ void copy_tiles(const Tokens& tokens, Shared& shared, unsigned stages_at) {
    const int copier = static_cast<int>(threadIdx.x) - groups * 128;
    const std::int64_t first = tokens.sets * blockIdx.y / gridDim.y, end = tokens.sets * (blockIdx.y + 1) / gridDim.y;
    constexpr int pieces = steps * 2, rows_at_once = copiers / (pieces > 8 ? 16 : 8);
    const int piece = copier % (copiers / rows_at_once), first_row = copier / (copiers / rows_at_once);
    const bool inside = piece < pieces, exists = inside && piece * 8 < tokens.d;
    const unsigned to_piece = stages_at + piece / 8 * (tile * 128);
    Stage stage;
    const auto put = [&](const Tile& of, auto copy) {
        Barrier full, empty;
        full.find(shared.full + stage.at), empty.find(shared.empty + stage.at);
        empty.wait(stage.parity ^ 1);
        copy(stage.at * stage_bytes<steps>);
        full.arrive_with_copies();
        if (copier == 0) {
            shared.tiles[stage.at] = of;
            full.arrive();
        }
        stage.advance();
    };
    std::int64_t next = first < end ? __ldg(tokens.offsets + first) : 0;
    for (std::int64_t doc = first; doc < end; ++doc) {
        const std::int64_t begin = next;
        next = __ldg(tokens.offsets + doc + 1);
        const auto n = static_cast<std::int32_t>(next - begin);
        for (std::int32_t at = 0; at < n; at += tile)
            put({doc, at, n}, [&](unsigned stage_at) {
                const std::int32_t left = n - at, rows = left >= tile ? tile : (left + 15) / 16 * 16;
                const std::uint16_t* from = tokens.docs + (begin + at) * tokens.d + (exists ? piece * 8 : 0);
#pragma unroll
                for (int i = 0; i < tile / rows_at_once; ++i) {
                    const int r = first_row + i * rows_at_once;
                    if (inside && r < rows)
                        copy_async(to_piece + stage_at + r * 128 + ((piece % 8 ^ r % 8) * 16),
                                   from + min(r, left - 1) * tokens.d, exists);
                }
            });
    }
    put({-1, 0, 0}, [](unsigned) {});
}

template <Words words, int fragments, int steps, bool with_rows>
__global__ void __launch_bounds__(threads, 1)
    row_maxima_kernel(const __grid_constant__ Tokens tokens, float* best, std::int32_t* found) {
    __shared__ Shared shared;
    const unsigned stages_at = (shared_address(dynamic_shared_memory) + 1023u) & ~1023u;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
    if (thread < stages) {
        Barrier().begin(shared.full + thread, copiers + 1);
        Barrier().begin(shared.empty + thread, groups * 4);
    }
    __syncthreads();
    if (thread >= groups * 128) return copy_tiles<steps>(tokens, shared, stages_at);

    // Rows of this thread's fragments: row_of(m), and 8 more.
    const auto row_of = [&](int m) {
        return std::int64_t(blockIdx.x) * rows_of<fragments> + thread / 128 * (64 * fragments) + m * 64 +
               thread % 128 / 32 * 16 + g;
    };
    unsigned a[fragments][steps][4];
#pragma unroll
    for (int m = 0; m < fragments; ++m)
#pragma unroll
        for (int k = 0; k < steps; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const std::int64_t row = row_of(m) + i % 2 * 8, column = k * 16 + i / 2 * 8 + 2 * t;
                const bool exists = row < tokens.query_tokens && column < tokens.d;  // d is a multiple of 8
                a[m][k][i] = exists ? *reinterpret_cast<const unsigned*>(tokens.queries + row * tokens.d + column) : 0;
            }

    RowMaxima<fragments, with_rows> maxima;
    maxima.clear();
    for (Stage stage;; stage.advance()) {
        Barrier full, empty;
        full.find(shared.full + stage.at), empty.find(shared.empty + stage.at);
        full.wait(stage.parity);
        const Tile of = shared.tiles[stage.at];
        if (of.doc < 0) return;
        show_copies_to_products();
        const unsigned address = stages_at + stage.at * stage_bytes<steps>;
        const auto done = [&] {
            if (lane == 0) empty.arrive();
        };
        const std::int32_t left = of.n - of.at;
        if (left > 48) {
            multiply_and_take<words, fragments, steps, 64>(a, address, of, maxima, done);
        } else if (left > 32) {
            multiply_and_take<words, fragments, steps, 48>(a, address, of, maxima, done);
        } else if (left > 16) {
            multiply_and_take<words, fragments, steps, 32>(a, address, of, maxima, done);
        } else {
            multiply_and_take<words, fragments, steps, 16>(a, address, of, maxima, done);
        }
        if (left > tile) continue;
#pragma unroll
        for (int m = 0; m < fragments; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float value = maxima.best[m][h];
                std::int32_t row = maxima.row[m][h];
                for (int other = 1; other < 4; other *= 2) {
                    const float theirs = __shfl_xor_sync(whole_warp, value, other);
                    if constexpr (with_rows) {
                        const std::int32_t at = __shfl_xor_sync(whole_warp, row, other);
                        if (theirs > value || (theirs == value && at >= 0 && at < row)) row = at;
                    }
                    value = fmaxf(value, theirs);
                }
                const std::int64_t token = row_of(m) + 8 * h;
                if (t != 0 || token >= tokens.query_tokens) continue;
                best[of.doc * tokens.query_tokens + token] = value;
                if constexpr (with_rows) found[of.doc * tokens.query_tokens + token] = row;
            }
        maxima.clear();
    }
}

#else

template <Words words, int fragments, int steps, bool with_rows>
__global__ void row_maxima_kernel(const __grid_constant__ Tokens, float*, std::int32_t*) {}

#endif

/// out[q][first + doc] = the sum of the maxima of query q's tokens; best (documents, query tokens). Documents without
/// tokens have no maxima.
template <bool with_rows>
__global__ void sum_kernel(const float* best, std::int32_t* found, const std::int64_t* query_offsets,
                           const std::int64_t* doc_offsets, std::int64_t queries, std::int64_t docs,
                           std::int64_t query_tokens, const __grid_constant__ Missing missing, float* out,
                           std::int64_t stride) {
    const std::int64_t q = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (q >= queries) return;
    const std::int64_t first = query_offsets[q], end = query_offsets[q + 1];
    for (std::int64_t doc = blockIdx.y; doc < docs; doc += gridDim.y) {
        const std::int64_t n = doc_offsets[doc + 1] - doc_offsets[doc];
        const bool zero = n < missing.full;
        double sum = 0;
        for (std::int64_t i = first; i < end; ++i) {
            const float value = n > 0 ? best[doc * query_tokens + i] : -HUGE_VALF;
            sum += zero && !(value > 0) ? 0.0f : value;
            if constexpr (with_rows)
                if (n == 0) found[doc * query_tokens + i] = -1;
        }
        if (n == 0 && !zero && end > first) sum = missing.empty;
        out[q * stride + doc] = static_cast<float>(sum);
    }
}

}  // namespace tiles
}  // namespace polyvec
