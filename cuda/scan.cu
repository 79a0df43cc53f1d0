// The scan engine on a GPU: tiles of queries and items on tensor cores, whose scores an action takes from registers.
// What is chosen by them is scored once more, directly and in float32: a distance is a sum of squares there. A score of
// a tile has the same bits wherever a pair is met. Sums that an action keeps are put together in a fixed order.
#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "elements.cuh"
#include "launch.cuh"
#include "polyvec/scan.hpp"
#include "select.cuh"
#include "tile.cuh"
#include "warp.cuh"

namespace polyvec {
namespace {

enum class Rounding { none, bfloat16, steps };

constexpr unsigned row_threads = 256;  // of a kernel that has a warp a row

/// The row of the calling thread's warp.
__device__ std::int64_t row_of_warp() {
    return (static_cast<std::int64_t>(blockIdx.x) * row_threads + threadIdx.x) / 32;
}

template <class... Params, class... Args>
void launch_warps(const char* op, Cuda cuda, std::int64_t rows, void (*kernel)(Params...), const Args&... args) {
    constexpr std::int64_t per_block = row_threads / 32;
    if (rows > 0)
        launch(op, cuda, dim3(static_cast<unsigned>((rows + per_block - 1) / per_block)), dim3(row_threads), 0, kernel,
               args...);
}

/// Queries as they meet items: of unit length for cosine, then rounded where items ask for it.
__global__ void prepare_kernel(const float* queries, std::int64_t stride, float* out, std::int64_t n, std::int64_t d,
                               bool unit, Rounding rounding) {
    const std::int64_t i = row_of_warp(), lane = threadIdx.x % 32;
    if (i >= n) return;
    const float* from = queries + i * stride;
    float* to = out + i * d;
    float square = 0, largest = 0;
    for (std::int64_t c = lane; c < d; c += 32) {
        square = fmaf(from[c], from[c], square);
        largest = fmaxf(largest, fabsf(from[c]));
    }
    square = sum_of_warp(square);
    const float scale = !unit ? 1 : square > 0 ? 1 / sqrt(square) : 0;
    largest = largest_of_warp(largest) * scale;
    const float step = largest / 127, steps = 127 / largest < HUGE_VALF ? 127 / largest : 0;
    for (std::int64_t c = lane; c < d; c += 32) {
        to[c] = from[c] * scale;
        if (rounding == Rounding::bfloat16) to[c] = rounded_to_bfloat16(to[c]);
        if (rounding == Rounding::steps) to[c] = rintf(to[c] * steps) * step;
    }
}

/// Queries and items, and the score of a pair, higher is better: the negative of a distance.
struct Pairs {
    const float* queries;
    std::int64_t stride;
    const void* rows;
    DType dtype;
    const float *scales, *bias;  // null when absent
    std::int64_t items, d;
    Metric metric;

    template <class T>
    __device__ const T* row(std::int64_t item) const {
        return static_cast<const T*>(rows) + item * d;
    }

    __device__ bool has(std::int64_t item) const { return item >= 0 && item < items; }

    /// The score, by the 32 threads of a warp.
    __device__ float by_warp(std::int64_t query, std::int64_t item) const {
        float sum = 0, square = 0;
        add(query, item, threadIdx.x % 32, 32, metric == Metric::l2, sum, square);
        return score(item, sum_of_warp(sum), sum_of_warp(square));
    }

    /// By one thread; for l2 with |q|^2 more, from inner products.
    __device__ float expanded(std::int64_t query, std::int64_t item) const {
        float sum = 0, square = 0;
        add(query, item, 0, 1, false, sum, square);
        return of_products(item, sum, square);
    }

    __device__ float of_products(std::int64_t item, float sum, float square) const {
        if (metric != Metric::l2) return score(item, sum, square);
        const float scale = scales ? scales[item] : 1;
        return fmaf(2 * scale, sum, fmaf(-scale * scale, square, bias ? bias[item] : 0));
    }

private:
    __device__ void add(std::int64_t query, std::int64_t item, std::int64_t first, std::int64_t step, bool distances,
                        float& sum, float& square) const {
        const float* q = queries + query * stride;
        const float scale = distances && scales ? scales[item] : 1;
        const auto add_row = [&](const auto* x) {
            for (std::int64_t c = first; c < d; c += step) {
                const float element = value_of(x[c]);
                if (distances) {
                    const float difference = fmaf(-scale, element, q[c]);
                    sum = fmaf(difference, difference, sum);
                } else {
                    sum = fmaf(q[c], element, sum);
                    square = fmaf(element, element, square);
                }
            }
        };
        if (dtype == DType::f32) {
            add_row(row<float>(item));
        } else if (dtype == DType::f16) {
            add_row(row<Float16>(item));
        } else if (dtype == DType::i8) {
            add_row(row<std::int8_t>(item));
        } else {
            add_row(row<BFloat16>(item));
        }
    }

    /// From the squared distance, or the product and the squared length.
    __device__ float score(std::int64_t item, float sum, float square) const {
        const float scale = scales ? scales[item] : 1, offset = bias ? bias[item] : 0;
        if (metric == Metric::l2) return offset - sum;
        if (metric == Metric::ip) return fmaf(sum, scale, offset);
        const float sign = static_cast<float>((scale > 0) - (scale < 0));  // all that a cosine leaves of a scale
        return fmaf(sum, square > 0 ? sign / sqrt(square) : 0, offset);
    }
};

/// A list of ids a query; offsets: null when absent.
struct Lists {
    const std::int64_t *offsets, *ids;

    __device__ bool contain(std::int64_t query, std::int64_t id) const {
        if (!offsets) return false;
        for (std::int64_t i = offsets[query]; i < offsets[query + 1]; ++i)
            if (ids[i] == id) return true;
        return false;
    }
};

/// Nothing equals a target whose score is NaN, and nothing was counted for one outside the items.
__global__ void rank_kernel(const unsigned long long* counts, double* ranks, std::int64_t queries,
                            ScanRank::Ties ties) {
    for_each_position(queries, 1, [&](std::int64_t query, std::int64_t) {
        using Ties = ScanRank::Ties;
        const double better = static_cast<double>(counts[2 * query]);
        const double equal = static_cast<double>(counts[2 * query + 1]);
        const double place = ties == Ties::optimistic ? 1 : ties == Ties::pessimistic ? equal : (1 + equal) / 2;
        ranks[query] = equal > 0 ? better + place : static_cast<double>(NAN);
    });
}

/// Sums of exponentials beside the largest exponent, so that nothing overflows.
struct ScaledSum {
    float top = -HUGE_VALF;
    double sum = 0;

    /// exp2(scale (x - top)).
    static __device__ float weight(float x, float top, float scale) { return x == top ? 1 : exp2f((x - top) * scale); }

