/// Float tokens turned into StoredTokens of fewer bits, for MaxSim, and back.
#pragma once

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/stored_tokens.hpp"

namespace polyvec {

/// Float tokens in fewer bits, as StoredTokens says. Each int8 token takes 127 steps of its largest element.
struct MaxsimPack {
    static constexpr const char* op = "maxsim.pack";
    Array tokens;         // (T, d) float32
    Array codes, scales;  // (T, stored width); (T,) float32 for int8

    void validate() const {
        require_dtype(op, tokens, DType::f32);
        require_ndim(op, tokens, 2);
        require_contiguous(op, tokens);
        require_out(op, codes, codes.dtype);
        const StoredTokens stored{{codes, {}}, scales, {}, {}, {}};
        require(stored.format() != StoredTokens::floats, op, "codes must be uint16, float16 or uint8");
        require_ndim(op, codes, 2);
        require_dim(op, codes, 0, tokens.dim(0), "one row a token");
        require_dim(op, codes, 1, stored.stored_width(tokens.dim(1)), "the stored width");
        if (codes.dtype != DType::u8) return;
        require_out(op, scales, DType::f32);
        require_ndim(op, scales, 1);
        require_dim(op, scales, 0, tokens.dim(0), "one entry a token");
    }
};

/// weights[k] = the (k + 1/2) / n quantile of the elements of token - centroid; the tokens are sampled evenly.
struct MaxsimBuckets {
    static constexpr const char* op = "maxsim.pack";
    Array tokens, centroid_ids, centroids;  // (T, d) float32, (T,) int32, (n, d) float32
    Array weights;                          // (4 or 16,) float32

    void validate() const {
        for (const Array* a : {&tokens, &centroids}) {
            require_dtype(op, *a, DType::f32);
            require_ndim(op, *a, 2);
            require_contiguous(op, *a);
        }
        require_dim(op, centroids, 1, tokens.dim(1), "the same d as docs");
        require_ndim(op, centroid_ids, 1);
        require_dtype(op, centroid_ids, DType::i32);
        require_contiguous(op, centroid_ids);
        require_dim(op, centroid_ids, 0, tokens.dim(0), "one entry a token");
        require_out(op, weights, DType::f32);
        require_ndim(op, weights, 1);
    }
};

/// Each element of token - centroid by the code of the nearest weight; the scale gives the token its length again.
struct MaxsimCompress {
    static constexpr const char* op = "maxsim.pack";
    Array tokens;       // (T, d) float32
    StoredTokens docs;  // residual codes: tokens and scales are written

    void validate() const {
        require_dtype(op, tokens, DType::f32);
        require_ndim(op, tokens, 2);
        require_contiguous(op, tokens);
        require_dim(op, tokens, 0, docs.tokens.dim(0), "one row a token");
        docs.validate(op, tokens.dim(1), DType::f32);
        require_out(op, docs.tokens, DType::u8);
        require_out(op, docs.scales, DType::f32);
    }
};

/// scales[t] = 1 / |centroid + weights of the codes|: the decoded tokens have length 1 then (0 where it is 0).
struct MaxsimResidualScales {
    static constexpr const char* op = "maxsim.from_residuals";
    StoredTokens docs;  // scales are written

    void validate() const {
        docs.validate(op, docs.centroids.dim(1), DType::f32);
        require_out(op, docs.scales, DType::f32);
    }
};

/// out[t] = the token, as StoredTokens says, rounded to float32 once.
struct MaxsimDecode {
    static constexpr const char* op = "PackedTokens.decode";
    StoredTokens docs;
    Array out;  // (T, d) float32

    void validate() const {
        require_out(op, out, DType::f32);
        require_ndim(op, out, 2);
        require_dim(op, out, 0, docs.tokens.dim(0), "one row a token");
        docs.validate(op, out.dim(1), DType::f32);
        require(docs.format() != StoredTokens::floats, op, "docs must be packed in fewer bits");
    }
};

inline void require_bounds(const char* op, const Array& bounds, const StoredTokens& docs) {
    require_ndim(op, bounds, 2);
    require_dtype(op, bounds, DType::f32);
    require_contiguous(op, bounds);
    require_dim(op, bounds, 0, docs.size(), "one row a document");
    require_dim(op, bounds, 1, 3, "three bounds");
}

/// For each document, the largest norms among its tokens t, rounded up, where c is the centroid (if any) and w the rest
/// of what is stored, so that the token is scales[t] * (c + w) when it is decoded:
/// bounds[d] = (|token - decoded|, |scale w|, |token| + |scale c| + |scale w|).
struct MaxsimBounds {
    static constexpr const char* op = "maxsim.pack";
    Array tokens;  // (T, d) float32
    StoredTokens docs;
    Array bounds;  // (docs, 3) float32

    void validate() const {
        require_ndim(op, tokens, 2);
        require_dtype(op, tokens, DType::f32);
        require_contiguous(op, tokens);
        require_dim(op, tokens, 0, docs.tokens.dim(0), "one row a token");
        docs.validate(op, tokens.dim(1), DType::f32);
        require(static_cast<bool>(docs.scales), op, "docs must be int8 or residual codes");
        require_out(op, bounds, DType::f32);
        require_bounds(op, bounds, docs);
    }
};

void run(const MaxsimPack&, Cpu);
void run(const MaxsimBuckets&, Cpu);
void run(const MaxsimCompress&, Cpu);
void run(const MaxsimResidualScales&, Cpu);
void run(const MaxsimBounds&, Cpu);
void run(const MaxsimDecode&, Cpu);

// On a GPU, where values cannot be checked before: an element beyond 65504 is infinite in float16, and an int8 token
// that is not finite has the scale NaN.
void run(const MaxsimPack&, Cuda);
void run(const MaxsimBuckets&, Cuda);
void run(const MaxsimCompress&, Cuda);
void run(const MaxsimResidualScales&, Cuda);
void run(const MaxsimBounds&, Cuda);
void run(const MaxsimDecode&, Cuda);

}  // namespace polyvec
