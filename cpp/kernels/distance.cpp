// Inner products and squared distances of one query with rows of a table that ids name.
//
// Rows come from anywhere in memory, so the limit is latency: four rows are computed together, while the first lines of
// rows further on are fetched. The hardware follows a row of floats from there. A row's sum never depends on its place
// among the ids. Measured on Zen 4, 41k rows of 384 floats in huge pages, in the order of a graph search, other work on
// the machine: no prefetch 92 ns a row, all lines one group ahead 113, the first 4 lines 8 rows ahead 84. Rows in fewer
// bits are too short for the hardware: on Zen 5, 116k rows of 384 float16, 83 ns a row with 4 lines, 58 with all 12.
#include "elements.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t group = 4;  // rows computed together
constexpr size_t line = 64;  // bytes
template <class Elements>
constexpr size_t lines_ahead = Elements::bits == 32 ? 32 : 96;  // on their way at a time
template <class Elements>
constexpr size_t lines_of_row = Elements::bits == 32 ? 4 : 32;  // of these, at most

struct Dot {
    POLYVEC_INLINE static Vec<float> step(Vec<float> q, Vec<float> x, Vec<float> sum) noexcept {
        return fma(q, x, sum);
    }
};

struct SquaredL2 {
    POLYVEC_INLINE static Vec<float> step(Vec<float> q, Vec<float> x, Vec<float> sum) noexcept {
        const Vec<float> difference = q - x;
        return fma(difference, difference, sum);
    }
};

/// The next elements of a row, two vectors of them, which match those of a query after `arrange`. Two elements of
/// bfloat16 are one word: a shift makes a float of the first, a mask of the second, in half the steps of widening each.
struct Two {
    Vec<float> first, second;
};

template <class Elements>
POLYVEC_INLINE Two load_two(const unsigned char* p) noexcept {
    if constexpr (Elements::in_words) {
        const auto words = (Vec<uint32_t>)*reinterpret_cast<const Some<float, lanes<float>>*>(p);
        return {(Vec<float>)(words << 16), (Vec<float>)(words & 0xffff0000)};
    } else {
        return {Elements::load(p), Elements::load(p + lanes<float> * Elements::bits / 8)};
    }
}

template <class Elements>
POLYVEC_INLINE Two arrange(Vec<float> a, Vec<float> b) noexcept {
    using All = typename LaneRange<0, lanes<float>>::type;
    if constexpr (Elements::in_words) return {every_second(a, b, 0, All{}), every_second(a, b, 1, All{})};
    return {a, b};
}

/// J rows at a time, two sums a row. `scale`: what the elements of a row are multiplied by, of integers alone.
template <class Metric, class Elements, size_t J>
POLYVEC_INLINE void compute(const float* query, const unsigned char* const (&row)[J], const float (&scale)[J], size_t d,
                            float* out) noexcept {
    constexpr size_t width = lanes<float>, bytes = Elements::bits / 8;
    constexpr bool scaled = Elements::bits == 8;
    const auto value = [&](size_t j, Vec<float> x) __attribute__((always_inline)) { return scaled ? x * scale[j] : x; };
    Vec<float> sum[J][2];
    for (size_t j = 0; j < J; ++j) sum[j][0] = sum[j][1] = Vec<float>{};
    size_t i = 0;
    for (; i + 2 * width <= d; i += 2 * width) {
        const Two q = arrange<Elements>(load(query + i), load(query + i + width));
        for (size_t j = 0; j < J; ++j) {
            const Two x = load_two<Elements>(row[j] + i * bytes);
            sum[j][0] = Metric::step(q.first, value(j, x.first), sum[j][0]);
            sum[j][1] = Metric::step(q.second, value(j, x.second), sum[j][1]);
        }
    }
    if (i + width <= d) {
        const Vec<float> q = load(query + i);
        for (size_t j = 0; j < J; ++j)
            sum[j][0] = Metric::step(q, value(j, Elements::load(row[j] + i * bytes)), sum[j][0]);
        i += width;
    }
    if (i < d) {
        const Vec<float> q = load_first(query + i, d - i);
        for (size_t j = 0; j < J; ++j)
            sum[j][1] = Metric::step(q, value(j, load_elements<Elements>(row[j] + i * bytes, d - i)), sum[j][1]);
    }
    if constexpr (J == 4) {
        const Vec<float> sums[] = {sum[0][0] + sum[0][1], sum[1][0] + sum[1][1], sum[2][0] + sum[2][1],
                                   sum[3][0] + sum[3][1]};
        *reinterpret_cast<typename VecOf<float, sizeof(float) * J>::unaligned*>(out) = reduce_add(sums);
    } else {
        for (size_t j = 0; j < J; ++j) out[j] = reduce_add(sum[j][0] + sum[j][1]);
    }
}

