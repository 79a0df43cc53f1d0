#include "polyvec/maxsim.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "polyvec/topk.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t panel_bytes = 1 << 18;         // a group's panels, which stay in L2 while documents pass by
constexpr std::int64_t products_per_piece = 1 << 23;  // a piece of work: a tenth of a millisecond, a few at worst
constexpr std::int64_t max_block = 1 << 14;           // tokens of a piece, a document counting as one at least
constexpr std::int64_t most_alone = 1 << 10;          // queries with documents of their own in panels at a time

/// Queries [begin, end), whose tokens lie in panels together.
struct Group {
    std::int64_t begin, end;
    std::int64_t tokens;
    std::int64_t panels;  // where its panels begin, in tokens
    std::int64_t first;   // its first token
};

/// Documents [begin, end), or the candidates at these positions, which are those of `group`.
struct Block {
    std::int64_t begin, end;
    std::int64_t group;
};

/// Query tokens in panels, for documents of float tokens. `at` counts tokens from the first panel on.
template <class T>
class FloatPanels {
public:
    using Score = T;

    FloatPanels(const StoredTokens& docs, std::int64_t d) : docs_(docs), d_(d), kernel_(typed<T>(*kernels().maxsim)) {}

    static constexpr bool whole_blocks = false;         // a document meets all panels, and not a panel all documents
    static constexpr std::int64_t least_panels = 8;     // of a full group: little of the last panel is wasted
    static constexpr std::int64_t panels_at_once = 64;  // that a thread packs
    std::int64_t width() const { return kernel_.panel_width; }
    std::int64_t token_bytes() const { return d_ * static_cast<std::int64_t>(sizeof(T)); }
    std::int64_t products() const { return d_; }  // a query token and a document token, or what takes as long
    void reserve(std::int64_t tokens) { panels_ = aligned<T>(tokens * d_); }

    void pack(const T* tokens, std::int64_t n, std::int64_t at, const Missing&) const {
        kernel_.pack(tokens, n, d_, panels_.get() + at * d_);
    }

    void maxima(const Group& group, std::int64_t doc, std::int64_t next, T* best) const {
        kernel_.maxima(panels_.get() + group.panels * d_, group.tokens, docs_.set<T>(doc), docs_.length(doc),
                       docs_.set<T>(next), d_, best);
    }

protected:
    const StoredTokens& docs_;
    std::int64_t d_;
    const MaxsimKernel<T>& kernel_;
    Aligned<T> panels_;
};

/// The same, writing the rows of MaxsimMatch on the way.
template <class T>
class MatchPanels : public FloatPanels<T> {
public:
    MatchPanels(const StoredTokens& docs, std::int64_t d, const Array& rows) : FloatPanels<T>(docs, d), rows_(rows) {}

    void maxima(const Group& group, std::int64_t doc, std::int64_t, T* best) const {
        std::vector<std::int64_t> found(group.tokens + this->width());
        this->kernel_.align(this->panels_.get() + group.panels * this->d_, group.tokens,
                            this->docs_.template set<T>(doc), this->docs_.length(doc), this->d_, best, found.data());
        auto* rows = rows_.as<std::int32_t>() + group.first;
        if (rows_.ndim == 2) rows += doc * rows_.dim(1);
        std::transform(found.begin(), found.begin() + group.tokens, rows,
                       [](std::int64_t row) { return static_cast<std::int32_t>(row); });
    }

private:
    const Array& rows_;
};

const NarrowMaxsimKernel& narrow_kernel(const StoredTokens& docs) {
    const MaxsimKernels& kernel = *kernels().maxsim;
    switch (docs.format()) {
        case StoredTokens::bfloat16:
            return kernel.bf16;
        case StoredTokens::float16:
            return kernel.f16;
        case StoredTokens::int8:
            return kernel.i8;
        case StoredTokens::residual4:
            return kernel.residual4;
        default:
            return kernel.residual2;
    }
}

/// The same for tokens in fewer bits. The products of the queries with the centroids are computed with the panels.
class NarrowPanels {
public:
    using Score = float;

    NarrowPanels(const StoredTokens& docs, std::int64_t d)
        : docs_(docs),
          d_(d),
          row_bytes_(docs.tokens.dim(1) * static_cast<std::int64_t>(size_of(docs.tokens.dtype))),
          centroids_(docs.centroids ? docs.centroids.dim(0) : 0),
          kernel_(narrow_kernel(docs)),
          float_kernel_(kernels().maxsim->f32),
          panel_words_(kernel_.panel_words(d)) {
        if (!docs.centroids) return;
        const auto* weights = docs.weights.as<const float>();
        signed char rounded[16];
        const std::int64_t codes = docs.weights.dim(0);
        unit_ = weight_unit(weights, codes);
        for (std::int64_t k = 0; k < codes; ++k) rounded[k] = static_cast<signed char>(std::lrint(weights[k] / unit_));
        weights_ = aligned<unsigned char>(kernel_.weights_bytes);
        kernel_.pack_weights(rounded, weights_.get());
    }

