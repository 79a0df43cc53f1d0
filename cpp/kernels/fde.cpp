// Fixed dimensional encodings: sign bits of tokens against hyperplanes, sums of buckets, their projections.
//
// A document of 180 tokens x 128 with 20 repetitions of 5 planes and 16 columns costs 2.3 M multiply-adds for the
// signs (the product is never stored), 0.5 M additions from the second cache level for the buckets, and 1.3 M
// multiply-adds for the projections, whose rows are buckets, not tokens.
#include "tables.hpp"
#include "tile.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t token_block = 192;  // tokens whose magnitudes are at hand; a multiple of every tile's rows
constexpr float smallest = 1e-18f, largest = 1e18f;  // between these, float32 products neither under- nor overflow

float max_abs(const float* x, size_t d) noexcept {
    Vec<float> best{};
    size_t i = 0;
    for (; i + lanes<float> <= d; i += lanes<float>) best = max(abs(load(x + i)), best);
    if (i < d) best = max(abs(load_first(x + i, d - i)), best);
    return reduce_max(best);
}

/// `positive` with the bits named by `unsure` decided in float64, where the products of floats are exact.
[[gnu::noinline]] uint32_t decide(const float* x, const float* panel, size_t width, size_t d, uint32_t positive,
                                  uint32_t unsure) noexcept {
    for (; unsure; unsure &= unsure - 1) {
        const int column = __builtin_ctz(unsure);
        double sum = 0;
        for (size_t i = 0; i < d; ++i)
            sum += static_cast<double>(x[i]) * panel[i * width + static_cast<size_t>(column)];
        positive = (positive & ~(1u << column)) | static_cast<uint32_t>(sum > 0) << column;
    }
    return positive;
}

/// The signs of n (at most token_block) tokens for one panel of Width columns; magnitude[t] >= |x| for every entry.
///
/// A float32 sum of d products is off by less than slack = (d + 2) 2^-24 |plane|_1 times the token's magnitude: signs
/// of sums closer to zero are decided in float64. Rows of magnitude infinity are decided there altogether.
template <size_t Width>
void panel_signs(const float* tokens, size_t n, size_t d, const float* panel, const float* slack,
                 const float* magnitude, uint8_t* signs, size_t stride, const float* next) noexcept {
    constexpr int R = Width / lanes<float>;
    constexpr uint32_t all = Width == 32 ? ~0u : (1u << Width % 32) - 1;
    for_each_tile<R>(panel, Rows<float>{tokens, n, d, next}, d,
                     [&]<int J>(size_t first, const Vec<float>(&acc)[J][R]) __attribute__((always_inline)) {
                         uint32_t positive[J], unsure[J];
#pragma GCC unroll 12
                         for (int j = 0; j < J; ++j) {
                             const Vec<float> reach = broadcast(magnitude[first + j]);
                             positive[j] = unsure[j] = 0;
#pragma GCC unroll 12
                             for (int r = 0; r < R; ++r) {
                                 const Vec<float> limit = reach * load(slack + r * lanes<float>);
                                 positive[j] |= bits(acc[j][r] > 0) << r * lanes<float>;
                                 unsure[j] |= bits(abs(acc[j][r]) < limit) << r * lanes<float>;
                             }
                         }
                         for (int j = 0; j < J; ++j) {
                             const size_t t = first + j;
                             if (magnitude[t] > largest) unsure[j] = all;
                             if (unsure[j]) [[unlikely]]
                                 positive[j] = decide(tokens + t * d, panel, Width, d, positive[j], unsure[j]);
                             __builtin_memcpy(signs + t * stride, &positive[j], Width / 8);
                         }
                     });
}

