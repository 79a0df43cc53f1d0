// Fixed dimensional encodings on a GPU: bucket ids of all tokens first, then a block of threads a set.
//
// A document of 180 tokens x 128 with 20 repetitions of 5 planes and 16 columns: 2.3 M multiply-adds for the signs and
// 1.3 M for the projections on tensor cores, two or three products for one of float32; 1.8 MB of tokens from shared
// memory, to which they are copied once, for the sums of buckets. Sums run in the order of tokens: the same bits in
// every run.
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "elements.cuh"
#include "fragments.cuh"
#include "launch.cuh"
#include "polyvec/fde.hpp"
#include "warp.cuh"

namespace polyvec {
namespace {

constexpr int lanes = Fragment<>::lanes;

/// Entries i ... i + 3 of a row of d, 0 beyond. `aligned`: they can be read at once.
__device__ float4 load4(const float* row, std::int64_t i, std::int64_t d, bool aligned) {
    if (aligned) return i < d ? *reinterpret_cast<const float4*>(row + i) : float4{};
    const auto at = [&](int j) { return i + j < d ? row[i + j] : 0.0f; };
    return {at(0), at(1), at(2), at(3)};
}

// Bucket ids

/// The hyperplanes in panels of whole repetitions, at most max_columns planes each.
struct Planes {
    static constexpr int max_tiles = 8, max_columns = 16 * max_tiles;

    const uint4* fragments;  // Bf16Fragments of all panels, one after the other
    int tiles, chunks;       // of a panel: of 16 planes, of 16 entries
    const float* slack;      // (panels, 16 * tiles): times a token's norm, more than a product is off by
    const float* rows;       // (R * bits, d)
    const std::uint32_t* bucket_of;
    std::int64_t d;
    int bits, repetitions, panels, per_panel;  // repetitions
};

/// Whether <x, plane> > 0, of a warp, in float64, where the products of floats are exact.
__device__ bool is_above(const float* x, const float* plane, std::int64_t d, unsigned lane) {
    double sum = 0;
    for (std::int64_t i = lane; i < d; i += lanes) sum += static_cast<double>(x[i]) * plane[i];
    return sum_of_warp(sum) > 0;
}

/// out[token * token_stride + r * repetition_stride] = the bucket. A warp computes 32 tokens of a panel; the
/// panels of a block's tokens are neighbours, so that tokens come from memory once.
///
/// A product is off by less than slack times the token's norm: the signs of those closer to zero are decided in
/// float64. Rows too small or too large for float32 products count as of infinite norm: all signs are decided there.
template <bool aligned>
__global__ void __launch_bounds__(128)
    partition_kernel(const float* tokens, std::int64_t n, const __grid_constant__ Planes planes, std::int32_t* out,
                     std::int64_t token_stride, std::int64_t repetition_stride) {
    constexpr int groups = 4, max_tiles = Planes::max_tiles;  // of 8 tokens, of 16 planes
    constexpr float smallest = 1e-18f, largest = 1e18f;       // between these, products neither under- nor overflow
    const unsigned lane = threadIdx.x % lanes, g = lane / 4, t = lane % 4;
    const int panel = static_cast<int>(blockIdx.x % planes.panels);
    const std::int64_t block = blockIdx.x / planes.panels;
    const std::int64_t first = (block * (blockDim.x / lanes) + threadIdx.x / lanes) * 32;
    if (first >= n) return;
    const std::int64_t d = planes.d;
    const int first_repetition = panel * planes.per_panel;
    const int left = planes.repetitions - first_repetition;
    const int repetitions = left < planes.per_panel ? left : planes.per_panel, columns = repetitions * planes.bits;
    const int tiles = planes.tiles, chunks = planes.chunks;
    const uint4* at = planes.fragments + static_cast<std::int64_t>(panel) * tiles * chunks * Bf16Fragment::size + lane;

    float product[max_tiles][groups][4] = {}, norm[groups] = {};  // squared, at first
    unsigned bits[groups] = {};                                   // of all entries
    float4 next[groups];
    const auto load = [&](int k) {
#pragma unroll
        for (int i = 0; i < groups; ++i) {
            const std::int64_t token = first + 8 * i + g;
            next[i] = token < n ? load4(tokens + token * d, 16 * k + 4 * t, d, aligned) : float4{};
        }
    };
    load(0);
    Bf16Fragment ahead(at);
    for (int k = 0; k < chunks; ++k) {
        float4 x[groups];
#pragma unroll
        for (int i = 0; i < groups; ++i) {
            x[i] = next[i];
            norm[i] = fmaf(x[i].w, x[i].w, fmaf(x[i].z, x[i].z, fmaf(x[i].y, x[i].y, fmaf(x[i].x, x[i].x, norm[i]))));
            bits[i] |= (__float_as_uint(x[i].x) | __float_as_uint(x[i].y)) |
                       (__float_as_uint(x[i].z) | __float_as_uint(x[i].w));
        }
        if (k + 1 < chunks) load(k + 1);  // on its way during the products
        const Bf16Pairs pairs[groups][2] = {{Bf16Pairs(x[0].x, x[0].y), Bf16Pairs(x[0].z, x[0].w)},
                                            {Bf16Pairs(x[1].x, x[1].y), Bf16Pairs(x[1].z, x[1].w)},
                                            {Bf16Pairs(x[2].x, x[2].y), Bf16Pairs(x[2].z, x[2].w)},
                                            {Bf16Pairs(x[3].x, x[3].y), Bf16Pairs(x[3].z, x[3].w)}};
#pragma unroll
        for (int m = 0; m < max_tiles; ++m) {
            if (m >= tiles) continue;
            const Bf16Fragment fragment = ahead;
            ahead = Bf16Fragment(at += Bf16Fragment::size);
            fragment.multiply(product[m], pairs);
        }
    }

#pragma unroll
    for (int i = 0; i < groups; ++i) {
        for (int bit = 1; bit < 4; bit *= 2) {
            norm[i] += __shfl_xor_sync(whole_warp, norm[i], bit);
            bits[i] |= __shfl_xor_sync(whole_warp, bits[i], bit);
        }
        norm[i] = sqrt(norm[i]);
        if (bits[i] << 1 != 0 && !(norm[i] > smallest && norm[i] < largest)) norm[i] = static_cast<float>(HUGE_VALF);
    }
    const float* slack = planes.slack + panel * 16 * tiles;
#pragma unroll
    for (int i = 0; i < groups; ++i) {
        const float reach[2] = {__shfl_sync(whole_warp, norm[i], static_cast<int>(8 * t)),
                                __shfl_sync(whole_warp, norm[i], static_cast<int>(8 * t + 4))};
        unsigned positive = 0, unsure = 0;  // bit 4 * m + j: of product[m][i][j]
#pragma unroll
        for (int m = 0; m < max_tiles; ++m) {
            if (m >= tiles) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int column = 16 * m + static_cast<int>(g) + j / 2 * 8;
                const float value = product[m][i][j];
                positive |= static_cast<unsigned>(value > 0) << (4 * m + j);
                const bool sure = fabsf(value) >= slack[column] * reach[j % 2] && reach[j % 2] <= largest;
                unsure |= static_cast<unsigned>(!sure && column < columns) << (4 * m + j);
            }
        }
        for (unsigned waiting; (waiting = __ballot_sync(whole_warp, unsure != 0)) != 0;) {
            const int source = __ffs(waiting) - 1, which = __ffs(__shfl_sync(whole_warp, unsure, source)) - 1;
            const int row = 8 * i + source % 4 * 2 + which % 2;
            const int column = which / 4 * 16 + source / 4 + which % 4 / 2 * 8;
            const float* plane = planes.rows + (static_cast<std::int64_t>(first_repetition) * planes.bits + column) * d;
            const bool above = first + row < n && is_above(tokens + (first + row) * d, plane, d, lane);
            if (static_cast<int>(lane) == source) {
                unsure &= unsure - 1;
                positive = (positive & ~(1u << which)) | static_cast<unsigned>(above) << which;
            }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // of token 2 * t + j: all its signs, in each of its lanes
            std::uint64_t words[2] = {};
#pragma unroll
            for (int m = 0; m < max_tiles; ++m) {
                const std::uint64_t lower = positive >> (4 * m + j) & 1, upper = positive >> (4 * m + 2 + j) & 1;
                words[m / 4] |= (lower | upper << 8) << (m % 4 * 16 + g);
            }
            for (int bit = 4; bit < lanes; bit *= 2) {
                words[0] |= __shfl_xor_sync(whole_warp, words[0], bit);
                words[1] |= __shfl_xor_sync(whole_warp, words[1], bit);
            }
            const std::int64_t token = first + 8 * i + 2 * t + j;
            if (token >= n) continue;
            for (int r = static_cast<int>(g); r < repetitions; r += 8) {
                const int at = r * planes.bits;
                const std::uint64_t from = at >= 64 ? words[1] >> (at - 64)
                                           : at > 0 ? words[0] >> at | words[1] << (64 - at)
                                                    : words[0];
                const unsigned word = static_cast<unsigned>(from) & ((1u << planes.bits) - 1);
                out[token * token_stride + (first_repetition + r) * repetition_stride] =
                    static_cast<std::int32_t>(planes.bucket_of[word]);
            }
        }
    }
}

// Encodings

/// A set's tokens by bucket. Tokens of a bucket keep their order.
template <class Token>
struct Buckets {
    Token* order;         // token ids, bucket after bucket
    std::uint32_t* ends;  // of each bucket in `order`
    std::uint64_t* keys;  // of a sign word: how far the nearest token is, and which

