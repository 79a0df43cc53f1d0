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

/// The arrays of a RelationQuery as a kernel sees them.
template <class T>
struct Query {
    const T *entities, *relations, *translations;  // translations: may be null
    const std::int64_t *head_ids, *relation_ids;
    std::int64_t num_entities, num_relations;
    bool normalize;
};

/// A row whose ids lie outside the tables becomes NaN: the host cannot see them without waiting for the GPU.
template <int N, class T>
__global__ void relation_query_kernel(const __grid_constant__ Query<T> query, T* out, std::int64_t rows, std::int64_t d,
                                      const __grid_constant__ Table<T, N> table) {
    for_each_position(rows, d, [&](std::int64_t row, std::int64_t v) {
        const std::int64_t head = query.head_ids[row], relation = query.relation_ids[row];
        Number<T, N> result;
        if (head < 0 || head >= query.num_entities || relation < 0 || relation >= query.num_relations) {
            for (int c = 0; c < N; ++c) result.part[c] = static_cast<T>(NAN);
        } else {
            auto rotor = load<N>(query.relations + relation * N * d + v, d);
            if (query.normalize) rotor = normalize(rotor);
            result = multiply(load<N>(query.entities + head * N * d + v, d), rotor, table);
            if (query.translations) {
                const auto shift = load<N>(query.translations + relation * N * d + v, d);
                for (int c = 0; c < N; ++c) result.part[c] += shift.part[c];
            }
        }
        store(result, out + row * N * d + v, d);
    });
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
    const std::int64_t rows = op.head_ids.dim(0), d = op.entities.dim(2);
    with_number(op.entities.dtype, op.entities.dim(1), [&]<class T, int N>() {
        const Query<T> query{op.entities.as<const T>(),
                             op.relations.as<const T>(),
                             op.translations ? op.translations.as<const T>() : nullptr,
                             op.head_ids.as<const std::int64_t>(),
                             op.relation_ids.as<const std::int64_t>(),
                             op.entities.dim(0),
                             op.relations.dim(0),
                             op.normalize};
        launch_rows(op.op, cuda, rows, d, relation_query_kernel<N, T>, query, op.out.as<T>(), rows, d,
                    table_of<T, N>(op.table));
    });
}

}  // namespace polyvec
