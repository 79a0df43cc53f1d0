#pragma once

#include "polyvec/knn_graph.hpp"
#include "run_op.hpp"

namespace polyvec {

/// (codes, factors, squared)
inline KnnRows knn_rows(Args& args, const py::tuple& rows) {
    return {args.out("codes", rows[0]), args.out("factors", rows[1]), rows[2].cast<bool>()};
}

template <class Exec>
void bind_knn_graph(py::module_& m) {
    m.def(
        "knn_encode",
        [](const py::object& x, std::int64_t first, const py::object& rows, std::intptr_t where) {
            Args args = args_for<Exec>(KnnEncode::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(KnnEncode{a, first, knn_rows(args, rows)}, where, a);
        },
        py::arg("x"), py::arg("first"), py::arg("rows"), py::arg("where"));
    m.def(
        "knn_join",
        [](const py::object& rows, const py::object& begins, const py::object& probes, std::int64_t first,
           std::int64_t last, const py::object& ids, const py::object& distances, std::intptr_t where) {
            Args args = args_for<Exec>(KnnJoin::op, where);
            const Array a = args.in("begins", begins);
            run_op<Exec>(KnnJoin{knn_rows(args, rows), a, args.in("probes", probes), first, last, args.out("ids", ids),
                                 args.out("distances", distances)},
                         where, a);
        },
        py::arg("rows"), py::arg("begins"), py::arg("probes"), py::arg("first"), py::arg("last"), py::arg("ids"),
        py::arg("distances"), py::arg("where"));
    m.def(
        "knn_reverse",
        [](const py::object& ids, std::int64_t degree, const py::object& reverse, std::intptr_t where) {
            Args args = args_for<Exec>(KnnReverse::op, where);
            const Array a = args.in("ids", ids);
            run_op<Exec>(KnnReverse{a, degree, args.out("reverse", reverse)}, where, a);
        },
        py::arg("ids"), py::arg("degree"), py::arg("reverse"), py::arg("where"));
    m.def(
        "knn_refine",
        [](const py::object& rows, const py::object& ids, const py::object& distances, const py::object& reverse,
           std::int64_t degree, std::int64_t first, std::int64_t last, const py::object& better_ids,
           const py::object& better_distances, std::intptr_t where) {
            Args args = args_for<Exec>(KnnRefine::op, where);
            const Array a = args.in("ids", ids);
            run_op<Exec>(KnnRefine{knn_rows(args, rows), a, args.in("distances", distances),
                                   args.in("reverse", reverse), degree, first, last, args.out("better_ids", better_ids),
                                   args.out("better_distances", better_distances)},
                         where, a);
        },
        py::arg("rows"), py::arg("ids"), py::arg("distances"), py::arg("reverse"), py::arg("degree"), py::arg("first"),
        py::arg("last"), py::arg("better_ids"), py::arg("better_distances"), py::arg("where"));
    m.def(
        "knn_sort",
        [](const py::object& ids, const py::object& distances, std::intptr_t where) {
            Args args = args_for<Exec>(KnnSort::op, where);
            const Array a = args.out("ids", ids);
            run_op<Exec>(KnnSort{a, args.out("distances", distances)}, where, a);
        },
        py::arg("ids"), py::arg("distances"), py::arg("where"));
}

}  // namespace polyvec
