#include "polyvec/clusters.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr float below_all = -std::numeric_limits<float>::infinity();
constexpr float unknown = -below_all;  // a second best that must be found anew
constexpr std::int64_t elements_between_checks = 1 << 22;
constexpr std::int64_t cache_miss = 64;  // elements in the time of one

/// One thread's scratch, for one set after another.
class Clusterer {
public:
    explicit Clusterer(const ClusterSets& op) : op_(op), d_(op.values.dim(1)), width_(kernels().scan->panel_width) {}

    void run(std::int64_t s) {
        const auto *rows = op_.offsets.as<const std::int64_t>(), *kept = op_.mean_offsets.as<const std::int64_t>();
        x_ = op_.values.as<const float>() + rows[s] * d_;
        labels_ = op_.labels.as<std::int64_t>() + rows[s];
        means_ = op_.means.as<float>() + kept[s] * d_;
        n_ = rows[s + 1] - rows[s];
        k_ = kept[s + 1] - kept[s];
        std::int64_t& iterations = op_.iterations.as<std::int64_t>()[s];
        iterations = 0;
        squares_.resize(n_);
        kernels().scan->f32.squares(x_, n_, d_, squares_.data());
        if (!finite()) {
            op_.inertia.as<double>()[s] = std::numeric_limits<double>::quiet_NaN();
            return;
        }
        if (k_ == n_) {
            std::copy_n(x_, n_ * d_, means_);
            std::iota(labels_, labels_ + n_, 0);
        } else if (op_.ward) {
            join_nearest();
            before_.assign(n_, -1);
            set_means();
        } else {
            iterations = lloyd();
        }
        op_.inertia.as<double>()[s] = inertia();
    }

private:
    /// Counts work, and looks for Ctrl-C once there is enough of it: a set can take minutes.
    void spend(std::int64_t elements) {
        spent_ += elements;
        if (spent_ < elements_between_checks) return;
        spent_ = 0;
        check_interrupt();
    }

    /// Whether the rows are: a square that is not may have overflowed.
    bool finite() const {
        for (std::int64_t i = 0; i < n_; ++i) {
            if (std::isfinite(squares_[i])) continue;
            if (!std::all_of(x_ + i * d_, x_ + (i + 1) * d_, [](float x) { return std::isfinite(x); })) return false;
        }
        return true;
    }

    // ---- k-means

    std::int64_t lloyd() {
        pack();
        for (std::int64_t c = 0; c < k_; ++c) std::copy_n(x_ + c * n_ / k_ * d_, d_, means_ + c * d_);
        double previous = infinity;
        std::fill_n(labels_, n_, -1);
        moved_.assign(k_, 1);
        for (std::int64_t iteration = 0;; ++iteration) {
            const double loss = assign();
            if (!set_means()) return iteration;
            // Compared so that an unchanged sum ends it, whatever the tolerance.
            if (iteration == op_.max_iter || previous <= (1 + op_.tolerance) * loss) return iteration;
            previous = loss;
        }
    }

    /// Transposes the rows into panels.
    void pack() {
        const std::int64_t panels = (n_ + width_ - 1) / width_;
        if (panels * width_ > capacity_) {
            capacity_ = panels * width_;
            packed_ = aligned<float>(capacity_ * d_);
            best_ = aligned<float>(capacity_);
            second_ = aligned<float>(capacity_);
            nearest_ = aligned<std::int32_t>(capacity_);
        }
        for (std::int64_t first = 0; first < n_; first += width_)
            kernels().scan->f32.pack(x_ + first * d_, std::min(width_, n_ - first), d_, d_, packed_.get() + first * d_);
    }

    /// Labels the rows with their nearest mean, and returns the sum of their squared distances, as rounded.
    ///
    /// Rows are compared with the means that moved. Those that stayed are compared with again only where they may have
    /// become the nearest: a row whose mean moved needs a better one among the moved than the second best was before.
    /// Scores of equal operands are equal, so that labels are those of comparing with all.
    double assign() {
        mobile_.clear();
        stable_.clear();
        offset_.resize(k_);
        for (std::int64_t c = 0; c < k_; ++c) {
            (moved_[c] ? mobile_ : stable_).push_back(static_cast<std::int32_t>(c));
            if (!moved_[c]) continue;
            kernels().scan->f32.squares(means_ + c * d_, 1, d_, &offset_[c]);
            offset_[c] *= -0.5f;
        }
        for (std::int64_t first = 0; first < n_; first += width_) {
            spend(width_ * k_ * d_);
            if (stable_.empty()) {
                forget(first);
                compare(first, mobile_, best_.get() + first, second_.get() + first, nearest_.get() + first);
            } else {
                compare_some(first);
            }
        }
        double loss = 0;
        before_.assign(labels_, labels_ + n_);
        for (std::int64_t i = 0; i < n_; ++i) {
            labels_[i] = nearest_[i];
            loss += std::max(0.0f, squares_[i] - 2 * best_[i]);
        }
        repair();
        return loss;
    }

