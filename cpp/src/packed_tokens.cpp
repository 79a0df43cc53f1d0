#include "polyvec/packed_tokens.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

#include "polyvec/narrow.hpp"
#include "polyvec/parallel.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr std::int64_t token_block = 1 << 10;  // of a piece of packing

/// Reads stored tokens of integers or residual codes: scales[t] * (centroid + rounded). The queries are rounded to
/// steps of their own where they meet `rounded`.
class Decoder {
public:
    explicit Decoder(const StoredTokens& docs)
        : docs_(docs), width_(docs.tokens.dim(1)), d_(docs.centroids ? docs.centroids.dim(1) : 0) {
        if (!docs.weights) return;
        const std::int64_t codes = docs.weights.dim(0);
        const auto* weights = docs.weights.as<const float>();
        const float unit = weight_unit(weights, codes);
        bits_ = codes == 16 ? 4 : 2;
        for (int stored = 0; stored < codes; ++stored) {
            int code = 0;
            for (int b = 0; b < bits_; ++b) code |= (stored >> b & 1) << (bits_ - 1 - b);
            weight_[stored] = static_cast<double>(unit) * static_cast<double>(std::lrint(weights[code] / unit));
        }
    }

    double centroid(std::int64_t t, std::int64_t i) const {
        if (bits_ == 8) return 0;
        return docs_.centroids.as<const float>()[docs_.centroid_ids.as<const std::int32_t>()[t] * d_ + i];
    }

    double rounded(std::int64_t t, std::int64_t i) const {
        const auto* row = docs_.tokens.as<const unsigned char>() + t * width_;
        if (bits_ == 8) return row[i] - 128.0;
        const int per_byte = 8 / bits_, shift = 8 - bits_ * (static_cast<int>(i % per_byte) + 1);
        return weight_[row[i / per_byte] >> shift & ((1 << bits_) - 1)];
    }

    /// |centroid + rounded|
    double norm(std::int64_t t, std::int64_t d) const {
        double squares = 0;
        for (std::int64_t i = 0; i < d; ++i) {
            const double x = centroid(t, i) + rounded(t, i);
            squares += x * x;
        }
        return std::sqrt(squares);
    }

private:
    const StoredTokens& docs_;
    std::int64_t width_, d_;
    int bits_ = 8;
    double weight_[16];  // of a code as stored, its lowest bit first
};

}  // namespace

void run(const MaxsimPack& op, Cpu cpu) {
    const std::int64_t d = op.tokens.dim(1), width = op.codes.dim(1);
    parallel_for(op.tokens.dim(0), token_block, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t t = begin; t < end; ++t) {
            const float* x = op.tokens.as<const float>() + t * d;
            if (op.codes.dtype == DType::u8) {
                unsigned char* codes = op.codes.as<unsigned char>() + t * width;
                op.scales.as<float>()[t] = to_int8<128>(x, d, codes);
                std::fill(codes + d, codes + width, static_cast<unsigned char>(128));
            } else {
                const bool half = op.codes.dtype == DType::f16;
                const float limit = half ? 65520.0f : 0x1.ffp127f;
                for (std::int64_t i = 0; i < d; ++i)
                    require(std::fabs(x[i]) < limit, MaxsimPack::op, "docs must be at most ",
                            half ? "65504 in float16" : "3.38953e+38 in bfloat16", ", got ", x[i]);
                auto* codes = op.codes.as<std::uint16_t>() + t * width;
                std::transform(x, x + d, codes, half ? to_float16 : to_bfloat16);
                std::fill(codes + d, codes + width, std::uint16_t{0});
            }
        }
    });
}

void run(const MaxsimResidualScales& op, Cpu cpu) {
    const Decoder decoder(op.docs);
    const std::int64_t d = op.docs.centroids.dim(1);
    parallel_for(op.docs.tokens.dim(0), token_block, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t t = begin; t < end; ++t) {
            const double norm = decoder.norm(t, d);
            op.docs.scales.as<float>()[t] = norm > 0 ? static_cast<float>(1 / norm) : 0;
        }
    });
}

void run(const MaxsimBuckets& op, Cpu) {
    constexpr std::int64_t most = 1 << 20;  // elements sampled
    const std::int64_t n = op.tokens.dim(0), d = op.tokens.dim(1), buckets = op.weights.dim(0);
    auto* weights = op.weights.as<float>();
    std::fill_n(weights, buckets, 0.0f);
    std::vector<float> residuals;
    for (std::int64_t t = 0; t < n; t += n * d / most + 1) {
        const float* centroid = op.centroids.as<const float>() + op.centroid_ids.as<const std::int32_t>()[t] * d;
        for (std::int64_t i = 0; i < d; ++i) residuals.push_back(op.tokens.as<const float>()[t * d + i] - centroid[i]);
    }
    if (residuals.empty()) return;
    std::sort(residuals.begin(), residuals.end());
    const std::int64_t last = residuals.size() - 1;
    for (std::int64_t k = 0; k < buckets; ++k) {
        const double at = static_cast<double>(last) * (2 * k + 1) / (2 * buckets);
        const auto below = static_cast<std::int64_t>(at);
        const double low = residuals[below], high = residuals[std::min(below + 1, last)];
        weights[k] = static_cast<float>(low + (at - below) * (high - low));
    }
}

