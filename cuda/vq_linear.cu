// A linear layer whose weights are product codes, on a GPU, in the plain form: a thread an output, with the codewords
// where a weight would be read. Sums run in a fixed order.
#include "launch.cuh"
#include "polyvec/vq_linear.hpp"

namespace polyvec {
namespace {

struct Layer {
    const std::uint8_t* codes;
    const float* codebooks;
    std::int64_t outputs, code_size, m, k, dsub;

    __device__ std::int64_t width() const { return m * dsub; }
    __device__ std::int64_t label(std::int64_t output, std::int64_t s) const {
        const std::uint8_t* const code = codes + output * code_size;
        return k == 256 ? code[s] : code[s / 2] >> (s % 2 * 4) & 15;
    }
    __device__ const float* codeword(std::int64_t output, std::int64_t s) const {
        return codebooks + (s * k + label(output, s)) * dsub;
    }
};

__global__ void product_kernel(const __grid_constant__ Layer layer, const float* x, const float* bias, float* out,
                               std::int64_t n) {
    for_each_position(n, layer.outputs, [&](std::int64_t i, std::int64_t output) {
        float sum = 0;
        for (std::int64_t s = 0; s < layer.m; ++s) {
            const float* const codeword = layer.codeword(output, s);
            const float* const piece = x + i * layer.width() + s * layer.dsub;
            for (std::int64_t j = 0; j < layer.dsub; ++j) sum = fmaf(piece[j], codeword[j], sum);
        }
        out[i * layer.outputs + output] = bias ? bias[output] + sum : sum;
    });
}

__global__ void dx_kernel(const __grid_constant__ Layer layer, const float* grad, float* dx, std::int64_t n) {
    for_each_position(n, layer.width(), [&](std::int64_t i, std::int64_t at) {
        const std::int64_t s = at / layer.dsub, j = at % layer.dsub;
        float sum = 0;
        for (std::int64_t o = 0; o < layer.outputs; ++o)
            sum = fmaf(grad[i * layer.outputs + o], layer.codeword(o, s)[j], sum);
        dx[i * layer.width() + at] = sum;
    });
}

__global__ void dcodebooks_kernel(const __grid_constant__ Layer layer, const float* x, const float* grad,
                                  float* dcodebooks, std::int64_t n) {
    for_each_position(layer.m * layer.k, layer.dsub, [&](std::int64_t codeword, std::int64_t j) {
        const std::int64_t s = codeword / layer.k, c = codeword % layer.k;
        float sum = 0;
        for (std::int64_t o = 0; o < layer.outputs; ++o) {
            if (layer.label(o, s) != c) continue;
            for (std::int64_t i = 0; i < n; ++i)
                sum = fmaf(grad[i * layer.outputs + o], x[i * layer.width() + s * layer.dsub + j], sum);
        }
        dcodebooks[codeword * layer.dsub + j] = sum;
    });
}

Layer layer_of(const Array& codes, const Array& codebooks) {
    return {codes.as<const std::uint8_t>(),
            codebooks.as<const float>(),
            codes.dim(0),
            codes.dim(1),
            codebooks.dim(0),
            codebooks.dim(1),
            codebooks.dim(2)};
}

}  // namespace

void run(const VqLinear& op, Cuda cuda) {
    const std::int64_t n = op.x.dim(0);
    launch_rows(op.op, cuda, n, op.codes.dim(0), product_kernel, layer_of(op.codes, op.codebooks),
                op.x.as<const float>(), op.bias.as<const float>(), op.out.as<float>(), n);
}

void run(const VqLinearGradient& op, Cuda cuda) {
    const std::int64_t n = op.x.dim(0);
    const Layer layer = layer_of(op.codes, op.codebooks);
    const auto* grad = op.grad.as<const float>();
    if (op.dx) launch_rows(op.op, cuda, n, op.x.dim(1), dx_kernel, layer, grad, op.dx.as<float>(), n);
    if (op.dcodebooks)
        launch_rows(op.op, cuda, layer.m * layer.k, layer.dsub, dcodebooks_kernel, layer, op.x.as<const float>(), grad,
                    op.dcodebooks.as<float>(), n);
}

}  // namespace polyvec
