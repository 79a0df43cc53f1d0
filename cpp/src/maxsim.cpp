#include "polyvec/maxsim.hpp"

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

#include "polyvec/buffer.hpp"
#include "polyvec/parallel.hpp"
#include "polyvec/topk.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t products_per_piece = 1 << 23;  // a piece costs a tenth of a millisecond, half of one at worst
constexpr std::int64_t most_per_piece = 1 << 14;      // tokens or documents
constexpr std::int64_t panel_bytes = 1 << 18;         // panels of a group: they stay in the level-2 cache
constexpr std::int64_t least_panels = 8;              // and waste little of the last one

/// Queries [begin, end), whose tokens lie in panels together, from token `first` on.
struct Group {
    std::int64_t begin, end;
    std::int64_t first, tokens;
    std::int64_t panels;  // where its panels begin, in tokens
};

/// Documents [begin, end), or these positions of the candidates of `group`.
struct Block {
    std::int64_t begin, end;
    std::int64_t group;
};

/// Queries packed once, for any number of documents. A query is never cut, and which queries share a group changes no
/// bit of its scores.
template <class T>
class Scorer {
public:
    /// Groups of several queries; or of one each, when each has its own documents.
    Scorer(const TokenSets& queries, const TokenSets& docs, bool one_each, int num_threads)
        : queries_(queries), docs_(docs), d_(queries.dim()), kernel_(typed<T>(*kernels().maxsim)) {
        const std::int64_t width = static_cast<std::int64_t>(kernel_.panel_width);
        const std::int64_t row_bytes = std::max<std::int64_t>(1, d_) * static_cast<std::int64_t>(sizeof(T));
        const std::int64_t most = one_each ? 0 : std::max(panel_bytes / row_bytes, least_panels * width);
        std::int64_t panels = 0;
        for (std::int64_t q = 0; q < queries.size(); ++q) {
            const std::int64_t tokens = queries.length(q);
            const bool fits = !groups_.empty() && groups_.back().tokens + tokens <= most &&
                              groups_.back().end - groups_.back().begin < most;
            if (!fits) {
                if (!groups_.empty()) panels += room(groups_.back().tokens);
                groups_.push_back({q, q, queries.begin(q), 0, panels});
            }
            groups_.back().end = q + 1;
            groups_.back().tokens += tokens;
            widest_ = std::max(widest_, groups_.back().tokens);
        }
        if (!groups_.empty()) panels += room(groups_.back().tokens);
        panels_ = Buffer<T>(static_cast<std::size_t>(panels * d_));
        parallel_for(static_cast<std::int64_t>(groups_.size()), 1, num_threads,
                     [&](std::int64_t begin, std::int64_t end, int) {
                         for (std::int64_t g = begin; g < end; ++g)
                             kernel_.pack(queries.tokens.as<const T>() + groups_[g].first * d_,
                                          static_cast<std::size_t>(groups_[g].tokens), static_cast<std::size_t>(d_),
                                          panels_.data() + groups_[g].panels * d_);
                     });
    }

    const std::vector<Group>& groups() const { return groups_; }

    /// Cuts documents [begin, end) (of the list `ids`, where given) into blocks that cost a piece for `tokens` query
    /// tokens.
    void cut(std::int64_t begin, std::int64_t end, const std::int64_t* ids, std::int64_t tokens, std::int64_t group,
             std::vector<Block>& blocks) const {
        const std::int64_t most =
            std::clamp<std::int64_t>(products_per_piece / std::max<std::int64_t>(1, tokens * d_), 1, most_per_piece);
        std::int64_t size = most;
        for (std::int64_t i = begin; i < end; ++i) {
            if (size >= most) {
                blocks.push_back({i, i, group});
                size = 0;
            }
            blocks.back().end = i + 1;
            size += std::max<std::int64_t>(1, docs_.length(ids ? ids[i] : i));
        }
    }

    /// Room for the maxima of one document.
    Buffer<T> scratch() const { return Buffer<T>(static_cast<std::size_t>(room(widest_))); }

    std::int64_t widest() const { return widest_; }

    /// out[(q - group.begin) * stride + i - block.begin] = score of query q and the block's document i.
    void score(const Group& group, const Block& block, const std::int64_t* ids, T* best, T* out,
               std::int64_t stride) const {
        for (std::int64_t i = block.begin; i < block.end; ++i) {
            const std::int64_t doc = ids ? ids[i] : i, next = i + 1 == block.end ? doc : ids ? ids[i + 1] : i + 1;
            kernel_.maxima(panels_.data() + group.panels * d_, static_cast<std::size_t>(group.tokens),
                           docs_.set<T>(doc), static_cast<std::size_t>(docs_.length(doc)), docs_.set<T>(next),
                           static_cast<std::size_t>(d_), best);
            const T* maximum = best;
            for (std::int64_t q = group.begin; q < group.end; ++q) {
                double sum = 0;
                for (const T* last = maximum + queries_.length(q); maximum < last; ++maximum) sum += *maximum;
                out[(q - group.begin) * stride + i - block.begin] = static_cast<T>(sum);
            }
        }
    }

private:
    std::int64_t room(std::int64_t tokens) const {
        const std::int64_t width = static_cast<std::int64_t>(kernel_.panel_width);
        return (tokens + width - 1) / width * width;
    }

