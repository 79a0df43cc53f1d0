#include "polyvec/soft_assign.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

/// The codewords of every subspace as the kernel reads them, and scratch for each worker.
template <class T>
class Codebooks {
public:
    const std::int64_t m, k, dsub, width;

    Codebooks(const Array& codebooks, double temperature, bool hard, int workers)
        : m(codebooks.dim(0)),
          k(codebooks.dim(1)),
          dsub(codebooks.dim(2)),
          width((k + step() - 1) / step() * step()),
          panels_(aligned<T>(m * dsub * width)),
          offsets_(aligned<T>(m * width)),
          scale_(static_cast<T>(2 / temperature)),
          hard_(hard),
          scratch_(aligned<T>(workers * scratch_size())),
          zeros_(dsub) {
        const T* codeword = codebooks.as<const T>();
        std::fill_n(panels_.get(), m * dsub * width, T(0));
        std::fill_n(offsets_.get(), m * width, -std::numeric_limits<T>::infinity());
        for (std::int64_t s = 0; s < m; ++s) {
            for (std::int64_t c = 0; c < k; ++c, codeword += dsub) {
                double square = 0;
                for (std::int64_t i = 0; i < dsub; ++i) {
                    panels_[(s * dsub + i) * width + c] = codeword[i];
                    square += static_cast<double>(codeword[i]) * codeword[i];
                }
                offsets_[s * width + c] = static_cast<T>(-square / temperature);
            }
        }
    }

    SoftCodebook<T> subspace(std::int64_t s) const {
        return {panels_.get() + s * dsub * width,
                offsets_.get() + s * width,
                static_cast<std::size_t>(width),
                static_cast<std::size_t>(dsub),
                scale_,
                hard_};
    }
    T* scratch(int worker) const { return scratch_.get() + worker * scratch_size(); }
    const T* zeros() const { return zeros_.data(); }

private:
    static std::int64_t step() { return static_cast<std::int64_t>(typed<T>(*kernels().soft_assign).step); }
    std::int64_t scratch_size() const {
        return static_cast<std::int64_t>(typed<T>(*kernels().soft_assign).scratch_rows) * width;
    }

    Aligned<T> panels_, offsets_;
    T scale_;
    bool hard_;
    Aligned<T> scratch_;
    std::vector<T> zeros_;
};

/// Rows that are handled together, for all of a subspace: pieces that depend on the sizes alone, so that sums over rows
/// are the same for any number of threads.
struct Pieces {
    std::int64_t n, size, count;

    Pieces(std::int64_t n, std::int64_t m) : n(n) {
        constexpr std::int64_t least = 512, enough = 64;  // rows; pieces of all subspaces together
        count =
            std::clamp<std::int64_t>(enough / std::max<std::int64_t>(m, 1), 1, std::max<std::int64_t>(1, n / least));
        size = (n + count - 1) / count;
    }
    std::int64_t begin(std::int64_t piece) const { return std::min(n, piece * size); }
    std::int64_t rows(std::int64_t piece) const { return std::min(n, (piece + 1) * size) - begin(piece); }
};

template <class T>
void soft_assign(const SoftAssign& op, int num_threads) {
    const std::int64_t m = op.codebooks.dim(0), d = op.x.dim(1);
    const Pieces pieces(op.x.dim(0), m);
    const Codebooks<T> books(op.codebooks, op.temperature, op.hard, workers_for(m * pieces.count, 1, num_threads));
    parallel_for(m * pieces.count, 1, num_threads, [&](std::int64_t task, std::int64_t, int worker) {
        const std::int64_t s = task / pieces.count, piece = task % pieces.count, first = pieces.begin(piece);
        const std::int64_t at = first * d + s * books.dsub;
        typed<T>(*kernels().soft_assign)
            .assign(books.subspace(s), op.x.as<const T>() + at, pieces.rows(piece), d, op.out.as<T>() + at,
                    op.ids.as<std::int64_t>() + first * m + s, m, books.scratch(worker), books.zeros());
    });
}

template <class T>
void soft_assign_gradient(const SoftAssignGradient& op, int num_threads) {
    const std::int64_t m = op.codebooks.dim(0), d = op.x.dim(1);
    const Pieces pieces(op.x.dim(0), m);
    const Codebooks<T> books(op.codebooks, op.temperature, op.hard, workers_for(m * pieces.count, 1, num_threads));
    const std::int64_t panel = (books.dsub + 1) * books.width;
    const Aligned<T> sums = aligned<T>(op.dcodebooks ? m * pieces.count * panel : 0);
    parallel_for(m * pieces.count, 1, num_threads, [&](std::int64_t task, std::int64_t, int worker) {
        const std::int64_t s = task / pieces.count, piece = task % pieces.count;
        const std::int64_t at = pieces.begin(piece) * d + s * books.dsub;
        T* sum = op.dcodebooks ? sums.get() + task * panel : nullptr;
        if (sum) std::fill_n(sum, panel, T(0));
        typed<T>(*kernels().soft_assign)
            .gradient(books.subspace(s), op.x.as<const T>() + at, op.grad.as<const T>() + at, pieces.rows(piece), d,
                      op.dx ? op.dx.as<T>() + at : nullptr, sum, books.scratch(worker), books.zeros());
    });
    if (!op.dcodebooks) return;
    parallel_for(m, 1, num_threads, [&](std::int64_t s, std::int64_t, int) {
        T* total = sums.get() + s * pieces.count * panel;
        for (std::int64_t piece = 1; piece < pieces.count; ++piece)
            std::transform(total, total + panel, total + piece * panel, total, std::plus<T>());
        const T* shares = total + books.dsub * books.width;
        for (std::int64_t c = 0; c < books.k; ++c) {
            for (std::int64_t i = 0; i < books.dsub; ++i) {
                const std::int64_t at = (s * books.k + c) * books.dsub + i;
                op.dcodebooks.as<T>()[at] = total[i * books.width + c] - shares[c] * op.codebooks.as<const T>()[at];
            }
        }
    });
}

}  // namespace

void run(const SoftAssign& op, Cpu cpu) {
    op.x.dtype == DType::f32 ? soft_assign<float>(op, cpu.num_threads) : soft_assign<double>(op, cpu.num_threads);
}

void run(const SoftAssignGradient& op, Cpu cpu) {
    op.x.dtype == DType::f32 ? soft_assign_gradient<float>(op, cpu.num_threads)
                             : soft_assign_gradient<double>(op, cpu.num_threads);
}

}  // namespace polyvec
