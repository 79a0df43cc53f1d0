/// StoredTokens: token sets as floats, or in fewer bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/token_sets.hpp"

namespace polyvec {

/// Rows of `tokens` are, for tokens of width d:
///   float32, float64   d elements; on a GPU bfloat16 and float16, too
///   bfloat16           d uint16, to an even number
///   float16            d float16
///   int8               d uint8 to a multiple of 4: scales[t] * (element - 128)
///   centroid           one uint16: the token is centroids[it]
///   residual           d codes of 4 or 2 bits to a multiple of 4, the first in the highest bits of a byte, each with
///                      its lowest bit first: scales[t] * (centroids[centroid_ids[t]] + weights[code]), each weight
///                      rounded to a multiple of weight_unit
struct StoredTokens : TokenSets {
    Array scales;        // (T,) float32
    Array centroid_ids;  // (T,) int32
    Array centroids;     // (n, d) float32
    Array weights;       // (16 or 4,) float32

    enum Format { floats, bfloat16, float16, int8, centroid, residual4, residual2 };

    Format format() const {
        switch (tokens.dtype) {
            case DType::u16:
                return centroids ? centroid : bfloat16;
            case DType::bf16:
                return bfloat16;
            case DType::f16:
                return float16;
            case DType::u8:
                return !centroids ? int8 : weights.dim(0) == 16 ? residual4 : residual2;
            default:
                return floats;
        }
    }

    /// Elements of `tokens` that a row of width d takes.
    std::int64_t stored_width(std::int64_t d) const {
        const std::int64_t quads = (d + 3) / 4;
        switch (format()) {
            case bfloat16:
                return tokens.dtype == DType::bf16 ? d : (d + 1) / 2 * 2;
            case int8:
                return quads * 4;
            case centroid:
                return 1;
            case residual4:
                return quads * 2;
            case residual2:
                return quads;
            default:
                return d;
        }
    }

    void validate(const char* op, std::int64_t d, DType queries) const {
        if (format() == floats) {
            TokenSets::validate(op);
            require_dtype(op, tokens, queries);
            require_dim(op, tokens, 1, d, "the same d as queries");
            return;
        }
        require<TypeError>(queries != DType::f64, op, "queries must be float32, got ", name_of(queries));
        if (tokens.dtype == DType::bf16) require_float_or_half(op, tokens);
        require_ndim(op, tokens, 2);
        require_contiguous(op, tokens);
        const std::int64_t n = tokens.dim(0);
        require_offsets(op, offsets, n);
        if (tokens.dtype == DType::u8) {
            require_entries(op, scales, DType::f32, n);
            require(d <= most_int8, op, "docs must have a width of at most ", most_int8, " in int8 and residuals, got ",
                    d);
        }
        if (centroids) {
            require_ndim(op, centroids, 2);
            require_dtype(op, centroids, DType::f32);
            require_contiguous(op, centroids);
            require_dim(op, centroids, 1, d, "the same d as queries");
        }
        if (centroids && format() != centroid) {
            require_entries(op, centroid_ids, DType::i32, n);
            require_ndim(op, weights, 1);
            require(weights.dim(0) == 16 || weights.dim(0) == 4, op, "bucket_weights must have 4 or 16 entries, got ",
                    weights.dim(0));
            require_entries(op, weights, DType::f32, weights.dim(0));
        }
        require_dim(op, tokens, 1, stored_width(d), "the same d as queries, as stored");
    }

private:
    static void require_entries(const char* op, const Array& a, DType dtype, std::int64_t n) {
        require_ndim(op, a, 1);
        require_dtype(op, a, dtype);
        require_contiguous(op, a);
        require_dim(op, a, 0, n, "one entry a token");
    }
};

/// Products are divided by a unit: weights that would need a smaller one count as 0.
constexpr float least_weight_unit = 0x1p-116f;

/// What weights are rounded to multiples of: the largest has 127.
inline float weight_unit(const float* weights, std::int64_t n) {
    float largest = 0;
    for (std::int64_t k = 0; k < n; ++k) largest = std::fmax(largest, std::fabs(weights[k]));
    const float unit = largest / 127;
    return unit > least_weight_unit ? unit : 1;
}

}  // namespace polyvec
