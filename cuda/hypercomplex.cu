// The hypercomplex engine on a GPU: numbers are read, computed and written once. An op moves 3 C elements a number and
// does 2 C^2 flops, so memory is the limit: a thread has as many neighbouring numbers as fill 16 bytes of each plane
// where planes start at such boundaries, or one. Interleaved arrays are planar ones with d = 1.
#include <cmath>

#include "launch.cuh"
#include "polyvec/hypercomplex.hpp"
#include "warp.cuh"

namespace polyvec {
namespace {

template <class T, int N>
struct Number {
    T part[N];
};

/// The algebra, passed to kernels by value.
template <class T, int N>
struct Table {
    T at[N][N];
};

/// The leading axes of a planar array: all but the last two. Strides may be 0.
struct Leading {
    int axes = 0;
    std::int64_t length[Array::max_ndim]{}, stride[Array::max_ndim]{};
};

__device__ std::int64_t row_offset(const Leading& leading, std::int64_t row) {
    std::int64_t offset = 0;
    for (int axis = leading.axes - 1; axis > 0; --axis) {
        offset += row % leading.length[axis] * leading.stride[axis];
        row /= leading.length[axis];
    }
    return offset + row * leading.stride[0];
}

/// W neighbouring numbers, read and written as W elements of each plane at once.
template <class T, int N, int W>
struct Numbers {
    Number<T, N> at[W];

    template <class F>
    __device__ void each(F f) {
        for (int w = 0; w < W; ++w) f(at[w], w);
    }
};

template <class T, int W>
struct alignas(W * sizeof(T)) Wide {
    T at[W];
};

template <int N, int W, class T>
__device__ Numbers<T, N, W> load(const T* x, std::int64_t d) {
    Numbers<T, N, W> numbers;
    for (int c = 0; c < N; ++c) {
        const auto wide = *reinterpret_cast<const Wide<T, W>*>(x + c * d);
        for (int w = 0; w < W; ++w) numbers.at[w].part[c] = wide.at[w];
    }
    return numbers;
}

template <int N, int W, class T>
__device__ void store(const Numbers<T, N, W>& numbers, T* out, std::int64_t d) {
    for (int c = 0; c < N; ++c) {
        Wide<T, W> wide;
        for (int w = 0; w < W; ++w) wide.at[w] = numbers.at[w].part[c];
        *reinterpret_cast<Wide<T, W>*>(out + c * d) = wide;
    }
}

/// Calls f(row, v) for the first of each W neighbouring numbers of the calling thread.
template <int W, class F>
__device__ void for_each_number(std::int64_t rows, std::int64_t d, F f) {
    for_each_position(rows, d / W, [&](std::int64_t row, std::int64_t v) { f(row, v * W); });
}

template <int N, class T>
__device__ Number<T, N> multiply(const Number<T, N>& x, const Number<T, N>& y, const Table<T, N>& table) {
    Number<T, N> out;
    for (int c = 0; c < N; ++c) {
        T sum = 0;
        for (int i = 0; i < N; ++i) sum += table.at[c][i] * x.part[i] * y.part[i ^ c];
        out.part[c] = sum;
    }
    return out;
}

template <int N, class T>
__device__ T norm(const Number<T, N>& x) {
    T sum = 0;
    for (int c = 0; c < N; ++c) sum += x.part[c] * x.part[c];
    return sqrt(sum);
}

/// x / |x|; a number of norm 0 stays 0.
template <int N, class T>
__device__ Number<T, N> normalize(Number<T, N> x) {
    const T size = norm(x);
    const T scale = size > 0 ? 1 / size : T(0);
    for (int c = 0; c < N; ++c) x.part[c] *= scale;
    return x;
}

template <int N, class T>
__device__ Number<T, N> conjugate(Number<T, N> x) {
    for (int c = 1; c < N; ++c) x.part[c] = -x.part[c];
    return x;
}

template <int N, int W, class T>
__global__ void product_kernel(const T* x, const __grid_constant__ Leading x_rows, const T* y,
                               const __grid_constant__ Leading y_rows, T* out, std::int64_t rows, std::int64_t d,
                               const __grid_constant__ Table<T, N> table) {
    for_each_number<W>(rows, d, [&](std::int64_t row, std::int64_t v) {
        auto left = load<N, W>(x + row_offset(x_rows, row) + v, d);
        const auto right = load<N, W>(y + row_offset(y_rows, row) + v, d);
        left.each([&](Number<T, N>& number, int w) { number = multiply(number, right.at[w], table); });
        store(left, out + row * N * d + v, d);
    });
}

template <int N, int W, class T>
__global__ void map_kernel(const T* x, T* out, HypercomplexMap::Kind kind, std::int64_t rows, std::int64_t d) {
    using Kind = HypercomplexMap::Kind;
    for_each_number<W>(rows, d, [&](std::int64_t row, std::int64_t v) {
        auto numbers = load<N, W>(x + row * N * d + v, d);
        if (kind == Kind::norm) {
            Numbers<T, 1, W> norms;
            norms.each([&](Number<T, 1>& size, int w) { size.part[0] = norm(numbers.at[w]); });
            store(norms, out + row * d + v, d);
        } else {
            numbers.each([&](Number<T, N>& number, int) {
                number = kind == Kind::normalize ? normalize(number) : conjugate(number);
            });
            store(numbers, out + row * N * d + v, d);
        }
    });
}

/// Rows of a table and the ids that name some of them; rows: null when absent.
template <class T>
struct Gathered {
    const T* rows;
    const std::int64_t* ids;
    std::int64_t count;

