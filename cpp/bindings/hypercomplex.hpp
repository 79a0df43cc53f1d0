#pragma once

#include "polyvec/hypercomplex.hpp"
#include "run_op.hpp"

namespace polyvec {

template <class Exec>
void bind_hypercomplex(py::module_& m) {
    m.def(
        "hypercomplex_product",
        [](const py::object& x, const py::object& y, const py::object& out, std::vector<double> table, bool interleaved,
           std::intptr_t where) {
            Args args = args_for<Exec>(HypercomplexProduct::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(HypercomplexProduct{a, args.in("y", y), args.out("out", out), std::move(table), interleaved},
                         where, a);
        },
        py::arg("x"), py::arg("y"), py::arg("out"), py::arg("table"), py::arg("interleaved"), py::arg("where"));
    using Kind = HypercomplexMap::Kind;
    const auto bind_map = [&m](const char* name, const char* op, Kind kind) {
        m.def(
            name,
            [op, kind](const py::object& x, const py::object& out, bool interleaved, std::intptr_t where) {
                Args args = args_for<Exec>(op, where);
                const Array a = args.in("x", x);
                run_op<Exec>(HypercomplexMap{op, a, args.out("out", out), kind, interleaved}, where, a);
            },
            py::arg("x"), py::arg("out"), py::arg("interleaved"), py::arg("where"));
    };
    bind_map("hypercomplex_norm", "hypercomplex.norm", Kind::norm);
    bind_map("hypercomplex_normalize", "hypercomplex.normalize", Kind::normalize);
    bind_map("hypercomplex_conjugate", "hypercomplex.conjugate", Kind::conjugate);
    m.def(
        "hypercomplex_relation_query",
        [](const py::object& entities, const py::object& relations, const py::object& head_ids,
           const py::object& relation_ids, const py::object& translations, const py::object& head_translations,
           const py::object& out, std::vector<double> table, bool normalize, bool rotate_by_head, std::intptr_t where) {
            Args args = args_for<Exec>(RelationQuery::op, where);
            const Array a = args.in("entities", entities);
            run_op<Exec>(RelationQuery{a, args.in("relations", relations), args.in("head_ids", head_ids),
                                       args.in("relation_ids", relation_ids), args.in("translations", translations),
                                       args.in("head_translations", head_translations), args.out("out", out),
                                       std::move(table), normalize, rotate_by_head},
                         where, a);
        },
        py::arg("entities"), py::arg("relations"), py::arg("head_ids"), py::arg("relation_ids"),
        py::arg("translations"), py::arg("head_translations"), py::arg("out"), py::arg("table"), py::arg("normalize"),
        py::arg("rotate_by_head"), py::arg("where"));
    m.def(
        "hypercomplex_sum_products",
        [](const py::object& x, const py::object& y, const py::object& x_ids, const py::object& y_ids,
           const py::object& out_ids, const py::object& out, std::vector<double> table, std::intptr_t where) {
            Args args = args_for<Exec>(HypercomplexSums::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(HypercomplexSums{a, args.in("y", y), args.in("x_ids", x_ids), args.in("y_ids", y_ids),
                                          args.in("out_ids", out_ids), args.out("out", out), std::move(table)},
                         where, a);
        },
        py::arg("x"), py::arg("y"), py::arg("x_ids"), py::arg("y_ids"), py::arg("out_ids"), py::arg("out"),
        py::arg("table"), py::arg("where"));
    // `kind` is a number: 0 wasserstein, 1 piecewise, 2 kl.
    m.def(
        "hypercomplex_flow_query",
        [](const py::object& entities, const py::object& relations, const py::object& head_ids,
           const py::object& relation_ids, const py::object& out, const py::object& offset, int kind,
           std::intptr_t where) {
            Args args = args_for<Exec>(FlowQuery::op, where);
            const Array a = args.in("entities", entities);
            run_op<Exec>(FlowQuery{a, args.in("relations", relations), args.in("head_ids", head_ids),
                                   args.in("relation_ids", relation_ids), args.out("out queries", out),
                                   args.out("out offset", offset), static_cast<Flow>(kind)},
                         where, a);
        },
        py::arg("entities"), py::arg("relations"), py::arg("head_ids"), py::arg("relation_ids"), py::arg("out"),
        py::arg("offset"), py::arg("kind"), py::arg("where"));
    m.def(
        "hypercomplex_flow_keys",
        [](const py::object& entities, const py::object& out, const py::object& bias, int kind, std::intptr_t where) {
            Args args = args_for<Exec>(FlowKeys::op, where);
            const Array a = args.in("entities", entities);
            run_op<Exec>(FlowKeys{a, args.out("out items", out), args.out("out bias", bias), static_cast<Flow>(kind)},
                         where, a);
        },
        py::arg("entities"), py::arg("out"), py::arg("bias"), py::arg("kind"), py::arg("where"));
}

}  // namespace polyvec