template <class Metric, class Elements, class Id>
void distances(const float* query, const void* rows, const float* scales, const Id* ids, size_t n, size_t d,
               float* out) noexcept {
    const size_t row_bytes = d * Elements::bits / 8;
    const auto row_of = [&](size_t k) {
        return static_cast<const unsigned char*>(rows) + static_cast<size_t>(ids[k]) * row_bytes;
    };
    const auto scale_of = [&](size_t k) { return scales ? scales[ids[k]] : 1.0f; };
    const size_t lines = (row_bytes + line - 1) / line,
                 fetched = lines < lines_of_row<Elements> ? lines : lines_of_row<Elements>;
    const size_t ahead = lines_ahead<Elements> / (fetched > 0 ? fetched : 1);
    const auto fetch = [&](size_t k) {
        for (size_t i = 0; i < fetched; ++i) prefetch(row_of(k) + i * line);
    };
    for (size_t k = 0; k < ahead && k < n; ++k) fetch(k);
    size_t k = 0;
    for (; k + group <= n; k += group) {
        for (size_t next = k + ahead; next < k + ahead + group && next < n; ++next) fetch(next);
        const unsigned char* const row[group] = {row_of(k), row_of(k + 1), row_of(k + 2), row_of(k + 3)};
        const float scale[group] = {scale_of(k), scale_of(k + 1), scale_of(k + 2), scale_of(k + 3)};
        compute<Metric, Elements>(query, row, scale, d, out + k);
    }
    for (; k < n; ++k) {
        const unsigned char* const row[1] = {row_of(k)};
        const float scale[1] = {scale_of(k)};
        compute<Metric, Elements>(query, row, scale, d, out + k);
    }
}

template <class Metric, class Id>
void float_distances(const float* query, const float* rows, const Id* ids, size_t n, size_t d, float* out) noexcept {
    distances<Metric, Float32Elements>(query, rows, nullptr, ids, n, d, out);
}

template <class Id>
constexpr DistanceKernel<Id> make() {
    return {float_distances<Dot, Id>, float_distances<SquaredL2, Id>};
}

template <class Elements, class Id>
constexpr NarrowDistanceKernel<Id> make_narrow() {
    return {distances<Dot, Elements, Id>, distances<SquaredL2, Elements, Id>};
}

template <class Elements>
void widen(const void* row, size_t d, float* out) noexcept {
    constexpr size_t width = lanes<float>;
    const auto* from = static_cast<const unsigned char*>(row);
    size_t i = 0;
    for (; i + width <= d; i += width) store(out + i, Elements::load(from + i * Elements::bits / 8));
    if (i < d) store_first(out + i, load_elements<Elements>(from + i * Elements::bits / 8, d - i), d - i);
}

template <class Elements>
constexpr HalfKernels make_half() {
    return {make_narrow<Elements, std::uint32_t>(), widen<Elements>};
}

}  // namespace

extern const DistanceKernels distance_kernels;
const DistanceKernels distance_kernels{make<std::uint32_t>(),
                                       make<std::int64_t>(),
                                       make_narrow<Bfloat16Elements, std::int64_t>(),
                                       make_narrow<Float16Elements, std::int64_t>(),
                                       make_narrow<Int8Elements, std::int64_t>(),
                                       make_half<Bfloat16Elements>(),
                                       make_half<Float16Elements>()};

}  // namespace polyvec::POLYVEC_ISA