    /// Whether the k-th id lies in the table, or there is no table.
    __device__ bool has(std::int64_t k) const { return !rows || (ids[k] >= 0 && ids[k] < count); }
};

template <int N, int W, class T>
__device__ Numbers<T, N, W> load(const Gathered<T>& gathered, std::int64_t k, std::int64_t v, std::int64_t d) {
    return load<N, W>(gathered.rows + gathered.ids[k] * N * d + v, d);
}

template <class T>
struct RelationRows {
    Gathered<T> heads, rotors, translations, head_translations;
    bool normalize;
};

/// A row whose ids lie outside the tables becomes NaN: the host cannot see them without waiting for the GPU.
template <int N, int W, class T>
__global__ void relation_query_kernel(const __grid_constant__ RelationRows<T> rows, T* out, std::int64_t n,
                                      std::int64_t d, const __grid_constant__ Table<T, N> table) {
    for_each_number<W>(n, d, [&](std::int64_t k, std::int64_t v) {
        Numbers<T, N, W> result;
        if (!rows.heads.has(k) || !rows.rotors.has(k) || !rows.translations.has(k)) {
            result.each([&](Number<T, N>& number, int) {
                for (int c = 0; c < N; ++c) number.part[c] = static_cast<T>(NAN);
            });
        } else {
            const auto heads = load<N, W>(rows.heads, k, v, d), rotors = load<N, W>(rows.rotors, k, v, d);
            result.each([&](Number<T, N>& number, int w) {
                number = multiply(heads.at[w], rows.normalize ? normalize(rotors.at[w]) : rotors.at[w], table);
            });
            for (const Gathered<T>* shifts : {&rows.translations, &rows.head_translations}) {
                if (!shifts->rows) continue;
                const auto shift = load<N, W>(*shifts, k, v, d);
                result.each([&](Number<T, N>& number, int w) {
                    for (int c = 0; c < N; ++c) number.part[c] += shift.at[w].part[c];
                });
            }
        }
        store(result, out + k * N * d + v, d);
    });
}

template <class T, int W>
__device__ void add(T* sums, const Wide<T, W>& terms) {
    for (int w = 0; w < W; ++w) atomicAdd(sums + w, terms.at[w]);
}

#if __CUDA_ARCH__ >= 900
__device__ void add(float* sums, const Wide<float, 4>& terms) {
    atomicAdd(reinterpret_cast<float4*>(sums), make_float4(terms.at[0], terms.at[1], terms.at[2], terms.at[3]));
}
#endif

/// The terms of sums by the row of `out` that they go to, so that a row is written once where its terms are few:
/// `terms` has those of a row one after the other, and before ends[row]. Rows stand in no fixed order, nor do a row's
/// terms.
struct Grouped {
    static constexpr std::int64_t window = 16;  // terms that a thread adds before it writes

