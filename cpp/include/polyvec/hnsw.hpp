/// A graph index that grows: hierarchical navigable small worlds.
///
/// Every vector has a slot, in the order of adding. Level 0 links each slot with up to 2 m others; a slot of level l
/// has m links at each of the levels 1 to l, and one slot in m^l has that level, so that a search goes from the entry,
/// the slot of the highest level, by long steps first.
/// Paper: Efficient and robust approximate nearest neighbor search using hierarchical navigable small world graphs
/// (Malkov and Yashunin 2018), algorithms 1 to 5.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"
#include "polyvec/metric.hpp"

namespace polyvec {

/// What walks compare.
enum class HnswStorage : std::uint8_t {
    vectors,  // as they are kept
    int8,     // codes beside them: an element over the largest of its vector, in steps of 1 / 127
    int4,     // the same in steps of 1 / 7
};

inline HnswStorage storage_from(const char* op, const std::string& name) {
    if (name == "vectors") return HnswStorage::vectors;
    if (name == "int8") return HnswStorage::int8;
    require(name == "int4", op, "storage must be one of 'vectors', 'int8', 'int4', got '", name, "'");
    return HnswStorage::int4;
}

/// What vectors are kept in.
inline DType kept_from(const char* op, const std::string& name) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::i8})
        if (name == name_of(dtype)) return dtype;
    fail(op, "vectors must be kept in one of 'float32', 'float16', 'bfloat16', 'int8', got '", name, "'");
}

struct HnswParams {
    std::int64_t dim = 0;
    Metric metric = Metric::cosine;
    HnswStorage storage = HnswStorage::vectors;
    DType kept = DType::f32;  // or f16, bf16, i8: as codes of int8 are, each with its scale
    std::int64_t m = 16;
    std::int64_t ef_construction = 200;
    bool hierarchy = true;  // else all slots are of level 0
    std::uint64_t seed = 0;
    bool frozen = false;  // made by freeze: codes are of two to four bits an element whatever the storage (see
                          // BitRows), and nothing changes

    void validate(const char* op) const {
        require(dim >= 1, op, "dim must be at least 1, got ", dim);
        require(m >= 2 && m <= 1024, op, "m must be in [2, 1024], got ", m);
        require(ef_construction >= 1, op, "ef_construction must be at least 1, got ", ef_construction);
        require((code_width() == 0 && kept != DType::i8) || dim <= most_coded, op, "dim must be at most ", most_coded,
                " with codes, got ", dim);
    }

    static constexpr std::int64_t most_coded = most_int8;  // elements of a vector with codes

    std::int64_t vector_bytes() const {
        return kept == DType::i8 ? integer_width(HnswStorage::int8) : dim * static_cast<std::int64_t>(size_of(kept));
    }
    /// Of vectors in int8, where `factors` are not theirs.
    std::int64_t scale_count() const { return kept == DType::i8 && storage != HnswStorage::vectors ? 1 : 0; }

    /// Whether walks compare rows of integers (see IntegerRows): codes, or else the vectors.
    bool integers() const { return !frozen && (storage != HnswStorage::vectors || kept == DType::i8); }

    /// Bytes of a code: of integers up to whole cache lines; frozen: of all parts (see BitRows).
    std::int64_t code_width() const {
        if (frozen) return first_width() + second_width();
        return storage == HnswStorage::vectors ? 0 : integer_width(storage);
    }
    std::int64_t factor_count() const {
        return (storage == HnswStorage::vectors ? kept == DType::i8 : !frozen) ? 2 : 0;
    }
    std::int64_t bit_plane() const { return (dim + 31) / 32 * 4; }  // bytes of a bit an element
    /// Frozen: as many bits as fit into a cache line with three floats, or else two in two parts.
    std::int64_t code_bits() const { return std::clamp<std::int64_t>(bits_of_line(), 2, 4); }
    std::int64_t first_width() const {
        const std::int64_t planes = second_width() > 0 ? 1 : code_bits();
        return (planes * bit_plane() + 12 + 63) / 64 * 64;
    }
    std::int64_t second_width() const {
        const std::int64_t plane = bit_plane();
        if (bits_of_line() >= 2) return 0;
        return plane > 32 ? (plane + 63) / 64 * 64 : 32;
    }

private:
    std::int64_t bits_of_line() const { return (64 - 12) / bit_plane(); }
    std::int64_t integer_width(HnswStorage bits) const {
        const std::int64_t elements = bits == HnswStorage::int8 ? 64 : 128;  // of a cache line
        return (dim + elements - 1) / elements * 64;
    }
};

