/// Residual quantisation: a vector becomes a sum of codewords, one of each of m codebooks, the levels.
///
/// Papers: Approximate nearest neighbor search by residual vector quantization (Chen, Guan and Wang 2010), section 3;
/// Additive quantization for extreme vector compression (Babenko and Lempitsky 2014), sections 3.2 (beam search) and
/// 3.3 (search by tables and norms).
#pragma once

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/quantize_pq.hpp"

namespace polyvec {

/// A code of squared distances ends with the squared norm of what it decodes to, as an integer of 24 bits in digits of
/// 8 or 4 bits, the lowest first: as many as levels of their own.
inline std::int64_t rq_norm_digits(const Array& codebooks) {
    return codebooks.dim(1) == 256 ? 3 : 6;
}

/// (m, 16 or 256, d), 16 or 256 codewords a level.
inline void require_rq_codebooks(const char* op, const Array& codebooks, const Array& vectors) {
    require_pq_codebooks(op, codebooks);
    require_ndim(op, vectors, 2);
    require_dtype(op, vectors, DType::f32);
    require_contiguous(op, vectors);
    require_dim(op, vectors, 1, codebooks.dim(2), "the dim of the codebooks");
}

/// Adds levels to sums of codewords: of all ways to add one codeword a level to the sums in a row's beam, the best by
/// <x, sum> - |sum|^2 / 2, found level by level with a beam as wide as `out_scores`; the best first, of equals the one
/// that extends the first.
struct RqExtend {
    static constexpr const char* op = "quantize.ResidualQuantizer.encode";
    Array x, codebooks;  // (n, d), (m, k, d)
    /// (k k m (m - 1) / 2,): for each level in turn the inner products of all codewords of the levels before with its
    /// own, (level * k, k).
    Array products;
    Array beams, scores;          // (n, b, levels so far) uint8, (n, b) float32
    Array out_beams, out_scores;  // (n, kept, m), (n, width): a beam ends with its `kept` best

    void validate() const {
        require_rq_codebooks(op, codebooks, x);
        const std::int64_t m = codebooks.dim(0), k = codebooks.dim(1);
        require_ndim(op, products, 1);
        require_dtype(op, products, DType::f32);
        require_contiguous(op, products);
        require(products.dim(0) >= k * k * m * (m - 1) / 2, op, "products must hold all pairs of levels, got ",
                products.dim(0));
        for (const auto& [codes, values] : {std::pair{&beams, &scores}, std::pair{&out_beams, &out_scores}}) {
            require_dtype(op, *codes, DType::u8);
            require_dtype(op, *values, DType::f32);
            require_contiguous(op, *codes);
            require_contiguous(op, *values);
            require_ndim(op, *codes, 3);
            require_ndim(op, *values, 2);
            require_dim(op, *codes, 0, x.dim(0), "one row a row of x");
            require_dim(op, *values, 0, x.dim(0), "one row a row of x");
        }
        require_out(op, out_beams, DType::u8);
        require_out(op, out_scores, DType::f32);
        require_dim(op, scores, 1, beams.dim(1), "one score a sum");
        require(beams.dim(1) >= 1 && beams.dim(2) < m, op, "beams must have levels to add, got ", beams.shape_text());
        require_dim(op, out_beams, 2, m, "all levels");
        require(out_beams.dim(1) >= 1 && out_beams.dim(1) <= out_scores.dim(1), op,
                "out_beams must fit in a beam, got ", out_beams.shape_text());
        std::int64_t most = beams.dim(1);
        for (std::int64_t level = beams.dim(2); level < m && most < out_scores.dim(1); ++level) most *= k;
        require(out_scores.dim(1) <= most, op, "out_scores must be no wider than there are sums (", most, "), got ",
                out_scores.dim(1));
    }
};

/// out[i] = the sum of the codewords of codes[i], or of its first levels: as many as there are codebooks.
struct RqDecode {
    static constexpr const char* op = "quantize.ResidualQuantizer.decode";
    Array codes, codebooks, out;

    void validate() const {
        require_rq_codebooks(op, codebooks, out);
        require_ndim(op, codes, 2);
        require_dtype(op, codes, DType::u8);
        require_contiguous(op, codes);
        require(codes.dim(1) >= pq_code_size(codebooks), op, "codes must have all levels (", pq_code_size(codebooks),
                " bytes), got ", codes.dim(1));
        require_out(op, out, DType::f32);
        require_dim(op, out, 0, codes.dim(0), "one row a code");
    }
};

/// PqSearch for sums of codewords: a score is <q, sum>, or |q|^2 - 2 <q, sum> + |sum|^2.
struct RqSearch {
    static constexpr const char* op = "quantize.ResidualQuantizer.search";
    Array queries;
    Array codes;         // (n, code_size), or blocks as PqPack writes them
    std::int64_t n = 0;  // number of codes
    Array codebooks, include, scores, ids;
    bool squared = false;
    double norm_step = 0;  // of the squared norms in codes

    /// The shape of what a code's digits choose from: of the levels, and of the norm.
    Array columns() const {
        Array shape = codebooks;
        shape.shape[0] += squared ? rq_norm_digits(codebooks) : 0;
        return shape;
    }

    void validate() const {
        require_rq_codebooks(op, codebooks, queries);
        require_pq_search(op, queries.dim(0), codes, n, columns(), include, scores, ids);
    }
};

void run(const RqExtend&, Cpu);
void run(const RqDecode&, Cpu);
void run(const RqSearch&, Cpu);

}  // namespace polyvec
