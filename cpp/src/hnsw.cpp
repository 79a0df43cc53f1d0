#include "polyvec/hnsw.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "polyvec/random.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t max_slots = std::int64_t(1) << 31;  // an Entry has 31 bits for the slot
constexpr int max_level = 63;
constexpr std::size_t lock_count = 1 << 12;
constexpr std::int64_t inserts_per_piece = 4, queries_per_piece = 4;  // a piece costs milliseconds
constexpr std::size_t batch_size = 256;                               // slots of an exact search measured at a time
constexpr std::size_t few = 8;                                        // links compared at a time where one may end it

/// A slot and its distance as one integer that orders by distance, then slot.
using Entry = std::uint64_t;
constexpr Entry followed = 1;  // bit 0: the slot's links have been

Entry entry_of(float distance, std::uint32_t slot) {
    const auto bits = std::bit_cast<std::uint32_t>(distance);
    const std::uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return Entry(ordered) << 32 | Entry(slot) << 1;
}
float distance_of(Entry entry) {
    const auto ordered = static_cast<std::uint32_t>(entry >> 32);
    return std::bit_cast<float>(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
std::uint32_t slot_of(Entry entry) {
    return static_cast<std::uint32_t>(entry) >> 1;
}

/// Links are read while other threads write them; any mixture of an old and a new row will do. Who reads a link also
/// sees what its slot's own rows held when it was written.
std::uint32_t load_link(const std::uint32_t* link) {
    return __atomic_load_n(link, __ATOMIC_ACQUIRE);
}
void store_link(std::uint32_t* link, std::uint32_t slot) {
    __atomic_store_n(link, slot, __ATOMIC_RELEASE);
}

/// Geometric: one slot in m^l reaches level l. Depends on nothing but the seed and the slot.
std::uint8_t random_level(std::uint64_t seed, std::int64_t slot, std::int64_t m) {
    const double u = 1 - Random(seed, static_cast<std::uint64_t>(slot)).uniform();
    return static_cast<std::uint8_t>(std::min<double>(-std::log(u) / std::log(static_cast<double>(m)), max_level));
}

/// Rows come from all over memory: with pages of 2 MB the translation of their addresses stays cached.
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

/// Rows of fixed width: our own memory, or somebody else's that is only read.
template <class T>
class Rows {
public:
    Rows() = default;
    explicit Rows(std::int64_t size) : own_(huge_pages<T>(size)), data_(own_.get()) {}
    explicit Rows(T* lent) : data_(lent) {}

    T* data() const { return data_; }

private:
    Aligned<T> own_;
    T* data_ = nullptr;
};

/// The nearest `capacity` entries, sorted, and which of them are yet to be followed.
class Pool {
public:
    void reserve(std::size_t capacity) {
        if (entries_.size() <= capacity) entries_.resize(capacity + 1);
    }
    void reset(std::size_t capacity) {
        capacity_ = capacity;
        size_ = cursor_ = 0;
    }

    bool accepts(Entry entry) const { return size_ < capacity_ || entry < entries_[size_ - 1]; }

    void insert(Entry entry) {
        if (!accepts(entry)) return;
        Entry* const begin = entries_.data();
        Entry* at = begin;
        for (std::size_t left = size_; left > 0;) {  // a binary search that the compiler makes without jumps
            const std::size_t half = (left + 1) / 2;
            at += at[half - 1] < entry ? half : 0;
            left -= half;
        }
        std::memmove(at + 1, at, static_cast<std::size_t>(begin + size_ - at) * sizeof(Entry));
        *at = entry;
        size_ += size_ < capacity_;
        cursor_ = std::min(cursor_, static_cast<std::size_t>(at - begin));
    }

    /// The nearest entry that is yet to be followed, or null.
    Entry* nearest_open() {
        while (cursor_ < size_ && entries_[cursor_] & followed) ++cursor_;
        return cursor_ < size_ ? &entries_[cursor_] : nullptr;
    }

    std::size_t size() const { return size_; }
    Entry* begin() { return entries_.data(); }
    Entry* end() { return entries_.data() + size_; }

private:
    std::vector<Entry> entries_;
    std::size_t size_ = 0, capacity_ = 0, cursor_ = 0;
};

void unit_vector(float* x, std::int64_t d) {
    double square = 0;
    for (std::int64_t i = 0; i < d; ++i) square += static_cast<double>(x[i]) * x[i];
    const double scale = square > 0 ? 1 / std::sqrt(square) : 0;
    for (std::int64_t i = 0; i < d; ++i) x[i] = static_cast<float>(x[i] * scale);
}

}  // namespace

struct HnswIndex::Graph {
    const std::int64_t dim, m;
    std::int64_t n = 0, live = 0, capacity = 0;
    std::int64_t largest_id = -1;
    std::uint32_t entry = no_link;
    Rows<float> vectors;
    Rows<std::uint32_t> links;
    std::vector<std::uint32_t> upper_links;
    std::vector<std::uint32_t> first_upper;  // n + 1: where the rows of a slot begin
    std::vector<std::uint8_t> levels, removed;
    std::vector<std::int64_t> ids;
    std::vector<std::uint32_t> table;  // slots by the hash of their id, open addressing; at most half full
    std::shared_ptr<const void> lender;

    explicit Graph(const HnswParams& params) : dim(params.dim), m(params.m), first_upper(1) {}

    Graph(const Graph& other, std::int64_t capacity)
        : dim(other.dim),
          m(other.m),
          n(other.n),
          live(other.live),
          capacity(capacity),
          largest_id(other.largest_id),
          entry(other.entry),
          vectors(capacity * dim),
          links(capacity * 2 * m),
          upper_links(other.upper_links),
          first_upper(other.first_upper),
          levels(other.levels),
          removed(other.removed),
          ids(other.ids) {
        std::copy_n(other.vectors.data(), n * dim, vectors.data());
        std::copy_n(other.links.data(), n * 2 * m, links.data());
        build_table();
    }

    float* vector(std::int64_t slot) const { return vectors.data() + slot * dim; }
    std::int64_t width(int level) const { return level ? m : 2 * m; }
    const std::uint32_t* row(std::uint32_t slot, int level) const {
        return level ? upper_links.data() + (std::int64_t(first_upper[slot]) + level - 1) * m
                     : links.data() + slot * 2 * m;
    }
    std::uint32_t* row(std::uint32_t slot, int level) {
        return const_cast<std::uint32_t*>(std::as_const(*this).row(slot, level));
    }

    /// Makes slots [n, n + count), without vectors or links; they belong to the graph when n says so.
    void append(std::int64_t count, const std::int64_t* new_ids, std::uint64_t seed) {
        ids.insert(ids.end(), new_ids, new_ids + count);
        removed.resize(n + count, 0);
        for (std::int64_t slot = n; slot < n + count; ++slot) {
            levels.push_back(random_level(seed, slot, m));
            first_upper.push_back(first_upper.back() + levels.back());
        }
        upper_links.resize(std::int64_t(first_upper.back()) * m, no_link);
        std::fill_n(row(n, 0), count * 2 * m, no_link);
    }
    /// Keeps the first `count` of them.
    void commit(std::int64_t count) noexcept {
        ids.resize(n + count);
        removed.resize(n + count);
        levels.resize(n + count);
        first_upper.resize(n + count + 1);
        upper_links.resize(std::int64_t(first_upper.back()) * m);
        for (; count > 0; --count, ++n, ++live) enter(n);
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
    void enter(std::int64_t slot) {
        std::size_t at = home(ids[slot]);
        while (table[at] != no_link) at = (at + 1) & (table.size() - 1);
        table[at] = static_cast<std::uint32_t>(slot);
        largest_id = std::max(largest_id, ids[slot]);
    }

private:
    std::size_t home(std::int64_t id) const {
        return Random(static_cast<std::uint64_t>(id)).next() & (table.size() - 1);
    }
};

/// The scratch memory of one thread and its way through the graph.
class HnswIndex::Walker {
public:
    /// Everything that allocates: a walk itself does so only to follow removed slots.
    void prepare(const Graph& graph, Metric metric, std::size_t ef) {
        graph_ = &graph;
        const auto& kernel = kernels().distance->u32;
        kernel_ = metric == Metric::l2 ? kernel.l2 : kernel.dot;
        negate_ = metric != Metric::l2;
        if (seen_.size() < static_cast<std::size_t>(graph.capacity)) seen_.assign(graph.capacity, now_ = 0);
        pool.reserve(ef);
        const std::size_t widest = std::max<std::size_t>(batch_size, 2 * graph.m);
        batch_.resize(widest);
        distances_.resize(widest);
        candidates_.reserve(2 * graph.m + 1);
        chosen.reserve(2 * graph.m);
        query_.resize(graph.dim);
    }

    /// The query of the walks that follow. A copy is scaled to norm 1 where `normalize`.
    void aim(const float* query, bool normalize) {
        target_ = query;
        if (!normalize) return;
        std::copy_n(query, query_.size(), query_.data());
        unit_vector(query_.data(), graph_->dim);
        target_ = query_.data();
    }

    Entry measure(std::uint32_t slot) {
        batch_[0] = slot;
        measure_batch(1);
        return entry_of(distances_[0], slot);
    }

    /// Goes to nearer neighbours at `level` as long as there are any.
    Entry descend(Entry start, int level) {
        for (Entry nearest = start;; start = nearest) {
            const std::size_t count = collect(slot_of(start), level, [](std::uint32_t) { return true; });
            measure_batch(count);
            for (std::size_t i = 0; i < count; ++i) nearest = std::min(nearest, entry_of(distances_[i], batch_[i]));
            if (nearest == start) return start;
        }
    }

    /// Fills the pool with the `ef` nearest slots that are found at `level`. Where `skip_removed`, removed slots are
    /// followed as others are, but take no place in the pool.
    template <bool skip_removed>
    void search(Entry start, int level, std::size_t ef) {
        if (++now_ == 0) {
            std::fill(seen_.begin(), seen_.end(), 0);
            now_ = 1;
        }
        pool.reset(ef);
        detours_.clear();
        seen_[slot_of(start)] = now_;
        take<skip_removed>(start);
        for (std::uint32_t slot; (slot = next<skip_removed>()) != no_link;) {
            const std::size_t count = collect(
                slot, level, [&](std::uint32_t neighbour) { return std::exchange(seen_[neighbour], now_) != now_; });
            if (const Entry* after = pool.nearest_open()) __builtin_prefetch(graph_->row(slot_of(*after), level));
            measure_batch(count);
            for (std::size_t i = 0; i < count; ++i) take<skip_removed>(entry_of(distances_[i], batch_[i]));
        }
    }

    /// Fills the pool from all slots that are not removed.
    void search_all(std::size_t ef) {
        pool.reset(ef);
        for (std::int64_t slot = 0; slot < graph_->n;) {
            std::size_t count = 0;
            for (; slot < graph_->n && count < batch_size; ++slot)
                if (!graph_->removed[slot]) batch_[count++] = static_cast<std::uint32_t>(slot);
            measure_batch(count);
            for (std::size_t i = 0; i < count; ++i) pool.insert(entry_of(distances_[i], batch_[i]));
        }
    }

    /// Writes to `centre`'s row up to `width` of the sorted entries [begin, end): each that is nearer to the centre
    /// than to every one chosen before it, so that links lead in different directions. Copies of the centre pass that
    /// test and would crowd out the rest: after the first they only take the room that is left, not always the same
    /// ones.
    void select(const Entry* begin, const Entry* end, std::uint32_t centre, std::int64_t width, std::uint32_t* row) {
        std::int64_t count = 0;
        copies_.clear();
        for (const Entry* entry = begin; entry < end && count < width; ++entry) {
            const Place place = place_of(*entry, row, count, distance_of(*begin));
            if (place == Place::apart) store_link(&row[count++], slot_of(*entry));
            if (place == Place::copy) copies_.push_back(slot_of(*entry));
        }
        for (std::size_t i = 0, first = Random(centre).next(); i < copies_.size() && count < width; ++i)
            store_link(&row[count++], copies_[(first + i) % copies_.size()]);
        for (; count < width; ++count) store_link(&row[count], no_link);
    }

    /// Adds the link `slot` to `centre`'s full row and selects again.
    void select_again(std::uint32_t centre, std::uint32_t slot, std::int64_t width, std::uint32_t* row) {
        candidates_.clear();
        target_ = graph_->vector(centre);
        std::copy_n(row, width, batch_.data());
        measure_batch(width);
        for (std::int64_t i = 0; i < width; ++i) candidates_.push_back(entry_of(distances_[i], batch_[i]));
        candidates_.push_back(measure(slot));
        std::sort(candidates_.begin(), candidates_.end());
        select(candidates_.data(), candidates_.data() + candidates_.size(), centre, width, row);
    }

    Pool pool;
    std::vector<std::uint32_t> chosen;

private:
    void measure_batch(std::size_t count) { measure(target_, batch_.data(), count); }
    void measure(const float* from, const std::uint32_t* slots, std::size_t count) {
        kernel_(from, graph_->vectors.data(), slots, count, graph_->dim, distances_.data());
        if (!negate_) return;
        for (std::size_t i = 0; i < count; ++i) distances_[i] = 0.0f - distances_[i];  // never -0
    }

    template <class Wanted>
    std::size_t collect(std::uint32_t slot, int level, Wanted wanted) {
        const std::uint32_t* row = graph_->row(slot, level);
        const std::int64_t width = graph_->width(level);
        std::size_t count = 0;
        for (std::int64_t i = 0; i < width; ++i) {
            const std::uint32_t neighbour = load_link(&row[i]);
            if (neighbour == no_link) break;
            if (wanted(neighbour)) batch_[count++] = neighbour;
        }
        return count;
    }

    template <bool skip_removed>
    void take(Entry entry) {
        if (skip_removed && graph_->removed[slot_of(entry)]) {
            if (!pool.accepts(entry)) return;
            detours_.push_back(entry);
            std::push_heap(detours_.begin(), detours_.end(), std::greater<>());
        } else {
            pool.insert(entry);
        }
    }

    /// The nearest slot that is yet to be followed, or no_link.
    template <bool skip_removed>
    std::uint32_t next() {
        Entry* const open = pool.nearest_open();
        if (skip_removed && !detours_.empty() && pool.accepts(detours_.front()) &&
            (!open || detours_.front() < *open)) {
            std::pop_heap(detours_.begin(), detours_.end(), std::greater<>());
            const Entry detour = detours_.back();
            detours_.pop_back();
            return slot_of(detour);
        }
        if (!open) return no_link;
        *open |= followed;
        return slot_of(*open);
    }

    enum class Place { apart, behind, copy };

    /// Where a candidate lies, seen from the centre, to those chosen before; the first of them is `nearest` to it.
    Place place_of(Entry entry, const std::uint32_t* chosen, std::int64_t count, float nearest) {
        const float distance = distance_of(entry);
        for (std::int64_t i = 0; i < count; i += few) {
            const std::size_t some = std::min<std::int64_t>(few, count - i);
            measure(graph_->vector(slot_of(entry)), chosen + i, some);
            for (std::size_t j = 0; j < some; ++j) {
                if (distances_[j] < distance) return Place::behind;
                if (i + j == 0 && distances_[0] == distance && distance == nearest) return Place::copy;
            }
        }
        return Place::apart;
    }

    const Graph* graph_ = nullptr;
    DistanceKernel<std::uint32_t>::Function kernel_ = nullptr;
    bool negate_ = false;
    const float* target_ = nullptr;
    std::vector<float> query_, distances_;
    std::vector<std::uint32_t> batch_;
    std::vector<std::uint8_t> seen_;  // seen in this walk where equal to now_
    std::uint8_t now_ = 0;
    std::vector<Entry> detours_;  // removed slots to follow, a heap with the nearest first
    std::vector<Entry> candidates_;
    std::vector<std::uint32_t> copies_;
};

/// Links new slots, many at once. A slot can be reached only when all its own rows are written.
struct HnswIndex::Linker {
    Graph& graph;
    const std::size_t ef;
    std::vector<std::mutex>& locks;
    std::atomic<std::uint32_t> entry;
    std::mutex top_lock{};  // held by whoever will become the entry

    void link(std::uint32_t slot, Walker& walker) {
        const int level = graph.levels[slot];
        std::unique_lock top(top_lock, std::defer_lock);
        if (level > graph.levels[entry]) top.lock();
        const std::uint32_t start = entry;
        const int highest = graph.levels[start];

        walker.aim(graph.vector(slot), false);
        Entry nearest = walker.measure(start);
        for (int l = highest; l > level; --l) nearest = walker.descend(nearest, l);
        for (int l = std::min(level, highest); l >= 0; --l) {
            walker.search<false>(nearest, l, ef);
            nearest = *walker.pool.begin() & ~followed;
            walker.select(walker.pool.begin(), walker.pool.end(), slot, graph.m, graph.row(slot, l));
        }
        for (int l = 0; l <= std::min(level, highest); ++l) {
            const std::uint32_t* row = graph.row(slot, l);
            walker.chosen.clear();
            for (std::int64_t i = 0; i < graph.m && row[i] != no_link; ++i) walker.chosen.push_back(row[i]);
            for (const std::uint32_t neighbour : walker.chosen) link_back(neighbour, slot, l, walker);
        }
        if (level > highest) entry = slot;
    }

private:
    void link_back(std::uint32_t from, std::uint32_t to, int level, Walker& walker) {
        const std::lock_guard lock(locks[from % locks.size()]);
        std::uint32_t* const row = graph.row(from, level);
        const std::int64_t width = graph.width(level);
        std::uint32_t* const end = std::find(row, row + width, no_link);
        if (std::find(row, end, to) != end) return;  // the two found each other
        if (end < row + width) {
            store_link(end, to);
        } else {
            walker.select_again(from, to, width, row);
        }
    }
};

/// Walkers for the workers of one call; they go back to the index afterwards.
class HnswIndex::Walkers {
public:
    Walkers(const HnswIndex& index, std::size_t ef, int workers) : index_(index) {
        {
            const std::lock_guard lock(index.idle_mutex_);
            while (!index.idle_.empty() && workers > static_cast<int>(walkers_.size())) {
                walkers_.push_back(std::move(index.idle_.back()));
                index.idle_.pop_back();
            }
        }
        while (workers > static_cast<int>(walkers_.size())) walkers_.push_back(std::make_unique<Walker>());
        for (auto& walker : walkers_) walker->prepare(*index.graph_, index.params_.metric, ef);
    }
    ~Walkers() {
        const std::lock_guard lock(index_.idle_mutex_);
        for (auto& walker : walkers_) index_.idle_.push_back(std::move(walker));
    }
    Walker& operator[](int worker) { return *walkers_[worker]; }

private:
    const HnswIndex& index_;
    std::vector<std::unique_ptr<Walker>> walkers_;
};

HnswIndex::HnswIndex(const HnswParams& params)
    : params_(params), graph_(std::make_shared<Graph>(params)), locks_(lock_count) {
    params.validate("hnsw.Index");
}

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

std::int64_t HnswIndex::bytes() const {
    const auto lock = reading();
    const Graph& g = *graph_;
    const std::int64_t rows = std::max(g.capacity, g.n) * (g.dim * sizeof(float) + 2 * g.m * sizeof(std::uint32_t));
    const std::int64_t words = g.upper_links.size() + g.first_upper.size() + g.table.size();
    return rows + words * sizeof(std::uint32_t) + g.ids.size() * sizeof(std::int64_t) + 2 * g.levels.size();
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
    require_dtype(op, x, DType::f32);
    require_contiguous(op, x);
    require_dim(op, x, 1, dim, "the index's dim");
}

}  // namespace

void HnswIndex::get(const Array& ids, const Array& out) const {
    constexpr const char* op = get_op;
    const auto lock = reading();
    require_id_list(op, ids);
    require_vectors(op, out, params_.dim);
    require_out(op, out, DType::f32);
    require_dim(op, out, 0, ids.dim(0), "one row an id");
    for (std::int64_t i = 0; i < ids.dim(0); ++i) {
        const std::int64_t id = ids.as<const std::int64_t>()[i];
        const std::uint32_t slot = graph_->find(id);
        require<std::out_of_range>(slot != no_link, op, "ids must be in the index, got ", id);
        std::copy_n(graph_->vector(slot), params_.dim, out.as<float>() + i * params_.dim);
    }
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

void HnswIndex::reserve(const Array& ids) {
    const auto lock = writing();
    check_new(add_op, ids);
    if (ids.dim(0) > 0) make_writable(ids.dim(0));
}

void HnswIndex::add(const Array& vectors, const Array& ids, Cpu cpu) {
    constexpr const char* op = add_op;
    const auto lock = writing();
    require_vectors(op, vectors, params_.dim);
    check_new(op, ids);
    const std::int64_t count = vectors.dim(0);
    require_dim(op, ids, 0, count, "one entry a vector");
    if (count == 0) return;
    make_writable(count);
    Graph& graph = *graph_;
    const std::int64_t before = graph.n;
    const bool first = before == 0;
    const std::size_t ef = std::max(params_.ef_construction, params_.m);
    Walkers walkers(*this, ef, workers_for(count, inserts_per_piece, cpu.num_threads));
    Linker linker{graph, ef, locks_, first ? 0 : graph.entry};
    std::atomic<std::int64_t> linked{0};
    const auto keep_linked = [&] {
        if (linked > 0) graph.entry = linker.entry;
        graph.commit(linked);
    };
    try {
        graph.append(count, ids.as<const std::int64_t>(), params_.seed);
        const float* x = vectors.as<const float>();
        const std::int64_t rows = std::max<std::int64_t>(1, (1 << 16) / params_.dim);
        parallel_for(count, rows, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
            std::copy(x + begin * params_.dim, x + end * params_.dim, graph.vector(before + begin));
            for (std::int64_t i = begin; i < end && params_.metric == Metric::cosine; ++i)
                unit_vector(graph.vector(before + i), params_.dim);
        });
        parallel_for(count, inserts_per_piece, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int worker) {
            for (std::int64_t i = begin; i < end; ++i)
                if (!first || i > 0) linker.link(static_cast<std::uint32_t>(before + i), walkers[worker]);
            linked += end - begin;
        });
    } catch (...) {
        keep_linked();  // parallel_for finishes a prefix of the pieces, so these are the first rows
        throw;
    }
    keep_linked();
}

