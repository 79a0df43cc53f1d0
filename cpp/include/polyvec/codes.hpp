/// Integer codes of vectors: scalar quantisation, and RaBitQ.
///
/// A code holds d numbers c below 2^bits and up to three float32 factors; kernels/tables.hpp (CodeRows) has the layout.
/// It stands for the vector x_j = mid_j + step_j * scale * (c_j - (2^bits - 1) / 2) + mean, where mid and step belong
/// to the codec and scale, mean (and an offset, which only scores know) to the row. Papers: RaBitQ (Gao and Long 2024),
/// section 3; Practical and asymptotically optimal quantization of high-dimensional vectors (Gao et al. 2025), section
/// 3, for more than one bit.
#pragma once

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"

namespace polyvec {

constexpr std::int64_t max_code_dim = 32768;  // a sum of d products of two bytes fits in 32 bits

// Packed codes lie in blocks, word by word: a column holds one word of each code of the block.
constexpr std::int64_t code_block = 16, code_word = 4, code_column = code_block * code_word;

/// What a code consists of.
struct CodeForm {
    int bits = 8;
    bool has_scale = false, has_mean = false, has_offset = false, has_error = false;

    /// Calls visit(bytes) for each plane of d numbers.
    template <class Visit>
    void for_each_plane(std::int64_t d, Visit visit) const {
        for (int w = 8; w >= 1; w /= 2)
            if (bits & w) visit((d * w + 7) / 8);
    }
    std::int64_t number_bytes(std::int64_t d) const {
        std::int64_t bytes = 0;
        for_each_plane(d, [&](std::int64_t plane) { bytes += plane; });
        return bytes;
    }
    int factors() const { return has_scale + has_mean + has_offset; }
    /// What a search reads of a code.
    std::int64_t searched_bytes(std::int64_t d) const { return number_bytes(d) + 4 * factors(); }
    std::int64_t code_size(std::int64_t d) const {
        return searched_bytes(d) + (has_error ? 2 : 0);  // the error is a float16
    }
    /// Columns of a block: planes, each padded to whole words, and factors.
    std::int64_t columns(std::int64_t d) const {
        std::int64_t words = factors();
        for_each_plane(d, [&](std::int64_t plane) { words += (plane + code_word - 1) / code_word; });
        return words;
    }
    std::int64_t block_bytes(std::int64_t d) const { return columns(d) * code_column; }
};

inline void require_vectors_to_code(const char* op, const Array& vectors, const CodeForm& form) {
    require(form.bits >= 1 && form.bits <= 8, op, "bits must be in [1, 8], got ", form.bits);
    require_ndim(op, vectors, 2);
    require_dtype(op, vectors, DType::f32);
    require_contiguous(op, vectors);
    require(vectors.dim(1) >= 1 && vectors.dim(1) <= max_code_dim, op, vectors.name, " must have d in [1, ",
            max_code_dim, "], got ", vectors.dim(1));
}

inline void require_codes(const char* op, const Array& codes, std::int64_t d, const CodeForm& form) {
    require_ndim(op, codes, 2);
    require_dtype(op, codes, DType::u8);
    require_contiguous(op, codes);
    require_dim(op, codes, 1, form.code_size(d), "the code size");
}

/// Blocks of n codes, as CodesPack writes them.
inline void require_code_blocks(const char* op, const Array& blocks, std::int64_t n, std::int64_t d,
                                const CodeForm& form) {
    require_ndim(op, blocks, 4);
    require_dtype(op, blocks, DType::u8);
    require_contiguous(op, blocks);
    require_dim(op, blocks, 0, (n + code_block - 1) / code_block, "a block for every code");
    require_dim(op, blocks, 1, form.columns(d), "the columns of a block");
    require_dim(op, blocks, 2, code_block, "the codes of a block");
    require_dim(op, blocks, 3, code_word, "the bytes of a word");
}

/// (n, d) float32 vectors and (n, code_size) uint8 codes; `codes` or `vectors` is what the op writes.
inline void require_code_pair(const char* op, const Array& vectors, const Array& codes, const CodeForm& form) {
    require_vectors_to_code(op, vectors, form);
    require_codes(op, codes, vectors.dim(1), form);
}

/// One value a dimension, or absent.
inline void require_per_dimension(const char* op, const Array& values, std::int64_t d) {
    if (!values) return;
    require_ndim(op, values, 1);
    require_dtype(op, values, DType::f32);
    require_contiguous(op, values);
    require_dim(op, values, 0, d, "one value a dimension");
}

/// codes[i]: c_j = round((x_j - mid_j) / step_j + (2^bits - 1) / 2), within bounds. With a mean and a scale in the
/// form, mid and step are absent and the row's own smallest and largest value span the numbers. With an offset in the
/// form it is -|decoded|^2 / 2.
struct ScalarEncode {
    static constexpr const char* op = "quantize.ScalarQuantizer.encode";
    Array x, mid, step, codes;
    CodeForm form;

    void validate() const {
        require_code_pair(op, x, codes, form);
        require_out(op, codes, DType::u8);
        require_dim(op, codes, 0, x.dim(0), "one row a row of x");
        require(form.has_scale == form.has_mean && form.has_scale != static_cast<bool>(step) &&
                    static_cast<bool>(mid) == static_cast<bool>(step),
                op, "steps must belong to the codec or to the rows");
        require_per_dimension(op, mid, x.dim(1));
        require_per_dimension(op, step, x.dim(1));
    }
};

/// The numbers closest in angle to x: c - (2^bits - 1) / 2 = u, with scale |x|^2 / <x, u>; the offset is -|x|^2 / 2 and
/// the error |x| sqrt((1 - cos^2) / cos^2 / (d - 1)), cos the cosine of x and u.
struct RabitqEncode {
    static constexpr const char* op = "quantize.RaBitQ.encode";
    Array x, codes;
    CodeForm form;

