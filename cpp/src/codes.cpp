#include "polyvec/codes.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "polyvec/topk.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t elements_per_piece = 1 << 17;
constexpr float infinity = std::numeric_limits<float>::infinity();

std::int64_t rows_per_piece(std::int64_t d) {
    return std::max<std::int64_t>(1, elements_per_piece / d);
}

// ---- the bytes of a code. Compiled once, for the baseline: codes do not depend on the level.

/// Calls visit(w, byte, first, count): a chunk of a plane of w bits begins at `byte` and has `count` bytes and the
/// numbers from `first` on.
template <class Visit>
void for_each_chunk(std::int64_t d, int bits, const Visit& visit) {
    constexpr std::int64_t chunk = 64;
    std::int64_t plane = 0;
    for (int w = 8; w >= 1; w /= 2) {
        if (!(bits & w)) continue;
        const std::int64_t bytes = (d * w + 7) / 8;
        for (std::int64_t b = 0; b < bytes; b += chunk) visit(w, plane + b, b * 8 / w, std::min(chunk, bytes - b));
        plane += bytes;
    }
}

void write_numbers(const std::uint8_t* numbers, std::int64_t d, int bits, std::uint8_t* code) {
    for_each_chunk(d, bits, [&](int w, std::int64_t byte, std::int64_t first, std::int64_t count) {
        const int shift = bits & (w - 1), mask = (1 << w) - 1;  // the planes after this one hold the lower bits
        std::memset(code + byte, 0, static_cast<std::size_t>(count));
        for (int k = 0; k < 8 / w; ++k) {
            const std::uint8_t* from = numbers + first + k * count;
            const std::int64_t n = std::clamp<std::int64_t>(d - (first + k * count), 0, count);
            for (std::int64_t t = 0; t < n; ++t)
                code[byte + t] = static_cast<std::uint8_t>(code[byte + t] | (from[t] >> shift & mask) << k * w);
        }
    });
}

void read_numbers(const std::uint8_t* code, std::int64_t d, int bits, std::uint8_t* numbers) {
    std::memset(numbers, 0, static_cast<std::size_t>(d));
    for_each_chunk(d, bits, [&](int w, std::int64_t byte, std::int64_t first, std::int64_t count) {
        const int shift = bits & (w - 1), mask = (1 << w) - 1;
        for (int k = 0; k < 8 / w; ++k) {
            std::uint8_t* to = numbers + first + k * count;
            const std::int64_t n = std::clamp<std::int64_t>(d - (first + k * count), 0, count);
            for (std::int64_t t = 0; t < n; ++t)
                to[t] = static_cast<std::uint8_t>(to[t] | (code[byte + t] >> k * w & mask) << shift);
        }
    });
}

void write_float(float value, std::uint8_t*& at) {
    std::memcpy(at, &value, sizeof value);
    at += sizeof value;
}

float read_float(const std::uint8_t*& at) {
    float value;
    std::memcpy(&value, at, sizeof value);
    at += sizeof value;
    return value;
}

/// The least float16 that is no smaller than value >= 0; infinity above the largest.
std::uint16_t float16_above(float value) {
    if (!(value <= 65504)) return 0x7c00;
    int exponent = -13;
    if (value > 0) std::frexp(value, &exponent);
    exponent = std::max(exponent - 1, -14);  // value = fraction * 2^exponent, fraction in [1, 2), or below 1
    const auto steps = static_cast<int>(std::ceil(std::ldexp(value, 10 - exponent)));
    return static_cast<std::uint16_t>(((exponent + 14) << 10) + steps);  // a carry reaches the exponent
}

/// One thread's rows of one piece.
template <class Body>
void for_each_row(std::int64_t n, std::int64_t d, int num_threads, const Body& body) {
    parallel_for(n, rows_per_piece(d), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        std::vector<std::uint8_t> numbers(d);
        for (std::int64_t i = begin; i < end; ++i) body(i, numbers.data());
    });
}

}  // namespace