    std::int64_t *terms, *ends;
    unsigned* counts;           // of each row
    unsigned long long* total;  // terms of all rows

    __device__ std::int64_t first(std::int64_t row) const { return ends[row] - counts[row]; }

    /// Whether one thread adds all terms of a row.
    __device__ bool whole(std::int64_t row) const { return first(row) / window == (ends[row] - 1) / window; }
};

/// Counts the terms of each row. What lies outside the tables is left out.
template <class T>
__global__ void count_terms_kernel(const __grid_constant__ Gathered<T> x, const __grid_constant__ Gathered<T> y,
                                   const __grid_constant__ Gathered<T> out, const __grid_constant__ Grouped grouped,
                                   std::int64_t n) {
    for_each_position(n, 1, [&](std::int64_t k, std::int64_t) {
        if (x.has(k) && y.has(k) && out.has(k)) atomicAdd(grouped.counts + out.ids[k], 1u);
    });
}

/// Gives each row its place, where `ends` begins.
__global__ void place_rows_kernel(const __grid_constant__ Grouped grouped, std::int64_t rows) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const unsigned lane = threadIdx.x % 32;
    const unsigned long long count = row < rows ? grouped.counts[row] : 0;
    unsigned long long end = count, first = 0;
    for (unsigned distance = 1; distance < 32; distance *= 2) {
        const unsigned long long before = __shfl_up_sync(whole_warp, end, distance);
        if (lane >= distance) end += before;
    }
    if (lane == 31) first = atomicAdd(grouped.total, end);
    first = __shfl_sync(whole_warp, first, 31);
    if (row < rows) grouped.ends[row] = static_cast<std::int64_t>(first + end - count);
}

/// Writes the terms of each row, and moves `ends` to where they end.
template <class T>
__global__ void group_terms_kernel(const __grid_constant__ Gathered<T> x, const __grid_constant__ Gathered<T> y,
                                   const __grid_constant__ Gathered<T> out, const __grid_constant__ Grouped grouped,
                                   std::int64_t n) {
    for_each_position(n, 1, [&](std::int64_t k, std::int64_t) {
        if (!x.has(k) || !y.has(k) || !out.has(k)) return;
        const auto at = atomicAdd(reinterpret_cast<unsigned long long*>(grouped.ends + out.ids[k]), 1ull);
        grouped.terms[at] = k;
    });
}

/// Zeros in the rows that no thread writes, or to which several add.
template <int N, int W, class T>
__global__ void clear_rows_kernel(T* out, const __grid_constant__ Grouped grouped, std::int64_t rows, std::int64_t d) {
    for_each_number<W>(rows, d, [&](std::int64_t row, std::int64_t v) {
        if (grouped.counts[row] == 0 || !grouped.whole(row)) store(Numbers<T, N, W>{}, out + row * N * d + v, d);
    });
}

template <int N, int W, class T>
__global__ void sum_products_kernel(const __grid_constant__ Gathered<T> x, const __grid_constant__ Gathered<T> y,
                                    const __grid_constant__ Gathered<T> out, const __grid_constant__ Grouped grouped,
                                    std::int64_t windows, std::int64_t d, const __grid_constant__ Table<T, N> table) {
    for_each_number<W>(windows, d, [&](std::int64_t window, std::int64_t v) {
        const auto total = static_cast<std::int64_t>(*grouped.total);
        const std::int64_t begin = window * Grouped::window;
        const std::int64_t end = begin + Grouped::window < total ? begin + Grouped::window : total;
        Numbers<T, N, W> sums;
        const auto write = [&](std::int64_t row) {
            T* to = const_cast<T*>(out.rows) + row * N * d + v;
            if (grouped.whole(row)) {
                store(sums, to, d);
                return;
            }
            for (int c = 0; c < N; ++c) {
                Wide<T, W> terms;
                for (int w = 0; w < W; ++w) terms.at[w] = sums.at[w].part[c];
                add(to + c * d, terms);
            }
        };
        std::int64_t row = -1;
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t k = grouped.terms[i];
            const auto left = load<N, W>(x, k, v, d), right = load<N, W>(y, k, v, d);
            if (out.ids[k] != row) {
                if (row >= 0) write(row);
                row = out.ids[k];
                sums = {};
            }
            sums.each([&](Number<T, N>& number, int w) {
                const Number<T, N> product = multiply(left.at[w], right.at[w], table);
                for (int c = 0; c < N; ++c) number.part[c] += product.part[c];
            });
        }
        if (row >= 0) write(row);
    });
}

