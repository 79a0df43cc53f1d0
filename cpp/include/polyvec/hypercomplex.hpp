/// Products and norms of complex numbers, quaternions, dihedrons and octonions, and the fused relation query (S01);
/// queries and keys of normalising flows (S03).
///
/// Planar arrays are (..., C, d): C planes of length d, C = 2, 4 or 8. Interleaved arrays are (..., C).
/// An algebra is a C x C table: out[c] = sum_i table[c][i] x[i] y[i ^ c].
/// Paper: Dihedron algebraic embeddings for spatio-temporal knowledge graphs (Robin, Lion, Tetra).
#pragma once

#include <vector>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"

namespace polyvec {

inline void require_components(const char* op, std::int64_t components) {
    require(components == 2 || components == 4 || components == 8, op,
            "the algebra must have 2, 4 or 8 components, got ", components);
}

/// out = x (*) y. Leading axes of x and y may have stride 0 (broadcasting); out is contiguous.
struct HypercomplexProduct {
    static constexpr const char* op = "hypercomplex.product";
    Array x, y, out;
    std::vector<double> table;
    bool interleaved = false;  // then x and y are contiguous, too

    std::int64_t components() const { return out.dim(interleaved ? -1 : -2); }
    std::int64_t d() const { return interleaved ? 1 : out.dim(-1); }

    void validate() const {
        require_float(op, x);
        require_dtype(op, y, x.dtype);
        require_out(op, out, x.dtype);
        const int axes = interleaved ? 1 : 2;
        for (const Array* a : {&x, &y}) {
            require(a->ndim == out.ndim && out.ndim >= axes, op, a->name, " must have as many axes as out (", out.ndim,
                    "), got ", a->ndim);
            require(a->shape == out.shape, op, a->name, " must have the shape of out ", out.shape_text(), ", got ",
                    a->shape_text());
            require(a->dense(axes), op, a->name, " must be dense in its last ", axes, " axes");
            require(!interleaved || a->contiguous(), op, a->name, " must be contiguous");
        }
        require_components(op, components());
        require(static_cast<std::int64_t>(table.size()) == components() * components(), op,
                "algebra must have a table of ", components(), " x ", components(), ", got ", table.size(), " entries");
    }
};

/// A function of one array: norm = sqrt(sum of squares over the components), x / norm, or the conjugate.
struct HypercomplexMap {
    enum class Kind { norm, normalize, conjugate };

    const char* op;
    Array x, out;  // out: (..., d) or (...) for the norm, else as x; all contiguous
    Kind kind;
    bool interleaved = false;

    std::int64_t components() const { return x.dim(interleaved ? -1 : -2); }
    std::int64_t d() const { return interleaved ? 1 : x.dim(-1); }

    void validate() const {
        require_float(op, x);
        require_out(op, out, x.dtype);
        require_contiguous(op, x);
        require(x.ndim >= (interleaved ? 1 : 2), op, "x must have a component axis, got shape ", x.shape_text());
        require_components(op, components());
        const std::int64_t expected = kind == Kind::norm ? x.size() / components() : x.size();
        require(out.size() == expected, op, "out must have ", expected, " entries, got ", out.size());
    }
};

/// out[i] = entities[head_ids[i]] (*) r / |r| + translations[relation_ids[i]] + head_translations[head_ids[i]],
/// flattened; r is relations[relation_ids[i]], or relations[head_ids[i]] with rotate_by_head.
struct RelationQuery {
    static constexpr const char* op = "hypercomplex.relation_query";
    Array entities, relations;     // (N, C, d), (R, C, d)
    Array head_ids, relation_ids;  // (n,), (n,) int64
    Array translations;            // (R, C, d), or absent
    Array head_translations;       // (N, C, d), or absent
    Array out;                     // (n, C * d)
    std::vector<double> table;
    bool normalize = true;
    bool rotate_by_head = false;  // then relations is (N, C, d)

