/// MaxSim by mma.sync, for few queries: documents stream from memory once, and a query of up to 32 tokens lies in
/// fragments in shared memory.
///
/// A warp takes 32 tokens of a document at a time. A lane copies 16 bytes of each row it takes part in to shared memory
/// and reads them from there itself, some steps later: they are its share of the products as they come, so that lanes
/// wait for their own copies alone, and the copies run ahead over the ends of documents. Tokens behind a document's
/// last one are that one again, which changes no maximum. Memory is the limit for a query of 32 tokens (2 flops of 170
/// a byte of bfloat16), so that what counts is how much is under way: 3 steps of 2 KB a warp, 96 KB a multiprocessor.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "elements.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "polyvec/maxsim.hpp"

namespace polyvec {
namespace streams {

constexpr int warps = 4;          // of a block
constexpr int rows = 32;          // query tokens of a pass
constexpr int columns = 8;        // document tokens of a product
constexpr int tiles = 4;          // products of a warp side by side
constexpr int fragment_rows = 2;  // products one below the other: rows / 16
constexpr int fragments_per_chunk = 2 * fragment_rows * 32;

/// Chunks of a step, and steps that shared memory holds for each warp. Floats are asked for 256 bytes of a row at once;
/// bytes and codes, which take more arithmetic a byte, leave room for more warps.
template <class Tokens>
constexpr int step_chunks = Tokens::words == Words::s8 ? 1 : 4;
template <class Tokens>
constexpr int stages = Tokens::words == Words::s8 ? 4 : 3;
template <class Tokens>
constexpr int ring_bytes =
    warps * stages<Tokens> * step_chunks<Tokens> * tiles * 32 * (Tokens::copied ? sizeof(typename Tokens::Raw) : 0);

/// Query tokens as rows of 32-bit words, or of elements of 16 bits.
struct Queries {
    const void* rows;
    std::int64_t width;    // elements of a row
    int bytes;             // of an element: 2 or 4
    const float* factors;  // of each row, for bytes; null otherwise
    const std::int64_t* offsets;
    std::int64_t sets, tokens;

    __device__ unsigned word(std::int64_t row, std::int64_t at) const {
        if (bytes == 4) return at < width ? static_cast<const unsigned*>(rows)[row * width + at] : 0;
        const auto* halves = static_cast<const std::uint16_t*>(rows) + row * width;
        const unsigned low = 2 * at < width ? halves[2 * at] : 0;
        return low | (2 * at + 1 < width ? static_cast<unsigned>(halves[2 * at + 1]) << 16 : 0);
    }
};

/// Four products with a centroid, in float16.
struct alignas(8) HalfScores {
    Float16 of[4];
};

/// Document tokens as they are stored.
struct Docs {
    const unsigned char* tokens;
    std::int64_t row_bytes;
    const std::int64_t* offsets;
    std::int64_t sets;
    const float* scales;  // null when absent, as what follows
    const std::int32_t* centroid_ids;
    std::int64_t centroids;
    const float* weights;               // of residual codes
    const HalfScores* centroid_scores;  // (passes, centroids, 8): of query rows g, g + 8, g + 16, g + 24
};

/// Four words at a time of rows that hold them as they are; `whole`: rows lie on multiples of 16 bytes.
template <Words of, bool whole>
struct PlainTokens {
    static constexpr Words words = of;
    static constexpr bool copied = whole, scaled = of == Words::s8, residual = false;
    static constexpr int flip = 0;
    using Raw = uint4;

    /// A lane's share of a row, where copies cannot take it.
    static __device__ Raw load(const Docs& docs, const unsigned char* row, int chunk, int t) {
        const std::int64_t at = chunk * 64 + t * 16;
        unsigned word[4];
        for (int i = 0; i < 4; ++i) {
            const auto half = [&](std::int64_t byte) -> unsigned {
                return byte < docs.row_bytes ? __ldg(reinterpret_cast<const std::uint16_t*>(row + byte)) : 0;
            };
            word[i] = half(at + 4 * i) | half(at + 4 * i + 2) << 16;
        }
        return make_uint4(word[0], word[1], word[2], word[3]);
    }