    __device__ std::uint32_t begin(std::int64_t b) const { return b ? ends[b - 1] : 0; }
};

struct Encode {
    const float* tokens;
    const std::int64_t* offsets;  // of the first set
    std::int64_t sets, total, d;  // total: tokens
    bool aligned;
    const std::int32_t* ids;  // (R, total)
    int repetitions, buckets;
    std::int64_t width;
    Fragments projections;  // of all repetitions, one after the other; null: none
    const std::uint32_t *words, *sources;
    bool mean, fill, lowest_bucket;
    void* out;  // (sets, R * buckets * width) float16 or float32
    bool half;
    std::int64_t done;  // sets of at most so many tokens are passed over
    int rows;           // tokens that fit into shared memory
    // For sets of more tokens, which are passed over where these are null
    std::uint32_t* order;  // (R, total)
    std::uint64_t* keys;   // (gridDim.x, R, buckets)
    std::uint32_t* ends;   // the same

    static constexpr std::uint64_t farther = std::uint64_t(1) << 40, nothing = ~std::uint64_t(0) >> 1;
    static constexpr int most_warps = 20;
    using Staged = std::uint16_t;

    /// Floats from one token to the next in shared memory: a multiple of its 32 banks.
    __host__ __device__ std::int64_t stride() const { return (d + 31) / 32 * 32; }
    __host__ __device__ std::int64_t all_buckets() const { return static_cast<std::int64_t>(repetitions) * buckets; }

    __device__ void store(std::int64_t i, float x) const {
        if (half) {
            static_cast<std::uint16_t*>(out)[i] = rounded_to_float16(x).bits;
        } else {
            static_cast<float*>(out)[i] = x;
        }
    }