void run(const ScalarEncode& op, Cpu cpu) {
    const std::int64_t d = op.x.dim(1), code_size = op.codes.dim(1);
    const float top = static_cast<float>((1 << op.form.bits) - 1), half = top / 2;
    for_each_row(op.x.dim(0), d, cpu.num_threads, [&](std::int64_t i, std::uint8_t* numbers) {
        const float* x = op.x.as<const float>() + i * d;
        const auto number = [&](float value, float mid, float step) {
            const float c = step > 0 ? (value - mid) / step + (half + 0.5f) : half;
            return static_cast<std::uint8_t>(std::clamp(c, 0.0f, top));
        };
        const float *mid = op.mid.as<const float>(), *step = op.step.as<const float>();
        float row_mid = 0, row_step = 0;
        if (op.form.has_scale) {
            const auto [least, most] = std::minmax_element(x, x + d);
            row_mid = *least / 2 + *most / 2;
            row_step = (*most / 2 - *least / 2) / half;
            for (std::int64_t j = 0; j < d; ++j) numbers[j] = number(x[j], row_mid, row_step);
        } else {
            for (std::int64_t j = 0; j < d; ++j) numbers[j] = number(x[j], mid[j], step[j]);
        }
        std::uint8_t* code = op.codes.as<std::uint8_t>() + i * code_size;
        write_numbers(numbers, d, op.form.bits, code);
        code += op.form.number_bytes(d);
        if (op.form.has_scale) write_float(row_step, code);
        if (op.form.has_mean) write_float(row_mid, code);
        if (op.form.has_offset) {
            double square = 0;
            for (std::int64_t j = 0; j < d; ++j) {
                const float steps = static_cast<float>(numbers[j]) - half;
                const double value = op.form.has_scale ? steps * row_step + row_mid : steps * step[j] + mid[j];
                square += value * value;
            }
            write_float(static_cast<float>(-square / 2), code);
        }
    });
}

void run(const RabitqEncode& op, Cpu cpu) {
    const std::int64_t d = op.x.dim(1), code_size = op.codes.dim(1);
    const int half = 1 << (op.form.bits - 1);
    const auto levels = kernels().codes->fit_levels;
    constexpr float unit = 4095;
    for_each_row(op.x.dim(0), d, cpu.num_threads, [&](std::int64_t i, std::uint8_t* numbers) {
        const float* x = op.x.as<const float>() + i * d;
        float largest = 0;
        for (std::int64_t j = 0; j < d; ++j) largest = std::max(largest, std::abs(x[j]));
        if (half > 1) {
            std::vector<std::uint16_t> magnitudes(d);
            const float scale = largest > 0 ? unit / largest : 0;
            for (std::int64_t j = 0; j < d; ++j)
                magnitudes[j] = static_cast<std::uint16_t>(std::min(std::abs(x[j]) * scale + 0.5f, unit));
            levels(magnitudes.data(), d, half - 1, numbers);
        } else {
            std::memset(numbers, 0, static_cast<std::size_t>(d));
        }
        double product = 0, square = 0, length = 0;
        for (std::int64_t j = 0; j < d; ++j) {
            const double magnitude = numbers[j] + 0.5, value = x[j];
            product += std::abs(value) * magnitude;
            square += magnitude * magnitude;
            length += value * value;
            numbers[j] = static_cast<std::uint8_t>(x[j] < 0 ? half - 1 - numbers[j] : half + numbers[j]);
        }
        const double scale = product > 0 ? length / product : 0;
        // |x|^2 (1 - cos^2) / cos^2 = |scale u|^2 - |x|^2.
        const double error = std::sqrt(std::max(0.0, scale * scale * square - length) / std::max<double>(d - 1, 1));
        std::uint8_t* code = op.codes.as<std::uint8_t>() + i * code_size;
        write_numbers(numbers, d, op.form.bits, code);
        code += op.form.number_bytes(d);
        write_float(static_cast<float>(scale), code);
        if (op.form.has_offset) write_float(static_cast<float>(-length / 2), code);
        const std::uint16_t above = float16_above(static_cast<float>(error));
        std::memcpy(code, &above, sizeof above);
    });
}

void run(const CodesDecode& op, Cpu cpu) {
    const std::int64_t d = op.out.dim(1), code_size = op.codes.dim(1);
    const float half = static_cast<float>((1 << op.form.bits) - 1) / 2;
    const float *mid = op.mid.as<const float>(), *step = op.step.as<const float>();
    for_each_row(op.out.dim(0), d, cpu.num_threads, [&](std::int64_t i, std::uint8_t* numbers) {
        const std::uint8_t* code = op.codes.as<const std::uint8_t>() + i * code_size;
        read_numbers(code, d, op.form.bits, numbers);
        code += op.form.number_bytes(d);
        const float scale = op.form.has_scale ? read_float(code) : 1;
        const float mean = op.form.has_mean ? read_float(code) : 0;
        float* out = op.out.as<float>() + i * d;
        for (std::int64_t j = 0; j < d; ++j) {
            const float steps = static_cast<float>(numbers[j]) - half;
            out[j] = steps * (op.step ? step[j] : scale) + (op.mid ? mid[j] : mean);
        }
    });
}

