/// Python objects -> Array: numpy by its buffer, everything else by DLPack.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "polyvec/array.hpp"

namespace polyvec {

namespace py = pybind11;

/// Reads the array arguments of one call, and keeps what they point to alive until the call ends.
class Args {
public:
    Args(const char* op, Device device, std::intptr_t stream) : op_(op), device_(device), stream_(stream) {}

    /// An array, or an absent Array for None. Throws TypeError when it is neither, or lies on another device.
    Array in(const char* name, const py::object& object);

    /// An array that the op may write to: memory that no input read so far shares.
    Array out(const char* name, const py::object& object);

private:
    Array read(const char* name, const py::object& object);
    Array read_numpy(const char* name, const py::array& array);
    Array read_dlpack(const char* name, const py::object& object);
    [[noreturn]] void unsupported(const char* name, const py::handle& object) const;

    const char* op_;
    Device device_;
    std::intptr_t stream_;
    int device_index_ = -1;  // of the first array; the others must share it
    std::vector<py::object> owners_;
    std::vector<Array> inputs_;
};

}  // namespace polyvec