    /// Sorts a repetition's tokens, of a warp, and finds what fills its empty buckets.
    template <class Token>
    __device__ void sort(const std::int32_t* ids, std::int64_t n, const Buckets<Token>& to, unsigned lane) const {
        for (std::int64_t b = lane; b < buckets; b += lanes) to.ends[b] = 0;
        __syncwarp();
        const unsigned lower = (1u << lane) - 1;
        const auto for_each_chunk = [&](auto f) {
            const auto load = [&](std::int64_t token) { return token < n ? ids[token] : -1; };
            std::int32_t next = load(lane);
            for (std::int64_t token = lane; token < n + lane; token += lanes) {
                const std::int32_t id = next;
                next = load(token + lanes);
                const unsigned peers = __match_any_sync(whole_warp, id);
                f(token, id, id >= 0, peers);
            }
        };
        for_each_chunk([&](std::int64_t, std::int32_t id, bool valid, unsigned peers) {
            if (valid && (peers & lower) == 0) to.ends[id] += __popc(peers);
            __syncwarp();
        });
        std::uint32_t before = 0;
        bool complete = true;
        for (std::int64_t first = 0; first < buckets; first += lanes) {
            const std::int64_t b = first + lane;
            const std::uint32_t count = b < buckets ? to.ends[b] : 1;
            complete = complete && count > 0;
            std::uint32_t sum = count;
            for (int distance = 1; distance < lanes; distance *= 2) {
                const std::uint32_t other = __shfl_up_sync(whole_warp, sum, distance);
                if (static_cast<int>(lane) >= distance) sum += other;
            }
            if (b < buckets) to.ends[b] = before + sum - count;
            before += __shfl_sync(whole_warp, sum, lanes - 1);
        }
        __syncwarp();
        for_each_chunk([&](std::int64_t token, std::int32_t id, bool valid, unsigned peers) {
            const std::uint32_t begin = valid ? to.ends[id] : 0;
            __syncwarp();
            if (valid) {
                to.order[begin + __popc(peers & lower)] = static_cast<Token>(token);
                if ((peers & lower) == 0) to.ends[id] = begin + __popc(peers);
            }
            __syncwarp();
        });
        if (!fill || __all_sync(whole_warp, complete)) return;

        // The nearest token of all sign words: one round a bit over the hypercube, a Hamming distance being a sum.
        for (std::int64_t b = lane; b < buckets; b += lanes) {
            const std::uint32_t begin = to.begin(b);
            to.keys[words[b]] = begin == to.ends[b] ? nothing
                                : lowest_bucket     ? static_cast<std::uint64_t>(b)
                                                    : static_cast<std::uint64_t>(to.order[begin]);
        }
        for (std::int64_t bit = 1; bit < buckets; bit *= 2) {
            __syncwarp();
            for (std::int64_t i = lane; i < buckets / 2; i += lanes) {
                std::uint64_t &low = to.keys[i / bit * 2 * bit + i % bit], &high = *(&low + bit);
                const std::uint64_t from_low = low + farther, from_high = high + farther;
                if (from_high < low) low = from_high;
                if (from_low < high) high = from_low;
            }
        }
    }
};

/// Adds up `count` tokens, `first` and then tokens[1] ..., in this order: of `chunks` times 16 columns from `column`
/// on. Four lanes a bucket.
///
/// sum[k] is of columns 16 * (k ^ (g & 1)) + 4 * t ...: of any two buckets whose tokens are read at once, one reads the
/// first half of the banks, the other one the second.
template <bool staged, bool full, class Token>
__device__ void add_up(float (&sum)[8][4], const Encode& e, const float* rows, const Token* tokens, std::int64_t first,
                       std::uint32_t count, int column, int chunks, unsigned lane) {
    using Index = std::conditional_t<staged, int, std::int64_t>;
    const int swap = static_cast<int>(lane / 4 & 1), begin = column + 4 * static_cast<int>(lane % 4);
    const int even = begin + 16 * swap, odd = begin - 16 * swap;
    const auto stride = static_cast<Index>(staged ? e.stride() : e.d);
#pragma unroll
    for (int k = 0; k < 8; ++k)
        for (float& x : sum[k]) x = 0;
    auto token = static_cast<Index>(first);
#pragma unroll 1
    for (std::uint32_t i = 0; i < count; ++i) {
        const float* row = rows + token * stride;
        if (i + 1 < count) token = tokens[i + 1];
        float4 x[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (!full && k >= chunks) continue;
            const int at = (k % 2 ? odd : even) + 16 * k;
            x[k] = staged ? *reinterpret_cast<const float4*>(row + at) : load4(row, at, e.d, e.aligned);
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (!full && k >= chunks) continue;
            sum[k][0] += x[k].x;
            sum[k][1] += x[k].y;
            sum[k][2] += x[k].z;
            sum[k][3] += x[k].w;
        }
    }
}

/// The tokens of a bucket, or the one that fills it.
struct Members {
    std::uint32_t begin = 0, count = 0;
    std::int64_t first = 0;

    template <class Token>
    __device__ Members(const Encode& e, const Buckets<Token>& from, int b) {
        if (b >= e.buckets) return;
        begin = from.begin(b);
        count = from.ends[b] - begin;
        if (count > 0) {
            first = from.order[begin];
        } else if (e.fill) {
            const auto found = static_cast<std::int64_t>(from.keys[e.sources[b]] % Encode::farther);
            first = e.lowest_bucket ? static_cast<std::int64_t>(from.order[from.begin(found)]) : found;
            count = 1;
        }
    }
};

/// Writes the blocks of eight buckets of a repetition, of a warp: row g of a product is the g-th of them. full: d is a
/// multiple of 128, and blocks have at most 16 columns or are not projected. exact: the projections are.
template <bool staged, bool full, bool exact, class Token>
__device__ void write_blocks(const Encode& e, const float* rows, const Buckets<Token>& from, int r, int first_bucket,
                             std::int64_t set, unsigned lane) {
    constexpr int tiles = full ? 1 : 2;  // of 16 columns, projected in one walk over the tokens
    const int g = static_cast<int>(lane / 4), t = static_cast<int>(lane % 4), padded = static_cast<int>(e.stride());
    const Members members(e, from, first_bucket + g);
    const float scale = e.mean && members.count > 1 ? 1 / static_cast<float>(members.count) : 1;
    const std::int64_t row = (set * e.repetitions + r) * e.buckets + first_bucket;  // of the block of bucket 0 here
    const Fragments& projection = e.projections;
    const uint4* const at =
        (exact ? projection.exact + r * projection.exact_size() : projection.at + r * projection.size()) + lane;

    for (int m0 = 0; m0 == 0 || (!full && m0 < projection.tiles); m0 += tiles) {
        float product[tiles][4] = {}, rest[tiles][4] = {};
        for (int column = 0; column < padded; column += 128) {
            const int chunks = full || padded - column >= 128 ? 8 : (padded - column) / 16;
            float sum[8][4];
            add_up<staged, full>(sum, e, rows, from.order + members.begin, members.first, members.count, column, chunks,
                                 lane);
            if (projection.tiles == 0) {
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    const int c = column + 16 * (k ^ (g & 1)) + 4 * t;
                    for (int j = 0; j < 4; ++j)
                        if (k < chunks && c + j < e.d && first_bucket + g < e.buckets)
                            e.store((row + g) * e.d + c + j, sum[k][j] * scale);
                }
                continue;
            }
            __syncwarp();
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const int chunk = column / 16 + k;
                if (!full && (k >= chunks || chunk >= projection.chunks)) continue;
                const uint4 both = exact ? at[chunk * lanes] : uint4{};
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const auto value = [&](int j) { return (g & 1 ? sum[k ^ 1][j] : sum[k][j]) * scale; };
                    Operand<Words::f32, 2> x;
                    for (int i = 0; i < 2; ++i) x.set(i, __float_as_uint(value(2 * h + i)));
                    if constexpr (exact) {
                        Fragment<true>(h ? both.z : both.x, h ? both.w : both.y).multiply(product[0], rest[0], x);
                    } else {
#pragma unroll
                        for (int m = 0; m < tiles; ++m) {
                            if (m > 0 && m0 + m >= projection.tiles) continue;
                            const int fragment = (2 * chunk + h) * (full ? 1 : projection.tiles) + m0 + m;
                            Fragment<>(at + fragment * Fragment<>::size).multiply(product[m], rest[m], x);
                        }
                    }
                }
            }
        }
        if (projection.tiles == 0) return;
