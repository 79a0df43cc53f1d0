/// What the drivers of scan share: items and queries as kernels take them, and the order in which they meet.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "polyvec/scan.hpp"
#include "tables.hpp"

namespace polyvec::scanning {

constexpr float infinity = std::numeric_limits<float>::infinity();

constexpr std::int64_t block_bytes = 1 << 18;  // items that stay in L2 while a group of panels passes over them
constexpr std::int64_t row_cache = 1 << 17;    // items that several sparse queries meet together
constexpr std::int64_t group_bytes = 1 << 19;  // panels of that group
constexpr std::int64_t batch_bytes = 1 << 24;  // queries that are searched together, and what is kept for them
constexpr std::int64_t piece_flops = 1 << 30;  // a piece of work: about 10 ms
constexpr std::int64_t max_group = 8, min_block = 64, max_block = 1024;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

/// Items of `bytes` that make a block.
inline std::int64_t block_rows(std::int64_t bytes) {
    return std::clamp<std::int64_t>(block_bytes / std::max<std::int64_t>(bytes, 1), min_block, max_block);
}

/// Panels of `bytes` that share a block of items.
inline std::int64_t group_panels(std::int64_t bytes) {
    return std::clamp<std::int64_t>(group_bytes / std::max<std::int64_t>(bytes, 1), 1, max_group);
}

/// 1 / |x| of a squared norm, 0 for a zero vector.
inline float inverse_root(float square) {
    return square > 0 ? 1 / std::sqrt(square) : 0;
}

inline float inverse_norm(const float* row, std::int64_t d) {
    float square;
    kernels().scan->f32.squares(row, 1, d, &square);
    return inverse_root(square);
}

inline const ScanKernel& kernel_of(const ScanItems& items) {
    const ScanKernels& scan = *kernels().scan;
    switch (items.rows.dtype) {
        case DType::f16:
            return scan.f16;
        case DType::i8:
            return scan.i8;
        case DType::f32:
            return scan.f32;
        default:
            return scan.bf16;
    }
}

/// Items, and what turns products with some of them into values: value = product * scale + offset, higher is better.
/// For l2 that is q . x - (|x|^2 - bias) / 2, which orders items as -(|q - x|^2 - bias) does.
class Factors {
public:
    const ScanKernel& kernel;
    const std::int64_t d, row_bytes;

    Factors(Metric metric, const ScanItems& items, const Array& bias)
        : kernel(kernel_of(items)),
          d(items.rows.dim(1)),
          row_bytes(d * static_cast<std::int64_t>(size_of(items.rows.dtype))),
          metric_(metric),
          items_(items),
          bias_(bias),
          padding_(row_bytes / std::max<std::int64_t>(d, 1) * (ceil_div(d, kernel.align) * kernel.align - d)) {}

    /// Chooses the items: `n` of them from `first` on.
    void compute(std::int64_t first, std::int64_t n) {
        first_ = first;
        if (padding_ > 0) pad(n);
        const bool scaled = items_.rows.dtype == DType::i8;
        if (metric_ == Metric::ip && !bias_ && !scaled) return;
        offset_.assign(n, 0);
        if (bias_) std::copy_n(bias_.as<const float>() + first, n, offset_.begin());
        if (scaled) {
            scale_.assign(n, 1);
            if (items_.scales) std::copy_n(items_.scales.as<const float>() + first, n, scale_.begin());
        }
        if (metric_ == Metric::ip) return;
        squares_.resize(n);
        kernel.squares(row(first), n, d, squares_.data());
        if (metric_ == Metric::l2) {
            for (std::int64_t i = 0; i < n; ++i) {
                const float scale = scaled ? scale_[i] : 1;
                offset_[i] = (offset_[i] - scale * scale * squares_[i]) / 2;
            }
        } else {
            for (std::int64_t i = 0; i < n; ++i) squares_[i] = inverse_root(squares_[i]);
            if (scaled) {  // of a scale nothing is left but its sign
                for (std::int64_t i = 0; i < n; ++i)
                    squares_[i] *= static_cast<float>((scale_[i] > 0) - (scale_[i] < 0));
            }
            scale_.swap(squares_);
        }
    }

