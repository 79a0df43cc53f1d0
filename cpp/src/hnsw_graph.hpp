/// The graph index's memory: slots with vectors, links, ids. No search and no locking here.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/hnsw.hpp"
#include "polyvec/narrow.hpp"
#include "polyvec/random.hpp"
#include "tables.hpp"

namespace polyvec::hnsw {

/// Rows come from all over memory: with pages of 2 MB the translation of their addresses stays cached. Searches of 177
/// MB gain 0 to 6 % (Zen 5, virtual machine).
template <class T>
Aligned<T> huge_pages(std::int64_t n) {
    Aligned<T> memory = aligned<T>(n);
#if defined(__linux__)
    constexpr std::uintptr_t page = 1 << 12, large = 1 << 22;
    const auto begin = (reinterpret_cast<std::uintptr_t>(memory.get()) + page - 1) / page * page;
    const auto end = reinterpret_cast<std::uintptr_t>(memory.get() + n);
    if (end > begin + large) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
    return memory;
}

/// `count` rows of `width`: our own memory, or somebody else's that is only read.
template <class T>
class Rows {
public:
    explicit Rows(std::int64_t width) : width_(width) {}
    Rows(std::int64_t count, std::int64_t width)
        : own_(huge_pages<T>(count * width)), data_(own_.get()), width_(width) {}
    Rows(T* lent, std::int64_t width) : data_(lent), width_(width) {}
    /// Room for `capacity` rows, of which the first n are those of `other`.
    Rows(const Rows& other, std::int64_t n, std::int64_t capacity) : Rows(capacity, other.width_) {
        std::copy_n(other.data_, n * width_, data_);
    }

    T* data() const { return data_; }
    T* operator[](std::int64_t i) const { return data_ + i * width_; }
    std::int64_t width() const { return width_; }

private:
    Aligned<T> own_;
    T* data_ = nullptr;
    std::int64_t width_ = 0;
};

/// Null: float32.
inline const HalfKernels* half_kernels(DType dtype) {
    const DistanceKernels& kernel = *kernels().distance;
    return dtype == DType::f16 ? &kernel.f16_by_slot : dtype == DType::bf16 ? &kernel.bf16_by_slot : nullptr;
}

/// A row of `d` elements as floats, in place or in `scratch`.
inline const float* as_floats(const void* row, const HalfKernels* half, std::int64_t d, float* scratch) {
    if (!half) return static_cast<const float*>(row);
    half->widen(row, static_cast<std::size_t>(d), scratch);
    return scratch;
}

/// Null: walks compare no integers.
inline const IntegerDistanceKernels* integer_kernels(const HnswParams& params) {
    if (!params.integers()) return nullptr;
    return params.storage == HnswStorage::int4 ? kernels().int4_distance : kernels().int8_distance;
}

constexpr std::uint32_t no_link = 0xffffffff;
constexpr int max_level = 63;
constexpr std::int64_t frame_rows = 5;

struct Graph {
    const HnswParams params;
    std::int64_t n = 0, live = 0, capacity = 0;
    std::int64_t largest_id = -1;
    std::uint32_t entry = no_link;
    Rows<std::uint8_t> vectors;  // bytes of params.kept
    Rows<std::uint8_t> codes;    // of integers: see IntegerRows; frozen: see BitRows; else width 0
    Rows<float> factors;
    Rows<float> scales;  // of vectors in int8 whose scales `factors` do not have; else width 0
    Rows<float> frame;   // frozen: see HnswState
    Rows<std::uint32_t> links;
    std::vector<std::uint32_t> upper_links;
    std::vector<std::uint32_t> first_upper;  // n + 1: where the rows of a slot begin
    std::vector<std::uint8_t> levels, removed;
    std::vector<std::int64_t> ids;
    std::vector<std::uint32_t> table;  // slots by the hash of their id, open addressing; at most half full
    std::shared_ptr<const void> lender;

    explicit Graph(const HnswParams& params)
        : params(params),
          vectors(params.vector_bytes()),
          codes(params.code_width()),
          factors(params.factor_count()),
          scales(params.scale_count()),
          frame(params.dim),
          links(2 * params.m),
          first_upper(1) {}

    Graph(const Graph& other, std::int64_t capacity)
        : params(other.params),
          n(other.n),
          live(other.live),
          capacity(capacity),
          largest_id(other.largest_id),
          entry(other.entry),
          vectors(other.vectors, n, capacity),
          codes(other.codes, n, capacity),
          factors(other.factors, n, capacity),
          scales(other.scales, n, capacity),
          frame(params.dim),
          links(other.links, n, capacity),
          upper_links(other.upper_links),
          first_upper(other.first_upper),
          levels(other.levels),
          removed(other.removed),
          ids(other.ids) {
        build_table();
    }

    const float* vector(std::int64_t slot, float* scratch) const {
        if (params.kept != DType::i8) return as_floats(vectors[slot], half_kernels(params.kept), params.dim, scratch);
        kernels().int8_distance->decode(vectors[slot], scale(slot), params.dim, scratch);
        return scratch;
    }
    /// Of a vector in int8.
    float scale(std::int64_t slot) const { return scales.width() > 0 ? *scales[slot] : *factors[slot]; }

