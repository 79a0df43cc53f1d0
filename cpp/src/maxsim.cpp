#include "polyvec/maxsim.hpp"

#include <algorithm>
#include <mutex>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "polyvec/topk.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t panel_bytes = 1 << 18;         // a group's panels, which stay in L2 while documents pass by
constexpr std::int64_t least_panels = 8;              // of a full group: little of the last panel is wasted
constexpr std::int64_t products_per_piece = 1 << 23;  // a piece of work: a tenth of a millisecond, a few at worst
constexpr std::int64_t max_block = 1 << 14;           // tokens of a piece, a document counting as one at least

/// Queries [begin, end), whose tokens lie in panels together.
struct Group {
    std::int64_t begin, end;
    std::int64_t tokens;
    std::int64_t panels;  // where its panels begin, in tokens
};

/// Documents [begin, end), or the candidates at these positions, which are those of `group`.
struct Block {
    std::int64_t begin, end;
    std::int64_t group;
};

/// Queries packed once for any number of documents. Which queries share a group changes no bit of their scores.
template <class T>
class Scorer {
public:
    /// `alone`: every query is a group of its own, for documents of its own.
    Scorer(const TokenSets& queries, const TokenSets& docs, bool alone, int num_threads)
        : queries_(queries), docs_(docs), d_(queries.dim()), kernel_(typed<T>(*kernels().maxsim)) {
        const std::int64_t row_bytes = std::max<std::int64_t>(1, d_) * static_cast<std::int64_t>(sizeof(T));
        const std::int64_t full = alone ? 0 : std::max(panel_bytes / row_bytes, least_panels * width());
        std::int64_t room = 0;
        for (std::int64_t q = 0; q < queries.size(); ++q) {
            const std::int64_t tokens = queries.length(q);
            if (groups.empty() || groups.back().tokens + tokens > full || q - groups.back().begin >= full)
                groups.push_back({q, q, 0, room});
            Group& group = groups.back();
            group.end = q + 1;
            group.tokens += tokens;
            room = group.panels + padded(group.tokens);
            most_tokens = std::max(most_tokens, group.tokens);
        }
        panels_ = aligned<T>(room * d_);
        parallel_for(groups.size(), 1, num_threads, [&](std::int64_t g, std::int64_t, int) {
            kernel_.pack(queries.set<T>(groups[g].begin), groups[g].tokens, d_, panels(groups[g]));
        });
    }

    std::vector<Group> groups;
    std::int64_t most_tokens = 0;  // of a group

    /// Cuts documents [begin, end), or those positions of `ids`, into blocks that are a piece of work each for a group
    /// of `tokens` tokens.
    void cut(std::int64_t begin, std::int64_t end, const std::int64_t* ids, std::int64_t tokens, std::int64_t group,
             std::vector<Block>& blocks) const {
        const std::int64_t full =
            std::clamp<std::int64_t>(products_per_piece / std::max<std::int64_t>(1, tokens * d_), 1, max_block);
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
        const auto id = [&](std::int64_t i) { return ids ? ids[i] : i; };
        for (std::int64_t i = block.begin; i < block.end; ++i) {
            const std::int64_t doc = id(i), next = i + 1 < block.end ? id(i + 1) : doc;
            kernel_.maxima(panels(group), group.tokens, docs_.set<T>(doc), docs_.length(doc), docs_.set<T>(next), d_,
                           maxima);
            const T* maximum = maxima;
            for (std::int64_t q = group.begin; q < group.end; ++q) {
                double sum = 0;
                for (const T* last = maximum + queries_.length(q); maximum < last; ++maximum) sum += *maximum;
                out[(q - group.begin) * stride + i - block.begin] = static_cast<T>(sum);
            }
        }
    }

private:
    std::int64_t width() const { return kernel_.panel_width; }
    std::int64_t padded(std::int64_t tokens) const { return (tokens + width() - 1) / width() * width(); }
    T* panels(const Group& group) const { return panels_.get() + group.panels * d_; }

    const TokenSets &queries_, &docs_;
    std::int64_t d_;
    const MaxsimKernel<T>& kernel_;
    Aligned<T> panels_;
};

template <class T>
void score(const MaxsimScore& op, int num_threads) {
    const Scorer<T> scorer(op.queries, op.docs, false, num_threads);
    const std::int64_t nd = op.docs.size(), groups = scorer.groups.size();
    std::vector<Block> blocks;
    scorer.cut(0, nd, nullptr, scorer.most_tokens, 0, blocks);
    T* out = op.out.as<T>();
    scorer.for_each_piece(blocks.size() * groups, num_threads, [&](std::int64_t piece, T* maxima) {
        const Block& block = blocks[piece / groups];
        const Group& group = scorer.groups[piece % groups];
        scorer.score(group, block, nullptr, maxima, out + group.begin * nd + block.begin, nd);
    });
}

template <class T>
void topk(const MaxsimTopk& op, int num_threads) {
    const bool listed = static_cast<bool>(op.candidates.offsets);
    const auto* ids = listed ? op.candidates.ids.as<const std::int64_t>() : nullptr;
    const auto* lists = listed ? op.candidates.offsets.as<const std::int64_t>() : nullptr;
    const Scorer<T> scorer(op.queries, op.docs, listed, num_threads);
    const std::int64_t groups = scorer.groups.size(), nq = op.queries.size(), k = op.scores.dim(1);
    std::vector<Block> blocks;
    if (listed) {
        for (std::int64_t q = 0; q < nq; ++q)
            scorer.cut(lists[q], lists[q + 1], ids, scorer.groups[q].tokens, q, blocks);
    } else {
        scorer.cut(0, op.docs.size(), nullptr, scorer.most_tokens, 0, blocks);
    }
    std::vector<TopK> best(nq, TopK(k));
    std::vector<std::mutex> taken(groups);
    scorer.for_each_piece(blocks.size() * (listed ? 1 : groups), num_threads, [&](std::int64_t piece, T* maxima) {
        const Block& block = blocks[listed ? piece : piece / groups];
        const std::int64_t g = listed ? block.group : piece % groups, n = block.end - block.begin;
        const Group& group = scorer.groups[g];
        std::vector<T> scores((group.end - group.begin) * n);
        scorer.score(group, block, ids, maxima, scores.data(), n);
        const std::lock_guard lock(taken[g]);
        const T* score = scores.data();
        for (std::int64_t q = group.begin; q < group.end; ++q)
            for (std::int64_t i = block.begin; i < block.end; ++i)
                best[q].push(static_cast<float>(*score++), ids ? ids[i] : i);
    });
    for (std::int64_t q = 0; q < nq; ++q)
        best[q].write(op.scores.as<float>() + q * k, op.ids.as<std::int64_t>() + q * k);
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

}  // namespace

void run(const MaxsimScore& op, Cpu cpu) {
    op.queries.tokens.dtype == DType::f32 ? score<float>(op, cpu.num_threads) : score<double>(op, cpu.num_threads);
}

void run(const MaxsimTopk& op, Cpu cpu) {
    op.queries.tokens.dtype == DType::f32 ? topk<float>(op, cpu.num_threads) : topk<double>(op, cpu.num_threads);
}

void run(const MaxsimAlign& op, Cpu cpu) {
    op.query.dtype == DType::f32 ? align<float>(op, cpu.num_threads) : align<double>(op, cpu.num_threads);
}

}  // namespace polyvec
