#include "polyvec/quantize_pq_loss.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

std::uint8_t label_of(const std::uint8_t* code, std::int64_t s, std::int64_t k) {
    return k == 256 ? code[s] : static_cast<std::uint8_t>(code[s / 2] >> (s % 2 * 4) & 15);
}

double product(const float* x, const float* y, std::int64_t n) {
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * y[i];
    return sum;
}

/// Solves a x = b in place of b, a (n, n) symmetric and positive, by its lower triangle, which it overwrites.
void solve(std::vector<double>& a, std::vector<double>& b) {
    const std::size_t n = b.size();
    for (std::size_t j = 0; j < n; ++j) {
        double* row = &a[j * n];
        for (std::size_t i = 0; i < j; ++i)
            row[i] = (row[i] - std::inner_product(row, row + i, &a[i * n], 0.0)) / a[i * n + i];
        row[j] = std::sqrt(row[j] - std::inner_product(row, row + j, row, 0.0));
        b[j] = (b[j] - std::inner_product(row, row + j, b.begin(), 0.0)) / row[j];
    }
    for (std::size_t j = n; j-- > 0;) {
        b[j] /= a[j * n + j];
        for (std::size_t i = 0; i < j; ++i) b[i] -= a[j * n + i] * b[j];
    }
}

}  // namespace

void run(const PqImprove& op, Cpu cpu) {
    constexpr std::int64_t rows_at_once = 8;  // whose products stay in the level-2 cache
    const std::int64_t m = op.codebooks.dim(0), k = op.codebooks.dim(1), dsub = op.codebooks.dim(2), d = m * dsub;
    const std::int64_t code_size = op.codes.dim(1);
    const auto* codebooks = op.codebooks.as<const float>();
    const std::int64_t stride = m * k + 16;  // rows a multiple of 4096 bytes apart would share few lines of the cache
    const Aligned<float> squares = aligned<float>(m * k);
    for (std::int64_t c = 0; c < m * k; ++c) {
        const float* codeword = codebooks + c * dsub;
        squares[c] = static_cast<float>(std::inner_product(codeword, codeword + dsub, codeword, 0.0));
    }
    std::vector<std::int32_t> subspaces(m);
    std::iota(subspaces.begin(), subspaces.end(), 0);
    parallel_for(op.x.dim(0), 4 * rows_at_once, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        const Aligned<float> products = aligned<float>(rows_at_once * stride);
        std::vector<std::uint8_t> labels(m);
        for (std::int64_t first = begin; first < end; first += rows_at_once) {
            const std::int64_t count = std::min(rows_at_once, end - first);
            const float* x = op.x.as<const float>() + first * d;
            kernels().pq->entries({x, static_cast<std::size_t>(count), codebooks, static_cast<std::size_t>(m),
                                   static_cast<std::size_t>(k), static_cast<std::size_t>(dsub), false, subspaces.data(),
                                   subspaces.size(), static_cast<std::size_t>(stride)},
                                  products.get());
            for (std::int64_t i = 0; i < count; ++i) {
                const double square = std::inner_product(x + i * d, x + (i + 1) * d, x + i * d, 0.0);
                if (!(square > 0)) continue;
                std::uint8_t* code = op.codes.as<std::uint8_t>() + (first + i) * code_size;
                for (std::int64_t s = 0; s < m; ++s) labels[s] = label_of(code, s, k);
                const PqLoss loss{products.get() + i * stride, squares.get(),
                                  static_cast<std::size_t>(m), static_cast<std::size_t>(k),
                                  static_cast<float>(square),  static_cast<float>(op.weight / square)};
                kernels().pq_loss->improve(loss, PqImprove::most_passes, labels.data());
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

void run(const PqMove& op, Cpu cpu) {
    const std::int64_t m = op.codebooks.dim(0), k = op.codebooks.dim(1), dsub = op.codebooks.dim(2);
    const std::int64_t n = op.pieces.dim(1), code_size = op.codes.dim(1);
    auto* codebooks = op.codebooks.as<float>();
    std::vector<double> squares(n), along(n);  // |x|^2 and <x, x - decoded>
    std::vector<std::uint8_t> labels(n);
    std::vector<std::int64_t> rows(n);
    const auto piece = [&](std::int64_t s, std::int64_t i) { return op.pieces.as<const float>() + (s * n + i) * dsub; };
    const auto for_each_row = [&](const auto& body) {
        parallel_for(n, std::max<std::int64_t>(1, (1 << 15) / dsub), cpu.num_threads,
                     [&](std::int64_t begin, std::int64_t end, int) {
                         for (std::int64_t i = begin; i < end; ++i) body(i);
                     });
    };
    const auto take_labels = [&](std::int64_t s) {
        for_each_row(
            [&](std::int64_t i) { labels[i] = label_of(op.codes.as<const std::uint8_t>() + i * code_size, s, k); });
    };
    const auto add_along = [&](std::int64_t s, double sign) {
        for_each_row([&](std::int64_t i) {
            along[i] += sign * product(piece(s, i), codebooks + (s * k + labels[i]) * dsub, dsub);
        });
    };
    for (std::int64_t s = 0; s < m; ++s) {
        take_labels(s);
        for_each_row([&](std::int64_t i) {
            const double square = product(piece(s, i), piece(s, i), dsub);
            squares[i] += square;
            along[i] += square;
        });
        add_along(s, -1);
    }
    for (std::int64_t s = 0; s < m; ++s) {
        take_labels(s);
        add_along(s, 1);
        std::vector<std::int64_t> begin(k + 2);  // of each codeword's rows; counted two ahead, filled one ahead
        for (const std::uint8_t label : labels) ++begin[label + 2];
        std::partial_sum(begin.begin(), begin.end(), begin.begin());
        for (std::int64_t i = 0; i < n; ++i) rows[begin[labels[i] + 1]++] = i;
        parallel_for(k, 8, cpu.num_threads, [&](std::int64_t first, std::int64_t last, int) {
            std::vector<double> left(dsub * dsub), right(dsub), u(dsub);
            for (std::int64_t c = first; c < last; ++c) {
                if (begin[c] == begin[c + 1]) continue;
                std::fill(left.begin(), left.end(), 0.0);
                std::fill(right.begin(), right.end(), 0.0);
                for (std::int64_t r = begin[c]; r < begin[c + 1]; ++r) {
                    const std::int64_t i = rows[r];
                    const double weight = squares[i] > 0 ? op.weight / squares[i] : 0, pull = 1 + weight * along[i];
                    std::copy_n(piece(s, i), dsub, u.begin());
                    for (std::int64_t j = 0; j < dsub; ++j) {
                        const double weighted = weight * u[j];
                        for (std::int64_t l = 0; l <= j; ++l) left[j * dsub + l] += weighted * u[l];
                        right[j] += pull * u[j];
                    }
                }
                for (std::int64_t j = 0; j < dsub; ++j)
                    left[j * dsub + j] += static_cast<double>(begin[c + 1] - begin[c]);
                solve(left, right);
                std::copy(right.begin(), right.end(), codebooks + (s * k + c) * dsub);
            }
        });
        add_along(s, -1);
    }
}

}  // namespace polyvec
