// Sums of clusters for k-means, the nearest codewords of short rows, and the means that may be nearest to long ones.
//
// Sums and losses of short rows are taken row by row, in the order of the rows: what they are added to, or compared
// with, lies in the level-1 cache, and to go cluster by cluster would cost more than to add.
//
// Rows of up to 16 elements stay in registers while all codewords pass by: the register tile of a scan would reload its
// panel, its best scores and its ids for every few codewords. 16 registers do not hold the rows: they are loaded for
// every four codewords, two at a time, which halves the loads of codewords; a maximum and a number counted up in its
// lanes take the place of a second selection and of a broadcast, which wait for the multiplier. AVX2 on Zen 3, 4, 8 and
// 16 elements, GFLOP/s of 96: 43, 51, 51 with one row in registers, 60, 71, 80 so. Which codeword is nearest is decided
// by fused multiply-adds at every level: one without them (base) keeps the second best score, too, and decides anew
// where it is so close that rounding may have.
#include "tables.hpp"
#include "tile.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t L = lanes<float>;

template <class Half>
POLYVEC_INLINE Vec<double> widen(Half v) noexcept {
    return __builtin_convertvector(v, Vec<double>);
}

void sum_rows(const float* x, const int64_t* rows, size_t n, size_t d, const float* scale, double* sum) noexcept {
    constexpr size_t half = L / 2;
    for (size_t i = 0; i < d; i += L) {
        const size_t width = d - i < L ? d - i : L;
        Vec<double> low{}, high{};
        for (size_t k = 0; k < n; ++k) {
            const size_t row = static_cast<size_t>(rows[k]);
            const float* at = x + row * d + i;
            const Vec<float> v = width == L ? load(at) : load_first(at, width);
            const Vec<double> factor = broadcast(scale ? static_cast<double>(scale[row]) : 1.0);
            low = fma(widen(lower_half(v)), factor, low);
            high = fma(widen(upper_half(v)), factor, high);
        }
        store_first(sum + i, low, width < half ? width : half);
        if (width > half) store_first(sum + i + half, high, width - half);
    }
}

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool fused = true;
#else
constexpr bool fused = false;
#endif

constexpr bool few_registers = tile_registers == 12;

/// J codewords of D elements against R registers of rows. `second` is kept where products are not fused; `number`, of
/// the first codeword, where registers are few.
template <size_t D, size_t R, size_t J>
POLYVEC_INLINE void compare_codewords(const Vec<float> (&x)[D][R], const float* codewords, const float* offsets,
                                      size_t first, Vec<float> (&best)[R], Vec<float> (&second)[R],
                                      Vec<int32_t> (&id)[R], Vec<int32_t>& number) noexcept {
    Vec<float> score[J][R];
#pragma GCC unroll 8
    for (size_t j = 0; j < J; ++j) {
#pragma GCC unroll 2
        for (size_t r = 0; r < R; ++r) score[j][r] = broadcast(offsets[first + j]);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < D; ++i) {
        Vec<float> row[R];
        for (size_t r = 0; r < R; ++r) {
            row[r] = x[i][r];
            if constexpr (few_registers) keep_in_register(row[r]);  // loaded once, not by each product
        }
#pragma GCC unroll 8
        for (size_t j = 0; j < J; ++j) {
            const Vec<float> c = broadcast(codewords[(first + j) * D + i]);
#pragma GCC unroll 2
            for (size_t r = 0; r < R; ++r) {
                score[j][r] = fma(row[r], c, score[j][r]);
                if constexpr (few_registers) keep_in_register(score[j][r]);
            }
        }
    }
#pragma GCC unroll 8
    for (size_t j = 0; j < J; ++j) {
#pragma GCC unroll 2
        for (size_t r = 0; r < R; ++r) {
            if constexpr (!fused) second[r] = max(min(score[j][r], best[r]), second[r]);
            if constexpr (few_registers) {
                const Vec<float> top = max(score[j][r], best[r]);
                id[r] = select(top != best[r], number, id[r]);
                best[r] = top;
            } else {
                const Mask<float> better = score[j][r] > best[r];
                best[r] = select(better, score[j][r], best[r]);
                id[r] = select(better, broadcast(static_cast<int32_t>(first + j)), id[r]);
            }
        }
        if constexpr (few_registers) {
            number += 1;
            keep_in_register(number);
        }
    }
}

