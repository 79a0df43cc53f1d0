#pragma once

#include "polyvec/quantize_pq_loss.hpp"
#include "run_op.hpp"

namespace polyvec {

template <class Exec>
void bind_quantize_pq_loss(py::module_& m) {
    m.def(
        "quantize_pq_improve",
        [](const py::object& x, const py::object& codebooks, const py::object& codes, double weight,
           std::intptr_t where) {
            Args args = args_for<Exec>(PqImprove::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(PqImprove{a, args.in("codebooks", codebooks), args.out("codes", codes), weight}, where, a);
        },
        py::arg("x"), py::arg("codebooks"), py::arg("codes"), py::arg("weight"), py::arg("where"));
    m.def(
        "quantize_pq_move",
        [](const py::object& pieces, const py::object& codes, const py::object& codebooks, double weight,
           std::intptr_t where) {
            Args args = args_for<Exec>(PqMove::op, where);
            const Array a = args.in("pieces", pieces);
            run_op<Exec>(PqMove{a, args.in("codes", codes), args.out("codebooks", codebooks), weight}, where, a);
        },
        py::arg("pieces"), py::arg("codes"), py::arg("codebooks"), py::arg("weight"), py::arg("where"));
}

}  // namespace polyvec
