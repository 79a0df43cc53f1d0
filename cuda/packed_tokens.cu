// Float tokens in fewer bits on a GPU, by the rules of cpp/src/packed_tokens.cpp. Codes and the scales of int8 tokens
// have the bits that a CPU gives them; the norms of residual codes are sums of float64 in another order. Memory is the
// limit: a warp a token.
#include <bit>
#include <cmath>

#include "elements.cuh"
#include "launch.cuh"
#include "polyvec/packed_tokens.hpp"
#include "warp.cuh"

namespace polyvec {
namespace {

constexpr unsigned warps = 8;  // of a block

__device__ std::int64_t number_of_warp() {
    return static_cast<std::int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
}

template <class... Params, class... Args>
void launch_warps(const char* op, Cuda cuda, std::int64_t n, void (*kernel)(Params...), const Args&... args) {
    if (n > 0) launch(op, cuda, blocks_for(n, warps), dim3(warps * 32), 0, kernel, args...);
}

/// Four codes a lane at a time, codes = 128 + 127 steps of the largest element. A token that is not finite has the
/// scale NaN.
__global__ void __launch_bounds__(warps * 32) bytes_kernel(const float* tokens, std::int64_t n, std::int64_t d,
                                                           std::int64_t words, unsigned* codes, float* scales) {
    constexpr unsigned zero = 128;
    const std::int64_t t = number_of_warp();
    const unsigned lane = threadIdx.x % 32;
    if (t >= n) return;
    const float* x = tokens + t * d;
    float largest = 0;
    bool finite = true;
    for (std::int64_t i = lane; i < d; i += 32) {
        largest = fmaxf(largest, fabsf(x[i]));
        finite = finite && fabsf(x[i]) < HUGE_VALF;  // and not NaN
    }
    largest = largest_of_warp(largest);
    finite = __all_sync(whole_warp, finite);
    const float steps = largest > 0 ? 127 / largest : 0;
    for (std::int64_t w = lane; w < words; w += 32) {
        unsigned word = 0;
        for (int j = 0; j < 4; ++j) {
            const std::int64_t i = 4 * w + j;
            const float element = i < d && finite ? x[i] : 0;
            // Two roundings, as on a CPU; the integer is in the lowest bits.
            const float rounded = __fadd_rn(element != 0 ? __fmul_rn(element, steps) : 0, 0x1.8p23f);
            word |= ((__float_as_uint(rounded) + zero) & 0xffu) << 8 * j;
        }
        codes[t * words + w] = word;
    }
    if (lane == 0) scales[t] = finite ? largest / 127 : static_cast<float>(NAN);
}

/// Rows of `width` elements of 16 bits, zeros from d on.
template <class Half>
__global__ void halves_kernel(const float* tokens, std::int64_t n, std::int64_t d, std::int64_t width,
                              std::uint16_t* out) {
    for_each_position(n, width, [&](std::int64_t t, std::int64_t i) {
        const float x = i < d ? tokens[t * d + i] : 0;
        out[t * width + i] = std::is_same_v<Half, Float16> ? rounded_to_float16(x).bits : bfloat16_bits(x);
    });
}

/// Tokens of integers or residual codes: scales[t] * (centroid + rounded).
struct Stored {
    unsigned char* codes;
    std::int64_t width, d;
    float* scales;
    const float* centroids;  // null, as what follows, beside int8
    const std::int32_t* centroid_ids;
    const float* weights;
    int bits;

    __device__ int count() const { return bits == 8 ? 0 : 1 << bits; }
    __device__ double centroid(std::int64_t t, std::int64_t i) const {
        return centroids ? static_cast<double>(centroids[centroid_ids[t] * d + i]) : 0;
    }
};

/// A code as it lies in a byte: with its lowest bit first.
__device__ int reversed(int code, int bits) {
    int out = 0;
    for (int b = 0; b < bits; ++b) out |= (code >> b & 1) << (bits - 1 - b);
    return out;
}

/// Of a block: the weights of codes as they lie.
struct Weights {
    double at[16];

    __device__ void fill(const Stored& stored) {
        const int code = static_cast<int>(threadIdx.x);
        if (code < stored.count()) {
            float largest = 0;
            for (int k = 0; k < stored.count(); ++k) largest = fmaxf(largest, fabsf(stored.weights[k]));
            const float unit = largest / 127 > least_weight_unit ? largest / 127 : 1;
            at[reversed(code, stored.bits)] =
                static_cast<double>(unit) * static_cast<double>(rintf(stored.weights[code] / unit));
        }
        __syncthreads();
    }

