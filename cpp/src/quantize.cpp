#include "polyvec/quantize.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "polyvec/random.hpp"
#include "polyvec/scan.hpp"
#include "polyvec/topk.hpp"
#include "short_codebook.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t elements_per_piece = 1 << 17;  // a piece costs tens of microseconds
constexpr float infinity = std::numeric_limits<float>::infinity();

std::int64_t rows_per_piece(std::int64_t row_size) {
    return std::max<std::int64_t>(1, elements_per_piece / std::max<std::int64_t>(1, row_size));
}

/// a[i].
Array slice(const Array& a, std::int64_t i) {
    Array part = a;
    part.data = a.as<char>() + static_cast<std::size_t>(i * a.stride(0)) * size_of(a.dtype);
    part.ndim = a.ndim - 1;
    std::copy(a.shape.begin() + 1, a.shape.end(), part.shape.begin());
    std::copy(a.strides.begin() + 1, a.strides.end(), part.strides.begin());
    return part;
}

/// Calls body(p) for every problem: the threads share problems where there are enough of them, else each problem. One
/// thread takes problems outside of parallel_for: within its body nothing asks for Ctrl-C.
template <class F>
void for_each_problem(std::int64_t problems, int num_threads, const F& body) {
    const auto range = [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t p = begin; p < end; ++p) body(p);
    };
    const int threads = num_threads > 0 ? num_threads : get_num_threads();
    if (threads > 1 && problems >= threads) {
        parallel_for(problems, 1, num_threads, range);
    } else {
        range(0, problems, 0);
    }
}

float norm(const float* x, std::int64_t d) {
    float square;
    kernels().scan->f32.squares(x, 1, d, &square);
    return std::sqrt(square);
}

std::vector<float> row_norms(const float* x, std::int64_t n, std::int64_t d, int num_threads) {
    std::vector<float> norms(n);
    parallel_for(n, rows_per_piece(d), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        kernels().scan->f32.squares(x + begin * d, end - begin, d, norms.data() + begin);
        for (std::int64_t i = begin; i < end; ++i) norms[i] = std::sqrt(norms[i]);
    });
    return norms;
}

float inverse(float norm) {
    return norm > 0 ? 1 / norm : 0.0f;
}

/// D^2 sampling on one problem. Each row has a gap, its squared distance from the nearest seed.
///
/// Gaps narrow by batches of seeds, in one pass of the register tile over the rows. A batch is drawn by the gaps before
/// it; a candidate whose gap the accepted ones have since narrowed to a fraction of it stays with that probability.
/// That is rejection sampling: the seeds have the distribution of drawing one at a time.
class Seeding {
public:
    static constexpr std::int64_t batch = 24;  // full tiles at every level

    Seeding(const float* x, std::int64_t n, std::int64_t d, bool unit, int num_threads)
        : x_(x),
          n_(n),
          d_(d),
          num_threads_(num_threads),
          width_(kernels().scan->panel_width),
          panels_((n + width_ - 1) / width_),
          scale_(n, 1.0f),
          mean_(d),
          packed_(aligned<float>(panels_ * width_ * d)),
          squares_(panels_ * width_),
          nearest_(aligned<float>(panels_ * width_)),
          gaps_(panels_ * width_),
          sums_(panels_) {
        if (unit) {
            scale_ = row_norms(x, n, d, num_threads);
            std::transform(scale_.begin(), scale_.end(), scale_.begin(), inverse);
        }
        std::vector<std::int64_t> rows(n);
        std::iota(rows.begin(), rows.end(), 0);
        std::vector<double> sum(d);
        kernels().quantize->sum_rows(x, rows.data(), n, d, scale_.data(), sum.data());
        for (std::int64_t i = 0; i < d; ++i) mean_[i] = static_cast<float>(sum[i] / static_cast<double>(n));
        std::fill_n(nearest_.get(), panels_ * width_, -infinity);
        parallel_for(panels_, rows_per_piece(width_ * d), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
            std::vector<float> block(width_ * d_);
            for (std::int64_t p = begin; p < end; ++p) {
                const std::int64_t first = p * width_, count = std::min(width_, n_ - first);
                for (std::int64_t i = 0; i < count; ++i) {
                    copy(first + i, block.data() + i * d_);
                    squares_[first + i] = square(block.data() + i * d_);
                }
                kernels().scan->f32.pack(block.data(), count, d_, d_, packed_.get() + first * d_);
            }
        });
    }

    void choose(std::int64_t k, Random random, std::int64_t* rows) {
        rows[0] = uniform(random);
        narrow(rows, 1);
        for (std::int64_t chosen = 1; chosen < k;) {
            const std::int64_t accepted = draw_batch(std::min(batch, k - chosen), random, rows + chosen);
            narrow(rows + chosen, accepted);
            chosen += accepted;
            check_interrupt();
        }
    }

