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

void run(const PqImprove&, Cpu);

}  // namespace polyvec