    /// What decoding looks up.
    struct Table {
        __device__ explicit Table(const Docs&) {}
    };

    static __device__ uint4 decode(const Table&, Raw raw) {
        if constexpr (of != Words::s8) return raw;
        constexpr unsigned sign = 0x80808080u;  // stored as element + 128
        return make_uint4(raw.x ^ sign, raw.y ^ sign, raw.z ^ sign, raw.w ^ sign);
    }
};

/// Codes of 4 or 2 bits, looked up in registers. A word of decoded bytes holds its four elements in the order of
/// `flip`: element i at byte i ^ flip, as codes lie from the highest bits of a byte on. `whole`: rows lie on multiples
/// of what a lane reads of them.
template <int bits, bool whole>
struct ResidualTokens {
    static constexpr Words words = Words::s8;
    static constexpr bool copied = whole, scaled = true, residual = true;
    static constexpr int flip = bits == 4 ? 1 : 3;
    using Raw = std::conditional_t<bits == 4, uint2, unsigned>;

    static __device__ Raw load(const Docs& docs, const unsigned char* row, int chunk, int t) {
        const std::int64_t at = (chunk * 4 + t) * static_cast<std::int64_t>(sizeof(Raw));
        unsigned word[2] = {0, 0};
        for (int i = 0; i < static_cast<int>(sizeof(Raw)); ++i)
            if (at + i < docs.row_bytes) word[i / 4] |= static_cast<unsigned>(__ldg(row + at + i)) << 8 * (i % 4);
        if constexpr (bits == 4) {
            return make_uint2(word[0], word[1]);
        } else {
            return word[0];
        }
    }

    /// Weights in units, as bytes, at the codes as they lie: with their lowest bit first.
    struct Table {
        unsigned at[4] = {0, 0, 0, 0};

        __device__ explicit Table(const Docs& docs) {
            const float unit = unit_of(docs.weights);
#pragma unroll
            for (int code = 0; code < 1 << bits; ++code) {
                int reversed = 0;
                for (int bit = 0; bit < bits; ++bit) reversed |= (code >> bit & 1) << (bits - 1 - bit);
                const int weight = static_cast<int>(rintf(__ldg(docs.weights + reversed) / unit));
                at[code / 4] |= static_cast<unsigned>(weight & 0xff) << 8 * (code % 4);
            }
        }
    };

    /// The largest weight has 127 of them.
    static __device__ float unit_of(const float* weights) {
        float largest = 0;
        for (int code = 0; code < 1 << bits; ++code) largest = fmaxf(largest, fabsf(__ldg(weights + code)));
        const float unit = largest / 127;
        return unit > least_weight_unit ? unit : 1;
    }

    static __device__ uint4 decode(const Table& table, Raw raw) {
        if constexpr (bits == 4) {
            return make_uint4(four(table, raw.x), four(table, raw.x >> 16), four(table, raw.y),
                              four(table, raw.y >> 16));
        } else {
            return make_uint4(four(table, raw & 0xff), four(table, raw >> 8 & 0xff), four(table, raw >> 16 & 0xff),
                              four(table, raw >> 24));
        }
    }

private:
    /// The weights of the four codes in the lowest bits.
    static __device__ unsigned four(const Table& table, unsigned codes) {
        if constexpr (bits == 4) {
            const unsigned in_eight = codes & 0x7777u;
            const unsigned low = __byte_perm(table.at[0], table.at[1], in_eight);
            const unsigned high = __byte_perm(table.at[2], table.at[3], in_eight);
            return __byte_perm(low, high, 0x3210u | (codes >> 1 & 0x4444u));
        } else {
            codes = (codes | codes << 4) & 0x0f0fu;
            return __byte_perm(table.at[0], 0, (codes | codes << 2) & 0x3333u);
        }
    }
};

/// Which documents a query meets, and where its scores go: all of them, those of a list, or the one of its number.
struct Work {
    const std::int64_t *lists, *ids;  // null when absent
    bool pairs;
    std::int64_t docs;