    __device__ void add(float other_top, double other_sum, float scale) {
        if (other_sum == 0) return;
        if (sum == 0) top = other_top;  // where memory is zero, too
        const float larger = fmaxf(top, other_top);
        sum = sum * weight(top, larger, scale) + other_sum * weight(other_top, larger, scale);
        top = larger;
    }
};

/// queries: null, or those whose scores have |q|^2 more.
__global__ void logsumexp_kernel(const ScaledSum* sums, std::int64_t partials, const float* queries,
                                 std::int64_t stride, std::int64_t d, float* out, std::int64_t n, float scale,
                                 float exponent_scale) {
    for_each_position(n, 1, [&](std::int64_t i, std::int64_t) {
        ScaledSum total;
        float square = 0;
        for (std::int64_t p = 0; p < partials; ++p) total.add(sums[p * n + i].top, sums[p * n + i].sum, exponent_scale);
        for (std::int64_t c = 0; queries && c < d; ++c)
            square = fmaf(queries[i * stride + c], queries[i * stride + c], square);
        const double top = static_cast<double>(total.top) - square;
        out[i] = total.sum == 0 ? -HUGE_VALF : static_cast<float>(scale * top + log(total.sum));
    });
}

/// NaN where the target has no score.
__global__ void hinge_kernel(const double* sums, std::int64_t partials, const float* limits, float* out,
                             std::int64_t n) {
    for_each_position(n, 1, [&](std::int64_t i, std::int64_t) {
        double sum = isnan(limits[i]) ? NAN : 0;
        for (std::int64_t p = 0; p < partials; ++p) sum += sums[p * n + i];
        out[i] = static_cast<float>(sum);
    });
}

/// Elements of a row of parts: whole chunks of 16 bytes, and at least one.
__host__ __device__ constexpr std::int64_t padded_width(std::int64_t d) {
    return d > 0 ? (d + 7) / 8 * 8 : 8;
}

/// How rows of T meet: the parts of a query and of an item, and the 16-bit float that they are.
template <class T>
struct Parted {  // float16 and int8: items as they are, and queries of two parts
    static constexpr Words words = Words::f16;
    static constexpr int query = 2, item = 1;
};
template <>
struct Parted<float> {
    static constexpr Words words = Words::f16;
    static constexpr int query = 2, item = 2;
};
template <>
struct Parted<BFloat16> {
    static constexpr Words words = Words::bf16;
    static constexpr int query = 1, item = 1;
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T at[4];
};

/// Entries c ... c + 3 of a row, zeros from d on.
template <class T>
__device__ float4 four_of(const T* row, std::int64_t c, std::int64_t d) {
    if (c + 4 <= d && reinterpret_cast<std::uintptr_t>(row + c) % sizeof(Four<T>) == 0) {
        const auto x = *reinterpret_cast<const Four<T>*>(row + c);
        return {value_of(x.at[0]), value_of(x.at[1]), value_of(x.at[2]), value_of(x.at[3])};
    }
    const auto at = [&](std::int64_t i) { return i < d ? value_of(row[i]) : 0.0f; };
    return {at(c), at(c + 1), at(c + 2), at(c + 3)};
}

__device__ float largest_of(const float4& x) {
    return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
}

__device__ float dot(const float4& x, const float4& y, float sum) {
    return fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sum))));
}

/// Writes a row of d values as 16-bit floats, and zeros up to a multiple of 8; returns the factor that they lack. Two
/// parts are multiplied by a power of two so that the largest has 2^14 to 2^15, which leaves 39 bits below it. A row
/// that has no such power gives zeros and the factor NaN. A warp a row.
template <Words words, int Count, class T>
__device__ float write_parts(const T* row, float largest, std::int64_t d, std::uint16_t* to, std::int64_t plane,
                             int lane) {
    float scale = 1, factor = 1;
    if constexpr (Count == 2) {
        constexpr float most = 0x1p60f, least = 0x1p-60f;
        const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
        if (largest >= least && largest <= most) {
            scale = __uint_as_float(static_cast<unsigned>(127 + 14 - exponent) << 23);
            factor = __uint_as_float(static_cast<unsigned>(127 - 14 + exponent) << 23);
        } else if (largest != 0) {
            scale = 0;
            factor = NAN;
        }
    }
    for (std::int64_t c = 4 * lane; c < padded_width(d); c += 128) {
        const float4 x = scale != 0 ? four_of(row, c, d) : float4{0, 0, 0, 0};
        const float values[4] = {x.x * scale, x.y * scale, x.z * scale, x.w * scale};
        Four<std::uint16_t> high, low;
        for (int i = 0; i < 4; ++i) {
            if constexpr (words == Words::bf16) {
                high.at[i] = static_cast<std::uint16_t>(__float_as_uint(values[i]) >> 16);
            } else {
                const Float16 half = rounded_to_float16(values[i]);
                high.at[i] = half.bits;
                low.at[i] = rounded_to_float16(values[i] - value_of(half)).bits;
            }
        }
        *reinterpret_cast<Four<std::uint16_t>*>(to + c) = high;
        if constexpr (Count == 2) *reinterpret_cast<Four<std::uint16_t>*>(to + plane + c) = low;
    }
    return factor;
}

template <Words words, int Count>
__global__ void __launch_bounds__(row_threads)
    prepare_rows_kernel(const float* queries, std::int64_t stride, std::int64_t n, std::int64_t d,
                        std::uint16_t* values, std::int64_t plane, float* factors) {
    const std::int64_t i = row_of_warp();
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (i >= n) return;
    const float* from = queries + i * stride;
    float largest = 0;
    for (std::int64_t c = 4 * lane; c < d; c += 128) largest = fmaxf(largest, largest_of(four_of(from, c, d)));
    const float factor =
        write_parts<words, Count>(from, largest_of_warp(largest), d, values + i * padded_width(d), plane, lane);
    if (lane == 0) factors[i] = factor;
}

/// Items from position `first` of an order on, or those that `ids` name: their affine maps, and their parts unless
/// `values` is null. For l2 the score of a tile is that of a pair and |q|^2 more.
template <class T>
__global__ void __launch_bounds__(row_threads)
    prepare_columns_kernel(const __grid_constant__ Pairs score, const __grid_constant__ TileOrder order,
                           std::int64_t first, std::int64_t n, const std::int64_t* ids, std::int64_t ids_n,
                           std::uint16_t* values, std::int64_t plane, Affine* affine) {
    using P = Parted<T>;
    const std::int64_t j = row_of_warp(), d = score.d;
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (j >= n) return;
    const std::int64_t item = !ids        ? order.first_column(first + j / tile_columns) + j % tile_columns
                              : j < ids_n ? ids[j]
                                          : -1;
    const bool inside = score.has(item);
    if (!inside) {
        for (std::int64_t c = lane; values && c < padded_width(d); c += 32)
            for (int p = 0; p < P::item; ++p) values[p * plane + j * (padded_width(d)) + c] = 0;
        if (lane == 0) affine[j] = {0, ids ? NAN : -HUGE_VALF};
        return;
    }
    const T* from = score.row<T>(item);
    const float scale = score.scales ? score.scales[item] : 1, bias = score.bias ? score.bias[item] : 0;
    float largest = 0, square = 0, factor = 1;
    if (score.metric != Metric::ip || (values && P::item == 2)) {
#pragma unroll 2
        for (std::int64_t c = 4 * lane; c < d; c += 128) {
            const float4 x = four_of(from, c, d);
            largest = fmaxf(largest, largest_of(x));
            square = dot(x, x, square);
        }
        largest = largest_of_warp(largest);
        square = sum_of_warp(square);
    }
    if (values) factor = write_parts<P::words, P::item>(from, largest, d, values + j * padded_width(d), plane, lane);
    if (lane != 0) return;
    if (score.metric == Metric::ip) {
        affine[j] = {factor * scale, bias};
    } else if (score.metric == Metric::l2) {
        affine[j] = {2 * factor * scale, fmaf(-scale * scale, square, bias)};
    } else {
        const float sign = static_cast<float>((scale > 0) - (scale < 0));
        affine[j] = {square > 0 ? factor * sign / sqrt(square) : 0 * factor, bias};
    }
}