void signs(const float* tokens, size_t n, size_t d, const float* planes, const float* slack, size_t columns,
           uint8_t* out, size_t stride) noexcept {
    for (size_t t = 0; t < n; t += token_block) {
        const size_t count = n - t < token_block ? n - t : token_block;
        const float* block = tokens + t * d;
        float magnitude[token_block];
        for (size_t i = 0; i < count; ++i) {
            magnitude[i] = max_abs(block + i * d, d);
            if (magnitude[i] > 0 && !(magnitude[i] > smallest && magnitude[i] < largest))
                magnitude[i] = __builtin_inff();
        }
        for (size_t c = 0; c < columns; c += 32) {
            const float* next = c + 32 < columns ? block : block + count * d;
            uint8_t* at = out + t * stride + c / 8;
            if (columns - c > 16) {
                panel_signs<32>(block, count, d, planes + c * d, slack + c, magnitude, at, stride, next);
            } else {
                panel_signs<16>(block, count, d, planes + c * d, slack + c, magnitude, at, stride, next);
            }
        }
    }
}

/// Columns from i on, K registers a walk along the chain, then fewer for the columns that remain.
template <int K>
POLYVEC_INLINE void sum_columns(size_t i, const float* tokens, size_t d, const uint32_t* next, uint32_t first,
                                bool mean, float* out) noexcept {
    constexpr size_t step = K * lanes<float>;
    const auto walk = [&](auto add) {
        uint32_t count = 0;
        for (uint32_t t = first; t != fde_end; t = next[t], ++count) add(tokens + static_cast<size_t>(t) * d + i);
        return mean ? 1 / static_cast<float>(count) : 1.0f;
    };
    for (; i + step <= d; i += step) {
        Vec<float> sum[K]{};
        const float scale = walk([&](const float* x) {
            for (int k = 0; k < K; ++k) sum[k] += load(x + k * lanes<float>);
        });
        for (int k = 0; k < K; ++k) store(out + i + k * lanes<float>, sum[k] * scale);
    }
    if constexpr (K > 1) {
        sum_columns<K / 2>(i, tokens, d, next, first, mean, out);
    } else if (i < d) {
        Vec<float> sum{};
        const float scale = walk([&](const float* x) { sum += load_first(x, d - i); });
        store_first(out + i, sum * scale, d - i);
    }
}

void reduce(const float* tokens, size_t d, const uint32_t* next, uint32_t first, bool mean, float* out) noexcept {
    sum_columns<8>(0, tokens, d, next, first, mean, out);
}

struct RowList {
    const float* const* row;
    size_t count;
    size_t stride;

    POLYVEC_INLINE const float* operator[](size_t k) const noexcept { return row[k < count ? k : 0]; }
};

/// Columns [column, column + Width) of the projected rows.
template <size_t Width>
void project_panel(RowList rows, const uint32_t* blocks, size_t d, const float* panel, size_t column, size_t width,
                   float* out) noexcept {
    constexpr int R = Width / lanes<float>;
    const auto count_of = [&](int r) {
        const size_t first = column + r * lanes<float>;
        return first >= width ? 0 : width - first < lanes<float> ? width - first : lanes<float>;
    };
    for_each_tile<R>(panel, rows, d,
                     [&]<int J>(size_t first, const Vec<float>(&acc)[J][R]) __attribute__((always_inline)) {
#pragma GCC unroll 12
                         for (int j = 0; j < J; ++j) {
                             float* to = out + blocks[first + j] * width + column;
#pragma GCC unroll 12
                             for (int r = 0; r < R; ++r) store_first(to + r * lanes<float>, acc[j][r], count_of(r));
                         }
                     });
}

void project(const float* const* rows, const uint32_t* blocks, size_t n, size_t d, const float* projection,
             size_t width, float* out) noexcept {
    for (size_t c = 0; c < width; c += 32) {
        if (width - c > 16) {
            project_panel<32>({rows, n, d}, blocks, d, projection + c * d, c, width, out);
        } else {
            project_panel<16>({rows, n, d}, blocks, d, projection + c * d, c, width, out);
        }
    }
}

}  // namespace

extern const FdeKernels fde_kernels;
const FdeKernels fde_kernels{signs, reduce, project};

}  // namespace polyvec::POLYVEC_ISA