private:
    /// Writes the accepted candidates, at least one and at most `count`, and returns their number.
    std::int64_t draw_batch(std::int64_t count, Random& random, std::int64_t* rows) const {
        const double total = std::accumulate(sums_.begin(), sums_.end(), 0.0);
        if (!(total > 0 && std::isfinite(total))) {  // every row equals a seed, or squares overflow
            std::generate_n(rows, count, [&] { return uniform(random); });
            return count;
        }
        std::vector<float> accepted, candidate(d_);
        std::int64_t n = 0;
        for (std::int64_t c = 0; c < count; ++c) {
            const std::int64_t row = draw(random.uniform() * total);
            copy(row, candidate.data());
            float gap = gaps_[row];
            for (std::int64_t a = 0; a < n; ++a)
                gap = std::min(gap, distance(candidate.data(), accepted.data() + a * d_));
            if (n > 0 && random.uniform() * gaps_[row] >= gap) continue;
            accepted.insert(accepted.end(), candidate.begin(), candidate.end());
            rows[n++] = row;
        }
        return n;
    }

    /// Makes `count` rows seeds.
    void narrow(const std::int64_t* rows, std::int64_t count) {
        std::vector<float> seeds(count * d_), scale(count, 1.0f), offset(count);
        for (std::int64_t s = 0; s < count; ++s) {
            copy(rows[s], seeds.data() + s * d_);
            offset[s] = -square(seeds.data() + s * d_) / 2;
            nearest_[rows[s]] = infinity;  // its gap is exactly 0
        }
        const ScanKernel& scan = kernels().scan->f32;
        const std::int64_t grain = rows_per_piece(width_ * d_);
        parallel_for(panels_, grain, num_threads_, [&](std::int64_t begin, std::int64_t end, int) {
            const Aligned<std::int32_t> ids = aligned<std::int32_t>(width_);
            std::fill_n(ids.get(), width_, 0);
            for (std::int64_t p = begin; p < end; ++p) {
                float* nearest = nearest_.get() + p * width_;
                ScanBlock block{packed_.get() + p * width_ * d_, seeds.data(), static_cast<std::size_t>(count),
                                static_cast<std::size_t>(d_)};
                block.scale = scale.data();
                block.offset = offset.data();
                scan.nearest(block, nearest, ids.get());
                sums_[p] = 0;
                for (std::int64_t i = p * width_; i < std::min(n_, (p + 1) * width_); ++i) {
                    gaps_[i] = std::max(0.0f, squares_[i] - 2 * nearest_[i]);
                    sums_[p] += gaps_[i];
                }
            }
        });
    }

    std::int64_t uniform(Random& random) const {
        return static_cast<std::int64_t>(random.uniform() * static_cast<double>(n_));
    }

    /// The row at which the running sum of gaps exceeds `target`.
    std::int64_t draw(double target) const {
        const std::int64_t panel = find(sums_.data(), panels_, target);
        return panel * width_ + find(gaps_.data() + panel * width_, width_, target);
    }

    /// The first entry at which the running sum exceeds `target`, which loses the sum before it. Never one that is 0.
    static std::int64_t find(const float* weights, std::int64_t n, double& target) {
        std::int64_t last = 0;
        for (std::int64_t i = 0; i < n; ++i) {
            if (!(weights[i] > 0)) continue;
            if (target < weights[i]) return i;
            target -= weights[i];
            last = i;
        }
        return last;
    }

    /// The row as distances see it: less the mean, so that no digits are lost to a common offset.
    void copy(std::int64_t row, float* out) const {
        for (std::int64_t i = 0; i < d_; ++i) out[i] = x_[row * d_ + i] * scale_[row] - mean_[i];
    }

    float square(const float* row) const { return std::inner_product(row, row + d_, row, 0.0f); }

    float distance(const float* a, const float* b) const {
        float sum = 0;
        for (std::int64_t i = 0; i < d_; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
        return sum;
    }

    const float* x_;
    std::int64_t n_, d_;
    int num_threads_;
    std::int64_t width_, panels_;
    std::vector<float> scale_, mean_;
    Aligned<float> packed_;  // the rows, panel by panel
    std::vector<float> squares_;
    Aligned<float> nearest_;  // max over the seeds of <x, c> - |c|^2 / 2
    std::vector<float> gaps_, sums_;
};

