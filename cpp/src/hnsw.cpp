#include "polyvec/hnsw.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "hnsw_build.hpp"
#include "polyvec/parallel.hpp"

namespace polyvec {

using namespace hnsw;

namespace {

constexpr std::int64_t max_slots = std::int64_t(1) << 31;  // an Entry has 31 bits for the slot

}  // namespace

HnswIndex::HnswIndex(const HnswParams& params) : params_(params), graph_(std::make_shared<Graph>(params)) {}

HnswIndex::~HnswIndex() = default;

std::shared_lock<std::shared_mutex> HnswIndex::reading() const {
    const std::lock_guard gate(gate_);
    return std::shared_lock(mutex_);
}

std::unique_lock<std::shared_mutex> HnswIndex::writing() {
    const std::lock_guard gate(gate_);
    return std::unique_lock(mutex_);
}

std::int64_t HnswIndex::size() const {
    const auto lock = reading();
    return graph_->live;
}

std::int64_t HnswIndex::slots() const {
    const auto lock = reading();
    return graph_->n;
}

std::int64_t HnswIndex::bytes() const {
    const auto lock = reading();
    const Graph& g = *graph_;
    const std::int64_t row = g.vectors.width() + g.codes.width() +
                             (g.scales.width() + g.factors.width()) * sizeof(float) +
                             g.links.width() * sizeof(std::uint32_t);
    const std::int64_t words = g.upper_links.size() + g.first_upper.size() + g.table.size();
    const std::int64_t frame = g.params.frozen ? frame_rows * g.params.dim * sizeof(float) : 0;
    return std::max(g.capacity, g.n) * row + frame + words * sizeof(std::uint32_t) +
           g.ids.size() * sizeof(std::int64_t) + 2 * g.levels.size();
}

bool HnswIndex::contains(std::int64_t id) const {
    const auto lock = reading();
    return graph_->find(id) != no_link;
}

std::int64_t HnswIndex::largest_id() const {
    const auto lock = reading();
    return graph_->largest_id;
}

void HnswIndex::ids(const Array& out) const {
    const auto lock = reading();
    require_out(ids_op, out, DType::i64);
    require_ndim(ids_op, out, 1);
    require_dim(ids_op, out, 0, graph_->live, "one entry a vector");
    auto* to = out.as<std::int64_t>();
    for (std::int64_t slot = 0; slot < graph_->n; ++slot)
        if (!graph_->removed[slot]) *to++ = graph_->ids[slot];
}

namespace {

void require_id_list(const char* op, const Array& ids) {
    require_ndim(op, ids, 1);
    require_dtype(op, ids, DType::i64);
    require_contiguous(op, ids);
}

void require_distinct(const char* op, const Array& ids) {
    std::vector<std::int64_t> sorted(ids.as<std::int64_t>(), ids.as<std::int64_t>() + ids.dim(0));
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) fail(op, "ids must be distinct, got ", *twice, " twice");
}

void require_vectors(const char* op, const Array& x, std::int64_t dim) {
    require_ndim(op, x, 2);
    if (x.dtype != DType::f16 && x.dtype != DType::bf16) require_dtype(op, x, DType::f32);
    require_contiguous(op, x);
    require_dim(op, x, 1, dim, "the index's dim");
}

const char* row_of(const Array& x, std::int64_t i) {
    return x.as<const char>() + i * x.dim(1) * static_cast<std::int64_t>(size_of(x.dtype));
}

/// Numbers that would round to infinity where vectors are kept.
void require_small(const char* op, const Array& x, DType kept) {
    const bool half = kept == DType::f16;
    const float limit = half ? 65520.0f : 0x1.ffp127f;
    if (!half_kernels(kept) || kept == x.dtype) return;
    const HalfKernels* const given = half_kernels(x.dtype);
    const std::int64_t d = x.dim(1);
    std::vector<float> scratch(d);
    for (std::int64_t i = 0; i < x.dim(0); ++i) {
        const float* const row = as_floats(row_of(x, i), given, d, scratch.data());
        float largest = 0;
        for (std::int64_t k = 0; k < d; ++k) largest = std::max(largest, std::fabs(row[k]));
        require(largest < limit, op, "vectors must be at most ", half ? "65504" : "3.38953e+38", " in ", name_of(kept),
                ", got ", largest, " in row ", i);
    }
}

}  // namespace

