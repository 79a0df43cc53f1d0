#include "hnsw_build.hpp"

#include <atomic>
#include <tuple>

#include "polyvec/error.hpp"
#include "polyvec/parallel.hpp"

namespace polyvec::hnsw {
namespace {

constexpr std::int64_t slots_per_piece = 16, rows_per_piece = 64;
constexpr std::int64_t share_of_batch = 32, largest_batch = 1024;  // slots that walks do not see: 3 % of all
constexpr std::size_t few = 8;                                     // links compared at a time where one may end it

}  // namespace

/// Chooses the links of a slot among candidates; one a thread.
class Builder::Chooser {
public:
    explicit Chooser(const Graph& graph) : graph_(graph), distances_(std::max<std::int64_t>(few, 2 * graph.params.m)) {
        target_.prepare(graph);
    }

    /// Writes to `row` up to `width` of the candidates, which are sorted: each that is nearer to the centre than to
    /// every one chosen before it, so that links lead in different directions. Copies of the centre pass that test and
    /// would crowd out the rest: after the first they only take the room that is left, not always the same ones.
    void choose(std::span<const Entry> candidates, std::uint32_t centre, std::int64_t width, std::uint32_t* row) {
        std::int64_t count = 0;
        copies_.clear();
        for (const Entry entry : candidates) {
            if (count == width) break;
            const Place place = place_of(entry, row, count, distance_of(candidates[0]));
            if (place == Place::apart) row[count++] = slot_of(entry);
            if (place == Place::copy) copies_.push_back(slot_of(entry));
        }
        for (std::size_t i = 0, first = Random(centre).next(); i < copies_.size() && count < width; ++i)
            row[count++] = copies_[(first + i) % copies_.size()];
        std::fill(row + count, row + width, no_link);
    }

    /// What a walk found, and the slots [begin, slot) of its batch that belong among them. Data often lie in an order:
    /// without these a slot would miss its nearest.
    std::span<const Entry> with_batch(const Target& target, std::span<const Entry> found, std::size_t ef,
                                      std::int64_t begin, std::int64_t slot, int level) {
        slots_.clear();
        for (std::int64_t s = begin; s < slot; ++s)
            if (graph_.levels[s] >= level) slots_.push_back(static_cast<std::uint32_t>(s));
        if (distances_.size() < slots_.size()) distances_.resize(slots_.size());
        target.measure(slots_.data(), slots_.size(), distances_.data());
        candidates_.assign(found.begin(), found.end());
        for (std::size_t i = 0; i < slots_.size(); ++i) {
            const Entry entry = entry_of(distances_[i], slots_[i]);
            if (found.size() < ef || entry < found.back()) candidates_.push_back(entry);
        }
        std::sort(candidates_.begin() + static_cast<std::ptrdiff_t>(found.size()), candidates_.end());
        std::inplace_merge(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(found.size()),
                           candidates_.end());
        return std::span<const Entry>(candidates_).first(std::min(ef, candidates_.size()));
    }

    /// The same with the row's own links, which are full, and the `more` slots from `from` on.
    void choose_again(std::uint32_t centre, const Link* from, std::size_t more, std::int64_t width,
                      std::uint32_t* row) {
        slots_.assign(row, row + width);
        for (std::size_t i = 0; i < more; ++i) slots_.push_back(from[i].from);
        choose_from_slots(centre, width, row);
    }

    /// Copies to `row` the links of `slot` in `from`, to the names that `place` has for them. It has none for a removed
    /// slot; then links are chosen anew, among those and what the removed ones lead to, and so on until there are m.
    /// Returns whether that was so.
    bool copy(const Graph& from, std::uint32_t slot, int level, std::span<const std::uint32_t> place,
              std::uint32_t* row) {
        const std::int64_t width = graph_.width(level);
        reached_.resize(from.n);
        way_.assign(1, slot);
        reached_[slot] = true;
        slots_.clear();
        std::size_t own = 0;  // links that are not removed
        bool removed = true;  // whether the last ring has removed slots; the first is `slot`, the second its links
        int rings = 0;
        for (std::size_t next = 0; removed && (rings < 2 || std::ssize(slots_) < graph_.params.m); ++rings) {
            removed = false;
            if (rings == 1) own = slots_.size();
            for (const std::size_t end = way_.size(); next < end; ++next) {
                if (next > 0 && place[way_[next]] != no_link) continue;
                const std::uint32_t* const links = from.row(way_[next], level);
                for (std::int64_t i = 0; i < width && links[i] != no_link; ++i) {
                    if (reached_[links[i]]) continue;
                    reached_[links[i]] = true;
                    way_.push_back(links[i]);
                    const std::uint32_t to = place[links[i]];
                    to == no_link ? void(removed = true) : slots_.push_back(to);
                }
            }
        }
        for (const std::uint32_t s : way_) reached_[s] = false;
        if (rings > 1) {
            choose_from_slots(place[slot], width, row);
            std::uint32_t* end = std::find(row, row + width, no_link);
            for (std::size_t i = 0; i < own && end < row + width; ++i)
                if (std::find(row, end, slots_[i]) == end) *end++ = slots_[i];
        } else {
            std::fill(std::copy(slots_.begin(), slots_.end(), row), row + width, no_link);
        }
        return rings > 1;
    }

private:
    void choose_from_slots(std::uint32_t centre, std::int64_t width, std::uint32_t* row) {
        if (distances_.size() < slots_.size()) distances_.resize(slots_.size());
        target_.set(centre);
        target_.measure(slots_.data(), slots_.size(), distances_.data());
        candidates_.clear();
        for (std::size_t i = 0; i < slots_.size(); ++i) candidates_.push_back(entry_of(distances_[i], slots_[i]));
        std::sort(candidates_.begin(), candidates_.end());
        choose(candidates_, centre, width, row);
    }

