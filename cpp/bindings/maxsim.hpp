#pragma once

#include "polyvec/maxsim.hpp"
#include "run_op.hpp"

namespace polyvec {

/// (tokens, offsets, scales, centroid_ids, centroids, weights), the last four None where the format has none.
inline StoredTokens stored_tokens(Args& args, const py::tuple& docs) {
    return {{args.in("docs", docs[0]), args.in("doc offsets", docs[1])},
            args.in("scales", docs[2]),
            args.in("centroid_ids", docs[3]),
            args.in("centroids", docs[4]),
            args.in("bucket_weights", docs[5])};
}

template <class Exec, class Op>
void def_score(py::module_& m, const char* name) {
    m.def(
        name,
        [](const py::object& queries, const py::object& query_offsets, const py::object& docs, std::int64_t full,
           double empty, const py::object& out, std::intptr_t where) {
            Args args = args_for<Exec>(Op::op, where);
            const Array tokens = args.in("queries", queries);
            run_op<Exec>(Op{{tokens, args.in("query offsets", query_offsets)},
                            stored_tokens(args, docs),
                            {full, empty},
                            args.out("out", out)},
                         where, tokens);
        },
        py::arg("queries"), py::arg("query_offsets"), py::arg("docs"), py::arg("full"), py::arg("empty"),
        py::arg("out"), py::arg("where"));
}

template <class Exec>
void bind_maxsim(py::module_& m) {
    def_score<Exec, MaxsimScore>(m, "maxsim_score");
    def_score<Exec, MaxsimScorePairs>(m, "maxsim_score_pairs");
    m.def(
        "maxsim_score_matrix",
        [](const py::object& query, const py::object& doc, const py::object& out, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimScoreMatrix::op, where);
            const Array tokens = args.in("query", query);
            run_op<Exec>(MaxsimScoreMatrix{tokens, args.in("doc", doc), args.out("out", out)}, where, tokens);
        },
        py::arg("query"), py::arg("doc"), py::arg("out"), py::arg("where"));
    m.def(
        "maxsim_topk",
        [](const py::object& queries, const py::object& query_offsets, const py::object& docs, std::int64_t full,
           double empty, const py::object& candidate_offsets, const py::object& candidate_ids,
           const py::object& include, const py::object& scores, const py::object& ids, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimTopk::op, where);
            const Array tokens = args.in("queries", queries);
            run_op<Exec>(
                MaxsimTopk{{tokens, args.in("query offsets", query_offsets)},
                           stored_tokens(args, docs),
                           {full, empty},
                           {args.in("candidates offsets", candidate_offsets), args.in("candidates ids", candidate_ids)},
                           args.in("include", include),
                           args.out("out scores", scores),
                           args.out("out ids", ids)},
                where, tokens);
        },
        py::arg("queries"), py::arg("query_offsets"), py::arg("docs"), py::arg("full"), py::arg("empty"),
        py::arg("candidate_offsets"), py::arg("candidate_ids"), py::arg("include"), py::arg("scores"), py::arg("ids"),
        py::arg("where"));
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
    m.def(
        "maxsim_match",
        [](const py::object& queries, const py::object& query_offsets, const py::object& docs,
           const py::object& doc_offsets, const py::object& out, const py::object& rows, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimMatch::op, where);
            const Array tokens = args.in("queries", queries);
            const TokenSets documents{args.in("docs", docs), args.in("doc offsets", doc_offsets)};
            run_op<Exec>(MaxsimMatch{{tokens, args.in("query offsets", query_offsets)},
                                     documents,
                                     args.out("out", out),
                                     args.out("rows", rows)},
                         where, tokens);
        },
        py::arg("queries"), py::arg("query_offsets"), py::arg("docs"), py::arg("doc_offsets"), py::arg("out"),
        py::arg("rows"), py::arg("where"));
    m.def(
        "maxsim_match_gradient",
        [](const py::object& queries, const py::object& query_offsets, const py::object& docs,
           const py::object& doc_offsets, const py::object& grad, const py::object& rows, bool of_docs,
           const py::object& out, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimMatchGradient::op, where);
            const Array tokens = args.in("queries", queries);
            const TokenSets documents{args.in("docs", docs), args.in("doc offsets", doc_offsets)};
            run_op<Exec>(MaxsimMatchGradient{{tokens, args.in("query offsets", query_offsets)},
                                             documents,
                                             args.in("grad", grad),
                                             args.in("rows", rows),
                                             of_docs,
                                             args.out("out", out)},
                         where, tokens);
        },
        py::arg("queries"), py::arg("query_offsets"), py::arg("docs"), py::arg("doc_offsets"), py::arg("grad"),
        py::arg("rows"), py::arg("of_docs"), py::arg("out"), py::arg("where"));
}

