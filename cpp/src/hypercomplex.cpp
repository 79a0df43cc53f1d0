#include "polyvec/hypercomplex.hpp"

#include <algorithm>
#include <vector>

#include "polyvec/parallel.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t elements_per_piece = 1 << 14;  // a piece costs tens of microseconds
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
void relation_query(const RelationQuery& op, int num_threads) {
    const auto& kernel = typed<T>(*kernels().hypercomplex);
    const std::vector<T> table = cast<T>(op.table);
    const std::int64_t components = op.entities.dim(1), d = op.entities.dim(2), row_size = components * d;
    const auto *heads = op.head_ids.as<const std::int64_t>(), *relations = op.relation_ids.as<const std::int64_t>();
    const RelationTables<T> tables{op.entities.as<const T>(), op.relations.as<const T>(),
                                   op.translations ? op.translations.as<const T>() : nullptr, op.normalize};
    T* out = op.out.as<T>();
    const std::int64_t n = op.head_ids.dim(0);
    parallel_for(n, rows_per_piece(row_size), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        kernel.relation_query(tables, heads + begin, relations + begin, end - begin, out + begin * row_size, components,
                              d, table.data());
    });
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

}  // namespace polyvec
