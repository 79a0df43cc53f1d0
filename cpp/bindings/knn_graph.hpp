#pragma once

#include "polyvec/knn_graph.hpp"
#include "run_op.hpp"

namespace polyvec {

template <class Exec>
void bind_knn_graph(py::module_& m) {
    m.def(
        "knn_scan",
        [](const py::object& x, const py::object& codebooks, const py::object& blocks, const py::object& centroids,
           const py::object& order, const py::object& begins, std::int64_t first, std::int64_t probes,
           const py::object& ids, std::intptr_t where) {
            Args args = args_for<Exec>(KnnScan::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(
                KnnScan{a, args.in("codebooks", codebooks), args.in("blocks", blocks), args.in("centroids", centroids),
                        args.in("order", order), args.in("begins", begins), first, probes, args.out("ids", ids)},
                where, a);
        },
        py::arg("x"), py::arg("codebooks"), py::arg("blocks"), py::arg("centroids"), py::arg("order"),
        py::arg("begins"), py::arg("first"), py::arg("probes"), py::arg("ids"), py::arg("where"));
    m.def(
        "knn_merge",
        [](const py::object& order, const py::object& ids, const py::object& distances, const py::object& neighbors,
           const py::object& nearest, std::intptr_t where) {
            Args args = args_for<Exec>(KnnMerge::op, where);
            const Array a = args.in("order", order);
            run_op<Exec>(KnnMerge{a, args.in("ids", ids), args.in("distances", distances),
                                  args.out("neighbors", neighbors), args.out("nearest", nearest)},
                         where, a);
        },
        py::arg("order"), py::arg("ids"), py::arg("distances"), py::arg("neighbors"), py::arg("nearest"),
        py::arg("where"));
}

}  // namespace polyvec