    /// `panel` against `n` of the chosen items from `first` on.
    ScanBlock block(const void* panel, std::int64_t first, std::int64_t n) const {
        ScanBlock block;
        block.panel = panel;
        block.rows = padding_ > 0 ? padded_.data() + (first - first_) * (row_bytes + padding_) : row(first);
        block.n = n;
        block.d = d;
        block.scale = scale_.empty() ? nullptr : scale_.data() + (first - first_);
        block.offset = offset_.empty() ? nullptr : offset_.data() + (first - first_);
        block.first_row = first;
        return block;
    }

    /// 1 / |x| of item i, 0 for a zero vector.
    float inverse_size(std::int64_t i) const {
        const float scale = items_.scales ? std::fabs(items_.scales.as<const float>()[i]) : 1;
        float square;
        kernel.squares(row(i), 1, d, &square);
        return scale > 0 ? inverse_root(square) / scale : 0;
    }

    const unsigned char* row(std::int64_t i) const { return items_.rows.as<const unsigned char>() + i * row_bytes; }

private:
    void pad(std::int64_t n) {
        padded_.assign(n * (row_bytes + padding_), 0);
        for (std::int64_t i = 0; i < n; ++i)
            std::copy_n(row(first_ + i), row_bytes, padded_.data() + i * (row_bytes + padding_));
    }

    Metric metric_;
    ScanItems items_;
    Array bias_;
    std::int64_t padding_;  // bytes that kernels need behind each row
    std::int64_t first_ = 0;
    std::vector<float> scale_, offset_, squares_;
    std::vector<unsigned char> padded_;
};

/// out[i] = the inner product, or the squared distance (l2), of `query` and item ids[i]; without bias or norms.
inline void compare(bool l2, const float* query, const ScanItems& items, const std::int64_t* ids, std::int64_t n,
                    float* out) {
    const DistanceKernels& distance = *kernels().distance;
    const std::int64_t d = items.rows.dim(1);
    if (items.rows.dtype == DType::f32) {
        (l2 ? distance.i64.l2 : distance.i64.dot)(query, items.rows.as<const float>(), ids, n, d, out);
        return;
    }
    const auto& kernel = items.rows.dtype == DType::f16  ? distance.f16
                         : items.rows.dtype == DType::i8 ? distance.i8
                                                         : distance.bf16;
    (l2 ? kernel.l2 : kernel.dot)(query, items.rows.data, items.scales ? items.scales.as<const float>() : nullptr, ids,
                                  n, d, out);
}

/// The chunks of a block-sparse query that hold a stored block.
class Chunks {
public:
    /// `row` (d,) is the whole query, `ids` the n blocks of it that are stored.
    Chunks(const float* row, std::int64_t d, const std::int32_t* ids, std::int64_t n, std::int64_t block) {
        constexpr std::int64_t size = scan_chunk;
        for (std::int64_t i = 0; i < n; ++i) {
            const std::int64_t begin = ids[i] * block, done = at_.empty() ? 0 : at_.back() + std::int64_t{1};
            for (std::int64_t c = std::max(begin / size, done); c * size < begin + block; ++c)
                at_.push_back(static_cast<std::uint32_t>(c));
        }
        values_.resize(at_.size() * size);
        for (std::size_t k = 0; k < at_.size(); ++k)
            std::copy_n(row + at_[k] * size, std::min(size, d - at_[k] * size), values_.data() + k * size);
    }

    ScanChunks view() const { return {values_.data(), at_.data(), at_.size()}; }
    std::int64_t elements() const { return static_cast<std::int64_t>(values_.size()); }

private:
    std::vector<std::uint32_t> at_;
    std::vector<float> values_;
};

/// Dense or block-sparse queries of width d.
struct Queries {
    Array rows;  // (n, d), or the blocks
    StoredBlocks blocks;
    std::int64_t d;