/// The nearest codeword by fused multiply-adds.
int32_t nearest_fused(const ShortRows& rows, const float* row) noexcept {
    int32_t id = 0;
    float best = -__builtin_inff();
    for (size_t c = 0; c < rows.k; ++c) {
        float score = rows.offsets[c];
        for (size_t i = 0; i < rows.d; ++i) score = __builtin_fmaf(row[i], rows.codewords[c * rows.width + i], score);
        if (score > best) {
            best = score;
            id = static_cast<int32_t>(c);
        }
    }
    return id;
}

template <size_t D, size_t R>
void nearest_in_registers(const ShortRows& rows, int32_t* ids) noexcept {
    constexpr size_t J = L == 16 && R == 1 ? 8 : 4;
    float largest = 0;  // |c|^2 / 2
    for (size_t c = 0; !fused && c < rows.k; ++c) largest = -rows.offsets[c] > largest ? -rows.offsets[c] : largest;
    for (size_t first = 0; first < rows.n; first += R * L) {
        const size_t count = rows.n - first < R * L ? rows.n - first : R * L;
        alignas(64) float panel[D * R * L] = {};
        pack_panel(panel, rows.first + first * rows.stride, count, rows.stride, rows.d, R * L);
        Vec<float> x[D][R], best[R], second[R];
        Vec<int32_t> id[R] = {}, number = {};
        for (size_t i = 0; i < D; ++i) {
            for (size_t r = 0; r < R; ++r) x[i][r] = load(panel + (i * R + r) * L);
        }
        for (size_t r = 0; r < R; ++r) best[r] = second[r] = broadcast(-__builtin_inff());
        size_t c = 0;
        for (; c + J <= rows.k; c += J)
            compare_codewords<D, R, J>(x, rows.codewords, rows.offsets, c, best, second, id, number);
        for (; c < rows.k; ++c)
            compare_codewords<D, R, 1>(x, rows.codewords, rows.offsets, c, best, second, id, number);
        int32_t nearest[R * L];
        for (size_t r = 0; r < R; ++r) store(nearest + r * L, id[r]);
        for (size_t k = 0; k < count; ++k) ids[first + k] = nearest[k];
        if constexpr (!fused) {
            for (size_t r = 0; r < R; ++r) {
                // The sums of either way are off by less than (2 D + 1) 2^-24 (|x|^2 / 2 + |c|^2); less than what is
                // compared with here is what both, for two codewords, may be off together.
                Vec<float> bound = broadcast(4 * largest);
                for (size_t i = 0; i < D; ++i) bound += x[i][r] * x[i][r];
                const Vec<float> gap = best[r] - second[r];
                const Mask<float> clear = gap > bound * broadcast(static_cast<float>(D + 1) * 0x1p-21f);
                for (uint32_t close = ~bits(clear) & ((1u << L) - 1); close; close &= close - 1) {
                    const size_t k = r * L + static_cast<size_t>(__builtin_ctz(close));
                    if (k < count) ids[first + k] = nearest_fused(rows, rows.first + (first + k) * rows.stride);
                }
            }
        }
    }
}

template <size_t D>
void nearest_of_width(const ShortRows& rows, int32_t* ids) noexcept {
    constexpr size_t R = few_registers || (L == 16 && D <= 8) ? 2 : 1;
    if (rows.n > L) {
        nearest_in_registers<D, R>(rows, ids);
    } else {
        nearest_in_registers<D, 1>(rows, ids);
    }
}

void nearest_short(const ShortRows& rows, int32_t* ids) noexcept {
    if (rows.width == 4) {
        nearest_of_width<4>(rows, ids);
    } else if (rows.width == 8) {
        nearest_of_width<8>(rows, ids);
    } else {
        nearest_of_width<16>(rows, ids);
    }
}