namespace {

/// Calls visit(bytes) for the words of a code in a block: 4, or what the last word of a plane holds.
template <class Visit>
void for_each_word(const CodeForm& form, std::int64_t d, const Visit& visit) {
    form.for_each_plane(d, [&](std::int64_t bytes) {
        for (; bytes >= code_word; bytes -= code_word) visit(code_word);
        if (bytes > 0) visit(bytes);
    });
    for (int k = 0; k < form.factors(); ++k) visit(code_word);
}

/// What compares one query with the codes of a search.
const CodesOneKernels& kernel_of_one_for(const CodesSearch& op) {
    return op.packed() ? kernels().codes->of_blocks : kernels().codes->of_rows;
}

/// The queries of a search as kernels take them. A group is a panel, or one query.
class PackedQueries {
public:
    struct Group {
        std::int64_t first, count;
        bool one;
    };

    explicit PackedQueries(const CodesSearch& op)
        : n_(op.weights.dim(0)), d_(op.weights.dim(1)), scale_(n_), shift_(n_), mean_(n_) {
        const CodesKernels& kernel = *kernels().codes;
        const CodesOneKernels& kernel_of_one = kernel_of_one_for(op);
        const std::int64_t width = kernel.panel_width, few = kernel.one_at_a_time;
        for (std::int64_t first = 0; first < n_;) {
            const bool one = n_ - first <= few;
            const std::int64_t count = one ? 1 : std::min(width, n_ - first);
            groups_.push_back({first, count, one});
            first += count;
        }
        const auto* weights = op.weights.as<const float>();
        std::vector<std::int8_t> bytes(width * d_);
        const std::size_t words =
            std::max(kernel.panel_words(d_, op.form.bits), kernel_of_one.query_words(d_, op.form.bits));
        for (const Group& group : groups_) {
            for (std::int64_t q = 0; q < group.count; ++q)
                round(weights + (group.first + q) * d_, bytes.data() + q * d_, group.first + q);
            packed_.push_back(aligned<std::uint32_t>(words));
            if (group.one) {
                kernel_of_one.pack(bytes.data(), d_, op.form.bits, packed_.back().get());
            } else {
                kernel.pack(bytes.data(), group.count, d_, op.form.bits, packed_.back().get());
            }
        }
        std::copy_n(op.means.as<const float>(), n_, mean_.begin());
        for (std::vector<float>* lanes : {&scale_, &shift_, &mean_}) lanes->resize(n_ + width);
    }

    std::int64_t size() const { return static_cast<std::int64_t>(groups_.size()); }
    const Group& group(std::int64_t g) const { return groups_[g]; }
    CodeQueries operator[](std::int64_t g) const {
        const std::int64_t first = groups_[g].first;
        return {packed_[g].get(), scale_.data() + first, shift_.data() + first, mean_.data() + first};
    }

private:
    /// Rounds the weights of query q to bytes. One with NaN or infinity scores NaN, and finds nothing.
    void round(const float* weights, std::int8_t* bytes, std::int64_t q) {
        constexpr float steps = 127;
        float largest = 0;
        bool finite = true;
        for (std::int64_t j = 0; j < d_; ++j) {
            largest = std::max(largest, std::abs(weights[j]));
            finite &= std::isfinite(weights[j]);
        }
        const float inverse = finite && largest > 0 ? steps / largest : 0;
        std::int64_t sum = 0;
        for (std::int64_t j = 0; j < d_; ++j) {
            const float value = finite ? weights[j] * inverse : 0;
            bytes[j] = static_cast<std::int8_t>(std::clamp(std::nearbyint(value), -steps, steps));
            sum += bytes[j];
        }
        scale_[q] = finite ? largest / steps : std::numeric_limits<float>::quiet_NaN();
        // Kernels subtract 2^(bits - 1) from each number; the middle is half a step lower.
        shift_[q] = scale_[q] * static_cast<float>(sum) / 2;
    }

