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

template <size_t N, class T>
POLYVEC_INLINE void add(Numbers<T, N>& sum, const Numbers<T, N>& x) noexcept {
    for (size_t c = 0; c < N; ++c) sum.part[c] += x.part[c];
}

template <class T>
POLYVEC_INLINE const T* row_of(const Gathered<T>& gathered, size_t k, size_t row) noexcept {
    return gathered.rows + static_cast<size_t>(gathered.ids[k]) * row;
}

// Gathered rows lie anywhere in memory: fetch the row after the next beside the arithmetic. Like the first lines of the
// next row of out, it is fetched in the order of addresses: see for_each_cached_block.
constexpr size_t ahead = 2;

template <class T>
void relation_query(const RelationRows<T>& rows, size_t first, size_t last, T* out, size_t components, size_t d,
                    const T* table) noexcept {
    const auto& [heads, rotors, translations, head_translations, normalize] = rows;
    const size_t row = components * d;
    const bool by_head = rotors.ids == heads.ids;
    with_components(components, [&]<size_t N>() __attribute__((always_inline)) {
        for (size_t k = first; k < last; ++k) {
            const T *head = row_of(heads, k, row), *rotor = row_of(rotors, k, row);
            const T* shift = translations.rows ? row_of(translations, k, row) : nullptr;
            const T* head_shift = head_translations.rows ? row_of(head_translations, k, row) : nullptr;
            const size_t later = k + ahead < last ? k + ahead : k;
            const T* later_head = row_of(heads, later, row);
            const T* later_rotor = by_head ? row_of(rotors, later, row) : later_head;
            const T* later_shift = head_shift ? row_of(head_translations, later, row) : later_head;
            T* result_row = out + k * row;
            for_each_block<T>(d, [&](size_t v, auto used) __attribute__((always_inline)) {
                for (size_t at = N * v; at < N * (v + lanes<T>); at += lanes<T>) {
                    prefetch(later_head + at);
                    if (by_head) prefetch(later_rotor + at);
                    if (head_shift) prefetch(later_shift + at);
                    prefetch_to_write(result_row + row + at);
                }
                auto right = load_numbers<N>(rotor + v, d, used);
                if (normalize) right = unit(right);
                auto result = multiply(load_numbers<N>(head + v, d, used), right, table);
                if (shift) add(result, load_numbers<N>(shift + v, d, used));
                if (head_shift) add(result, load_numbers<N>(head_shift + v, d, used));
                store_numbers(result_row + v, d, result, used);
            });
        }
    });
}

template <class T>
void sum_products(const Gathered<T>& x, const Gathered<T>& y, const std::int64_t* begins, const std::int64_t* order,
                  size_t first, size_t last, T* out, size_t components, size_t d, const T* table) noexcept {
    const size_t row = components * d;
    const std::int64_t end = begins[last];
    with_components(components, [&]<size_t N>() __attribute__((always_inline)) {
        for (size_t r = first; r < last; ++r) {
            T* sum = out + r * row;
            if (begins[r] == begins[r + 1]) {
                for (size_t v = 0; v < row; ++v) sum[v] = 0;
            }
            for (std::int64_t at = begins[r]; at < begins[r + 1]; ++at) {
                const bool begun = at != begins[r];
                const auto k = static_cast<size_t>(order[at]);
                const auto later =
                    static_cast<size_t>(order[at + std::int64_t{ahead} < end ? at + std::int64_t{ahead} : at]);
                const T *left = row_of(x, k, row), *right = row_of(y, k, row);
                const T *later_left = row_of(x, later, row), *later_right = row_of(y, later, row);
                for_each_block<T>(d, [&](size_t v, auto used) __attribute__((always_inline)) {
                    for (size_t p = N * v; p < N * (v + lanes<T>); p += lanes<T>) {
                        prefetch(later_left + p);
                        prefetch(later_right + p);
                    }
                    auto product =
                        multiply(load_numbers<N>(left + v, d, used), load_numbers<N>(right + v, d, used), table);
                    if (begun) add(product, load_numbers<N>(sum + v, d, used));
                    store_numbers(sum + v, d, product, used);
                });
            }
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
    return {product<T>,        norm<T>,         normalize<T>, conjugate<T>,
            relation_query<T>, sum_products<T>, to_planes<T>, from_planes<T>};
}

}  // namespace

extern const HypercomplexKernels hypercomplex_kernels;
const HypercomplexKernels hypercomplex_kernels{make<float>(), make<double>()};

}  // namespace polyvec::POLYVEC_ISA
