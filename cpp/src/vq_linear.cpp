#include "polyvec/vq_linear.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t group_bytes = 64;    // of a code that are looked up together: their tables stay in the cache
constexpr std::int64_t rows_at_once = 256;  // codes whose bytes stay in the cache from group to group
constexpr std::int64_t inputs_at_once = 4;  // rows of x that share a pass over the codes

/// The shapes of a layer.
struct Layer {
    explicit Layer(const Array& codes, const Array& codebooks)
        : m(codebooks.dim(0)),
          k(codebooks.dim(1)),
          dsub(codebooks.dim(2)),
          outputs(codes.dim(0)),
          code_size(codes.dim(1)),
          nibbles(k == 16),
          groups((code_size + group_bytes - 1) / group_bytes) {}

    /// Floats of an input's tables, those that pad the last byte of 4-bit codes as well.
    std::int64_t stride() const { return code_size * (nibbles ? 32 : 256); }

    /// The subspaces [first, second) of group g.
    std::pair<std::int64_t, std::int64_t> subspaces(std::int64_t g) const {
        const std::int64_t each = group_bytes * (nibbles ? 2 : 1);
        return {g * each, std::min(m, (g + 1) * each)};
    }

    std::int64_t m, k, dsub, outputs, code_size;
    bool nibbles;
    std::int64_t groups;
};

int label(const std::uint8_t* code, std::int64_t s, bool nibbles) {
    return nibbles ? code[s / 2] >> (s % 2 * 4) & 15 : code[s];
}

/// Writes what the codewords of group g add to a product, for `count` inputs from `first` on.
void build_tables(const VqLinear& op, const Layer& layer, std::int64_t g, std::int64_t first, std::int64_t count,
                  float* tables, int num_threads) {
    constexpr std::int64_t at_once = 16;
    const auto [begin, end] = layer.subspaces(g);
    const std::int64_t first_subspace = begin;
    parallel_for(end - begin, at_once, num_threads, [&](std::int64_t from, std::int64_t to, int) {
        std::int32_t subspaces[at_once];
        std::iota(subspaces, subspaces + (to - from), static_cast<std::int32_t>(first_subspace + from));
        kernels().pq->entries(
            {op.x.as<const float>() + first * layer.m * layer.dsub, static_cast<std::size_t>(count),
             op.codebooks.as<const float>(), static_cast<std::size_t>(layer.m), static_cast<std::size_t>(layer.k),
             static_cast<std::size_t>(layer.dsub), false, subspaces, static_cast<std::size_t>(to - from),
             static_cast<std::size_t>(layer.stride())},
            tables);
    });
}

}  // namespace

void run(const VqLinear& op, Cpu cpu) {
    const Layer layer(op.codes, op.codebooks);
    const std::int64_t steps_of_group = layer.nibbles ? group_bytes / 4 : group_bytes;
    const Aligned<float> tables = aligned<float>(inputs_at_once * layer.stride());
    if (layer.nibbles) std::fill_n(tables.get(), inputs_at_once * layer.stride(), 0.0f);
    const auto score = layer.nibbles ? kernels().pq->score_nibbles : kernels().pq->score_bytes;
    std::vector<std::int64_t> ids(rows_at_once);
    std::iota(ids.begin(), ids.end(), 0);
    const std::int64_t steps = layer.nibbles ? (layer.code_size + 3) / 4 : layer.code_size;
    std::vector<std::int32_t> all_steps(steps);
    std::iota(all_steps.begin(), all_steps.end(), 0);
    for (std::int64_t first = 0; first < op.x.dim(0); first += inputs_at_once) {
        const std::int64_t count = std::min(inputs_at_once, op.x.dim(0) - first);
        for (std::int64_t i = 0; i < count; ++i) {
            float* out = op.out.as<float>() + (first + i) * layer.outputs;
            if (op.bias) {
                std::copy_n(op.bias.as<const float>(), layer.outputs, out);
            } else {
                std::fill_n(out, layer.outputs, 0.0f);
            }
        }
        for (std::int64_t g = 0; g < layer.groups; ++g) {
            build_tables(op, layer, g, first, count, tables.get(), cpu.num_threads);
            const std::int64_t step = g * steps_of_group;
            parallel_for(layer.outputs, rows_at_once, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
                float part[rows_at_once];
                for (std::int64_t i = 0; i < count; ++i) {
                    const PqScores scores{op.codes.as<const std::uint8_t>() + begin * layer.code_size,
                                          static_cast<std::size_t>(layer.code_size),
                                          1,
                                          tables.get() + i * layer.stride(),
                                          all_steps.data() + step,
                                          static_cast<std::size_t>(std::min(steps_of_group, steps - step))};
                    score(scores, ids.data(), static_cast<std::size_t>(end - begin), part);
                    float* out = op.out.as<float>() + (first + i) * layer.outputs + begin;
                    for (std::int64_t o = 0; o < end - begin; ++o) out[o] += part[o];
                }
            });
        }
    }
}

void run(const VqLinearGradient& op, Cpu cpu) {
    const Layer layer(op.codes, op.codebooks);
    const std::int64_t n = op.x.dim(0), d = layer.m * layer.dsub, k = layer.k, dsub = layer.dsub;
    const auto *codes = op.codes.as<const std::uint8_t>(), *end_of_codes = codes + layer.outputs * layer.code_size;
    if (op.dcodebooks) std::fill_n(op.dcodebooks.as<float>(), layer.m * k * dsub, 0.0f);
    // A thread has a group of subspaces: what it writes is its own.
    parallel_for(layer.groups, 1, cpu.num_threads, [&](std::int64_t g, std::int64_t, int) {
        const auto [begin, end] = layer.subspaces(g);
        std::vector<float> sums((end - begin) * k);  // of the gradients of the outputs that have a codeword
        for (std::int64_t i = 0; i < n; ++i) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            const float* grad = op.grad.as<const float>() + i * layer.outputs;
            for (const std::uint8_t* code = codes; code != end_of_codes; code += layer.code_size, ++grad) {
                for (std::int64_t s = begin; s < end; ++s)
                    sums[(s - begin) * k + label(code, s, layer.nibbles)] += *grad;
            }
            for (std::int64_t s = begin; s < end; ++s) {
                const float *sum = sums.data() + (s - begin) * k, *x = op.x.as<const float>() + i * d + s * dsub;
                const float* codeword = op.codebooks.as<const float>() + s * k * dsub;
                float* dx = op.dx ? op.dx.as<float>() + i * d + s * dsub : nullptr;
                if (dx) std::fill_n(dx, dsub, 0.0f);
                float* dcodeword = op.dcodebooks ? op.dcodebooks.as<float>() + s * k * dsub : nullptr;
                for (std::int64_t c = 0; c < k; ++c, codeword += dsub) {
                    for (std::int64_t j = 0; dx && j < dsub; ++j) dx[j] += sum[c] * codeword[j];
                    for (std::int64_t j = 0; dcodeword && j < dsub; ++j) dcodeword[c * dsub + j] += sum[c] * x[j];
                }
            }
        }
    });
}

}  // namespace polyvec
