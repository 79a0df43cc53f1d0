#pragma once

#include "polyvec/codes.hpp"
#include "run_op.hpp"

namespace polyvec {

/// `form`: bits, and which parts a code has: any of the letters s(cale), m(ean), o(ffset), e(rror).
inline CodeForm code_form(int bits, const std::string& parts) {
    const auto has = [&](char part) { return parts.find(part) != std::string::npos; };
    return {bits, has('s'), has('m'), has('o'), has('e')};
}

template <class Exec>
void bind_codes(py::module_& m) {
    m.def(
        "code_size",
        [](std::int64_t d, int bits, const std::string& parts) { return code_form(bits, parts).code_size(d); },
        py::arg("d"), py::arg("bits"), py::arg("parts"));
    m.def(
        "code_columns",
        [](std::int64_t d, int bits, const std::string& parts) { return code_form(bits, parts).columns(d); },
        py::arg("d"), py::arg("bits"), py::arg("parts"));
    m.def(
        "codes_scalar_encode",
        [](const py::object& x, const py::object& mid, const py::object& step, const py::object& codes, int bits,
           const std::string& parts, std::intptr_t where) {
            Args args = args_for<Exec>(ScalarEncode::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(ScalarEncode{a, args.in("mid", mid), args.in("step", step), args.out("codes", codes),
                                      code_form(bits, parts)},
                         where, a);
        },
        py::arg("x"), py::arg("mid"), py::arg("step"), py::arg("codes"), py::arg("bits"), py::arg("parts"),
        py::arg("where"));
    m.def(
        "codes_rabitq_encode",
        [](const py::object& x, const py::object& codes, int bits, const std::string& parts, std::intptr_t where) {
            Args args = args_for<Exec>(RabitqEncode::op, where);
            const Array a = args.in("x", x);
            run_op<Exec>(RabitqEncode{a, args.out("codes", codes), code_form(bits, parts)}, where, a);
        },
        py::arg("x"), py::arg("codes"), py::arg("bits"), py::arg("parts"), py::arg("where"));
    m.def(
        "codes_decode",
        [](const py::object& codes, const py::object& mid, const py::object& step, const py::object& out, int bits,
           const std::string& parts, std::intptr_t where) {
            Args args = args_for<Exec>(CodesDecode::op, where);
            const Array a = args.in("codes", codes);
            run_op<Exec>(CodesDecode{a, args.in("mid", mid), args.in("step", step), args.out("out", out),
                                     code_form(bits, parts)},
                         where, a);
        },
        py::arg("codes"), py::arg("mid"), py::arg("step"), py::arg("out"), py::arg("bits"), py::arg("parts"),
        py::arg("where"));
    m.def(
        "codes_pack",
        [](const py::object& codes, const py::object& blocks, std::int64_t d, int bits, const std::string& parts,
           std::intptr_t where) {
            Args args = args_for<Exec>(CodesPack::op, where);
            const Array a = args.in("codes", codes);
            run_op<Exec>(CodesPack{a, args.out("blocks", blocks), d, code_form(bits, parts)}, where, a);
        },
        py::arg("codes"), py::arg("blocks"), py::arg("d"), py::arg("bits"), py::arg("parts"), py::arg("where"));
    m.def(
        "codes_search",
        [](const py::object& weights, const py::object& means, const py::object& constants, const py::object& codes,
           std::int64_t n, const py::object& include, const py::object& scores, const py::object& ids, int bits,
           const std::string& parts, bool squared, std::intptr_t where) {
            Args args = args_for<Exec>(CodesSearch::op, where);
            const Array a = args.in("queries", weights);
            run_op<Exec>(CodesSearch{a, args.in("means", means), args.in("constants", constants),
                                     args.in("codes", codes), n, args.in("include", include),
                                     args.out("scores", scores), args.out("ids", ids), code_form(bits, parts), squared},
                         where, a);
        },
        py::arg("weights"), py::arg("means"), py::arg("constants"), py::arg("codes"), py::arg("n"), py::arg("include"),
        py::arg("scores"), py::arg("ids"), py::arg("bits"), py::arg("parts"), py::arg("squared"), py::arg("where"));
    m.def(
        "codes_rotate",
        [](const py::object& signs, const py::object& x, bool inverse, std::intptr_t where) {
            Args args = args_for<Exec>(FastRotation::op, where);
            const Array a = args.in("signs", signs);
            run_op<Exec>(FastRotation{a, args.out("x", x), inverse}, where, a);
        },
        py::arg("signs"), py::arg("x"), py::arg("inverse"), py::arg("where"));
    m.def(
        "codes_unit_rows",
        [](const py::object& x, std::intptr_t where) {
            Args args = args_for<Exec>(UnitRows::op, where);
            const Array a = args.out("x", x);
            run_op<Exec>(UnitRows{a}, where, a);
        },
        py::arg("x"), py::arg("where"));
}

}  // namespace polyvec