    __device__ std::int64_t count(std::int64_t q) const { return pairs ? 1 : lists ? lists[q + 1] - lists[q] : docs; }
    __device__ std::int64_t id(std::int64_t q, std::int64_t i) const {
        return pairs ? q : lists ? ids[lists[q] + i] : i;
    }
    __device__ std::int64_t place(std::int64_t q, std::int64_t i) const {
        return pairs ? q : (lists ? lists[q] : q * docs) + i;
    }
};

/// A lane's maxima: of rows g, g + 8, g + 16, g + 24 of a pass.
template <bool with_rows>
struct Maxima {
    float best[4] = {-HUGE_VALF, -HUGE_VALF, -HUGE_VALF, -HUGE_VALF};
    std::int32_t row[4] = {-1, -1, -1, -1};

    __device__ void take(int i, float value, std::int32_t at) {
        if constexpr (with_rows) {
            if (value > best[i] || (value == best[i] && (row[i] < 0 || at < row[i]))) best[i] = value, row[i] = at;
        } else {
            best[i] = fmaxf(best[i], value);  // passes over NaN
        }
    }
};

/// The documents that a warp meets, one after the other; where they lie is read one document ahead.
class Documents {
public:
    std::int64_t i;      // position among the query's
    std::int64_t id;     // outside the documents: n is 0
    std::int64_t begin;  // rows
    int n;

    __device__ Documents(const Docs& docs, const Work& work, std::int64_t q, std::int64_t first, std::int64_t step)
        : docs_(docs), work_(work), q_(q), step_(step), count_(work.count(q)), next_(first) {
        read();
        advance();
    }
    __device__ bool exists() const { return i < count_; }
    __device__ bool known() const { return id >= 0 && id < docs_.sets; }
    __device__ void advance() {
        i = next_, id = next_id_, begin = next_begin_, n = static_cast<int>(next_end_ - next_begin_);
        next_ += step_;
        read();
    }

private:
    __device__ void read() {
        next_id_ = next_ < count_ ? work_.id(q_, next_) : -1;
        const bool known = next_id_ >= 0 && next_id_ < docs_.sets;
        next_begin_ = known ? __ldg(docs_.offsets + next_id_) : 0;
        next_end_ = known ? __ldg(docs_.offsets + next_id_ + 1) : 0;
    }

    const Docs& docs_;
    const Work& work_;
    std::int64_t q_, step_, count_, next_, next_id_, next_begin_, next_end_;
};

/// The steps of a warp: up to four chunks of 32 tokens, for each four chunks, group of tokens, pass over them,
/// document.
template <class Tokens>
class Copies {
public:
    using Raw = typename Tokens::Raw;
    static constexpr int group = tiles * columns, step_chunks = streams::step_chunks<Tokens>,
                         stages = streams::stages<Tokens>;

    /// `ring`: of this warp. A warp begins at group `first` of a document and goes on by `step` groups.
    __device__ Copies(const Docs& docs, const Documents& documents, int passes, int chunks, int first, int step,
                      unsigned char* ring)
        : docs_(docs),
          documents_(documents),
          passes_(passes),
          chunks_(chunks),
          parts_(max(1, step_chunks / max(1, chunks))),
          first_(first * group),
          step_(step * group),
          ring_(reinterpret_cast<Raw*>(ring) + threadIdx.x % 32) {
        from_ = first_;
        find();
        for (int i = 0; i < stages - 1; ++i) copy();
    }

