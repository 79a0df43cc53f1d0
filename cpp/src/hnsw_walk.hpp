/// Searches of a graph, several at a time: while the rows that one needs come from memory, others compute.
///
/// A walk alternates two steps. `look` takes the nearest slot of its pool whose links it has not followed, collects the
/// neighbours that it has not seen, and asks for their rows; `measure` computes their distances, puts them into the
/// pool, and asks for the links of the slot that it will follow next. Each step ends with what the next one has to wait
/// for, and another walk goes on meanwhile. A walk does not depend on its company. In a frozen graph it takes four
/// slots at a time: about as many in all for the same recall, and a third of the waits.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <span>

#include "hnsw_graph.hpp"

namespace polyvec::hnsw {

/// A slot and its distance as one integer that orders by distance, then slot.
using Entry = std::uint64_t;
constexpr Entry followed = 1;  // bit 0: the slot's links have been

inline Entry entry_of(float distance, std::uint32_t slot) {
    const auto bits = std::bit_cast<std::uint32_t>(distance);
    const std::uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return Entry(ordered) << 32 | Entry(slot) << 1;
}
inline float distance_of(Entry entry) {
    const auto ordered = static_cast<std::uint32_t>(entry >> 32);
    return std::bit_cast<float>(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
inline std::uint32_t slot_of(Entry entry) {
    return static_cast<std::uint32_t>(entry) >> 1;
}

/// The nearest `capacity` entries, sorted, and which of them are yet to be followed.
class Pool {
public:
    static constexpr std::size_t large = 1024;

    void reserve(std::size_t capacity) {
        if (entries_.size() <= capacity) entries_.resize(capacity + 1);
    }
    void reset(std::size_t capacity) {
        capacity_ = capacity;
        size_ = cursor_ = 0;
    }

    /// The distance from which on nothing enters; infinity while there is room.
    float limit() const {
        return size_ < capacity_ ? std::numeric_limits<float>::infinity() : distance_of(entries_[size_ - 1]);
    }
    bool accepts(Entry entry) const { return size_ < capacity_ || entry < entries_[size_ - 1]; }

    void insert(Entry entry) {
        if (!accepts(entry)) return;
        Entry *const begin = entries_.data(), *const end = begin + size_;
        constexpr std::size_t few = 48;
        Entry* at = end;
        if (size_ <= few) {
            for (; at > begin && entry < at[-1]; --at) *at = at[-1];
        } else {
            at = std::lower_bound(begin, end, entry);
            std::memmove(at + 1, at, static_cast<std::size_t>(end - at) * sizeof(Entry));
        }
        *at = entry;
        size_ += size_ < capacity_;
        cursor_ = std::min(cursor_, static_cast<std::size_t>(at - begin));
    }

    /// The same for scans, in any order until `sort`: where the pool is large, entries would move too much memory.
    void gather(Entry entry) {
        if (capacity_ <= large) return insert(entry);
        Entry* const begin = entries_.data();
        if (size_ == capacity_) {
            if (entry > *begin) return;
            std::pop_heap(begin, begin + size_--);
        }
        begin[size_++] = entry;
        std::push_heap(begin, begin + size_);
    }
    void sort() {
        if (capacity_ > large) std::sort_heap(entries_.data(), entries_.data() + size_);
    }

    /// The nearest entry that is yet to be followed, or null.
    Entry* nearest_open() {
        while (cursor_ < size_ && entries_[cursor_] & followed) ++cursor_;
        return cursor_ < size_ ? &entries_[cursor_] : nullptr;
    }

    /// Calls f(entry) for up to `count` of the nearest that are yet to be followed.
    template <class F>
    void each_open(int count, F f) const {
        for (std::size_t i = cursor_; i < size_ && count > 0; ++i) {
            if (entries_[i] & followed) continue;
            f(entries_[i]);
            --count;
        }
    }

    std::size_t size() const { return size_; }
    std::size_t capacity() const { return capacity_; }
    Entry* begin() { return entries_.data(); }
    const Entry* begin() const { return entries_.data(); }

private:
    std::vector<Entry> entries_;
    std::size_t size_ = 0, capacity_ = 0, cursor_ = 0;
};

/// A vector that distances to slots are measured from: lower is nearer.
class Target {
public:
    void prepare(const Graph& graph);
    /// A row of float32, float16 or bfloat16. A copy is scaled to norm 1 where the metric says so.
    void set(const void* query, DType dtype);
    /// A stored vector, for measuring in the form that walks compare.
    void set(std::uint32_t slot);

    /// Whether select_near tells what is worth measuring.
    bool selects() const { return bits_ && graph_->params.second_width() > 0; }
    /// Writes to `near` the slots whose distance may be `most` or less; returns how many.
    std::size_t select_near(const std::uint32_t* slots, std::size_t count, float most, std::uint32_t* near) const;
    /// In the stored form that walks compare.
    void measure(const std::uint32_t* slots, std::size_t count, float* distances) const;
    /// By the kept vectors, in float32.
    void measure_exactly(const std::uint32_t* slots, std::size_t count, float* distances) const;
    /// Asks for the rows of slots in that form; of frozen ones for their first parts.
    void fetch(const std::uint32_t* slots, std::size_t count) const;

private:
    std::int64_t query_bytes() const;
    void set_code();
    BitRows bit_rows() const;

    const Graph* graph_ = nullptr;
    DistanceKernel<std::uint32_t>::Function floats_ = nullptr;
    NarrowDistanceKernel<std::uint32_t>::Function halves_ = nullptr;
    const IntegerDistanceKernels* integers_ = nullptr;
    const BitDistanceKernels* bits_ = nullptr;
    const float* query_ = nullptr;
    IntegerQuery code_{};
    BitQuery bit_code_{};
    bool stored_ = false;  // what code_ is of
    std::vector<float> own_, rotated_;
    mutable std::vector<float> decoded_;  // scratch
    Aligned<std::uint8_t> values_;
    std::int64_t room_ = 0;
};

void unit_vector(float* x, std::int64_t d);

/// Where a walk ends: nothing is left within `factor` times the squared distance of the k-th nearest. 0: by its pool.
/// Paper: Distance adaptive beam search for provably accurate graph-based nearest neighbor search (Al-Jazzazi et al.
/// 2025), section 3.
struct Reach {
    std::size_t k = 1;
    float factor = 0;
};

class Walk {
public:
    /// Everything that allocates but what grows with the way: pools for `ef` entries.
    void prepare(const Graph& graph, std::size_t ef);

    /// From the graph's entry down to level 0. At levels above `wide` the nearest slot is kept, at the others `ef`.
    /// hidden (a byte a slot, or null): slots that are followed as others are, but take no place in the pool. A walk
    /// ends at level 0 when it has seen more than `most` slots, or by `reach`.
    void start(std::size_t ef, int wide, const std::uint8_t* hidden = nullptr,
               std::size_t most = std::numeric_limits<std::size_t>::max(), Reach reach = {});
    /// One step; false: the walk is at its end.
    bool step();

    /// Whether it has seen more than `most`: what it found are not the nearest that it could have.
    bool gave_up() const { return gave_up_; }

    /// Fills the pool with the exactly nearest `ef` of some slots, or (to be sorted) with those of its own and of
    /// these.
    void scan(std::size_t ef, std::span<const std::uint32_t> slots);
    void scan_more(std::span<const std::uint32_t> slots);
    /// Replaces the distances of the pool's first entries by exact ones and sorts them: those of as many as are within
    /// some `deviations` of the k nearest, a deviation being how far off the first ones were.
    void measure_nearest(std::size_t k, double deviations);

    /// What was found at a level that is at most `wide`, nearest first.
    std::span<const Entry> found(int level) const {
        return level ? std::span<const Entry>(upper_found_[level]) : std::span<const Entry>(pool.begin(), pool.size());
    }

    Target target;
    Pool pool;
    std::int64_t task = 0;  // the caller's own

private:
    void begin_level(Entry start);
    bool look();
    void measure();
    void take(Entry entry);
    std::uint32_t next(float most);
    float limit() const;
    void fetch_links() const;
    double measure_exactly(std::size_t begin, std::size_t end);
    void forget();

    const Graph* graph_ = nullptr;
    std::size_t ef_ = 0;
    int level_ = 0, wide_ = 0, at_a_time_ = 1;
    const std::uint8_t* hidden_ = nullptr;
    std::size_t most_ = 0;
    Reach reach_;
    bool gave_up_ = false, measuring_ = false;
    std::vector<std::uint64_t> seen_;   // a bit a slot
    std::vector<std::uint32_t> slots_;  // those whose bits are set; the last `fresh_` are to be measured
    std::size_t known_ = 0, fresh_ = 0;
    std::vector<std::uint32_t> near_;  // those of them that are worth measuring, where the target selects
    std::vector<float> distances_;
    std::vector<Entry> detours_;  // hidden slots to follow, a heap with the nearest first
    std::vector<std::vector<Entry>> upper_found_;
};

/// Walks for the workers of one call, `each` of them `together` or less; they go back to the index afterwards.
class Walks {
public:
    static constexpr int together = 4;

    Walks(const Graph& graph, IdleWalks& idle, std::size_t ef, int workers, int each = together);
    ~Walks();

    /// Walks for begin .. end - 1: begin(walk, i) starts one and end(walk, i) takes what it found.
    template <class Start, class Finish>
    void run(int worker, std::int64_t begin, std::int64_t end, Start start, Finish finish) {
        Walk* going[together];
        int count = 0;
        const auto begin_next = [&](Walk* walk) {
            walk->task = begin++;
            start(*walk, walk->task);
        };
        for (; count < each_ && begin < end; ++count) begin_next(going[count] = walks_[worker * each_ + count].get());
        while (count > 0) {
            for (int i = 0; i < count;) {
                Walk* const walk = going[i];
                if (walk->step()) {
                    ++i;
                    continue;
                }
                finish(*walk, walk->task);
                if (begin < end) {
                    begin_next(walk);
                    ++i;
                } else {
                    going[i] = going[--count];
                }
            }
        }
    }

    /// The same for the exactly nearest `ef` of some slots: pieces of them that stay in the cache meet all walks.
    template <class Start, class Finish>
    void scan(int worker, std::int64_t begin, std::int64_t end, std::size_t ef, std::span<const std::uint32_t> slots,
              Start start, Finish finish) {
        constexpr std::size_t piece = 256;
        for (; begin < end; begin += each_) {
            const int count = static_cast<int>(std::min<std::int64_t>(each_, end - begin));
            const auto walk = [&](int i) -> Walk& { return *walks_[worker * each_ + i]; };
            for (int i = 0; i < count; ++i) {
                start(walk(i), begin + i);
                walk(i).pool.reset(ef);
            }
            for (std::size_t first = 0; first < slots.size(); first += piece)
                for (int i = 0; i < count; ++i)
                    walk(i).scan_more(slots.subspan(first, std::min(piece, slots.size() - first)));
            for (int i = 0; i < count; ++i) {
                walk(i).pool.sort();
                finish(walk(i), begin + i);
            }
        }
    }

private:
    IdleWalks& idle_;
    const int each_;
    std::vector<std::unique_ptr<Walk>> walks_;
};

}  // namespace polyvec::hnsw