#pragma unroll
        for (int m = 0; m < tiles; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int column = 16 * (m0 + m) + g + j / 2 * 8, bucket = 2 * t + j % 2;
                if (column < e.width && first_bucket + bucket < e.buckets)
                    e.store((row + bucket) * e.width + column, product[m][j] + rest[m][j]);
            }
        }
    }
}

/// A set of n tokens, of a block. rows: its tokens; buckets_of(r): where those of repetition r are.
template <bool staged, class BucketsOf>
__device__ void encode_set(const Encode& e, std::int64_t set, std::int64_t begin, std::int64_t n, const float* rows,
                           BucketsOf buckets_of) {
    const unsigned lane = threadIdx.x % lanes;
    const int warp = static_cast<int>(threadIdx.x / lanes), warps = static_cast<int>(blockDim.x / lanes);
    for (int r = warp; r < e.repetitions; r += warps) e.sort(e.ids + r * e.total + begin, n, buckets_of(r), lane);
    end_of_copies();
    wait_for_copies<0>();
    __syncthreads();
    const int parts = (e.buckets + 7) / 8;
    const auto write = [&]<bool full, bool exact>() {
        for (int item = warp; item < e.repetitions * parts; item += warps) {
            const int r = item / parts;
            write_blocks<staged, full, exact>(e, rows, buckets_of(r), r, item % parts * 8, set, lane);
        }
    };
    if (staged && e.d % 128 == 0 && e.projections.tiles <= 1) {
        e.projections.exact ? write.template operator()<true, true>() : write.template operator()<true, false>();
    } else {
        write.template operator()<false, false>();
    }
}

/// Encodes a set: its tokens from shared memory where they fit, or else from where they lie.
__device__ void encode(const Encode& e, std::int64_t set) {
    const std::int64_t begin = e.offsets[set], n = e.offsets[set + 1] - begin, stride = e.stride();
    const float* tokens = e.tokens + begin * e.d;
    if (n > e.rows) {
        const std::int64_t at = blockIdx.x * e.all_buckets();
        encode_set<false>(e, set, begin, n, tokens, [&](int r) {
            const std::int64_t bucket = at + static_cast<std::int64_t>(r) * e.buckets;
            return Buckets<std::uint32_t>{e.order + r * e.total + begin, e.ends + bucket, e.keys + bucket};
        });
        return;
    }
    auto* rows = reinterpret_cast<float*>(dynamic_shared_memory);
    const int quads = static_cast<int>(stride / 4), size = static_cast<int>(n) * quads;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) {
        const int column = i % quads * 4;
        const float* from = tokens + i / quads * e.d;
        if (e.aligned) {
            copy_async(shared_address(rows + 4 * i), from + column, column < e.d);
        } else {
            *reinterpret_cast<float4*>(rows + 4 * i) = load4(from, column, e.d, false);
        }
    }
    auto* keys = reinterpret_cast<std::uint64_t*>(rows + e.rows * stride);
    auto* ends = reinterpret_cast<std::uint32_t*>(keys + e.all_buckets());
    auto* order = reinterpret_cast<Encode::Staged*>(ends + e.all_buckets());
    encode_set<true>(e, set, begin, n, rows, [&](int r) {
        return Buckets<Encode::Staged>{order + r * e.rows, ends + r * e.buckets, keys + r * e.buckets};
    });
}

/// A block takes every gridDim.x-th set; of 32 of these, its lanes find those that this launch encodes.
__global__ void __launch_bounds__(Encode::most_warps* lanes) encode_kernel(const __grid_constant__ Encode e) {
    const std::int64_t step = gridDim.x;
    for (std::int64_t first = blockIdx.x; first < e.sets; first += lanes * step) {
        const std::int64_t candidate = first + threadIdx.x % lanes * step;
        const std::int64_t n = candidate < e.sets ? e.offsets[candidate + 1] - e.offsets[candidate] : -1;
        unsigned left = __ballot_sync(whole_warp, n > e.done && (n <= e.rows || e.order));
        for (; left; left &= left - 1) {
            const std::int64_t set = first + (__ffs(left) - 1) * step;
            if (e.offsets[set + 1] == e.offsets[set]) {
                const std::int64_t size = e.all_buckets() * e.width;
                for (std::int64_t i = threadIdx.x; i < size; i += blockDim.x) e.store(set * size + i, 0);
                continue;
            }
            encode(e, set);
            __syncthreads();  // before the next set takes the memory
        }
    }
}

// What follows an encoding

/// Entries of the long encoding by the entry of the final one to which they are added, in their order.
struct Sketch {
    const std::int64_t* begins;  // (final dim + 1,)
    const std::uint32_t* entries;
    const float* signs;
};

__global__ void sketch_kernel(const float* blocks, std::int64_t long_dim, const __grid_constant__ Sketch sketch,
                              void* out, bool half, std::int64_t sets, std::int64_t d) {
    for_each_position(sets, d, [&](std::int64_t set, std::int64_t c) {
        float sum = 0;
        for (std::int64_t i = sketch.begins[c]; i < sketch.begins[c + 1]; ++i)
            sum += sketch.signs[i] * blocks[set * long_dim + sketch.entries[i]];
        if (half) {
            static_cast<std::uint16_t*>(out)[set * d + c] = rounded_to_float16(sum).bits;
        } else {
            static_cast<float*>(out)[set * d + c] = sum;
        }
    });
}

