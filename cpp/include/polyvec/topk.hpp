/// TopK: the k best (score, id) pairs seen so far. Drivers fill one from what kernels let through.
///
/// Order: higher score first, equal scores by smaller id, so that the result does not depend on the order of pushes
/// and collectors of different threads merge to the same bits. NaN is never taken.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace polyvec {

struct Hit {
    float score;
    std::int64_t id;
};

/// Whether `a` ranks before `b`.
struct Better {
    bool operator()(const Hit& a, const Hit& b) const { return a.score != b.score ? a.score > b.score : a.id < b.id; }
};

/// An integer that is lower for a higher score, and equal for equal ones, 0 and -0 too. Not for NaN.
inline std::uint32_t sort_key(const Hit& hit) {
    const auto bits = std::bit_cast<std::uint32_t>(hit.score + 0.0f);
    return bits >> 31 ? bits : ~bits & 0x7fffffff;
}

// Many hits are sorted and cut by digits of their keys: a comparison of scores is a branch that nothing predicts, and
// costs more than a pass over the hits.
constexpr std::size_t few_hits = 256;
constexpr int digit_bits = 11;
constexpr std::uint32_t digit_values = 1 << digit_bits;

/// Sorts hits, best first.
inline void sort_hits(std::vector<Hit>& hits) {
    if (hits.size() <= few_hits) {
        std::sort(hits.begin(), hits.end(), Better{});
        return;
    }
    constexpr int digits = 3;
    const auto digit = [](const Hit& hit, int k) { return sort_key(hit) >> k * digit_bits & (digit_values - 1); };
    std::vector<std::uint32_t> begin(digits * digit_values);
    for (const Hit& hit : hits)
        for (int k = 0; k < digits; ++k) ++begin[k * digit_values + digit(hit, k)];
    std::vector<Hit> sorted(hits.size());
    for (int k = 0; k < digits; ++k) {
        std::uint32_t* at = &begin[k * digit_values];
        std::exclusive_scan(at, at + digit_values, at, 0u);
        for (const Hit& hit : hits) sorted[at[digit(hit, k)]++] = hit;
        hits.swap(sorted);
    }
    for (auto first = hits.begin(); first != hits.end();) {
        const auto end = std::find_if(first, hits.end(), [&](const Hit& hit) { return hit.score != first->score; });
        if (end - first > 1) std::sort(first, end, Better{});
        first = end;
    }
}

/// Puts ids of equal scores in order, where scores were rounded since they were sorted.
inline void sort_equal(const float* scores, std::int64_t* ids, std::int64_t n) {
    for (std::int64_t first = 0, end; first < n; first = end) {
        end = std::find_if(scores + first, scores + n, [&](float score) { return score != scores[first]; }) - scores;
        if (end - first > 1) std::sort(ids + first, ids + end);
        end = std::max(end, first + 1);  // NaN equals nothing
    }
}

/// Moves the n best hits to the front, the n-th to its place; n is at least 1 and at most their number.
inline void select_hits(std::vector<Hit>& hits, std::size_t n) {
    auto begin = hits.begin(), end = hits.end();
    const auto nth = begin + static_cast<std::ptrdiff_t>(n) - 1;
    if (hits.size() > few_hits) {
        std::uint32_t lowest = ~0u, highest = 0;
        for (const Hit& hit : hits) {
            lowest = std::min(lowest, sort_key(hit));
            highest = std::max(highest, sort_key(hit));
        }
        const int shift = std::max(0, static_cast<int>(std::bit_width(highest - lowest)) - digit_bits);
        const auto bucket = [&](const Hit& hit) { return (sort_key(hit) - lowest) >> shift; };
        std::array<std::uint32_t, digit_values> counts{};
        for (const Hit& hit : hits) ++counts[bucket(hit)];
        std::uint32_t limit = 0;  // the bucket of the n-th
        for (std::size_t before = 0; before + counts[limit] < n; ++limit) before += counts[limit];
        const auto move_up = [&](auto to, std::uint32_t below) {  // hits of buckets below; without a branch
            for (auto hit = to; hit != hits.end(); ++hit) {
                const bool moves = bucket(*hit) < below;
                std::iter_swap(to, hit);
                to += moves;
            }
            return to;
        };
        begin = move_up(begin, limit);
        end = move_up(begin, limit + 1);
    }
    std::nth_element(begin, nth, end, Better{});
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

    /// Raises the threshold to the k-th best score, if there are so many hits, and returns it.
    float raise_threshold() {
        if (k_ > 0 && hits_.size() >= k_) cut();
        return threshold_;
    }

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
        sort_hits(hits_);
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
            cut();
        } else {
            hits_.clear();
        }
    }

    void cut() {
        select_hits(hits_, k_);
        threshold_ = hits_[k_ - 1].score;
        hits_.resize(k_);
    }

    std::size_t k_, capacity_;
    float threshold_ = -std::numeric_limits<float>::infinity();
    std::vector<Hit> hits_;
};

}  // namespace polyvec
