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
}

}  // namespace polyvec
