/// Fixed dimensional encodings: a set of vectors becomes one vector, such that the inner product of a query's and a
/// document's encoding approximates the sum over query tokens of their best inner product with a document token.
///
/// For each of R repetitions, `bits` hyperplanes cut the space into B = 2^bits buckets: bit j of a token's sign word is
/// [<token, plane j> > 0], and each word has its bucket. A bucket's block is the sum (queries) or the mean (documents)
/// of its tokens, projected to `width` columns. The blocks, in the order [repetition][bucket][column], are the
/// encoding, or go through a count sketch into a shorter one. Paper: MUVERA: Multi-Vector Retrieval via Fixed
/// Dimensional Encodings (Dhulipala et al. 2024), section 2.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "polyvec/aligned.hpp"
#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/token_sets.hpp"

namespace polyvec {

/// What each GPU keeps of something on the host: made when it is first asked for.
class DeviceCopies {
public:
    template <class Copy, class Make>
    const Copy& of(int device, Make make) {
        const std::lock_guard lock(mutex_);
        std::shared_ptr<void>& copy = copies_[device];
        if (!copy) copy = std::make_shared<Copy>(make());
        return *static_cast<const Copy*>(copy.get());
    }

private:
    std::mutex mutex_;
    std::map<int, std::shared_ptr<void>> copies_;
};

/// The random matrices of an encoder, checked, copied and laid out for the kernels (see kernels/tables.hpp).
struct FdeMatrices {
    static constexpr const char* op = "fde.Encoder";
    static constexpr std::int64_t max_bits = 16;

    /// hyperplanes (R, d, bits); projections (R, d, width), or absent: blocks then keep the tokens' d columns;
    /// sketch_index int64 and sketch_sign (R * B * width,), or absent: entry i of the long encoding is added, times
    /// its sign, to entry index[i] of the final one. words, sources (B,) int64: the sign word of each bucket, and the
    /// one whose nearest token fills the bucket when it is empty: the same, unless a dialect gets it wrong.
    FdeMatrices(const Array& hyperplanes, const Array& projections, const Array& sketch_index, const Array& sketch_sign,
                std::int64_t final_dim, const Array& words, const Array& sources);

    std::int64_t repetitions, d, bits, width, output_dim;
    Aligned<float> planes, slack;
    Aligned<float> projections;          // null when absent
    Aligned<std::int32_t> sketch_index;  // null when absent
    Aligned<float> sketch_sign;
    Aligned<std::uint32_t> bucket_of;  // a sign word
    Aligned<std::uint32_t> words, sources;
    std::shared_ptr<DeviceCopies> copies = std::make_shared<DeviceCopies>();

    std::int64_t buckets() const { return std::int64_t(1) << bits; }

    /// Columns of a packed matrix of n columns, and where entry i of one of them is.
    static std::int64_t packed_columns(std::int64_t n) { return (n + 15) / 16 * 16; }
    static std::int64_t packed_at(std::int64_t n, std::int64_t column, std::int64_t i, std::int64_t d) {
        const std::int64_t panel = column / 32 * 32, width = std::min<std::int64_t>(32, packed_columns(n) - panel);
        return panel * d + i * width + column % 32;
    }

    /// Entry i of one of all R * bits planes, and of a column of a repetition's projection.
    float plane(std::int64_t column, std::int64_t i) const {
        return planes[packed_at(repetitions * bits, column, i, d)];
    }
    float projection(std::int64_t r, std::int64_t column, std::int64_t i) const {
        return projections[r * d * packed_columns(width) + packed_at(width, column, i, d)];
    }
};

/// out[i] = the encoding of set i; an empty set's is zero. In int8 it is out[i] times scales[i].
struct FdeEncode {
    const char* op;
    const FdeMatrices& matrices;
    TokenSets sets;
    Array out;           // (n, output_dim) float32, float16 or int8
    Array scales;        // (n,) with int8
    bool mean;           // documents: means rather than sums
    bool fill;           // an empty bucket holds the token whose sign word differs from its source in the fewest bits
    bool lowest_bucket;  // ties: the first token of the lowest bucket, rather than the lowest token

    void validate() const {
        sets.validate(op);
        require_dtype(op, sets.tokens, DType::f32);
        require_dim(op, sets.tokens, 1, matrices.d, "the encoder's d");
        require_out(op, out, out.dtype == DType::f16 || out.dtype == DType::i8 ? out.dtype : DType::f32);
        require_ndim(op, out, 2);
        require_dim(op, out, 0, sets.size(), "one row a set");
        require_dim(op, out, 1, matrices.output_dim, "the encoder's output_dim");
        if (out.dtype != DType::i8) return;
        require_out(op, scales, DType::f32);
        require_ndim(op, scales, 1);
        require_dim(op, scales, 0, sets.size(), "one entry a set");
    }
};

/// out[t][r] = the bucket id of token t in repetition r.
struct FdePartition {
    static constexpr const char* op = "fde.Encoder.partition";
    const FdeMatrices& matrices;
    Array tokens;  // (T, d)
    Array out;     // (T, R) int32

