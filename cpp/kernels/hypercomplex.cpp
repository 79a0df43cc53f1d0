// Products, norms and the fused relation query of 2-, 4- and 8-component algebras.
//
// The basis elements of complex numbers, quaternions, dihedrons (split quaternions) and octonions multiply as
// e_i e_j = +-e_(i ^ j), so every such product is out[c] = sum_i table[c][i] x[i] y[i ^ c], and so is its gradient
// with respect to either factor, with another table. One loop therefore serves all algebras and both directions.
//
// The loops run over the planes' long axis and are plain: the compiler vectorises them at every level. At 4 planes
// an element costs 48 bytes and 32 multiplications, so memory, not arithmetic, is the limit outside the caches.
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr std::size_t block = 64;  // positions handled at a time: a block of the normalised factor stays in L1

template <class T>
T root(T x) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return __builtin_sqrtf(x);
    } else {
        return __builtin_sqrt(x);
    }
}

template <std::size_t N, class T>
void product_planes(const T* __restrict x, std::size_t x_stride, const T* __restrict y, std::size_t y_stride,
                    const T* __restrict add, T* __restrict out, std::size_t out_stride, std::size_t d,
                    const T* __restrict table) {
    for (std::size_t v = 0; v < d; ++v) {
        for (std::size_t c = 0; c < N; ++c) {
            T sum = add ? add[c * out_stride + v] : T(0);
            for (std::size_t i = 0; i < N; ++i)
                sum += table[c * N + i] * x[i * x_stride + v] * y[(i ^ c) * y_stride + v];
            out[c * out_stride + v] = sum;
        }
    }
}

template <std::size_t N, class T>
void norm_planes(const T* __restrict x, T* __restrict out, std::size_t d) {
    for (std::size_t v = 0; v < d; ++v) {
        T sum = 0;
        for (std::size_t c = 0; c < N; ++c) sum += x[c * d + v] * x[c * d + v];
        out[v] = root(sum);
    }
}

/// out = x / |x| position by position; a number of norm 0 stays 0.
template <std::size_t N, class T>
void normalize_planes(const T* __restrict x, std::size_t x_stride, T* __restrict out, std::size_t out_stride,
                      std::size_t d) {
    for (std::size_t v = 0; v < d; ++v) {
        T sum = 0;
        for (std::size_t c = 0; c < N; ++c) sum += x[c * x_stride + v] * x[c * x_stride + v];
        const T scale = sum > 0 ? 1 / root(sum) : T(0);
        for (std::size_t c = 0; c < N; ++c) out[c * out_stride + v] = x[c * x_stride + v] * scale;
    }
}

template <std::size_t N, class T>
void relation_planes(const T* head, const T* relation, const T* translation, T* out, std::size_t d, const T* table,
                     bool normalize) {
    if (!normalize) return product_planes<N>(head, d, relation, d, translation, out, d, d, table);
    T rotor[N * block];
    for (std::size_t v = 0; v < d; v += block) {
        const std::size_t n = d - v < block ? d - v : block;
        normalize_planes<N>(relation + v, d, rotor, block, n);
        product_planes<N>(head + v, d, rotor, block, translation ? translation + v : nullptr, out + v, d, n, table);
    }
}

/// Calls f with the number of components as a constant.
template <class F>
void with_components(std::size_t components, F f) {
    if (components == 2) {
        f.template operator()<2>();
    } else if (components == 4) {
        f.template operator()<4>();
    } else {
        f.template operator()<8>();
    }
}

template <class T>
void product(const T* x, const T* y, T* out, std::size_t components, std::size_t d, const T* table) noexcept {
    with_components(components, [&]<std::size_t N>() {
        product_planes<N>(x, d, y, d, static_cast<const T*>(nullptr), out, d, d, table);
    });
}

template <class T>
void norm(const T* x, T* out, std::size_t components, std::size_t d) noexcept {
    with_components(components, [&]<std::size_t N>() { norm_planes<N>(x, out, d); });
}

template <class T>
void normalize(const T* x, T* out, std::size_t components, std::size_t d) noexcept {
    with_components(components, [&]<std::size_t N>() { normalize_planes<N>(x, d, out, d, d); });
}

template <class T>
void conjugate(const T* __restrict x, T* __restrict out, std::size_t components, std::size_t d) noexcept {
    for (std::size_t v = 0; v < d; ++v) out[v] = x[v];
    for (std::size_t v = d; v < components * d; ++v) out[v] = -x[v];
}

template <class T>
void relation_query(const T* head, const T* relation, const T* translation, T* out, std::size_t components,
                    std::size_t d, const T* table, bool normalize) noexcept {
    with_components(components, [&]<std::size_t N>() {
        relation_planes<N>(head, relation, translation, out, d, table, normalize);
    });
}

template <class T>
void to_planes(const T* __restrict x, T* __restrict planes, std::size_t components, std::size_t n) noexcept {
    for (std::size_t c = 0; c < components; ++c)
        for (std::size_t v = 0; v < n; ++v) planes[c * n + v] = x[v * components + c];
}

template <class T>
void from_planes(const T* __restrict planes, T* __restrict x, std::size_t components, std::size_t n) noexcept {
    for (std::size_t c = 0; c < components; ++c)
        for (std::size_t v = 0; v < n; ++v) x[v * components + c] = planes[c * n + v];
}

template <class T>
constexpr HypercomplexKernel<T> make() {
    return {product<T>, norm<T>, normalize<T>, conjugate<T>, relation_query<T>, to_planes<T>, from_planes<T>};
}

}  // namespace

extern const HypercomplexKernels hypercomplex_kernels;
const HypercomplexKernels hypercomplex_kernels{make<float>(), make<double>()};

}  // namespace polyvec::POLYVEC_ISA
