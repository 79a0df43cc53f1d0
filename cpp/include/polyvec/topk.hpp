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

class TopK {
public:
    explicit TopK(std::int64_t k = 0) : k_(static_cast<std::size_t>(k)) {
        hits_.reserve(std::min<std::size_t>(k_, 1024));
    }

    /// A score must be at least this to be taken: what a kernel compares against.
    float threshold() const {
        return hits_.size() < k_ || k_ == 0 ? -std::numeric_limits<float>::infinity() : hits_.front().score;
    }

    void push(float score, std::int64_t id) {
        const Hit hit{score, id};
        if (k_ == 0 || score != score) return;
        if (hits_.size() < k_) {
            hits_.push_back(hit);
            std::push_heap(hits_.begin(), hits_.end(), better);  // the worst hit is at the front
        } else if (better(hit, hits_.front())) {
            replace_worst(hit);
        }
    }

    void merge(const TopK& other) {
        for (const Hit& hit : other.hits_) push(hit.score, hit.id);
    }

    /// Writes k scores and ids, best first; missing ones are (-inf, -1). `sign` -1 turns scores into distances.
    void write(float* scores, std::int64_t* ids, float sign = 1) {
        std::sort(hits_.begin(), hits_.end(), better);
        for (std::size_t i = 0; i < k_; ++i) {
            const bool found = i < hits_.size();
            scores[i] = sign * (found ? hits_[i].score : -std::numeric_limits<float>::infinity());
            ids[i] = found ? hits_[i].id : -1;
        }
        hits_.clear();
    }

    std::vector<Hit>& hits() { return hits_; }

private:
    void replace_worst(const Hit& hit) {
        std::size_t at = 0;
        for (std::size_t child; (child = 2 * at + 1) < hits_.size(); at = child) {
            if (child + 1 < hits_.size() && better(hits_[child], hits_[child + 1])) ++child;
            if (!better(hit, hits_[child])) break;
            hits_[at] = hits_[child];
        }
        hits_[at] = hit;
    }

    std::size_t k_;
    std::vector<Hit> hits_;
};

}  // namespace polyvec