void HnswIndex::get(const Array& ids, const Array& out) const {
    constexpr const char* op = get_op;
    const auto lock = reading();
    require_id_list(op, ids);
    require_vectors(op, out, params_.dim);
    require_out(op, out, DType::f32);
    std::vector<float> scratch(params_.dim);
    require_dim(op, out, 0, ids.dim(0), "one row an id");
    for (std::int64_t i = 0; i < ids.dim(0); ++i) {
        const std::int64_t id = ids.as<const std::int64_t>()[i];
        const std::uint32_t slot = graph_->find(id);
        require<std::out_of_range>(slot != no_link, op, "ids must be in the index, got ", id);
        std::copy_n(graph_->vector(slot, scratch.data()), params_.dim, out.as<float>() + i * params_.dim);
    }
}

void HnswIndex::require_not_frozen(const char* op) const {
    require(!params_.frozen, op, "index must not be frozen, got one that freeze returned");
}

void HnswIndex::check_new(const char* op, const Array& ids) const {
    require_id_list(op, ids);
    require_distinct(op, ids);
    for (std::int64_t i = 0; i < ids.dim(0); ++i) {
        const std::int64_t id = ids.as<const std::int64_t>()[i];
        require(id != -1, op, "ids must not be -1, which stands for a missing result");
        require(graph_->find(id) == no_link, op, "ids must be new, got ", id, ", which is in the index");
    }
    require(graph_->n + ids.dim(0) <= max_slots, op, "vectors must be at most 2^31 in all, removed ones included");
}

/// Before a change: our own memory, nobody else's view of it, and room for `more` slots.
void HnswIndex::make_writable(std::int64_t more) {
    const Graph& g = *graph_;
    const std::int64_t needed = g.n + more;
    if (needed <= g.capacity && graph_.use_count() == 1 && !g.lender) {
        std::atomic_thread_fence(std::memory_order_acquire);  // after the reads of whoever gave its view up
        return;
    }
    graph_ = std::make_shared<Graph>(g, needed <= g.capacity ? g.capacity : std::max(needed, 2 * g.n));
}

void HnswIndex::reserve(const Array& vectors, const Array& ids) {
    const auto lock = writing();
    require_not_frozen(add_op);
    require_vectors(add_op, vectors, params_.dim);
    if (params_.metric != Metric::cosine) require_small(add_op, vectors, params_.kept);
    check_new(add_op, ids);
    if (ids.dim(0) > 0) make_writable(ids.dim(0));
}

namespace {

/// Fills the rows of the slots after the last with the vectors x.
void store(Graph& graph, const Array& x, int num_threads) {
    const HnswParams& p = graph.params;
    const HalfKernels* const given = half_kernels(x.dtype);
    const std::int64_t rows = std::max<std::int64_t>(1, (1 << 16) / p.dim);
    parallel_for(x.dim(0), rows, num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        std::vector<float> unit(p.dim);
        std::vector<std::uint8_t> values(graph.code_elements());
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t slot = graph.n + i;
            const float* vector = as_floats(row_of(x, i), given, p.dim, unit.data());
            if (p.metric == Metric::cosine) {
                if (vector != unit.data()) std::copy_n(vector, p.dim, unit.data());
                unit_vector(unit.data(), p.dim);
                vector = unit.data();
            }
            graph.keep(slot, vector);
            graph.encode(slot, unit.data(), values.data());
        }
    });
}

}  // namespace