    void forget(std::int64_t first) {
        std::fill_n(best_.get() + first, width_, below_all);
        std::fill_n(second_.get() + first, width_, below_all);
        std::fill_n(nearest_.get() + first, width_, 0);
    }

    void compare(std::int64_t first, const std::vector<std::int32_t>& means, float* best, float* second,
                 std::int32_t* id) const {
        kernels().quantize->nearest_two({packed_.get() + first * d_, means_, offset_.data(), means.data(), means.size(),
                                         static_cast<std::size_t>(d_)},
                                        best, second, id);
    }

    /// A panel, when some means stayed.
    void compare_some(std::int64_t first) {
        best_moved_.assign(width_, below_all);
        second_moved_.assign(width_, below_all);
        nearest_moved_.assign(width_, 0);
        compare(first, mobile_, best_moved_.data(), second_moved_.data(), nearest_moved_.data());
        float *best = best_.get() + first, *second = second_.get() + first;
        std::int32_t* nearest = nearest_.get() + first;
        const std::int64_t count = std::min(width_, n_ - first);
        bool open = false;
        for (std::int64_t i = 0; i < count; ++i) {
            if (!moved_[nearest[i]] && second[i] < unknown) continue;
            best[i] = second[i];  // no mean that stayed is better
            open |= !(best_moved_[i] > best[i]);
        }
        if (open) {
            forget(first);
            compare(first, stable_, best, second, nearest);
        }
        for (std::int64_t i = 0; i < count; ++i) {
            if (best_moved_[i] > best[i] || (best_moved_[i] == best[i] && nearest_moved_[i] < nearest[i])) {
                second[i] = std::max(best[i], second_moved_[i]);
                best[i] = best_moved_[i];
                nearest[i] = nearest_moved_[i];
            } else {
                second[i] = std::max(second[i], best_moved_[i]);
            }
        }
    }

    /// Gives a cluster without rows the row farthest from its mean, of those whose cluster has others.
    void repair() {
        counts_.assign(k_, 0);
        for (std::int64_t i = 0; i < n_; ++i) ++counts_[labels_[i]];
        for (std::int64_t c = 0; c < k_; ++c) {
            if (counts_[c] > 0) continue;
            std::int64_t farthest = -1;
            float most = -1;
            for (std::int64_t i = 0; i < n_; ++i) {
                const float loss = std::fmax(0.0f, squares_[i] - 2 * best_[i]);  // not below 0 by rounding, not NaN
                if (counts_[labels_[i]] > 1 && loss > most) {
                    most = loss;
                    farthest = i;
                }
            }
            --counts_[labels_[farthest]];  // there is one: fewer clusters than rows
            labels_[farthest] = c;
            counts_[c] = 1;
            best_[farthest] = squares_[farthest] / 2;  // it is its own mean
            nearest_[farthest] = static_cast<std::int32_t>(c);
            second_[farthest] = unknown;
        }
    }

    /// The means of the rows of each label, where they are not those of the labels before. No label is without rows.
    /// Returns whether any label changed.
    bool set_means() {
        moved_.assign(k_, 0);
        bool any = false;
        for (std::int64_t i = 0; i < n_; ++i) {
            if (labels_[i] == before_[i]) continue;
            any = true;
            moved_[labels_[i]] = 1;
            if (before_[i] >= 0) moved_[before_[i]] = 1;
        }
        if (!any) return false;
        begin_.assign(k_ + 1, 0);
        rows_.resize(n_);
        sum_.resize(d_);
        for (std::int64_t i = 0; i < n_; ++i) ++begin_[labels_[i] + 1];
        std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
        next_.assign(begin_.begin(), begin_.end() - 1);
        for (std::int64_t i = 0; i < n_; ++i) rows_[next_[labels_[i]]++] = i;
        for (std::int64_t c = 0; c < k_; ++c) {
            if (!moved_[c]) continue;
            const std::int64_t size = begin_[c + 1] - begin_[c];
            spend(size * d_);
            kernels().quantize->sum_rows(x_, rows_.data() + begin_[c], size, d_, nullptr, sum_.data());
            const double share = 1 / static_cast<double>(size);
            for (std::int64_t j = 0; j < d_; ++j) means_[c * d_ + j] = static_cast<float>(sum_[j] * share);
        }
        return true;
    }

    double inertia() const {
        double total = 0;
        for (std::int64_t i = 0; i < n_; ++i) {
            float square;
            const std::int64_t row = labels_[i];
            kernels().distance->i64.l2(x_ + i * d_, means_, &row, 1, d_, &square);
            total += square;
        }
        return total;
    }

    // ---- Ward's method, by chains of nearest neighbours (Murtagh 1983)