/// The nearest means of rows: products of bytes, whose errors are bounded, leave some of the means, and exact distances
/// decide between these. Bytes take less than half the time of float32, and of 256 means for sentence embeddings they
/// leave three to seven. Panels of rows for which they leave many are compared with all means anew.
class CoarseSearch {
public:
    static bool pays(std::int64_t k, std::int64_t d) {
        return kernels().quantize->candidates && k >= 64 && d >= 64 && d <= 4096 && k * d >= 1 << 14;
    }

    CoarseSearch(const float* means, std::int64_t k, std::int64_t d, int num_threads)
        : means_(means),
          k_(k),
          d_(d),
          width_(kernels().scan->panel_width),
          row_bytes_((d + 3) / 4 * 4),
          center_(d),
          bytes_(k * row_bytes_, 64),
          scale_(k),
          offset_(k),
          size_(k),
          error_(k),
          rounding_(k) {
        std::vector<double> sum(d);
        for (std::int64_t c = 0; c < k; ++c)
            for (std::int64_t i = 0; i < d; ++i) sum[i] += means[c * d + i];
        for (std::int64_t i = 0; i < d; ++i) center_[i] = static_cast<float>(sum[i] / static_cast<double>(k));
        parallel_for(k, rows_per_piece(d), num_threads, [&](std::int64_t begin, std::int64_t end, int) {
            for (std::int64_t c = begin; c < end; ++c) round(c);
        });
    }

    /// Writes the labels of n rows.
    void label(const float* x, std::int64_t n, int num_threads, std::int64_t* labels) const {
        const std::int64_t panels = (n + width_ - 1) / width_;
        std::vector<Scratch> scratch(workers_for(panels, panels_per_piece, num_threads));
        for (Scratch& s : scratch) {
            s.panel = aligned<std::uint32_t>(width_ * static_cast<std::int64_t>(kernels().quantize->coarse_words(d_)));
            s.floor.resize(width_);
            s.hits.resize(std::min(block, k_) * width_);
            s.distances.resize(k_);
        }
        parallel_for(panels, panels_per_piece, num_threads, [&](std::int64_t begin, std::int64_t end, int worker) {
            for (std::int64_t p = begin; p < end; ++p)
                label_panel(x + p * width_ * d_, std::min(width_, n - p * width_), scratch[worker],
                            labels + p * width_);
        });
    }

private:
    static constexpr std::int64_t block = 1024;  // means
    static constexpr std::int64_t panels_per_piece = 4;

