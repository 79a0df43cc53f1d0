/// Array: a view of memory that somebody else owns. The only form in which data reaches an op.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace polyvec {

/// Elements of int8 vectors whose products sum within 31 bits.
constexpr std::int64_t most_int8 = 1 << 17;

enum class DType : std::uint8_t { f64, f32, f16, bf16, i64, i32, i8, u64, u32, u16, u8, boolean };

constexpr std::size_t size_of(DType dtype) {
    constexpr std::size_t sizes[] = {8, 4, 2, 2, 8, 4, 1, 8, 4, 2, 1, 1};
    return sizes[static_cast<std::size_t>(dtype)];
}

/// The names that users read in messages: numpy's and torch's own.
constexpr const char* name_of(DType dtype) {
    constexpr const char* names[] = {"float64", "float32", "float16", "bfloat16", "int64", "int32",
                                     "int8",    "uint64",  "uint32",  "uint16",   "uint8", "bool"};
    return names[static_cast<std::size_t>(dtype)];
}

enum class Device : std::uint8_t { cpu, cuda };

constexpr const char* name_of(Device device) {
    return device == Device::cpu ? "cpu" : "cuda";
}

/// Row-major memory with a shape and strides in elements. `name` is the argument's name in messages.
/// A default-constructed Array stands for an argument that was not given.
struct Array {
    static constexpr int max_ndim = 8;

    const char* name = "";
    void* data = nullptr;
    DType dtype = DType::f32;
    Device device = Device::cpu;
    int device_index = 0;
    int ndim = -1;
    bool writable = false;
    std::array<std::int64_t, max_ndim> shape{};
    std::array<std::int64_t, max_ndim> strides{};

    explicit operator bool() const { return ndim >= 0; }

    /// Length of axis `i`; negative axes count from the end.
    std::int64_t dim(int i) const { return shape[static_cast<std::size_t>(i < 0 ? i + ndim : i)]; }
    std::int64_t stride(int i) const { return strides[static_cast<std::size_t>(i < 0 ? i + ndim : i)]; }

    std::int64_t size() const {
        std::int64_t n = 1;
        for (int i = 0; i < ndim; ++i) n *= dim(i);
        return n;
    }

    /// Whether the last `axes` axes lie densely in row-major order (axes of length 1 may have any stride).
    bool dense(int axes) const {
        if (size() == 0) return true;
        std::int64_t expected = 1;
        for (int i = ndim - 1; i >= ndim - axes; --i) {
            if (dim(i) != 1 && stride(i) != expected) return false;
            expected *= dim(i);
        }
        return true;
    }
    bool contiguous() const { return dense(ndim); }

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }

    /// What messages take (error.hpp): spelt out where one is thrown, and not by every check.
    struct ShapeText {
        const Array& array;
    };
    ShapeText shape_text() const { return {*this}; }
};

}  // namespace polyvec