    static constexpr bool whole_blocks = false;
    static constexpr std::int64_t least_panels = 8;
    static constexpr std::int64_t panels_at_once = 8;
    std::int64_t width() const { return float_kernel_.panel_width; }
    std::int64_t token_bytes() const { return panel_words_ * static_cast<std::int64_t>(sizeof(std::uint32_t)); }
    std::int64_t products() const { return d_; }
    void reserve(std::int64_t tokens) {
        panels_ = aligned<std::uint32_t>(tokens * panel_words_);
        centroid_scores_ = aligned<float>(tokens * centroids_);
    }

    void pack(const float* tokens, std::int64_t n, std::int64_t at, const Missing&) const {
        std::uint32_t* panels = panels_.get() + at * panel_words_;
        kernel_.pack(tokens, n, d_, unit_, panels);
        if (centroids_ == 0) return;
        const Aligned<float> floats = aligned<float>((n + width()) * d_);
        float_kernel_.pack(tokens, n, d_, floats.get());
        kernel_.centroid_scores(floats.get(), panels, n, docs_.centroids.as<const float>(), centroids_, d_,
                                centroid_scores_.get() + at * centroids_);
    }

    void maxima(const Group& group, std::int64_t doc, std::int64_t next, float* best) const {
        const auto* codes = docs_.tokens.as<const unsigned char>();
        const std::int64_t first = docs_.begin(doc);
        kernel_.maxima(
            panels_.get() + group.panels * panel_words_, group.tokens,
            {codes + first * row_bytes_, static_cast<std::size_t>(docs_.length(doc)),
             codes + docs_.begin(next) * row_bytes_, docs_.scales ? docs_.scales.as<const float>() + first : nullptr,
             docs_.centroids ? docs_.centroid_ids.as<const std::int32_t>() + first : nullptr,
             centroid_scores_.get() + group.panels * centroids_, weights_.get()},
            d_, centroids_, best);
    }

private:
    const StoredTokens& docs_;
    std::int64_t d_, row_bytes_, centroids_;
    const NarrowMaxsimKernel& kernel_;
    const MaxsimKernel<float>& float_kernel_;
    std::int64_t panel_words_;
    float unit_ = 1;
    Aligned<std::uint32_t> panels_;
    Aligned<float> centroid_scores_;
    Aligned<unsigned char> weights_;
};

/// The same for tokens of which only the centroids are kept: panels are the queries' products with all centroids, in
/// bytes, and a zero vector's behind them.
class CentroidPanels {
public:
    using Score = float;

    CentroidPanels(const StoredTokens& docs, std::int64_t d)
        : docs_(docs),
          d_(d),
          centroids_(docs.centroids.dim(0)),
          kernel_(kernels().maxsim->centroid),
          float_kernel_(kernels().maxsim->f32) {}

    static constexpr bool whole_blocks = true;  // a panel stays in the cache, documents pass by
    static constexpr std::int64_t least_panels = 16;
    static constexpr std::int64_t panels_at_once = 1;
    std::int64_t width() const { return kernel_.panel_width; }
    std::int64_t token_bytes() const { return centroids_; }
    std::int64_t products() const { return 1; }
    void reserve(std::int64_t tokens) {
        bytes_ = aligned<std::uint8_t>(tokens * (centroids_ + 1));
        least_ = aligned<float>(tokens);
        step_ = aligned<float>(tokens);
    }

    void pack(const float* tokens, std::int64_t n, std::int64_t at, const Missing& missing) const {
        const std::int64_t rows = centroids_ + (missing.full > 0);
        const Aligned<float> floats = aligned<float>(width() * d_), products = aligned<float>(width() * rows);
        const std::int64_t written = n == width() ? centroids_ : 0;  // rows without a lane that no token writes
        std::fill_n(products.get() + width() * written, width() * (rows - written), 0.0f);
        float_kernel_.pack(tokens, n, d_, floats.get());
        float_kernel_.products(floats.get(), n, docs_.centroids.as<const float>(), centroids_, d_, products.get(),
                               width());
        kernel_.round(products.get(), rows, {bytes(at), least_.get() + at, step_.get() + at});
    }