    /// This lane's share of the next chunk.
    __device__ void take(Raw (&raw)[tiles]) {
        if (left_ == 0) {
            wait_for_copies<stages - 2>();
            at_ = ring_ + taken_ * step_chunks * tiles * 32;
            taken_ = (taken_ + 1) % stages;
            const int row = parts_ > 1 ? parts_ * chunks_ : left_of_row_ > 0 ? left_of_row_ : chunks_;
            left_ = min(step_chunks, row);
            left_of_row_ = row - left_;
        }
#pragma unroll
        for (int i = 0; i < tiles; ++i) raw[i] = at_[i * 32];
        at_ += tiles * 32;
        if (--left_ == 0) copy();
    }

private:
    __device__ void copy() {
        const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
        Raw* to = ring_ + copied_ * step_chunks * tiles * 32;
        for (int part = 0; part < parts_ && documents_.exists(); ++part) {
            const int count = min(step_chunks, chunks_ - chunk_);
            const unsigned char* rows = docs_.tokens + documents_.begin * docs_.row_bytes;
#pragma unroll
            for (int i = 0; i < tiles; ++i) {
                const int token = min(from_ + i * columns + g, documents_.n - 1);
                const unsigned char* row = rows + token * docs_.row_bytes;
#pragma unroll
                for (int c = 0; c < step_chunks; ++c) {
                    if (c >= count) break;
                    const std::int64_t at = ((chunk_ + c) * 4 + t) * static_cast<std::int64_t>(sizeof(Raw));
                    const bool inside = at < docs_.row_bytes;
                    copy_async<sizeof(Raw)>(shared_address(to + (c * tiles + i) * 32), row + (inside ? at : 0), inside);
                }
            }
            to += count * tiles * 32;
            advance();
        }
        copied_ = (copied_ + 1) % stages;
        end_of_copies();
    }
    __device__ void advance() {
        chunk_ += step_chunks;
        if (chunk_ < chunks_) return;
        chunk_ = 0;
        from_ += step_;
        if (from_ < documents_.n) return;
        from_ = first_;
        if (++pass_ < passes_) return;
        pass_ = 0;
        documents_.advance();
        find();
    }
    /// Passes over documents that have no token for this warp.
    __device__ void find() {
        while (documents_.exists() && first_ >= documents_.n) documents_.advance();
    }