    std::int64_t n_, d_;
    std::vector<float> scale_, shift_, mean_;
    std::vector<Group> groups_;
    std::vector<Aligned<std::uint32_t>> packed_;
};

constexpr std::int64_t piece_codes = 128;  // whose unpacked numbers stay in the level-2 cache

/// A sample of the codes: one of every `step`.
struct CodesSample {
    std::int64_t step = 1, n = 0;
    std::size_t rank = 0;  // of a value that far more than k of all codes should reach

    /// Empty where the k best of so few codes are not worth one.
    CodesSample(std::int64_t codes, std::int64_t k) {
        constexpr std::int64_t least_step = 32, most = 8192, least = 256;
        step = std::max(least_step, codes / most);
        n = (codes - static_cast<std::int64_t>(code_margin)) / step / piece_codes *
            piece_codes;  // memory may be read behind
        if (n < least || k > n) {
            n = 0;
            return;
        }
        const double share = static_cast<double>(k) / static_cast<double>(step);
        rank = static_cast<std::size_t>(share + 3 * std::sqrt(share) + 3);
    }
};

/// Some codes of a search, in the forms that kernels take: each is made when it is first asked for.
class CodesPiece {
public:
    explicit CodesPiece(const CodesSearch& op)
        : op_(op),
          kernel_(*kernels().codes),
          words_(aligned<std::uint32_t>(
              piece_codes * static_cast<std::int64_t>(kernel_.row_words(op.weights.dim(1), op.form.bits)))) {}

    /// Turns to the codes first, first + step, ...: `count` of them, or, packed, of blocks of them.
    void look_at(std::int64_t first, std::int64_t count, std::int64_t step) {
        first_ = first;
        count_ = count;
        step_ = step;
        has_rows_ = has_words_ = false;
        if (!op_.include) return;
        included_.clear();
        for (std::int64_t i = 0; i < count; ++i)
            if (op_.include.as<const bool>()[first + i]) included_.push_back(i);
    }

    /// How many take part.
    std::int64_t size() const { return op_.include ? static_cast<std::int64_t>(included_.size()) : count_; }

    /// Those that take part, a row each.
    const CodeRows& rows() {
        if (!has_rows_) make_rows();
        has_rows_ = true;
        return rows_;
    }

    /// The rows as panels take them.
    std::uint32_t* unpacked() {
        if (!has_words_) kernel_.unpack(rows(), words_.get());
        has_words_ = true;
        return words_.get();
    }

    /// For one query, over what panels take: they have had their turn.
    std::uint32_t* scratch() { return words_.get(); }

    /// What meets one query: blocks, of all codes, where they are packed, else rows.
    CodeRows rows_or_blocks() {
        if (!op_.packed()) return rows();
        return rows_from(block(0), (count_ + code_block - 1) / code_block, step_ * op_.block_bytes());
    }

    /// The code in this place of rows_or_blocks(), or -1.
    std::int64_t id_at(std::int64_t at) const {
        if (!op_.packed()) return id_of_row(at);
        const std::int64_t id = first_ + at;
        return at < count_ && (!op_.include || op_.include.as<const bool>()[id]) ? id : -1;
    }

    std::int64_t id_of_row(std::int64_t row) const { return first_ + (op_.include ? included_[row] : row); }

private:
    CodeRows rows_from(const std::uint8_t* first, std::int64_t n, std::int64_t stride) const {
        return {first,
                static_cast<std::size_t>(n),
                static_cast<std::size_t>(stride),
                static_cast<std::size_t>(op_.weights.dim(1)),
                op_.form.bits,
                op_.form.has_scale,
                op_.form.has_mean,
                op_.form.has_offset};
    }

