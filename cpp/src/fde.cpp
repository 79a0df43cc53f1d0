#include "polyvec/fde.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/narrow.hpp"
#include "polyvec/parallel.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t tokens_per_piece = 256;        // a piece costs a fraction of a millisecond
constexpr std::int64_t products_per_piece = 1 << 18;  // of elements: the same

std::int64_t packed_columns(std::int64_t n) {
    return FdeMatrices::packed_columns(n);
}

/// Packs column `column` of a matrix (d, n), whose entries lie `stride` apart.
void pack(float* packed, std::int64_t n, std::int64_t column, const float* x, std::int64_t stride, std::int64_t d) {
    for (std::int64_t i = 0; i < d; ++i) packed[FdeMatrices::packed_at(n, column, i, d)] = x[i * stride];
}

template <class T, class From>
Aligned<T> copy_of(const From* x, std::int64_t n) {
    Aligned<T> copy = aligned<T>(n);
    std::copy_n(x, n, copy.get());
    return copy;
}

Aligned<float> zeros(std::int64_t n) {
    Aligned<float> x = aligned<float>(n);
    std::fill_n(x.get(), n, 0.0f);
    return x;
}

/// The sign bits of tokens: repetition r has bits [r * bits, (r + 1) * bits) of a token's row.
class Signs {
public:
    Signs(const FdeMatrices& m, std::int64_t max_tokens)
        : m_(m),
          stride_(packed_columns(m.repetitions * m.bits) / 8),
          rows_(aligned<std::uint8_t>(max_tokens * stride_ + sizeof(std::uint32_t))) {}

    void compute(const float* tokens, std::int64_t n) {
        kernels().fde->signs(tokens, n, m_.d, m_.planes.get(), m_.slack.get(), 8 * stride_, rows_.get(), stride_);
    }

    /// Bucket ids of the tokens from `first` on, in repetition r, as a function of the token.
    auto buckets(std::int64_t first, std::int64_t r) const {
        const std::int64_t bit = r * m_.bits;
        return [row = rows_.get() + first * stride_ + bit / 8, stride = stride_, shift = bit % 8,
                mask = (1u << m_.bits) - 1, bucket_of = m_.bucket_of.get()](std::int64_t token) {
            std::uint32_t word;  // holds up to 16 bits at any shift
            std::memcpy(&word, row + token * stride, sizeof word);
            return bucket_of[word >> shift & mask];
        };
    }

private:
    const FdeMatrices& m_;
    std::int64_t stride_;
    Aligned<std::uint8_t> rows_;
};

/// The buckets of one set in one repetition, and their blocks.
class Blocks {
public:
    Blocks(const FdeMatrices& m, bool mean, std::int64_t longest_set)
        : m_(m),
          kernel_(*kernels().fde),
          mean_(mean),
          buckets_(m.buckets()),
          next_(aligned<std::uint32_t>(longest_set)),
          first_(aligned<std::uint32_t>(buckets_)),
          filled_(aligned<std::uint32_t>(buckets_)),
          rows_(aligned<const float*>(buckets_ + 3)),
          blocks_(aligned<std::uint32_t>(buckets_ + 3)),
          empty_(aligned<std::uint32_t>(buckets_)),
          sums_(aligned<float>(std::min(buckets_, longest_set / 2) * m.d)) {}

    /// Writes the blocks that are not empty, one after the other, and which they are; returns how many.
    template <class BucketOf>
    std::int64_t encode_compact(const float* tokens, std::int64_t n, BucketOf bucket_of, std::int64_t r, float* values,
                                std::int32_t* blocks) {
        chain(n, bucket_of);
        const std::int64_t rows = reduce(tokens);
        for (std::int64_t k = 0; k < rows; ++k) {
            blocks[k] = static_cast<std::int32_t>(r * buckets_ + blocks_[k]);
            blocks_[k] = static_cast<std::uint32_t>(k);
        }
        project(rows, r, values);
        return rows;
    }

protected:
    /// Chains the tokens of each bucket in their order.
    template <class BucketOf>
    void chain(std::int64_t n, BucketOf bucket_of) {
        std::fill_n(first_.get(), buckets_, fde_end);
        for (std::int64_t t = n; t-- > 0;) {
            std::uint32_t& first = first_[bucket_of(t)];
            next_[t] = first;
            first = static_cast<std::uint32_t>(t);
        }
    }