/// All of an index: what a file holds.
struct HnswState {
    Array vectors;            // (n, dim) float32, float16 or uint16 (bits of bfloat16): unit where metric is cosine; or
                              // (n, vector_bytes()) uint8, int8 as codes of it are
    Array scales;             // (n,) float32, of vectors in int8 where scale_count() is not 0
    Array codes;              // (n, code_width()) uint8, where that is not 0; else absent. Frozen: all first parts of
                              // codes, then all second parts
    Array factors;            // (n, 2) float32, of codes or vectors of integers: a scale, and 0 or (l2) squared norm
    Array frame;              // (5, dim) float32, of frozen ones: the centre of all vectors, and what rotates them
    Array links;              // (n, 2 m) uint32: a slot's neighbours at level 0, then no_link to the end
    Array levels;             // (n,) uint8
    Array upper_links;        // (sum of levels, m) uint32: a slot's rows for levels 1, 2, ... follow each other
    Array ids;                // (n,) int64
    Array removed;            // (n,) bool
    std::int64_t entry = -1;  // a slot of the highest level; -1 when there is none
    std::int64_t largest_id = -1;       // ever added; may be larger than all of `ids`
    std::shared_ptr<const void> owner;  // keeps the arrays' memory alive
};

namespace hnsw {

struct Graph;
class Walk;

/// Scratch memory of earlier calls.
struct IdleWalks {
    std::mutex mutex;
    std::vector<std::unique_ptr<Walk>> walks;
};

}  // namespace hnsw

/// Any number of searches may run at once, or one call that changes the index; calls wait for each other.
class HnswIndex {
public:
    /// Names of the public functions, for messages.
    static constexpr const char *add_op = "hnsw.Index.add", *search_op = "hnsw.Index.search",
                                *get_op = "hnsw.Index.get", *remove_op = "hnsw.Index.remove",
                                *ids_op = "hnsw.Index.ids", *load_op = "hnsw.Index.load",
                                *freeze_op = "hnsw.Index.freeze", *fit_op = "hnsw.Index.fit_queries";

    explicit HnswIndex(const HnswParams& params);

    /// Uses vectors, codes and links where they are until the first change; throws FormatError unless all fits
    /// together.
    HnswIndex(const HnswParams& params, const HnswState& state);

    ~HnswIndex();

    const HnswParams& params() const { return params_; }

    /// Vectors that are not removed.
    std::int64_t size() const;
    /// With the removed ones that still take memory.
    std::int64_t slots() const;
    /// Bytes of memory that the vectors and the graph take (mapped files count).
    std::int64_t bytes() const;
    bool contains(std::int64_t id) const;
    /// -1 when nothing was ever added.
    std::int64_t largest_id() const;
    /// Fills `out` (size(),) with the ids that are not removed, in the order of adding.
    void ids(const Array& out) const;
    /// Fills `out` (n, dim) with the stored vectors of `ids` (n,).
    void get(const Array& ids, const Array& out) const;

    /// Makes room for `vectors` (n, dim) and `ids` (n,) after checking that they can be added.
    void reserve(const Array& vectors, const Array& ids);
    /// Vectors are float32, float16 or bfloat16, as queries are. Interrupted: the vectors before some row are in the
    /// index, those after it are not.
    void add(const Array& vectors, const Array& ids, Cpu cpu);
    void remove(const Array& ids);
    /// Links slots from[i] and to[i] (n,) both ways at level 0, in this order, where rows have room. -1: none.
    void link(const Array& from, const Array& to);

    /// A copy without the slots of removed vectors, which grows even where this one is frozen.
    std::unique_ptr<HnswIndex> compacted(Cpu cpu) const;

    /// A copy that cannot be changed, with slots in the order of the walk and codes of two to four bits an
    /// element.
    std::unique_ptr<HnswIndex> freeze(Cpu cpu) const;

    /// Fills `scores` and `ids` (nq, k); l2 scores are distances. Up to max(ef, k) candidates are kept; with a margin
    /// of 0 or more, only what is within 1 + margin times the k-th best distance is followed (cosine, l2). include: ids
    /// (m,) int64 of the vectors that take part, or bool (m,), whether vectors of the ids 0, 1, ... do; absent: all.
    void search(const Array& queries, std::int64_t ef, float margin, const Array& include, const Array& scores,
                const Array& ids, Cpu cpu) const;

    /// Shares memory with the index until the next change, which then works on a copy.
    HnswState state() const;

private:
    using Graph = hnsw::Graph;

    std::shared_lock<std::shared_mutex> reading() const;
    std::unique_lock<std::shared_mutex> writing();
    void require_not_frozen(const char* op) const;
    void check_new(const char* op, const Array& ids) const;
    void make_writable(std::int64_t more);
    std::shared_ptr<Graph> without_removed(Cpu cpu) const;

    HnswParams params_;
    std::shared_ptr<Graph> graph_;
    mutable std::mutex gate_;  // passed on the way to mutex_: keeps searches from starving a writer
    mutable std::shared_mutex mutex_;
    mutable hnsw::IdleWalks idle_;
};

}  // namespace polyvec
