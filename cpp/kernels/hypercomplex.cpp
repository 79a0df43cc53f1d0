// Products, norms and the fused relation query of 2-, 4- and 8-component algebras.
//
// The basis elements of complex numbers, quaternions, dihedrons (split quaternions) and octonions multiply as
// e_i e_j = +-e_(i ^ j), so every such product is out[c] = sum_i table[c][i] x[i] y[i ^ c], and so is its gradient
// with respect to either factor, with another table. One loop therefore serves all algebras and both directions.
//
// A register holds one component of as many numbers as it has lanes, and a number never leaves its registers between
// load and store. At 4 planes an element costs 48 bytes and 32 multiplications, so memory, not arithmetic, is the limit
// outside the caches.
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

template <class T, size_t N>
struct Numbers {
    Vec<T> part[N];
};

/// How many lanes of a block are in use: all of them, or the first few (a size_t).
struct All {};

template <class T>
POLYVEC_INLINE Vec<T> load(const T* p, All) noexcept {
    return load(p);
}
template <class T>
POLYVEC_INLINE Vec<T> load(const T* p, size_t count) noexcept {
    return load_first(p, count);
}
template <class T>
POLYVEC_INLINE void store(T* p, Vec<T> v, All) noexcept {
    store(p, v);
}
template <class T>
POLYVEC_INLINE void store(T* p, Vec<T> v, size_t count) noexcept {
    store_first(p, v, count);
}

/// Calls f(v, used) for each block of positions v .. v + lanes of a row of length d.
template <class T, class F>
POLYVEC_INLINE void for_each_block(size_t d, F f) noexcept {
    size_t v = 0;
    for (; v + lanes<T> <= d; v += lanes<T>) f(v, All{});
    if (v < d) f(v, d - v);
}

template <size_t N, class T, class Used>
POLYVEC_INLINE Numbers<T, N> load_numbers(const T* x, size_t d, Used used) noexcept {
    Numbers<T, N> numbers;
    for (size_t c = 0; c < N; ++c) numbers.part[c] = load(x + c * d, used);
    return numbers;
}

template <size_t N, class T, class Used>
POLYVEC_INLINE void store_numbers(T* out, size_t d, const Numbers<T, N>& numbers, Used used) noexcept {
    for (size_t c = 0; c < N; ++c) store(out + c * d, numbers.part[c], used);
}

template <size_t N, class T>
POLYVEC_INLINE Numbers<T, N> multiply(const Numbers<T, N>& x, const Numbers<T, N>& y, const T* table) noexcept {
    Numbers<T, N> out;
#pragma GCC unroll 8
    for (size_t c = 0; c < N; ++c) {
        out.part[c] = table[c * N] * x.part[0] * y.part[c];
#pragma GCC unroll 8
        for (size_t i = 1; i < N; ++i) out.part[c] += table[c * N + i] * x.part[i] * y.part[i ^ c];
    }
    return out;
}

template <size_t N, class T>
POLYVEC_INLINE Vec<T> squared_norm(const Numbers<T, N>& x) noexcept {
    Vec<T> sum{};
    for (size_t c = 0; c < N; ++c) sum += x.part[c] * x.part[c];
    return sum;
}

/// x / |x|; a number of norm 0 stays 0.
template <size_t N, class T>
POLYVEC_INLINE Numbers<T, N> unit(Numbers<T, N> x) noexcept {
    const Vec<T> squares = squared_norm(x);
    const Vec<T> scale = select(squares > 0, 1 / sqrt<T>(squares), Vec<T>{});
    for (size_t c = 0; c < N; ++c) x.part[c] *= scale;
    return x;
}

/// Calls f with the number of components as a constant.
template <class F>
POLYVEC_INLINE void with_components(size_t components, F f) noexcept {
    if (components == 2) {
        f.template operator()<2>();
    } else if (components == 4) {
        f.template operator()<4>();
    } else {
        f.template operator()<8>();
    }
}

/// for_each_block on memory that is in the cache: n positions of the N planes of each input and of out at a time are
/// visited in the order of addresses first. Processors foresee that order, and not the steps from plane to plane of f.
template <size_t N, class T, class F, class... Input>
POLYVEC_INLINE void for_each_cached_block(size_t d, F f, T* out, const Input*... inputs) noexcept {
    constexpr size_t line = 64 / sizeof(T), span = 4096 / (N * sizeof(T));  // 4 KB an array
    for (size_t first = 0; first < d; first += span) {
        const size_t n = d - first < span ? d - first : span;
        const auto visit = [&](auto* x, auto touch) __attribute__((always_inline)) {
            for (size_t c = 0; c < N; ++c) {
                for (size_t v = 0; v < n; v += line) touch(x + c * d + first + v);
            }
        };
        (visit(inputs, [](const T* p) { static_cast<void>(*static_cast<const volatile T*>(p)); }), ...);
        visit(out, [](T* p) { prefetch_to_write(p); });
        for_each_block<T>(n, [&](size_t v, auto used) __attribute__((always_inline)) { f(first + v, used); });
    }
}