    const Array& rotor_ids() const { return rotate_by_head ? head_ids : relation_ids; }

    void validate() const {
        require_float(op, entities);
        require_ndim(op, entities, 3);
        require_ndim(op, relations, 3);
        require_components(op, entities.dim(1));
        require(static_cast<std::int64_t>(table.size()) == entities.dim(1) * entities.dim(1), op, "algebra must have ",
                entities.dim(1), " components, as entities has, got a table of ", table.size(), " entries");
        for (const Array* a : {&relations, &translations, &head_translations}) {
            if (!*a) continue;
            require_dtype(op, *a, entities.dtype);
            require_contiguous(op, *a);
            require_ndim(op, *a, 3);
            require(a->dim(1) == entities.dim(1) && a->dim(2) == entities.dim(2), op, a->name,
                    " must have the same last two axes as entities (", entities.dim(1), ", ", entities.dim(2),
                    "), got (", a->dim(1), ", ", a->dim(2), ")");
        }
        if (rotate_by_head) require_dim(op, relations, 0, entities.dim(0), "as many rows as entities");
        if (translations && !rotate_by_head)
            require_dim(op, translations, 0, relations.dim(0), "as many rows as relations");
        if (head_translations) require_dim(op, head_translations, 0, entities.dim(0), "as many rows as entities");
        require_contiguous(op, entities);
        for (const Array* ids : {&head_ids, &relation_ids}) {
            require_ndim(op, *ids, 1);
            require_dtype(op, *ids, DType::i64);
            require_contiguous(op, *ids);
        }
        require_dim(op, relation_ids, 0, head_ids.dim(0), "the same length as head_ids");
        require_out(op, out, entities.dtype);
        require_ndim(op, out, 2);
        require_dim(op, out, 0, head_ids.dim(0), "one row a head id");
        require_dim(op, out, 1, entities.dim(1) * entities.dim(2), "components times d columns");
        // A GPU's ids are not readable here: its kernel writes NaN rows instead
        require_ids(op, head_ids, entities.dim(0));
        if (!rotate_by_head || translations)
            require_ids(op, relation_ids, rotate_by_head ? translations.dim(0) : relations.dim(0));
    }
};

/// out[k] = sum of x[x_ids[i]] (*) y[y_ids[i]] over the i with out_ids[i] = k, added in ascending order of i on a CPU.
/// With the tables of an algebra's gradients these are the gradients of a relation query, and theirs in turn.
struct HypercomplexSums {
    static constexpr const char* op = "hypercomplex.sum_products";
    Array x, y;                   // (., C, d)
    Array x_ids, y_ids, out_ids;  // (n,) int64
    Array out;                    // (rows, C, d)
    std::vector<double> table;

    void validate() const {
        require_float(op, x);
        require_ndim(op, out, 3);
        require_components(op, out.dim(1));
        require(static_cast<std::int64_t>(table.size()) == out.dim(1) * out.dim(1), op, "algebra must have ",
                out.dim(1), " components, as out has, got a table of ", table.size(), " entries");
        require_out(op, out, x.dtype);
        for (const Array* a : {&x, &y}) {
            require_dtype(op, *a, x.dtype);
            require_contiguous(op, *a);
            require_ndim(op, *a, 3);
            require(a->dim(1) == out.dim(1) && a->dim(2) == out.dim(2), op, a->name,
                    " must have the same last two axes as out (", out.dim(1), ", ", out.dim(2), "), got (", a->dim(1),
                    ", ", a->dim(2), ")");
        }
        for (const Array* ids : {&x_ids, &y_ids, &out_ids}) {
            require_ndim(op, *ids, 1);
            require_dtype(op, *ids, DType::i64);
            require_contiguous(op, *ids);
            require_dim(op, *ids, 0, out_ids.dim(0), "the same length as out_ids");
        }
        // A GPU's kernel leaves out what it cannot find
        require_ids(op, x_ids, x.dim(0));
        require_ids(op, y_ids, y.dim(0));
        require_ids(op, out_ids, out.dim(0));
    }
};

/// How far apart two distributions are, by dimension: squared Wasserstein distance of Gaussians, the same of
/// distributions with a scale on either side of the mean, or the Kullback-Leibler divergence of Gaussians (S03).
enum class Flow { wasserstein, piecewise, kl };

/// Rows of an entity: mean and scale, or mean and two scales.
inline std::int64_t flow_parts(Flow kind) {
    return kind == Flow::piecewise ? 3 : 2;
}

/// -distance of what relation r makes of head h to tail t is out . keys + offset + bias: see FlowKeys.
/// r maps (mean, scales) to (scale_r mean + mean_r, scale_r scales).
struct FlowQuery {
    static constexpr const char* op = "hypercomplex.flow_query";
    Array entities, relations;     // (N, parts, d), (R, 2, d)
    Array head_ids, relation_ids;  // (n,), (n,) int64
    Array out, offset;             // (n, parts * d), (n,)
    Flow kind;

