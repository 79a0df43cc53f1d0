#pragma once

#include "polyvec/quantize_pq.hpp"
#include "run_op.hpp"

namespace polyvec {

template <class Exec>
void bind_quantize_pq(py::module_& m) {
    m.def(
        "quantize_pq_encode",
        [](const py::object& x, const py::object& codebooks, const py::object& codes, std::intptr_t where) {
            Args args = args_for<Exec>(PqEncode::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(PqEncode{a, args.in("codebooks", codebooks), args.out("codes", codes)}, where, a);
        },
        py::arg("x"), py::arg("codebooks"), py::arg("codes"), py::arg("where"));
    m.def(
        "quantize_pq_decode",
        [](const py::object& codes, const py::object& codebooks, const py::object& out, std::intptr_t where) {
            Args args = args_for<Exec>(PqDecode::op, where);
            const Array a = args.in("codes", codes);
            run_op<Exec>(PqDecode{a, args.in("codebooks", codebooks), args.out("out", out)}, where, a);
        },
        py::arg("codes"), py::arg("codebooks"), py::arg("out"), py::arg("where"));
    m.def(
        "quantize_pq_decode_gradient",
        [](const py::object& grad, const py::object& codes, const py::object& dcodebooks, std::intptr_t where) {
            Args args = args_for<Exec>(PqDecodeGradient::op, where);
            const Array a = args.in("grad", grad);
            run_op<Exec>(PqDecodeGradient{a, args.in("codes", codes), args.out("dcodebooks", dcodebooks)}, where, a);
        },
        py::arg("grad"), py::arg("codes"), py::arg("dcodebooks"), py::arg("where"));
    m.def(
        "quantize_pq_pack",
        [](const py::object& codes, const py::object& blocks, std::intptr_t where) {
            Args args = args_for<Exec>(PqPack::op, where);
            const Array a = args.in("codes", codes);
            run_op<Exec>(PqPack{a, args.out("blocks", blocks)}, where, a);
        },
        py::arg("codes"), py::arg("blocks"), py::arg("where"));
    m.def(
        "quantize_pq_search",
        [](const py::object& queries, const py::object& codes, std::int64_t n, const py::object& codebooks,
           const py::object& include, const py::object& scores, const py::object& ids, bool squared,
           std::intptr_t where) {
            Args args = args_for<Exec>(PqSearch::op, where);
            const Array a = args.in("queries", queries);
            run_op<Exec>(
                PqSearch{a, args.in("codes", codes), n, args.in("codebooks", codebooks), args.in("include", include),
                         args.out("scores", scores), args.out("ids", ids), squared},
                where, a);
        },
        py::arg("queries"), py::arg("codes"), py::arg("n"), py::arg("codebooks"), py::arg("include"), py::arg("scores"),
        py::arg("ids"), py::arg("squared"), py::arg("where"));
}

}  // namespace polyvec