    std::int64_t size() const { return blocks ? blocks.offsets.dim(0) - 1 : rows.dim(0); }

    /// Writes block-sparse queries [first, first + n) as dense ones.
    void spread(std::int64_t first, std::int64_t n, float* out) const {
        std::fill_n(out, n * d, 0.0f);
        const auto* ids = blocks.ids.as<const std::int32_t>();
        const std::int64_t width = rows.dim(1);
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = begin(first + i); j < begin(first + i + 1); ++j)
                std::copy_n(rows.as<const float>() + j * width, width, out + i * d + ids[j] * width);
    }

    /// Those of block-sparse query i, of which `row` is the dense form.
    Chunks chunks(std::int64_t i, const float* row) const {
        return Chunks(row, d, blocks.ids.as<const std::int32_t>() + begin(i), begin(i + 1) - begin(i), rows.dim(1));
    }

private:
    std::int64_t begin(std::int64_t i) const { return blocks.offsets.as<const std::int64_t>()[i]; }
};

/// Queries as they meet items: dense, of unit length for cosine, then rounded where items ask for it.
class Prepared {
public:
    const float* rows;
    std::int64_t stride;

    /// `rows` (n, d), `stride` apart, which must outlive this.
    Prepared(const float* rows, std::int64_t n, std::int64_t stride, std::int64_t d, Metric metric,
             const ScanKernel& kernel)
        : rows(rows), stride(stride) {
        change(n, d, metric, kernel);
    }

    /// Queries [first, first + n), which must outlive this.
    Prepared(const Queries& queries, std::int64_t first, std::int64_t n, Metric metric, const ScanKernel& kernel)
        : rows(queries.rows.as<const float>() + first * queries.d), stride(queries.d) {
        if (queries.blocks) {
            changed_ = aligned<float>(n * stride);
            queries.spread(first, n, changed_.get());
            rows = changed_.get();
        }
        change(n, stride, metric, kernel);
    }

private:
    void change(std::int64_t n, std::int64_t d, Metric metric, const ScanKernel& kernel) {
        if (metric != Metric::cosine && !kernel.round) return;
        if (!changed_) changed_ = aligned<float>(n * d);
        for (std::int64_t i = 0; i < n; ++i) {
            const float* row = rows + i * stride;
            const float scale = metric == Metric::cosine ? inverse_norm(row, d) : 1;
            std::transform(row, row + d, changed_.get() + i * d, [=](float x) { return x * scale; });
        }
        if (kernel.round) kernel.round(changed_.get(), n, d);
        rows = changed_.get();
        stride = d;
    }

    Aligned<float> changed_;
};

constexpr std::int64_t few = 6;  // queries that are faster by themselves than as a panel

/// Some of the queries, packed.
class Batch {
public:
    const std::int64_t first, n, d, width, panels;

    /// As many queries as fill a batch, from `first` on; `kept` bytes are needed for each beside its panel.
    Batch(const Queries& queries, std::int64_t first, std::int64_t kept, Metric metric, const ScanItems& items,
          int num_threads)
        : first(first),
          n(std::min(queries.size() - first, most((queries.blocks ? 8 : 4) * queries.d + kept))),
          d(queries.d),
          width(kernels().scan->panel_width),
          panels(ceil_div(n, width)),
          panel_words_(width * kernel_of(items).panel_words(d)),
          packed_(aligned<std::uint32_t>(panels * panel_words_)),
          prepared_(panels),
          chunks_(panels) {
        const ScanKernel& kernel = kernel_of(items);
        parallel_for(panels, 1, num_threads, [&](std::int64_t p, std::int64_t, int) {
            prepared_[p].emplace(queries, first + p * width, lanes(p), metric, kernel);
            if (queries.blocks && sparse(p, queries)) return;
            kernel.pack(prepared_[p]->rows, lanes(p), d, d, packed_.get() + p * panel_words_);
        });
    }