void HnswIndex::add(const Array& vectors, const Array& ids, Cpu cpu) {
    constexpr const char* op = add_op;
    const auto lock = writing();
    require_not_frozen(op);
    require_vectors(op, vectors, params_.dim);
    check_new(op, ids);
    const std::int64_t count = vectors.dim(0);
    require_dim(op, ids, 0, count, "one entry a vector");
    if (count == 0) return;
    make_writable(count);
    Graph& graph = *graph_;
    try {
        graph.append(count, ids.as<const std::int64_t>());
        store(graph, vectors, cpu.num_threads);
        Builder(graph, idle_, cpu.num_threads).link(count);
    } catch (...) {
        graph.drop_rest();
        throw;
    }
}

void HnswIndex::remove(const Array& ids) {
    constexpr const char* op = remove_op;
    const auto lock = writing();
    require_not_frozen(op);
    require_id_list(op, ids);
    require_distinct(op, ids);
    const std::int64_t count = ids.dim(0);
    const auto* id = ids.as<const std::int64_t>();
    for (std::int64_t i = 0; i < count; ++i)
        require<std::out_of_range>(graph_->find(id[i]) != no_link, op, "ids must be in the index, got ", id[i]);
    if (count == 0) return;
    make_writable(0);
    for (std::int64_t i = 0; i < count; ++i) graph_->removed[graph_->find(id[i])] = 1;
    graph_->live -= count;
}

/// A growing one. Where most slots are removed, few links are left to go by: the others are linked as if they were
/// added now.
std::shared_ptr<Graph> HnswIndex::without_removed(Cpu cpu) const {
    const Graph& from = *graph_;
    std::vector<std::uint32_t> slots;
    std::vector<std::int64_t> names;
    std::vector<std::uint8_t> levels;
    for (std::int64_t slot = 0; slot < from.n; ++slot) {
        if (from.removed[slot]) continue;
        slots.push_back(static_cast<std::uint32_t>(slot));
        names.push_back(from.ids[slot]);
        levels.push_back(from.levels[slot]);
    }
    HnswParams params = params_;
    params.frozen = false;
    auto graph = std::make_shared<Graph>(Graph(params), from.live);
    graph->largest_id = from.largest_id;
    const bool anew = 2 * from.live < from.n;
    graph->append(from.live, names.data(), anew ? nullptr : levels.data());
    const std::int64_t rows = std::max<std::int64_t>(1, (1 << 16) / params_.dim);
    parallel_for(from.live, rows, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        std::vector<float> scratch(params_.dim);
        std::vector<std::uint8_t> values(graph->code_elements());
        for (std::int64_t slot = begin; slot < end; ++slot) {
            std::copy_n(from.vectors[slots[slot]], from.vectors.width(), graph->vectors[slot]);
            std::copy_n(from.factors[slots[slot]], from.factors.width(), graph->factors[slot]);
            std::copy_n(from.scales[slots[slot]], from.scales.width(), graph->scales[slot]);
            if (params_.frozen) {
                graph->encode(slot, scratch.data(), values.data());
            } else {
                std::copy_n(from.codes[slots[slot]], from.codes.width(), graph->codes[slot]);
            }
        }
    });
    Builder builder(*graph, idle_, cpu.num_threads);
    anew ? builder.link(from.live) : builder.copy_links(from, slots);
    return graph;
}

std::unique_ptr<HnswIndex> HnswIndex::compacted(Cpu cpu) const {
    const auto lock = reading();
    const auto graph = without_removed(cpu);
    auto index = std::make_unique<HnswIndex>(graph->params);
    index->graph_ = graph;
    return index;
}

void HnswIndex::link(const Array& from, const Array& to) {
    constexpr const char* op = fit_op;
    const auto lock = writing();
    require_not_frozen(op);
    require_id_list(op, from);
    require_id_list(op, to);
    const std::int64_t count = from.dim(0);
    require_dim(op, to, 0, count, "as many as from");
    const auto *a = from.as<const std::int64_t>(), *b = to.as<const std::int64_t>();
    for (const auto* slots : {a, b})
        for (std::int64_t i = 0; i < count; ++i)
            require<std::out_of_range>(slots[i] >= -1 && slots[i] < graph_->n, op, "slots must be in the graph, got ",
                                       slots[i]);
    if (count == 0) return;
    make_writable(0);
    const auto add = [&](std::int64_t slot, std::int64_t link) {
        std::uint32_t* const row = graph_->links[slot];
        std::uint32_t* const end = row + graph_->links.width();
        std::uint32_t* const at = std::find_if(row, end, [&](std::uint32_t s) { return s == no_link || s == link; });
        if (at < end) *at = static_cast<std::uint32_t>(link);
    };
    for (std::int64_t i = 0; i < count; ++i) {
        if (a[i] < 0 || b[i] < 0 || a[i] == b[i]) continue;
        add(a[i], b[i]);
        add(b[i], a[i]);
    }
}