    struct Candidate {
        std::int64_t lane, mean;
        float upper;
    };

    struct Scratch {
        Aligned<std::uint32_t> panel;
        std::vector<float> floor, distances;
        std::vector<ScanHit> hits;
        std::vector<Candidate> kept;
        std::vector<std::int64_t> ids;
    };

    void label_panel(const float* rows, std::int64_t n, Scratch& s, std::int64_t* labels) const {
        const QuantizeKernels& kernel = *kernels().quantize;
        kernel.pack_coarse(rows, center_.data(), n, d_, s.panel.get());
        std::fill(s.floor.begin(), s.floor.end(), infinity);  // a lane without a row has no candidates
        std::fill_n(s.floor.begin(), n, -infinity);
        s.kept.clear();
        for (std::int64_t c = 0; c < k_; c += block) {
            const std::size_t found = kernel.candidates(coarse(c), s.panel.get(), s.floor.data(), s.hits.data());
            for (std::size_t i = 0; i < found; ++i) {
                const std::int64_t lane = s.hits[i].at % width_;
                if (s.hits[i].value >= s.floor[lane])
                    s.kept.push_back({lane, c + s.hits[i].at / width_, s.hits[i].value});
            }
        }
        if (static_cast<std::int64_t>(s.kept.size()) > n * k_ / 4) {
            const Array means = matrix(means_, k_);
            polyvec::run(ScanNearest{matrix(rows, n), {means, {}}, list(labels, n), {}, Metric::l2}, Cpu{1});
            return;
        }
        std::stable_sort(s.kept.begin(), s.kept.end(),
                         [](const Candidate& l, const Candidate& r) { return l.lane < r.lane; });
        auto next = s.kept.begin();
        for (std::int64_t lane = 0; lane < n; ++lane) {
            s.ids.clear();
            for (; next != s.kept.end() && next->lane == lane; ++next)
                if (next->upper >= s.floor[lane]) s.ids.push_back(next->mean);
            labels[lane] = nearest(rows + lane * d_, s.ids, s.distances);
        }
    }

    /// Mean c, in steps of its own.
    void round(std::int64_t c) {
        const float* mean = means_ + c * d_;
        double halves[2] = {}, size = 0, error = 0;
        float largest = 0;
        for (std::int64_t i = 0; i < d_; ++i) {
            const float x = mean[i] - center_[i];
            largest = std::max(largest, std::fabs(x));
            halves[i / 2 % 2] += static_cast<double>(x) * x;
        }
        const double most = coarse_norm - std::sqrt(static_cast<double>(d_ / 2 + 2)) / 2;  // before rounding
        const double step =
            std::max(static_cast<double>(largest) / coarse_mean, std::sqrt(std::max(halves[0], halves[1])) / most);
        for (std::int64_t i = 0; i < d_; ++i) {
            const float x = mean[i] - center_[i];
            const double steps = step > 0 && std::isfinite(step) ? std::nearbyint(x / step) : 0;
            bytes_[c * row_bytes_ + i] = static_cast<std::uint8_t>(64 + static_cast<int>(steps));
            size += steps * step * steps * step;
            error += (x - steps * step) * (x - steps * step);
        }
        constexpr double loss = 0x1p-20;  // of a few roundings to float32, and more
        scale_[c] = static_cast<float>(step);
        offset_[c] = static_cast<float>(-(halves[0] + halves[1]) / 2);
        size_[c] = static_cast<float>((1 + loss) * std::sqrt(size));
        error_[c] = static_cast<float>((1 + loss) * std::sqrt(error) + loss * std::sqrt(halves[0] + halves[1]));
        rounding_[c] = static_cast<float>(loss * (halves[0] + halves[1]));
    }

    CoarseMeans coarse(std::int64_t c) const {
        return {bytes_.data() + c * row_bytes_,
                scale_.data() + c,
                offset_.data() + c,
                size_.data() + c,
                error_.data() + c,
                rounding_.data() + c,
                static_cast<std::size_t>(std::min(block, k_ - c)),
                static_cast<std::size_t>(d_)};
    }