void HnswIndex::remove(const Array& ids) {
    constexpr const char* op = remove_op;
    const auto lock = writing();
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

void HnswIndex::search(const Array& queries, std::int64_t ef, const Array& scores, const Array& ids, Cpu cpu) const {
    constexpr const char* op = search_op;
    const auto lock = reading();
    const Graph& graph = *graph_;
    require_vectors(op, queries, params_.dim);
    require_out(op, scores, DType::f32);
    require_out(op, ids, DType::i64);
    for (const Array* out : {&scores, &ids}) {
        require_ndim(op, *out, 2);
        require_dim(op, *out, 0, queries.dim(0), "one row a query");
    }
    const std::int64_t k = scores.dim(1);
    require_dim(op, ids, 1, k, "the same k as scores");
    require(k >= 1 && ef >= 1, op, "k and ef must be at least 1");
    ef = std::min(std::max(ef, k), graph.live);
    // Among many removed slots a walk takes n / live steps for one that counts; past this it costs more than a scan.
    const bool scan = static_cast<double>(graph.live) * graph.live <= static_cast<double>(ef) * graph.n;
    const bool negate = params_.metric != Metric::l2;
    const float worst = negate ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity();

    Walkers walkers(*this, ef, workers_for(queries.dim(0), queries_per_piece, cpu.num_threads));
    parallel_for(
        queries.dim(0), queries_per_piece, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int worker) {
            Walker& walker = walkers[worker];
            for (std::int64_t i = begin; i < end; ++i) {
                walker.aim(queries.as<const float>() + i * params_.dim, params_.metric == Metric::cosine);
                if (scan) {
                    walker.search_all(ef);
                } else {
                    Entry nearest = walker.measure(graph.entry);
                    for (int level = graph.levels[graph.entry]; level > 0; --level)
                        nearest = walker.descend(nearest, level);
                    graph.live < graph.n ? walker.search<true>(nearest, 0, ef) : walker.search<false>(nearest, 0, ef);
                }
                float* score = scores.as<float>() + i * k;
                std::int64_t* id = ids.as<std::int64_t>() + i * k;
                std::int64_t found = 0;
                for (const Entry* entry = walker.pool.begin(); entry < walker.pool.end() && found < k; ++entry) {
                    if (std::isnan(distance_of(*entry))) continue;
                    score[found] = negate ? 0.0f - distance_of(*entry) : distance_of(*entry);
                    id[found++] = graph.ids[slot_of(*entry)];
                }
                std::fill(score + found, score + k, worst);
                std::fill(id + found, id + k, -1);
            }
        });
}

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
        array("vectors", g.vectors.data(), DType::f32, g.n, g.dim),
        array("links", g.links.data(), DType::u32, g.n, 2 * g.m),
        array("levels", g.levels.data(), DType::u8, g.n),
        array("upper_links", g.upper_links.data(), DType::u32, upper_rows, g.m),
        array("ids", g.ids.data(), DType::i64, g.n),
        array("removed", g.removed.data(), DType::boolean, g.n),
        g.n ? std::int64_t(g.entry) : -1,
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
    check(n <= max_slots, "it must have at most 2^31 vectors, got ", n);
    check_array(state.vectors, DType::f32, n, params.dim);
    check_array(state.links, DType::u32, n, 2 * params.m);
    check_array(state.levels, DType::u8, n);
    check_array(state.removed, DType::boolean, n);
    Graph& g = *graph_;
    g.n = g.capacity = n;
    g.vectors = Rows<float>(state.vectors.as<float>());
    g.links = Rows<std::uint32_t>(state.links.as<std::uint32_t>());
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