void half_squares(const float* rows, size_t n, size_t width, float* out) noexcept {
    using Four = VecOf<float, 16>::type;
    using Unaligned = VecOf<float, 16>::unaligned;
    using Sums = VecOf<double, 32>::type;
    size_t c = 0;
    for (; c + 4 <= n; c += 4) {
        Sums sum{};
        for (size_t i = 0; i < width; i += 4) {
            Four block[4];
            for (size_t j = 0; j < 4; ++j) {
                block[j] = *reinterpret_cast<const Unaligned*>(rows + (c + j) * width + i);
                block[j] *= block[j];
            }
            transpose(block, LaneRange<0, 4>::type{});
            for (const Four& column : block) sum += __builtin_convertvector(column, Sums);
        }
        *reinterpret_cast<Unaligned*>(out + c) = __builtin_convertvector(-0.5 * sum, Four);
    }
    for (; c < n; ++c) {
        double sum = 0;
        for (size_t i = 0; i < width; ++i) {
            const float square = rows[c * width + i] * rows[c * width + i];
            sum += square;
        }
        out[c] = static_cast<float>(-0.5 * sum);
    }
}

void nearest_two(const MeansBlock& block, float* best, float* second, int32_t* id) noexcept {
    constexpr int R = panel_registers;
    const GatheredRows<float, int32_t> means{block.means, block.ids, block.n, block.d};
    const auto update = [&]<int J>(size_t first, const Vec<float>(&acc)[J][R]) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            Vec<float> top = load(best + r * L), next = load(second + r * L);
            Vec<int32_t> at = load(id + r * L);
#pragma GCC unroll 12
            for (int j = 0; j < J; ++j) {
                const int32_t mean = block.ids[first + j];
                const Vec<float> score = acc[j][r] + broadcast(block.offsets[mean]);
                const Mask<float> better = score > top;
                next = max(next, min(score, top));
                top = select(better, score, top);
                at = select(better, broadcast(mean), at);
            }
            store(best + r * L, top);
            store(second + r * L, next);
            store(id + r * L, at);
        }
    };
    for_each_tile<R>(block.panel, means, block.d, update);
}

/// Register v of a row of d elements, zeros behind them.
POLYVEC_INLINE Vec<float> load_part(const float* row, size_t v, size_t d) noexcept {
    const size_t begin = v * L;
    if (d >= begin + L) return load(row + begin);
    return d > begin ? load_first(row + begin, d - begin) : Vec<float>{};
}

/// Calls f(at, x) with the elements of rows of at most W from `at` on, half a register of float64 at a time.
template <size_t W, class F>
POLYVEC_INLINE void widen_short(Vec<float> x, size_t v, F&& f) noexcept {
    constexpr size_t half = L / 2;
    f(v * L, widen(lower_half(x)));
    if (W > half) f(v * L + half, widen(upper_half(x)));
}

template <size_t W>
double loss_of_width(const ShortRows& rows, const int32_t* ids) noexcept {
    constexpr size_t together = 4;  // sums, so that one need not wait for another
    Vec<double> sum[together] = {};
    const auto add = [&](size_t i, Vec<double>& total) __attribute__((always_inline)) {
        const float* row = rows.first + i * rows.stride;
        const float* codeword = rows.codewords + static_cast<size_t>(ids[i]) * W;
        for (size_t v = 0; v * L < W; ++v) {
            const Vec<float> gap = load_part(row, v, rows.d) - load_part(codeword, v, W);
            widen_short<W>(gap, v, [&](size_t, Vec<double> x) { total = fma(x, x, total); });
        }
    };
    size_t i = 0;
    for (; i + together <= rows.n; i += together) {
#pragma GCC unroll 4
        for (size_t j = 0; j < together; ++j) add(i + j, sum[j]);
    }
    for (; i < rows.n; ++i) add(i, sum[0]);
    const Vec<double> total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    double loss = 0;
    for (size_t k = 0; k < L / 2; ++k) loss += total[k];
    return loss;
}

double loss_short(const ShortRows& rows, const int32_t* ids) noexcept {
    return rows.width == 4   ? loss_of_width<4>(rows, ids)
           : rows.width == 8 ? loss_of_width<8>(rows, ids)
                             : loss_of_width<16>(rows, ids);
}

template <size_t W>
void sum_of_width(const ShortRows& rows, const int64_t* labels, int64_t first, int64_t last, double* sums) noexcept {
    constexpr size_t stride = short_sum(W);
    for (size_t i = 0; i < rows.n; ++i) {
        if (labels[i] < first || labels[i] >= last) continue;
        double* const sum = sums + static_cast<size_t>(labels[i] - first) * stride;
        for (size_t v = 0; v * L < W; ++v) {
            widen_short<W>(load_part(rows.first + i * rows.stride, v, rows.d), v,
                           [&](size_t at, Vec<double> x) { store(sum + at, load(sum + at) + x); });
        }
    }
}