    /// What Scorer::score does.
    void score(const TokenSets& queries, const Missing& missing, const Group& group, const Block& block,
               const std::int64_t* ids, float* out, std::int64_t stride) const {
        const std::int64_t n = block.end - block.begin, nq = group.end - group.begin;
        std::vector<CentroidDoc> docs(n);
        for (std::int64_t i = 0; i < n; ++i) {
            const std::int64_t doc = ids ? ids[block.begin + i] : block.begin + i, tokens = docs_.length(doc);
            docs[i] = {docs_.tokens.as<const std::uint16_t>() + docs_.begin(doc), static_cast<std::size_t>(tokens),
                       tokens < missing.full ? centroids_ : -1};
        }
        std::vector<std::int64_t> sums(nq * n);
        const Parts parts = parts_of(queries, group, n, sums.data());
        for (std::size_t panel = 0; panel + 1 < parts.first_of_panel.size(); ++panel) {
            const std::int64_t first = parts.first_of_panel[panel], end = parts.first_of_panel[panel + 1];
            kernel_.sums(bytes(group.panels + panel * width()), docs.data(), n, &parts.of_queries[first], end - first);
        }
        const float* least = least_.get() + group.panels;
        for (std::int64_t q = 0; q < nq; ++q) {
            const std::int64_t tokens = queries.length(group.begin + q);
            const double base = std::accumulate(least, least + tokens, 0.0), unit = parts.units[q];
            least += tokens;
            for (std::int64_t i = 0; i < n; ++i) {
                const bool empty = docs[i].n == 0 && docs[i].start < 0 && tokens > 0;
                const double score = base + unit * static_cast<double>(sums[q * n + i]);
                out[q * stride + i] = static_cast<float>(empty ? missing.empty : score);
            }
        }
    }

private:
    /// The queries of a group as the kernel takes them, panel by panel.
    struct Parts {
        std::vector<CentroidQuery> of_queries;
        std::vector<std::int64_t> first_of_panel;  // and the end
        std::vector<std::int16_t> weights;         // of the tokens, in units of their query
        std::vector<float> units;
    };

    /// sums (queries, n). The steps of a query's tokens are taken as multiples of a unit, to 14 bits: sums are of
    /// integers, and do not depend on which panels a query lies in.
    Parts parts_of(const TokenSets& queries, const Group& group, std::int64_t n, std::int64_t* sums) const {
        constexpr float units_of_a_step = 1 << 14;
        const std::int64_t nq = group.end - group.begin;
        const float* const step = step_.get() + group.panels;
        Parts parts;
        parts.weights.resize(group.tokens);
        parts.units.resize(nq);
        for (std::int64_t q = 0, t = 0; q < nq; ++q) {
            const std::int64_t end = t + queries.length(group.begin + q);
            if (t == end) continue;
            const float unit = parts.units[q] = *std::max_element(step + t, step + end) / units_of_a_step;
            for (std::int64_t i = t; i < end; ++i)
                parts.weights[i] = unit > 0 ? static_cast<std::int16_t>(std::lrint(step[i] / unit)) : 0;
            for (std::int64_t panel = t / width(); t < end; ++panel) {
                const std::int64_t first = panel * width(), last = std::min(end, first + width());
                if (panel == static_cast<std::int64_t>(parts.first_of_panel.size()))
                    parts.first_of_panel.push_back(parts.of_queries.size());
                parts.of_queries.push_back({static_cast<std::size_t>(t - first), static_cast<std::size_t>(last - first),
                                            &parts.weights[t], sums + q * n});
                t = last;
            }
        }
        parts.first_of_panel.push_back(parts.of_queries.size());
        return parts;
    }

    std::uint8_t* bytes(std::int64_t at) const { return bytes_.get() + at * (centroids_ + 1); }

    const StoredTokens& docs_;
    std::int64_t d_, centroids_;
    const CentroidMaxsimKernel& kernel_;
    const MaxsimKernel<float>& float_kernel_;
    Aligned<std::uint8_t> bytes_;
    Aligned<float> least_, step_;
};

/// Calls f<Panels>() for the panels that documents of this form take.
template <class Op, class F>
void with_panels(const Op& op, F f) {
    if (op.docs.format() == StoredTokens::centroid)
        f.template operator()<CentroidPanels>();
    else if (op.docs.format() != StoredTokens::floats)
        f.template operator()<NarrowPanels>();
    else if (op.queries.tokens.dtype == DType::f32)
        f.template operator()<FloatPanels<float>>();
    else
        f.template operator()<FloatPanels<double>>();
}