void run(const MaxsimCompress& op, Cpu cpu) {
    const StoredTokens& docs = op.docs;
    const Decoder decoder(docs);
    const std::int64_t d = op.tokens.dim(1), width = docs.tokens.dim(1), codes = docs.weights.dim(0);
    const auto* weights = docs.weights.as<const float>();
    const int bits = codes == 16 ? 4 : 2, per_byte = 8 / bits;
    int order[16];  // codes by their weights
    float middle[15];
    std::iota(order, order + codes, 0);
    std::sort(order, order + codes, [&](int a, int b) { return weights[a] < weights[b]; });
    for (int k = 0; k < codes - 1; ++k) middle[k] = (weights[order[k]] + weights[order[k + 1]]) / 2;
    parallel_for(docs.tokens.dim(0), token_block, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t t = begin; t < end; ++t) {
            const float* token = op.tokens.as<const float>() + t * d;
            auto* row = docs.tokens.as<unsigned char>() + t * width;
            std::fill_n(row, width, static_cast<unsigned char>(0));
            double squares = 0;
            for (std::int64_t i = 0; i < d; ++i) {
                const auto residual = static_cast<float>(token[i] - decoder.centroid(t, i));
                int rank = 0;
                for (int k = 0; k < codes - 1; ++k) rank += residual > middle[k];
                const int code = order[rank];
                const int first = bits * static_cast<int>(i % per_byte);
                for (int b = 0; b < bits; ++b)
                    row[i / per_byte] |= static_cast<unsigned char>((code >> b & 1) << (7 - first - b));
                squares += static_cast<double>(token[i]) * token[i];
            }
            const double norm = decoder.norm(t, d);
            docs.scales.as<float>()[t] = norm > 0 ? static_cast<float>(std::sqrt(squares) / norm) : 0;
        }
    });
}

void run(const MaxsimDecode& op, Cpu cpu) {
    const StoredTokens& docs = op.docs;
    const std::int64_t d = op.out.dim(1), width = docs.tokens.dim(1);
    const bool bytes = docs.tokens.dtype == DType::u8;
    const DistanceKernels& rows = *kernels().distance;
    const HalfKernels& half = docs.format() == StoredTokens::bfloat16 ? rows.bf16_by_slot : rows.f16_by_slot;
    const Decoder decoder(docs);
    parallel_for(op.out.dim(0), token_block, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t t = begin; t < end; ++t) {
            float* out = op.out.as<float>() + t * d;
            const auto* halves = docs.tokens.as<const std::uint16_t>() + t * width;
            if (bytes) {
                const double scale = docs.scales.as<const float>()[t];
                for (std::int64_t i = 0; i < d; ++i)
                    out[i] = static_cast<float>(scale * (decoder.centroid(t, i) + decoder.rounded(t, i)));
            } else if (docs.format() == StoredTokens::centroid) {
                std::copy_n(docs.centroids.as<const float>() + *halves * d, d, out);
            } else {
                half.widen(halves, static_cast<std::size_t>(d), out);
            }
        }
    });
}

void run(const MaxsimBounds& op, Cpu cpu) {
    const Decoder decoder(op.docs);
    const std::int64_t d = op.tokens.dim(1);
    const auto round_up = [](double x) { return std::nextafter(static_cast<float>(x * (1 + 0x1p-30)), HUGE_VALF); };
    parallel_for(op.docs.size(), 16, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
            double largest[3] = {};
            for (std::int64_t t = op.docs.begin(i); t < op.docs.begin(i + 1); ++t) {
                const float* token = op.tokens.as<const float>() + t * d;
                const double scale = op.docs.scales.as<const float>()[t];
                double token_squares = 0, lost = 0, centroid = 0, rounded = 0;
                for (std::int64_t j = 0; j < d; ++j) {
                    const double x = token[j], c = scale * decoder.centroid(t, j), w = scale * decoder.rounded(t, j);
                    token_squares += x * x;
                    lost += (x - c - w) * (x - c - w);
                    centroid += c * c;
                    rounded += w * w;
                }
                const double size = std::sqrt(token_squares) + std::sqrt(centroid) + std::sqrt(rounded);
                largest[0] = std::max(largest[0], std::sqrt(lost));
                largest[1] = std::max(largest[1], std::sqrt(rounded));
                largest[2] = std::max(largest[2], size);
            }
            std::transform(largest, largest + 3, op.bounds.as<float>() + 3 * i, round_up);
        }
    });
}

}  // namespace polyvec
