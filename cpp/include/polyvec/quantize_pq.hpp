/// Product quantisation: codes of m subspaces, the number of the nearest codeword in each.
///
/// Papers: Product quantization for nearest neighbor search (Jegou, Douze and Schmid 2011), section III; Cache locality
/// is not enough (Andre, Kermarrec and Le Scouarnec 2015), section 4: tables in registers.
#pragma once

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"

namespace polyvec {

/// Bytes of a code: m codes of 8 bits, or of 4 bits, the even subspaces in the low nibbles.
inline std::int64_t pq_code_size(const Array& codebooks) {
    return codebooks.dim(1) == 256 ? codebooks.dim(0) : (codebooks.dim(0) + 1) / 2;
}

/// Codes side by side in a block, and columns of bytes there: 4-bit codes are padded to a multiple of 4 bytes.
inline std::int64_t pq_block(const Array& codebooks) {
    return codebooks.dim(1) == 256 ? 64 : 16;
}
inline std::int64_t pq_columns(const Array& codebooks) {
    return codebooks.dim(1) == 256 ? pq_code_size(codebooks) : (pq_code_size(codebooks) + 3) / 4 * 4;
}

inline void require_pq_codebooks(const char* op, const Array& codebooks) {
    require_ndim(op, codebooks, 3);
    require_dtype(op, codebooks, DType::f32);
    require_contiguous(op, codebooks);
    require(codebooks.dim(1) == 16 || codebooks.dim(1) == 256, op, codebooks.name,
            " must have 16 or 256 codewords a subspace, got ", codebooks.dim(1));
}

/// (n, m * dsub) float32 vectors and (n, code_size) uint8 codes; `codes` or `vectors` is what the op writes.
inline void require_pq_pair(const char* op, const Array& vectors, const Array& codes, const Array& codebooks) {
    require_pq_codebooks(op, codebooks);
    require_ndim(op, vectors, 2);
    require_ndim(op, codes, 2);
    require_dtype(op, vectors, DType::f32);
    require_dtype(op, codes, DType::u8);
    require_contiguous(op, vectors);
    require_contiguous(op, codes);
    require_dim(op, vectors, 1, codebooks.dim(0) * codebooks.dim(2), "the dim of the codebooks");
    require_dim(op, codes, 1, pq_code_size(codebooks), "the code size");
}

/// codes[i] = for each subspace, the codeword nearest to x[i].
struct PqEncode {
    static constexpr const char* op = "quantize.ProductQuantizer.encode";
    Array x, codebooks, codes;

    void validate() const {
        require_pq_pair(op, x, codes, codebooks);
        require_out(op, codes, DType::u8);
        require_dim(op, codes, 0, x.dim(0), "one row a row of x");
    }
};

/// out[i] = the codewords of codes[i], one after the other.
struct PqDecode {
    static constexpr const char* op = "quantize.ProductQuantizer.decode";
    Array codes, codebooks, out;

    void validate() const {
        require_pq_pair(op, out, codes, codebooks);
        require_out(op, out, DType::f32);
        require_dim(op, out, 0, codes.dim(0), "one row a code");
    }
};

/// Adds to each codeword's gradient the pieces of grad whose codes have that codeword, in the order of the rows.
struct PqDecodeGradient {
    static constexpr const char* op = "quantize.decode_gradient";
    Array grad, codes, dcodebooks;

    void validate() const {
        require_pq_pair(op, grad, codes, dcodebooks);
        require_out(op, dcodebooks, DType::f32);
        require_dim(op, codes, 0, grad.dim(0), "one row a row of grad");
    }
};

/// blocks[i / B][j][i % B] = byte j of codes[i], for B = pq_block codes at a time; zeros where there are none.
struct PqPack {
    static constexpr const char* op = "quantize.ProductQuantizer.pack";
    Array codes, blocks;  // (n, code_size), (ceil(n / B), columns, B) uint8

    void validate() const {
        require_dtype(op, codes, DType::u8);
        require_ndim(op, codes, 2);
        require_contiguous(op, codes);
        require_out(op, blocks, DType::u8);
        require_ndim(op, blocks, 3);
        const std::int64_t n = codes.dim(0), b = blocks.dim(2);
        require(b == 16 || b == 64, op, blocks.name, " must have 16 or 64 codes a block, got ", b);
        require(blocks.dim(0) == (n + b - 1) / b && blocks.dim(1) >= codes.dim(1), op, blocks.name,
                " must hold all codes ", codes.shape_text(), ", got ", blocks.shape_text());
    }
};

/// What a search of n codes of such codebooks gets beside its queries.
inline void require_pq_search(const char* op, std::int64_t nq, const Array& codes, std::int64_t n,
                              const Array& codebooks, const Array& include, const Array& scores, const Array& ids) {
    require_contiguous(op, codes);
    require_dtype(op, codes, DType::u8);
    if (codes.ndim == 3) {
        const std::int64_t b = pq_block(codebooks);
        require_dim(op, codes, 0, (n + b - 1) / b, "a block for every code");
        require_dim(op, codes, 1, pq_columns(codebooks), "the columns of the codebooks");
        require_dim(op, codes, 2, b, "the codes of a block");
    } else {
        require_ndim(op, codes, 2);
        require_dim(op, codes, 0, n, "n rows");
        require_dim(op, codes, 1, pq_code_size(codebooks), "the code size");
    }
    if (include) {
        require_ndim(op, include, 1);
        require_contiguous(op, include);
        if (include.dtype == DType::i64) {
            for (std::int64_t i = 0; i < include.dim(0); ++i) {
                const std::int64_t row = include.as<const std::int64_t>()[i];
                require<std::out_of_range>(row >= 0 && row < n, op, "include must be in [0, ", n, "), got ", row,
                                           " at position ", i);
            }
        } else {
            require_dtype(op, include, DType::boolean);
            require_dim(op, include, 0, n, "one entry a code");
        }
    }
    require_out(op, scores, DType::f32);
    require_out(op, ids, DType::i64);
    require_ndim(op, scores, 2);
    require_dim(op, scores, 0, nq, "one row a query");
    require(scores.dim(1) >= 1, op, "k must be at least 1, got ", scores.dim(1));
    require(ids.ndim == 2 && ids.shape == scores.shape, op, ids.name, " must have the shape of scores ",
            scores.shape_text(), ", got ", ids.shape_text());
}

/// The k codes whose decoded vectors score best against each query: inner products, or squared distances.
struct PqSearch {
    static constexpr const char* op = "quantize.ProductQuantizer.search";
    Array queries;
    Array codes;         // (n, code_size), or blocks as PqPack writes them
    std::int64_t n = 0;  // number of codes
    Array codebooks;
    Array include;         // (n,) bool: which codes take part; or int64 rows of those that do; or absent: all
    Array scores, ids;     // (nq, k) float32, int64
    bool squared = false;  // squared distances, lower is better

    void validate() const {
        require_pq_codebooks(op, codebooks);
        require_contiguous(op, queries);
        require_dtype(op, queries, DType::f32);
        require_ndim(op, queries, 2);
        require_dim(op, queries, 1, codebooks.dim(0) * codebooks.dim(2), "the dim of the codebooks");
        require_pq_search(op, queries.dim(0), codes, n, codebooks, include, scores, ids);
    }
};

void run(const PqEncode&, Cpu);
void run(const PqDecode&, Cpu);
void run(const PqDecodeGradient&, Cpu);
void run(const PqPack&, Cpu);
void run(const PqSearch&, Cpu);

}  // namespace polyvec