    const Docs& docs_;
    Documents documents_;
    int passes_, chunks_, parts_, first_, step_;
    Raw* ring_;
    const Raw* at_ = nullptr;
    int from_, chunk_ = 0, pass_ = 0, copied_ = 0, taken_ = 0;
    int left_ = 0, left_of_row_ = 0;  // chunks of the step, of the row's further steps
};

/// Where copies cannot take the rows.
template <class Tokens>
struct Loads {
    template <class... Args>
    __device__ explicit Loads(const Args&...) {}
};

/// What sums of products of bytes begin with: the bits of 1.5 * 2^23, so that a sum below 2^22 is read as a float, less
/// that number. The rate of conversions is a small part of that of additions.
constexpr int zero_of_bytes = 0x4b400000;

/// `fragments`: of the pass; `first`, `step`: which groups of 32 tokens.
template <class Tokens, bool with_rows, class Source>
__device__ void maxima_of(const Docs& docs, const typename Tokens::Table& table, const uint4* fragments, int chunks,
                          std::int64_t begin, int n, int first, int step, const HalfScores* centroid_scores,
                          const float (&factors)[4], Source& source, Maxima<with_rows>& maxima) {
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    constexpr int group = tiles * columns;
    // What a group's tokens are scaled by, and their centroids: a lane reads those of a token, a group ahead.
    float next_scale = 1;
    std::int32_t next_centroid = 0;
    const auto read_ahead = [&](int from) {
        if (from >= n) return;
        const std::int64_t token = begin + min(from + lane, n - 1);
        if constexpr (Tokens::scaled) next_scale = __ldg(docs.scales + token);
        if constexpr (Tokens::residual) next_centroid = __ldg(docs.centroid_ids + token);
    };
    read_ahead(first * group);
    const bool small_sums = chunks <= 4;  // of 256 products of bytes at most: below 2^22
    for (int from = first * group; from < n; from += step * group) {
        Sum<Tokens::words> sums[fragment_rows][tiles][4];
#pragma unroll
        for (int r = 0; r < fragment_rows; ++r)
#pragma unroll
            for (int i = 0; i < tiles; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[r][i][e] = Tokens::words == Words::s8 ? zero_of_bytes : 0;
        const float scale_of_lane = next_scale;
        [[maybe_unused]] uint2 of_centroid[tiles][2];  // read while the codes are multiplied
        if constexpr (Tokens::residual) {
            for (int i = 0; i < tiles; ++i)
                for (int j = 0; j < 2; ++j) {
                    const std::int64_t id = __shfl_sync(whole_warp, next_centroid, i * columns + 2 * t + j);
                    of_centroid[i][j] = __ldg(reinterpret_cast<const uint2*>(centroid_scores + id * 8 + g));
                }
        }
        if constexpr (Tokens::scaled) read_ahead(from + step * group);
        for (int chunk = 0; chunk < chunks; ++chunk) {
            typename Tokens::Raw raw[tiles];
            if constexpr (Tokens::copied) {
                source.take(raw);
            } else {
                for (int i = 0; i < tiles; ++i) {
                    const std::int64_t token = begin + min(from + i * columns + g, n - 1);
                    raw[i] = Tokens::load(docs, docs.tokens + token * docs.row_bytes, chunk, t);
                }
            }
            uint4 word[tiles];
#pragma unroll
            for (int i = 0; i < tiles; ++i) word[i] = Tokens::decode(table, raw[i]);
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                Operand<Tokens::words, 4> a[fragment_rows];
#pragma unroll
                for (int r = 0; r < fragment_rows; ++r) {
                    const uint4 four = fragments[((chunk * 2 + s) * fragment_rows + r) * 32 + lane];
                    a[r].set(0, four.x), a[r].set(1, four.y), a[r].set(2, four.z), a[r].set(3, four.w);
                }
#pragma unroll
                for (int i = 0; i < tiles; ++i) {
                    Operand<Tokens::words, 2> b;
                    b.set(0, s ? word[i].z : word[i].x), b.set(1, s ? word[i].w : word[i].y);
#pragma unroll
                    for (int r = 0; r < fragment_rows; ++r) multiply<Tokens::words>(sums[r][i], a[r], b);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int column = i * columns + 2 * t + j, at = min(from + column, n - 1);
                float scale = 1, add[4] = {};
                if constexpr (Tokens::scaled) scale = __shfl_sync(whole_warp, scale_of_lane, column);
                if constexpr (Tokens::residual) {
                    for (int k = 0; k < 4; ++k) {
                        const unsigned pair = k < 2 ? of_centroid[i][j].x : of_centroid[i][j].y;
                        add[k] = value_of(Float16{static_cast<std::uint16_t>(pair >> 16 * (k % 2))});
                    }
                }
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    float value;
                    if constexpr (Tokens::words == Words::s8) {
                        const int sum = sums[k / 2][i][2 * (k % 2) + j];
                        value = small_sums ? __uint_as_float(static_cast<unsigned>(sum)) - 0x1.8p23f
                                           : static_cast<float>(sum - zero_of_bytes);
                    } else {
                        value = sums[k / 2][i][2 * (k % 2) + j];
                    }
                    if constexpr (Tokens::scaled) value *= factors[k];
                    if constexpr (Tokens::residual) value += add[k];
                    if constexpr (Tokens::scaled) value *= scale;
                    maxima.take(k, value, at);
                }
            }
        }
    }
}

/// Where query q's passes begin among the chunks of centroid scores: room for the ceilings before it.
__device__ inline std::int64_t first_pass(std::int64_t first_token, std::int64_t q) {
    return first_token / rows + q;
}

/// out: scores by Work::place; found (null, or as MaxsimMatch has its rows). A block loads a query's fragments once, if
/// it has at most `capacity` tokens; otherwise a pass at a time for each document. split: the warps of a block share a
/// document.
template <class Tokens, bool with_rows>
__global__ void __launch_bounds__(warps * 32, Tokens::words != Words::s8 ? 2
                                              : Tokens::residual         ? 3
                                                                         : 4)
    score_kernel(const __grid_constant__ Queries queries, const __grid_constant__ Docs docs,
                 const __grid_constant__ Work work, int chunks, std::int64_t capacity, bool split,
                 const __grid_constant__ Missing missing, float* out, std::int32_t* found) {
    __shared__ float shared_best[warps][rows];
    __shared__ std::int32_t shared_row[warps][rows];
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int g = lane / 4, t = lane % 4, pass_size = chunks * fragments_per_chunk;
    const typename Tokens::Table table(docs);
    auto* ring = dynamic_shared_memory + warp * (ring_bytes<Tokens> / warps);
    auto* fragments = reinterpret_cast<uint4*>(dynamic_shared_memory + ring_bytes<Tokens>);

    for (std::int64_t q = blockIdx.y; q < queries.sets; q += gridDim.y) {
        const std::int64_t first = queries.offsets[q], tokens = queries.offsets[q + 1] - first;
        const bool resident = tokens <= capacity, shared = split || !resident;
        const auto build = [&](std::int64_t pass, uint4* to) {
            for (int at = static_cast<int>(threadIdx.x); at < pass_size; at += warps * 32) {
                const int l = at % 32, r = at / 32 % fragment_rows, s = at / 32 / fragment_rows % 2;
                const int chunk = at / fragments_per_chunk;
                const std::int64_t row = pass * rows + r * 16 + l / 4,
                                   word = chunk * words_per_chunk + l % 4 * 4 + 2 * s;
                const auto get = [&](std::int64_t i, std::int64_t w) {
                    return i < tokens ? queries.word(first + i, w) : 0;
                };
                to[at] = make_uint4(get(row, word), get(row + 8, word), get(row, word + 1), get(row + 8, word + 1));
            }
        };
        __syncthreads();  // before fragments that others still read are replaced
        if (resident)
            for (std::int64_t pass = 0; pass * rows < tokens; ++pass) build(pass, fragments + pass * pass_size);
        __syncthreads();

        const int per_block = shared ? 1 : warps;
        const std::int64_t first_doc = std::int64_t(blockIdx.x) * per_block + (shared ? 0 : warp);
        Documents doc(docs, work, q, first_doc, std::int64_t(gridDim.x) * per_block);
        const auto passes = static_cast<int>((tokens + rows - 1) / rows);
        const bool any = passes > 0 && chunks > 0;  // steps to copy for
        std::conditional_t<Tokens::copied, Copies<Tokens>, Loads<Tokens>> source(
            docs, any ? doc : Documents(docs, work, q, work.count(q), 0), passes, chunks, shared ? warp : 0,
            shared ? warps : 1, ring);
        for (; doc.exists(); doc.advance()) {
            const int n = doc.n;
            const bool zero = n < missing.full;
            double sum = 0;
            for (std::int64_t pass = 0; pass * rows < tokens; ++pass) {
                if (!resident) {
                    __syncthreads();
                    build(pass, fragments);
                    __syncthreads();
                }
                float factors[4] = {1, 1, 1, 1};
                if constexpr (Tokens::scaled)
                    for (int k = 0; k < 4; ++k) {
                        const std::int64_t row = pass * rows + k * 8 + g;
                        factors[k] = row < tokens ? queries.factors[first + row] : 0;
                    }
                const HalfScores* of_pass = nullptr;
                if constexpr (Tokens::residual)
                    of_pass = docs.centroid_scores + (first_pass(first, q) + pass) * docs.centroids * 8;
                Maxima<with_rows> maxima;
                maxima_of<Tokens, with_rows>(docs, table, fragments + (resident ? pass * pass_size : 0), chunks,
                                             doc.begin, n, shared ? warp : 0, shared ? warps : 1, of_pass, factors,
                                             source, maxima);
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    for (int other = 1; other < 4; other *= 2) {
                        const float value = __shfl_xor_sync(whole_warp, maxima.best[k], other);
                        if constexpr (with_rows) {
                            const std::int32_t at = __shfl_xor_sync(whole_warp, maxima.row[k], other);
                            if (at >= 0) maxima.take(k, value, at);
                        } else {
                            maxima.take(k, value, 0);
                        }
                    }
                if (shared) {
                    if (t == 0)
                        for (int k = 0; k < 4; ++k) {
                            shared_best[warp][k * 8 + g] = maxima.best[k];
                            if constexpr (with_rows) shared_row[warp][k * 8 + g] = maxima.row[k];
                        }
                    __syncthreads();
                    if (warp == 0)
                        for (int k = 0; k < 4; ++k)
                            for (int w = 1; w < warps; ++w) {
                                const std::int32_t at = with_rows ? shared_row[w][k * 8 + g] : 0;
                                if (at >= 0) maxima.take(k, shared_best[w][k * 8 + g], at);
                            }
                    __syncthreads();
                }
                if (t != 0 || (shared && warp != 0)) continue;
                for (int k = 0; k < 4; ++k) {
                    const std::int64_t row = pass * rows + k * 8 + g;
                    if (row >= tokens) continue;
                    sum += zero && !(maxima.best[k] > 0) ? 0.0f : maxima.best[k];
                    if constexpr (with_rows)
                        if (doc.known())
                            found[(work.pairs ? 0 : doc.id * queries.tokens) + first + row] = maxima.row[k];
                }
            }
            for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(whole_warp, sum, other);
            if (lane != 0 || (shared && warp != 0)) continue;
            const bool nothing = n == 0 && !zero && tokens > 0;
            out[work.place(q, doc.i)] = !doc.known() ? static_cast<float>(NAN)
                                        : nothing    ? static_cast<float>(missing.empty)
                                                     : static_cast<float>(sum);
        }
    }
}

/// Steps of a query token for each unit, 127 of them in its largest element; 0 where they would be infinite.
__device__ inline float steps_of(float largest) {
    const float steps = largest > 0 ? 127 / largest : 0;
    return steps < HUGE_VALF ? steps : 0;
}

/// Rows of queries as bytes: 127 steps of a row's largest element. factors: what a product of bytes stands for, before
/// the scale of the document's token. A warp a row.
template <class Tokens, class T>
__global__ void bytes_kernel(const T* queries, std::int64_t n, std::int64_t d, std::int64_t words, const float* weights,
                             unsigned* out, float* factors) {
    const std::int64_t row = std::int64_t(blockIdx.x) * warps + threadIdx.x / 32;
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (row >= n) return;
    const T* x = queries + row * d;
    float largest = 0;
    for (std::int64_t i = lane; i < d; i += 32) largest = fmaxf(largest, fabsf(value_of(x[i])));
    for (int other = 1; other < 32; other *= 2) largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, other));
    const float steps = steps_of(largest);
    for (std::int64_t w = lane; w < words; w += 32) {
        unsigned word = 0;
        for (int i = 0; i < 4; ++i) {
            const std::int64_t element = 4 * w + (i ^ Tokens::flip);
            const int code = element < d ? static_cast<int>(rintf(value_of(x[element]) * steps)) : 0;
            word |= static_cast<unsigned>(code & 0xff) << 8 * i;
        }
        out[row * words + w] = word;
    }
    if (lane != 0) return;
    factors[row] = largest / 127;
    if constexpr (Tokens::residual) factors[row] *= Tokens::unit_of(weights);
}