    __device__ double rounded(const Stored& stored, std::int64_t t, std::int64_t i) const {
        const unsigned char* row = stored.codes + t * stored.width;
        if (stored.bits == 8) return row[i] - 128.0;
        const int per_byte = 8 / stored.bits, shift = 8 - stored.bits * (static_cast<int>(i % per_byte) + 1);
        return at[row[i / per_byte] >> shift & ((1 << stored.bits) - 1)];
    }
};

__global__ void __launch_bounds__(warps * 32) scales_kernel(const __grid_constant__ Stored stored, std::int64_t n) {
    __shared__ Weights weights;
    weights.fill(stored);
    const std::int64_t t = number_of_warp();
    const unsigned lane = threadIdx.x % 32;
    if (t >= n) return;
    double squares = 0;
    for (std::int64_t i = lane; i < stored.d; i += 32) {
        const double x = stored.centroid(t, i) + weights.rounded(stored, t, i);
        squares += x * x;
    }
    const double norm = sqrt(sum_of_warp(squares));
    if (lane == 0) stored.scales[t] = norm > 0 ? static_cast<float>(1 / norm) : 0;
}

/// The code of the weight nearest to each element of token - centroid, four elements a lane at a time.
__global__ void __launch_bounds__(warps * 32)
    compress_kernel(const float* tokens, const __grid_constant__ Stored stored, std::int64_t n) {
    __shared__ Weights weights;
    __shared__ int order[16];  // codes by their weights
    __shared__ float middle[15];
    weights.fill(stored);
    const int thread = static_cast<int>(threadIdx.x), codes = stored.count(), bits = stored.bits;
    if (thread < codes) {
        int rank = 0;
        for (int k = 0; k < codes; ++k)
            rank += stored.weights[k] < stored.weights[thread] ||
                    (stored.weights[k] == stored.weights[thread] && k < thread);
        order[rank] = thread;
    }
    __syncthreads();
    if (thread < codes - 1) middle[thread] = (stored.weights[order[thread]] + stored.weights[order[thread + 1]]) / 2;
    __syncthreads();
    const std::int64_t t = number_of_warp(), d = stored.d;
    const unsigned lane = threadIdx.x % 32;
    if (t >= n) return;
    const int per_byte = 8 / bits;
    double squares = 0, decoded = 0;
    for (std::int64_t first = 4 * lane; first < d; first += 128) {
        unsigned bytes = 0;
        for (int j = 0; j < 4 && first + j < d; ++j) {
            const double x = tokens[t * d + first + j], centroid = stored.centroid(t, first + j);
            const auto residual = static_cast<float>(x - centroid);
            int rank = 0;
            for (int k = 0; k < codes - 1; ++k) rank += residual > middle[k];
            const int code = reversed(order[rank], bits);
            bytes |= static_cast<unsigned>(code) << (8 * (j / per_byte) + 8 - bits * (j % per_byte + 1));
            squares += x * x;
            decoded += (centroid + weights.at[code]) * (centroid + weights.at[code]);
        }
        unsigned char* to = stored.codes + t * stored.width + first / per_byte;
        for (int b = 0; b < 4 / per_byte; ++b) to[b] = static_cast<unsigned char>(bytes >> 8 * b);
    }
    squares = sum_of_warp(squares);
    const double norm = sqrt(sum_of_warp(decoded));
    if (lane == 0) stored.scales[t] = norm > 0 ? static_cast<float>(sqrt(squares) / norm) : 0;
}

/// A warp a document.
__global__ void __launch_bounds__(warps * 32)
    bounds_kernel(const float* tokens, const __grid_constant__ Stored stored, const std::int64_t* offsets,
                  std::int64_t docs, float* bounds) {
    __shared__ Weights weights;
    weights.fill(stored);
    const std::int64_t doc = number_of_warp();
    const unsigned lane = threadIdx.x % 32;
    if (doc >= docs) return;
    double largest[3] = {};
    for (std::int64_t t = offsets[doc]; t < offsets[doc + 1]; ++t) {
        const double scale = stored.scales[t];
        double token = 0, lost = 0, centroid = 0, rounded = 0;
        for (std::int64_t i = lane; i < stored.d; i += 32) {
            const double x = tokens[t * stored.d + i], c = scale * stored.centroid(t, i),
                         w = scale * weights.rounded(stored, t, i);
            token += x * x;
            lost += (x - c - w) * (x - c - w);
            centroid += c * c;
            rounded += w * w;
        }
        token = sqrt(sum_of_warp(token)), lost = sqrt(sum_of_warp(lost));
        centroid = sqrt(sum_of_warp(centroid)), rounded = sqrt(sum_of_warp(rounded));
        const double found[] = {lost, rounded, token + centroid + rounded};
        for (int k = 0; k < 3; ++k) largest[k] = found[k] > largest[k] || isnan(found[k]) ? found[k] : largest[k];
    }
    if (lane == 0)
        for (int k = 0; k < 3; ++k)
            bounds[3 * doc + k] = nextafterf(static_cast<float>(largest[k] * (1 + 0x1p-30)), HUGE_VALF);
}

__global__ void __launch_bounds__(warps * 32)
    decode_bytes_kernel(const __grid_constant__ Stored stored, std::int64_t n, float* out) {
    __shared__ Weights weights;
    weights.fill(stored);
    const std::int64_t t = number_of_warp();
    if (t >= n) return;
    for (std::int64_t i = threadIdx.x % 32; i < stored.d; i += 32) {
        const double token = stored.centroid(t, i) + weights.rounded(stored, t, i);
        out[t * stored.d + i] = static_cast<float>(stored.scales[t] * token);
    }
}

/// Rows of `width` elements of 16 bits.
template <class Half>
__global__ void decode_halves_kernel(const Half* tokens, std::int64_t n, std::int64_t d, std::int64_t width,
                                     float* out) {
    for_each_position(n, d, [&](std::int64_t t, std::int64_t i) { out[t * d + i] = value_of(tokens[t * width + i]); });
}

__global__ void decode_centroids_kernel(const std::uint16_t* tokens, const float* centroids, std::int64_t n,
                                        std::int64_t d, float* out) {
    for_each_position(n, d, [&](std::int64_t t, std::int64_t i) { out[t * d + i] = centroids[tokens[t] * d + i]; });
}

// Weights as quantiles: the elements of some residuals are put in order.

/// Elements of every step-th token - centroid, and infinity behind the last.
__global__ void residuals_kernel(const float* tokens, const std::int32_t* centroid_ids, const float* centroids,
                                 std::int64_t step, std::int64_t d, std::int64_t n, std::int64_t padded, float* out) {
    for_each_position(padded, 1, [&](std::int64_t at, std::int64_t) {
        const std::int64_t t = d > 0 ? at / d * step : 0, i = d > 0 ? at % d : 0;
        out[at] = at < n ? tokens[t * d + i] - centroids[centroid_ids[t] * d + i] : static_cast<float>(HUGE_VALF);
    });
}

/// One step of a bitonic sort.
__global__ void sort_kernel(float* x, std::int64_t pairs, std::int64_t size, std::int64_t distance) {
    for_each_position(pairs, 1, [&](std::int64_t i, std::int64_t) {
        const std::int64_t a = i / distance * 2 * distance + i % distance, b = a + distance;
        const float low = x[a], high = x[b];
        if ((low > high) != ((a & size) != 0)) {
            x[a] = high;
            x[b] = low;
        }
    });
}

/// Of n > 0 elements in order.
__global__ void quantiles_kernel(const float* x, std::int64_t n, float* weights, std::int64_t buckets) {
    for_each_position(buckets, 1, [&](std::int64_t k, std::int64_t) {
        const double at =
            static_cast<double>(n - 1) * static_cast<double>(2 * k + 1) / static_cast<double>(2 * buckets);
        const auto below = static_cast<std::int64_t>(at);
        const double low = x[below], high = x[below + 1 < n ? below + 1 : n - 1];
        const double more = __dmul_rn(at - static_cast<double>(below), high - low);  // two roundings, as on a CPU
        weights[k] = static_cast<float>(__dadd_rn(low, more));
    });
}

Stored stored_of(const StoredTokens& docs, std::int64_t d) {
    return {static_cast<unsigned char*>(docs.tokens.data),
            docs.tokens.dim(1),
            d,
            static_cast<float*>(docs.scales.data),
            docs.centroids.as<const float>(),
            docs.centroid_ids.as<const std::int32_t>(),
            docs.weights.as<const float>(),
            !docs.centroids             ? 8
            : docs.weights.dim(0) == 16 ? 4
                                        : 2};
}

}  // namespace

void run(const MaxsimPack& op, Cuda cuda) {
    const std::int64_t n = op.tokens.dim(0), d = op.tokens.dim(1), width = op.codes.dim(1);
    const auto* tokens = op.tokens.as<const float>();
    if (op.codes.dtype == DType::u8) {
        launch_warps(op.op, cuda, n, bytes_kernel, tokens, n, d, width / 4, static_cast<unsigned*>(op.codes.data),
                     op.scales.as<float>());
    } else {
        launch_rows(op.op, cuda, n, width,
                    op.codes.dtype == DType::f16 ? halves_kernel<Float16> : halves_kernel<BFloat16>, tokens, n, d,
                    width, op.codes.as<std::uint16_t>());
    }
}

void run(const MaxsimResidualScales& op, Cuda cuda) {
    const std::int64_t n = op.docs.tokens.dim(0);
    launch_warps(op.op, cuda, n, scales_kernel, stored_of(op.docs, op.docs.centroids.dim(1)), n);
}

void run(const MaxsimBuckets& op, Cuda cuda) {
    constexpr std::int64_t most = 1 << 20;  // elements sampled
    const std::int64_t d = op.tokens.dim(1), step = op.tokens.dim(0) * d / most + 1,
                       n = (op.tokens.dim(0) + step - 1) / step * d, buckets = op.weights.dim(0);
    if (n == 0) return fill_with_zeros(op.op, cuda, op.weights.as<float>(), buckets);
    const auto padded = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(n)));
    const Scratch<float> sorted(op.op, cuda, padded);
    launch_rows(op.op, cuda, padded, 1, residuals_kernel, op.tokens.as<const float>(),
                op.centroid_ids.as<const std::int32_t>(), op.centroids.as<const float>(), step, d, n, padded,
                sorted.get());
    for (std::int64_t size = 2; size <= padded; size *= 2)
        for (std::int64_t distance = size / 2; distance > 0; distance /= 2)
            launch_rows(op.op, cuda, padded / 2, 1, sort_kernel, sorted.get(), padded / 2, size, distance);
    launch_rows(op.op, cuda, buckets, 1, quantiles_kernel, sorted.get(), n, op.weights.as<float>(), buckets);
}

