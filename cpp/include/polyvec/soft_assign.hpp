/// Differentiable product quantisation: codewords by softmax, and the gradients of both paths.
/// Paper: Distill-VQ (Xiao et al. 2022), section 4.1; the hard path is the straight-through estimator.
#pragma once

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"

namespace polyvec {

/// In each subspace, with u a piece of x: p = softmax_j(-|u - c_j|^2 / temperature), id = the codeword of greatest p
/// (the first of equals), and out = c_id when `hard`, else sum_j p_j c_j.
struct SoftAssign {
    static constexpr const char* op = "quantize.soft_assign";
    Array x;          // (n, m * dsub) float
    Array codebooks;  // (m, k, dsub)
    Array out;        // (n, m * dsub)
    Array ids;        // (n, m) int64
    double temperature = 1;
    bool hard = false;

    static void require_inputs(const char* op, const Array& x, const Array& codebooks, double temperature) {
        require_float(op, x);
        require_ndim(op, x, 2);
        require_contiguous(op, x);
        require_ndim(op, codebooks, 3);
        require_dtype(op, codebooks, x.dtype);
        require_contiguous(op, codebooks);
        require(codebooks.dim(1) >= 1, op, "codebooks must have at least 1 codeword, got ", codebooks.dim(1));
        require_dim(op, x, 1, codebooks.dim(0) * codebooks.dim(2), "the width of the codebooks");
        require(temperature > 0, op, "temperature must be above 0, got ", temperature);
    }

    void validate() const {
        require_inputs(op, x, codebooks, temperature);
        require_like(op, out, x);
        require_out(op, ids, DType::i64);
        require_ndim(op, ids, 2);
        require_dim(op, ids, 0, x.dim(0), "one row a row of x");
        require_dim(op, ids, 1, codebooks.dim(0), "one id a subspace");
    }
};

/// Gradients of SoftAssign for `grad`, that of `out`. With dp_j = <grad, c_j>, ds_j = p_j (dp_j - sum p dp) /
/// temperature
///     dx = 2 sum_j ds_j c_j        dc_j = sum over rows of w_j grad + 2 ds_j (u - c_j)
/// where w is 1 at the id and 0 elsewhere when `hard`, else p.
struct SoftAssignGradient {
    static constexpr const char* op = "quantize.soft_assign_gradient";
    Array x, codebooks, grad;
    Array dx, dcodebooks;  // like x, like codebooks; each may be absent
    double temperature = 1;
    bool hard = false;

    void validate() const {
        SoftAssign::require_inputs(op, x, codebooks, temperature);
        require_dtype(op, grad, x.dtype);
        require_contiguous(op, grad);
        require(grad.ndim == 2 && grad.shape == x.shape, op, "grad must have the shape of x ", x.shape_text(), ", got ",
                grad.shape_text());
        if (dx) require_like(op, dx, x);
        if (dcodebooks) require_like(op, dcodebooks, codebooks);
    }
};

void run(const SoftAssign&, Cpu);
void run(const SoftAssignGradient&, Cpu);
void run(const SoftAssign&, Cuda);
void run(const SoftAssignGradient&, Cuda);

}  // namespace polyvec