template <class T>
__device__ T softplus(T x) {
    return (x < 0 ? T(0) : x) + log1p(exp(x < 0 ? x : -x));
}

constexpr double slope = 0.79788456080286535588;  // sqrt(2 / pi)

/// h, whose mean is mapped already, becomes the parts of a query; returns what the position adds to its offset.
template <Flow kind, class T, int N>
__device__ T query_parts(Number<T, N>& h, T scale) {
    const T mean = h.part[0];
    if constexpr (kind == Flow::wasserstein) {
        const T a = abs(scale * h.part[1]);
        h = {{2 * mean, 2 * a}};
        return -(mean * mean + a * a);
    } else if constexpr (kind == Flow::piecewise) {
        const T a1 = abs(scale * h.part[1]), a2 = abs(scale * h.part[2]);
        h = {{mean, a1, a2}};
        return -(mean * mean + (a1 * a1 + a2 * a2) / 2 + T(slope) * mean * (a2 - a1));
    } else {
        const T a = softplus(scale) * softplus(h.part[1]);
        h = {{-(a * a + mean * mean) / 2, mean}};
        return log(a) + T(0.5);
    }
}

/// t becomes the parts of a key; returns what the position adds to its bias.
template <Flow kind, class T, int N>
__device__ T key_parts(Number<T, N>& t) {
    const T mean = t.part[0];
    if constexpr (kind == Flow::wasserstein) {
        const T b = abs(t.part[1]);
        t.part[1] = b;
        return -(mean * mean + b * b);
    } else if constexpr (kind == Flow::piecewise) {
        const T b1 = abs(t.part[1]), b2 = abs(t.part[2]), tilt = T(slope) * (b1 - b2);
        t = {{2 * mean - tilt, b1 - T(slope) * mean, b2 + T(slope) * mean}};
        return mean * tilt - mean * mean - (b1 * b1 + b2 * b2) / 2;
    } else {
        const T b = softplus(t.part[1]), precision = 1 / (b * b);
        t = {{precision, mean * precision}};
        return -(log(b) + mean * mean * precision / 2);
    }
}

/// `offset` is zero before; its terms are added in no fixed order. Rows whose ids lie outside the tables become NaN.
template <Flow kind, int N, class T>
__global__ void flow_query_kernel(const __grid_constant__ Gathered<T> heads,
                                  const __grid_constant__ Gathered<T> relations, T* out, T* offset, std::int64_t n,
                                  std::int64_t d) {
    for_each_position(n, d, [&](std::int64_t k, std::int64_t v) {
        Number<T, N> h;
        T term = static_cast<T>(NAN);
        if (heads.has(k) && relations.has(k)) {
            h = load<N, 1>(heads, k, v, d).at[0];
            const auto r = load<2, 1>(relations, k, v, d).at[0];
            h.part[0] = r.part[1] * h.part[0] + r.part[0];
            term = query_parts<kind>(h, r.part[1]);
        } else {
            for (int c = 0; c < N; ++c) h.part[c] = static_cast<T>(NAN);
        }
        store(Numbers<T, N, 1>{{h}}, out + k * N * d + v, d);
        atomicAdd(offset + k, term);
    });
}

template <Flow kind, int N, class T>
__global__ void flow_keys_kernel(const T* entities, T* out, T* bias, std::int64_t n, std::int64_t d) {
    for_each_position(n, d, [&](std::int64_t k, std::int64_t v) {
        auto t = load<N, 1>(entities + k * N * d + v, d).at[0];
        atomicAdd(bias + k, key_parts<kind>(t));
        store(Numbers<T, N, 1>{{t}}, out + k * N * d + v, d);
    });
}