    void make_rows() {
        const std::int64_t n = size(), d = op_.weights.dim(1);
        const std::int64_t code_size = op_.packed() ? op_.form.searched_bytes(d) : op_.codes.dim(1);
        const auto* codes = op_.codes.as<const std::uint8_t>();
        const std::int64_t behind = (op_.n - 1 - first_ - (n - 1) * step_) * code_size;
        const bool enough =
            n >= static_cast<std::int64_t>(kernel_.panel_width) && behind >= static_cast<std::int64_t>(code_margin);
        if (!op_.packed() && !op_.include && enough) {
            rows_ = rows_from(codes + first_ * code_size, n, step_ * code_size);
            return;
        }
        gathered_.resize(piece_codes * code_size + code_margin);
        rows_ = rows_from(gathered_.data(), n, code_size);
        for (std::int64_t i = 0; i < n; ++i) {
            const std::int64_t at = op_.include ? included_[i] : i;
            std::uint8_t* row = gathered_.data() + i * code_size;
            if (!op_.packed()) {
                std::memcpy(row, codes + (first_ + at * step_) * code_size, static_cast<std::size_t>(code_size));
                continue;
            }
            const std::uint8_t* word = block(at / code_block) + at % code_block * code_word;
            for_each_word(op_.form, d, [&](std::int64_t bytes) {
                std::memcpy(row, word, static_cast<std::size_t>(bytes));
                row += bytes;
                word += code_column;
            });
        }
    }

    /// Block i of a packed piece.
    const std::uint8_t* block(std::int64_t i) const {
        return op_.codes.as<const std::uint8_t>() + (first_ / code_block + i * step_) * op_.block_bytes();
    }

    const CodesSearch& op_;
    const CodesKernels& kernel_;
    std::int64_t first_ = 0, count_ = 0, step_ = 1;
    bool has_rows_ = false, has_words_ = false;
    CodeRows rows_{};
    std::vector<std::int64_t> included_;
    std::vector<std::uint8_t> gathered_;
    Aligned<std::uint32_t> words_;
};

/// One thread's part of a search.
class CodesScan {
public:
    CodesScan(const CodesSearch& op, const PackedQueries& queries)
        : queries_(queries),
          kernel_(*kernels().codes),
          kernel_of_one_(kernel_of_one_for(op)),
          piece_(op),
          hits_(piece_codes * kernel_.panel_width),
          floor_(kernel_.panel_width) {}

    /// Codes [begin, end) against groups [from, to). For each query, from the first group's on, `best` has a collector
    /// and `least` what a value must be at least.
    void operator()(std::int64_t begin, std::int64_t end, std::int64_t from, std::int64_t to, TopK* best,
                    const float* least) {
        for (std::int64_t i = begin; i < end; i += piece_codes) {
            piece_.look_at(i, std::min(piece_codes, end - i), 1);
            if (piece_.size() == 0) continue;
            for (std::int64_t g = from; g < to; ++g) {
                const std::int64_t query = queries_.group(g).first - queries_.group(from).first;
                if (queries_.group(g).one) {
                    meet_one(g, best + query, least + query);
                } else {
                    meet_panel(g, best + query, least + query);
                }
            }
        }
    }

    /// The values of piece `p` of the sample, a row each: for group `from` and those up to `to`, (n, count) each.
    void sample(const CodesSample& sample, std::int64_t p, std::int64_t from, std::int64_t to, float* out) {
        piece_.look_at(p * piece_codes * sample.step, piece_codes, sample.step);
        for (std::int64_t g = from; g < to; ++g) {
            const std::int64_t width = queries_.group(g).one ? 1 : kernel_.panel_width;
            float* values = out + p * piece_codes * width;
            if (queries_.group(g).one) {
                kernel_of_one_.values(piece_.rows_or_blocks(), queries_[g], piece_.scratch(), values);
            } else {
                const std::uint32_t* words = piece_.unpacked();
                kernel_.values(piece_.rows(), words, queries_[g], values);
            }
            out += sample.n * width;
        }
    }

private:
    void meet_one(std::int64_t g, TopK* best, const float* least) {
        const std::size_t found = kernel_of_one_.select(piece_.rows_or_blocks(), queries_[g], piece_.scratch(),
                                                        std::max(best->threshold(), *least), hits_.data());
        for (std::size_t h = 0; h < found; ++h) {
            const std::int64_t id = piece_.id_at(hits_[h].at);
            if (id >= 0) best->push(hits_[h].value, id);
        }
    }

    void meet_panel(std::int64_t g, TopK* best, const float* least) {
        std::fill(floor_.begin(), floor_.end(), std::numeric_limits<float>::quiet_NaN());
        for (std::int64_t q = 0; q < queries_.group(g).count; ++q) floor_[q] = std::max(best[q].threshold(), least[q]);
        const std::uint32_t* words = piece_.unpacked();
        const std::size_t found = kernel_.select(piece_.rows(), words, queries_[g], floor_.data(), hits_.data());
        const std::int64_t width = kernel_.panel_width;
        for (std::size_t h = 0; h < found; ++h)
            best[hits_[h].at % width].push(hits_[h].value, piece_.id_of_row(hits_[h].at / width));
    }

