/// The one rhythm of every binding: read the arrays, check the op, release the GIL, run.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "array_io.hpp"
#include "polyvec/error.hpp"
#include "polyvec/exec.hpp"

namespace polyvec {

/// What Python passes as the last argument `where` of every function: threads on a CPU, a stream on a GPU.
template <class Exec>
struct Where;

template <>
struct Where<Cpu> {
    static constexpr Device device = Device::cpu;
    static Cpu exec(std::intptr_t num_threads, const Array&) { return Cpu{static_cast<int>(num_threads)}; }
};

template <>
struct Where<Cuda> {
    static constexpr Device device = Device::cuda;
    static Cuda exec(std::intptr_t stream, const Array& first) { return Cuda{first.device_index, stream}; }
};

template <class Exec>
Args args_for(const char* op, std::intptr_t where) {
    return Args(op, Where<Exec>::device, Where<Exec>::device == Device::cuda ? where : 0);
}

/// `first` is any array of the op: it names the device to run on.
template <class Exec, class Op>
void run_op(const Op& op, std::intptr_t where, const Array& first) {
    op.validate();
    const Exec exec = Where<Exec>::exec(where, first);
    const py::gil_scoped_release nogil;
    run(op, exec);
}

/// Gives the module polyvec's exception types and the translations of error.hpp's table.
inline void register_errors() {
    static py::handle format_error, cuda_error;
    const py::module_ errors = py::module_::import("polyvec._errors");
    format_error = errors.attr("FormatError").cast<py::object>().release();
    cuda_error = errors.attr("CudaError").cast<py::object>().release();
    py::register_local_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const TypeError& e) {
            py::set_error(PyExc_TypeError, e.what());
        } catch (const FormatError& e) {
            py::set_error(format_error, e.what());
        } catch (const CudaError& e) {
            py::set_error(cuda_error, e.what());
        } catch (const Interrupted&) {
            // The interrupt hook has already set Python's own exception.
            if (!PyErr_Occurred()) py::set_error(PyExc_KeyboardInterrupt, "");
        }
    });
}

}  // namespace polyvec