/// Calls f with the dtype, the kind and its number of parts as constants.
template <class F>
void with_flow(DType dtype, Flow kind, F f) {
    const auto with_kind = [&]<class T>() {
        if (kind == Flow::wasserstein) {
            f.template operator()<T, Flow::wasserstein, 2>();
        } else if (kind == Flow::piecewise) {
            f.template operator()<T, Flow::piecewise, 3>();
        } else {
            f.template operator()<T, Flow::kl, 2>();
        }
    };
    dtype == DType::f32 ? with_kind.template operator()<float>() : with_kind.template operator()<double>();
}

template <class T, int N>
Table<T, N> table_of(const std::vector<double>& values) {
    Table<T, N> table;
    for (int c = 0; c < N; ++c)
        for (int i = 0; i < N; ++i) table.at[c][i] = static_cast<T>(values[static_cast<std::size_t>(c * N + i)]);
    return table;
}

/// `row_size`: what a step along dense rows is worth.
Leading leading_of(const Array& a, std::int64_t row_size) {
    Leading leading;
    if (a.contiguous()) {  // no divisions in the kernel
        leading.axes = 1;
        leading.stride[0] = row_size;
        return leading;
    }
    leading.axes = a.ndim - 2;
    for (int axis = 0; axis < leading.axes; ++axis) {
        leading.length[axis] = a.dim(axis);
        leading.stride[axis] = a.stride(axis);
    }
    return leading;
}

/// Whether planes of d elements can be read 16 bytes at a time.
bool wide(DType dtype, std::int64_t d, std::initializer_list<const void*> starts,
          std::initializer_list<const Leading*> leading = {}) {
    const std::int64_t elements = 16 / static_cast<std::int64_t>(size_of(dtype));
    bool fits = d % elements == 0;
    for (const void* start : starts) fits = fits && reinterpret_cast<std::uintptr_t>(start) % 16 == 0;
    for (const Leading* of : leading)
        for (int axis = 0; axis < of->axes; ++axis) fits = fits && of->stride[axis] % elements == 0;
    return fits;
}

/// Calls f with the dtype, the number of components, and the elements that are read at a time, as constants.
template <class F>
void with_number(DType dtype, std::int64_t components, bool wide, F f) {
    const auto with_components = [&]<class T, int W>() {
        if (components == 2) {
            f.template operator()<T, 2, W>();
        } else if (components == 4) {
            f.template operator()<T, 4, W>();
        } else {
            f.template operator()<T, 8, W>();
        }
    };
    const auto with_width = [&]<class T>() {
        wide ? with_components.template operator()<T, 16 / sizeof(T)>() : with_components.template operator()<T, 1>();
    };
    dtype == DType::f32 ? with_width.template operator()<float>() : with_width.template operator()<double>();
}

template <class T>
Gathered<T> gathered(const Array& rows, const Array& ids) {
    return {rows ? rows.as<const T>() : nullptr, ids.as<const std::int64_t>(), rows ? rows.dim(0) : 0};
}

std::int64_t rows_of(const Array& a, std::int64_t row_size) {
    return row_size == 0 ? 0 : a.size() / row_size;
}

}  // namespace

void run(const HypercomplexProduct& op, Cuda cuda) {
    const std::int64_t d = op.d(), row_size = op.components() * d, rows = rows_of(op.out, row_size);
    const Leading x = leading_of(op.x, row_size), y = leading_of(op.y, row_size);
    const bool fits = wide(op.x.dtype, d, {op.x.data, op.y.data, op.out.data}, {&x, &y});
    with_number(op.x.dtype, op.components(), fits, [&]<class T, int N, int W>() {
        launch_rows(op.op, cuda, rows, d / W, product_kernel<N, W, T>, op.x.as<const T>(), x, op.y.as<const T>(), y,
                    op.out.as<T>(), rows, d, table_of<T, N>(op.table));
    });
}

void run(const HypercomplexMap& op, Cuda cuda) {
    const std::int64_t d = op.d(), rows = rows_of(op.x, op.components() * d);
    const bool fits = wide(op.x.dtype, d, {op.x.data, op.out.data});
    with_number(op.x.dtype, op.components(), fits, [&]<class T, int N, int W>() {
        launch_rows(op.op, cuda, rows, d / W, map_kernel<N, W, T>, op.x.as<const T>(), op.out.as<T>(), op.kind, rows,
                    d);
    });
}