    const PackedQueries& queries_;
    const CodesKernels& kernel_;
    const CodesOneKernels& kernel_of_one_;
    CodesPiece piece_;
    std::vector<ScanHit> hits_;
    std::vector<float> floor_;
};

/// What the best of each query from group `from` up to `to` should reach at least, by a sample; NaN without one.
std::vector<float> guesses(const CodesSample& sample, const PackedQueries& queries, std::int64_t from, std::int64_t to,
                           std::vector<CodesScan>& scans, int num_threads) {
    const CodesKernels& kernel = *kernels().codes;
    const std::int64_t panel = kernel.panel_width;
    std::vector<float> found((to - from) * panel);
    std::vector<std::int64_t> begin(to - from + 1);
    for (std::int64_t g = from; g < to; ++g)
        begin[g - from + 1] = begin[g - from] + sample.n * (queries.group(g).one ? 1 : panel);
    const Aligned<float> values = aligned<float>(begin.back());
    parallel_for(sample.n / piece_codes, 1, num_threads, [&](std::int64_t p, std::int64_t, int worker) {
        scans[worker].sample(sample, p, from, to, values.get());
    });
    const std::int64_t first = queries.group(from).first;
    parallel_for(to - from, 1, num_threads, [&](std::int64_t g, std::int64_t, int) {
        (queries.group(from + g).one ? kernel.value_of_rank : kernel.values_of_rank)(
            values.get() + begin[g], static_cast<std::size_t>(sample.n), sample.rank,
            found.data() + queries.group(from + g).first - first);
    });
    return found;
}

/// With `guess`, returns the queries of which it has missed some of the best: they are to be searched without.
std::vector<std::int64_t> search(const CodesSearch& op, bool guess, int num_threads) {
    constexpr std::int64_t products_per_piece = std::int64_t{1} << 32;  // tens of milliseconds
    constexpr std::int64_t group_queries = 512, least = 8192;
    const std::int64_t n = op.n, k = op.scores.dim(1), nq = op.weights.dim(0), d = op.weights.dim(1);
    const PackedQueries queries(op);
    const std::int64_t together = std::clamp<std::int64_t>(
        queries.size(), 1, group_queries / static_cast<std::int64_t>(kernels().codes->panel_width));
    const std::int64_t batches = (queries.size() + together - 1) / together;
    const std::int64_t in_batch = std::max<std::int64_t>(1, std::min(nq, group_queries));
    const std::int64_t range = std::max(least, products_per_piece / (in_batch * d)) / piece_codes * piece_codes;
    const std::int64_t ranges = (n + range - 1) / range;
    const CodesSample sample(op.include || !guess ? 0 : n, k);

    std::vector<TopK> best(nq, TopK(k));
    std::vector<float> reach(nq, -infinity);
    std::mutex merging;
    std::vector<CodesScan> scans;
    for (int i = 0; i < workers_for(std::max(batches * ranges, sample.n / piece_codes), 1, num_threads); ++i)
        scans.emplace_back(op, queries);
    for (std::int64_t from = 0; sample.n > 0 && from < queries.size(); from += together) {
        const std::int64_t to = std::min(queries.size(), from + together), first = queries.group(from).first;
        const std::vector<float> found = guesses(sample, queries, from, to, scans, num_threads);
        for (std::int64_t q = first; q < queries.group(to - 1).first + queries.group(to - 1).count; ++q)
            if (std::isfinite(found[q - first])) reach[q] = found[q - first];
    }
    parallel_for(batches * ranges, 1, num_threads, [&](std::int64_t piece, std::int64_t, int worker) {
        const std::int64_t from = piece % batches * together, to = std::min(queries.size(), from + together);
        const std::int64_t first = queries.group(from).first;
        const std::int64_t last = queries.group(to - 1).first + queries.group(to - 1).count;
        const std::int64_t begin = piece / batches * range, end = std::min(n, begin + range);
        std::vector<TopK> found(last - first, TopK(k));
        std::vector<float> floors(last - first);
        {
            const std::lock_guard lock(merging);
            for (std::int64_t q = first; q < last; ++q) floors[q - first] = std::max(reach[q], best[q].threshold());
        }
        scans[worker](begin, end, from, to, found.data(), floors.data());
        const std::lock_guard lock(merging);
        for (std::int64_t q = first; q < last; ++q) best[q].merge(found[q - first]);
    });
    std::vector<std::int64_t> missed;
    for (std::int64_t q = 0; q < nq; ++q) {
        float* scores = op.scores.as<float>() + q * k;
        std::int64_t* ids = op.ids.as<std::int64_t>() + q * k;
        best[q].write(scores, ids, op.squared ? -1.0f : 1.0f);
        const float constant = op.constants.as<const float>()[q];
        std::int64_t found = 0;
        for (; found < k && ids[found] >= 0; ++found)
            scores[found] = op.squared ? std::max(0.0f, constant + 2 * scores[found]) : scores[found] + constant;
        sort_equal(scores, ids, found);
        if (reach[q] > -infinity && ids[k - 1] < 0) missed.push_back(q);
    }
    return missed;
}

/// The rows of `array` named by `rows`, in `memory`.
Array take(const Array& array, const std::vector<std::int64_t>& rows, std::vector<unsigned char>& memory) {
    const std::int64_t bytes = array.size() / array.dim(0) * static_cast<std::int64_t>(size_of(array.dtype));
    memory.resize(rows.size() * bytes);
    for (std::size_t i = 0; i < rows.size(); ++i)
        std::memcpy(memory.data() + i * bytes, array.as<const unsigned char>() + rows[i] * bytes, bytes);
    Array taken = array;
    taken.data = memory.data();
    taken.shape[0] = static_cast<std::int64_t>(rows.size());
    return taken;
}

}  // namespace