void run(const MaxsimCompress& op, Cuda cuda) {
    const std::int64_t n = op.tokens.dim(0);
    launch_warps(op.op, cuda, n, compress_kernel, op.tokens.as<const float>(), stored_of(op.docs, op.tokens.dim(1)), n);
}

void run(const MaxsimBounds& op, Cuda cuda) {
    const std::int64_t docs = op.docs.size();
    launch_warps(op.op, cuda, docs, bounds_kernel, op.tokens.as<const float>(), stored_of(op.docs, op.tokens.dim(1)),
                 op.docs.offsets.as<const std::int64_t>(), docs, op.bounds.as<float>());
}

void run(const MaxsimDecode& op, Cuda cuda) {
    const StoredTokens& docs = op.docs;
    const std::int64_t n = op.out.dim(0), d = op.out.dim(1), width = docs.tokens.dim(1);
    float* out = op.out.as<float>();
    switch (docs.format()) {
        case StoredTokens::centroid:
            return launch_rows(op.op, cuda, n, d, decode_centroids_kernel, docs.tokens.as<const std::uint16_t>(),
                               docs.centroids.as<const float>(), n, d, out);
        case StoredTokens::bfloat16:
            return launch_rows(op.op, cuda, n, d, decode_halves_kernel<BFloat16>,
                               static_cast<const BFloat16*>(docs.tokens.data), n, d, width, out);
        case StoredTokens::float16:
            return launch_rows(op.op, cuda, n, d, decode_halves_kernel<Float16>,
                               static_cast<const Float16*>(docs.tokens.data), n, d, width, out);
        default:
            launch_warps(op.op, cuda, n, decode_bytes_kernel, stored_of(docs, d), n, out);
    }
}

}  // namespace polyvec