void sum_short(const ShortRows& rows, const int64_t* labels, int64_t first, int64_t last, double* sums) noexcept {
    if (rows.width == 4) {
        sum_of_width<4>(rows, labels, first, last, sums);
    } else if (rows.width == 8) {
        sum_of_width<8>(rows, labels, first, last, sums);
    } else {
        sum_of_width<16>(rows, labels, first, last, sums);
    }
}

#if defined(POLYVEC_BYTE_PAIRS) && POLYVEC_VECTOR_BYTES == 32

// A product of bytes and its addition are two operations for 32 multiplications, where AVX2 takes four by float32: 256
// means of 384 elements take 952 ns a row on Zen 3, and 200 to pack it, 2192 by float32. Sums stay in 16 bits: to widen
// them on the way would cost what finer steps save.

/// Words of four bytes, those of means unsigned. A sum may overflow on the way, not in the end.
struct CoarseProduct {
    using Sum = int16_t;
    template <int R>
    static constexpr int rows = Multiply<float>::rows<R>;

    POLYVEC_INLINE static Vec<int16_t> start(const uint32_t* panel, int r) noexcept {
        return (Vec<int16_t>)load(panel + r * static_cast<int>(lanes<uint32_t>));
    }
    POLYVEC_INLINE static Vec<int16_t> add(Vec<uint32_t> mean, Vec<uint32_t> row, Vec<int16_t> sum) noexcept {
        return sum + multiply_byte_pairs(mean, row);
    }
};

constexpr size_t coarse_width = panel_registers * L;

/// What sums start from, the words, and the steps, norms and errors of the rows.
size_t coarse_words(size_t d) {
    return (d + 3) / 4 + 4;
}

void pack_coarse(const float* rows, const float* center, size_t n, size_t d, void* panel) noexcept {
    const size_t words = (d + 3) / 4;
    const float most = coarse_norm - __builtin_sqrtf(static_cast<float>(d / 2 + 2)) / 2;  // before rounding
    uint32_t* const first = static_cast<uint32_t*>(panel) + coarse_width;
    float* const steps = reinterpret_cast<float*>(first + words * coarse_width);
    Vec<uint8_t> lowest[4];  // shuffles the lowest bytes of the words of each half of a register into its word v
    for (size_t v = 0; v < 4; ++v) {
        Vec<uint32_t> index = broadcast(~0u);
        index[v] = index[v + 4] = 0x0c080400;
        lowest[v] = (Vec<uint8_t>)index;
    }
    for (size_t k = 0; k < coarse_width; k += L) {
        const size_t count = n < k ? 0 : n - k < L ? n - k : L;
        float inverse[L] = {};
        Vec<float> error[L] = {};
        Vec<int16_t> share{};
        for (size_t j = 0; j < L; ++j) {
            Vec<float> top{}, squares{};
            const auto add = [&](Vec<float> x) __attribute__((always_inline)) {
                top = max(abs(x), top);
                squares = fma(x, x, squares);
            };
            size_t i = j < count ? 0 : d;
            const float* row = rows + (k + j) * d;
            for (; i + L <= d; i += L) add(load(row + i) - load(center + i));
            if (i < d) add(load_first(row + i, d - i) - load_first(center + i, d - i));
            float halves[2] = {};
            for (size_t lane = 0; lane < L; ++lane) halves[lane / 2 % 2] += squares[lane];
            const float half = __builtin_sqrtf(halves[0] > halves[1] ? halves[0] : halves[1]);
            const float by_norm = half / most, by_size = reduce_max(top) / 127;
            const float step = by_norm > by_size ? by_norm : by_size;
            inverse[j] = step > 0 ? 1 / step : 0;
            steps[k + j] = step;
            steps[coarse_width + k + j] = __builtin_sqrtf(halves[0] + halves[1]) * (1 + 0x1p-10f);
        }
        for (size_t i = 0; i < words; i += L) {
            Vec<uint32_t> block[L] = {};
            for (size_t j = 0; j < count; ++j) {
                Vec<float> squares{};
                const auto add = [&](size_t v, Vec<float> x, Vec<float> middle) __attribute__((always_inline)) {
                    const Vec<float> value = (x - middle) * inverse[j], shifted = value + 0x1.8p23f;
                    const Vec<float> rest = value - (shifted - 0x1.8p23f);
                    squares = fma(rest, rest, squares);
                    block[j] |= (Vec<uint32_t>)shuffle_bytes((Vec<uint8_t>)shifted, lowest[v]);
                };
                const float* row = rows + (k + j) * d;
                if (4 * (i + L) <= d) {
#pragma GCC unroll 4
                    for (size_t v = 0; v < 4; ++v) add(v, load(row + 4 * i + v * L), load(center + 4 * i + v * L));
                } else {
                    for (size_t v = 0; v < 4; ++v)
                        add(v, load_part(row, i / 2 + v, d), load_part(center, i / 2 + v, d));
                }
                error[j] += squares;
            }
            transpose(block, typename LaneRange<0, L>::type{});
            for (size_t j = 0; j < L; ++j) {
                const size_t word = i + j % 4 * 2 + j / 4;
                if (word < words) store(first + word * coarse_width + k, block[j]);
                share -= multiply_byte_pairs(broadcast(0x40404040u), block[j]);
            }
        }
        store(first - coarse_width + k, (Vec<uint32_t>)share);
        for (size_t j = 0; j < L; ++j)
            steps[2 * coarse_width + k + j] = __builtin_sqrtf(reduce_add(error[j])) * (1 + 0x1p-10f) * steps[k + j];
    }
}