/// A warp a row. The scale of a row that is not finite is NaN, its codes are 0.
__global__ void round_kernel(const float* rows, std::int8_t* codes, float* scales, std::int64_t sets, std::int64_t d) {
    const std::int64_t set = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (set >= sets) return;
    float largest = 0;
    bool finite = true;
    for (std::int64_t c = threadIdx.x; c < d; c += lanes) {
        const float x = fabsf(rows[set * d + c]);
        finite = finite && x < HUGE_VALF;  // and not NaN
        largest = fmaxf(largest, x);
    }
    for (int bit = 1; bit < lanes; bit *= 2) largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, bit));
    finite = __all_sync(whole_warp, finite);
    const float steps = largest > 0 ? 127 / largest : 0;
    for (std::int64_t c = threadIdx.x; c < d; c += lanes)
        codes[set * d + c] = finite ? static_cast<std::int8_t>(rintf(rows[set * d + c] * steps)) : 0;
    if (threadIdx.x == 0) scales[set] = finite ? largest / 127 : static_cast<float>(NAN);
}

// The blocks that hold a token

constexpr unsigned set_threads = 256;  // of a block, which has a set

/// marks (sets, R * buckets), 0 before: 1 where a token is.
__global__ void __launch_bounds__(set_threads)
    mark_kernel(const std::int32_t* ids, const std::int64_t* offsets, std::int64_t repetitions, std::int64_t buckets,
                unsigned char* marks) {
    const std::int64_t begin = offsets[blockIdx.x] * repetitions, end = offsets[blockIdx.x + 1] * repetitions;
    unsigned char* to = marks + blockIdx.x * repetitions * buckets;
    for (std::int64_t i = begin + threadIdx.x; i < end; i += set_threads) {
        const std::int64_t bucket = ids[i];
        if (bucket >= 0 && bucket < buckets) to[i % repetitions * buckets + bucket] = 1;
    }
}

/// Calls f(first, before, here, count) for `set_threads` entries of n marks, from `first` on, at a time: before, how
/// many marks come before that of this thread; here, whether it is one; count, how many these entries have. All threads
/// of the block.
template <class F>
__device__ void for_marks(const unsigned char* marks, std::int64_t n, F f) {
    __shared__ unsigned counts[set_threads / lanes];
    const unsigned lane = threadIdx.x % lanes, warp = threadIdx.x / lanes;
    for (std::int64_t first = 0; first < n; first += set_threads) {
        const bool here = first + threadIdx.x < n && marks[first + threadIdx.x] != 0;
        const unsigned mask = __ballot_sync(whole_warp, here);
        if (lane == 0) counts[warp] = static_cast<unsigned>(__popc(mask));
        __syncthreads();
        unsigned before = static_cast<unsigned>(__popc(mask & ((1u << lane) - 1))), count = 0;
        for (unsigned w = 0; w < set_threads / lanes; ++w) {
            before += w < warp ? counts[w] : 0;
            count += counts[w];
        }
        f(first, before, here, count);
        __syncthreads();
    }
}

__global__ void __launch_bounds__(set_threads)
    count_kernel(const unsigned char* marks, std::int64_t n, std::int64_t* counts) {
    std::int64_t sum = 0;
    for_marks(marks + blockIdx.x * n, n, [&](std::int64_t, unsigned, bool, unsigned count) { sum += count; });
    if (threadIdx.x == 0) counts[blockIdx.x] = sum;
}

/// Copies the marked ones of n blocks to rows bounds[set] ... bounds[set + 1] of values.
__global__ void __launch_bounds__(set_threads)
    gather_kernel(const unsigned char* marks, std::int64_t n, const float* blocks, std::int64_t width,
                  const std::int64_t* bounds, float* values, std::int32_t* ids) {
    __shared__ int marked[set_threads];
    const std::int64_t set = blockIdx.x, end = bounds[set + 1];
    std::int64_t row = bounds[set];
    for_marks(marks + set * n, n, [&](std::int64_t first, unsigned before, bool here, unsigned count) {
        if (here) marked[before] = static_cast<int>(threadIdx.x);
        __syncthreads();
        if (static_cast<std::int64_t>(count) > end - row) count = static_cast<unsigned>(end - row);
        if (threadIdx.x < count) ids[row + threadIdx.x] = static_cast<std::int32_t>(first + marked[threadIdx.x]);
        for (std::int64_t i = threadIdx.x; i < count * width; i += set_threads)
            values[row * width + i] = blocks[(set * n + first + marked[i / width]) * width + i % width];
        row += count;
    });
}

// Balls of tokens

/// A ball after the other: its first token takes those left whose product with it is at least the threshold. A product
/// is the sum of eight, in float64 and in the order of cpp/src/fde.cpp: balls are those of a CPU.
__global__ void __launch_bounds__(set_threads)
    carve_kernel(const float* tokens, const std::int64_t* offsets, std::int64_t d, double threshold, std::int32_t* ids,
                 std::int64_t* counts) {
    constexpr std::int32_t left = -1;
    constexpr unsigned sums = 8, tokens_of_warp = lanes / sums;
    const std::int64_t begin = offsets[blockIdx.x], n = offsets[blockIdx.x + 1] - begin;
    const unsigned lane = threadIdx.x % lanes, warp = threadIdx.x / lanes;
    tokens += begin * d, ids += begin;
    for (std::int64_t t = threadIdx.x; t < n; t += set_threads) ids[t] = left;
    __syncthreads();
    std::int32_t balls = 0;
    for (std::int64_t centre = 0; centre < n; ++centre) {
        if (ids[centre] != left) continue;  // in all threads
        __syncthreads();                    // all have read it
        if (threadIdx.x == 0) ids[centre] = balls;
        for (std::int64_t base = centre + 1 + warp * tokens_of_warp; base < n; base += set_threads / sums) {
            const std::int64_t t = base + lane / sums;
            const bool taking_part = t < n && ids[t] == left;
            if (!__any_sync(whole_warp, taking_part)) continue;
            double part = 0, product = 0;
            for (std::int64_t c = lane % sums; taking_part && c < d; c += sums)
                part += static_cast<double>(tokens[centre * d + c]) * tokens[t * d + c];
            for (unsigned k = 0; k < sums; ++k)
                product += __shfl_sync(whole_warp, part, static_cast<int>(lane / sums * sums + k));
            if (taking_part && lane % sums == 0 && product >= threshold) ids[t] = balls;
        }
        ++balls;
        __syncthreads();
    }
    if (threadIdx.x == 0) counts[blockIdx.x] = balls;
}