namespace {

/// Returns k.
std::int64_t require_results(const char* op, const Array& scores, const Array& ids, std::int64_t rows,
                             std::int64_t ef) {
    require_out(op, scores, DType::f32);
    require_out(op, ids, DType::i64);
    for (const Array* out : {&scores, &ids}) {
        require_ndim(op, *out, 2);
        require_dim(op, *out, 0, rows, "one row a query");
    }
    const std::int64_t k = scores.dim(1);
    require_dim(op, ids, 1, k, "the same k as scores");
    require(k >= 1 && ef >= 1, op, "k and ef must be at least 1");
    return k;
}

/// The slots that a search may find.
class Shown {
public:
    Shown(const Graph& graph, const Array& include) : graph_(graph), count_(graph.live) {
        if (!include) return;
        own_.assign(graph.n, 1);
        if (include.dtype == DType::boolean) {
            const auto* mask = include.as<const std::uint8_t>();
            for (std::int64_t slot = 0; slot < graph.n; ++slot) {
                const std::int64_t id = graph.ids[slot];
                if (id >= 0 && id < include.dim(0) && mask[id] && !graph.removed[slot]) own_[slot] = 0;
            }
        } else {
            for (std::int64_t i = 0; i < include.dim(0); ++i)
                if (const std::uint32_t slot = graph.find(include.as<const std::int64_t>()[i]); slot != no_link)
                    own_[slot] = 0;
        }
        count_ = std::count(own_.begin(), own_.end(), 0);
    }

    std::int64_t count() const { return count_; }
    bool filtered() const { return !own_.empty(); }
    /// A byte a slot; null where nothing is hidden.
    const std::uint8_t* hidden() const {
        return filtered() ? own_.data() : graph_.live < graph_.n ? graph_.removed.data() : nullptr;
    }
    /// Listed by the first call: few searches need them.
    const std::vector<std::uint32_t>& slots() const {
        std::call_once(listed_, [this] {
            slots_.reserve(count_);
            const std::uint8_t* const hidden = this->hidden();
            for (std::int64_t slot = 0; slot < graph_.n; ++slot)
                if (!hidden || !hidden[slot]) slots_.push_back(static_cast<std::uint32_t>(slot));
        });
        return slots_;
    }

private:
    const Graph& graph_;
    std::vector<std::uint8_t> own_;  // of a filter: whether a slot is hidden
    std::int64_t count_;
    mutable std::once_flag listed_;
    mutable std::vector<std::uint32_t> slots_;
};

/// Among many hidden slots a walk takes n / shown steps for one that counts, each of up to 2 m comparisons. One costs
/// as much as a row of a scan, or a third of it where the rows do not stay in the cache (115,659 x 384 on Zen 3).
bool scan_is_faster(const Graph& graph, std::int64_t shown, std::int64_t ef) {
    constexpr double cache = 8 << 20;
    constexpr auto large = static_cast<std::int64_t>(Pool::large);  // where walks move memory more than they compare
    if (shown == graph.n) return shown <= (ef > large ? graph.params.m * ef : ef);
    const double rows = static_cast<double>(shown), bytes = rows * static_cast<double>(graph.params.vector_bytes());
    const double steps = static_cast<double>(ef) * static_cast<double>(graph.n) / std::max(1.0, rows);
    return rows * (bytes > cache ? 3 : 1) <= 2 * static_cast<double>(graph.params.m) * steps;
}

}  // namespace

