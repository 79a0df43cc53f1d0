/// Codes of two to four bits an element: what walks of a frozen graph compare.
///
/// A vector's residual from the centre of all vectors is rotated by a fast transform, so that its elements are about
/// normal whatever the data, and each is rounded to an odd multiple of half the step that suits its length, with two
/// bits to -3, -1, 1 or 3. The scale of the rounded vector makes its product with the residual exact, so that estimates
/// are right on average. The sign is the high bit: where a code does not fit a cache line, an estimate of one bit tells
/// most slots that a walk has no use for.
/// Paper: RaBitQ (Gao and Long 2024), sections 3.1 and 3.2; for more bits Gao et al. 2025.
#pragma once

#include "hnsw_graph.hpp"

namespace polyvec::hnsw {

/// Bytes of scratch for a query's code.
std::int64_t bit_query_bytes(const HnswParams& params);

/// A query's code. Scratch: `rotated` (dim,), and `bytes`, bit_query_bytes on a cache line.
BitQuery bit_query(const Graph& graph, const float* query, float* rotated, std::uint8_t* bytes);

}  // namespace polyvec::hnsw
