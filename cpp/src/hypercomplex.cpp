#include "polyvec/hypercomplex.hpp"

#include <algorithm>
#include <vector>

#include "polyvec/parallel.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t elements_per_piece = 1 << 16;  // a piece costs tens of microseconds
constexpr std::int64_t interleaved_block = 256;       // numbers turned into planes at a time

std::int64_t rows_per_piece(std::int64_t row_size) {
    return std::max<std::int64_t>(1, elements_per_piece / std::max<std::int64_t>(1, row_size));
}

template <class T>
std::vector<T> cast(const std::vector<double>& table) {
    return {table.begin(), table.end()};
}

/// The offset of row `row` of an array whose leading axes (all but the last two) are strided, `row` in row-major order.
std::int64_t row_offset(const Array& a, std::int64_t row) {
    std::int64_t offset = 0;
    for (int axis = a.ndim - 3; axis >= 0; --axis) {
        offset += row % a.dim(axis) * a.stride(axis);
        row /= a.dim(axis);
    }
    return offset;
}

template <class T>
void product(const HypercomplexProduct& op, int num_threads) {
    const auto& kernel = typed<T>(*kernels().hypercomplex);
    const std::vector<T> table = cast<T>(op.table);
    const std::int64_t components = op.components(), d = op.d(), row_size = components * d;
    const T *x = op.x.as<const T>(), *y = op.y.as<const T>();
    T* out = op.out.as<T>();
    if (op.interleaved) {
        const std::int64_t n = op.out.size() / components;
        parallel_for(n, rows_per_piece(components), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
            T planes[3][8 * interleaved_block];
            for (std::int64_t i = begin; i < end; i += interleaved_block) {
                const std::int64_t count = std::min(interleaved_block, end - i);
                kernel.to_planes(x + i * components, planes[0], components, count);
                kernel.to_planes(y + i * components, planes[1], components, count);
                kernel.product(planes[0], planes[1], planes[2], components, count, table.data());
                kernel.from_planes(planes[2], out + i * components, components, count);
            }
        });
        return;
    }
    const bool plain = op.x.contiguous() && op.y.contiguous();
    const std::int64_t n = row_size == 0 ? 0 : op.out.size() / row_size;
    parallel_for(n, rows_per_piece(row_size), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i)
            kernel.product(x + (plain ? i * row_size : row_offset(op.x, i)),
                           y + (plain ? i * row_size : row_offset(op.y, i)), out + i * row_size, components, d,
                           table.data());
    });
}

template <class T>
void map(const HypercomplexMap& op, int num_threads) {
    const auto& kernel = typed<T>(*kernels().hypercomplex);
    const std::int64_t components = op.components(), d = op.d(), row_size = components * d;
    const T* x = op.x.as<const T>();
    T* out = op.out.as<T>();
    const std::int64_t n = row_size == 0 ? 0 : op.x.size() / row_size;
    using Kind = HypercomplexMap::Kind;
    const bool keeps_shape = op.kind != Kind::norm;
    const std::int64_t out_size = keeps_shape ? row_size : d;
    const auto apply = op.kind == Kind::norm        ? kernel.norm
                       : op.kind == Kind::normalize ? kernel.normalize
                                                    : kernel.conjugate;
    if (!op.interleaved) {
        parallel_for(n, rows_per_piece(row_size), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
            for (std::int64_t i = begin; i < end; ++i) apply(x + i * row_size, out + i * out_size, components, d);
        });
        return;
    }
    parallel_for(n, rows_per_piece(components), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        T planes[2][8 * interleaved_block];
        for (std::int64_t i = begin; i < end; i += interleaved_block) {
            const std::int64_t count = std::min(interleaved_block, end - i);
            kernel.to_planes(x + i * components, planes[0], components, count);
            apply(planes[0], keeps_shape ? planes[1] : out + i, components, count);
            if (keeps_shape) kernel.from_planes(planes[1], out + i * components, components, count);
        }
    });
}

template <class T>
Gathered<T> gathered(const Array& rows, const Array& ids) {
    return {rows ? rows.as<const T>() : nullptr, ids.as<const std::int64_t>()};
}

template <class T>
void relation_query(const RelationQuery& op, int num_threads) {
    const auto& kernel = typed<T>(*kernels().hypercomplex);
    const std::vector<T> table = cast<T>(op.table);
    const std::int64_t components = op.entities.dim(1), d = op.entities.dim(2);
    const RelationRows<T> rows{gathered<T>(op.entities, op.head_ids), gathered<T>(op.relations, op.rotor_ids()),
                               gathered<T>(op.translations, op.relation_ids),
                               gathered<T>(op.head_translations, op.head_ids), op.normalize};
    T* out = op.out.as<T>();
    parallel_for(op.head_ids.dim(0), rows_per_piece(components * d), num_threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     kernel.relation_query(rows, begin, end, out, components, d, table.data());
                 });
}

