/// Random numbers that depend on nothing but a seed: the same on every platform and instruction set.
#pragma once

#include <cstdint>

namespace polyvec {

/// splitmix64: a counter in golden-ratio steps, mixed. Streams of one seed are independent of each other.
class Random {
public:
    explicit Random(std::uint64_t seed, std::uint64_t stream = 0) : state_(mix(seed + step) + mix(stream)) {}

    std::uint64_t next() { return mix(state_ += step); }

    /// In [0, 1), with all 53 bits of a double.
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

private:
    static constexpr std::uint64_t step = 0x9e3779b97f4a7c15u;

    static std::uint64_t mix(std::uint64_t x) {
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        return x ^ x >> 31;
    }

    std::uint64_t state_;
};

}  // namespace polyvec
