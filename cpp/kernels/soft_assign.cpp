// Softmax over the codewords of one subspace, and its gradients.
//
// Lanes are codewords, and `rows` vectors share each load of them. What is kept of a row is one number a codeword, in
// scratch that stays in the first-level cache: its logit, then its probability, then its share of the gradient.
#include "exp.hpp"
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t rows = 4;     // vectors at a time
constexpr size_t columns = 2;  // registers of codewords: rows * columns sums hide the latency of an addition
// Elements of a result whose sums over codewords run side by side: on AVX2 twelve sums leave four registers for the
// rest.
constexpr size_t step_of_dims = sizeof(Vec<float>) == 32 ? 3 : 2;
// Elements of the gradient of codewords whose sums over rows run side by side.
constexpr int dims_of_tile = 4;

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

/// Turns the logits of all rows into their exponentials, less the greatest of each.
template <class T>
POLYVEC_INLINE void powers(const SoftCodebook<T>& book, T* logits, const T (&most)[rows]) noexcept {
#pragma GCC unroll 1
    for (size_t c = 0; c < book.width; c += lanes<T>) {
        Vec<T> x[rows];
        for (size_t j = 0; j < rows; ++j) x[j] = load(logits + j * book.width + c) - broadcast(most[j]);
        exp<T>(x);
        for (size_t j = 0; j < rows; ++j) store(logits + j * book.width + c, x[j]);
    }
}

/// Elements i, ..., i + D of combine.
template <size_t D, class T>
POLYVEC_INLINE void combine_dims(const SoftCodebook<T>& book, const T* weights, const T (&factor)[rows], T* out,
                                 size_t count, size_t stride, size_t i) noexcept {
    Vec<T> sum[D][rows];
    for (size_t e = 0; e < D; ++e) {
        for (size_t j = 0; j < rows; ++j) sum[e][j] = Vec<T>{};  // with one `= {}` GCC clears memory
    }
#pragma GCC unroll 1
    for (size_t c = 0; c < book.width; c += lanes<T>) {
        Vec<T> element[D];
        for (size_t e = 0; e < D; ++e) element[e] = load(book.panel + (i + e) * book.width + c);
        for (size_t j = 0; j < rows; ++j) {
            const Vec<T> weight = load(weights + j * book.width + c);
            for (size_t e = 0; e < D; ++e) sum[e][j] = fma(weight, element[e], sum[e][j]);
        }
    }
    for (size_t e = 0; e < D; ++e) {
        T total[rows];
        if constexpr (lanes<T> >= rows) {
            Vec<T> own[rows];
            for (size_t j = 0; j < rows; ++j) own[j] = sum[e][j];
            const auto totals = reduce_add(own);
            for (size_t j = 0; j < rows; ++j) total[j] = totals[j];
        } else {
            for (size_t j = 0; j < rows; ++j) total[j] = reduce_add(sum[e][j]);
        }
        for (size_t j = 0; j < count; ++j) out[j * stride + i + e] = factor[j] * total[j];
    }
}