/// A warp a ball: sums in the order of tokens, in float64.
__global__ void __launch_bounds__(set_threads)
    sum_balls_kernel(const float* tokens, const std::int64_t* offsets, std::int64_t d, const std::int32_t* ids,
                     const std::int64_t* bounds, float* out) {
    constexpr int at_once = 4;  // columns of a lane
    const std::int64_t begin = offsets[blockIdx.x], n = offsets[blockIdx.x + 1] - begin;
    const std::int64_t row = bounds[blockIdx.x], balls = bounds[blockIdx.x + 1] - row;
    const unsigned lane = threadIdx.x % lanes, warp = threadIdx.x / lanes;
    tokens += begin * d, ids += begin, out += row * d;
    for (std::int64_t ball = warp; ball < balls; ball += set_threads / lanes) {
        for (std::int64_t first = 0; first < d; first += lanes * at_once) {
            double sums[at_once] = {};
            for (std::int64_t base = 0; base < n; base += lanes) {
                unsigned members = __ballot_sync(whole_warp, base + lane < n && ids[base + lane] == ball);
                for (; members; members &= members - 1) {
                    const float* token = tokens + (base + __ffs(static_cast<int>(members)) - 1) * d;
                    for (int k = 0; k < at_once; ++k) {
                        const std::int64_t c = first + k * lanes + lane;
                        if (c < d) sums[k] += token[c];
                    }
                }
            }
            for (int k = 0; k < at_once; ++k) {
                const std::int64_t c = first + k * lanes + lane;
                if (c < d) out[ball * d + c] = static_cast<float>(sums[k]);
            }
        }
    }
}

// The host's part

/// An encoder's matrices on a device.
struct Matrices {
    DeviceArray<uint4> planes_memory, projections_memory, exact_projections_memory;
    DeviceArray<float> slack, rows, signs;
    DeviceArray<std::uint32_t> bucket_of, words, sources, entries;
    DeviceArray<std::int64_t> begins;
    Planes planes;
    Fragments projections;
    Sketch sketch;
};

template <class T>
std::vector<T> vector_of(const Aligned<T>& x, std::int64_t n) {
    return std::vector<T>(x.get(), x.get() + n);
}

Matrices place(const char* op, const FdeMatrices& m, Cuda cuda) {
    DroppedMemory::free(op);
    const auto on_device = [&](const auto& x) { return DeviceArray(op, cuda, x); };
    Matrices to;
    Planes& planes = to.planes;
    planes.d = m.d, planes.bits = static_cast<int>(m.bits), planes.repetitions = static_cast<int>(m.repetitions);
    const std::int64_t fit = Planes::max_columns / std::max<std::int64_t>(1, m.bits);
    planes.panels = static_cast<int>((m.repetitions + fit - 1) / fit);
    planes.per_panel = (planes.repetitions + planes.panels - 1) / planes.panels;
    const std::int64_t columns = planes.per_panel * m.bits, total = m.repetitions * m.bits;
    planes.tiles = tiles_of(columns), planes.chunks = tiles_of(m.d);

    std::vector<uint4> fragments, exact;
    // A product with a plane is off by less than `error` times both norms: its factors are off by 2^-16, as is what
    // leaving out the product of their low parts costs; and each of 3 * d / 16 steps on tensor cores truncates 17 terms
    // to 2^-23 of the largest. Norms are off by less than a hundredth.
    const double error = 1.01 * (3 * 0x1p-16 + 3 * planes.chunks * 17 * 0x1p-23);
    std::vector<float> slack(static_cast<std::size_t>(planes.panels * 16 * planes.tiles)), rows;
    for (int p = 0; p < planes.panels; ++p) {
        const std::int64_t first = p * columns, count = std::min(columns, total - first);
        append_bf16_fragments(fragments, columns, m.d,
                              [&](std::int64_t c, std::int64_t i) { return c < count ? m.plane(first + c, i) : 0; });
        for (std::int64_t c = 0; c < count; ++c) {
            double size = 0;
            for (std::int64_t i = 0; i < m.d; ++i) size += std::pow(static_cast<double>(m.plane(first + c, i)), 2);
            slack[static_cast<std::size_t>(p * 16 * planes.tiles + c)] = static_cast<float>(error * std::sqrt(size));
        }
    }
    for (std::int64_t c = 0; c < total; ++c)
        for (std::int64_t i = 0; i < m.d; ++i) rows.push_back(m.plane(c, i));
    fragments.resize(fragments.size() + Bf16Fragment::size);  // that partition_kernel reads ahead
    to.planes_memory = on_device(fragments);
    to.slack = on_device(slack), to.rows = on_device(rows);
    to.bucket_of = on_device(vector_of(m.bucket_of, m.buckets()));
    to.words = on_device(vector_of(m.words, m.buckets())), to.sources = on_device(vector_of(m.sources, m.buckets()));
    planes.fragments = to.planes_memory.get(), planes.slack = to.slack.get(), planes.rows = to.rows.get();
    planes.bucket_of = to.bucket_of.get();

    to.projections = {nullptr, nullptr, 0, tiles_of(m.d)};
    if (m.projections) {
        fragments.clear();
        to.projections.tiles = tiles_of(m.width);
        for (std::int64_t r = 0; r < m.repetitions; ++r)
            append_fragments(fragments, m.width, m.d,
                             [&](std::int64_t c, std::int64_t i) { return m.projection(r, c, i); });
        to.projections_memory = on_device(fragments);
        exact = exact_fragments(fragments, to.projections.tiles);
        to.exact_projections_memory = on_device(exact);
        to.projections.at = to.projections_memory.get(), to.projections.exact = to.exact_projections_memory.get();
    }

    if (m.sketch_index) {
        const std::int64_t n = m.repetitions * m.buckets() * m.width;
        require(n <= std::numeric_limits<std::uint32_t>::max(), op,
                "the encoding before the final sketch must have fewer than 2^32 columns on a GPU, got ", n);
        std::vector<std::int64_t> begins(static_cast<std::size_t>(m.output_dim + 1));
        for (std::int64_t i = 0; i < n; ++i) ++begins[static_cast<std::size_t>(m.sketch_index[i] + 1)];
        for (std::size_t c = 1; c < begins.size(); ++c) begins[c] += begins[c - 1];
        std::vector<std::int64_t> at = begins;
        std::vector<std::uint32_t> entries(static_cast<std::size_t>(n));
        std::vector<float> signs(static_cast<std::size_t>(n));
        for (std::int64_t i = 0; i < n; ++i) {
            const auto to_entry = static_cast<std::size_t>(at[static_cast<std::size_t>(m.sketch_index[i])]++);
            entries[to_entry] = static_cast<std::uint32_t>(i);
            signs[to_entry] = m.sketch_sign[i];
        }
        to.begins = on_device(begins), to.entries = on_device(entries), to.signs = on_device(signs);
        to.sketch = {to.begins.get(), to.entries.get(), to.signs.get()};
    }
    const DeviceGuard guard(op, cuda.device);
    check(op, cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(cuda.stream)));  // the vectors end here
    return to;
}