    /// One row a bucket that is not empty, and the list of those that are; returns how many rows.
    std::int64_t reduce(const float* tokens) {
        std::int64_t rows = 0, empty = 0;
        for (std::int64_t b = 0; b < buckets_; ++b) {  // without branches: nobody can foretell them
            const bool none = first_[b] == fde_end;
            blocks_[rows] = empty_[empty] = static_cast<std::uint32_t>(b);
            empty += none;
            rows += !none;
        }
        float* sum = sums_.get();
        for (std::int64_t k = 0; k < rows; ++k) {
            const std::uint32_t b = blocks_[k], first = first_[b];
            if (next_[first] == fde_end) {
                rows_[k] = tokens + first * m_.d;
                filled_[b] = b;
            } else {
                kernel_.reduce(tokens, m_.d, next_.get(), first, mean_, sum);
                rows_[k] = sum;
                filled_[b] = fde_end;
                sum += m_.d;
            }
        }
        return rows;
    }

    /// Writes the rows, projected, to their blocks.
    void project(std::int64_t rows, std::int64_t r, float* blocks) {
        if (!m_.projections) {
            for (std::int64_t k = 0; k < rows; ++k) std::copy_n(rows_[k], m_.d, blocks + blocks_[k] * m_.d);
            return;
        }
        for (; rows % 4; ++rows) {  // the tile likes fours, and a row may be written twice
            rows_[rows] = rows_[rows - 1];
            blocks_[rows] = blocks_[rows - 1];
        }
        kernel_.project(rows_.get(), blocks_.get(), rows, m_.d,
                        m_.projections.get() + r * m_.d * packed_columns(m_.width), m_.width, blocks);
    }

    const FdeMatrices& m_;
    const FdeKernels& kernel_;
    const bool mean_;
    const std::int64_t buckets_;
    Aligned<std::uint32_t> next_, first_;  // a token's successor in its bucket, a bucket's first token
    Aligned<std::uint32_t> filled_;        // the block that holds the projection of a bucket's first token
    Aligned<const float*> rows_;           // what is projected, or copied ...
    Aligned<std::uint32_t> blocks_;        // ... to which block
    Aligned<std::uint32_t> empty_;         // the empty buckets
    Aligned<float> sums_;                  // the rows of buckets of two tokens or more
};

/// One worker: encodes sets one after the other.
class Encoder : Blocks {
public:
    Encoder(const FdeEncode& op, std::int64_t longest_set, std::int64_t longest_piece)
        : Blocks(op.matrices, op.mean, longest_set),
          op_(op),
          block_size_(buckets_ * m_.width),
          signs_(m_, longest_piece),
          nearest_(aligned<std::uint64_t>(buckets_)),
          fill_(aligned<std::uint32_t>(buckets_)),
          repetition_(aligned<float>(m_.sketch_index ? block_size_ : 0)),
          row_(aligned<float>(op.out.dtype == DType::f32 ? 0 : m_.output_dim)) {}

    void encode_sets(std::int64_t begin, std::int64_t end) {
        if (op_.out.dtype == DType::f32) return encode_floats(begin, end);
        for (std::int64_t i = begin; i < end; ++i) {
            encode_floats(i, i + 1);
            round(i);
        }
    }

private:
    /// Where the encoding of set i is computed.
    float* out(std::int64_t i) const {
        return op_.out.dtype == DType::f32 ? op_.out.as<float>() + i * m_.output_dim : row_.get();
    }

    void round(std::int64_t i) {
        const float* row = row_.get();
        const std::int64_t begin = i * m_.output_dim;
        const bool half = op_.out.dtype == DType::f16;
        const float limit = half ? 65520 : std::numeric_limits<float>::infinity();
        for (std::int64_t c = 0; c < m_.output_dim; ++c)
            require(std::fabs(row[c]) < limit, op_.op, "tokens must have encodings ",
                    half ? "of at most 65504 in float16" : "that are finite in int8", ", got ", row[c], " in set ", i);
        if (half) {
            std::transform(row, row + m_.output_dim, op_.out.as<std::uint16_t>() + begin, to_float16);
        } else {
            op_.scales.as<float>()[i] = to_int8<0>(row, m_.output_dim, op_.out.as<std::int8_t>() + begin);
        }
    }