/// What a query passes over: the ids of its list, but not its target where `keep`, and the target where `drop`.
struct Passed {
    Lists lists;
    const std::int64_t* targets = nullptr;
    bool keep = false, drop = false;

    __device__ bool any() const { return lists.offsets || drop; }

    Passed from(std::int64_t query) const {
        Passed passed = *this;
        if (lists.offsets) passed.lists.offsets += query;
        if (targets) passed.targets += query;
        return passed;
    }
};

/// Turns the products of a tile into scores for an action, which keeps what it makes of them. What an item that takes
/// no part scores, is NaN.
template <class Action>
struct Epilogue {
    Pairs score;
    const float* factors;
    std::int64_t queries;
    const std::int64_t* ids;  // null, or the items of the columns, as many as queries
    Passed passed;
    Action action;

    struct Thread {
        const Epilogue& all;
        TilePlace place;
        std::int64_t first_row;
        unsigned* mask;  // of a tile: a bit an item that a query passes over
        float factor[8];
        typename Action::Thread state;

        __device__ Thread(const Epilogue& epilogue, std::int64_t first, unsigned char* shared)
            : all(epilogue), first_row(first), mask(reinterpret_cast<unsigned*>(shared)) {
#pragma unroll
            for (int slot = 0; slot < 8; ++slot) {
                const std::int64_t query = first_row + place.row(slot);
                factor[slot] = query < all.queries ? all.factors[query] : 0;
                state.begin(all.action, slot, query, query < all.queries);
            }
        }

        __device__ void take(TileProducts& scores, const Affine* affine, std::int64_t first_item) {
            float largest[8];
#pragma unroll
            for (int slot = 0; slot < 8; ++slot) largest[slot] = -HUGE_VALF;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
#pragma unroll
                for (int slot = 0; slot < 8; ++slot) {
                    const Affine item = affine[place.column(slot, j)];
                    float& score = scores(slot, j);
                    score = fmaf(score * item.x, factor[slot], item.y);
                    largest[slot] = larger_or_nan(largest[slot], score);
                }
            }
            if (all.passed.any()) mark(first_item);
#pragma unroll
            for (int slot = 0; slot < 8; ++slot) {
                const std::int64_t query = first_row + place.row(slot);
                if (isnan(largest[slot])) largest[slot] = settle(scores, slot, query, first_item);
                if (all.passed.any()) largest[slot] = pass_over(scores, slot);
                state.take(all.action, scores, slot, largest[slot], place, query, first_item);
            }
        }

        __device__ void finish() {
#pragma unroll
            for (int slot = 0; slot < 8; ++slot) {
                const std::int64_t query = first_row + place.row(slot);
                state.finish(all.action, slot, place, query, query < all.queries);
            }
        }

    private:
        /// Computes the scores that are NaN directly: the parts of an item may be, where its score is not.
        __device__ float settle(TileProducts& scores, int slot, std::int64_t query, std::int64_t first_item) {
            unsigned lost = 0;
            float largest = -HUGE_VALF;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                if (isnan(scores(slot, j))) lost |= 1u << j;
                largest = fmaxf(largest, scores(slot, j));
            }
            for (; lost != 0; lost &= lost - 1) {
                const int lowest = __ffs(static_cast<int>(lost)) - 1;
                std::int64_t item = first_item + place.column(slot, lowest);
                if (all.ids) item = item < all.queries ? all.ids[item] : -1;
                if (query >= all.queries || !all.score.has(item)) continue;
                const float score = all.score.expanded(query, item);
                largest = fmaxf(largest, score);
#pragma unroll
                for (int j = 0; j < 16; ++j)
                    if (j == lowest) scores(slot, j) = score;
            }
            return largest;
        }

        /// All threads of the block.
        __device__ void mark(std::int64_t first_item) {
            constexpr int words = tile_columns / 32, rows = tile_rows / (tile_threads / 32);
            __syncthreads();  // the tile before is done
            for (int i = static_cast<int>(threadIdx.x); i < tile_rows * words; i += tile_threads) mask[i] = 0;
            __syncthreads();
            for (int i = 0; i < rows; ++i) {
                const int row = place.warp * rows + i;
                const std::int64_t query = first_row + row;
                if (query >= all.queries) break;
                const std::int64_t target = all.passed.targets ? all.passed.targets[query] : -1;
                const auto set = [&](std::int64_t id) {
                    const std::int64_t column = id - first_item;
                    if (column >= 0 && column < tile_columns)
                        atomicOr(&mask[row * words + column / 32], 1u << column % 32);
                };
                if (all.passed.drop && place.lane == 0) set(target);
                if (!all.passed.lists.offsets) continue;
                const std::int64_t end = all.passed.lists.offsets[query + 1];
                for (std::int64_t k = all.passed.lists.offsets[query] + place.lane; k < end; k += 32)
                    if (!all.passed.keep || all.passed.lists.ids[k] != target) set(all.passed.lists.ids[k]);
            }
            __syncthreads();
        }

        __device__ float pass_over(TileProducts& scores, int slot) {
            float largest = -HUGE_VALF;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const int column = place.column(slot, j);
                if (mask[place.row(slot) * (tile_columns / 32) + column / 32] >> column % 32 & 1) scores(slot, j) = NAN;
                largest = fmaxf(largest, scores(slot, j));
            }
            return largest;
        }
    };

    __device__ Thread thread(std::int64_t first_row, unsigned char* shared) const {
        return Thread(*this, first_row, shared);
    }
};

/// Lists the scores that may be among the k best.
struct ListBest {
    Candidates candidates;

    struct Thread {
        float limit[8];

        __device__ void begin(const ListBest& all, int slot, std::int64_t query, bool inside) {
            limit[slot] = inside ? score_of(all.candidates.limits[query]) : NAN;
        }

        __device__ void take(const ListBest& all, TileProducts& scores, int slot, float largest, const TilePlace& place,
                             std::int64_t query, std::int64_t first_item) {
            if (!(largest >= limit[slot]) || largest == -HUGE_VALF) return;
            unsigned found = 0;
#pragma unroll
            for (int j = 0; j < 16; ++j)
                if (scores(slot, j) >= limit[slot] && scores(slot, j) > -HUGE_VALF) found |= 1u << j;
            if (found == 0) return;
            const Candidates& candidates = all.candidates;
            const Key least = candidates.limits[query];
            std::int64_t at = atomicAdd(candidates.counts + query, static_cast<unsigned>(__popc(found)));
            for (; found != 0; found &= found - 1, ++at) {
                const int lowest = __ffs(static_cast<int>(found)) - 1;
                float score = 0;
#pragma unroll
                for (int j = 0; j < 16; ++j) score = j == lowest ? scores(slot, j) : score;
                const Key key = key_of(score, first_item + place.column(slot, lowest));
                if (at < candidates.capacity) candidates.keys[query * candidates.capacity + at] = key > least ? key : 0;
            }
        }

        __device__ void finish(const ListBest&, int, const TilePlace&, std::int64_t, bool) {}
    };
};

