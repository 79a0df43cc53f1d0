// Rows of two bits an element, and what one query is far from those that ids name.
//
// A row of 384 elements is two cache lines: a walk waits for memory, and these are a third of what a byte an element
// takes. A byte holds four codes; each of them times its byte of the query fits a 16-bit lane together with the next
// one's, and the sums of eight chunks fit there, too (4 * 2 * 3 * 127 a chunk).
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t width = POLYVEC_VECTOR_BYTES < bit_chunk ? POLYVEC_VECTOR_BYTES : bit_chunk;
constexpr size_t group = 4;  // rows computed together
constexpr size_t line = 64, most_fetched = 4 * line;

using Bytes = VecOf<uint8_t, width>;
using Words = VecOf<int32_t, width>::type;

POLYVEC_INLINE Bytes::type load_bytes(const uint8_t* p) noexcept {
    return *reinterpret_cast<const Bytes::unaligned*>(p);
}

#if defined(POLYVEC_BYTE_PAIRS)
constexpr size_t chunks_together = 8;
using Sums = VecOf<int16_t, width>::type;

POLYVEC_INLINE Sums multiply(Bytes::type codes, Bytes::type query) noexcept {
    return multiply_byte_pairs(codes, query);
}
POLYVEC_INLINE Words widen(Sums sums) noexcept {
    return multiply_pairs(sums, Sums{} + int16_t{1});
}
#else
constexpr size_t chunks_together = 1;
using Sums = Words;

POLYVEC_INLINE Sums multiply(Bytes::type codes, Bytes::type query) noexcept {
    const auto pairs = (VecOf<int16_t, width>::type)query;
    const auto even = (Vec<uint32_t>)((pairs << 8) >> 8), odd = (Vec<uint32_t>)(pairs >> 8);
    const Vec<uint32_t> low_bytes = broadcast<uint32_t>(0x00ff00ff), words = (Vec<uint32_t>)codes;
    return multiply_pairs(words & low_bytes, even) + multiply_pairs((words >> 8) & low_bytes, odd);
}
POLYVEC_INLINE Words widen(Sums sums) noexcept {
    return sums;
}
#endif

template <size_t J>
POLYVEC_INLINE void products(const uint8_t* query, const uint8_t* const (&row)[J], size_t chunks,
                             Words (&sum)[J]) noexcept {
    const auto code = Bytes::type{} + uint8_t{3};
    for (size_t j = 0; j < J; ++j) sum[j] = Words{};
    for (size_t first = 0; first < chunks; first += chunks_together) {
        const size_t end = chunks - first < chunks_together ? chunks : first + chunks_together;
        Sums part[J];
        for (size_t j = 0; j < J; ++j) part[j] = Sums{};
        for (size_t c = first; c < end; ++c) {
            for (size_t at = 0; at < bit_chunk; at += width) {
                const uint8_t* const q = query + c * bit_chunk_codes + at;
                const Bytes::type q0 = load_bytes(q), q1 = load_bytes(q + bit_chunk),
                                  q2 = load_bytes(q + 2 * bit_chunk), q3 = load_bytes(q + 3 * bit_chunk);
                for (size_t j = 0; j < J; ++j) {
                    const auto x = (VecOf<uint16_t, width>::type)load_bytes(row[j] + c * bit_chunk + at);
                    part[j] += multiply((Bytes::type)x & code, q0) + multiply((Bytes::type)(x >> 2) & code, q1) +
                               multiply((Bytes::type)(x >> 4) & code, q2) + multiply((Bytes::type)(x >> 6) & code, q3);
                }
            }
        }
        for (size_t j = 0; j < J; ++j) sum[j] += widen(part[j]);
    }
}

void distances(const BitQuery& query, const BitRows& rows, const uint32_t* ids, size_t n, float* out) noexcept {
    const auto row_of = [&](size_t k) { return rows.bytes + ids[k] * rows.stride; };
    const auto store_distance = [&](size_t k, const uint8_t* row, int32_t sum) {
        float factors[2];
        __builtin_memcpy(factors, row + rows.chunks * bit_chunk, sizeof factors);
        const auto product = static_cast<float>(2 * sum - query.offset);
        out[k] = query.constant + factors[1] * query.weight + product * factors[0] * query.factor;
    };
    // The walk has asked for these, yet not all may have come: ask once more.
    for (size_t i = 0; i < n; ++i)
        for (size_t at = 0; at < rows.stride && at < most_fetched; at += line) prefetch(row_of(i) + at);
    size_t k = 0;
    for (; k + group <= n; k += group) {
        const uint8_t* const row[group] = {row_of(k), row_of(k + 1), row_of(k + 2), row_of(k + 3)};
        Words sum[group];
        products(query.values, row, rows.chunks, sum);
        const auto sums = reduce_add(sum);
        for (size_t j = 0; j < group; ++j) store_distance(k + j, row[j], sums[j]);
    }
    for (; k < n; ++k) {
        const uint8_t* const row[1] = {row_of(k)};
        Words sum[1];
        products(query.values, row, rows.chunks, sum);
        store_distance(k, row[0], reduce_add(sum[0]));
    }
}

}  // namespace

extern const BitDistanceKernels bit_distance_kernels;
const BitDistanceKernels bit_distance_kernels{distances};

}  // namespace polyvec::POLYVEC_ISA
