/// TokenSets: many sets of vectors, one after the other.
#pragma once

#include <cstdint>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"

namespace polyvec {

struct TokenSets {
    Array tokens;   // (T, d), contiguous
    Array offsets;  // (n + 1,) int64: set i is rows offsets[i] .. offsets[i + 1]

    std::int64_t size() const { return offsets.dim(0) - 1; }
    std::int64_t dim() const { return tokens.dim(1); }
    std::int64_t begin(std::int64_t i) const { return offsets.as<const std::int64_t>()[i]; }
    std::int64_t length(std::int64_t i) const { return begin(i + 1) - begin(i); }

    template <class T>
    const T* set(std::int64_t i) const {
        return tokens.as<const T>() + begin(i) * dim();
    }

    void validate(const char* op) const {
        require_float_or_half(op, tokens);
        require_ndim(op, tokens, 2);
        require_contiguous(op, tokens);
        require_offsets(op, offsets, tokens.dim(0));
    }
};

}  // namespace polyvec