/// Keeps the best item of each query.
struct KeepBest {
    Key* best;  // 0 before

    struct Thread {
        float limit[8], score[8];  // limit: the best of four threads
        int id[8];

        __device__ void begin(const KeepBest&, int slot, std::int64_t, bool) {
            limit[slot] = score[slot] = -HUGE_VALF;
            id[slot] = 0;
        }

        __device__ void take(const KeepBest&, TileProducts& scores, int slot, float largest, const TilePlace& place,
                             std::int64_t, std::int64_t first_item) {
            if (!__any_sync(whole_warp, largest >= limit[slot] && largest > -HUGE_VALF)) return;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const int item = static_cast<int>(first_item) + place.column(slot, j);
                if (scores(slot, j) > score[slot] || (scores(slot, j) == score[slot] && item < id[slot])) {
                    score[slot] = scores(slot, j);
                    id[slot] = item;
                }
            }
            limit[slot] = fmaxf(score[slot], __shfl_xor_sync(whole_warp, score[slot], 1));
            limit[slot] = fmaxf(limit[slot], __shfl_xor_sync(whole_warp, limit[slot], 2));
        }

        __device__ void finish(const KeepBest& all, int slot, const TilePlace&, std::int64_t query, bool inside) {
            if (inside && score[slot] > -HUGE_VALF) atomicMax(all.best + query, key_of(score[slot], id[slot]));
        }
    };
};

/// counts (queries, 2), zero before: how many items are better than the target, and how many equal.
struct CountBetter {
    const float* limits;  // the scores of the targets
    unsigned long long* counts;

    struct Thread {
        float limit[8];
        unsigned better[8], equal[8];

        __device__ void begin(const CountBetter& all, int slot, std::int64_t query, bool inside) {
            limit[slot] = inside ? all.limits[query] : NAN;
            better[slot] = equal[slot] = 0;
        }

        __device__ void take(const CountBetter&, TileProducts& scores, int slot, float largest, const TilePlace&,
                             std::int64_t, std::int64_t) {
            if (!(largest >= limit[slot])) return;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                better[slot] += scores(slot, j) > limit[slot];
                equal[slot] += scores(slot, j) == limit[slot];
            }
        }

        __device__ void finish(const CountBetter& all, int slot, const TilePlace&, std::int64_t query, bool) {
            if (better[slot] != 0) atomicAdd(all.counts + 2 * query, static_cast<unsigned long long>(better[slot]));
            if (equal[slot] != 0) atomicAdd(all.counts + 2 * query + 1, static_cast<unsigned long long>(equal[slot]));
        }
    };
};

/// The score of each query and the column of its own number.
struct TakeDiagonal {
    float* scores;
    std::int64_t queries;

    struct Thread {
        __device__ void begin(const TakeDiagonal&, int, std::int64_t, bool) {}

        __device__ void take(const TakeDiagonal& all, TileProducts& scores, int slot, float, const TilePlace& place,
                             std::int64_t query, std::int64_t first_item) {
#pragma unroll
            for (int j = 0; j < 16; ++j)
                if (first_item + place.column(slot, j) == query && query < all.queries)
                    all.scores[query] = scores(slot, j);
        }

        __device__ void finish(const TakeDiagonal&, int, const TilePlace&, std::int64_t, bool) {}
    };
};

/// Where partial sums of queries lie: of the 4 parts of a tile's columns, for all that share the tiles of a row.
struct Partials {
    std::int64_t queries;

    __device__ std::int64_t at(std::int64_t query, int part) const { return (blockIdx.y * 4 + part) * queries + query; }
};

struct SumExponentials {
    ScaledSum* sums;
    Partials partials;
    float scale;  // of exponents of 2

    struct Thread {
        ScaledSum sum[8];

        __device__ void begin(const SumExponentials&, int, std::int64_t, bool) {}

        __device__ void take(const SumExponentials& all, TileProducts& scores, int slot, float largest,
                             const TilePlace&, std::int64_t, std::int64_t) {
            if (largest == -HUGE_VALF) return;
            const float top = fmaxf(sum[slot].top, largest);  // -inf before the first
            float sum_of_tile = 0;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const float weight = ScaledSum::weight(scores(slot, j), top, all.scale);
                sum_of_tile += scores(slot, j) > -HUGE_VALF ? weight : 0;
            }
            sum[slot].add(top, sum_of_tile, all.scale);
        }

        __device__ void finish(const SumExponentials& all, int slot, const TilePlace& place, std::int64_t query,
                               bool inside) {
            for (int other = 1; other <= 2; other *= 2)
                sum[slot].add(__shfl_xor_sync(whole_warp, sum[slot].top, other),
                              __shfl_xor_sync(whole_warp, sum[slot].sum, other), all.scale);
            if (!inside || place.lane % 4 != 0) return;
            ScaledSum& total = all.sums[all.partials.at(query, place.part(slot))];
            total.add(sum[slot].top, sum[slot].sum, all.scale);
        }
    };
};

struct SumHinges {
    const float* limits;  // the scores of the targets
    double* sums;
    Partials partials;
    float margin;

    struct Thread {
        float base[8];
        double sum[8];

        __device__ void begin(const SumHinges& all, int slot, std::int64_t query, bool inside) {
            base[slot] = inside ? all.margin - all.limits[query] : NAN;
            sum[slot] = 0;
        }

        __device__ void take(const SumHinges&, TileProducts& scores, int slot, float largest, const TilePlace&,
                             std::int64_t, std::int64_t) {
            if (!(largest + base[slot] > 0)) return;
            float sum_of_tile = 0;
#pragma unroll
            for (int j = 0; j < 16; ++j) sum_of_tile += fmaxf(scores(slot, j) + base[slot], 0.0f);  // 0 for NaN
            sum[slot] += sum_of_tile;
        }

        __device__ void finish(const SumHinges& all, int slot, const TilePlace& place, std::int64_t query,
                               bool inside) {
            for (int other = 1; other <= 2; other *= 2) sum[slot] += __shfl_xor_sync(whole_warp, sum[slot], other);
            if (inside && place.lane % 4 == 0) all.sums[all.partials.at(query, place.part(slot))] += sum[slot];
        }
    };
};

/// The stored blocks of block-sparse queries; offsets: null beside dense ones.
struct Blocks {
    const std::int32_t* ids;
    const std::int64_t* offsets;
    std::int64_t block;

    /// Calls f(j, column) for some of a query's stored entries, its block j and the column in the row.
    template <class F>
    __device__ void each(std::int64_t query, std::int64_t first, std::int64_t step, F f) const {
        const std::int64_t begin = offsets[query], n = (offsets[query + 1] - begin) * block;
        for (std::int64_t i = first; i < n; i += step) f(begin * block + i, ids[begin + i / block] * block + i % block);
    }
};

/// Rows (n, d) of zeros become block-sparse queries. A block of threads a query.
__global__ void __launch_bounds__(row_threads)
    fill_blocks_kernel(const float* values, const __grid_constant__ Blocks blocks, float* out, std::int64_t d) {
    float* to = out + blockIdx.x * d;
    blocks.each(blockIdx.x, threadIdx.x, row_threads, [&](std::int64_t from, std::int64_t column) {
        if (column >= 0 && column < d) to[column] = values[from];
    });
}