void HnswIndex::search(const Array& queries, std::int64_t ef, float margin, const Array& include, const Array& scores,
                       const Array& ids, Cpu cpu) const {
    const auto lock = reading();
    const Graph& graph = *graph_;
    require_vectors(search_op, queries, params_.dim);
    const std::int64_t nq = queries.dim(0), k = require_results(search_op, scores, ids, nq, ef);
    if (include) {
        require_ndim(search_op, include, 1);
        require_contiguous(search_op, include);
        if (include.dtype != DType::boolean) require_dtype(search_op, include, DType::i64);
    }
    const bool adaptive = margin >= 0;
    require(!adaptive || params_.metric != Metric::ip, search_op, "margin needs metric 'cosine' or 'l2'");
    const Reach reach{static_cast<std::size_t>(k), adaptive ? (1 + margin) * (1 + margin) : 0};
    const Shown shown(graph, include);
    ef = std::min(std::max(ef, k), shown.count());
    constexpr std::int64_t usual = 64;  // candidates of an adaptive walk, about
    const std::int64_t expected = adaptive ? std::min(ef, std::max(k, usual)) : ef;
    const bool scan = scan_is_faster(graph, shown.count(), expected);
    // Ctrl-C waits for a piece: no more elements than a fraction of a second allows, and moves of candidates.
    constexpr std::int64_t sorting = 256;
    const std::int64_t step = scan ? params_.dim + sorting : 2 * params_.m * params_.dim + expected;
    const double cost = static_cast<double>(scan ? shown.count() : expected) * static_cast<double>(step);
    const auto affordable = static_cast<std::int64_t>(std::clamp(0x1p26 / std::max(cost, 1.0), 1.0, 64.0));
    const std::int64_t grain = std::min(affordable, std::clamp<std::int64_t>(nq / 16, Walks::together, 64));
    // Nor may a walk that finds little where it looks go on for longer than a scan takes.
    const std::size_t most = shown.filtered() ? shown.count() + 16 * expected : std::numeric_limits<std::size_t>::max();
    const std::int64_t fewest = std::min(k, shown.count());
    const bool frozen = graph.params.frozen, estimated = frozen || graph.params.integers();
    const double deviations = frozen ? 2.5 : 3;  // integers err little, so that few more are compared
    const bool negate = graph.params.metric != Metric::l2;
    const float worst = negate ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity();
    const int each = static_cast<int>(std::clamp<std::int64_t>(nq, 1, Walks::together));
    Walks walks(graph, idle_, ef, workers_for(nq, grain, cpu.num_threads), each);
    const auto aim = [&](Walk& walk, std::int64_t i) { walk.target.set(row_of(queries, i), queries.dtype); };
    const auto keep = [&](Walk& walk, std::int64_t i) {
        float* score = scores.as<float>() + i * k;
        std::int64_t* id = ids.as<std::int64_t>() + i * k;
        std::int64_t found = 0;
        for (const Entry entry : walk.found(0)) {
            if (found == k) break;
            if (std::isnan(distance_of(entry))) continue;
            score[found] = negate ? 0.0f - distance_of(entry) : distance_of(entry);
            id[found++] = graph.ids[slot_of(entry)];
        }
        std::fill(score + found, score + k, worst);
        std::fill(id + found, id + k, -1);
    };
    parallel_for(nq, grain, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int worker) {
        if (scan) return walks.scan(worker, begin, end, ef, shown.slots(), aim, keep);
        walks.run(
            worker, begin, end,
            [&](Walk& walk, std::int64_t i) {
                aim(walk, i);
                walk.start(ef, 0, shown.hidden(), most, reach);
            },
            [&](Walk& walk, std::int64_t i) {
                // Of many equal vectors not all are within reach where m and ef_construction are small.
                if (walk.gave_up() || std::ssize(walk.found(0)) < fewest) {
                    walk.scan(ef, shown.slots());
                } else {
                    if (estimated) walk.measure_nearest(k + 1, deviations);
                }
                keep(walk, i);
            });
    });
}

}  // namespace polyvec
