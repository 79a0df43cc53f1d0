#pragma once

#include "polyvec/fde.hpp"
#include "run_op.hpp"

namespace polyvec {

constexpr const char* fde_queries = "fde.Encoder.encode_queries";

/// Bound once: all modules share the class.
inline void bind_fde_matrices(py::module_& m) {
    py::class_<FdeMatrices>(m, "FdeMatrices")
        .def(py::init([](const py::object& hyperplanes, const py::object& projections, const py::object& sketch_index,
                         const py::object& sketch_sign, std::int64_t final_dim, const py::object& words,
                         const py::object& sources) {
                 Args args = args_for<Cpu>(FdeMatrices::op, 0);
                 return FdeMatrices(args.in("hyperplanes", hyperplanes), args.in("projections", projections),
                                    args.in("final_projection index", sketch_index),
                                    args.in("final_projection sign", sketch_sign), final_dim, args.in("words", words),
                                    args.in("sources", sources));
             }),
             py::arg("hyperplanes"), py::arg("projections"), py::arg("sketch_index"), py::arg("sketch_sign"),
             py::arg("final_dim"), py::arg("words"), py::arg("sources"))
        .def_readonly("output_dim", &FdeMatrices::output_dim);
}

template <class Exec>
void bind_fde(py::module_& m) {
    m.def(
        "fde_encode",
        [](const FdeMatrices& matrices, const py::object& tokens, const py::object& offsets, const py::object& out,
           const py::object& scales, bool mean, bool fill, bool lowest_bucket, std::intptr_t where) {
            const char* op = mean ? "fde.Encoder.encode_docs" : fde_queries;
            Args args = args_for<Exec>(op, where);
            const Array a = args.in("tokens", tokens);
            run_op<Exec>(FdeEncode{op, matrices, TokenSets{a, args.in("offsets", offsets)}, args.out("out", out),
                                   args.out("scales", scales), mean, fill, lowest_bucket},
                         where, a);
        },
        py::arg("matrices"), py::arg("tokens"), py::arg("offsets"), py::arg("out"), py::arg("scales"), py::arg("mean"),
        py::arg("fill"), py::arg("lowest_bucket"), py::arg("where"));
    m.def(
        "fde_partition",
        [](const FdeMatrices& matrices, const py::object& tokens, const py::object& out, std::intptr_t where) {
            Args args = args_for<Exec>(FdePartition::op, where);
            const Array a = args.in("tokens", tokens);
            run_op<Exec>(FdePartition{matrices, a, args.out("out", out)}, where, a);
        },
        py::arg("matrices"), py::arg("tokens"), py::arg("out"), py::arg("where"));
}

/// Sparse encodings of queries, and balls of their tokens.
template <class Exec>
void bind_fde_blocks(py::module_& m) {
    m.def(
        "fde_count_blocks",
        [](const FdeMatrices& matrices, const py::object& tokens, const py::object& offsets, const py::object& ids,
           const py::object& counts, std::intptr_t where) {
            Args args = args_for<Exec>(fde_queries, where);
            const Array a = args.in("tokens", tokens);
            run_op<Exec>(FdeCountBlocks{fde_queries, matrices, TokenSets{a, args.in("offsets", offsets)},
                                        args.in("ids", ids), args.out("counts", counts)},
                         where, a);
        },
        py::arg("matrices"), py::arg("tokens"), py::arg("offsets"), py::arg("ids"), py::arg("counts"),
        py::arg("where"));
    m.def(
        "fde_encode_blocks",
        [](const FdeMatrices& matrices, const py::object& tokens, const py::object& offsets, const py::object& ids,
           const py::object& bounds, const py::object& values, const py::object& blocks, std::intptr_t where) {
            Args args = args_for<Exec>(fde_queries, where);
            const Array a = args.in("tokens", tokens);
            run_op<Exec>(
                FdeEncodeBlocks{fde_queries, matrices, TokenSets{a, args.in("offsets", offsets)}, args.in("ids", ids),
                                args.in("bounds", bounds), args.out("values", values), args.out("blocks", blocks)},
                where, a);
        },
        py::arg("matrices"), py::arg("tokens"), py::arg("offsets"), py::arg("ids"), py::arg("bounds"),
        py::arg("values"), py::arg("blocks"), py::arg("where"));
    m.def(
        "fde_carve",
        [](const py::object& tokens, const py::object& offsets, double threshold, const py::object& ids,
           const py::object& counts, std::intptr_t where) {
            Args args = args_for<Exec>(FdeCarve::op, where);
            const Array a = args.in("queries", tokens);
            run_op<Exec>(FdeCarve{TokenSets{a, args.in("offsets", offsets)}, threshold, args.out("ids", ids),
                                  args.out("counts", counts)},
                         where, a);
        },
        py::arg("tokens"), py::arg("offsets"), py::arg("threshold"), py::arg("ids"), py::arg("counts"),
        py::arg("where"));
    m.def(
        "fde_sum_balls",
        [](const py::object& tokens, const py::object& offsets, const py::object& ids, const py::object& bounds,
           const py::object& out, std::intptr_t where) {
            Args args = args_for<Exec>(FdeSumBalls::op, where);
            const Array a = args.in("queries", tokens);
            run_op<Exec>(FdeSumBalls{TokenSets{a, args.in("offsets", offsets)}, args.in("ids", ids),
                                     args.in("bounds", bounds), args.out("out", out)},
                         where, a);
        },
        py::arg("tokens"), py::arg("offsets"), py::arg("ids"), py::arg("bounds"), py::arg("out"), py::arg("where"));
}

}  // namespace polyvec