/// What packs tokens, and unpacks them.
template <class Exec>
void bind_packed_tokens(py::module_& m) {
    m.def(
        "maxsim_pack",
        [](const py::object& tokens, const py::object& codes, const py::object& scales, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimPack::op, where);
            const Array first = args.in("docs", tokens);
            run_op<Exec>(MaxsimPack{first, args.out("out codes", codes),
                                    scales.is_none() ? Array{} : args.out("out scales", scales)},
                         where, first);
        },
        py::arg("tokens"), py::arg("codes"), py::arg("scales"), py::arg("where"));
    m.def(
        "maxsim_buckets",
        [](const py::object& tokens, const py::object& centroid_ids, const py::object& centroids,
           const py::object& weights, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimBuckets::op, where);
            const Array first = args.in("docs", tokens);
            run_op<Exec>(MaxsimBuckets{first, args.in("centroid_ids", centroid_ids), args.in("centroids", centroids),
                                       args.out("bucket_weights", weights)},
                         where, first);
        },
        py::arg("tokens"), py::arg("centroid_ids"), py::arg("centroids"), py::arg("weights"), py::arg("where"));
    m.def(
        "maxsim_compress",
        [](const py::object& tokens, const py::object& offsets, const py::object& codes, const py::object& scales,
           const py::object& centroid_ids, const py::object& centroids, const py::object& weights,
           std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimCompress::op, where);
            const Array first = args.in("docs", tokens);
            run_op<Exec>(MaxsimCompress{first,
                                        {{args.out("codes", codes), args.in("doc offsets", offsets)},
                                         args.out("scales", scales),
                                         args.in("centroid_ids", centroid_ids),
                                         args.in("centroids", centroids),
                                         args.in("bucket_weights", weights)}},
                         where, first);
        },
        py::arg("tokens"), py::arg("offsets"), py::arg("codes"), py::arg("scales"), py::arg("centroid_ids"),
        py::arg("centroids"), py::arg("weights"), py::arg("where"));
    m.def(
        "maxsim_residual_scales",
        [](const py::object& docs, const py::object& scales, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimResidualScales::op, where);
            StoredTokens stored = stored_tokens(args, docs);
            stored.scales = args.out("out scales", scales);
            run_op<Exec>(MaxsimResidualScales{stored}, where, stored.tokens);
        },
        py::arg("docs"), py::arg("scales"), py::arg("where"));
    m.def(
        "maxsim_bounds",
        [](const py::object& tokens, const py::object& docs, const py::object& bounds, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimBounds::op, where);
            const Array first = args.in("docs", tokens);
            run_op<Exec>(MaxsimBounds{first, stored_tokens(args, docs), args.out("bounds", bounds)}, where, first);
        },
        py::arg("tokens"), py::arg("docs"), py::arg("bounds"), py::arg("where"));
    m.def(
        "maxsim_decode",
        [](const py::object& docs, const py::object& out, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimDecode::op, where);
            const StoredTokens stored = stored_tokens(args, docs);
            run_op<Exec>(MaxsimDecode{stored, args.out("out", out)}, where, stored.tokens);
        },
        py::arg("docs"), py::arg("out"), py::arg("where"));
}

template <class Exec>
void bind_certified_topk(py::module_& m) {
    m.def(
        "maxsim_certified_topk",
        [](const py::object& queries, const py::object& query_offsets, const py::object& packed,
           const py::object& bounds, const py::object& docs, const py::object& doc_offsets, const py::object& scores,
           const py::object& ids, const py::object& rescored, std::intptr_t where) {
            Args args = args_for<Exec>(MaxsimCertifiedTopk::op, where);
            const Array tokens = args.in("queries", queries);
            run_op<Exec>(MaxsimCertifiedTopk{{tokens, args.in("query offsets", query_offsets)},
                                             stored_tokens(args, packed),
                                             args.in("bounds", bounds),
                                             {args.in("docs", docs), args.in("doc offsets", doc_offsets)},
                                             args.out("out scores", scores),
                                             args.out("out ids", ids),
                                             args.out("rescored", rescored)},
                         where, tokens);
        },
        py::arg("queries"), py::arg("query_offsets"), py::arg("packed"), py::arg("bounds"), py::arg("docs"),
        py::arg("doc_offsets"), py::arg("scores"), py::arg("ids"), py::arg("rescored"), py::arg("where"));
}

}  // namespace polyvec