void run(const CodesPack& op, Cpu cpu) {
    const std::int64_t code_size = op.codes.dim(1), bytes = op.form.block_bytes(op.d);
    parallel_for(op.blocks.dim(0), rows_per_piece(bytes), cpu.num_threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     auto* const blocks = op.blocks.as<std::uint8_t>();
                     std::fill(blocks + begin * bytes, blocks + end * bytes, std::uint8_t{0});
                     for (std::int64_t i = begin * code_block; i < std::min(end * code_block, op.codes.dim(0)); ++i) {
                         const std::uint8_t* code = op.codes.as<const std::uint8_t>() + i * code_size;
                         std::uint8_t* word = blocks + i / code_block * bytes + i % code_block * code_word;
                         for_each_word(op.form, op.d, [&](std::int64_t n) {
                             std::memcpy(word, code, static_cast<std::size_t>(n));
                             code += n;
                             word += code_column;
                         });
                     }
                 });
}

void run(const CodesSearch& op, Cpu cpu) {
    const std::vector<std::int64_t> missed = search(op, true, cpu.num_threads);
    if (missed.empty()) return;
    std::vector<unsigned char> memory[5];
    CodesSearch again = op;
    again.weights = take(op.weights, missed, memory[0]);
    again.means = take(op.means, missed, memory[1]);
    again.constants = take(op.constants, missed, memory[2]);
    again.scores = take(op.scores, missed, memory[3]);
    again.ids = take(op.ids, missed, memory[4]);
    search(again, false, cpu.num_threads);
    const std::int64_t k = op.scores.dim(1);
    for (std::size_t i = 0; i < missed.size(); ++i) {
        std::copy_n(again.scores.as<float>() + i * k, k, op.scores.as<float>() + missed[i] * k);
        std::copy_n(again.ids.as<std::int64_t>() + i * k, k, op.ids.as<std::int64_t>() + missed[i] * k);
    }
}

void run(const UnitRows& op, Cpu cpu) {
    const std::int64_t d = op.x.dim(1);
    parallel_for(op.x.dim(0), rows_per_piece(d), cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
            float* x = op.x.as<float>() + i * d;
            double square = 0;
            for (std::int64_t j = 0; j < d; ++j) square += static_cast<double>(x[j]) * x[j];
            const double scale = square > 0 ? 1 / std::sqrt(square) : 0;
            for (std::int64_t j = 0; j < d; ++j) x[j] = static_cast<float>(x[j] * scale);
        }
    });
}

void run(const FastRotation& op, Cpu cpu) {
    const std::int64_t d = op.x.dim(1);
    parallel_for(op.x.dim(0), rows_per_piece(d), cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        kernels().codes->rotate(op.x.as<float>() + begin * d, end - begin, d, op.signs.as<const float>(), op.inverse);
    });
}

}  // namespace polyvec
