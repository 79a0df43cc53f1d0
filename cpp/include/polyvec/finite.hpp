/// NaN and Inf are refused wherever vectors are indexed.
#pragma once

#include <cstdint>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"

namespace polyvec {

/// The first row of contiguous `x` (n, ...) that holds a NaN or an Inf, or -1. Any float dtype, or the bits of bfloat16
/// as uint16.
std::int64_t first_nonfinite_row(const Array& x, Cpu cpu);

}  // namespace polyvec