const Matrices& on_device(const char* op, const FdeMatrices& matrices, Cuda cuda) {
    return matrices.copies->of<Matrices>(cuda.device, [&] { return place(op, matrices, cuda); });
}

bool is_aligned(const float* tokens, std::int64_t d) {
    return d % 4 == 0 && reinterpret_cast<std::uintptr_t>(tokens) % sizeof(float4) == 0;
}

void partition(const char* op, Cuda cuda, const Matrices& matrices, const float* tokens, std::int64_t n,
               std::int32_t* out, std::int64_t token_stride, std::int64_t repetition_stride) {
    if (n == 0) return;
    constexpr unsigned threads = 128;  // 32 tokens a warp
    const dim3 grid(static_cast<unsigned>((n + threads - 1) / threads * matrices.planes.panels));
    launch(op, cuda, grid, dim3(threads), 0,
           is_aligned(tokens, matrices.planes.d) ? partition_kernel<true> : partition_kernel<false>, tokens, n,
           matrices.planes, out, token_stride, repetition_stride);
}

/// How many tokens a block of encode_kernel holds in shared memory.
struct Share {
    int rows = 0;
    std::size_t bytes = 0;

    /// At most `most` tokens in at most `limit` bytes.
    Share(const Encode& e, std::int64_t limit, std::int64_t most) {
        constexpr std::int64_t most_for_buckets = 48 << 10;
        const std::int64_t a_bucket = sizeof *e.keys + sizeof *e.ends, buckets = e.all_buckets() * a_bucket;
        const std::int64_t a_row = e.stride() * 4 + e.repetitions * static_cast<std::int64_t>(sizeof(Encode::Staged));
        if (buckets > most_for_buckets || limit < buckets + a_row) return;
        rows = static_cast<int>(std::min({(limit - buckets) / a_row, most, e.total}));
        bytes = static_cast<std::size_t>(rows * a_row + buckets);
    }
};

/// Encodes e.sets sets: those of common size first, two blocks or more a multiprocessor; then the longer ones.
struct Launches {
    const char* op;
    Cuda cuda;
    Share two, one;
    bool all_in_two;

    Launches(const char* op_, Cuda cuda_, const Encode& e, std::int64_t sets, std::int64_t limit)
        : op(op_), cuda(cuda_), two(e, limit / 2 - 512, 2 * (e.total / sets + 1)), one(e, limit, e.total) {
        if (two.rows < e.total / sets) two.rows = 0;  // most would not fit
        all_in_two = two.rows > 0 && e.total <= two.rows;
    }

    void operator()(Encode e, std::int64_t most_blocks) const {
        const auto start = [&](const Share& share, int warps, std::int64_t blocks) {
            const int rounds = (e.repetitions + warps - 1) / warps;
            const auto threads = static_cast<unsigned>((e.repetitions + rounds - 1) / rounds * lanes);
            e.rows = share.rows;
            launch(op, cuda, dim3(static_cast<unsigned>(std::min(e.sets, blocks))), dim3(threads), share.bytes,
                   encode_kernel, e);
            e.done = share.rows;
        };
        std::uint32_t* const order = std::exchange(e.order, nullptr);
        e.done = -1;  // those without tokens are encoded, too
        if (two.rows > 0) start(two, Encode::most_warps / 2, 1 << 20);
        e.order = order;  // null, where all that are left fit
        if (!all_in_two) start(one, Encode::most_warps, most_blocks);
    }
};

/// Which of the blocks of `count` sets hold a token.
class Marks {
public:
    Marks(const char* op, Cuda cuda, const FdeMatrices& m, const TokenSets& sets, const Array& ids, std::int64_t first,
          std::int64_t count)
        : op_(op), cuda_(cuda), count_(count), marks_(op, cuda, count * m.repetitions * m.buckets()) {
        fill_with_zeros(op, cuda, marks_.get(), count * m.repetitions * m.buckets());
        launch(mark_kernel, ids.as<const std::int32_t>(), sets.offsets.as<const std::int64_t>() + first, m.repetitions,
               m.buckets(), marks_.get());
    }

    /// A block a set.
    template <class... Params, class... Args>
    void launch(void (*kernel)(Params...), const Args&... args) const {
        polyvec::launch(op_, cuda_, dim3(static_cast<unsigned>(count_)), dim3(set_threads), 0, kernel, args...);
    }

    const unsigned char* get() const { return marks_.get(); }

private:
    const char* op_;
    Cuda cuda_;
    std::int64_t count_;
    Scratch<unsigned char> marks_;
};

/// What blocks are: means rather than sums, and what fills empty buckets, as FdeEncode says.
struct Rules {
    bool mean, fill, lowest_bucket;
};