    const float* row(std::int64_t i) const { return prepared_[i / width]->rows + i % width * d; }
    const void* panel(std::int64_t p) const { return packed_.get() + p * panel_words_; }
    std::int64_t panel_bytes() const { return panel_words_ * 4; }
    std::int64_t lanes(std::int64_t p) const { return std::min(width, n - p * width); }

    /// Whether the queries of panel p meet items one by one.
    bool by_row(std::int64_t p) const { return lanes(p) <= few || !chunks_[p].empty(); }
    /// The queries of panel p by their chunks, where these are few.
    const std::vector<Chunks>& chunks(std::int64_t p) const { return chunks_[p]; }

    /// Sorts the pairs of the lists into panels, without those of a query and its target (`keep`), or with them.
    enum class Targets { none, keep, exclude };
    void exclude(const IdLists& lists, Targets rule, const Array& targets, int num_threads) {
        excluded_.resize(panels);
        const auto* offsets = lists.offsets ? lists.offsets.as<const std::int64_t>() + first : nullptr;
        const auto* ids = lists.ids ? lists.ids.as<const std::int64_t>() : nullptr;
        const auto* target = rule == Targets::none ? nullptr : targets.as<const std::int64_t>() + first;
        parallel_for(panels, 1, num_threads, [&](std::int64_t p, std::int64_t, int) {
            for (std::int64_t lane = 0; lane < lanes(p); ++lane) {
                const std::int64_t query = p * width + lane;
                const auto add = [&](std::int64_t id) { excluded_[p].push_back(id * width + lane); };
                if (rule == Targets::exclude) add(target[query]);
                for (std::int64_t i = offsets ? offsets[query] : 0; offsets && i < offsets[query + 1]; ++i)
                    if (rule != Targets::keep || ids[i] != target[query]) add(ids[i]);
            }
            std::sort(excluded_[p].begin(), excluded_[p].end());
        });
    }

    /// Gives `block` its part of the pairs that are excluded from panel p.
    void set_excluded(std::int64_t p, ScanBlock& block) const {
        const auto& pairs = excluded_[p];
        const auto from = [&](std::uint64_t item) {
            return pairs.data() + (std::lower_bound(pairs.begin(), pairs.end(), item * width) - pairs.begin());
        };
        block.excluded = from(block.first_row);
        block.excluded_end = from(block.first_row + block.n);
    }

private:
    /// Takes the chunks of panel p where they are few enough: beside a few dense queries, which share what they read of
    /// an item, half of one's elements; beside a panel, those of two.
    bool sparse(std::int64_t p, const Queries& queries) {
        const std::int64_t most = lanes(p) <= few ? d / 2 : 2 * d;
        std::vector<Chunks> chunks;
        std::int64_t elements = 0;
        for (std::int64_t lane = 0; lane < lanes(p) && elements <= most; ++lane) {
            chunks.push_back(queries.chunks(first + p * width + lane, row(p * width + lane)));
            elements += chunks.back().elements();
        }
        if (elements > most) return false;
        chunks_[p] = std::move(chunks);
        return true;
    }

    static std::int64_t most(std::int64_t bytes) {
        const std::int64_t width = kernels().scan->panel_width;
        return width * std::max<std::int64_t>(1, batch_bytes / (width * std::max<std::int64_t>(bytes, 1)));
    }

    std::int64_t panel_words_;
    Aligned<std::uint32_t> packed_;
    std::vector<std::optional<Prepared>> prepared_;  // the queries of each panel
    std::vector<std::vector<Chunks>> chunks_;
    std::vector<std::vector<std::uint64_t>> excluded_;
};