    void validate() const {
        require_code_pair(op, x, codes, form);
        require_out(op, codes, DType::u8);
        require_dim(op, codes, 0, x.dim(0), "one row a row of x");
        require(form.has_scale && form.has_error && !form.has_mean, op, "codes must have a scale and an error");
    }
};

/// out[i] = the vector that codes[i] stands for.
struct CodesDecode {
    static constexpr const char* op = "quantize.decode";
    Array codes, mid, step, out;
    CodeForm form;

    void validate() const {
        require_code_pair(op, out, codes, form);
        require_out(op, out, DType::f32);
        require_dim(op, out, 0, codes.dim(0), "one row a code");
        require_per_dimension(op, mid, out.dim(1));
        require_per_dimension(op, step, out.dim(1));
    }
};

/// blocks[i / 16][j][i % 16] = word j of what a search reads of codes[i]: its planes, each padded with zeros to whole
/// words of 4 bytes, and its factors; zeros where there is no code. The same bytes at every level.
struct CodesPack {
    static constexpr const char* op = "quantize.pack";
    Array codes, blocks;  // (n, code_size), (ceil(n / 16), columns, 16, 4) uint8
    std::int64_t d = 0;
    CodeForm form;

    void validate() const {
        require_codes(op, codes, d, form);
        require_out(op, blocks, DType::u8);
        require_code_blocks(op, blocks, codes.dim(0), d, form);
    }
};

/// The k codes of greatest value for each query: sum_j w_j (c_j - (2^bits - 1) / 2) * scale + mean_weight * mean +
/// offset, with w rounded to 127 steps of its largest element. The score is value + constant, or constant - 2 value, at
/// least 0.
struct CodesSearch {
    static constexpr const char* op = "quantize.search";
    Array weights;       // (nq, d) float32
    Array means;         // (nq,) float32: mean_weight
    Array constants;     // (nq,) float32
    Array codes;         // rows, or blocks as CodesPack writes them
    std::int64_t n = 0;  // number of codes
    Array include;       // (n,) bool: which codes take part; or absent
    Array scores, ids;
    CodeForm form;
    bool squared = false;

    bool packed() const { return codes.ndim == 4; }
    std::int64_t block_bytes() const { return form.block_bytes(weights.dim(1)); }

    void validate() const {
        require_vectors_to_code(op, weights, form);
        if (packed()) {
            require_code_blocks(op, codes, n, weights.dim(1), form);
        } else {
            require_codes(op, codes, weights.dim(1), form);
            require_dim(op, codes, 0, n, "n rows");
        }
        for (const Array* a : {&means, &constants}) {
            require_ndim(op, *a, 1);
            require_dtype(op, *a, DType::f32);
            require_contiguous(op, *a);
            require_dim(op, *a, 0, weights.dim(0), "one value a query");
        }
        if (include) {
            require_ndim(op, include, 1);
            require_dtype(op, include, DType::boolean);
            require_contiguous(op, include);
            require_dim(op, include, 0, n, "one entry a code");
        }
        require_out(op, scores, DType::f32);
        require_out(op, ids, DType::i64);
        require_ndim(op, scores, 2);
        require_dim(op, scores, 0, weights.dim(0), "one row a query");
        require(scores.dim(1) >= 1, op, "k must be at least 1, got ", scores.dim(1));
        require(ids.ndim == 2 && ids.shape == scores.shape, op, ids.name, " must have the shape of scores ",
                scores.shape_text(), ", got ", ids.shape_text());
    }
};

/// Rotates rows of x in place by fast Hadamard transforms: four times, multiply by a row of `signs`, then transform the
/// first, or in turn the last, 2^floor(log2 d) elements.
struct FastRotation {
    static constexpr const char* op = "quantize.rotate";
    Array signs;  // (4, d) float32: 1 or -1, over the square root of the length where the transform is
    Array x;      // (n, d) float32
    bool inverse = false;

    void validate() const {
        require_ndim(op, signs, 2);
        require_dtype(op, signs, DType::f32);
        require_contiguous(op, signs);
        require_dim(op, signs, 0, 4, "one row a round");
        require_out(op, x, DType::f32);
        require_ndim(op, x, 2);
        require_dim(op, x, 1, signs.dim(1), "the d of signs");
    }
};

/// Divides every row by its norm, in place; zero rows stay. Sums in float64, in order.
struct UnitRows {
    static constexpr const char* op = "quantize.unit_rows";
    Array x;  // (n, d) float32

    void validate() const {
        require_out(op, x, DType::f32);
        require_ndim(op, x, 2);
        require(x.dim(1) >= 1, op, x.name, " must have d >= 1, got 0");
    }
};

void run(const ScalarEncode&, Cpu);
void run(const RabitqEncode&, Cpu);
void run(const CodesDecode&, Cpu);
void run(const CodesPack&, Cpu);
void run(const CodesSearch&, Cpu);
void run(const FastRotation&, Cpu);
void run(const UnitRows&, Cpu);

}  // namespace polyvec
