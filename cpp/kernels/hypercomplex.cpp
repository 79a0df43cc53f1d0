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

// Gathered rows lie anywhere in memory: fetch a row further on beside the arithmetic, early enough for its page to be
// looked up, too. Like the row of out so much further on, it is fetched in the order of addresses: see
// for_each_cached_block.
constexpr size_t ahead = 4;

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
                    prefetch_to_write(result_row + ahead * row + at);
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

/// exp of x at most 0; below -87 that of -87. The polynomials are those of the Cephes library.
POLYVEC_INLINE Vec<float> exp_of_negative(Vec<float> x) noexcept {
    constexpr float round = 12582912;  // 1.5 * 2^23: a float so large has no bits after the point
    x = max(x, broadcast(-87.0f));
    const Vec<float> shifted = x * 1.44269504f + round, n = shifted - round;
    const Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
    constexpr float powers[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    Vec<float> p{};
    for (const float c : powers) p = p * r + c;
    const Mask<float> exponent = (Mask<float>)shifted << 23;
    return (Vec<float>)((Mask<float>)(r * r * p + r + 1) + exponent);
}

/// log of x at least 0; NaN stays NaN. Subnormal numbers count as about 1e-38.
POLYVEC_INLINE Vec<float> log_of(Vec<float> x) noexcept {
    const Vec<float> half_root = broadcast(0.70710678f);
    const Mask<float> bits = (Mask<float>)x - (Mask<float>)half_root;  // so that m is in [sqrt(1/2), sqrt(2))
    const Mask<float> n = bits >> 23;
    const Vec<float> m = (Vec<float>)((bits & 0x7fffff) + (Mask<float>)half_root) - 1, z = m * m;
    const Vec<float> e = __builtin_convertvector(n, Vec<float>);
    constexpr float series[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
    Vec<float> p{};
    for (const float c : series) p = p * m + c;
    const Vec<float> log = m * z * p - e * 2.12194440e-4f - z / 2 + m + e * 0.693359375f;
    const float infinity = __builtin_inff();
    return select(x < infinity, select(x > 0, log, broadcast(-infinity)), x);
}

POLYVEC_INLINE Vec<double> exp_of_negative(Vec<double> x) noexcept {
    for (size_t k = 0; k < lanes<double>; ++k) x[k] = __builtin_exp(x[k]);
    return x;
}
POLYVEC_INLINE Vec<double> log_of(Vec<double> x) noexcept {
    for (size_t k = 0; k < lanes<double>; ++k) x[k] = __builtin_log(x[k]);
    return x;
}

/// log(1 + exp(x)), without overflow, and as exact where exp(x) is lost beside 1.
template <class V>
POLYVEC_INLINE V softplus(V x) noexcept {
    const V y = exp_of_negative(-abs(x)), u = 1 + y;
    return select(x < 0, V{}, x) + (log_of(u) + (y - (u - 1)) / u);
}

// The three distances of normalising flows. `query` turns h, whose mean is mapped already, and the relation's scale
// into the parts of a query and returns what this position adds to the query's offset; `key` turns t into the parts of
// a key and returns what it adds to the key's bias. A position beyond d holds zeros and must add 0.

struct Wasserstein {
    static constexpr size_t parts = 2;

    template <class T, class Used>
    POLYVEC_INLINE static Vec<T> query(Numbers<T, 2>& h, Vec<T> scale, Used) noexcept {
        const Vec<T> mean = h.part[0], a = abs(scale * h.part[1]);
        h = {{2 * mean, 2 * a}};
        return -(mean * mean + a * a);
    }

    template <class T, class Used>
    POLYVEC_INLINE static Vec<T> key(Numbers<T, 2>& t, Used) noexcept {
        t.part[1] = abs(t.part[1]);
        return -squared_norm(t);
    }
};

struct Piecewise {
    static constexpr size_t parts = 3;
    static constexpr double slope = 0.79788456080286535588;  // sqrt(2 / pi)

    template <class T, class Used>
    POLYVEC_INLINE static Vec<T> query(Numbers<T, 3>& h, Vec<T> scale, Used) noexcept {
        const Vec<T> mean = h.part[0], a1 = abs(scale * h.part[1]), a2 = abs(scale * h.part[2]);
        h = {{mean, a1, a2}};
        return -(mean * mean + (a1 * a1 + a2 * a2) / 2 + T(slope) * mean * (a2 - a1));
    }

    template <class T, class Used>
    POLYVEC_INLINE static Vec<T> key(Numbers<T, 3>& t, Used) noexcept {
        const Vec<T> mean = t.part[0], b1 = abs(t.part[1]), b2 = abs(t.part[2]), tilt = T(slope) * (b1 - b2);
        t = {{2 * mean - tilt, b1 - T(slope) * mean, b2 + T(slope) * mean}};
        return mean * tilt - mean * mean - (b1 * b1 + b2 * b2) / 2;
    }
};

struct KullbackLeibler {
    static constexpr size_t parts = 2;

    template <class T>
    POLYVEC_INLINE static Vec<T> used_only(Vec<T> v, All) noexcept {
        return v;
    }
    template <class T>
    POLYVEC_INLINE static Vec<T> used_only(Vec<T> v, size_t count) noexcept {
        return select(first_lanes<T>(count), v, Vec<T>{});
    }

    template <class T, class Used>
    POLYVEC_INLINE static Vec<T> query(Numbers<T, 2>& h, Vec<T> scale, Used used) noexcept {
        const Vec<T> mean = h.part[0], a = softplus(scale) * softplus(h.part[1]);
        h = {{-(a * a + mean * mean) / 2, mean}};
        return used_only<T>(log_of(a) + T(0.5), used);
    }

    template <class T, class Used>
    POLYVEC_INLINE static Vec<T> key(Numbers<T, 2>& t, Used used) noexcept {
        const Vec<T> mean = t.part[0], b = softplus(t.part[1]), precision = 1 / (b * b);
        t = {{precision, mean * precision}};
        return used_only<T>(-(log_of(b) + mean * mean * precision / 2), used);
    }
};

template <class Flow, class T>
void flow_query(const Gathered<T>& heads, const Gathered<T>& relations, size_t first, size_t last, size_t d, T* out,
                T* offset) noexcept {
    constexpr size_t N = Flow::parts;
    for (size_t k = first; k < last; ++k) {
        const T *head = row_of(heads, k, N * d), *relation = row_of(relations, k, 2 * d);
        Vec<T> sum{};
        for_each_block<T>(d, [&](size_t v, auto used) __attribute__((always_inline)) {
            auto h = load_numbers<N>(head + v, d, used);
            const auto r = load_numbers<2>(relation + v, d, used);
            h.part[0] = r.part[1] * h.part[0] + r.part[0];
            sum += Flow::query(h, r.part[1], used);
            store_numbers(out + k * N * d + v, d, h, used);
        });
        offset[k] = reduce_add(sum);
    }
}

template <class Flow, class T>
void flow_keys(const T* entities, size_t first, size_t last, size_t d, T* out, T* bias) noexcept {
    constexpr size_t N = Flow::parts;
    for (size_t k = first; k < last; ++k) {
        Vec<T> sum{};
        for_each_block<T>(d, [&](size_t v, auto used) __attribute__((always_inline)) {
            auto t = load_numbers<N>(entities + k * N * d + v, d, used);
            sum += Flow::key(t, used);
            store_numbers(out + k * N * d + v, d, t, used);
        });
        bias[k] = reduce_add(sum);
    }
}

template <class T>
constexpr HypercomplexKernel<T> make() {
    return {product<T>,
            norm<T>,
            normalize<T>,
            conjugate<T>,
            relation_query<T>,
            sum_products<T>,
            to_planes<T>,
            from_planes<T>,
            {flow_query<Wasserstein, T>, flow_keys<Wasserstein, T>},
            {flow_query<Piecewise, T>, flow_keys<Piecewise, T>},
            {flow_query<KullbackLeibler, T>, flow_keys<KullbackLeibler, T>}};
}

}  // namespace

extern const HypercomplexKernels hypercomplex_kernels;
const HypercomplexKernels hypercomplex_kernels{make<float>(), make<double>()};

}  // namespace polyvec::POLYVEC_ISA
