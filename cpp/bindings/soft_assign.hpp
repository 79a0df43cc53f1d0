#pragma once

#include "polyvec/soft_assign.hpp"
#include "run_op.hpp"

namespace polyvec {

template <class Exec>
void bind_soft_assign(py::module_& m) {
    m.def(
        "soft_assign",
        [](const py::object& x, const py::object& codebooks, const py::object& out, const py::object& ids,
           double temperature, bool hard, std::intptr_t where) {
            Args args = args_for<Exec>(SoftAssign::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(SoftAssign{a, args.in("codebooks", codebooks), args.out("out", out), args.out("ids", ids),
                                    temperature, hard},
                         where, a);
        },
        py::arg("x"), py::arg("codebooks"), py::arg("out"), py::arg("ids"), py::arg("temperature"), py::arg("hard"),
        py::arg("where"));
    m.def(
        "soft_assign_gradient",
        [](const py::object& x, const py::object& codebooks, const py::object& grad, const py::object& dx,
           const py::object& dcodebooks, double temperature, bool hard, std::intptr_t where) {
            Args args = args_for<Exec>(SoftAssignGradient::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(SoftAssignGradient{a, args.in("codebooks", codebooks), args.in("grad", grad),
                                            args.in("dx", dx), args.in("dcodebooks", dcodebooks), temperature, hard},
                         where, a);
        },
        py::arg("x"), py::arg("codebooks"), py::arg("grad"), py::arg("dx"), py::arg("dcodebooks"),
        py::arg("temperature"), py::arg("hard"), py::arg("where"));
}

}  // namespace polyvec