    void validate() const {
        require_ndim(op, tokens, 2);
        require_dtype(op, tokens, DType::f32);
        require_contiguous(op, tokens);
        require_dim(op, tokens, 1, matrices.d, "the encoder's d");
        require_out(op, out, DType::i32);
        require_ndim(op, out, 2);
        require_dim(op, out, 0, tokens.dim(0), "one row a token");
        require_dim(op, out, 1, matrices.repetitions, "one column a repetition");
    }
};

inline void require_bucket_ids(const char* op, const Array& ids, const TokenSets& sets, const FdeMatrices& matrices) {
    require_dtype(op, ids, DType::i32);
    require_ndim(op, ids, 2);
    require_contiguous(op, ids);
    require_dim(op, ids, 0, sets.tokens.dim(0), "one row a token");
    require_dim(op, ids, 1, matrices.repetitions, "one column a repetition");
}

/// counts[i] = how many buckets of set i, in all repetitions, hold a token.
struct FdeCountBlocks {
    const char* op;
    const FdeMatrices& matrices;
    TokenSets sets;
    Array ids;     // (T, R) int32, of FdePartition
    Array counts;  // (n,) int64

    void validate() const {
        sets.validate(op);
        require_bucket_ids(op, ids, sets, matrices);
        require_out(op, counts, DType::i64);
        require_ndim(op, counts, 1);
        require_dim(op, counts, 0, sets.size(), "one entry a set");
    }
};

/// The blocks of sums of buckets that hold a token: set i has rows bounds[i] .. bounds[i + 1] of values, which lie in
/// its long encoding at the block of that row. bounds are the running sums of counts.
struct FdeEncodeBlocks {
    const char* op;
    const FdeMatrices& matrices;
    TokenSets sets;
    Array ids;             // (T, R) int32, of FdePartition
    Array bounds;          // (n + 1,) int64
    Array values, blocks;  // (m, width), (m,) int32

    void validate() const {
        sets.validate(op);
        require_dtype(op, sets.tokens, DType::f32);
        require_dim(op, sets.tokens, 1, matrices.d, "the encoder's d");
        require_bucket_ids(op, ids, sets, matrices);
        require_out(op, values, DType::f32);
        require_ndim(op, values, 2);
        require_dim(op, values, 1, matrices.width, "the encoder's width of a block");
        require_out(op, blocks, DType::i32);
        require_ndim(op, blocks, 1);
        require_dim(op, blocks, 0, values.dim(0), "one entry a row of values");
        require_offsets(op, bounds, values.dim(0));
        require_dim(op, bounds, 0, sets.size() + 1, "one entry a set, and the end");
    }
};

/// Ball carving: the first token left of a set takes every token left whose product with it is at least the threshold,
/// and itself, until none is left. ids[t] = the ball of token t, counted within its set; counts[i] = the balls of set
/// i.
struct FdeCarve {
    static constexpr const char* op = "fde.carve";
    TokenSets sets;
    double threshold;
    Array ids;     // (T,) int32
    Array counts;  // (n,) int64

    void validate() const {
        sets.validate(op);
        require_dtype(op, sets.tokens, DType::f32);
        require(threshold == threshold, op, "threshold must not be NaN, got nan");
        require_out(op, ids, DType::i32);
        require_ndim(op, ids, 1);
        require_dim(op, ids, 0, sets.tokens.dim(0), "one entry a token");
        require_out(op, counts, DType::i64);
        require_ndim(op, counts, 1);
        require_dim(op, counts, 0, sets.size(), "one entry a set");
    }
};

/// Row bounds[i] + b of out = the sum of the tokens of ball b of set i. bounds are the running sums of counts.
struct FdeSumBalls {
    static constexpr const char* op = FdeCarve::op;
    TokenSets sets;
    Array ids;     // (T,) int32, of FdeCarve
    Array bounds;  // (n + 1,) int64
    Array out;     // (m, d)

    void validate() const {
        sets.validate(op);
        require_dtype(op, sets.tokens, DType::f32);
        require_dtype(op, ids, DType::i32);
        require_ndim(op, ids, 1);
        require_contiguous(op, ids);
        require_dim(op, ids, 0, sets.tokens.dim(0), "one entry a token");
        require_out(op, out, DType::f32);
        require_ndim(op, out, 2);
        require_dim(op, out, 1, sets.dim(), "the tokens' d");
        require_offsets(op, bounds, out.dim(0));
        require_dim(op, bounds, 0, sets.size() + 1, "one entry a set, and the end");
    }
};

void run(const FdeEncode&, Cpu);
void run(const FdeEncode&, Cuda);
void run(const FdePartition&, Cpu);
void run(const FdePartition&, Cuda);
void run(const FdeCountBlocks&, Cpu);
void run(const FdeCountBlocks&, Cuda);
void run(const FdeEncodeBlocks&, Cpu);
void run(const FdeEncodeBlocks&, Cuda);
void run(const FdeCarve&, Cpu);
void run(const FdeCarve&, Cuda);
void run(const FdeSumBalls&, Cpu);
void run(const FdeSumBalls&, Cuda);

}  // namespace polyvec