/// Queries packed once for any number of documents. Which queries share a group changes no bit of their scores.
template <class Panels>
class Scorer {
public:
    using T = typename Panels::Score;

    /// `alone`: every query is a group of its own, for documents of its own. `more` is what Panels need.
    template <class... More>
    Scorer(const TokenSets& queries, const StoredTokens& docs, Missing missing, bool alone, int num_threads,
           const More&... more)
        : queries_(queries), docs_(docs), missing_(missing), d_(queries.dim()), panels_(docs, d_, more...) {
        const std::int64_t row_bytes = std::max<std::int64_t>(1, panels_.token_bytes());
        const std::int64_t full = alone ? 0 : std::max(panel_bytes / row_bytes, Panels::least_panels * panels_.width());
        std::int64_t room = 0;
        for (std::int64_t q = 0; q < queries.size(); ++q) {
            const std::int64_t tokens = queries.length(q);
            if (groups.empty() || groups.back().tokens + tokens > full || q - groups.back().begin >= full)
                groups.push_back({q, q, 0, room, queries.begin(q)});
            Group& group = groups.back();
            group.end = q + 1;
            group.tokens += tokens;
            room = group.panels + padded(group.tokens);
            most_tokens = std::max(most_tokens, group.tokens);
        }
        panels_.reserve(room);
        struct Part {
            std::int64_t first, n, at;
        };
        std::vector<Part> parts;
        const std::int64_t step = Panels::panels_at_once * panels_.width();
        for (const Group& group : groups)
            for (std::int64_t t = 0; t < group.tokens; t += step)
                parts.push_back({group.first + t, std::min(step, group.tokens - t), group.panels + t});
        parallel_for(parts.size(), 1, num_threads, [&](std::int64_t i, std::int64_t, int) {
            panels_.pack(queries.tokens.as<const T>() + parts[i].first * d_, parts[i].n, parts[i].at, missing);
        });
    }

    std::vector<Group> groups;
    std::int64_t most_tokens = 0;  // of a group

    /// Cuts documents [begin, end), or those positions of `ids`, into blocks that are a piece of work each for a group
    /// of `tokens` tokens.
    void cut(std::int64_t begin, std::int64_t end, const std::int64_t* ids, std::int64_t tokens, std::int64_t group,
             std::vector<Block>& blocks) const {
        const std::int64_t full = std::clamp<std::int64_t>(
            products_per_piece / std::max<std::int64_t>(1, tokens * panels_.products()), 1, max_block);
        std::int64_t size = full;
        for (std::int64_t i = begin; i < end; ++i) {
            if (size >= full) {
                blocks.push_back({i, i, group});
                size = 0;
            }
            blocks.back().end = i + 1;
            size += std::max<std::int64_t>(1, docs_.length(ids ? ids[i] : i));
        }
    }

    /// The block and the group of a piece of work, where every block meets every group.
    std::pair<std::int64_t, std::int64_t> parts(std::int64_t piece, std::int64_t blocks) const {
        const auto n = static_cast<std::int64_t>(groups.size());
        return Panels::whole_blocks ? std::pair{piece % blocks, piece / blocks} : std::pair{piece / n, piece % n};
    }

    /// Calls body(piece, maxima) for every piece; `maxima` has room for those of a document.
    template <class Body>
    void for_each_piece(std::int64_t pieces, int num_threads, Body body) const {
        const std::int64_t size = padded(most_tokens);
        const Aligned<T> maxima = aligned<T>(workers_for(pieces, 1, num_threads) * size);
        parallel_for(pieces, 1, num_threads,
                     [&](std::int64_t piece, std::int64_t, int worker) { body(piece, maxima.get() + worker * size); });
    }

