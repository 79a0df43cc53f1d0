/// ShortCodebook: codewords of at most 16 elements as the kernel for short rows takes them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tables.hpp"

namespace polyvec {

class ShortCodebook {
public:
    static constexpr std::int64_t widest = 16;

    /// The codewords (k, d), which must stay where they are. |x - c|^2 is least where <x, c> - |c|^2 / 2, the offset,
    /// is greatest.
    ShortCodebook(const float* rows, std::int64_t k, std::int64_t d)
        : width(d <= 4   ? 4
                : d <= 8 ? 8
                         : widest),
          codewords(rows),
          offsets(k) {
        if (d < width) {
            padded_.resize(k * width);
            for (std::int64_t c = 0; c < k; ++c) std::copy_n(rows + c * d, d, padded_.data() + c * width);
            codewords = padded_.data();
        }
        kernels().quantize->half_squares(codewords, static_cast<std::size_t>(k), static_cast<std::size_t>(width),
                                         offsets.data());
    }

    std::int64_t width;
    const float* codewords;
    std::vector<float> offsets;

private:
    std::vector<float> padded_;
};

}  // namespace polyvec