    void validate() const {
        require_float(op, entities);
        for (const Array* a : {&entities, &relations}) {
            require_dtype(op, *a, entities.dtype);
            require_ndim(op, *a, 3);
            require_contiguous(op, *a);
        }
        require_dim(op, entities, 1, flow_parts(kind), "a mean and the scales of its kind on axis 1");
        require_dim(op, relations, 1, 2, "a mean and a scale on axis 1");
        require_dim(op, relations, 2, entities.dim(2), "the same d as entities");
        for (const Array* ids : {&head_ids, &relation_ids}) {
            require_ndim(op, *ids, 1);
            require_dtype(op, *ids, DType::i64);
            require_contiguous(op, *ids);
            require_dim(op, *ids, 0, head_ids.dim(0), "the same length as head_ids");
        }
        for (const Array* a : {&out, &offset}) {
            require_out(op, *a, entities.dtype);
            require_dim(op, *a, 0, head_ids.dim(0), "one row a head id");
        }
        require_ndim(op, out, 2);
        require_ndim(op, offset, 1);
        require_dim(op, out, 1, entities.dim(1) * entities.dim(2), "parts times d columns");
        // A GPU's kernel writes NaN rows instead
        require_ids(op, head_ids, entities.dim(0));
        require_ids(op, relation_ids, relations.dim(0));
    }
};

/// The items and the bias that an inner-product scan compares the queries of FlowQuery with.
struct FlowKeys {
    static constexpr const char* op = "hypercomplex.flow_keys";
    Array entities;   // (N, parts, d)
    Array out, bias;  // (N, parts * d), (N,)
    Flow kind;

    void validate() const {
        require_float(op, entities);
        require_ndim(op, entities, 3);
        require_contiguous(op, entities);
        require_dim(op, entities, 1, flow_parts(kind), "a mean and the scales of its kind on axis 1");
        for (const Array* a : {&out, &bias}) {
            require_out(op, *a, entities.dtype);
            require_dim(op, *a, 0, entities.dim(0), "one row an entity");
        }
        require_ndim(op, out, 2);
        require_ndim(op, bias, 1);
        require_dim(op, out, 1, entities.dim(1) * entities.dim(2), "parts times d columns");
    }
};

void run(const HypercomplexProduct&, Cpu);
void run(const HypercomplexMap&, Cpu);
void run(const RelationQuery&, Cpu);
void run(const HypercomplexSums&, Cpu);
void run(const FlowQuery&, Cpu);
void run(const FlowKeys&, Cpu);
void run(const HypercomplexProduct&, Cuda);
void run(const HypercomplexMap&, Cuda);
void run(const RelationQuery&, Cuda);
void run(const HypercomplexSums&, Cuda);
void run(const FlowQuery&, Cuda);
void run(const FlowKeys&, Cuda);

}  // namespace polyvec