    /// out[(q - group.begin) * stride + i - block.begin] = score of query q and document i of the block.
    void score(const Group& group, const Block& block, const std::int64_t* ids, T* maxima, T* out,
               std::int64_t stride) const {
        if constexpr (Panels::whole_blocks)
            panels_.score(queries_, missing_, group, block, ids, out, stride);
        else
            score_each(group, block, ids, maxima, out, stride);
    }

private:
    void score_each(const Group& group, const Block& block, const std::int64_t* ids, T* maxima, T* out,
                    std::int64_t stride) const {
        const auto id = [&](std::int64_t i) { return ids ? ids[i] : i; };
        for (std::int64_t i = block.begin; i < block.end; ++i) {
            const std::int64_t doc = id(i), next = i + 1 < block.end ? id(i + 1) : doc;
            panels_.maxima(group, doc, next, maxima);
            const bool zero = docs_.length(doc) < missing_.full, empty = docs_.length(doc) == 0 && !zero;
            const T least = zero ? T{0} : -std::numeric_limits<T>::infinity();
            const T* maximum = maxima;
            for (std::int64_t q = group.begin; q < group.end; ++q) {
                const std::int64_t tokens = queries_.length(q);
                double sums[4] = {};  // one alone would wait for each of its additions
                std::int64_t t = 0;
                for (; t + 4 <= tokens; t += 4) {
                    for (std::int64_t j = 0; j < 4; ++j) sums[j] += std::max(maximum[t + j], least);
                }
                for (; t < tokens; ++t) sums[t % 4] += std::max(maximum[t], least);
                double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
                maximum += tokens;
                if (empty && tokens > 0) sum = missing_.empty;
                out[(q - group.begin) * stride + i - block.begin] = static_cast<T>(sum);
            }
        }
    }

    std::int64_t padded(std::int64_t tokens) const {
        return (tokens + panels_.width() - 1) / panels_.width() * panels_.width();
    }

    const TokenSets& queries_;
    const StoredTokens& docs_;
    Missing missing_;
    std::int64_t d_;
    Panels panels_;
};

template <class Panels, class... More>
void score(const MaxsimScore& op, int num_threads, const More&... more) {
    using T = typename Panels::Score;
    const Scorer<Panels> scorer(op.queries, op.docs, op.missing, false, num_threads, more...);
    const std::int64_t nd = op.docs.size(), groups = scorer.groups.size();
    std::vector<Block> blocks;
    scorer.cut(0, nd, nullptr, scorer.most_tokens, 0, blocks);
    T* out = op.out.as<T>();
    scorer.for_each_piece(blocks.size() * groups, num_threads, [&](std::int64_t piece, T* maxima) {
        const auto [b, g] = scorer.parts(piece, blocks.size());
        const Block& block = blocks[b];
        const Group& group = scorer.groups[g];
        scorer.score(group, block, nullptr, maxima, out + group.begin * nd + block.begin, nd);
    });
}

/// The k best documents of each query: of the first n `ids`, or of those from lists[q] to lists[q + 1] where there are
/// lists; of the first n documents where there are no ids.
template <class Panels>
std::vector<TopK> best_of(const TokenSets& queries, const StoredTokens& docs, Missing missing, std::int64_t k,
                          const std::int64_t* lists, const std::int64_t* ids, std::int64_t n, int num_threads) {
    using T = typename Panels::Score;
    const bool listed = lists != nullptr;
    const Scorer<Panels> scorer(queries, docs, missing, listed, num_threads);
    const std::int64_t groups = scorer.groups.size(), nq = queries.size();
    std::vector<Block> blocks;
    if (listed) {
        for (std::int64_t q = 0; q < nq; ++q)
            scorer.cut(lists[q], lists[q + 1], ids, scorer.groups[q].tokens, q, blocks);
    } else {
        scorer.cut(0, n, ids, scorer.most_tokens, 0, blocks);
    }
    std::vector<TopK> best(nq, TopK(k));
    std::vector<std::mutex> taken(groups);
    scorer.for_each_piece(blocks.size() * (listed ? 1 : groups), num_threads, [&](std::int64_t piece, T* maxima) {
        const auto [b, g] = listed ? std::pair{piece, blocks[piece].group}
                                   : scorer.parts(piece, static_cast<std::int64_t>(blocks.size()));
        const Block& block = blocks[b];
        const Group& group = scorer.groups[g];
        const std::int64_t n = block.end - block.begin;
        std::vector<T> scores((group.end - group.begin) * n);
        scorer.score(group, block, ids, maxima, scores.data(), n);
        const std::lock_guard lock(taken[g]);
        const T* score = scores.data();
        for (std::int64_t q = group.begin; q < group.end; ++q)
            for (std::int64_t i = block.begin; i < block.end; ++i)
                best[q].push(static_cast<float>(*score++), ids ? ids[i] : i);
    });
    return best;
}

void write(std::vector<TopK>& best, const Array& scores, const Array& ids) {
    const std::int64_t k = scores.dim(1), n = best.size();
    for (std::int64_t q = 0; q < n; ++q) best[q].write(scores.as<float>() + q * k, ids.as<std::int64_t>() + q * k);
}