    const TokenSets &queries_, &docs_;
    std::int64_t d_;
    const MaxsimKernel<T>& kernel_;
    std::vector<Group> groups_;
    std::int64_t widest_ = 0;
    Buffer<T> panels_{0};
};

/// Calls body(piece, scratch) for every piece in [0, n).
template <class T, class Body>
void for_each_piece(const Scorer<T>& scorer, std::int64_t n, int num_threads, Body body) {
    std::vector<Buffer<T>> scratch;
    for (int w = workers_for(n, 1, num_threads); w > 0; --w) scratch.push_back(scorer.scratch());
    parallel_for(n, 1, num_threads, [&](std::int64_t begin, std::int64_t end, int worker) {
        for (std::int64_t i = begin; i < end; ++i) body(i, scratch[worker].data());
    });
}

template <class T>
void score(const MaxsimScore& op, int num_threads) {
    const Scorer<T> scorer(op.queries, op.docs, false, num_threads);
    const auto& groups = scorer.groups();
    const std::int64_t n_groups = static_cast<std::int64_t>(groups.size()), nd = op.docs.size();
    std::vector<Block> blocks;
    scorer.cut(0, nd, nullptr, scorer.widest(), 0, blocks);
    T* out = op.out.as<T>();
    for_each_piece(scorer, static_cast<std::int64_t>(blocks.size()) * n_groups, num_threads,
                   [&](std::int64_t piece, T* best) {
                       const Block& block = blocks[piece / n_groups];
                       const Group& group = groups[piece % n_groups];
                       scorer.score(group, block, nullptr, best, out + group.begin * nd + block.begin, nd);
                   });
}

template <class T>
void topk(const MaxsimTopk& op, int num_threads) {
    const bool listed = static_cast<bool>(op.candidate_offsets);
    const std::int64_t* ids = listed ? op.candidate_ids.as<const std::int64_t>() : nullptr;
    const Scorer<T> scorer(op.queries, op.docs, listed, num_threads);
    const auto& groups = scorer.groups();
    const std::int64_t n_groups = static_cast<std::int64_t>(groups.size());
    std::vector<Block> blocks;
    if (listed) {
        const auto* offsets = op.candidate_offsets.as<const std::int64_t>();
        for (std::int64_t q = 0; q < n_groups; ++q)
            scorer.cut(offsets[q], offsets[q + 1], ids, groups[q].tokens, q, blocks);
    } else {
        scorer.cut(0, op.docs.size(), nullptr, scorer.widest(), 0, blocks);
    }
    const std::int64_t k = op.scores.dim(1), nq = op.queries.size();
    std::vector<TopK> best_docs(static_cast<std::size_t>(nq), TopK(k));
    std::vector<std::mutex> mutexes(groups.size());
    const std::int64_t pieces = static_cast<std::int64_t>(blocks.size()) * (listed ? 1 : n_groups);
    for_each_piece(scorer, pieces, num_threads, [&](std::int64_t piece, T* best) {
        const Block& block = blocks[listed ? piece : piece / n_groups];
        const std::int64_t g = listed ? block.group : piece % n_groups, docs = block.end - block.begin;
        const Group& group = groups[g];
        std::vector<T> scores(static_cast<std::size_t>((group.end - group.begin) * docs));
        scorer.score(group, block, ids, best, scores.data(), docs);
        const std::lock_guard lock(mutexes[g]);
        for (std::int64_t q = group.begin; q < group.end; ++q)
            for (std::int64_t i = 0; i < docs; ++i)
                best_docs[q].push(static_cast<float>(scores[(q - group.begin) * docs + i]),
                                  ids ? ids[block.begin + i] : block.begin + i);
    });
    for (std::int64_t q = 0; q < nq; ++q)
        best_docs[q].write(op.scores.as<float>() + q * k, op.ids.as<std::int64_t>() + q * k);
}

template <class T>
void align(const MaxsimAlign& op, int num_threads) {
    const auto& kernel = typed<T>(*kernels().maxsim);
    const std::int64_t n = op.query.dim(0), d = op.query.dim(1), width = static_cast<std::int64_t>(kernel.panel_width);
    parallel_for(n, width, num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        const Buffer<T> panel(static_cast<std::size_t>(width * d)), best(static_cast<std::size_t>(width));
        const Buffer<std::int64_t> row(static_cast<std::size_t>(width));
        const std::size_t count = static_cast<std::size_t>(end - begin), dim = static_cast<std::size_t>(d);
        kernel.pack(op.query.as<const T>() + begin * d, count, dim, panel.data());
        kernel.align(panel.data(), count, op.doc.as<const T>(), static_cast<std::size_t>(op.doc.dim(0)), dim,
                     best.data(), row.data());
        std::copy_n(best.data(), count, op.similarities.as<T>() + begin);
        std::copy_n(row.data(), count, op.ids.as<std::int64_t>() + begin);
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
