/// Scratch memory for kernels: on a cache-line boundary, not initialised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace polyvec {

struct AlignedDelete {
    static constexpr std::align_val_t boundary{64};
    void operator()(void* p) const { ::operator delete(p, boundary); }
};

template <class T>
using Aligned = std::unique_ptr<T[], AlignedDelete>;

template <class T>
Aligned<T> aligned(std::int64_t n) {
    return Aligned<T>(
        static_cast<T*>(::operator new(static_cast<std::size_t>(n) * sizeof(T), AlignedDelete::boundary)));
}

}  // namespace polyvec