    void encode_floats(std::int64_t begin, std::int64_t end) {
        const TokenSets& sets = op_.sets;
        signs_.compute(sets.set<float>(begin), sets.begin(end) - sets.begin(begin));
        for (std::int64_t i = begin; i < end; ++i)
            if (m_.sketch_index || sets.length(i) == 0) std::fill_n(out(i), m_.output_dim, 0.0f);
        for (std::int64_t r = 0; r < m_.repetitions; ++r) {  // outside: its matrices are read once for all sets
            for (std::int64_t i = begin; i < end; ++i) {
                if (sets.length(i) == 0) continue;
                float* blocks = m_.sketch_index ? repetition_.get() : out(i) + r * block_size_;
                encode(sets.set<float>(i), sets.length(i), signs_.buckets(sets.begin(i) - sets.begin(begin), r), r,
                       blocks);
                if (m_.sketch_index) sketch(blocks, r * block_size_, out(i));
            }
        }
    }

    /// Writes the blocks of one repetition; those of empty buckets are 0, unless they are filled.
    template <class BucketOf>
    void encode(const float* tokens, std::int64_t n, BucketOf bucket_of, std::int64_t r, float* blocks) {
        chain(n, bucket_of);
        std::int64_t rows = reduce(tokens);
        const std::int64_t empty = buckets_ - rows;
        if (op_.fill) {
            if (empty) rows = choose_fill(tokens, rows, empty, bucket_of);
        } else if (empty) {
            std::fill_n(blocks, block_size_, 0.0f);
        }
        project(rows, r, blocks);
        if (op_.fill) copy_filled(empty, blocks);
    }

    /// Finds the token of each empty bucket and adds it to the rows, unless it is one of them already; returns how
    /// many there are then.
    ///
    /// That token is the first of a bucket: of the buckets at the least Hamming distance, the one whose first token,
    /// or whose id, is lowest. All these minima of (distance, token or id) come from one round a bit over the
    /// hypercube of sign words, since a Hamming distance is a sum over bits.
    template <class BucketOf>
    std::int64_t choose_fill(const float* tokens, std::int64_t rows, std::int64_t empty, BucketOf bucket_of) {
        constexpr std::uint64_t farther = std::uint64_t(1) << 40, nothing = ~std::uint64_t(0) >> 1;
        for (std::int64_t b = 0; b < buckets_; ++b)
            nearest_[m_.words[b]] = first_[b] == fde_end ? nothing : op_.lowest_bucket ? std::uint64_t(b) : first_[b];
        for (std::int64_t bit = 1; bit < buckets_; bit *= 2) {
            for (std::int64_t first = 0; first < buckets_; first += 2 * bit) {
                for (std::int64_t w = first; w < first + bit; ++w) {
                    const std::uint64_t low = nearest_[w], high = nearest_[w + bit];
                    nearest_[w] = std::min(low, high + farther);
                    nearest_[w + bit] = std::min(high, low + farther);
                }
            }
        }
        for (std::int64_t e = 0; e < empty; ++e) {
            const std::uint64_t found = nearest_[m_.sources[empty_[e]]] % farther;
            const auto bucket =
                static_cast<std::uint32_t>(op_.lowest_bucket ? found : bucket_of(static_cast<std::int64_t>(found)));
            fill_[e] = bucket;
            if (filled_[bucket] != fde_end) continue;
            filled_[bucket] = blocks_[rows] = empty_[e];
            rows_[rows++] = tokens + first_[bucket] * m_.d;
        }
        return rows;
    }

    /// A token that fills several buckets, or is alone in its own, was projected once.
    void copy_filled(std::int64_t empty, float* blocks) {
        for (std::int64_t e = 0; e < empty; ++e) {
            const std::int64_t to = empty_[e], from = filled_[fill_[e]];
            if (from != to) std::copy_n(blocks + from * m_.width, m_.width, blocks + to * m_.width);
        }
    }

    /// Adds one repetition's blocks, entries [begin, ...) of the long encoding, to the final one.
    void sketch(const float* blocks, std::int64_t begin, float* out) {
        const std::int32_t* index = m_.sketch_index.get() + begin;
        const float* sign = m_.sketch_sign.get() + begin;
        for (std::int64_t b = 0; b < buckets_; ++b) {
            if (!op_.fill && first_[b] == fde_end) continue;
            for (std::int64_t i = b * m_.width; i < (b + 1) * m_.width; ++i) out[index[i]] += sign[i] * blocks[i];
        }
    }