template <class Panels>
void topk(const MaxsimTopk& op, int num_threads) {
    const auto data = [](const Array& a) { return a ? a.as<const std::int64_t>() : nullptr; };
    const auto& [lists, listed] = op.candidates;
    const Array& ids = lists ? listed : op.include;
    auto best = best_of<Panels>(op.queries, op.docs, op.missing, op.scores.dim(1), data(lists), data(ids),
                                ids ? ids.dim(0) : op.docs.size(), num_threads);
    write(best, op.scores, op.ids);
}

template <class T>
void align(const MaxsimAlign& op, int num_threads) {
    const auto& kernel = typed<T>(*kernels().maxsim);
    const std::int64_t d = op.query.dim(1), width = kernel.panel_width;
    parallel_for(op.query.dim(0), width, num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        const Aligned<T> panel = aligned<T>(width * d), maxima = aligned<T>(width);
        const Aligned<std::int64_t> rows = aligned<std::int64_t>(width);
        kernel.pack(op.query.as<const T>() + begin * d, end - begin, d, panel.get());
        kernel.align(panel.get(), end - begin, op.doc.as<const T>(), op.doc.dim(0), d, maxima.get(), rows.get());
        std::copy_n(maxima.get(), end - begin, op.similarities.as<T>() + begin);
        std::copy_n(rows.get(), end - begin, op.ids.as<std::int64_t>() + begin);
    });
}

/// Document tokens lie in lanes, unless there is so little to do with each that packing them is felt: an inner product
/// has the same bits either way.
template <class T>
void score_matrix(const MaxsimScoreMatrix& op, int num_threads) {
    const auto& kernel = typed<T>(*kernels().maxsim);
    const std::int64_t d = op.query.dim(1), rows = op.query.dim(0), columns = op.doc.dim(0);
    const std::int64_t width = kernel.panel_width;
    const T *query = op.query.as<const T>(), *doc = op.doc.as<const T>();
    T* out = op.out.as<T>();
    if (rows >= std::min<std::int64_t>(columns, 128)) {
        parallel_for(columns, width, num_threads, [&](std::int64_t begin, std::int64_t end, int) {
            const Aligned<T> panel = aligned<T>(width * d);
            kernel.pack(doc + begin * d, end - begin, d, panel.get());
            kernel.products(panel.get(), end - begin, query, rows, d, out + begin, columns);
        });
        return;
    }
    constexpr std::int64_t cached = 1 << 13;  // products that are turned about at a time
    const Aligned<T> panels = aligned<T>((rows + width) * d);
    kernel.pack(query, rows, d, panels.get());
    parallel_for(columns, 16 + cached / (rows + 1), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        const Aligned<T> products = aligned<T>((end - begin) * rows);
        kernel.products(panels.get(), rows, doc + begin * d, end - begin, d, products.get(), rows);
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = begin; j < end; ++j) out[i * columns + j] = products[(j - begin) * rows + i];
        }
    });
}

/// Sums over the tokens of a query: of norms, and of what these lose when tokens are rounded as the kernels round them.
struct QueryNorms {
    double exact = 0, lost = 0;

    QueryNorms(const float* tokens, std::int64_t n, std::int64_t d) {
        for (const float* x = tokens; x < tokens + n * d; x += d) {
            float largest = 0;
            for (std::int64_t i = 0; i < d; ++i) largest = std::max(largest, std::fabs(x[i]));
            if (largest == 0) continue;
            const float steps = 127 / largest, scale = largest / 127;
            double squares = 0, lost_squares = 0;
            for (std::int64_t i = 0; i < d; ++i) {
                const double integer = std::isfinite(steps) ? static_cast<double>(std::lrint(x[i] * steps)) : 0;
                const double value = x[i], error = value - integer * scale;
                squares += value * value;
                lost_squares += error * error;
            }
            exact += std::sqrt(squares);
            lost += std::sqrt(lost_squares);
        }
    }
};

/// How far a score of a document as stored, in float32, can be from that of its exact tokens, in float32.
///
/// With a token x = y + r, y = s (c + w) as stored, and a query token q that is rounded to q' where it meets w:
///     <q, x> - (<q, s c> + <q', s w>) = <q, r> + <q - q', s w>    <=  |q| |r| + |q - q'| |s w|,
/// which holds for the difference of the maxima over x as well. A sum of n float32 products of a and b is off by less
/// than n 2^-23 |a| |b|, unless it leaves the range of float32.
double largest_error(const QueryNorms& query, const float* bounds, std::int64_t tokens, std::int64_t d) {
    const double error = bounds[0], rounded = bounds[1], size = bounds[2];
    const double magnitude = (query.exact + query.lost) * size, terms = static_cast<double>(d + 16);
    if (!(magnitude < 1e37)) return HUGE_VAL;
    return query.exact * error + query.lost * rounded + terms * (0x1p-23 * magnitude + 0x1p-126 * tokens);
}

