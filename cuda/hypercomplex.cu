// The hypercomplex engine on a GPU: one thread a number, which it reads, computes and writes once. An op moves 3 C
// elements a number and does 2 C^2 flops, so memory is the limit; neighbouring threads read neighbouring addresses.
// Interleaved arrays are planar ones with d = 1.
#include <cmath>

#include "launch.cuh"
#include "polyvec/hypercomplex.hpp"

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

template <int N, class T>
__device__ Number<T, N> load(const T* x, std::int64_t d) {
    Number<T, N> number;
    for (int c = 0; c < N; ++c) number.part[c] = x[c * d];
    return number;
}

template <int N, class T>
__device__ void store(const Number<T, N>& number, T* out, std::int64_t d) {
    for (int c = 0; c < N; ++c) out[c * d] = number.part[c];
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

template <int N, class T>
__global__ void product_kernel(const T* x, const __grid_constant__ Leading x_rows, const T* y,
                               const __grid_constant__ Leading y_rows, T* out, std::int64_t rows, std::int64_t d,
                               const __grid_constant__ Table<T, N> table) {
    for_each_position(rows, d, [&](std::int64_t row, std::int64_t v) {
        const auto left = load<N>(x + row_offset(x_rows, row) + v, d);
        const auto right = load<N>(y + row_offset(y_rows, row) + v, d);
        store(multiply(left, right, table), out + row * N * d + v, d);
    });
}

template <int N, class T>
__global__ void map_kernel(const T* x, T* out, HypercomplexMap::Kind kind, std::int64_t rows, std::int64_t d) {
    using Kind = HypercomplexMap::Kind;
    for_each_position(rows, d, [&](std::int64_t row, std::int64_t v) {
        const auto number = load<N>(x + row * N * d + v, d);
        if (kind == Kind::norm) {
            out[row * d + v] = norm(number);
        } else {
            store(kind == Kind::normalize ? normalize(number) : conjugate(number), out + row * N * d + v, d);
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

template <int N, class T>
__device__ Number<T, N> load(const Gathered<T>& gathered, std::int64_t k, std::int64_t v, std::int64_t d) {
    return load<N>(gathered.rows + gathered.ids[k] * N * d + v, d);
}

template <class T>
struct RelationRows {
    Gathered<T> heads, rotors, translations, head_translations;
    bool normalize;
};

/// A row whose ids lie outside the tables becomes NaN: the host cannot see them without waiting for the GPU.
template <int N, class T>
__global__ void relation_query_kernel(const __grid_constant__ RelationRows<T> rows, T* out, std::int64_t n,
                                      std::int64_t d, const __grid_constant__ Table<T, N> table) {
    for_each_position(n, d, [&](std::int64_t k, std::int64_t v) {
        Number<T, N> result;
        if (!rows.heads.has(k) || !rows.rotors.has(k) || !rows.translations.has(k)) {
            for (int c = 0; c < N; ++c) result.part[c] = static_cast<T>(NAN);
        } else {
            auto rotor = load<N>(rows.rotors, k, v, d);
            if (rows.normalize) rotor = normalize(rotor);
            result = multiply(load<N>(rows.heads, k, v, d), rotor, table);
            for (const Gathered<T>* shifts : {&rows.translations, &rows.head_translations}) {
                if (!shifts->rows) continue;
                const auto shift = load<N>(*shifts, k, v, d);
                for (int c = 0; c < N; ++c) result.part[c] += shift.part[c];
            }
        }
        store(result, out + k * N * d + v, d);
    });
}

/// Adds to `out`, which is zero before, in no fixed order. What lies outside the tables is left out.
template <int N, class T>
__global__ void sum_products_kernel(const __grid_constant__ Gathered<T> x, const __grid_constant__ Gathered<T> y,
                                    const __grid_constant__ Gathered<T> out, std::int64_t n, std::int64_t d,
                                    const __grid_constant__ Table<T, N> table) {
    for_each_position(n, d, [&](std::int64_t k, std::int64_t v) {
        if (!x.has(k) || !y.has(k) || !out.has(k)) return;
        const auto product = multiply(load<N>(x, k, v, d), load<N>(y, k, v, d), table);
        T* sum = const_cast<T*>(out.rows) + out.ids[k] * N * d + v;
        for (int c = 0; c < N; ++c) atomicAdd(sum + c * d, product.part[c]);
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
            h = load<N>(heads, k, v, d);
            const auto r = load<2>(relations, k, v, d);
            h.part[0] = r.part[1] * h.part[0] + r.part[0];
            term = query_parts<kind>(h, r.part[1]);
        } else {
            for (int c = 0; c < N; ++c) h.part[c] = static_cast<T>(NAN);
        }
        store(h, out + k * N * d + v, d);
        atomicAdd(offset + k, term);
    });
}

template <Flow kind, int N, class T>
__global__ void flow_keys_kernel(const T* entities, T* out, T* bias, std::int64_t n, std::int64_t d) {
    for_each_position(n, d, [&](std::int64_t k, std::int64_t v) {
        auto t = load<N>(entities + k * N * d + v, d);
        atomicAdd(bias + k, key_parts<kind>(t));
        store(t, out + k * N * d + v, d);
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

/// Calls f with the dtype and the number of components as constants.
template <class F>
void with_number(DType dtype, std::int64_t components, F f) {
    const auto with_components = [&]<class T>() {
        if (components == 2) {
            f.template operator()<T, 2>();
        } else if (components == 4) {
            f.template operator()<T, 4>();
        } else {
            f.template operator()<T, 8>();
        }
    };
    dtype == DType::f32 ? with_components.template operator()<float>() : with_components.template operator()<double>();
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
    const std::int64_t d = op.d(), row_size = op.components() * d;
    with_number(op.x.dtype, op.components(), [&]<class T, int N>() {
        launch_rows(op.op, cuda, rows_of(op.out, row_size), d, product_kernel<N, T>, op.x.as<const T>(),
                    leading_of(op.x, row_size), op.y.as<const T>(), leading_of(op.y, row_size), op.out.as<T>(),
                    rows_of(op.out, row_size), d, table_of<T, N>(op.table));
    });
}

void run(const HypercomplexMap& op, Cuda cuda) {
    const std::int64_t d = op.d(), rows = rows_of(op.x, op.components() * d);
    with_number(op.x.dtype, op.components(), [&]<class T, int N>() {
        launch_rows(op.op, cuda, rows, d, map_kernel<N, T>, op.x.as<const T>(), op.out.as<T>(), op.kind, rows, d);
    });
}

void run(const RelationQuery& op, Cuda cuda) {
    const std::int64_t n = op.head_ids.dim(0), d = op.entities.dim(2);
    with_number(op.entities.dtype, op.entities.dim(1), [&]<class T, int N>() {
        const RelationRows<T> rows{gathered<T>(op.entities, op.head_ids), gathered<T>(op.relations, op.rotor_ids()),
                                   gathered<T>(op.translations, op.relation_ids),
                                   gathered<T>(op.head_translations, op.head_ids), op.normalize};
        launch_rows(op.op, cuda, n, d, relation_query_kernel<N, T>, rows, op.out.as<T>(), n, d,
                    table_of<T, N>(op.table));
    });
}

void run(const HypercomplexSums& op, Cuda cuda) {
    const std::int64_t n = op.out_ids.dim(0), d = op.out.dim(2);
    with_number(op.x.dtype, op.out.dim(1), [&]<class T, int N>() {
        fill_with_zeros(op.op, cuda, op.out.as<T>(), op.out.size());
        launch_rows(op.op, cuda, n, d, sum_products_kernel<N, T>, gathered<T>(op.x, op.x_ids),
                    gathered<T>(op.y, op.y_ids), gathered<T>(op.out, op.out_ids), n, d, table_of<T, N>(op.table));
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