    /// The nearest of the means `ids`, in ascending order, the first of equals. Without any, what they are compared by
    /// was not finite.
    std::int64_t nearest(const float* row, std::vector<std::int64_t>& ids, std::vector<float>& distances) const {
        if (ids.empty()) {
            ids.resize(k_);
            std::iota(ids.begin(), ids.end(), 0);
        }
        if (ids.size() == 1) return ids[0];
        const auto count = static_cast<std::int64_t>(ids.size());
        kernels().distance->i64.l2(row, means_, ids.data(), count, d_, distances.data());
        return ids[std::min_element(distances.begin(), distances.begin() + count) - distances.begin()];
    }

    Array matrix(const float* rows, std::int64_t n) const {
        Array a;
        a.data = const_cast<float*>(rows);
        a.ndim = 2;
        a.shape = {n, d_};
        a.strides = {d_, 1};
        return a;
    }

    static Array list(std::int64_t* values, std::int64_t n) {
        Array a;
        a.data = values;
        a.dtype = DType::i64;
        a.ndim = 1;
        a.shape = {n};
        a.strides = {1};
        return a;
    }

    const float* means_;
    std::int64_t k_, d_, width_, row_bytes_;
    std::vector<float> center_;
    std::vector<std::uint8_t> bytes_;
    std::vector<float> scale_, offset_, size_, error_, rounding_;  // of CoarseMeans
};

/// Rows in the order of their labels: those of label c are rows[begin[c]] ... rows[begin[c + 1] - 1], ascending.
struct Clusters {
    std::vector<std::int64_t> begin, rows;

    Clusters(const std::int64_t* labels, std::int64_t n, std::int64_t k) : begin(k + 1), rows(n) {
        for (std::int64_t i = 0; i < n; ++i) ++begin[labels[i] + 1];
        std::partial_sum(begin.begin(), begin.end(), begin.begin());
        std::vector<std::int64_t> next(begin.begin(), begin.end() - 1);
        for (std::int64_t i = 0; i < n; ++i) rows[next[labels[i]]++] = i;
    }
    std::int64_t size(std::int64_t c) const { return begin[c + 1] - begin[c]; }
};

/// One iteration on one problem.
class Lloyd {
public:
    Lloyd(const KMeansStep& op, std::int64_t p, int num_threads)
        : op_(op),
          x_(slice(op.x, p)),
          centroids_(slice(op.centroids, p)),
          labels_(slice(op.labels, p)),
          updated_(op.updated ? slice(op.updated, p).as<float>() : nullptr),
          num_threads_(num_threads) {}

    /// Returns the inertia.
    double run() {
        if (!spherical() && d() > 0 && d() <= ShortCodebook::widest) return run_short();
        // Spherical: the cosine ranks centroids as the inner product with their unit vectors does.
        const Metric metric = spherical() ? Metric::cosine : Metric::l2;
        const std::int64_t n = x_.dim(0), k = centroids_.dim(0);
        if (!spherical() && CoarseSearch::pays(k, d())) {
            CoarseSearch(centroid(0), k, d(), num_threads_).label(x(), n, num_threads_, labels_.as<std::int64_t>());
        } else {
            polyvec::run(ScanNearest{x_, {centroids_, {}}, labels_, {}, metric}, Cpu{num_threads_});
        }
        const Clusters clusters(labels_.as<const std::int64_t>(), n, k);
        if (spherical()) {
            norms_ = row_norms(x(), n, d(), num_threads_);
            if (op_.metric == Metric::cosine)
                for (const float norm : norms_) scale_.push_back(inverse(norm));
        }
        losses_.resize(n);
        std::vector<double> inertia(k);
        const std::int64_t grain = rows_per_piece((n / k + 1) * d());
        parallel_for(k, grain, num_threads_, [&](std::int64_t begin, std::int64_t end, int) {
            std::vector<double> sum(d());
            for (std::int64_t c = begin; c < end; ++c) {
                const std::int64_t* rows = clusters.rows.data() + clusters.begin[c];
                float* losses = losses_.data() + clusters.begin[c];
                measure(c, rows, clusters.size(c), losses);
                inertia[c] = std::accumulate(losses, losses + clusters.size(c), 0.0);
                if (updated_) move(c, rows, clusters.size(c), sum);
            }
        });
        if (updated_) fill_empty(clusters);
        return std::accumulate(inertia.begin(), inertia.end(), 0.0);
    }

private:
    bool spherical() const { return op_.metric != Metric::l2; }
    std::int64_t d() const { return x_.dim(1); }
    const float* x() const { return x_.as<const float>(); }
    const float* centroid(std::int64_t c) const { return centroids_.as<const float>() + c * d(); }