    const FdeEncode& op_;
    const std::int64_t block_size_;
    Signs signs_;
    Aligned<std::uint64_t> nearest_;  // of a sign word: the distance to a token, and which it is
    Aligned<std::uint32_t> fill_;     // of each empty bucket: the one whose first token fills it
    Aligned<float> repetition_;       // a repetition's blocks on their way into the final sketch
    Aligned<float> row_;              // an encoding on its way to fewer bits
};

/// Bucket ids of the tokens from `first` on, in repetition r, as a function of the token.
auto given_buckets(const Array& ids, std::int64_t first, std::int64_t r) {
    return [ids = ids.as<const std::int32_t>() + first * ids.dim(1) + r, stride = ids.dim(1)](std::int64_t token) {
        return ids[token * stride];
    };
}

std::int64_t longest(const char* op, const TokenSets& sets) {
    std::int64_t longest = 0;
    for (std::int64_t i = 0; i < sets.size(); ++i) longest = std::max(longest, sets.length(i));
    require(longest < fde_end, op, "tokens must have fewer than ", fde_end, " rows a set, got ", longest);
    return longest;
}

/// Cuts the sets into pieces of at least tokens_per_piece tokens: where each begins, and the end.
std::vector<std::int64_t> cut(const TokenSets& sets) {
    std::vector<std::int64_t> pieces{0};
    for (std::int64_t i = 1; i <= sets.size(); ++i)
        if (i == sets.size() || sets.begin(i) - sets.begin(pieces.back()) >= tokens_per_piece) pieces.push_back(i);
    return pieces;
}

/// Calls f(i) for every set.
template <class F>
void for_each_set(const TokenSets& sets, Cpu cpu, F f) {
    const std::vector<std::int64_t> pieces = cut(sets);
    const std::int64_t n = static_cast<std::int64_t>(pieces.size()) - 1;
    parallel_for(n, 1, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = pieces[begin]; i < pieces[end]; ++i) f(i);
    });
}

/// <x, y> in float64, where products of floats are exact, and in one order: a ball is the same at every level.
double product(const float* x, const float* y, std::int64_t d) {
    double lanes[8] = {};
    std::int64_t i = 0;
    for (; i + 8 <= d; i += 8)
        for (int lane = 0; lane < 8; ++lane) lanes[lane] += static_cast<double>(x[i + lane]) * y[i + lane];
    for (; i < d; ++i) lanes[i % 8] += static_cast<double>(x[i]) * y[i];
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
}

}  // namespace

FdeMatrices::FdeMatrices(const Array& planes_in, const Array& projections_in, const Array& index_in,
                         const Array& sign_in, std::int64_t final_dim, const Array& words_in, const Array& sources_in) {
    for (const Array* a : {&planes_in, &projections_in, &sign_in}) {
        if (!*a) continue;
        require_dtype(op, *a, DType::f32);
        require_contiguous(op, *a);
    }
    require_ndim(op, planes_in, 3);
    repetitions = planes_in.dim(0), d = planes_in.dim(1), bits = planes_in.dim(2);
    require(bits <= max_bits, op, planes_in.name, " must have at most ", max_bits, " planes a repetition, got ", bits);

    const std::int64_t planes_n = repetitions * bits, columns = packed_columns(planes_n);
    planes = zeros(columns * d);
    slack = zeros(columns);
    for (std::int64_t c = 0; c < planes_n; ++c) {
        const float* plane = planes_in.as<const float>() + c / bits * d * bits + c % bits;
        float largest = 0;
        for (std::int64_t i = 0; i < d; ++i) largest = std::max(largest, std::abs(plane[i * bits]));
        int exponent;  // a power of two changes no sign, and entries of at most 1 keep products within float32
        std::frexp(largest, &exponent);
        double size = 0;
        for (std::int64_t i = 0; i < d; ++i) {
            const float x = std::ldexp(plane[i * bits], -exponent);
            planes[FdeMatrices::packed_at(planes_n, c, i, d)] = x;
            size += std::abs(x);
        }
        slack[c] = static_cast<float>((static_cast<double>(d) + 2) * 6e-8 * size);  // 6e-8 > 2^-24, the unit roundoff
    }

    width = d;
    if (projections_in) {
        require_ndim(op, projections_in, 3);
        require_dim(op, projections_in, 0, repetitions, "as many repetitions as hyperplanes");
        require_dim(op, projections_in, 1, d, "the same d as hyperplanes");
        width = projections_in.dim(2);
        const std::int64_t size = d * packed_columns(width);
        projections = zeros(repetitions * size);
        for (std::int64_t r = 0; r < repetitions; ++r)
            for (std::int64_t c = 0; c < width; ++c)
                pack(projections.get() + r * size, width, c, projections_in.as<const float>() + r * d * width + c,
                     width, d);
    }

    bucket_of = aligned<std::uint32_t>(buckets());
    for (const Array* a : {&words_in, &sources_in}) {
        require_dtype(op, *a, DType::i64);
        require_contiguous(op, *a);
        require_ndim(op, *a, 1);
        require_dim(op, *a, 0, buckets(), "one entry a bucket");
        require_ids(op, *a, buckets());
    }
    words = copy_of<std::uint32_t>(words_in.as<const std::int64_t>(), buckets());
    sources = copy_of<std::uint32_t>(sources_in.as<const std::int64_t>(), buckets());
    for (std::int64_t b = 0; b < buckets(); ++b) bucket_of[words[b]] = static_cast<std::uint32_t>(b);

    output_dim = repetitions * buckets() * width;
    if (index_in) {
        require_dtype(op, index_in, DType::i64);
        require_contiguous(op, index_in);
        require(final_dim <= std::numeric_limits<std::int32_t>::max(), op, "final_dim must be below 2^31, got ",
                final_dim);
        for (const Array* a : {&index_in, &sign_in}) {
            require_ndim(op, *a, 1);
            require_dim(op, *a, 0, output_dim, "one entry a column of the long encoding");
        }
        require_ids(op, index_in, final_dim);
        sketch_index = copy_of<std::int32_t>(index_in.as<const std::int64_t>(), output_dim);
        sketch_sign = copy_of<float>(sign_in.as<const float>(), output_dim);
        output_dim = final_dim;
    }
}

