// Softmax over the codewords of one subspace, and its gradients.
//
// Lanes are codewords, and `rows` vectors share each load of them. What is kept of a row is one number a codeword, in
// scratch that stays in the first-level cache: its logit, then its probability, then its share of the gradient.
#include "exp.hpp"
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t rows = 4;          // vectors at a time
constexpr size_t columns = 2;       // registers of codewords: rows * columns sums hide the latency of an addition
constexpr size_t step_of_dims = 2;  // elements of a result whose sums over codewords run side by side

template <class T>
constexpr size_t step = columns * lanes<T>;

/// The vectors of a block; those beyond its end are zero.
template <class T>
struct Block {
    const T* row[rows];

    POLYVEC_INLINE Block(const T* x, size_t count, size_t stride, const T* zeros) noexcept {
        for (size_t j = 0; j < rows; ++j) row[j] = j < count ? x + j * stride : zeros;
    }
};

/// out[j] = <row j, codeword>, each handed to finish(product, column) first.
template <class T, class Finish>
POLYVEC_INLINE void products(const SoftCodebook<T>& book, const Block<T>& block, T* out, Finish finish) noexcept {
    for (size_t c = 0; c < book.width; c += step<T>) {
        Vec<T> sum[rows][columns] = {};
        for (size_t i = 0; i < book.dsub; ++i) {
            Vec<T> codeword[columns];
            for (size_t v = 0; v < columns; ++v) codeword[v] = load(book.panel + i * book.width + c + v * lanes<T>);
            for (size_t j = 0; j < rows; ++j) {
                const Vec<T> element = broadcast(block.row[j][i]);
                for (size_t v = 0; v < columns; ++v) {
                    sum[j][v] = fma(element, codeword[v], sum[j][v]);
                    keep_in_register(sum[j][v]);
                }
            }
        }
        for (size_t j = 0; j < rows; ++j) {
            for (size_t v = 0; v < columns; ++v) {
                const size_t at = c + v * lanes<T>;
                store(out + j * book.width + at, finish(sum[j][v], at));
            }
        }
    }
}

template <class T>
POLYVEC_INLINE void logits(const SoftCodebook<T>& book, const Block<T>& block, T* out) noexcept {
    products(book, block, out, [&](Vec<T> product, size_t at) __attribute__((always_inline)) {
        return fma(product, broadcast(book.scale), load(book.offset + at));
    });
}

template <class T>
POLYVEC_INLINE T greatest(const T* values, size_t n) noexcept {
    Vec<T> most = load(values);
    for (size_t c = lanes<T>; c < n; c += lanes<T>) most = max(load(values + c), most);
    return reduce_max(most);
}

template <class T>
size_t first_equal(const T* values, size_t n, T value) noexcept {
    for (size_t c = 0; c < n; c += lanes<T>) {
        const uint32_t equal = bits(load(values + c) == broadcast(value));
        if (equal) return c + static_cast<size_t>(__builtin_ctz(equal));
    }
    return 0;  // NaN: squares that overflow
}

/// out[j][i] = factor[j] * sum over codewords of weights[j] * codeword[i], for the rows that exist.
template <class T>
POLYVEC_INLINE void combine(const SoftCodebook<T>& book, const T* weights, const T (&factor)[rows], T* out,
                            size_t count, size_t stride) noexcept {
    for (size_t i = 0; i < book.dsub; i += step_of_dims) {
        const size_t second = i + 1 < book.dsub ? i + 1 : i;
        Vec<T> sum[rows][step_of_dims] = {};
        for (size_t c = 0; c < book.width; c += lanes<T>) {
            const Vec<T> a = load(book.panel + i * book.width + c), b = load(book.panel + second * book.width + c);
            for (size_t j = 0; j < rows; ++j) {
                const Vec<T> weight = load(weights + j * book.width + c);
                sum[j][0] = fma(weight, a, sum[j][0]);
                sum[j][1] = fma(weight, b, sum[j][1]);
                keep_in_register(sum[j][0]);
                keep_in_register(sum[j][1]);
            }
        }
        for (size_t j = 0; j < count; ++j) {
            out[j * stride + i] = factor[j] * reduce_add(sum[j][0]);
            out[j * stride + second] = factor[j] * reduce_add(sum[j][1]);
        }
    }
}

