/// Buffer: scratch memory for kernels.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace polyvec {

/// n elements, not initialised, from the start of a cache line on: kernels load panels by whole registers.
template <class T>
class Buffer {
public:
    explicit Buffer(std::size_t n) : data_(static_cast<T*>(::operator new(n * sizeof(T), alignment))) {}

    T* data() const { return data_.get(); }

private:
    static constexpr std::align_val_t alignment{64};

    struct Free {
        void operator()(T* data) const { ::operator delete(data, alignment); }
    };
    std::unique_ptr<T, Free> data_;
};

}  // namespace polyvec