    enum class Place { apart, behind, copy };

    /// Where a candidate lies, seen from the centre, to those chosen before; the first of them is `nearest` to it.
    Place place_of(Entry entry, const std::uint32_t* chosen, std::int64_t count, float nearest) {
        const float distance = distance_of(entry);
        if (count > 0) target_.set(slot_of(entry));
        for (std::int64_t i = 0; i < count; i += few) {
            const std::size_t some = std::min<std::int64_t>(few, count - i);
            target_.measure(chosen + i, some, distances_.data());
            for (std::size_t j = 0; j < some; ++j) {
                if (distances_[j] < distance) return Place::behind;
                if (i + j == 0 && distances_[0] == distance && distance == nearest) return Place::copy;
            }
        }
        return Place::apart;
    }

    const Graph& graph_;
    Target target_;
    std::vector<float> distances_;
    std::vector<std::uint32_t> slots_, copies_, way_;
    std::vector<bool> reached_;  // those on the way
    std::vector<Entry> candidates_;
};

Builder::Builder(Graph& graph, IdleWalks& idle, int num_threads)
    : graph_(graph),
      ef_(std::max(std::min(graph.params.ef_construction, std::ssize(graph.levels)), graph.params.m)),
      num_threads_(num_threads),
      walks_(graph, idle, ef_, workers_for(largest_batch, slots_per_piece, num_threads)) {
    for (int i = workers_for(largest_batch, slots_per_piece, num_threads); i > 0; --i)
        choosers_.push_back(std::make_unique<Chooser>(graph));
}

Builder::~Builder() = default;

void Builder::link(std::int64_t count) {
    for (const std::int64_t end = graph_.n + count; graph_.n < end;) {
        if (graph_.n == 0) {
            graph_.entry = 0;
            graph_.commit(1);
            continue;
        }
        const auto highest = graph_.levels[graph_.entry];
        const std::int64_t most = std::clamp<std::int64_t>(graph_.n / share_of_batch, 1, largest_batch);
        std::int64_t last = graph_.n + 1;  // the next entry makes a batch of its own
        if (graph_.levels[graph_.n] <= highest)
            while (last < std::min(end, graph_.n + most) && graph_.levels[last] <= highest) ++last;
        link_batch(last);
    }
}

void Builder::link_batch(std::int64_t end) {
    const std::int64_t begin = graph_.n;
    const int highest = graph_.levels[graph_.entry];
    parallel_for(end - begin, slots_per_piece, num_threads_, [&](std::int64_t from, std::int64_t to, int worker) {
        walks_.run(
            worker, begin + from, begin + to,
            [&](Walk& walk, std::int64_t slot) {
                walk.target.set(static_cast<std::uint32_t>(slot));
                walk.start(ef_, std::min<int>(highest, graph_.levels[slot]));
            },
            [&](Walk& walk, std::int64_t slot) {
                for (int level = std::min<int>(highest, graph_.levels[slot]); level >= 0; --level) {
                    const auto s = static_cast<std::uint32_t>(slot);
                    Chooser& chooser = *choosers_[worker];
                    const auto found = chooser.with_batch(walk.target, walk.found(level), ef_, begin, slot, level);
                    chooser.choose(found, s, graph_.params.m, graph_.row(s, level));
                }
            });
    });

    // From here on the batch is finished whatever happens: half of it would leave links that lead nowhere.
    links_.clear();
    for (std::int64_t slot = begin; slot < end; ++slot) {
        const auto from = static_cast<std::uint32_t>(slot);
        for (int level = std::min<int>(highest, graph_.levels[slot]); level >= 0; --level) {
            const std::uint32_t* row = graph_.row(from, level);
            for (std::int64_t i = 0; i < graph_.params.m && row[i] != no_link; ++i)
                links_.push_back({from, row[i], level});
        }
    }
    const std::int64_t count = sort_links();
    std::atomic<std::int64_t> done{0};
    std::exception_ptr error;
    try {
        parallel_for(count, rows_per_piece, num_threads_, [&](std::int64_t from, std::int64_t to, int worker) {
            for (std::int64_t i = from; i < to; ++i) link_back(i, *choosers_[worker]);
            done += to - from;
        });
    } catch (const Interrupted&) {  // parallel_for ends with the first pieces done
        error = std::current_exception();
        for (std::int64_t i = done; i < count; ++i) link_back(i, *choosers_[0]);
    } catch (...) {  // no memory: links are missing then, none leads nowhere
        error = std::current_exception();
    }
    if (graph_.levels[begin] > highest) graph_.entry = static_cast<std::uint32_t>(begin);
    graph_.commit(end - begin);
    if (error) std::rethrow_exception(error);
}

/// By the rows that they lead to. Returns how many these are.
std::int64_t Builder::sort_links() {
    std::sort(links_.begin(), links_.end(), [](const Link& a, const Link& b) {
        return std::tie(a.level, a.to, a.from) < std::tie(b.level, b.to, b.from);
    });
    rows_.clear();
    for (std::size_t i = 0; i < links_.size(); ++i)
        if (i == 0 || links_[i].to != links_[i - 1].to || links_[i].level != links_[i - 1].level) rows_.push_back(i);
    rows_.push_back(links_.size());
    return std::ssize(rows_) - 1;
}

void Builder::copy_links(const Graph& from, std::span<const std::uint32_t> slots) {
    const std::int64_t count = std::ssize(slots);
    std::vector<std::uint32_t> place(from.n, no_link);
    for (std::int64_t slot = 0; slot < count; ++slot) place[slots[slot]] = static_cast<std::uint32_t>(slot);
    std::vector<std::uint64_t> chosen(count);  // a bit a level
    parallel_for(count, rows_per_piece, num_threads_, [&](std::int64_t begin, std::int64_t end, int worker) {
        for (std::int64_t slot = begin; slot < end; ++slot) {
            const auto s = static_cast<std::uint32_t>(slot);
            for (int level = 0; level <= graph_.levels[slot]; ++level)
                if (choosers_[worker]->copy(from, slots[slot], level, place, graph_.row(s, level)))
                    chosen[slot] |= std::uint64_t(1) << level;
        }
    });
    links_.clear();
    for (std::int64_t slot = 0; slot < count; ++slot) {
        const auto s = static_cast<std::uint32_t>(slot);
        for (std::uint64_t bits = chosen[slot]; bits > 0; bits &= bits - 1) {
            const int level = std::countr_zero(bits);
            const std::int64_t width = graph_.width(level);
            const auto has = [&](const Graph& graph, std::uint32_t one, std::uint32_t other) {
                const std::uint32_t* const row = graph.row(one, level);
                return std::find(row, row + width, other) < row + width;
            };
            const std::uint32_t* const row = graph_.row(s, level);
            for (std::int64_t i = 0; i < width && row[i] != no_link; ++i)
                if (!has(from, slots[slot], slots[row[i]]) && !has(graph_, row[i], s))
                    links_.push_back({s, row[i], level});
        }
    }
    const std::int64_t rows = sort_links();
    parallel_for(rows, rows_per_piece, num_threads_, [&](std::int64_t begin, std::int64_t end, int worker) {
        for (std::int64_t i = begin; i < end; ++i) link_back(i, *choosers_[worker]);
    });
    if (count > 0)
        graph_.entry = static_cast<std::uint32_t>(std::ranges::max_element(graph_.levels) - graph_.levels.begin());
    graph_.commit(count);
}

/// Adds the new links to the i-th row that they lead to.
void Builder::link_back(std::int64_t i, Chooser& chooser) {
    const Link* link = &links_[rows_[i]];
    const Link* const last = links_.data() + rows_[i + 1];
    std::uint32_t* const row = graph_.row(link->to, link->level);
    const std::int64_t width = graph_.width(link->level);
    for (std::uint32_t* end = std::find(row, row + width, no_link); link < last && end < row + width; ++link)
        *end++ = link->from;
    if (link < last) chooser.choose_again(link->to, link, static_cast<std::size_t>(last - link), width, row);
}

}  // namespace polyvec::hnsw