    struct Join {
        double height;
        std::int64_t a, b;
    };

    double& gap(std::int64_t a, std::int64_t b) {
        return gaps_[std::max(a, b) * (std::max(a, b) - 1) / 2 + std::min(a, b)];
    }

    void join_nearest() {
        std::vector<std::int64_t> others(n_);
        std::iota(others.begin(), others.end(), 0);
        std::vector<float> distances(n_);
        gaps_.clear();
        gaps_.reserve(n_ * (n_ - 1) / 2);
        for (std::int64_t i = 1; i < n_; ++i) {
            spend(i * d_);
            kernels().distance->i64.l2(x_ + i * d_, x_, others.data(), i, d_, distances.data());
            gaps_.insert(gaps_.end(), distances.begin(), distances.begin() + i);
        }
        std::vector<std::int64_t> size(n_, 1), chain;
        std::vector<Join> joins;
        std::int64_t first = 0;
        while (static_cast<std::int64_t>(joins.size()) + 1 < n_) {
            if (chain.empty()) {
                while (size[first] == 0) ++first;
                chain.push_back(first);
            }
            spend(cache_miss * n_);
            const std::int64_t a = chain.back();
            std::int64_t nearest = chain.size() > 1 ? chain[chain.size() - 2] : -1;  // of equals, so that it ends
            double least = nearest < 0 ? infinity : gap(a, nearest);
            for (std::int64_t b = 0; b < n_; ++b) {
                if (b == a || size[b] == 0) continue;
                if (const double g = gap(a, b); g < least || nearest < 0) {
                    least = g;
                    nearest = b;
                }
            }
            if (chain.size() < 2 || nearest != chain[chain.size() - 2]) {
                chain.push_back(nearest);
                continue;
            }
            chain.resize(chain.size() - 2);
            merge(a, nearest, size);
            joins.push_back({least, a, nearest});
        }
        cut(joins);
    }

    /// b takes a over: Lance and Williams' update for Ward's method, of squared distances.
    void merge(std::int64_t a, std::int64_t b, std::vector<std::int64_t>& size) {
        const double sa = static_cast<double>(size[a]), sb = static_cast<double>(size[b]), between = gap(a, b);
        for (std::int64_t c = 0; c < n_; ++c) {
            if (c == a || c == b || size[c] == 0) continue;
            const double sc = static_cast<double>(size[c]);
            gap(b, c) = ((sa + sc) * gap(a, c) + (sb + sc) * gap(b, c) - sc * between) / (sa + sb + sc);
        }
        size[b] += size[a];
        size[a] = 0;
    }

    /// Labels by the n - k lowest joins, in the order of the clusters' first rows.
    void cut(std::vector<Join>& joins) {
        std::stable_sort(joins.begin(), joins.end(), [](const Join& l, const Join& r) { return l.height < r.height; });
        std::vector<std::int64_t> root(n_);
        std::iota(root.begin(), root.end(), 0);
        const auto find = [&](std::int64_t i) {
            while (root[i] != i) i = root[i] = root[root[i]];
            return i;
        };
        for (std::int64_t j = 0; j < n_ - k_; ++j) root[find(joins[j].a)] = find(joins[j].b);
        std::vector<std::int64_t> name(n_, -1);
        std::int64_t clusters = 0;
        for (std::int64_t i = 0; i < n_; ++i) {
            std::int64_t& own = name[find(i)];
            if (own < 0) own = clusters++;
            labels_[i] = own;
        }
    }

    const ClusterSets& op_;
    const std::int64_t d_, width_;
    const float* x_ = nullptr;
    std::int64_t* labels_ = nullptr;
    float* means_ = nullptr;
    std::int64_t n_ = 0, k_ = 0, capacity_ = 0, spent_ = 0;
    Aligned<float> packed_, best_;  // best: max over the means of <x, c> - |c|^2 / 2
    Aligned<float> second_;         // no less than that of all means but the best one
    Aligned<std::int32_t> nearest_;
    std::vector<float> squares_, offset_, best_moved_, second_moved_;
    std::vector<std::int32_t> nearest_moved_, mobile_, stable_;        // means that moved, and that did not
    std::vector<std::int64_t> before_, counts_, begin_, next_, rows_;  // before: the labels of the last iteration
    std::vector<unsigned char> moved_;                                 // whether clusters gained or lost rows
    std::vector<double> sum_, gaps_;
};

}  // namespace

void run(const ClusterSets& op, Cpu cpu) {
    const std::int64_t n = op.offsets.dim(0) - 1;
    std::vector<Clusterer> clusterers;
    for (int i = 0; i < workers_for(n, 1, cpu.num_threads); ++i) clusterers.emplace_back(op);
    parallel_for(n, 1, cpu.num_threads, [&](std::int64_t s, std::int64_t, int worker) { clusterers[worker].run(s); });
}

}  // namespace polyvec
