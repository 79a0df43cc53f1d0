#pragma once

#include "polyvec/quantize.hpp"
#include "run_op.hpp"

namespace polyvec {

template <class Exec>
void bind_quantize(py::module_& m) {
    m.def(
        "quantize_kmeans_seed",
        [](const py::object& x, const py::object& rows, std::uint64_t seed, const std::string& metric,
           std::intptr_t where) {
            Args args = args_for<Exec>(KMeansSeed::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(KMeansSeed{a, args.out("rows", rows), seed, metric_from(KMeansSeed::op, metric)}, where, a);
        },
        py::arg("x"), py::arg("rows"), py::arg("seed"), py::arg("metric"), py::arg("where"));
    m.def(
        "quantize_kmeans_step",
        [](const py::object& x, const py::object& centroids, const py::object& labels, const py::object& inertia,
           const py::object& updated, const std::string& metric, std::intptr_t where) {
            Args args = args_for<Exec>(KMeansStep::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(
                KMeansStep{a, args.in("centroids", centroids), args.out("labels", labels), args.out("inertia", inertia),
                           args.in("updated", updated), metric_from(KMeansStep::op, metric)},
                where, a);
        },
        py::arg("x"), py::arg("centroids"), py::arg("labels"), py::arg("inertia"), py::arg("updated"),
        py::arg("metric"), py::arg("where"));
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
        "quantize_pq_search",
        [](const py::object& queries, const py::object& codes, const py::object& codebooks, const py::object& scores,
           const py::object& ids, bool squared, std::intptr_t where) {
            Args args = args_for<Exec>(PqSearch::op, where);
            const Array a = args.in("queries", queries);
            run_op<Exec>(PqSearch{a, args.in("codes", codes), args.in("codebooks", codebooks),
                                  args.out("scores", scores), args.out("ids", ids), squared},
                         where, a);
        },
        py::arg("queries"), py::arg("codes"), py::arg("codebooks"), py::arg("scores"), py::arg("ids"),
        py::arg("squared"), py::arg("where"));
}

}  // namespace polyvec