    void keep(std::int64_t slot, const float* x) const {
        if (params.kept == DType::f32) {
            std::copy_n(x, params.dim, reinterpret_cast<float*>(vectors[slot]));
        } else if (params.kept == DType::i8) {
            IntegerCode code = kernels().int8_distance->encode(x, params.dim, vectors.width(), vectors[slot]);
            if (params.metric == Metric::cosine && code.squares > 0) code.scale /= std::sqrt(code.squares);
            scales.width() > 0 ? void(*scales[slot] = code.scale) : set_factors(slot, code.scale, code.squares);
        } else {
            const auto round = params.kept == DType::f16 ? to_float16 : to_bfloat16;
            std::transform(x, x + params.dim, reinterpret_cast<std::uint16_t*>(vectors[slot]), round);
        }
    }

    /// Codes of integers of the vector that is kept, with the scale that makes a code's product with its vector exact,
    /// as in RaBitQ (Gao and Long 2024), section 3.2: estimates are right on average over queries that differ from it
    /// in any direction. Without its rotation, which makes codes of pixels several times as wrong. Scratch: (dim,), and
    /// `values`, as many as a row has elements.
    void encode(std::int64_t slot, float* scratch, std::uint8_t* values) const {
        if (params.storage == HnswStorage::vectors) return;
        const IntegerDistanceKernels& kernel = *integer_kernels(params);
        const float* const x = vector(slot, scratch);
        kernel.encode(x, params.dim, codes.width(), codes[slot]);
        kernel.query_of_row(codes[slot], codes.width(), values);
        double square = 0, product = 0;
        for (std::int64_t i = 0; i < params.dim; ++i) {
            square += static_cast<double>(x[i]) * x[i];
            product += static_cast<double>(x[i]) * static_cast<std::int8_t>(values[i]);
        }
        set_factors(slot, product > 0 ? static_cast<float>(square / product) : 0, static_cast<float>(square));
    }
    std::int64_t code_elements() const {
        return params.integers() ? codes.width() * 8 / integer_kernels(params)->bits : 0;
    }
    void set_factors(std::int64_t slot, float scale, float squares) const {
        factors[slot][0] = scale;
        factors[slot][1] = params.metric == Metric::l2 ? squares : 0;
    }
    IntegerRows integer_rows() const {
        const Rows<std::uint8_t>& rows = codes.width() > 0 ? codes : vectors;
        return {rows.data(), factors.data(), static_cast<std::size_t>(rows.width())};
    }

    std::int64_t width(int level) const { return level ? params.m : 2 * params.m; }
    const std::uint32_t* row(std::uint32_t slot, int level) const {
        return level ? upper_links.data() + (std::int64_t(first_upper[slot]) + level - 1) * params.m : links[slot];
    }
    std::uint32_t* row(std::uint32_t slot, int level) {
        return const_cast<std::uint32_t*>(std::as_const(*this).row(slot, level));
    }

    /// Of a code, where frozen: all first parts precede all second parts, where there are any.
    std::uint8_t* first_part(std::int64_t slot) const { return codes.data() + slot * params.first_width(); }
    std::uint8_t* second_part(std::int64_t slot) const {
        return codes.data() + n * params.first_width() + slot * params.second_width();
    }

    /// Makes slots [n, n + count), without vectors or links; they belong to the graph when n says so. Their levels are
    /// random where none are given.
    void append(std::int64_t count, const std::int64_t* new_ids, const std::uint8_t* new_levels = nullptr) {
        ids.insert(ids.end(), new_ids, new_ids + count);
        removed.resize(n + count, 0);
        for (std::int64_t slot = n; slot < n + count; ++slot) {
            levels.push_back(new_levels ? new_levels[slot - n] : random_level(slot));
            first_upper.push_back(first_upper.back() + levels.back());
        }
        upper_links.resize(std::int64_t(first_upper.back()) * params.m, no_link);
        std::fill_n(links[n], count * links.width(), no_link);
    }
    /// The first `count` of them belong to the graph now.
    void commit(std::int64_t count) {
        for (; count > 0; --count, ++n, ++live) enter(n);
    }
    /// Forgets those that do not.
    void drop_rest() noexcept {
        ids.resize(n);
        removed.resize(n);
        levels.resize(n);
        first_upper.resize(n + 1);
        upper_links.resize(std::int64_t(first_upper.back()) * params.m);
    }

    /// The slot of an id that is not removed, or no_link.
    std::uint32_t find(std::int64_t id) const {
        if (table.empty()) return no_link;
        for (std::size_t at = home(id); table[at] != no_link; at = (at + 1) & (table.size() - 1))
            if (const std::uint32_t slot = table[at]; ids[slot] == id && !removed[slot]) return slot;
        return no_link;
    }
    void build_table() {
        table.assign(std::bit_ceil(static_cast<std::size_t>(std::max<std::int64_t>(capacity, 4)) * 2), no_link);
        for (std::int64_t slot = 0; slot < n; ++slot)
            if (!removed[slot]) enter(slot);
    }

private:
    void enter(std::int64_t slot) {
        std::size_t at = home(ids[slot]);
        while (table[at] != no_link) at = (at + 1) & (table.size() - 1);
        table[at] = static_cast<std::uint32_t>(slot);
        largest_id = std::max(largest_id, ids[slot]);
    }
    std::size_t home(std::int64_t id) const {
        return Random(static_cast<std::uint64_t>(id)).next() & (table.size() - 1);
    }
    /// Geometric: one slot in m^l reaches level l. Depends on nothing but the seed and the slot.
    std::uint8_t random_level(std::int64_t slot) const {
        if (!params.hierarchy) return 0;
        const double u = 1 - Random(params.seed, static_cast<std::uint64_t>(slot)).uniform();
        const double level = -std::log(u) / std::log(static_cast<double>(params.m));
        return static_cast<std::uint8_t>(std::min<double>(level, max_level));
    }
};

}  // namespace polyvec::hnsw