void run(const FdeEncode& op, Cpu cpu) {
    const std::vector<std::int64_t> pieces = cut(op.sets);
    const std::int64_t n = static_cast<std::int64_t>(pieces.size()) - 1;
    std::int64_t longest_piece = 0;
    for (std::int64_t p = 0; p < n; ++p)
        longest_piece = std::max(longest_piece, op.sets.begin(pieces[p + 1]) - op.sets.begin(pieces[p]));
    const std::int64_t longest_set = longest(op.op, op.sets);

    std::vector<Encoder> workers;
    for (int w = 0; w < workers_for(n, 1, cpu.num_threads); ++w) workers.emplace_back(op, longest_set, longest_piece);
    parallel_for(n, 1, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int worker) {
        for (std::int64_t p = begin; p < end; ++p) workers[worker].encode_sets(pieces[p], pieces[p + 1]);
    });
}

void run(const FdePartition& op, Cpu cpu) {
    const std::int64_t repetitions = op.matrices.repetitions, d = op.matrices.d;
    parallel_for(op.tokens.dim(0), tokens_per_piece, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        Signs signs(op.matrices, end - begin);
        signs.compute(op.tokens.as<const float>() + begin * d, end - begin);
        auto* out = op.out.as<std::int32_t>() + begin * repetitions;
        for (std::int64_t r = 0; r < repetitions; ++r) {
            const auto bucket_of = signs.buckets(0, r);
            for (std::int64_t t = 0; t < end - begin; ++t)
                out[t * repetitions + r] = static_cast<std::int32_t>(bucket_of(t));
        }
    });
}

void run(const FdeCountBlocks& op, Cpu cpu) {
    const std::vector<std::int64_t> pieces = cut(op.sets);
    const std::int64_t n = static_cast<std::int64_t>(pieces.size()) - 1, buckets = op.matrices.buckets();
    parallel_for(n, 1, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        std::vector<std::int64_t> last(buckets, -1);  // the last set and repetition that had a token in a bucket
        for (std::int64_t i = pieces[begin]; i < pieces[end]; ++i) {
            std::int64_t count = 0;
            for (std::int64_t r = 0; r < op.matrices.repetitions; ++r) {
                const auto bucket_of = given_buckets(op.ids, op.sets.begin(i), r);
                for (std::int64_t t = 0; t < op.sets.length(i); ++t) {
                    std::int64_t& seen = last[bucket_of(t)];
                    count += seen != i * op.matrices.repetitions + r;
                    seen = i * op.matrices.repetitions + r;
                }
            }
            op.counts.as<std::int64_t>()[i] = count;
        }
    });
}

