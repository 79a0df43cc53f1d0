/// TopK: the k best (score, id) pairs seen so far. Drivers fill one from what kernels let through.
///
/// Order: higher score first, equal scores by smaller id, so that the result does not depend on the order of pushes
/// and collectors of different threads merge to the same bits. NaN is never taken.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace polyvec {

struct Hit {
    float score;
    std::int64_t id;
};

/// Whether `a` ranks before `b`.
inline bool better(const Hit& a, const Hit& b) {
    return a.score != b.score ? a.score > b.score : a.id < b.id;
}

/// Hits are gathered in a pool of twice k and cut back to k when it is full: a hit costs a few nanoseconds at any k,
/// where a heap would pay log k cache misses.
class TopK {
public:
    explicit TopK(std::int64_t k = 0) : k_(static_cast<std::size_t>(k)), capacity_(2 * k_ + 32) {
        hits_.reserve(std::min<std::size_t>(capacity_, 1024));
    }

    /// A score must be at least this to be taken: what a kernel compares against. It lags behind the k-th best score.
    float threshold() const { return threshold_; }

    void push(float score, std::int64_t id) {
        if (!(score >= threshold_)) return;
        hits_.push_back({score, id});
        if (hits_.size() == capacity_) trim();
    }

    void merge(const TopK& other) {
        for (const Hit& hit : other.hits_) push(hit.score, hit.id);
    }

    /// The hits, at most k, best first.
    std::vector<Hit>& hits() {
        trim();
        std::sort(hits_.begin(), hits_.end(), better);
        return hits_;
    }

    /// Writes k scores and ids, best first; missing ones are (-inf, -1). `sign` -1 turns scores into distances.
    void write(float* scores, std::int64_t* ids, float sign = 1) {
        hits();
        for (std::size_t i = 0; i < k_; ++i) {
            const bool found = i < hits_.size();
            scores[i] = sign * (found ? hits_[i].score : -std::numeric_limits<float>::infinity());
            ids[i] = found ? hits_[i].id : -1;
        }
    }

private:
    void trim() {
        if (hits_.size() <= k_) return;
        if (k_ > 0) {
            const auto worst = hits_.begin() + static_cast<std::ptrdiff_t>(k_) - 1;
            std::nth_element(hits_.begin(), worst, hits_.end(), better);
            threshold_ = worst->score;
        }
        hits_.resize(k_);
    }

    std::size_t k_, capacity_;
    float threshold_ = -std::numeric_limits<float>::infinity();
    std::vector<Hit> hits_;
};

}  // namespace polyvec