/// Those that share an allotment of memory for their products with the centroids, `queries` at most.
template <class Op, class Run>
void in_slices(const Op& op, std::int64_t queries, Run run) {
    constexpr std::int64_t most = 1 << 26;
    const std::int64_t n = op.queries.size(), centroids = op.docs.centroids ? op.docs.centroids.dim(0) : 0;
    for (std::int64_t begin = 0, end; begin < n; begin = end) {
        end = begin + 1;
        while (end < std::min(n, begin + queries) &&
               (op.queries.begin(end + 1) - op.queries.begin(begin)) * centroids <= most)
            ++end;
        run(begin, end);
    }
}

Array rows(Array a, std::int64_t begin, std::int64_t end) {
    if (!a) return a;
    a.data = a.as<char>() + begin * (a.size() / std::max<std::int64_t>(1, a.dim(0))) * size_of(a.dtype);
    a.shape[0] = end - begin;
    return a;
}

template <class Panels, class... More>
void score_pairs(const MaxsimScorePairs& op, int num_threads, const More&... more) {
    using T = typename Panels::Score;
    in_slices(op, most_alone, [&](std::int64_t begin, std::int64_t end) {
        const TokenSets queries{op.queries.tokens, rows(op.queries.offsets, begin, end + 1)};
        StoredTokens docs = op.docs;
        docs.offsets = rows(op.docs.offsets, begin, end + 1);
        const Scorer<Panels> scorer(queries, docs, op.missing, true, num_threads, more...);
        T* out = op.out.as<T>() + begin;
        scorer.for_each_piece(end - begin, num_threads, [&](std::int64_t i, T* maxima) {
            scorer.score(scorer.groups[i], {i, i + 1, i}, nullptr, maxima, out + i, 1);
        });
    });
}

template <class T>
void match(const MaxsimMatch& op, int num_threads) {
    const StoredTokens docs{op.docs, {}, {}, {}, {}};
    if (op.out.ndim == 1)
        score_pairs<MatchPanels<T>>({op.queries, docs, {}, op.out}, num_threads, op.rows);
    else
        score<MatchPanels<T>>({op.queries, docs, {}, op.out}, num_threads, op.rows);
}

template <class T>
void match_gradient(const MaxsimMatchGradient& op, int num_threads) {
    const TokenSets& sets = op.of_docs ? op.docs : op.queries;
    const TokenSets& others = op.of_docs ? op.queries : op.docs;
    const std::int64_t d = sets.dim(), nd = op.docs.size();
    const bool pairs = op.out.ndim == 1;
    parallel_for(sets.size(), 1, num_threads, [&](std::int64_t set, std::int64_t, int) {
        T* gradient = op.gradient.as<T>();
        std::fill(gradient + sets.begin(set) * d, gradient + sets.begin(set + 1) * d, T{0});
        for (std::int64_t other = pairs ? set : 0; other < (pairs ? set + 1 : others.size()); ++other) {
            const std::int64_t query = op.of_docs ? other : set, doc = op.of_docs ? set : other;
            const T weight = op.out.as<const T>()[pairs ? query : query * nd + doc];
            const auto* rows = op.rows.as<const std::int32_t>() + (pairs ? 0 : doc * op.rows.dim(1));
            for (std::int64_t i = op.queries.begin(query); i < op.queries.begin(query + 1); ++i) {
                if (rows[i] < 0) continue;
                const std::int64_t j = op.docs.begin(doc) + rows[i];
                T* sum = gradient + (op.of_docs ? j : i) * d;
                const T* token = others.tokens.as<const T>() + (op.of_docs ? i : j) * d;
                for (std::int64_t c = 0; c < d; ++c) sum[c] += weight * token[c];
            }
        }
    });
}

