/// The error contract: "<public function>: <argument> must <rule>, got <value>".
///
///     std::invalid_argument -> ValueError         shape, range, a value that is not allowed
///     polyvec::TypeError    -> TypeError          dtype, device
///     std::out_of_range     -> IndexError         an id outside the data
///     polyvec::FormatError  -> polyvec.FormatError (ValueError)      a damaged or newer file
///     polyvec::CudaError    -> polyvec.CudaError (RuntimeError)      a launch or run-time failure
///     std::bad_alloc        -> MemoryError
///     polyvec::Interrupted  -> the Python signal handler's own exception (KeyboardInterrupt)
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "polyvec/array.hpp"

namespace polyvec {

struct TypeError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct FormatError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct CudaError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct Interrupted : std::exception {};

inline void append(std::string& text, std::string_view part) {
    text += part;
}
template <class Number>
    requires std::is_arithmetic_v<Number>
void append(std::string& text, Number part) {
    if constexpr (std::is_integral_v<Number>) {
        text += std::to_string(part);
    } else {
        char digits[32];
        std::snprintf(digits, sizeof digits, "%g", static_cast<double>(part));
        text += digits;
    }
}

/// As Python writes a shape: "(3, 4)".
inline void append(std::string& text, Array::ShapeText shape) {
    text += '(';
    for (int i = 0; i < shape.array.ndim; ++i) {
        if (i > 0) text += ", ";
        append(text, shape.array.dim(i));
    }
    text += shape.array.ndim == 1 ? ",)" : ")";
}

/// The parts as one text. No iostreams: where a toolchain links the C++ library into the module, its locale can meet
/// that of another library's copy in the same process, and a number crashes.
template <class... Parts>
std::string concat(const Parts&... parts) {
    std::string text;
    (append(text, parts), ...);
    return text;
}

template <class Error = std::invalid_argument, class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
    throw Error(concat(op, ": ", parts...));
}

/// Throws "<op>: <parts>" as a ValueError unless `ok`.
template <class Error = std::invalid_argument, class... Parts>
void require(bool ok, const char* op, const Parts&... parts) {
    if (!ok) fail<Error>(op, parts...);
}

inline void require_ndim(const char* op, const Array& a, int ndim) {
    require(a.ndim == ndim, op, a.name, " must have ", ndim, ndim == 1 ? " axis" : " axes", ", got shape ",
            a.shape_text());
}

/// Axis `axis` of `a` must be `n`; `why` completes the sentence: "the same d as queries".
inline void require_dim(const char* op, const Array& a, int axis, std::int64_t n, const char* why) {
    require(a.dim(axis) == n, op, a.name, " must have ", why, " (", n, "), got ", a.dim(axis));
}

inline void require_contiguous(const char* op, const Array& a) {
    require(a.contiguous(), op, a.name, " must be contiguous");
}

inline void require_dtype(const char* op, const Array& a, DType dtype) {
    require<TypeError>(a.dtype == dtype, op, a.name, " must be ", name_of(dtype), ", got ", name_of(a.dtype));
}

inline void require_float(const char* op, const Array& a) {
    require<TypeError>(a.dtype == DType::f32 || a.dtype == DType::f64, op, a.name, " must be float32 or float64, got ",
                       name_of(a.dtype));
}

/// Tokens and vectors of 16 bits are floats on a GPU, where they multiply as they are.
inline void require_float_or_half(const char* op, const Array& a) {
    const bool half = a.device == Device::cuda && (a.dtype == DType::f16 || a.dtype == DType::bf16);
    if (!half) require_float(op, a);
}

/// What sums of products of `dtype` are kept in.
constexpr DType sum_type(DType dtype) {
    return dtype == DType::f64 ? DType::f64 : DType::f32;
}

/// `out` is never converted or copied: it must already be what the op writes.
inline void require_out(const char* op, const Array& out, DType dtype) {
    require_dtype(op, out, dtype);
    require(out.contiguous(), op, out.name, " must be C-contiguous");
    require(out.writable, op, out.name, " must be writable");
}

/// An output of the shape and dtype of x.
inline void require_like(const char* op, const Array& out, const Array& x) {
    require_out(op, out, x.dtype);
    require(out.ndim == x.ndim && out.shape == x.shape, op, out.name, " must have shape ", x.shape_text(), ", got ",
            out.shape_text());
}

/// `offsets` (n + 1,) of a ragged array with `total` rows: starts at 0, never runs backwards, ends at total. Offsets
/// and ids on a GPU are not readable here: there, kernels pass over what lies outside, as each op says.
inline void require_offsets(const char* op, const Array& offsets, std::int64_t total) {
    require_ndim(op, offsets, 1);
    require_dtype(op, offsets, DType::i64);
    require_contiguous(op, offsets);
    require(offsets.dim(0) >= 1, op, offsets.name, " must have at least one entry, got none");
    if (offsets.device != Device::cpu) return;
    const auto* at = offsets.as<const std::int64_t>();
    const std::int64_t n = offsets.dim(0) - 1;
    require(at[0] == 0, op, offsets.name, " must start at 0, got ", at[0]);
    for (std::int64_t i = 0; i < n; ++i)
        require(at[i] <= at[i + 1], op, offsets.name, " must not run backwards, got ", at[i], " then ", at[i + 1],
                " at position ", i);
    require(at[n] == total, op, offsets.name, " must end at the number of rows (", total, "), got ", at[n]);
}

/// Every entry of int64 `ids` must be in [0, n).
inline void require_ids(const char* op, const Array& ids, std::int64_t n) {
    if (ids.device != Device::cpu) return;
    const auto* id = ids.as<const std::int64_t>();
    for (std::int64_t i = 0, size = ids.size(); i < size; ++i)
        if (id[i] < 0 || id[i] >= n)
            fail<std::out_of_range>(op, ids.name, " must be in [0, ", n, "), got ", id[i], " at position ", i);
}

}  // namespace polyvec