/// Chunks of a row of items, in order, that meet a stored block of one of the queries: list[0] of them, from list[1]
/// on. One block of threads.
__global__ void __launch_bounds__(row_threads)
    list_chunks_kernel(const __grid_constant__ Blocks blocks, std::int64_t first, std::int64_t queries, int width,
                       int chunks, int* list) {
    auto* met = reinterpret_cast<unsigned*>(dynamic_shared_memory);  // a bit a chunk
    const int thread = static_cast<int>(threadIdx.x), words = (chunks + 31) / 32;
    for (int i = thread; i < words; i += row_threads) met[i] = 0;
    __syncthreads();
    for (std::int64_t j = blocks.offsets[first] + thread; j < blocks.offsets[first + queries]; j += row_threads) {
        const std::int64_t begin = blocks.ids[j] * blocks.block, end = begin + blocks.block;
        for (std::int64_t chunk = begin / width; chunk * width < end; ++chunk)
            if (chunk >= 0 && chunk < chunks) atomicOr(&met[chunk / 32], 1u << chunk % 32);
    }
    __syncthreads();
    for (int word = thread; word < words; word += row_threads) {
        int before = 0;
        for (int i = 0; i < word; ++i) before += __popc(met[i]);
        if (word == words - 1) list[0] = before + __popc(met[word]);
        for (unsigned left = met[word]; left != 0; left &= left - 1)
            list[1 + before++] = 32 * word + __ffs(static_cast<int>(left)) - 1;
    }
}

/// Lists the scores of up to Q queries that may be among the k best, by reading items once: for few queries, which
/// leave tensor cores idle. 16 bytes of a row go to each of `lanes` threads at a time. d: a multiple of these. sparse:
/// of the chunks of `list` alone, which is not read otherwise.
template <class T, int Q, bool sparse>
__global__ void __launch_bounds__(row_threads)
    stream_kernel(const __grid_constant__ Pairs score, const __grid_constant__ TileOrder order, std::int64_t first,
                  std::int64_t end, const __grid_constant__ Lists exclude,
                  const __grid_constant__ Candidates candidates, int queries, int lanes, const int* list) {
    constexpr int width = 16 / sizeof(T), rows = Q == 1 ? 8 : 4, rows_of_warp = tile_columns / (row_threads / 32);
    const int lane = static_cast<int>(threadIdx.x % 32), part = lane % lanes,
              chunks = sparse ? list[0] : static_cast<int>(score.d) / width;
    const auto chunk_of = [&](int i) { return sparse ? list[1 + i] : i; };
    float4* const shared = reinterpret_cast<float4*>(dynamic_shared_memory);  // [query][four of a chunk][chunk]
    for (int i = static_cast<int>(threadIdx.x); i < Q * width / 4 * chunks; i += row_threads) {
        const int query = i / (width / 4 * chunks), four = i / chunks % (width / 4), chunk = chunk_of(i % chunks);
        const float* from = score.queries + query * score.stride + chunk * width + four * 4;
        shared[i] = query < queries ? float4{from[0], from[1], from[2], from[3]} : float4{0, 0, 0, 0};
    }
    float limit[Q];
    for (int q = 0; q < Q; ++q) limit[q] = q < queries ? score_of(candidates.limits[q]) : NAN;
    __syncthreads();
    const bool squares = score.metric != Metric::ip;
    for (std::int64_t position = first + blockIdx.x; position < end; position += gridDim.x) {
        const std::int64_t begin = order.first_column(position) + threadIdx.x / 32 * rows_of_warp;
        for (int r = lane / lanes * rows; r < rows_of_warp; r += 32 / lanes * rows) {
            const std::int64_t item = begin + r;
            float sum[Q][rows] = {}, square[rows] = {};
            for (int chunk = part; chunk < chunks; chunk += lanes) {
                const int column = chunk_of(chunk) * width;
                struct alignas(16) Chunk {
                    T at[width];
                } x[rows];
#pragma unroll
                for (int u = 0; u < rows; ++u) {
                    const std::int64_t row = item + u < score.items ? item + u : score.items - 1;
                    x[u] = *reinterpret_cast<const Chunk*>(score.row<T>(row) + column);
                }
#pragma unroll
                for (int four = 0; four < width / 4; ++four) {
                    float4 value[rows];
#pragma unroll
                    for (int u = 0; u < rows; ++u) {
                        const T* from = x[u].at + four * 4;
                        value[u] = {value_of(from[0]), value_of(from[1]), value_of(from[2]), value_of(from[3])};
                        if (squares) square[u] = dot(value[u], value[u], square[u]);
                    }
#pragma unroll
                    for (int q = 0; q < Q; ++q) {
                        const float4 query = shared[(q * (width / 4) + four) * chunks + chunk];
#pragma unroll
                        for (int u = 0; u < rows; ++u) sum[q][u] = dot(query, value[u], sum[q][u]);
                    }
                }
            }
#pragma unroll
            for (int u = 0; u < rows; ++u) {
                if (squares) square[u] = sum_of_warp(square[u], lanes);
#pragma unroll
                for (int q = 0; q < Q; ++q) {
                    const float total = sum_of_warp(sum[q][u], lanes);
                    if (part != 0 || item + u >= score.items) continue;
                    const float value = score.of_products(item + u, total, square[u]);
                    if (!(value >= limit[q]) || value == -HUGE_VALF) continue;
                    const Key key = key_of(value, item + u);
                    if (key > candidates.limits[q] && !exclude.contain(q, item + u)) candidates.add(q, key);
                }
            }
        }
    }
}

/// The k best of each query in order, by scores that are computed directly; of all items where candidates were lost.
/// size: the power of two that is not below k, nor above the capacity.
__global__ void __launch_bounds__(select_threads)
    order_kernel(const __grid_constant__ Pairs score, const __grid_constant__ Lists exclude,
                 const __grid_constant__ Candidates candidates, float* scores, std::int64_t* ids, unsigned size,
                 float sign) {
    __shared__ Selection selection;
    constexpr unsigned warps = select_threads / 32;
    const std::int64_t query = blockIdx.x;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, k = candidates.k;
    Key* const keys = candidates.keys + query * candidates.capacity;
    const auto directly = [&](std::int64_t item) {
        const float value = score.by_warp(query, item);
        return value > -HUGE_VALF ? key_of(value, item) : 0;
    };
    unsigned found = candidates.counts[query];
    if (!candidates.complete(query)) {
        const std::int64_t step = candidates.capacity - k;
        found = 0;
        for (std::int64_t first = 0; first < score.items; first += step) {
            const std::int64_t n = score.items - first < step ? score.items - first : step;
            for (std::int64_t i = warp; i < n; i += warps) {
                const Key key = directly(first + i);
                if (lane == 0) keys[found + i] = key != 0 && exclude.contain(query, first + i) ? 0 : key;
            }
            __syncthreads();
            keep_best(keys, found + static_cast<unsigned>(n), k, selection);
            found = selection.kept;
            __syncthreads();
        }
    }
    for (unsigned i = warp; i < size; i += warps) {
        const Key key = i < found ? directly(id_of(keys[i])) : 0;
        if (lane == 0) keys[i] = key;
    }
    sort_keys(keys, size);
    for (unsigned i = threadIdx.x; i < k; i += select_threads) {
        scores[query * k + i] = sign * score_of(keys[i]);
        ids[query * k + i] = keys[i] == 0 ? -1 : id_of(keys[i]);
    }
}