/// Queries [begin, end).
void certify(const MaxsimCertifiedTopk& op, std::int64_t begin, std::int64_t end, int num_threads) {
    const std::int64_t n = end - begin, nd = op.docs.size(), d = op.queries.dim(), k = op.scores.dim(1);
    const TokenSets queries{op.queries.tokens, rows(op.queries.offsets, begin, end + 1)};
    const Aligned<float> estimates = aligned<float>(n * nd);
    Array screened = rows(op.scores, begin, end);
    screened.data = estimates.get();
    screened.shape[1] = nd;
    run(MaxsimScore{queries, op.docs, {}, screened}, Cpu{num_threads});

    std::vector<std::vector<std::int64_t>> chosen(n);
    const auto rescore = [&] {
        std::vector<std::int64_t> lists{0}, ids;
        for (std::int64_t q = 0; q < n; ++q) {
            ids.insert(ids.end(), chosen[q].begin(), chosen[q].end());
            lists.push_back(ids.size());
            op.rescored.as<std::int64_t>()[begin + q] += chosen[q].size();
        }
        return best_of<FloatPanels<float>>(queries, {op.exact, {}, {}, {}, {}}, {}, k, lists.data(), ids.data(),
                                           lists.back(), num_threads);
    };

    std::fill_n(op.rescored.as<std::int64_t>() + begin, n, 0);
    parallel_for(n, 1, num_threads, [&](std::int64_t q, std::int64_t, int) {
        TopK best(k);
        for (std::int64_t i = 0; i < nd; ++i) best.push(estimates[q * nd + i], i);
        for (const Hit& hit : best.hits()) chosen[q].push_back(hit.id);
        std::sort(chosen[q].begin(), chosen[q].end());
    });
    auto best = rescore();
    parallel_for(n, 1, num_threads, [&](std::int64_t q, std::int64_t, int) {
        const auto& hits = best[q].hits();
        const std::int64_t tokens = queries.length(q), found = hits.size();
        const double enough = found < k ? -HUGE_VAL : hits[k - 1].score;
        const QueryNorms norms(queries.set<float>(q), tokens, d);
        std::vector<std::int64_t> others;
        auto done = chosen[q].begin();
        for (std::int64_t i = 0; i < nd; ++i) {
            if (done != chosen[q].end() && *done == i) {
                ++done;
                continue;
            }
            const double highest =
                estimates[q * nd + i] + largest_error(norms, op.bounds.as<const float>() + 3 * i, tokens, d);
            if (!(highest < enough)) others.push_back(i);
        }
        chosen[q] = std::move(others);
    });
    const auto others = rescore();
    for (std::int64_t q = 0; q < n; ++q) best[q].merge(others[q]);
    write(best, rows(op.scores, begin, end), rows(op.ids, begin, end));
}

}  // namespace

void run(const MaxsimScore& op, Cpu cpu) {
    in_slices(op, op.queries.size(), [&](std::int64_t begin, std::int64_t end) {
        MaxsimScore slice = op;
        slice.queries.offsets = rows(op.queries.offsets, begin, end + 1);
        slice.out = rows(op.out, begin, end);
        with_panels(op, [&]<class Panels>() { score<Panels>(slice, cpu.num_threads); });
    });
}

void run(const MaxsimScorePairs& op, Cpu cpu) {
    with_panels(op, [&]<class Panels>() { score_pairs<Panels>(op, cpu.num_threads); });
}

void run(const MaxsimScoreMatrix& op, Cpu cpu) {
    op.query.dtype == DType::f32 ? score_matrix<float>(op, cpu.num_threads) : score_matrix<double>(op, cpu.num_threads);
}

void run(const MaxsimTopk& op, Cpu cpu) {
    in_slices(op, op.queries.size(), [&](std::int64_t begin, std::int64_t end) {
        MaxsimTopk slice = op;
        slice.queries.offsets = rows(op.queries.offsets, begin, end + 1);
        slice.candidates.offsets = rows(op.candidates.offsets, begin, end + 1);
        slice.scores = rows(op.scores, begin, end);
        slice.ids = rows(op.ids, begin, end);
        with_panels(op, [&]<class Panels>() { topk<Panels>(slice, cpu.num_threads); });
    });
}

void run(const MaxsimCertifiedTopk& op, Cpu cpu) {
    constexpr std::int64_t most = 1 << 24;  // scores held at a time
    const std::int64_t n = op.queries.size(), step = std::max<std::int64_t>(1, most / (op.docs.size() + 1));
    for (std::int64_t begin = 0; begin < n; begin += step)
        certify(op, begin, std::min(begin + step, n), cpu.num_threads);
}

void run(const MaxsimAlign& op, Cpu cpu) {
    op.query.dtype == DType::f32 ? align<float>(op, cpu.num_threads) : align<double>(op, cpu.num_threads);
}

void run(const MaxsimMatch& op, Cpu cpu) {
    op.queries.tokens.dtype == DType::f32 ? match<float>(op, cpu.num_threads) : match<double>(op, cpu.num_threads);
}

void run(const MaxsimMatchGradient& op, Cpu cpu) {
    op.queries.tokens.dtype == DType::f32 ? match_gradient<float>(op, cpu.num_threads)
                                          : match_gradient<double>(op, cpu.num_threads);
}

}  // namespace polyvec