/// Positions 0 .. n sorted by their id in [0, rows), ascending where equal: row r's are order[begins[r]] ..
/// order[begins[r + 1]].
struct ByRow {
    std::vector<std::int64_t> begins, order;

    ByRow(const std::int64_t* ids, std::int64_t n, std::int64_t rows) : begins(rows + 2), order(n) {
        for (std::int64_t i = 0; i < n; ++i) ++begins[ids[i] + 2];
        for (std::int64_t r = 0; r < rows; ++r) begins[r + 2] += begins[r + 1];
        for (std::int64_t i = 0; i < n; ++i) order[begins[ids[i] + 1]++] = i;  // turns the begin of r + 1 into its end
    }
};

template <class T>
void sum_products(const HypercomplexSums& op, int num_threads) {
    const auto& kernel = typed<T>(*kernels().hypercomplex);
    const std::vector<T> table = cast<T>(op.table);
    const std::int64_t rows = op.out.dim(0), components = op.out.dim(1), d = op.out.dim(2), n = op.out_ids.dim(0);
    const Gathered<T> x = gathered<T>(op.x, op.x_ids), y = gathered<T>(op.y, op.y_ids);
    const ByRow by_row(op.out_ids.as<const std::int64_t>(), n, rows);
    T* out = op.out.as<T>();
    const std::int64_t products_a_row = 1 + n / std::max<std::int64_t>(1, rows);
    parallel_for(rows, rows_per_piece(products_a_row * components * d), num_threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     kernel.sum_products(x, y, by_row.begins.data(), by_row.order.data(), begin, end, out, components,
                                         d, table.data());
                 });
}

template <class T>
const FlowKernel<T>& flow_kernel(Flow kind) {
    const auto& kernel = typed<T>(*kernels().hypercomplex);
    return kind == Flow::wasserstein ? kernel.wasserstein : kind == Flow::piecewise ? kernel.piecewise : kernel.kl;
}

template <class T>
void flow_query(const FlowQuery& op, int num_threads) {
    const auto& kernel = flow_kernel<T>(op.kind);
    const auto heads = gathered<T>(op.entities, op.head_ids), relations = gathered<T>(op.relations, op.relation_ids);
    const std::int64_t d = op.entities.dim(2);
    T *out = op.out.as<T>(), *offset = op.offset.as<T>();
    parallel_for(
        op.head_ids.dim(0), rows_per_piece(op.out.dim(1)), num_threads,
        [&](std::int64_t begin, std::int64_t end, int) { kernel.query(heads, relations, begin, end, d, out, offset); });
}

template <class T>
void flow_keys(const FlowKeys& op, int num_threads) {
    const auto& kernel = flow_kernel<T>(op.kind);
    const T* entities = op.entities.as<const T>();
    const std::int64_t d = op.entities.dim(2);
    T *out = op.out.as<T>(), *bias = op.bias.as<T>();
    parallel_for(op.entities.dim(0), rows_per_piece(op.out.dim(1)), num_threads,
                 [&](std::int64_t begin, std::int64_t end, int) { kernel.keys(entities, begin, end, d, out, bias); });
}

}  // namespace

void run(const HypercomplexProduct& op, Cpu cpu) {
    op.x.dtype == DType::f32 ? product<float>(op, cpu.num_threads) : product<double>(op, cpu.num_threads);
}

void run(const HypercomplexMap& op, Cpu cpu) {
    op.x.dtype == DType::f32 ? map<float>(op, cpu.num_threads) : map<double>(op, cpu.num_threads);
}

void run(const RelationQuery& op, Cpu cpu) {
    op.entities.dtype == DType::f32 ? relation_query<float>(op, cpu.num_threads)
                                    : relation_query<double>(op, cpu.num_threads);
}

void run(const HypercomplexSums& op, Cpu cpu) {
    op.x.dtype == DType::f32 ? sum_products<float>(op, cpu.num_threads) : sum_products<double>(op, cpu.num_threads);
}

void run(const FlowQuery& op, Cpu cpu) {
    op.entities.dtype == DType::f32 ? flow_query<float>(op, cpu.num_threads) : flow_query<double>(op, cpu.num_threads);
}

void run(const FlowKeys& op, Cpu cpu) {
    op.entities.dtype == DType::f32 ? flow_keys<float>(op, cpu.num_threads) : flow_keys<double>(op, cpu.num_threads);
}

}  // namespace polyvec
