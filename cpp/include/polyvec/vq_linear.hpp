/// A linear layer whose weights are product codes: products with the decoded weights, which are never decoded.
///
/// Paper: Jegou, Douze and Schmid (2011), section III.A: a product with a code is a sum of products with codewords.
#pragma once

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/quantize_pq.hpp"

namespace polyvec {

/// out[i, o] = <x[i], the vector that codes[o] stands for> + bias[o].
struct VqLinear {
    static constexpr const char* op = "quantize.vq_linear";
    Array x, codes, codebooks;  // (n, d), (o, code_size), (m, 16 or 256, d / m)
    Array bias;                 // (o,), or absent
    Array out;                  // (n, o)

    void validate() const {
        require_pq_pair(op, x, codes, codebooks);
        if (bias) {
            require_ndim(op, bias, 1);
            require_dtype(op, bias, DType::f32);
            require_contiguous(op, bias);
            require_dim(op, bias, 0, codes.dim(0), "one value a code");
        }
        require_out(op, out, DType::f32);
        require_ndim(op, out, 2);
        require_dim(op, out, 0, x.dim(0), "one row a row of x");
        require_dim(op, out, 1, codes.dim(0), "one column a code");
    }
};

/// The gradients of VqLinear for x and for the codebooks, each unless it is absent.
struct VqLinearGradient {
    static constexpr const char* op = "quantize.vq_linear_gradient";
    Array x, codes, codebooks;
    Array grad;            // (n, o)
    Array dx, dcodebooks;  // as x and codebooks

    void validate() const {
        require_pq_pair(op, x, codes, codebooks);
        require_ndim(op, grad, 2);
        require_dtype(op, grad, DType::f32);
        require_contiguous(op, grad);
        require_dim(op, grad, 0, x.dim(0), "one row a row of x");
        require_dim(op, grad, 1, codes.dim(0), "one column a code");
        for (const auto& [like, out] : {std::pair{&x, &dx}, std::pair{&codebooks, &dcodebooks}}) {
            if (!*out) continue;
            require_out(op, *out, DType::f32);
            require(out->ndim == like->ndim && out->shape == like->shape, op, out->name, " must have the shape of ",
                    like->name, " ", like->shape_text(), ", got ", out->shape_text());
        }
    }
};

void run(const VqLinear&, Cpu);
void run(const VqLinearGradient&, Cpu);
void run(const VqLinear&, Cuda);
void run(const VqLinearGradient&, Cuda);

}  // namespace polyvec
