#pragma once

#include "polyvec/vq_linear.hpp"
#include "run_op.hpp"

namespace polyvec {

template <class Exec>
void bind_vq_linear(py::module_& m) {
    m.def(
        "vq_linear",
        [](const py::object& x, const py::object& codes, const py::object& codebooks, const py::object& bias,
           const py::object& out, std::intptr_t where) {
            Args args = args_for<Exec>(VqLinear::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(VqLinear{a, args.in("codes", codes), args.in("codebooks", codebooks), args.in("bias", bias),
                                  args.out("out", out)},
                         where, a);
        },
        py::arg("x"), py::arg("codes"), py::arg("codebooks"), py::arg("bias"), py::arg("out"), py::arg("where"));
    m.def(
        "vq_linear_gradient",
        [](const py::object& x, const py::object& codes, const py::object& codebooks, const py::object& grad,
           const py::object& dx, const py::object& dcodebooks, std::intptr_t where) {
            Args args = args_for<Exec>(VqLinearGradient::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(VqLinearGradient{a, args.in("codes", codes), args.in("codebooks", codebooks),
                                          args.in("grad", grad), args.in("dx", dx), args.in("dcodebooks", dcodebooks)},
                         where, a);
        },
        py::arg("x"), py::arg("codes"), py::arg("codebooks"), py::arg("grad"), py::arg("dx"), py::arg("dcodebooks"),
        py::arg("where"));
}

}  // namespace polyvec