size_t candidates(const CoarseMeans& means, const void* panel, float* floor, ScanHit* hits) noexcept {
    constexpr int R = panel_registers;
    const size_t words = (means.d + 3) / 4;
    const uint32_t* first_word = static_cast<const uint32_t*>(panel) + coarse_width;
    const auto* steps = reinterpret_cast<const float*>(first_word + words * coarse_width);
    ScanHit* hit = hits;
    const auto find = [&]<int J>(size_t first, const Vec<int16_t>(&acc)[J][R]) __attribute__((always_inline)) {
        const auto slack = [&](int j, int r) __attribute__((always_inline)) {
            const size_t c = first + static_cast<size_t>(j);
            const Vec<float> size = load(steps + coarse_width + r * L), error = load(steps + 2 * coarse_width + r * L);
            return fma(error, broadcast(means.size[c]),
                       fma(size, broadcast(means.error[c]), broadcast(means.rounding[c])));
        };
        Vec<float> upper[J][R];
        Mask<float> found{};
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec<float> step = load(steps + r * L), least = load(floor + r * L);
#pragma GCC unroll 12
            for (int j = 0; j < J; ++j) {
                const size_t c = first + static_cast<size_t>(j);
                const Vec<int32_t> sum = multiply_pairs((Vec<uint32_t>)acc[j][r], broadcast(0x00010001u));
                const Vec<float> product = __builtin_convertvector(sum, Vec<float>) * broadcast(means.scale[c]);
                upper[j][r] = fma(product, step, slack(j, r) + broadcast(means.offset[c]));
                found |= upper[j][r] >= least;
            }
        }
        if (!any(found)) return;
        float pairs[J * coarse_width];
        for (int r = 0; r < R; ++r) {
            Vec<float> least = load(floor + r * L);
            for (int j = 0; j < J; ++j) {
                least = max(upper[j][r] - 2 * slack(j, r), least);
                store(pairs + (j * R + r) * L, upper[j][r]);
            }
            store(floor + r * L, least);
        }
        for (size_t k = 0; k < J * coarse_width; k += L) {
            for (uint32_t set = bits(load(pairs + k) >= load(floor + k % coarse_width)); set; set &= set - 1) {
                const size_t at = k + static_cast<size_t>(__builtin_ctz(set));
                *hit++ = {pairs[at], static_cast<uint32_t>(first * coarse_width + at)};
            }
        }
    };
    for_each_tile<R>(first_word, Rows<uint32_t>{reinterpret_cast<const uint32_t*>(means.bytes), means.n, words}, words,
                     find, CoarseProduct{});
    return static_cast<size_t>(hit - hits);
}

#else
constexpr std::nullptr_t coarse_words = nullptr, pack_coarse = nullptr, candidates = nullptr;
#endif

}  // namespace

extern const QuantizeKernels quantize_kernels;
const QuantizeKernels quantize_kernels{sum_rows,     nearest_short, nearest_two, loss_short,  sum_short,
                                       coarse_words, pack_coarse,   candidates,  half_squares};

}  // namespace polyvec::POLYVEC_ISA