/// values (lanes, n): those of panel p, whose queries go one by one, with `n` of the chosen items from `first` on; NaN
/// for excluded pairs.
inline void values_by_row(const Factors& factors, const Batch& batch, std::int64_t p, std::int64_t first,
                          std::int64_t n, float* values) {
    ScanBlock block = factors.block(nullptr, first, n);
    batch.set_excluded(p, block);
    const std::vector<Chunks>& chunks = batch.chunks(p);
    if (chunks.empty()) {
        factors.kernel.products(batch.row(p * batch.width), batch.lanes(p), factors.row(first), n, batch.d, values);
    } else {
        const std::int64_t step = std::max<std::int64_t>(1, row_cache / std::max<std::int64_t>(1, factors.row_bytes));
        for (std::int64_t row = 0; row < n; row += step) {
            for (std::size_t lane = 0; lane < chunks.size(); ++lane)
                factors.kernel.chunk_products(chunks[lane].view(), factors.row(first + row), nullptr,
                                              std::min(step, n - row), batch.d, values + lane * n + row);
        }
    }
    for (const auto* pair = block.excluded; pair != block.excluded_end; ++pair)
        values[*pair % batch.width * n + *pair / batch.width - first] = std::nanf("");
    for (std::int64_t lane = 0; lane < batch.lanes(p); ++lane) {
        float* row = values + lane * n;
        for (std::int64_t i = 0; block.scale && i < n; ++i) row[i] *= block.scale[i];
        for (std::int64_t i = 0; block.offset && i < n; ++i) row[i] += block.offset[i];
    }
}

/// How a batch meets n items: in groups of panels, which share each block of items, and in ranges of items that run
/// side by side. Results are kept for each range apart, and merged.
class Sweep {
public:
    /// What is done at a time: panels [begin, end) meet `n` items from `first` on, a block of a range.
    struct Step {
        std::int64_t range, begin, end, first, n;
    };

    /// Where a result depends on the order in which it is put together, ranges have to depend on the items alone;
    /// elsewhere there are no more than keep all threads busy.
    enum class Ranges { of_threads, fixed };

    static constexpr std::int64_t max_ranges = 64;  // where they are fixed

    const std::int64_t block, panels, items;

    Sweep(const Batch& batch, const ScanItems& items, int num_threads, Ranges ranges = Ranges::of_threads)
        : block(block_rows(batch.d * static_cast<std::int64_t>(size_of(items.rows.dtype)))),
          panels(batch.panels),
          items(items.rows.dim(0)),
          num_threads_(num_threads) {
        const std::int64_t threads = workers_for(std::max<std::int64_t>(this->items, 1), 1, num_threads);
        group_ = std::clamp<std::int64_t>(panels / (4 * threads), 1, group_panels(batch.panel_bytes()));
        groups_ = ceil_div(panels, group_);
        const std::int64_t wanted = ranges == Ranges::fixed              ? max_ranges
                                    : threads == 1 || groups_ >= threads ? 1
                                                                         : ceil_div(2 * threads, groups_);
        const std::int64_t blocks = std::max<std::int64_t>(1, ceil_div(this->items, block));
        range_size_ = ceil_div(blocks, std::clamp<std::int64_t>(blocks / 4, 1, wanted)) * block;
        ranges_ = ceil_div(blocks * block, range_size_);
        piece_ = ceil_div(piece_flops, 2 * batch.width * std::max<std::int64_t>(batch.d, 1) * group_ * block) * block;
    }

    std::int64_t ranges() const { return ranges_; }
    int workers() const { return workers_for(ranges_ * groups_, 1, num_threads_); }

    /// Calls visit(step, worker). A panel meets the items of a range in order.
    template <class Visit>
    void run(const Visit& visit) const {
        for (std::int64_t done = 0; done < range_size_; done += piece_) {
            parallel_for(ranges_ * groups_, 1, num_threads_, [&](std::int64_t task, std::int64_t, int worker) {
                const std::int64_t range = task / groups_, group = task % groups_;
                const std::int64_t first = range * range_size_ + done;
                const std::int64_t end = std::min({first + piece_, (range + 1) * range_size_, items});
                for (std::int64_t item = first; item < end; item += block)
                    visit(Step{range, group * group_, std::min((group + 1) * group_, panels), item,
                               std::min(block, end - item)},
                          worker);
            });
        }
    }

private:
    int num_threads_;
    std::int64_t group_, groups_, range_size_, ranges_, piece_;
};

}  // namespace polyvec::scanning
