// Inner products and squared distances of one query with rows of a table that ids name.
//
// Rows come from anywhere in memory, so the limit is latency. Four rows are computed together, and what the group
// some rows ahead will read is prefetched line by line beside the arithmetic: one group ahead for wide rows, as many
// as fill `lines_ahead` for narrow ones. A row's sum never depends on its place among the ids.
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t group = 4;         // rows computed together
constexpr size_t lines_ahead = 16;  // cache lines on their way: more at a time gain nothing
constexpr size_t line = 64 / sizeof(float);

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

/// J rows at a time, two sums a row; fetches the rows `ahead` meanwhile, where there are any.
template <class Metric, size_t J>
POLYVEC_INLINE void compute(const float* query, const float* const (&row)[J], const float* const (&ahead)[J],
                            size_t fetched, size_t d, float* out) noexcept {
    constexpr size_t width = lanes<float>, pair = 2 * width;
    constexpr size_t lines = pair > line ? pair / line : 1;  // a step is 2 lines, 1, or half a line
    Vec<float> sum[J][2];
    for (size_t j = 0; j < J; ++j) sum[j][0] = sum[j][1] = Vec<float>{};
    size_t i = 0;
    for (; i + pair <= d; i += pair) {
        if (i % line == 0) {
#pragma GCC unroll 1
            for (size_t j = 0; j < fetched; ++j) {
                for (size_t l = 0; l < lines; ++l) prefetch(ahead[j] + i + l * line);
            }
        }
        const Vec<float> q0 = load(query + i), q1 = load(query + i + width);
        for (size_t j = 0; j < J; ++j) {
            sum[j][0] = Metric::step(q0, load(row[j] + i), sum[j][0]);
            sum[j][1] = Metric::step(q1, load(row[j] + i + width), sum[j][1]);
        }
    }
    for (size_t j = 0; j < fetched && i < d; ++j) {
        prefetch(ahead[j] + i);
        prefetch(ahead[j] + d - 1);
    }
    if (i + width <= d) {
        const Vec<float> q = load(query + i);
        for (size_t j = 0; j < J; ++j) sum[j][0] = Metric::step(q, load(row[j] + i), sum[j][0]);
        i += width;
    }
    if (i < d) {
        const Vec<float> q = load_first(query + i, d - i);
        for (size_t j = 0; j < J; ++j) sum[j][1] = Metric::step(q, load_first(row[j] + i, d - i), sum[j][1]);
    }
    for (size_t j = 0; j < J; ++j) out[j] = reduce_add(sum[j][0] + sum[j][1]);
}

template <class Metric, class Id>
void distances(const float* query, const float* rows, const Id* ids, size_t n, size_t d, float* out) noexcept {
    const auto row_of = [&](size_t k) { return rows + static_cast<size_t>(ids[k]) * d; };
    const size_t row_lines = d / line + 1;
    const size_t distance = row_lines * group >= lines_ahead ? group : lines_ahead / row_lines / group * group;
    for (size_t k = 0; k < distance && k < n; ++k) {
        for (size_t i = 0; i < d; i += line) prefetch(row_of(k) + i);
    }
    size_t k = 0;
    for (; k + group <= n; k += group) {
        const float *row[group], *ahead[group];
        const size_t next = k + distance;
        const size_t fetched = next >= n ? 0 : n - next < group ? n - next : group;
        for (size_t j = 0; j < group; ++j) row[j] = row_of(k + j);
        for (size_t j = 0; j < group; ++j) ahead[j] = j < fetched ? row_of(next + j) : nullptr;
        compute<Metric>(query, row, ahead, fetched, d, out + k);
    }
    for (; k < n; ++k) {
        const float* const row[1] = {row_of(k)};
        compute<Metric>(query, row, row, 0, d, out + k);
    }
}

template <class Id>
constexpr DistanceKernel<Id> make() {
    return {distances<Dot, Id>, distances<SquaredL2, Id>};
}

}  // namespace

extern const DistanceKernels distance_kernels;
const DistanceKernels distance_kernels{make<std::uint32_t>(), make<std::int64_t>()};

}  // namespace polyvec::POLYVEC_ISA