    /// The same for rows of few elements, in passes over the rows instead of the clusters.
    double run_short() {
        const std::int64_t n = x_.dim(0), k = centroids_.dim(0), piece = rows_per_piece(k);
        const ShortCodebook codebook(centroids_.as<const float>(), k, d());
        const auto rows = [&](std::int64_t first, std::int64_t count) {
            return ShortRows{x() + first * d(),
                             static_cast<std::size_t>(count),
                             static_cast<std::size_t>(d()),
                             static_cast<std::size_t>(d()),
                             codebook.codewords,
                             codebook.offsets.data(),
                             codebook.offsets.size(),
                             static_cast<std::size_t>(codebook.width)};
        };
        const QuantizeKernels& kernel = *kernels().quantize;
        auto* labels = labels_.as<std::int64_t>();
        std::vector<double> inertia((n + piece - 1) / piece), sums(updated_ ? k * short_sum(codebook.width) : 0);
        const bool alone = workers_for(n, piece, num_threads_) == 1;
        parallel_for(n, piece, num_threads_, [&](std::int64_t begin, std::int64_t end, int) {
            std::vector<std::int32_t> ids(piece);
            for (; begin < end; begin += piece) {
                const std::int64_t count = std::min(piece, end - begin);
                kernel.nearest_short(rows(begin, count), ids.data());
                inertia[begin / piece] = kernel.loss_short(rows(begin, count), ids.data());
                std::copy_n(ids.begin(), count, labels + begin);
                // While the rows are in the cache; several threads would wait for each other.
                if (updated_ && alone) kernel.sum_short(rows(begin, count), labels + begin, 0, k, sums.data());
            }
        });
        if (updated_ && !alone) {  // each thread those of some clusters, in a pass over all rows
            const std::int64_t threads = workers_for(k, 1, num_threads_), stride = short_sum(codebook.width);
            parallel_for(k, (k + threads - 1) / threads, num_threads_, [&](std::int64_t begin, std::int64_t end, int) {
                kernel.sum_short(rows(0, n), labels, begin, end, sums.data() + begin * stride);
            });
        }
        if (updated_) move_short(sums, codebook.width, labels);
        return std::accumulate(inertia.begin(), inertia.end(), 0.0);
    }

    void move_short(const std::vector<double>& sums, std::int64_t width, const std::int64_t* labels) {
        const std::int64_t n = x_.dim(0), k = centroids_.dim(0), stride = short_sum(width);
        std::vector<std::int64_t> sizes(k);
        for (std::int64_t i = 0; i < n; ++i) ++sizes[labels[i]];
        for (std::int64_t c = 0; c < k; ++c) {
            for (std::int64_t i = 0; i < d(); ++i) {
                updated_[c * d() + i] = sizes[c] > 0
                                            ? static_cast<float>(sums[c * stride + i] / static_cast<double>(sizes[c]))
                                            : centroid(c)[i];
            }
        }
        if (std::find(sizes.begin(), sizes.end(), 0) == sizes.end()) return;
        const Clusters clusters(labels, n, k);
        losses_.resize(n);
        for (std::int64_t c = 0; c < k; ++c)
            measure(c, clusters.rows.data() + clusters.begin[c], clusters.size(c), losses_.data() + clusters.begin[c]);
        fill_empty(clusters);
    }

