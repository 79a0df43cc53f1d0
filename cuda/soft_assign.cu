// Differentiable product quantisation on a GPU, in the plain form: the probabilities of all codewords are kept for some
// rows at a time. Sums over rows run in their order.
#include <cmath>
#include <limits>

#include "launch.cuh"
#include "polyvec/soft_assign.hpp"
#include "warp.cuh"

namespace polyvec {
namespace {

constexpr unsigned warps = 4;  // of a block

/// Some rows, and the codewords of m subspaces, k of each.
template <class T>
struct Pieces {
    const T *x, *codebooks;
    std::int64_t rows, m, k, dsub;
    T scale;  // 1 / temperature

    __device__ std::int64_t width() const { return m * dsub; }
    __device__ const T* piece(const T* of, std::int64_t i, std::int64_t s) const { return of + i * width() + s * dsub; }
    __device__ const T* codeword(std::int64_t s, std::int64_t c) const { return codebooks + (s * k + c) * dsub; }
    __device__ T distance(const T* u, std::int64_t s, std::int64_t c) const {
        const T* const codeword = this->codeword(s, c);
        T square = 0;
        for (std::int64_t j = 0; j < dsub; ++j) square = fma(u[j] - codeword[j], u[j] - codeword[j], square);
        return square;
    }
};

/// Calls f(i, s, lane) for the row and the subspace of the calling thread's warp.
template <class T, class F>
__device__ void for_piece_of_warp(const Pieces<T>& pieces, F f) {
    const std::int64_t at = std::int64_t(blockIdx.x) * warps + threadIdx.x / 32;
    if (at < pieces.rows * pieces.m) f(at / pieces.m, at % pieces.m, std::int64_t(threadIdx.x % 32));
}

/// p (rows, m, k) and, unless null, ids (rows, m).
template <class T>
__global__ void __launch_bounds__(warps * 32)
    probability_kernel(const __grid_constant__ Pieces<T> pieces, T* p, std::int64_t* ids) {
    for_piece_of_warp(pieces, [&](std::int64_t i, std::int64_t s, std::int64_t lane) {
        const T* const u = pieces.piece(pieces.x, i, s);
        T* const of_piece = p + (i * pieces.m + s) * pieces.k;
        T least = static_cast<T>(HUGE_VAL);
        std::int64_t id = pieces.k;
        for (std::int64_t c = lane; c < pieces.k; c += 32) {
            of_piece[c] = pieces.distance(u, s, c);
            if (of_piece[c] < least) least = of_piece[c], id = c;
        }
        for (int other = 1; other < 32; other *= 2) {
            const T of_other = __shfl_xor_sync(whole_warp, least, other);
            const std::int64_t id_of_other = __shfl_xor_sync(whole_warp, id, other);
            if (of_other < least || (of_other == least && id_of_other < id)) least = of_other, id = id_of_other;
        }
        T sum = 0;
        for (std::int64_t c = lane; c < pieces.k; c += 32)
            sum += of_piece[c] = exp((least - of_piece[c]) * pieces.scale);
        sum = sum_of_warp(sum);
        for (std::int64_t c = lane; c < pieces.k; c += 32) of_piece[c] /= sum;
        if (ids && lane == 0) ids[i * pieces.m + s] = id < pieces.k ? id : 0;
    });
}

/// The codewords of ids; the means under p where ids are null.
template <class T>
__global__ void value_kernel(const __grid_constant__ Pieces<T> pieces, const T* p, const std::int64_t* ids, T* out) {
    for_each_position(pieces.rows, pieces.width(), [&](std::int64_t i, std::int64_t at) {
        const std::int64_t s = at / pieces.dsub, j = at % pieces.dsub, piece = i * pieces.m + s;
        T value = 0;
        if (ids) {
            value = pieces.codeword(s, ids[piece])[j];
        } else {
            for (std::int64_t c = 0; c < pieces.k; ++c)
                value = fma(p[piece * pieces.k + c], pieces.codeword(s, c)[j], value);
        }
        out[i * pieces.width() + at] = value;
    });
}

/// ds (rows, m, k): of the negative distances.
template <class T>
__global__ void __launch_bounds__(warps * 32)
    distance_gradient_kernel(const __grid_constant__ Pieces<T> pieces, const T* grad, const T* p, T* ds) {
    for_piece_of_warp(pieces, [&](std::int64_t i, std::int64_t s, std::int64_t lane) {
        const T* const g = pieces.piece(grad, i, s);
        const std::int64_t first = (i * pieces.m + s) * pieces.k;
        T mean = 0;
        for (std::int64_t c = lane; c < pieces.k; c += 32) {
            const T* const codeword = pieces.codeword(s, c);
            T dp = 0;
            for (std::int64_t j = 0; j < pieces.dsub; ++j) dp = fma(g[j], codeword[j], dp);
            ds[first + c] = dp;
            mean = fma(p[first + c], dp, mean);
        }
        mean = sum_of_warp(mean);
        for (std::int64_t c = lane; c < pieces.k; c += 32)
            ds[first + c] = p[first + c] * (ds[first + c] - mean) * pieces.scale;
    });
}

template <class T>
__global__ void dx_kernel(const __grid_constant__ Pieces<T> pieces, const T* ds, T* dx) {
    for_each_position(pieces.rows, pieces.width(), [&](std::int64_t i, std::int64_t at) {
        const std::int64_t s = at / pieces.dsub, j = at % pieces.dsub;
        const T* const of_piece = ds + (i * pieces.m + s) * pieces.k;
        T sum = 0;
        for (std::int64_t c = 0; c < pieces.k; ++c) sum = fma(of_piece[c], pieces.codeword(s, c)[j], sum);
        dx[i * pieces.width() + at] = 2 * sum;
    });
}

/// Adds these rows' part, or writes it. w: of the value: 1 at ids unless these are null, else p.
template <class T>
__global__ void dcodebooks_kernel(const __grid_constant__ Pieces<T> pieces, const T* grad, const T* p, const T* ds,
                                  const std::int64_t* ids, T* dcodebooks, bool add) {
    for_each_position(pieces.m * pieces.k, pieces.dsub, [&](std::int64_t codeword, std::int64_t j) {
        const std::int64_t s = codeword / pieces.k, c = codeword % pieces.k, at = codeword * pieces.dsub + j;
        T sum = add ? dcodebooks[at] : 0;
        for (std::int64_t i = 0; i < pieces.rows; ++i) {
            const std::int64_t piece = i * pieces.m + s;
            const T w = ids ? static_cast<T>(ids[piece] == c) : p[piece * pieces.k + c];
            sum = fma(w, pieces.piece(grad, i, s)[j], sum);
            sum = fma(2 * ds[piece * pieces.k + c], pieces.piece(pieces.x, i, s)[j] - pieces.codebooks[at], sum);
        }
        dcodebooks[at] = sum;
    });
}

/// Calls f with the rows of x that share the scratch memory, and the first one's number.
template <class T, class Op, class F>
void in_slices(const Op& op, F f) {
    constexpr std::int64_t most = 1 << 26;  // probabilities held at a time
    const std::int64_t n = op.x.dim(0), m = op.codebooks.dim(0), k = op.codebooks.dim(1), dsub = op.codebooks.dim(2);
    constexpr double largest = std::numeric_limits<T>::max();  // of a scale: a distance of 0 has the exponent 0
    const std::int64_t step =
        std::clamp<std::int64_t>(most / std::max<std::int64_t>(1, m * k), 1, std::max<std::int64_t>(1, n));
    for (std::int64_t first = 0; first < n; first += step)
        f(Pieces<T>{op.x.template as<const T>() + first * m * dsub, op.codebooks.template as<const T>(),
                    std::min(step, n - first), m, k, dsub, static_cast<T>(std::min(1 / op.temperature, largest))},
          first);
}

template <class T, class... Params, class... Args>
void launch_pieces(const char* op, Cuda cuda, const Pieces<T>& pieces, void (*kernel)(Params...), const Args&... args) {
    if (const std::int64_t n = pieces.rows * pieces.m; n > 0)
        launch(op, cuda, blocks_for(n, warps), dim3(warps * 32), 0, kernel, pieces, args...);
}

template <class T>
void assign(const SoftAssign& op, Cuda cuda) {
    in_slices<T>(op, [&](const Pieces<T>& pieces, std::int64_t first) {
        const Scratch<T> p(op.op, cuda, pieces.rows * pieces.m * pieces.k);
        std::int64_t* const ids = op.ids.as<std::int64_t>() + first * pieces.m;
        launch_pieces(op.op, cuda, pieces, probability_kernel<T>, p.get(), ids);
        const std::int64_t width = op.x.dim(1);
        launch_rows(op.op, cuda, pieces.rows, width, value_kernel<T>, pieces, p.get(),
                    op.hard ? ids : static_cast<std::int64_t*>(nullptr), op.out.as<T>() + first * width);
    });
}

template <class T>
void gradient(const SoftAssignGradient& op, Cuda cuda) {
    if (op.dcodebooks && op.x.dim(0) == 0) fill_with_zeros(op.op, cuda, op.dcodebooks.as<T>(), op.dcodebooks.size());
    in_slices<T>(op, [&](const Pieces<T>& pieces, std::int64_t first) {
        const std::int64_t n = pieces.rows * pieces.m * pieces.k, width = op.x.dim(1);
        const Scratch<T> p(op.op, cuda, n), ds(op.op, cuda, n);
        const Scratch<std::int64_t> ids(op.op, cuda, op.hard ? pieces.rows * pieces.m : 0);
        const T* const grad = op.grad.as<const T>() + first * width;
        launch_pieces(op.op, cuda, pieces, probability_kernel<T>, p.get(), ids.get());
        launch_pieces(op.op, cuda, pieces, distance_gradient_kernel<T>, grad, p.get(), ds.get());
        if (op.dx)
            launch_rows(op.op, cuda, pieces.rows, width, dx_kernel<T>, pieces, ds.get(), op.dx.as<T>() + first * width);
        if (op.dcodebooks)
            launch_rows(op.op, cuda, pieces.m * pieces.k, pieces.dsub, dcodebooks_kernel<T>, pieces, grad, p.get(),
                        ds.get(), ids.get(), op.dcodebooks.as<T>(), first > 0);
    });
}

}  // namespace

void run(const SoftAssign& op, Cuda cuda) {
    op.x.dtype == DType::f32 ? assign<float>(op, cuda) : assign<double>(op, cuda);
}

void run(const SoftAssignGradient& op, Cuda cuda) {
    op.x.dtype == DType::f32 ? gradient<float>(op, cuda) : gradient<double>(op, cuda);
}

}  // namespace polyvec
