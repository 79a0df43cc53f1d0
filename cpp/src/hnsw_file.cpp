#include <algorithm>

#include "hnsw_graph.hpp"

namespace polyvec {

using namespace hnsw;

namespace {

/// Files and numpy hold bfloat16 as its bits, and vectors in int8 as codes are.
DType file_dtype(DType kept) {
    return kept == DType::bf16 ? DType::u16 : kept == DType::i8 ? DType::u8 : kept;
}

std::int64_t file_width(const HnswParams& params) {
    return params.kept == DType::i8 ? params.vector_bytes() : params.dim;
}

}  // namespace

HnswState HnswIndex::state() const {
    const auto lock = reading();
    const Graph& g = *graph_;
    const auto array = [](const char* name, const void* data, DType dtype, std::int64_t rows,
                          std::int64_t columns = 0) {
        Array a;
        a.name = name;
        a.data = const_cast<void*>(data);
        a.dtype = dtype;
        a.ndim = columns ? 2 : 1;
        a.shape = {rows, columns};
        a.strides = {columns ? columns : 1, 1};
        return a;
    };
    const std::int64_t upper_rows = g.first_upper.back();
    return {
        array("vectors", g.vectors.data(), file_dtype(g.params.kept), g.n, file_width(g.params)),
        g.scales.width() ? array("scales", g.scales.data(), DType::f32, g.n) : Array{},
        g.codes.width() ? array("codes", g.codes.data(), DType::u8, g.n, g.codes.width()) : Array{},
        g.factors.width() ? array("factors", g.factors.data(), DType::f32, g.n, g.factors.width()) : Array{},
        g.params.frozen ? array("frame", g.frame.data(), DType::f32, frame_rows, g.params.dim) : Array{},
        array("links", g.links.data(), DType::u32, g.n, g.links.width()),
        array("levels", g.levels.data(), DType::u8, g.n),
        array("upper_links", g.upper_links.data(), DType::u32, upper_rows, g.params.m),
        array("ids", g.ids.data(), DType::i64, g.n),
        array("removed", g.removed.data(), DType::boolean, g.n),
        g.n ? std::int64_t(g.entry) : -1,
        g.largest_id,
        graph_,
    };
}

namespace {

template <class... Parts>
void check(bool ok, const Parts&... parts) {
    if (!ok) throw FormatError(concat("is damaged: ", parts...));
}

void check_array(const Array& a, DType dtype, std::int64_t rows, std::int64_t columns = 0) {
    const bool fits = a.dtype == dtype && a.ndim == (columns ? 2 : 1) && a.dim(0) == rows &&
                      (!columns || a.dim(1) == columns) && a.contiguous();
    check(fits, a.name, " must be ", name_of(dtype), " with ", rows, " rows, got ", name_of(a.dtype), " of shape ",
          a.shape_text());
}

}  // namespace

HnswIndex::HnswIndex(const HnswParams& params, const HnswState& state) : HnswIndex(params) {
    const std::int64_t n = state.ids.ndim > 0 ? state.ids.dim(0) : 0;
    check_array(state.ids, DType::i64, n);
    check(n <= std::int64_t(1) << 31, "it must have at most 2^31 vectors, got ", n);
    check_array(state.vectors, file_dtype(params.kept), n, file_width(params));
    check_array(state.links, DType::u32, n, 2 * params.m);
    check_array(state.levels, DType::u8, n);
    check_array(state.removed, DType::boolean, n);
    Graph& g = *graph_;
    g.n = g.capacity = n;
    g.vectors = Rows<std::uint8_t>(state.vectors.as<std::uint8_t>(), params.vector_bytes());
    g.links = Rows<std::uint32_t>(state.links.as<std::uint32_t>(), 2 * params.m);
    if (params.code_width() > 0) {
        check_array(state.codes, DType::u8, n, params.code_width());
        g.codes = Rows<std::uint8_t>(state.codes.as<std::uint8_t>(), params.code_width());
    }
    if (params.frozen) {
        check_array(state.frame, DType::f32, frame_rows, params.dim);
        g.frame = Rows<float>(state.frame.as<float>(), params.dim);
    }
    if (params.factor_count() > 0) {
        check_array(state.factors, DType::f32, n, params.factor_count());
        g.factors = Rows<float>(state.factors.as<float>(), params.factor_count());
    }
    if (params.scale_count() > 0) {
        check_array(state.scales, DType::f32, n);
        g.scales = Rows<float>(state.scales.as<float>(), params.scale_count());
    }
    g.lender = state.owner;

    const auto* levels = state.levels.as<const std::uint8_t>();
    g.levels.assign(levels, levels + n);
    std::int64_t upper_rows = 0;
    for (std::int64_t slot = 0; slot < n; ++slot) {
        check(levels[slot] <= max_level, "levels must be at most ", max_level, ", got ", +levels[slot]);
        g.first_upper.push_back(static_cast<std::uint32_t>(upper_rows += levels[slot]));
    }
    check_array(state.upper_links, DType::u32, upper_rows, params.m);
    const auto* upper = state.upper_links.as<const std::uint32_t>();
    g.upper_links.assign(upper, upper + upper_rows * params.m);
    const int highest = n ? *std::max_element(levels, levels + n) : -1;
    check(n ? state.entry >= 0 && state.entry < n && levels[state.entry] == highest : state.entry == -1,
          "entry must be a slot of the highest level, got ", state.entry);
    g.entry = n ? static_cast<std::uint32_t>(state.entry) : no_link;
    for (std::int64_t slot = 0; slot < n; ++slot) {
        for (int level = 0; level <= levels[slot]; ++level) {
            const std::uint32_t* row = g.row(static_cast<std::uint32_t>(slot), level);
            const std::uint32_t* const end = row + g.width(level);
            for (; row < end && *row != no_link; ++row)
                check(*row < n && levels[*row] >= level, "slot ", slot, " must have links to slots of its level ",
                      level, ", got ", *row);
            check(std::count(row, end, no_link) == end - row, "slot ", slot, " must have no link after its last");
        }
    }

    const auto* ids = state.ids.as<const std::int64_t>();
    g.ids.assign(ids, ids + n);
    const auto* removed = state.removed.as<const std::uint8_t>();
    g.removed.resize(n);
    g.largest_id = state.largest_id;
    std::vector<std::int64_t> sorted;
    for (std::int64_t slot = 0; slot < n; ++slot) {
        g.removed[slot] = removed[slot] != 0;
        if (!removed[slot]) sorted.push_back(ids[slot]);
        check(ids[slot] != -1, "ids must not be -1");
        g.largest_id = std::max(g.largest_id, ids[slot]);
    }
    g.live = static_cast<std::int64_t>(sorted.size());
    std::sort(sorted.begin(), sorted.end());
    check(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), "ids must be distinct");
    g.build_table();
}

}  // namespace polyvec
