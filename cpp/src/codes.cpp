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

/// The queries of a search as kernels take them. A group is a panel, or one query.
class PackedQueries {
public:
    struct Group {
        std::int64_t first, count;
        bool one;
    };

    explicit PackedQueries(const CodesSearch& op)
        : n_(op.weights.dim(0)), d_(op.weights.dim(1)), scale_(n_), shift_(n_), mean_(n_), kernel_(*kernels().codes) {
        const std::int64_t width = kernel_.panel_width, few = kernel_.one_at_a_time;
        for (std::int64_t first = 0; first < n_;) {
            const bool one = n_ - first <= few;
            const std::int64_t count = one ? 1 : std::min(width, n_ - first);
            groups_.push_back({first, count, one});
            first += count;
        }
        const auto* weights = op.weights.as<const float>();
        std::vector<std::int8_t> bytes(width * d_);
        const std::size_t words =
            std::max(kernel_.panel_words(d_, op.form.bits), kernel_.query_words(d_, op.form.bits));
        for (const Group& group : groups_) {
            for (std::int64_t q = 0; q < group.count; ++q)
                round(weights + (group.first + q) * d_, bytes.data() + q * d_, group.first + q);
            packed_.push_back(aligned<std::uint32_t>(words));
            if (group.one) {
                kernel_.pack_one(bytes.data(), d_, op.form.bits, packed_.back().get());
            } else {
                kernel_.pack(bytes.data(), group.count, d_, op.form.bits, packed_.back().get());
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
    const CodesKernels& kernel_;
};

constexpr std::int64_t block_rows = 128;  // whose unpacked numbers stay in the level-2 cache

/// A sample of the codes: one of every `step`.
struct CodesSample {
    std::int64_t step = 1, n = 0;
    std::size_t rank = 0;  // of a value that far more than k of all codes should reach

    /// Empty where the k best of so few codes are not worth one.
    CodesSample(std::int64_t codes, std::int64_t k) {
        constexpr std::int64_t least_step = 32, most = 8192, least = 256;
        step = std::max(least_step, codes / most);
        n = (codes - static_cast<std::int64_t>(code_margin)) / step / block_rows *
            block_rows;  // memory may be read behind
        if (n < least || k > n) {
            n = 0;
            return;
        }
        const double share = static_cast<double>(k) / static_cast<double>(step);
        rank = static_cast<std::size_t>(share + 3 * std::sqrt(share) + 3);
    }
};

/// One thread's part of a search.
class CodesScan {
public:
    CodesScan(const CodesSearch& op, const PackedQueries& queries)
        : op_(op),
          queries_(queries),
          kernel_(*kernels().codes),
          words_(aligned<std::uint32_t>(std::max<std::int64_t>(block_rows, kernel_.panel_width) *
                                        static_cast<std::int64_t>(kernel_.row_words(op.weights.dim(1), op.form.bits)))),
          hits_(block_rows * kernel_.panel_width),
          floor_(kernel_.panel_width) {}

    /// Codes [begin, end) against groups [from, to). For each query, from the first group's on, `best` has a collector
    /// and `least` what a value must be at least.
    void operator()(std::int64_t begin, std::int64_t end, std::int64_t from, std::int64_t to, TopK* best,
                    const float* least) {
        for (std::int64_t i = begin; i < end; i += block_rows) {
            const std::int64_t n = std::min(block_rows, end - i);
            CodeRows rows = rows_from(i, n, 1);
            if (op_.include) {
                gather(i, rows);
            } else if (rows.n < kernel_.panel_width || (op_.codes.dim(0) - i - n) * rows.stride < code_margin) {
                copy(rows);
            }
            if (rows.n > 0) meet(rows, i, from, to, best, least);
        }
    }

    /// The values of block `b` of the sample, a row each: for group `from` and those up to `to`, (n, count) each.
    void sample(const CodesSample& sample, std::int64_t b, std::int64_t from, std::int64_t to, float* out) {
        const CodeRows rows = rows_from(b * block_rows * sample.step, block_rows, sample.step);
        bool unpacked = false;
        for (std::int64_t g = from; g < to; ++g) {
            const std::int64_t width = queries_.group(g).one ? 1 : kernel_.panel_width;
            float* values = out + b * block_rows * width;
            if (width == 1) {
                kernel_.values_one(rows, queries_[g], words_.get(), values);
            } else {
                if (!unpacked) kernel_.unpack(rows, words_.get());
                unpacked = true;
                kernel_.values(rows, words_.get(), queries_[g], values);
            }
            out += sample.n * width;
        }
    }

private:
    /// n codes from code i on, one of every `step`.
    CodeRows rows_from(std::int64_t i, std::int64_t n, std::int64_t step) const {
        const std::int64_t code_size = op_.codes.dim(1);
        return {op_.codes.as<const std::uint8_t>() + i * code_size,
                static_cast<std::size_t>(n),
                static_cast<std::size_t>(step * code_size),
                static_cast<std::size_t>(op_.weights.dim(1)),
                op_.form.bits,
                op_.form.has_scale,
                op_.form.has_mean,
                op_.form.has_offset};
    }

    /// Moves codes to where as many as a panel's width can be read, and the margin behind them.
    void copy(CodeRows& rows) {
        gathered_.resize(block_rows * rows.stride + code_margin);
        std::memcpy(gathered_.data(), rows.first, rows.n * rows.stride);
        rows.first = gathered_.data();
    }

    /// Leaves the codes that take part, one after the other.
    void gather(std::int64_t first, CodeRows& rows) {
        const bool* include = op_.include.as<const bool>() + first;
        const std::uint8_t* codes = rows.first;
        ids_.clear();
        for (std::size_t r = 0; r < rows.n; ++r)
            if (include[r]) ids_.push_back(first + static_cast<std::int64_t>(r));
        gathered_.resize(block_rows * rows.stride + code_margin);
        for (std::size_t k = 0; k < ids_.size(); ++k)
            std::memcpy(gathered_.data() + k * rows.stride,
                        codes + static_cast<std::size_t>(ids_[k] - first) * rows.stride, rows.stride);
        rows.first = gathered_.data();
        rows.n = ids_.size();
    }

    void meet(const CodeRows& rows, std::int64_t first, std::int64_t from, std::int64_t to, TopK* best,
              const float* least) {
        const std::int64_t first_query = queries_.group(from).first;
        bool unpacked = false;
        for (std::int64_t g = from; g < to; ++g) {
            const PackedQueries::Group& group = queries_.group(g);
            TopK* own = best + (group.first - first_query);
            const float* floor = least + (group.first - first_query);
            const std::int64_t width = group.one ? 1 : kernel_.panel_width;
            std::size_t found;
            if (group.one) {
                found = kernel_.select_one(rows, queries_[g], words_.get(), std::max(own->threshold(), *floor),
                                           hits_.data());
            } else {
                if (!unpacked) kernel_.unpack(rows, words_.get());
                unpacked = true;
                std::fill(floor_.begin(), floor_.end(), std::numeric_limits<float>::quiet_NaN());
                for (std::int64_t q = 0; q < group.count; ++q) floor_[q] = std::max(own[q].threshold(), floor[q]);
                found = kernel_.select(rows, words_.get(), queries_[g], floor_.data(), hits_.data());
            }
            for (std::size_t h = 0; h < found; ++h) {
                const std::int64_t row = hits_[h].at / width;
                own[hits_[h].at % width].push(hits_[h].value, op_.include ? ids_[row] : first + row);
            }
        }
    }

    const CodesSearch& op_;
    const PackedQueries& queries_;
    const CodesKernels& kernel_;
    Aligned<std::uint32_t> words_;
    std::vector<ScanHit> hits_;
    std::vector<float> floor_;
    std::vector<std::int64_t> ids_;  // of the codes that take part
    std::vector<std::uint8_t> gathered_;
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
    parallel_for(sample.n / block_rows, 1, num_threads, [&](std::int64_t b, std::int64_t, int worker) {
        scans[worker].sample(sample, b, from, to, values.get());
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
    const std::int64_t n = op.codes.dim(0), k = op.scores.dim(1), nq = op.weights.dim(0), d = op.weights.dim(1);
    const PackedQueries queries(op);
    const std::int64_t together = std::clamp<std::int64_t>(
        queries.size(), 1, group_queries / static_cast<std::int64_t>(kernels().codes->panel_width));
    const std::int64_t batches = (queries.size() + together - 1) / together;
    const std::int64_t in_batch = std::max<std::int64_t>(1, std::min(nq, group_queries));
    const std::int64_t range = std::max(least, products_per_piece / (in_batch * d)) / block_rows * block_rows;
    const std::int64_t ranges = (n + range - 1) / range;
    const CodesSample sample(op.include || !guess ? 0 : n, k);

    std::vector<TopK> best(nq, TopK(k));
    std::vector<float> reach(nq, -infinity);
    std::mutex merging;
    std::vector<CodesScan> scans;
    for (int i = 0; i < workers_for(std::max(batches * ranges, sample.n / block_rows), 1, num_threads); ++i)
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
