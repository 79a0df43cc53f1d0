/// MaxSim of documents of which only centroids are kept: a similarity is a look into the table of a query's products
/// with all centroids, as maxsim_streams.cuh computes them for residuals. For maxsim.cu alone.
///
/// The plain form: a warp a document, a lane a query token. The lanes read 64 consecutive bytes of the table for each
/// document token; a table of 2^14 centroids takes 1 MB, so that these reads stay in L2.
#pragma once

#include "maxsim_streams.cuh"

namespace polyvec {
namespace centroids {

constexpr int warps = 4;  // of a block

/// Scores by Work::place. table: as Docs has centroid_scores, of `centroids` rows a pass.
__global__ void __launch_bounds__(warps * 32)
    score_kernel(const std::int64_t* query_offsets, std::int64_t queries, const std::uint16_t* ids,
                 const std::int64_t* doc_offsets, const __grid_constant__ streams::Work work,
                 const streams::HalfScores* table, std::int64_t centroids, const __grid_constant__ Missing missing,
                 float* out) {
    const std::int64_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (std::int64_t q = blockIdx.y; q < queries; q += gridDim.y) {
        const std::int64_t first = query_offsets[q], tokens = query_offsets[q + 1] - first;
        const streams::HalfScores* const of_query = table + streams::first_pass(first, q) * centroids * 8;
        for (std::int64_t i = blockIdx.x * warps + warp; i < work.count(q); i += std::int64_t(gridDim.x) * warps) {
            const std::int64_t doc = work.id(q, i);
            const bool known = doc >= 0 && doc < work.docs;
            const std::int64_t begin = known ? doc_offsets[doc] : 0, n = known ? doc_offsets[doc + 1] - begin : 0;
            const bool zero = n < missing.full;
            double sum = 0;
            for (std::int64_t pass = 0; pass * streams::rows < tokens; ++pass) {
                const streams::HalfScores* const of_pass = of_query + pass * centroids * 8 + lane % 8;
                float best = -HUGE_VALF;
                for (std::int64_t t = 0; t < n; ++t)  // passes over NaN
                    best = fmaxf(best, value_of(of_pass[std::int64_t(__ldg(ids + begin + t)) * 8].of[lane / 8]));
                if (pass * streams::rows + lane < tokens) sum += zero && !(best > 0) ? 0.0f : best;
            }
            sum = sum_of_warp(sum);
            if (lane != 0) continue;
            const bool nothing = n == 0 && !zero && tokens > 0;
            out[work.place(q, i)] = !known    ? static_cast<float>(NAN)
                                    : nothing ? static_cast<float>(missing.empty)
                                              : static_cast<float>(sum);
        }
    }
}

}  // namespace centroids
}  // namespace polyvec
