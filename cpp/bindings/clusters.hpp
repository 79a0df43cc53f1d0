#pragma once

#include "polyvec/clusters.hpp"
#include "run_op.hpp"

namespace polyvec {

template <class Exec>
void bind_clusters(py::module_& m) {
    m.def(
        "clusters_of_sets",
        [](const py::object& values, const py::object& offsets, const py::object& mean_offsets, const py::object& means,
           const py::object& labels, const py::object& inertia, const py::object& iterations, std::int64_t max_iter,
           double tolerance, bool ward, std::intptr_t where) {
            Args args = args_for<Exec>(ClusterSets::op, where);
            const Array a = args.in("values", values);
            run_op<Exec>(ClusterSets{a, args.in("offsets", offsets), args.in("mean_offsets", mean_offsets),
                                     args.out("means", means), args.out("labels", labels), args.out("inertia", inertia),
                                     args.out("iterations", iterations), max_iter, tolerance, ward},
                         where, a);
        },
        py::arg("values"), py::arg("offsets"), py::arg("mean_offsets"), py::arg("means"), py::arg("labels"),
        py::arg("inertia"), py::arg("iterations"), py::arg("max_iter"), py::arg("tolerance"), py::arg("ward"),
        py::arg("where"));
}

}  // namespace polyvec