void run(const RelationQuery& op, Cuda cuda) {
    const std::int64_t n = op.head_ids.dim(0), d = op.entities.dim(2);
    const bool fits =
        wide(op.entities.dtype, d,
             {op.entities.data, op.relations.data, op.translations.data, op.head_translations.data, op.out.data});
    with_number(op.entities.dtype, op.entities.dim(1), fits, [&]<class T, int N, int W>() {
        const RelationRows<T> rows{gathered<T>(op.entities, op.head_ids), gathered<T>(op.relations, op.rotor_ids()),
                                   gathered<T>(op.translations, op.relation_ids),
                                   gathered<T>(op.head_translations, op.head_ids), op.normalize};
        launch_rows(op.op, cuda, n, d / W, relation_query_kernel<N, W, T>, rows, op.out.as<T>(), n, d,
                    table_of<T, N>(op.table));
    });
}

void run(const HypercomplexSums& op, Cuda cuda) {
    const std::int64_t n = op.out_ids.dim(0), d = op.out.dim(2);
    const bool fits = wide(op.x.dtype, d, {op.x.data, op.y.data, op.out.data});
    const std::int64_t rows = op.out.dim(0), windows = (n + Grouped::window - 1) / Grouped::window;
    const Scratch<std::int64_t> terms(op.op, cuda, n), ends(op.op, cuda, rows);
    const Scratch<unsigned> counts(op.op, cuda, rows);
    const Scratch<unsigned long long> total(op.op, cuda, 1);
    const Grouped grouped{terms.get(), ends.get(), counts.get(), total.get()};
    fill_with_zeros(op.op, cuda, counts.get(), rows);
    fill_with_zeros(op.op, cuda, total.get(), 1);
    with_number(op.x.dtype, op.out.dim(1), fits, [&]<class T, int N, int W>() {
        const auto x = gathered<T>(op.x, op.x_ids), y = gathered<T>(op.y, op.y_ids);
        const auto out = gathered<T>(op.out, op.out_ids);
        launch_rows(op.op, cuda, n, 1, count_terms_kernel<T>, x, y, out, grouped, n);
        if (rows > 0)
            launch(op.op, cuda, blocks_for(rows, threads_per_block), dim3(threads_per_block), 0, place_rows_kernel,
                   grouped, rows);
        launch_rows(op.op, cuda, n, 1, group_terms_kernel<T>, x, y, out, grouped, n);
        launch_rows(op.op, cuda, rows, d / W, clear_rows_kernel<N, W, T>, op.out.as<T>(), grouped, rows, d);
        launch_rows(op.op, cuda, windows, d / W, sum_products_kernel<N, W, T>, x, y, out, grouped, windows, d,
                    table_of<T, N>(op.table));
    });
}

void run(const FlowQuery& op, Cuda cuda) {
    const std::int64_t n = op.head_ids.dim(0), d = op.entities.dim(2);
    with_flow(op.entities.dtype, op.kind, [&]<class T, Flow kind, int N>() {
        fill_with_zeros(op.op, cuda, op.offset.as<T>(), op.offset.size());
        launch_rows(op.op, cuda, n, d, flow_query_kernel<kind, N, T>, gathered<T>(op.entities, op.head_ids),
                    gathered<T>(op.relations, op.relation_ids), op.out.as<T>(), op.offset.as<T>(), n, d);
    });
}

void run(const FlowKeys& op, Cuda cuda) {
    const std::int64_t n = op.entities.dim(0), d = op.entities.dim(2);
    with_flow(op.entities.dtype, op.kind, [&]<class T, Flow kind, int N>() {
        fill_with_zeros(op.op, cuda, op.bias.as<T>(), op.bias.size());
        launch_rows(op.op, cuda, n, d, flow_keys_kernel<kind, N, T>, op.entities.as<const T>(), op.out.as<T>(),
                    op.bias.as<T>(), n, d);
    });
}

}  // namespace polyvec
