/// Product codes by the score-aware loss: of what a vector loses, the part along it counts more than the rest.
///
/// Paper: Accelerating large-scale inference with anisotropic vector quantization (Guo et al. 2020), sections 3.2 (the
/// loss) and 4.2 (product codes by coordinate descent).
#pragma once

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/quantize_pq.hpp"

namespace polyvec {

/// Improves codes[i], which must be codes already, by coordinate descent on |x - decoded|^2 + weight <x, x -
/// decoded>^2 / |x|^2, until no label changes or a number of passes is over.
struct PqImprove {
    static constexpr const char* op = "quantize.ProductQuantizer.encode";
    static constexpr int most_passes = 10;
    Array x, codebooks, codes;
    double weight = 0;

    void validate() const {
        require_pq_pair(op, x, codes, codebooks);
        require_out(op, codes, DType::u8);
        require_dim(op, codes, 0, x.dim(0), "one row a row of x");
        require(weight >= 0, op, "weight must be at least 0, got ", weight);
    }
};

/// Moves the codebooks, one after the other, to where the same loss of the codes is least. With w = weight / |x|^2, the
/// codewords of the other subspaces as they are and a = |x|^2 - the sum of their <u, c>, a codeword minimises the sum
/// over its pieces u of |u - c|^2 + w (a - <u, c>)^2. A codeword without pieces stays. Sums in float64, in the order of
/// the rows.
struct PqMove {
    static constexpr const char* op = "quantize.ProductQuantizer.fit";
    Array pieces;  // (m, n, dsub): those of a subspace lie together
    Array codes, codebooks;
    double weight = 0;

    void validate() const {
        require_pq_codebooks(op, codebooks);
        require_out(op, codebooks, DType::f32);
        require_ndim(op, pieces, 3);
        require_dtype(op, pieces, DType::f32);
        require_contiguous(op, pieces);
        require_dim(op, pieces, 0, codebooks.dim(0), "the m of the codebooks");
        require_dim(op, pieces, 2, codebooks.dim(2), "the dsub of the codebooks");
        require_ndim(op, codes, 2);
        require_dtype(op, codes, DType::u8);
        require_contiguous(op, codes);
        require_dim(op, codes, 0, pieces.dim(1), "one row a vector");
        require_dim(op, codes, 1, pq_code_size(codebooks), "the code size");
        require(weight >= 0, op, "weight must be at least 0, got ", weight);
    }
};

void run(const PqImprove&, Cpu);
void run(const PqMove&, Cpu);

}  // namespace polyvec