__global__ void __launch_bounds__(row_threads)
    nearest_kernel(const __grid_constant__ Pairs score, const Key* best, float* scores, std::int64_t* ids,
                   std::int64_t queries, float sign) {
    const std::int64_t query = row_of_warp();
    if (query >= queries) return;
    const bool found = best[query] != 0;
    const std::int64_t id = found ? id_of(best[query]) : -1;
    const float value = found ? score.by_warp(query, id) : -HUGE_VALF;
    if (threadIdx.x % 32 != 0) return;
    ids[query] = id;
    if (scores) scores[query] = sign * value;
}

__global__ void __launch_bounds__(row_threads)
    pairs_kernel(const __grid_constant__ Pairs score, const std::int64_t* ids, float* out, std::int64_t n,
                 std::int64_t m, float sign) {
    const std::int64_t i = row_of_warp();
    if (i >= n * m) return;
    const float value = score.has(ids[i]) ? score.by_warp(i / m, ids[i]) : static_cast<float>(NAN);
    if (threadIdx.x % 32 == 0) out[i] = sign * value;
}

/// Inner products of block-sparse queries, where they have blocks; score.queries: as rows.
template <class T>
__global__ void __launch_bounds__(row_threads)
    sparse_pairs_kernel(const __grid_constant__ Pairs score, const __grid_constant__ Blocks blocks,
                        const std::int64_t* ids, float* out, std::int64_t n, std::int64_t m) {
    const std::int64_t i = row_of_warp();
    if (i >= n * m) return;
    const bool inside = score.has(ids[i]);
    const float* query = score.queries + i / m * score.stride;
    float sum = 0;
    if (inside) {
        const T* item = score.row<T>(ids[i]);
        blocks.each(i / m, threadIdx.x % 32, 32, [&](std::int64_t, std::int64_t column) {
            if (column >= 0 && column < score.d) sum = fmaf(query[column], value_of(item[column]), sum);
        });
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) out[i] = inside ? score.of_products(ids[i], sum, 0) : static_cast<float>(NAN);
}

float sign_of(Metric metric) {
    return metric == Metric::l2 ? -1.0f : 1.0f;
}

/// Calls f with the element type of the items as a constant.
template <class F>
void with_items(DType dtype, F f) {
    if (dtype == DType::f32) {
        f.template operator()<float>(Rounding::none);
    } else if (dtype == DType::f16) {
        f.template operator()<Float16>(Rounding::none);
    } else if (dtype == DType::i8) {
        f.template operator()<std::int8_t>(Rounding::steps);
    } else {
        f.template operator()<BFloat16>(Rounding::bfloat16);
    }
}

/// Calls f(pairs) with the element type of the items as a constant, and the queries prepared.
template <class F>
void with_pairs(const char* op, Cuda cuda, const Array& queries, const ScanItems& items, const Array& bias,
                Metric metric, F f) {
    with_items(items.rows.dtype, [&]<class T>(Rounding rounding) {
        const std::int64_t n = queries.dim(0), d = queries.dim(1);
        const bool unit = metric == Metric::cosine, changed = unit || rounding != Rounding::none;
        const Scratch<float> prepared(op, cuda, changed ? n * d : 0);
        if (changed)
            launch_warps(op, cuda, n, prepare_kernel, queries.as<const float>(), queries.stride(0), prepared.get(), n,
                         d, unit, rounding);
        f.template operator()<T>(Pairs{
            changed ? prepared.get() : queries.as<const float>(), changed ? d : queries.stride(0), items.rows.data,
            items.rows.dtype, items.scales.as<const float>(), bias.as<const float>(), items.rows.dim(0), d, metric});
    });
}

Blocks blocks_of(const StoredBlocks& blocks, const Array& values) {
    return {blocks.ids.as<const std::int32_t>(), blocks.offsets.as<const std::int64_t>(), values.dim(1)};
}

/// Calls f(queries) with block-sparse queries as rows of width d, or with `queries` themselves.
template <class F>
void with_rows(const char* op, Cuda cuda, const Array& queries, const StoredBlocks& blocks, std::int64_t d, F f) {
    if (!blocks) return f(queries);
    const std::int64_t n = blocks.offsets.dim(0) - 1;
    const Scratch<float> rows(op, cuda, n * d);
    fill_with_zeros(op, cuda, rows.get(), n * d);
    if (n > 0)
        launch(op, cuda, dim3(static_cast<unsigned>(n)), dim3(row_threads), 0, fill_blocks_kernel,
               queries.as<const float>(), blocks_of(blocks, queries), rows.get(), d);
    Array dense = queries;
    dense.data = rows.get();
    dense.shape = {n, d};
    dense.strides = {d, 1};
    f(dense);
}

Lists lists_of(const IdLists& lists) {
    return {lists.offsets.as<const std::int64_t>(), lists.ids.as<const std::int64_t>()};
}

/// Queries beside items in tiles, whose parts are made piece by piece, unless the items can be read as they are.
template <class T>
class Tiles {
    using P = Parted<T>;
    static constexpr std::int64_t batch_elements = std::int64_t(1) << 24, piece_elements = std::int64_t(1) << 25,
                                  piece_items = std::int64_t(1) << 23;

public:
    /// Queries whose parts take no more than 64 MB.
    static std::int64_t batch(std::int64_t d) {
        return std::max<std::int64_t>(tile_rows, batch_elements / width(d) / tile_rows * tile_rows);
    }

    Tiles(const char* op, Cuda cuda, const Pairs& score, std::int64_t queries, const Passed& passed)
        : op_(op),
          cuda_(cuda),
          score_(score),
          queries_(queries),
          passed_(passed),
          order_(score.items),
          packed_(P::item == 2 || sizeof(T) != 2 || score.d == 0 || score.d % 8 != 0 ||
                  reinterpret_cast<std::uintptr_t>(score.rows) % 16 != 0),
          piece_(std::clamp<std::int64_t>((packed_ ? piece_elements / width(score.d) : piece_items) / tile_columns, 1,
                                          std::max<std::int64_t>(order_.tiles, 1))),
          parts_(tile_parts(static_cast<int>(attribute_of(op, cuda, cudaDevAttrMultiProcessorCount)), row_tiles(),
                            piece_)),
          query_values_(op, cuda, P::query * queries * width(score.d)),
          factors_(op, cuda, queries),
          item_values_(op, cuda, packed_ ? P::item * piece_ * tile_columns * width(score.d) : 0),
          affine_(op, cuda, piece_ * tile_columns) {
        launch_warps(op, cuda, queries, prepare_rows_kernel<P::words, P::query>, score.queries, score.stride, queries,
                     score.d, query_values_.get(), queries * width(score.d), factors_.get());
    }

    std::int64_t positions() const { return order_.tiles; }
    std::int64_t partials() const { return parts_ * 4; }

