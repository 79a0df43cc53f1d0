#pragma once

#include "polyvec/maxsim.hpp"
#include "run_op.hpp"

namespace polyvec {

template <class Exec>
void bind_maxsim(py::module_& m) {
    m.def(
        "maxsim_score",
        [](const py::object& queries, const py::object& query_offsets, const py::object& docs,
           const py::object& doc_offsets, const py::object& out, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimScore::op, where);
            const Array tokens = args.in("queries", queries);
            run_op<Exec>(MaxsimScore{{tokens, args.in("query offsets", query_offsets)},
                                     {args.in("docs", docs), args.in("doc offsets", doc_offsets)},
                                     args.out("out", out)},
                         where, tokens);
        },
        py::arg("queries"), py::arg("query_offsets"), py::arg("docs"), py::arg("doc_offsets"), py::arg("out"),
        py::arg("where"));
    m.def(
        "maxsim_topk",
        [](const py::object& queries, const py::object& query_offsets, const py::object& docs,
           const py::object& doc_offsets, const py::object& candidate_offsets, const py::object& candidate_ids,
           const py::object& scores, const py::object& ids, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimTopk::op, where);
            const Array tokens = args.in("queries", queries);
            run_op<Exec>(
                MaxsimTopk{{tokens, args.in("query offsets", query_offsets)},
                           {args.in("docs", docs), args.in("doc offsets", doc_offsets)},
                           {args.in("candidates offsets", candidate_offsets), args.in("candidates ids", candidate_ids)},
                           args.out("out scores", scores),
                           args.out("out ids", ids)},
                where, tokens);
        },
        py::arg("queries"), py::arg("query_offsets"), py::arg("docs"), py::arg("doc_offsets"),
        py::arg("candidate_offsets"), py::arg("candidate_ids"), py::arg("scores"), py::arg("ids"), py::arg("where"));
    m.def(
        "maxsim_align",
        [](const py::object& query, const py::object& doc, const py::object& ids, const py::object& similarities,
           std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimAlign::op, where);
            const Array tokens = args.in("query", query);
            run_op<Exec>(MaxsimAlign{tokens, args.in("doc", doc), args.out("out ids", ids),
                                     args.out("out similarities", similarities)},
                         where, tokens);
        },
        py::arg("query"), py::arg("doc"), py::arg("ids"), py::arg("similarities"), py::arg("where"));
}

}  // namespace polyvec