template <class T>
void product(const T* x, const T* y, T* out, size_t components, size_t d, const T* table) noexcept {
    with_components(components, [&]<size_t N>() __attribute__((always_inline)) {
        const auto block = [&](size_t v, auto used) __attribute__((always_inline)) {
            const auto left = load_numbers<N>(x + v, d, used), right = load_numbers<N>(y + v, d, used);
            store_numbers(out + v, d, multiply(left, right, table), used);
        };
        for_each_cached_block<N>(d, block, out, x, y);
    });
}

template <class T>
void norm(const T* x, T* out, size_t components, size_t d) noexcept {
    with_components(components, [&]<size_t N>() __attribute__((always_inline)) {
        for_each_block<T>(d, [&](size_t v, auto used) __attribute__((always_inline)) {
            store(out + v, sqrt<T>(squared_norm(load_numbers<N>(x + v, d, used))), used);
        });
    });
}

template <class T>
void normalize(const T* x, T* out, size_t components, size_t d) noexcept {
    with_components(components, [&]<size_t N>() __attribute__((always_inline)) {
        const auto block = [&](size_t v, auto used) __attribute__((always_inline)) {
            store_numbers(out + v, d, unit(load_numbers<N>(x + v, d, used)), used);
        };
        for_each_cached_block<N>(d, block, out, x);
    });
}

template <class T>
void conjugate(const T* __restrict x, T* __restrict out, size_t components, size_t d) noexcept {
    for (size_t v = 0; v < d; ++v) out[v] = x[v];
    for (size_t v = d; v < components * d; ++v) out[v] = -x[v];
}

template <class T>
void relation_query(const RelationTables<T>& tables, const std::int64_t* head_ids, const std::int64_t* relation_ids,
                    size_t n, T* out, size_t components, size_t d, const T* table) noexcept {
    constexpr size_t ahead = 2;  // heads lie anywhere in memory: fetch the row after the next beside the arithmetic
    const size_t row = components * d;
    with_components(components, [&]<size_t N>() __attribute__((always_inline)) {
        for (size_t k = 0; k < n; ++k) {
            const T* head = tables.entities + static_cast<size_t>(head_ids[k]) * row;
            const T* fetched = tables.entities + static_cast<size_t>(head_ids[k + ahead < n ? k + ahead : k]) * row;
            const T* rotor = tables.relations + static_cast<size_t>(relation_ids[k]) * row;
            const T* shift = tables.translations + static_cast<size_t>(relation_ids[k]) * row;
            for_each_block<T>(d, [&](size_t v, auto used) __attribute__((always_inline)) {
                for (size_t c = 0; c < N; ++c) prefetch(fetched + c * d + v);
                auto right = load_numbers<N>(rotor + v, d, used);
                if (tables.normalize) right = unit(right);
                auto result = multiply(load_numbers<N>(head + v, d, used), right, table);
                if (tables.translations) {
                    const auto shifts = load_numbers<N>(shift + v, d, used);
                    for (size_t c = 0; c < N; ++c) result.part[c] += shifts.part[c];
                }
                store_numbers(out + k * row + v, d, result, used);
            });
        }
    });
}

template <class T>
void to_planes(const T* __restrict x, T* __restrict planes, size_t components, size_t n) noexcept {
    with_components(components, [&]<size_t N>() __attribute__((always_inline)) {
        for (size_t v = 0; v < n; ++v) {
            for (size_t c = 0; c < N; ++c) planes[c * n + v] = x[v * N + c];
        }
    });
}

template <class T>
void from_planes(const T* __restrict planes, T* __restrict x, size_t components, size_t n) noexcept {
    with_components(components, [&]<size_t N>() __attribute__((always_inline)) {
        for (size_t v = 0; v < n; ++v) {
            for (size_t c = 0; c < N; ++c) x[v * N + c] = planes[c * n + v];
        }
    });
}

template <class T>
constexpr HypercomplexKernel<T> make() {
    return {product<T>, norm<T>, normalize<T>, conjugate<T>, relation_query<T>, to_planes<T>, from_planes<T>};
}

}  // namespace

extern const HypercomplexKernels hypercomplex_kernels;
const HypercomplexKernels hypercomplex_kernels{make<float>(), make<double>()};

}  // namespace polyvec::POLYVEC_ISA
