/// IdLists: a list of ids for each query.
#pragma once

#include <cstdint>

#include "polyvec/array.hpp"
#include "polyvec/error.hpp"

namespace polyvec {

/// Query i's list is ids[offsets[i]:offsets[i + 1]], in any order, repeats allowed.
struct IdLists {
    Array offsets, ids;  // (n + 1,), (m,) int64; or both absent

    void validate(const char* op, std::int64_t n, std::int64_t items) const {
        if (!offsets) return;
        require_ndim(op, ids, 1);
        require_dtype(op, ids, DType::i64);
        require_contiguous(op, ids);
        require_offsets(op, offsets, ids.dim(0));
        require_dim(op, offsets, 0, n + 1, "one entry more than there are queries");
        require_ids(op, ids, items);
    }
};

}  // namespace polyvec