template <class T>
void assign(const SoftCodebook<T>& book, const T* x, size_t n, size_t stride, T* out, int64_t* ids, size_t ids_stride,
            T* scratch, const T* zeros) noexcept {
    for (size_t first = 0; first < n; first += rows) {
        const size_t count = n - first < rows ? n - first : rows;
        const Block<T> block(x + first * stride, count, stride, zeros);
        logits(book, block, scratch);
        T factor[rows];
        for (size_t j = 0; j < rows; ++j) {
            T* own = scratch + j * book.width;
            const T most = greatest(own, book.width);
            if (j < count) {
                const size_t id = first_equal(own, book.width, most);
                ids[(first + j) * ids_stride] = static_cast<int64_t>(id);
                if (book.hard) {
                    for (size_t i = 0; i < book.dsub; ++i)
                        out[(first + j) * stride + i] = book.panel[i * book.width + id];
                }
            }
            if (book.hard) continue;
            Vec<T> sum{};
            for (size_t c = 0; c < book.width; c += lanes<T>) {
                const Vec<T> power = exp<T>(load(own + c) - broadcast(most));
                store(own + c, power);
                sum += power;
            }
            factor[j] = 1 / reduce_add(sum);
        }
        if (!book.hard) combine(book, scratch, factor, out + first * stride, count, stride);
    }
}

/// dpanel[i] += sum_j shares[j] * x_j[i] (+ p_j * grad_j[i]), and dpanel[dsub] += sum_j shares[j], which is what the
/// codewords themselves are multiplied with in the end.
template <bool Soft, class T>
POLYVEC_INLINE void scatter(const SoftCodebook<T>& book, const Block<T>& x, const Block<T>& grad, const T* shares,
                            const T* probabilities, T* dpanel) noexcept {
    for (size_t c = 0; c < book.width; c += lanes<T>) {
        Vec<T> share[rows], probability[rows], total{};
        for (size_t j = 0; j < rows; ++j) {
            share[j] = load(shares + j * book.width + c);
            total += share[j];
            if constexpr (Soft) probability[j] = load(probabilities + j * book.width + c);
        }
        for (size_t i = 0; i < book.dsub; ++i) {
            T* at = dpanel + i * book.width + c;
            Vec<T> sum{};
            for (size_t j = 0; j < rows; ++j) {
                sum = fma(share[j], broadcast(x.row[j][i]), sum);
                if constexpr (Soft) sum = fma(probability[j], broadcast(grad.row[j][i]), sum);
            }
            store(at, load(at) + sum);
        }
        T* at = dpanel + book.dsub * book.width + c;
        store(at, load(at) + total);
    }
}

template <class T>
void gradient(const SoftCodebook<T>& book, const T* x, const T* grad, size_t n, size_t stride, T* dx, T* dpanel,
              T* scratch, const T* zeros) noexcept {
    T *probabilities = scratch, *shares = scratch + rows * book.width;
    for (size_t first = 0; first < n; first += rows) {
        const size_t count = n - first < rows ? n - first : rows;
        const Block<T> vectors(x + first * stride, count, stride, zeros);
        const Block<T> grads(grad + first * stride, count, stride, zeros);
        logits(book, vectors, probabilities);
        products(book, grads, shares, [](Vec<T> product, size_t) __attribute__((always_inline)) { return product; });
        for (size_t j = 0; j < rows; ++j) {
            T *p = probabilities + j * book.width, *share = shares + j * book.width;
            const T most = greatest(p, book.width);
            if (book.hard && dpanel && j < count) {
                const size_t id = first_equal(p, book.width, most);
                for (size_t i = 0; i < book.dsub; ++i) dpanel[i * book.width + id] += grads.row[j][i];
            }
            Vec<T> sum{}, weighted{};
            for (size_t c = 0; c < book.width; c += lanes<T>) {
                const Vec<T> power = exp<T>(load(p + c) - broadcast(most));
                store(p + c, power);
                sum += power;
                weighted = fma(power, load(share + c), weighted);
            }
            const T inverse = 1 / reduce_add(sum), mean = reduce_add(weighted) * inverse;
            for (size_t c = 0; c < book.width; c += lanes<T>) {
                const Vec<T> probability = load(p + c) * inverse;
                store(p + c, probability);
                store(share + c, probability * book.scale * (load(share + c) - broadcast(mean)));
            }
        }
        if (dx) {
            constexpr T one[rows] = {1, 1, 1, 1};
            combine(book, shares, one, dx + first * stride, count, stride);
        }
        if (!dpanel) continue;
        if (book.hard) {
            scatter<false>(book, vectors, grads, shares, probabilities, dpanel);
        } else {
            scatter<true>(book, vectors, grads, shares, probabilities, dpanel);
        }
    }
}

template <class T>
constexpr SoftAssignKernel<T> make() {
    return {step<T>, 2 * rows, assign<T>, gradient<T>};
}

}  // namespace

extern const SoftAssignKernels soft_assign_kernels;
const SoftAssignKernels soft_assign_kernels{make<float>(), make<double>()};

}  // namespace polyvec::POLYVEC_ISA