/// Rows of queries in elements of 16 bits.
template <class T>
__global__ void halves_kernel(const T* queries, std::int64_t n, Words to, std::uint16_t* out) {
    const std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = value_of(queries[i]);
    out[i] = to == Words::bf16 ? bfloat16_bits(x) : rounded_to_float16(x).bits;
}

/// The products of query tokens with centroids, as Docs has them. A thread a centroid and four rows; neighbouring
/// threads share the centroid.
template <class T>
__global__ void centroid_kernel(const T* queries, const std::int64_t* offsets, std::int64_t sets,
                                const float* centroids, std::int64_t n, std::int64_t d, HalfScores* out) {
    const std::int64_t at = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x, centroid = at / 8, g = at % 8;
    if (centroid >= n) return;
    for (std::int64_t q = blockIdx.y; q < sets; q += gridDim.y) {
        const std::int64_t first = offsets[q], tokens = offsets[q + 1] - first;
        for (std::int64_t pass = 0; pass * rows < tokens; ++pass) {
            float sum[4] = {};
            for (std::int64_t i = 0; i < d; ++i) {
                const float c = __ldg(centroids + centroid * d + i);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const std::int64_t row = pass * rows + k * 8 + g;
                    if (row < tokens) sum[k] = fmaf(value_of(queries[(first + row) * d + i]), c, sum[k]);
                }
            }
            HalfScores& to = out[((first_pass(first, q) + pass) * n + centroid) * 8 + g];
            for (int k = 0; k < 4; ++k) to.of[k] = rounded_to_float16(sum[k]);
        }
    }
}

}  // namespace streams
}  // namespace polyvec
