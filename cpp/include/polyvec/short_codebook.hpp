/// ShortCodebook: codewords of at most 16 elements as the kernel for short rows takes them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace polyvec {

struct ShortCodebook {
    static constexpr std::int64_t widest = 16;

    /// The codewords (k, d). |x - c|^2 is least where <x, c> - |c|^2 / 2, the offset, is greatest.
    ShortCodebook(const float* rows, std::int64_t k, std::int64_t d)
        : width(d <= 4   ? 4
                : d <= 8 ? 8
                         : widest),
          codewords(k * width),
          offsets(k) {
        for (std::int64_t c = 0; c < k; ++c) {
            const float* row = rows + c * d;
            std::copy_n(row, d, codewords.data() + c * width);
            offsets[c] = static_cast<float>(-0.5 * std::inner_product(row, row + d, row, 0.0));
        }
    }

    std::int64_t width;
    std::vector<float> codewords, offsets;
};

}  // namespace polyvec
