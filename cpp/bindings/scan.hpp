#pragma once

#include "polyvec/scan.hpp"
#include "run_op.hpp"

namespace polyvec {

template <class Exec>
void bind_scan(py::module_& m) {
    m.def(
        "scan_topk",
        [](const py::object& queries, const py::object& blocks, const py::object& block_offsets,
           const py::object& items, const py::object& scales, const py::object& bias, const py::object& exclude_offsets,
           const py::object& exclude_ids, const py::object& scores, const py::object& ids, const std::string& metric,
           std::intptr_t where) {
            Args args = args_for<Exec>(ScanTopK::op, where);
            const Array a = args.in("queries", queries);
            run_op<Exec>(ScanTopK{a,
                                  {args.in("blocks", blocks), args.in("block offsets", block_offsets)},
                                  {args.in("items", items), args.in("scales", scales)},
                                  args.in("bias", bias),
                                  {args.in("exclude offsets", exclude_offsets), args.in("exclude ids", exclude_ids)},
                                  args.out("scores", scores),
                                  args.out("ids", ids),
                                  metric_from(ScanTopK::op, metric)},
                         where, a);
        },
        py::arg("queries"), py::arg("blocks"), py::arg("block_offsets"), py::arg("items"), py::arg("scales"),
        py::arg("bias"), py::arg("exclude_offsets"), py::arg("exclude_ids"), py::arg("scores"), py::arg("ids"),
        py::arg("metric"), py::arg("where"));
    m.def(
        "scan_nearest",
        [](const py::object& x, const py::object& centroids, const py::object& scales, const py::object& ids,
           const py::object& distances, const std::string& metric, std::intptr_t where) {
            Args args = args_for<Exec>(ScanNearest::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(ScanNearest{a,
                                     {args.in("centroids", centroids), args.in("scales", scales)},
                                     args.out("ids", ids),
                                     args.in("distances", distances),
                                     metric_from(ScanNearest::op, metric)},
                         where, a);
        },
        py::arg("x"), py::arg("centroids"), py::arg("scales"), py::arg("ids"), py::arg("distances"), py::arg("metric"),
        py::arg("where"));
    m.def(
        "scan_rank",
        [](const py::object& queries, const py::object& items, const py::object& scales, const py::object& targets,
           const py::object& bias, const py::object& known_offsets, const py::object& known_ids,
           const py::object& ranks, const std::string& metric, const std::string& ties, std::intptr_t where) {
            Args args = args_for<Exec>(ScanRank::op, where);
            const Array a = args.in("queries", queries);
            using Ties = ScanRank::Ties;
            run_op<Exec>(ScanRank{a,
                                  {args.in("items", items), args.in("scales", scales)},
                                  args.in("targets", targets),
                                  args.in("bias", bias),
                                  {args.in("known offsets", known_offsets), args.in("known ids", known_ids)},
                                  args.out("ranks", ranks),
                                  metric_from(ScanRank::op, metric),
                                  ties == "optimistic"    ? Ties::optimistic
                                  : ties == "pessimistic" ? Ties::pessimistic
                                                          : Ties::realistic},
                         where, a);
        },
        py::arg("queries"), py::arg("items"), py::arg("scales"), py::arg("targets"), py::arg("bias"),
        py::arg("known_offsets"), py::arg("known_ids"), py::arg("ranks"), py::arg("metric"), py::arg("ties"),
        py::arg("where"));
    m.def(
        "scan_score_pairs",
        [](const py::object& queries, const py::object& blocks, const py::object& block_offsets,
           const py::object& items, const py::object& scales, const py::object& ids, const py::object& bias,
           const py::object& out, const std::string& metric, std::intptr_t where) {
            Args args = args_for<Exec>(ScanPairs::op, where);
            const Array a = args.in("queries", queries);
            run_op<Exec>(ScanPairs{a,
                                   {args.in("blocks", blocks), args.in("block offsets", block_offsets)},
                                   {args.in("items", items), args.in("scales", scales)},
                                   args.in("ids", ids),
                                   args.in("bias", bias),
                                   args.out("out", out),
                                   metric_from(ScanPairs::op, metric)},
                         where, a);
        },
        py::arg("queries"), py::arg("blocks"), py::arg("block_offsets"), py::arg("items"), py::arg("scales"),
        py::arg("ids"), py::arg("bias"), py::arg("out"), py::arg("metric"), py::arg("where"));
    m.def(
        "scan_logsumexp",
        [](const py::object& queries, const py::object& items, const py::object& scales, const py::object& bias,
           const py::object& exclude_offsets, const py::object& exclude_ids, const py::object& out, float scale,
           const std::string& metric, std::intptr_t where) {
            Args args = args_for<Exec>(ScanLogSumExp::op, where);
            const Array a = args.in("queries", queries);
            run_op<Exec>(
                ScanLogSumExp{a,
                              {args.in("items", items), args.in("scales", scales)},
                              args.in("bias", bias),
                              {args.in("exclude offsets", exclude_offsets), args.in("exclude ids", exclude_ids)},
                              args.out("out", out),
                              scale,
                              metric_from(ScanLogSumExp::op, metric)},
                where, a);
        },
        py::arg("queries"), py::arg("items"), py::arg("scales"), py::arg("bias"), py::arg("exclude_offsets"),
        py::arg("exclude_ids"), py::arg("out"), py::arg("scale"), py::arg("metric"), py::arg("where"));
    m.def(
        "scan_hinge",
        [](const py::object& queries, const py::object& items, const py::object& scales, const py::object& targets,
           const py::object& bias, const py::object& known_offsets, const py::object& known_ids, const py::object& out,
           float margin, const std::string& metric, std::intptr_t where) {
            Args args = args_for<Exec>(ScanHinge::op, where);
            const Array a = args.in("queries", queries);
            run_op<Exec>(ScanHinge{a,
                                   {args.in("items", items), args.in("scales", scales)},
                                   args.in("targets", targets),
                                   args.in("bias", bias),
                                   {args.in("known offsets", known_offsets), args.in("known ids", known_ids)},
                                   args.out("out", out),
                                   margin,
                                   metric_from(ScanHinge::op, metric)},
                         where, a);
        },
        py::arg("queries"), py::arg("items"), py::arg("scales"), py::arg("targets"), py::arg("bias"),
        py::arg("known_offsets"), py::arg("known_ids"), py::arg("out"), py::arg("margin"), py::arg("metric"),
        py::arg("where"));
}

/// For which a GPU composes its own products.
template <class Exec>
void bind_scan_gradient(py::module_& m) {
    m.def(
        "scan_logsumexp_gradient",
        [](const py::object& queries, const py::object& items, const py::object& bias, const py::object& result,
           const py::object& grad, const py::object& d_queries, const py::object& d_items, const py::object& d_bias,
           float scale, std::intptr_t where) {
            Args args = args_for<Exec>(ScanLogSumExpGradient::op, where);
            const Array a = args.in("queries", queries);
            run_op<Exec>(
                ScanLogSumExpGradient{a, args.in("items", items), args.in("bias", bias), args.in("result", result),
                                      args.in("grad", grad), args.in("d_queries", d_queries),
                                      args.in("d_items", d_items), args.in("d_bias", d_bias), scale},
                where, a);
        },
        py::arg("queries"), py::arg("items"), py::arg("bias"), py::arg("result"), py::arg("grad"), py::arg("d_queries"),
        py::arg("d_items"), py::arg("d_bias"), py::arg("scale"), py::arg("where"));
}

}  // namespace polyvec