/// Encodes sets, some at a time: their long encodings, to `out` in float32 or float16 (half), or else to memory that
/// after(first, count, blocks) is given. ids: of all tokens, (R, T).
template <class F>
void encode_sets(const char* op, Cuda cuda, const FdeMatrices& m, const Matrices& matrices, const TokenSets& sets,
                 const std::int32_t* ids, Rules rules, void* out, bool half, F after) {
    constexpr std::int64_t scratch = std::int64_t(1) << 26;  // floats: 256 MB
    const std::int64_t n = sets.size(), total = sets.tokens.dim(0), R = m.repetitions;
    Encode e{};
    e.tokens = sets.tokens.as<const float>(), e.total = total, e.d = m.d, e.aligned = is_aligned(e.tokens, m.d);
    e.ids = ids, e.repetitions = static_cast<int>(R), e.buckets = static_cast<int>(m.buckets()), e.width = m.width;
    e.projections = matrices.projections, e.words = matrices.words.get(), e.sources = matrices.sources.get();
    e.mean = rules.mean, e.fill = rules.fill, e.lowest_bucket = rules.lowest_bucket, e.half = half;

    const std::int64_t long_dim = e.all_buckets() * m.width;
    const std::int64_t step = out ? n : std::clamp<std::int64_t>(scratch / long_dim, 1, n);
    const Scratch<float> blocks(op, cuda, out ? 0 : step * long_dim);
    const std::int64_t limit = attribute_of(op, cuda, cudaDevAttrMaxSharedMemoryPerBlockOptin),
                       multiprocessors = attribute_of(op, cuda, cudaDevAttrMultiProcessorCount);
    const Launches encode(op, cuda, e, n, limit);
    const std::int64_t most_blocks = std::clamp<std::int64_t>(scratch / (3 * e.all_buckets()), 1, 4 * multiprocessors);
    const bool spills = !encode.all_in_two && total > encode.one.rows;
    const std::int64_t slots = spills ? std::min(step, most_blocks) * e.all_buckets() : 0;
    const Scratch<std::uint32_t> order(op, cuda, spills ? R * total : 0), ends(op, cuda, slots);
    const Scratch<std::uint64_t> keys(op, cuda, slots);
    e.order = order.get(), e.ends = ends.get(), e.keys = keys.get();

    for (std::int64_t first = 0; first < n; first += step) {
        e.sets = std::min(step, n - first);
        e.offsets = sets.offsets.as<const std::int64_t>() + first;
        e.out = out ? out : blocks.get();
        encode(e, most_blocks);
        if (!out) after(first, e.sets, blocks.get());
    }
}

}  // namespace

void run(const FdePartition& op, Cuda cuda) {
    const Matrices& matrices = on_device(op.op, op.matrices, cuda);
    partition(op.op, cuda, matrices, op.tokens.as<const float>(), op.tokens.dim(0), op.out.as<std::int32_t>(),
              op.matrices.repetitions, 1);
}

void run(const FdeEncode& op, Cuda cuda) {
    const FdeMatrices& m = op.matrices;
    const std::int64_t n = op.sets.size(), total = op.sets.tokens.dim(0), d = m.output_dim;
    if (n == 0) return;
    const Matrices& matrices = on_device(op.op, m, cuda);
    const Scratch<std::int32_t> ids(op.op, cuda, m.repetitions * total);
    partition(op.op, cuda, matrices, op.sets.tokens.as<const float>(), total, ids.get(), 1, total);

    const bool half = op.out.dtype == DType::f16, codes = op.out.dtype == DType::i8;
    const bool sketched = static_cast<bool>(m.sketch_index), direct = !sketched && !codes;
    const std::int64_t long_dim = m.repetitions * m.buckets() * m.width;
    const auto finish = [&](std::int64_t first, std::int64_t sets, const float* blocks) {
        const Scratch<float> rows(op.op, cuda, sketched && codes ? sets * d : 0);
        if (sketched) {
            void* out = codes  ? rows.get()
                        : half ? static_cast<void*>(op.out.as<std::uint16_t>() + first * d)
                               : op.out.as<float>() + first * d;
            launch_rows(op.op, cuda, sets, d, sketch_kernel, blocks, long_dim, matrices.sketch, out, half, sets, d);
        }
        if (codes)
            launch(op.op, cuda, dim3(static_cast<unsigned>((sets + 7) / 8)), dim3(lanes, 8), 0, round_kernel,
                   sketched ? rows.get() : blocks, op.out.as<std::int8_t>() + first * d, op.scales.as<float>() + first,
                   sets, d);
    };
    encode_sets(op.op, cuda, m, matrices, op.sets, ids.get(), {op.mean, op.fill, op.lowest_bucket},
                direct ? op.out.data : nullptr, half && direct, finish);
}

void run(const FdeCountBlocks& op, Cuda cuda) {
    constexpr std::int64_t most = std::int64_t(1) << 26;  // marks
    const std::int64_t n = op.sets.size(), all = op.matrices.repetitions * op.matrices.buckets(),
                       step = std::clamp<std::int64_t>(most / all, 1, std::max<std::int64_t>(n, 1));
    for (std::int64_t first = 0; first < n; first += step) {
        const Marks marks(op.op, cuda, op.matrices, op.sets, op.ids, first, std::min(step, n - first));
        marks.launch(count_kernel, marks.get(), all, op.counts.as<std::int64_t>() + first);
    }
}

void run(const FdeEncodeBlocks& op, Cuda cuda) {
    const FdeMatrices& m = op.matrices;
    const std::int64_t total = op.sets.tokens.dim(0), all = m.repetitions * m.buckets();
    if (op.sets.size() == 0) return;
    const Matrices& matrices = on_device(op.op, m, cuda);
    const Scratch<std::int32_t> ids(op.op, cuda, m.repetitions * total);  // as op.ids, the other way round
    partition(op.op, cuda, matrices, op.sets.tokens.as<const float>(), total, ids.get(), 1, total);
    const auto gather = [&](std::int64_t first, std::int64_t sets, const float* blocks) {
        const Marks marks(op.op, cuda, m, op.sets, op.ids, first, sets);
        marks.launch(gather_kernel, marks.get(), all, blocks, m.width, op.bounds.as<const std::int64_t>() + first,
                     op.values.as<float>(), op.blocks.as<std::int32_t>());
    };
    encode_sets(op.op, cuda, m, matrices, op.sets, ids.get(), {false, false, false}, nullptr, false, gather);
}

void run(const FdeCarve& op, Cuda cuda) {
    if (op.sets.size() == 0) return;
    launch(op.op, cuda, dim3(static_cast<unsigned>(op.sets.size())), dim3(set_threads), 0, carve_kernel,
           op.sets.tokens.as<const float>(), op.sets.offsets.as<const std::int64_t>(), op.sets.dim(), op.threshold,
           op.ids.as<std::int32_t>(), op.counts.as<std::int64_t>());
}

void run(const FdeSumBalls& op, Cuda cuda) {
    if (op.sets.size() == 0) return;
    launch(op.op, cuda, dim3(static_cast<unsigned>(op.sets.size())), dim3(set_threads), 0, sum_balls_kernel,
           op.sets.tokens.as<const float>(), op.sets.offsets.as<const std::int64_t>(), op.sets.dim(),
           op.ids.as<const std::int32_t>(), op.bounds.as<const std::int64_t>(), op.out.as<float>());
}

}  // namespace polyvec