void run(const FdeEncodeBlocks& op, Cpu cpu) {
    const TokenSets& sets = op.sets;
    const std::vector<std::int64_t> pieces = cut(sets);
    const std::int64_t n = static_cast<std::int64_t>(pieces.size()) - 1, longest_set = longest(op.op, sets);
    std::vector<Blocks> workers;
    for (int w = 0; w < workers_for(n, 1, cpu.num_threads); ++w) workers.emplace_back(op.matrices, false, longest_set);
    parallel_for(n, 1, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int worker) {
        for (std::int64_t p = begin; p < end; ++p) {
            const std::int64_t* bounds = op.bounds.as<const std::int64_t>();
            std::vector<std::int64_t> at(bounds + pieces[p], bounds + pieces[p + 1]);
            for (std::int64_t r = 0; r < op.matrices.repetitions; ++r) {  // outside: its matrices are read once
                for (std::int64_t i = pieces[p]; i < pieces[p + 1]; ++i) {
                    if (sets.length(i) == 0) continue;
                    std::int64_t& to = at[i - pieces[p]];
                    to += workers[worker].encode_compact(
                        sets.set<float>(i), sets.length(i), given_buckets(op.ids, sets.begin(i), r), r,
                        op.values.as<float>() + to * op.matrices.width, op.blocks.as<std::int32_t>() + to);
                }
            }
        }
    });
}

void run(const FdeCarve& op, Cpu cpu) {
    const std::int64_t d = op.sets.dim();
    // The threads share the products of a long set, which one of them would take seconds for, deaf to Ctrl-C.
    const auto is_long = [&](std::int64_t i) {
        const double n = static_cast<double>(op.sets.length(i));
        return n * n * static_cast<double>(d) > 1 << 28;
    };
    const auto carve = [&](std::int64_t i, const auto& for_tokens) {
        constexpr std::int32_t left = -1;
        const std::int64_t n = op.sets.length(i);
        const float* tokens = op.sets.set<float>(i);
        std::int32_t* ids = op.ids.as<std::int32_t>() + op.sets.begin(i);
        std::fill_n(ids, n, left);
        std::int32_t balls = 0;
        for (std::int64_t centre = 0; centre < n; ++centre) {
            if (ids[centre] != left) continue;
            ids[centre] = balls;
            for_tokens(centre + 1, n, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t t = begin; t < end; ++t)
                    if (ids[t] == left && product(tokens + centre * d, tokens + t * d, d) >= op.threshold)
                        ids[t] = balls;
            });
            ++balls;
        }
        op.counts.as<std::int64_t>()[i] = balls;
    };
    for_each_set(op.sets, cpu, [&](std::int64_t i) {
        if (!is_long(i)) carve(i, [](std::int64_t begin, std::int64_t end, const auto& take) { take(begin, end); });
    });
    for (std::int64_t i = 0; i < op.sets.size(); ++i) {
        if (!is_long(i)) continue;
        carve(i, [&](std::int64_t begin, std::int64_t end, const auto& take) {
            parallel_for(end - begin, 1 + products_per_piece / d, cpu.num_threads,
                         [&](std::int64_t first, std::int64_t last, int) { take(begin + first, begin + last); });
        });
    }
}

void run(const FdeSumBalls& op, Cpu cpu) {
    const std::int64_t d = op.sets.dim();
    for_each_set(op.sets, cpu, [&](std::int64_t i) {
        const float* tokens = op.sets.set<float>(i);
        const std::int32_t* ids = op.ids.as<const std::int32_t>() + op.sets.begin(i);
        const std::int64_t* bounds = op.bounds.as<const std::int64_t>() + i;
        const std::int64_t balls = bounds[1] - bounds[0];
        std::vector<double> sums(static_cast<std::size_t>(balls * d));
        for (std::int64_t t = 0; t < op.sets.length(i); ++t) {
            require(ids[t] >= 0 && ids[t] < balls, op.op, "ids must be below the balls of their set, got ", ids[t]);
            double* sum = sums.data() + ids[t] * d;
            for (std::int64_t c = 0; c < d; ++c) sum[c] += tokens[t * d + c];
        }
        float* out = op.out.as<float>() + bounds[0] * d;
        for (std::int64_t c = 0; c < balls * d; ++c) out[c] = static_cast<float>(sums[static_cast<std::size_t>(c)]);
    });
}

}  // namespace polyvec