    void measure(std::int64_t c, const std::int64_t* rows, std::int64_t n, float* losses) const {
        const DistanceKernel<std::int64_t>& distance = kernels().distance->i64;
        if (!spherical()) return distance.l2(centroid(c), x(), rows, n, d(), losses);
        distance.dot(centroid(c), x(), rows, n, d(), losses);
        const float scale = inverse(norm(centroid(c), d()));
        for (std::int64_t i = 0; i < n; ++i) {
            const float length = norms_[rows[i]], projection = losses[i] * scale;
            const float loss = op_.metric == Metric::ip ? length - projection : 1 - projection * inverse(length);
            losses[i] = std::max(0.0f, loss);
        }
    }

    /// Writes the new centroid; one without rows, or whose rows cancel out, stays where it is.
    void move(std::int64_t c, const std::int64_t* rows, std::int64_t n, std::vector<double>& sum) const {
        kernels().quantize->sum_rows(x(), rows, n, d(), scale_.empty() ? nullptr : scale_.data(), sum.data());
        double size = spherical() ? length(sum) : static_cast<double>(n);
        if (!(size > 0)) {
            std::copy_n(centroid(c), d(), sum.begin());
            size = spherical() ? length(sum) : 1;
        }
        if (!(size > 0)) size = 1;
        for (std::int64_t i = 0; i < d(); ++i) updated_[c * d() + i] = static_cast<float>(sum[i] / size);
    }

    static double length(const std::vector<double>& x) {
        return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
    }

    void fill_empty(const Clusters& clusters) const {
        std::vector<std::int64_t> empty;
        for (std::int64_t c = 0; c < centroids_.dim(0); ++c)
            if (clusters.size(c) == 0) empty.push_back(c);
        if (empty.empty()) return;
        TopK farthest(static_cast<std::int64_t>(empty.size()));
        for (std::size_t i = 0; i < losses_.size(); ++i)
            if (losses_[i] > 0) farthest.push(losses_[i], clusters.rows[i]);
        const std::vector<Hit>& hits = farthest.hits();
        for (std::size_t e = 0; e < hits.size(); ++e) {
            const std::int64_t row = hits[e].id;
            const float scale = spherical() ? inverse(norms_[row]) : 1;
            for (std::int64_t i = 0; i < d(); ++i) updated_[empty[e] * d() + i] = x()[row * d() + i] * scale;
        }
    }

    const KMeansStep& op_;
    const Array x_, centroids_, labels_;
    float* const updated_;
    const int num_threads_;
    std::vector<float> norms_, scale_;  // of rows, where the metric needs them
    std::vector<float> losses_;         // in the order of the clusters
};

}  // namespace

void run(const KMeansSeed& op, Cpu cpu) {
    const std::int64_t n = op.x.dim(1), d = op.x.dim(2), k = op.rows.dim(1);
    for_each_problem(op.x.dim(0), cpu.num_threads, [&](std::int64_t p) {
        Seeding(op.x.as<const float>() + p * n * d, n, d, op.metric != Metric::l2, cpu.num_threads)
            .choose(k, Random(op.seed, static_cast<std::uint64_t>(p)), op.rows.as<std::int64_t>() + p * k);
    });
}

void run(const KMeansStep& op, Cpu cpu) {
    for_each_problem(op.x.dim(0), cpu.num_threads,
                     [&](std::int64_t p) { op.inertia.as<double>()[p] = Lloyd(op, p, cpu.num_threads).run(); });
}

}  // namespace polyvec
