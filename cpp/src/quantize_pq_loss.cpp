#include "polyvec/quantize_pq_loss.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "tables.hpp"

namespace polyvec {

void run(const PqImprove& op, Cpu cpu) {
    constexpr std::int64_t rows_at_once = 8;  // whose products stay in the level-2 cache
    const std::int64_t m = op.codebooks.dim(0), k = op.codebooks.dim(1), dsub = op.codebooks.dim(2), d = m * dsub;
    const std::int64_t code_size = op.codes.dim(1);
    const auto* codebooks = op.codebooks.as<const float>();
    const Aligned<float> squares = aligned<float>(m * k);
    for (std::int64_t c = 0; c < m * k; ++c) {
        const float* codeword = codebooks + c * dsub;
        squares[c] = static_cast<float>(std::inner_product(codeword, codeword + dsub, codeword, 0.0));
    }
    std::vector<std::int32_t> subspaces(m);
    std::iota(subspaces.begin(), subspaces.end(), 0);
    parallel_for(op.x.dim(0), 4 * rows_at_once, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        const Aligned<float> products = aligned<float>(rows_at_once * m * k);
        std::vector<std::uint8_t> labels(m);
        for (std::int64_t first = begin; first < end; first += rows_at_once) {
            const std::int64_t count = std::min(rows_at_once, end - first);
            const float* x = op.x.as<const float>() + first * d;
            kernels().pq->entries({x, static_cast<std::size_t>(count), codebooks, static_cast<std::size_t>(m),
                                   static_cast<std::size_t>(k), static_cast<std::size_t>(dsub), false, subspaces.data(),
                                   subspaces.size(), static_cast<std::size_t>(m * k)},
                                  products.get());
            for (std::int64_t i = 0; i < count; ++i) {
                const double square = std::inner_product(x + i * d, x + (i + 1) * d, x + i * d, 0.0);
                if (!(square > 0)) continue;
                std::uint8_t* code = op.codes.as<std::uint8_t>() + (first + i) * code_size;
                for (std::int64_t s = 0; s < m; ++s)
                    labels[s] = k == 256 ? code[s] : static_cast<std::uint8_t>(code[s / 2] >> (s % 2 * 4) & 15);
                const PqLoss loss{products.get() + i * m * k,  squares.get(),
                                  static_cast<std::size_t>(m), static_cast<std::size_t>(k),
                                  static_cast<float>(square),  static_cast<float>(op.weight / square)};
                for (int pass = 0; pass < PqImprove::most_passes && kernels().pq_loss->improve(loss, labels.data());)
                    ++pass;
                if (k == 256) {
                    std::copy(labels.begin(), labels.end(), code);
                } else {
                    std::fill_n(code, code_size, std::uint8_t{0});
                    for (std::int64_t s = 0; s < m; ++s)
                        code[s / 2] = static_cast<std::uint8_t>(code[s / 2] | labels[s] << (s % 2 * 4));
                }
            }
        }
    });
}

}  // namespace polyvec