/// out[j][i] = factor[j] * sum over codewords of weights[j] * codeword[i], for the rows that exist.
template <class T>
POLYVEC_INLINE void combine(const SoftCodebook<T>& book, const T* weights, const T (&factor)[rows], T* out,
                            size_t count, size_t stride) noexcept {
    for (size_t i = 0, left; (left = book.dsub - i) > 0;) {
        if (step_of_dims == 3 && left > 2 && left != 4) {
            combine_dims<3>(book, weights, factor, out, count, stride, i);
            i += 3;
        } else if (left > 1) {
            combine_dims<2>(book, weights, factor, out, count, stride, i);
            i += 2;
        } else {
            combine_dims<1>(book, weights, factor, out, count, stride, i++);
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
        T factor[rows], most[rows];
        for (size_t j = 0; j < rows; ++j) {
            const T* own = scratch + j * book.width;
            most[j] = greatest(own, book.width);
            if (j < count) {
                const size_t id = first_equal(own, book.width, most[j]);
                ids[(first + j) * ids_stride] = static_cast<int64_t>(id);
                if (book.hard) {
                    for (size_t i = 0; i < book.dsub; ++i)
                        out[(first + j) * stride + i] = book.panel[i * book.width + id];
                }
            }
        }
        if (book.hard) continue;
        powers(book, scratch, most);
        for (size_t j = 0; j < rows; ++j) {
            const T* own = scratch + j * book.width;
            Vec<T> sum{};
            for (size_t c = 0; c < book.width; c += lanes<T>) sum += load(own + c);
            factor[j] = 1 / reduce_add(sum);
        }
        combine(book, scratch, factor, out + first * stride, count, stride);
    }
}

/// dpanel[i + e] += sum_j weights[j] * elements[j][e] for N rows of weights and D elements.
template <size_t N, size_t D, class T>
POLYVEC_INLINE void scatter_dims(size_t width, const T* weights, const T (&elements)[N][D], T* dpanel) noexcept {
#pragma GCC unroll 1
    for (size_t c = 0; c < width; c += step<T>) {
        Vec<T> sum[D][columns];
        for (size_t e = 0; e < D; ++e) {
            for (size_t v = 0; v < columns; ++v) sum[e][v] = load(dpanel + e * width + c + v * lanes<T>);
        }
        const T* at = weights + c;
        for (size_t j = 0; j < N; ++j, at += width) {
            Vec<T> weight[columns];
            for (size_t v = 0; v < columns; ++v) weight[v] = load(at + v * lanes<T>);
            for (size_t e = 0; e < D; ++e) {
                const Vec<T> element = broadcast(elements[j][e]);
                for (size_t v = 0; v < columns; ++v) sum[e][v] = fma(weight[v], element, sum[e][v]);
            }
        }
        for (size_t e = 0; e < D; ++e) {
            for (size_t v = 0; v < columns; ++v) store(dpanel + e * width + c + v * lanes<T>, sum[e][v]);
        }
    }
}

/// dpanel[i] += sum_j shares[j] * x_j[i] (+ p_j * grad_j[i]), and dpanel[dsub] += sum_j shares[j], which is what the
/// codewords themselves are multiplied with in the end. Probabilities lie behind the shares.
template <bool Soft, class T>
POLYVEC_INLINE void scatter(const SoftCodebook<T>& book, const Block<T>& x, const Block<T>& grad, const T* shares,
                            T* dpanel) noexcept {
    constexpr size_t n = Soft ? 2 * rows : rows;
    const auto elements = [&]<int D>(Lanes<D>, size_t i) __attribute__((always_inline)) {
        T own[n][D];
        for (size_t j = 0; j < n; ++j) {
            const T* row = j < rows ? x.row[j] : grad.row[j - rows];
            for (size_t e = 0; e < D; ++e) own[j][e] = row[i + e];
        }
        scatter_dims(book.width, shares, own, dpanel + i * book.width);
    };
    size_t i = 0;
    for (; i + dims_of_tile <= book.dsub; i += dims_of_tile) elements(Lanes<dims_of_tile>{}, i);
    for (; i < book.dsub; ++i) elements(Lanes<1>{}, i);
    T* totals = dpanel + book.dsub * book.width;
    for (size_t c = 0; c < book.width; c += lanes<T>) {
        Vec<T> total{};
        for (size_t j = 0; j < rows; ++j) total += load(shares + j * book.width + c);
        store(totals + c, load(totals + c) + total);
    }
}

template <class T>
void gradient(const SoftCodebook<T>& book, const T* x, const T* grad, size_t n, size_t stride, T* dx, T* dpanel,
              T* scratch, const T* zeros) noexcept {
    T *shares = scratch, *probabilities = scratch + rows * book.width;
    for (size_t first = 0; first < n; first += rows) {
        const size_t count = n - first < rows ? n - first : rows;
        const Block<T> vectors(x + first * stride, count, stride, zeros);
        const Block<T> grads(grad + first * stride, count, stride, zeros);
        logits(book, vectors, probabilities);
        products(book, grads, shares, [](Vec<T> product, size_t) __attribute__((always_inline)) { return product; });
        T most[rows];
        for (size_t j = 0; j < rows; ++j) {
            const T* p = probabilities + j * book.width;
            most[j] = greatest(p, book.width);
            if (book.hard && dpanel && j < count) {
                const size_t id = first_equal(p, book.width, most[j]);
                for (size_t i = 0; i < book.dsub; ++i) dpanel[i * book.width + id] += grads.row[j][i];
            }
        }
        powers(book, probabilities, most);
        for (size_t j = 0; j < rows; ++j) {
            T *p = probabilities + j * book.width, *share = shares + j * book.width;
            Vec<T> sum{}, weighted{};
            for (size_t c = 0; c < book.width; c += lanes<T>) {
                const Vec<T> power = load(p + c);
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
            scatter<false>(book, vectors, grads, shares, dpanel);
        } else {
            scatter<true>(book, vectors, grads, shares, dpanel);
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