    /// Shows an action the tiles at some positions.
    template <class Action>
    void visit(std::int64_t begin, std::int64_t end, const Action& action) const {
        for (std::int64_t first = begin; first < end; first += piece_) {
            const std::int64_t last = std::min(first + piece_, end), n = (last - first) * tile_columns;
            const std::int64_t plane = piece_ * tile_columns * width(score_.d);
            prepare(order_, first, n, nullptr, 0, packed_ ? item_values_.get() : nullptr, plane, affine_.get());
            const TileOperand items{packed_ ? item_values_.get() : static_cast<const std::uint16_t*>(score_.rows),
                                    packed_ ? n : score_.items, width(score_.d), plane};
            launch_tiles(std::min(parts_, last - first), {items, affine_.get(), order_, first, last, packed_, false},
                         action, passed_, nullptr);
        }
    }

    /// The score of each query with an item of its own, with the bits that `visit` shows.
    void score_targets(const std::int64_t* targets, float* scores) const {
        const std::int64_t n = (queries_ + tile_columns - 1) / tile_columns * tile_columns, plane = n * width(score_.d);
        const Scratch<std::uint16_t> values(op_, cuda_, P::item * plane);
        const Scratch<Affine> affine(op_, cuda_, n);
        TileOrder order(queries_);
        order.step = 1;
        prepare(order, 0, n, targets, queries_, values.get(), plane, affine.get());
        launch_tiles(1, {{values.get(), n, width(score_.d), plane}, affine.get(), order, 0, order.tiles, true, true},
                     TakeDiagonal{scores, queries_}, Passed{{nullptr, nullptr}}, targets);
    }

private:
    static std::int64_t width(std::int64_t d) { return padded_width(d); }
    std::int64_t row_tiles() const { return std::max<std::int64_t>(1, (queries_ + tile_rows - 1) / tile_rows); }

    void prepare(const TileOrder& order, std::int64_t first, std::int64_t n, const std::int64_t* ids,
                 std::int64_t ids_n, std::uint16_t* values, std::int64_t plane, Affine* affine) const {
        launch_warps(op_, cuda_, n, prepare_columns_kernel<T>, score_, order, first, n, ids, ids_n, values, plane,
                     affine);
    }

    template <class Action>
    void launch_tiles(std::int64_t parts, const TileColumns& columns, const Action& action, const Passed& passed,
                      const std::int64_t* ids) const {
        const std::int64_t d = width(score_.d);
        launch(op_, cuda_, dim3(static_cast<unsigned>(row_tiles()), static_cast<unsigned>(parts)), dim3(tile_threads),
               TileSteps(P::query, P::item, has_wgmma(op_, cuda_)).bytes,
               tile_kernel<P::words, P::query, P::item, Epilogue<Action>>,
               TileOperand{query_values_.get(), queries_, d, queries_ * d}, columns, d,
               Epilogue<Action>{score_, factors_.get(), queries_, ids, passed, action});
    }

    const char* op_;
    Cuda cuda_;
    Pairs score_;
    std::int64_t queries_;
    Passed passed_;
    TileOrder order_;
    bool packed_;
    std::int64_t piece_, parts_;
    Scratch<std::uint16_t> query_values_;
    Scratch<float> factors_;
    Scratch<std::uint16_t> item_values_;
    Scratch<Affine> affine_;
};

/// Calls f(pairs of a batch of queries, first, count) for all queries.
template <class F>
void for_batches(const Pairs& score, std::int64_t queries, std::int64_t batch, F f) {
    for (std::int64_t first = 0; first < queries; first += batch) {
        Pairs some = score;
        some.queries += first * score.stride;
        f(some, first, std::min(batch, queries - first));
    }
}

constexpr std::int64_t most_streamed = 8;  // queries

/// Queries that a kernel has at a time, and the shared memory that they take.
constexpr std::int64_t streamed_with(std::int64_t queries) {
    return queries == 1 ? 1 : queries <= 4 ? 4 : most_streamed;
}
std::int64_t streamed_bytes(std::int64_t queries, std::int64_t d) {
    return streamed_with(queries) * d * static_cast<std::int64_t>(sizeof(float));
}

/// Whether few queries meet rows that can be read 16 bytes at a time.
template <class T>
bool streams(const Pairs& score, std::int64_t queries) {
    constexpr std::int64_t most_bytes = 48 << 10;
    return queries <= most_streamed && score.d > 0 && score.d % (16 / sizeof(T)) == 0 &&
           streamed_bytes(queries, score.d) <= most_bytes && reinterpret_cast<std::uintptr_t>(score.rows) % 16 == 0;
}

/// Shows the items at some positions to all queries; list: null, or as list_chunks_kernel makes it.
template <class T>
void stream(const char* op, Cuda cuda, const Pairs& score, const TileOrder& order, std::int64_t begin, std::int64_t end,
            Lists exclude, const Candidates& candidates, std::int64_t queries, const int* list) {
    constexpr std::int64_t blocks = 8;  // a multiprocessor
    const auto of_queries = [&]<int Q>() {
        const int chunks = static_cast<int>(score.d) / (16 / static_cast<int>(sizeof(T)));
        const int lanes = std::clamp(static_cast<int>(std::bit_ceil(static_cast<unsigned>(chunks))), 8, 32);
        const std::int64_t grid =
            std::min(end - begin, blocks * static_cast<int>(attribute_of(op, cuda, cudaDevAttrMultiProcessorCount)));
        launch(op, cuda, dim3(static_cast<unsigned>(grid)), dim3(row_threads),
               static_cast<std::size_t>(streamed_bytes(queries, score.d)),
               list ? stream_kernel<T, Q, true> : stream_kernel<T, Q, false>, score, order, begin, end, exclude,
               candidates, static_cast<int>(queries), lanes, list);
    };
    if (streamed_with(queries) == 1) {
        of_queries.template operator()<1>();
    } else if (streamed_with(queries) == 4) {
        of_queries.template operator()<4>();
    } else {
        of_queries.template operator()<most_streamed>();
    }
}

/// Writes `scores` and `ids` (queries, k). Few block-sparse queries skip what is zero in all of them, unless the
/// lengths of items count.
template <class T>
void search(const char* op, Cuda cuda, const Pairs& score, const Blocks& blocks, Lists exclude, float* scores,
            std::int64_t* ids, std::int64_t queries, std::int64_t k) {
    constexpr std::int64_t most_keys = std::int64_t(1) << 24;  // 128 MB
    const Rounds rounds(k);
    const std::int64_t batch = std::min(Tiles<T>::batch(score.d), most_keys / rounds.capacity);
    for_batches(score, queries, batch, [&](const Pairs& some, std::int64_t first, std::int64_t n) {
        const Scratch<Key> keys(op, cuda, n * rounds.capacity), limits(op, cuda, n);
        const Scratch<unsigned> counts(op, cuda, n);
        fill_with_zeros(op, cuda, limits.get(), n);
        fill_with_zeros(op, cuda, counts.get(), n);
        const Candidates candidates{keys.get(), counts.get(), limits.get(), rounds.capacity, static_cast<unsigned>(k)};
        const Passed passed = Passed{exclude}.from(first);
        const auto in_rounds = [&](std::int64_t positions, auto visit) {
            for (std::int64_t seen = 0; seen < positions;) {
                const std::int64_t next = std::max(seen + 1, rounds.next(seen * tile_columns) / tile_columns);
                const std::int64_t end = std::min(next, positions);
                visit(seen, end);
                launch(op, cuda, dim3(static_cast<unsigned>(n)), dim3(select_threads), 0, select_kernel<>, candidates);
                seen = end;
            }
        };
        if (streams<T>(score, queries)) {
            const TileOrder order(score.items);
            constexpr int width = 16 / sizeof(T);
            const bool sparse = blocks.offsets && score.metric == Metric::ip;
            const auto chunks = static_cast<int>(score.d / width);
            const Scratch<int> list(op, cuda, sparse ? 1 + chunks : 0);
            if (sparse)
                launch(op, cuda, dim3(1), dim3(row_threads), static_cast<std::size_t>(chunks + 31) / 32 * 4,
                       list_chunks_kernel, blocks, first, n, width, chunks, list.get());
            in_rounds(order.tiles, [&](std::int64_t begin, std::int64_t end) {
                stream<T>(op, cuda, some, order, begin, end, passed.lists, candidates, n, list.get());
            });
        } else {
            const Tiles<T> tiles(op, cuda, some, n, passed);
            in_rounds(tiles.positions(),
                      [&](std::int64_t begin, std::int64_t end) { tiles.visit(begin, end, ListBest{candidates}); });
        }
        launch(op, cuda, dim3(static_cast<unsigned>(n)), dim3(select_threads), 0, order_kernel, some, passed.lists,
               candidates, scores + first * k, ids + first * k, std::bit_ceil(candidates.k), sign_of(score.metric));
    });
}

