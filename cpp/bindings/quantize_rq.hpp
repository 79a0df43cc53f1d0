#pragma once

#include "polyvec/quantize_rq.hpp"
#include "run_op.hpp"

namespace polyvec {

template <class Exec>
void bind_quantize_rq(py::module_& m) {
    m.def(
        "quantize_rq_extend",
        [](const py::object& x, const py::object& codebooks, const py::object& products, const py::object& beams,
           const py::object& scores, const py::object& out_beams, const py::object& out_scores, std::intptr_t where) {
            Args args = args_for<Exec>(RqExtend::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(RqExtend{a, args.in("codebooks", codebooks), args.in("products", products),
                                  args.in("beams", beams), args.in("scores", scores), args.out("out_beams", out_beams),
                                  args.out("out_scores", out_scores)},
                         where, a);
        },
        py::arg("x"), py::arg("codebooks"), py::arg("products"), py::arg("beams"), py::arg("scores"),
        py::arg("out_beams"), py::arg("out_scores"), py::arg("where"));
    m.def(
        "quantize_rq_decode",
        [](const py::object& codes, const py::object& codebooks, const py::object& out, std::intptr_t where) {
            Args args = args_for<Exec>(RqDecode::op, where);
            const Array a = args.in("codes", codes);
            run_op<Exec>(RqDecode{a, args.in("codebooks", codebooks), args.out("out", out)}, where, a);
        },
        py::arg("codes"), py::arg("codebooks"), py::arg("out"), py::arg("where"));
    m.def(
        "quantize_rq_search",
        [](const py::object& queries, const py::object& codes, std::int64_t n, const py::object& codebooks,
           const py::object& include, const py::object& scores, const py::object& ids, bool squared, double norm_step,
           std::intptr_t where) {
            Args args = args_for<Exec>(RqSearch::op, where);
            const Array a = args.in("queries", queries);
            run_op<Exec>(
                RqSearch{a, args.in("codes", codes), n, args.in("codebooks", codebooks), args.in("include", include),
                         args.out("scores", scores), args.out("ids", ids), squared, norm_step},
                where, a);
        },
        py::arg("queries"), py::arg("codes"), py::arg("n"), py::arg("codebooks"), py::arg("include"), py::arg("scores"),
        py::arg("ids"), py::arg("squared"), py::arg("norm_step"), py::arg("where"));
}

}  // namespace polyvec