template <class T>
void nearest(const char* op, Cuda cuda, const Pairs& score, float* scores, std::int64_t* ids, std::int64_t queries) {
    for_batches(score, queries, Tiles<T>::batch(score.d), [&](const Pairs& some, std::int64_t first, std::int64_t n) {
        const Scratch<Key> best(op, cuda, n);
        fill_with_zeros(op, cuda, best.get(), n);
        const Tiles<T> tiles(op, cuda, some, n, Passed{{nullptr, nullptr}});
        tiles.visit(0, tiles.positions(), KeepBest{best.get()});
        launch_warps(op, cuda, n, nearest_kernel, some, best.get(), scores ? scores + first : nullptr, ids + first, n,
                     sign_of(score.metric));
    });
}

}  // namespace

void run(const ScanTopK& op, Cuda cuda) {
    const Blocks blocks = op.blocks ? blocks_of(op.blocks, op.queries) : Blocks{};
    with_rows(op.op, cuda, op.queries, op.blocks, op.items.rows.dim(1), [&](const Array& queries) {
        with_pairs(op.op, cuda, queries, op.items, op.bias, op.metric, [&]<class T>(const Pairs& score) {
            search<T>(op.op, cuda, score, blocks, lists_of(op.exclude), op.scores.as<float>(),
                      op.ids.as<std::int64_t>(), queries.dim(0), op.scores.dim(1));
        });
    });
}

void run(const ScanNearest& op, Cuda cuda) {
    with_pairs(op.op, cuda, op.x, op.centroids, Array(), op.metric, [&]<class T>(const Pairs& score) {
        nearest<T>(op.op, cuda, score, op.distances.as<float>(), op.ids.as<std::int64_t>(), op.x.dim(0));
    });
}

void run(const ScanRank& op, Cuda cuda) {
    const std::int64_t n = op.queries.dim(0);
    const std::int64_t* targets = op.targets.as<const std::int64_t>();
    const Scratch<unsigned long long> counts(op.op, cuda, 2 * n);
    fill_with_zeros(op.op, cuda, counts.get(), 2 * n);
    with_pairs(op.op, cuda, op.queries, op.items, op.bias, op.metric, [&]<class T>(const Pairs& score) {
        const Passed known{lists_of(op.known), targets, true, false};
        for_batches(score, n, Tiles<T>::batch(score.d), [&](const Pairs& some, std::int64_t first, std::int64_t m) {
            const Scratch<float> limits(op.op, cuda, m);
            const Tiles<T> tiles(op.op, cuda, some, m, known.from(first));
            tiles.score_targets(targets + first, limits.get());
            tiles.visit(0, tiles.positions(), CountBetter{limits.get(), counts.get() + 2 * first});
        });
    });
    launch_rows(op.op, cuda, n, 1, rank_kernel, counts.get(), op.ranks.as<double>(), n, op.ties);
}

void run(const ScanPairs& op, Cuda cuda) {
    const std::int64_t n = op.ids.dim(0), m = op.ids.dim(1);
    const auto* ids = op.ids.as<const std::int64_t>();
    with_rows(op.op, cuda, op.queries, op.blocks, op.items.rows.dim(1), [&](const Array& queries) {
        with_pairs(op.op, cuda, queries, op.items, op.bias, op.metric, [&]<class T>(const Pairs& score) {
            if (op.blocks && op.metric == Metric::ip) {
                launch_warps(op.op, cuda, n * m, sparse_pairs_kernel<T>, score, blocks_of(op.blocks, op.queries), ids,
                             op.out.as<float>(), n, m);
            } else {
                launch_warps(op.op, cuda, n * m, pairs_kernel, score, ids, op.out.as<float>(), n, m,
                             sign_of(op.metric));
            }
        });
    });
}

void run(const ScanLogSumExp& op, Cuda cuda) {
    const std::int64_t n = op.queries.dim(0);
    const float exponent_scale = op.scale * 1.44269504f;  // of exponents of 2
    with_pairs(op.op, cuda, op.queries, op.items, op.bias, op.metric, [&]<class T>(const Pairs& score) {
        const Passed exclude{lists_of(op.exclude)};
        for_batches(score, n, Tiles<T>::batch(score.d), [&](const Pairs& some, std::int64_t first, std::int64_t m) {
            const Tiles<T> tiles(op.op, cuda, some, m, exclude.from(first));
            const std::int64_t partials = tiles.partials();
            const Scratch<ScaledSum> sums(op.op, cuda, partials * m);
            fill_with_zeros(op.op, cuda, sums.get(), partials * m);
            tiles.visit(0, tiles.positions(), SumExponentials{sums.get(), {m}, exponent_scale});
            launch_rows(op.op, cuda, m, 1, logsumexp_kernel, sums.get(), partials,
                        op.metric == Metric::l2 ? some.queries : nullptr, some.stride, some.d,
                        op.out.as<float>() + first, m, op.scale, exponent_scale);
        });
    });
}

void run(const ScanHinge& op, Cuda cuda) {
    const std::int64_t n = op.queries.dim(0);
    const std::int64_t* targets = op.targets.as<const std::int64_t>();
    with_pairs(op.op, cuda, op.queries, op.items, op.bias, op.metric, [&]<class T>(const Pairs& score) {
        const Passed known{lists_of(op.known), targets, false, true};
        for_batches(score, n, Tiles<T>::batch(score.d), [&](const Pairs& some, std::int64_t first, std::int64_t m) {
            const Scratch<float> limits(op.op, cuda, m);
            const Tiles<T> tiles(op.op, cuda, some, m, known.from(first));
            const std::int64_t partials = tiles.partials();
            const Scratch<double> sums(op.op, cuda, partials * m);
            fill_with_zeros(op.op, cuda, sums.get(), partials * m);
            tiles.score_targets(targets + first, limits.get());
            tiles.visit(0, tiles.positions(), SumHinges{limits.get(), sums.get(), {m}, op.margin});
            launch_rows(op.op, cuda, m, 1, hinge_kernel, sums.get(), partials, limits.get(), op.out.as<float>() + first,
                        m);
        });
    });
}

}  // namespace polyvec
