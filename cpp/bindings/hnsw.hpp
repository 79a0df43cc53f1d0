#pragma once

#include <pybind11/typing.h>

#include <memory>
#include <string>

#include "polyvec/hnsw.hpp"
#include "run_op.hpp"

namespace polyvec {

using Tensors = py::typing::Dict<py::str, py::object>;

/// A read-only numpy view of memory that `owner` keeps alive.
inline py::array numpy_view(const Array& a, const std::shared_ptr<const void>& owner) {
    const py::capsule base(new std::shared_ptr<const void>(owner),
                           [](void* p) { delete static_cast<std::shared_ptr<const void>*>(p); });
    py::array view(py::dtype(name_of(a.dtype)), std::vector<py::ssize_t>(a.shape.begin(), a.shape.begin() + a.ndim),
                   a.data, base);
    view.attr("flags").attr("writeable") = false;
    return view;
}

/// Keeps a Python object alive from threads that do not hold the GIL.
inline std::shared_ptr<const void> keep_alive(py::object object) {
    return {new py::object(std::move(object)), [](const py::object* p) {
                const py::gil_scoped_acquire gil;
                delete p;
            }};
}

/// The index takes its locks without the GIL: its holder may be waiting for the GIL to look for Ctrl-C.
inline void bind_hnsw(py::module_& m) {
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    py::class_<HnswParams>(m, "HnswParams")
        .def(py::init([](std::int64_t dim, const std::string& metric, const std::string& storage,
                         const std::string& kept, std::int64_t m, std::int64_t ef_construction, bool hierarchy,
                         std::uint64_t seed, bool frozen) {
                 constexpr const char* op = "hnsw.Index";
                 const HnswParams params{dim,
                                         metric_from(op, metric),
                                         storage_from(op, storage),
                                         kept_from(op, kept),
                                         m,
                                         ef_construction,
                                         hierarchy,
                                         seed,
                                         frozen};
                 params.validate(op);
                 return params;
             }),
             py::arg("dim"), py::arg("metric"), py::arg("storage"), py::arg("kept"), py::arg("m"),
             py::arg("ef_construction"), py::arg("hierarchy"), py::arg("seed"), py::arg("frozen"));
    py::class_<HnswIndex>(m, "HnswIndex")
        .def(py::init<const HnswParams&>(), py::arg("params"))
        .def("size", &HnswIndex::size, Unlocked())
        .def("slots", &HnswIndex::slots, Unlocked())
        .def("bytes", &HnswIndex::bytes, Unlocked())
        .def("contains", &HnswIndex::contains, py::arg("id"), Unlocked())
        .def("largest_id", &HnswIndex::largest_id, Unlocked())
        .def("frozen", [](const HnswIndex& index) { return index.params().frozen; });
    m.def(
        "hnsw_load",
        [](const HnswParams& p, std::int64_t entry, std::int64_t largest_id, const Tensors& tensors) {
            Args args = args_for<Cpu>(HnswIndex::load_op, 0);
            const auto in = [&](const char* name) { return args.in(name, tensors[name]); };
            const auto in_if = [&](bool there, const char* name) { return there ? in(name) : Array{}; };
            HnswState state{in("vectors"),
                            in_if(p.scale_count() > 0, "scales"),
                            in_if(p.code_width() > 0, "codes"),
                            in_if(p.factor_count() > 0, "factors"),
                            in_if(p.frozen, "frame"),
                            in("links"),
                            in("levels"),
                            in("upper_links"),
                            in("ids"),
                            in("removed"),
                            entry,
                            largest_id,
                            keep_alive(tensors)};
            const py::gil_scoped_release nogil;
            return std::make_unique<HnswIndex>(p, state);
        },
        py::arg("params"), py::arg("entry"), py::arg("largest_id"), py::arg("tensors"));
    const auto bind_copy = [&m](const char* name, auto call) {
        m.def(
            name,
            [call](const HnswIndex& index, std::intptr_t where) {
                const py::gil_scoped_release nogil;
                return (index.*call)(Cpu{static_cast<int>(where)});
            },
            py::arg("index"), py::arg("where"));
    };
    bind_copy("hnsw_compact", &HnswIndex::compacted);
    bind_copy("hnsw_freeze", &HnswIndex::freeze);
    m.def(
        "hnsw_state",
        [](const HnswIndex& index) {
            const HnswState state = [&] {
                const py::gil_scoped_release nogil;
                return index.state();
            }();
            Tensors tensors;
            for (const Array* a : {&state.codes, &state.vectors, &state.scales, &state.factors, &state.frame,
                                   &state.links, &state.levels, &state.upper_links, &state.ids, &state.removed})
                if (*a) tensors[a->name] = numpy_view(*a, state.owner);
            return std::make_tuple(tensors, state.entry, state.largest_id);
        },
        py::arg("index"));
    const auto bind = [&m](const char* name, const char* op, auto call) {
        m.def(
            name,
            [op, call](HnswIndex& index, const py::object& ids, std::intptr_t where) {
                Args args = args_for<Cpu>(op, where);
                const Array a = args.in("ids", ids);
                const py::gil_scoped_release nogil;
                (index.*call)(a);
            },
            py::arg("index"), py::arg("ids"), py::arg("where"));
    };
    bind("hnsw_ids", HnswIndex::ids_op, &HnswIndex::ids);
    bind("hnsw_remove", HnswIndex::remove_op, &HnswIndex::remove);
    m.def(
        "hnsw_link",
        [](HnswIndex& index, const py::object& from, const py::object& to, std::intptr_t where) {
            Args args = args_for<Cpu>(HnswIndex::fit_op, where);
            const Array a = args.in("from", from), b = args.in("to", to);
            const py::gil_scoped_release nogil;
            index.link(a, b);
        },
        py::arg("index"), py::arg("from_slots"), py::arg("to_slots"), py::arg("where"));
    m.def(
        "hnsw_get",
        [](const HnswIndex& index, const py::object& ids, const py::object& out, std::intptr_t where) {
            Args args = args_for<Cpu>(HnswIndex::get_op, where);
            const Array a = args.in("ids", ids), to = args.out("out", out);
            const py::gil_scoped_release nogil;
            index.get(a, to);
        },
        py::arg("index"), py::arg("ids"), py::arg("out"), py::arg("where"));
    m.def(
        "hnsw_reserve",
        [](HnswIndex& index, const py::object& vectors, const py::object& ids, std::intptr_t where) {
            Args args = args_for<Cpu>(HnswIndex::add_op, where);
            const Array x = args.in("vectors", vectors), a = args.in("ids", ids);
            const py::gil_scoped_release nogil;
            index.reserve(x, a);
        },
        py::arg("index"), py::arg("vectors"), py::arg("ids"), py::arg("where"));
    m.def(
        "hnsw_add",
        [](HnswIndex& index, const py::object& vectors, const py::object& ids, std::intptr_t where) {
            Args args = args_for<Cpu>(HnswIndex::add_op, where);
            const Array x = args.in("vectors", vectors), a = args.in("ids", ids);
            const py::gil_scoped_release nogil;
            index.add(x, a, Cpu{static_cast<int>(where)});
        },
        py::arg("index"), py::arg("vectors"), py::arg("ids"), py::arg("where"));
    m.def(
        "hnsw_search",
        [](const HnswIndex& index, const py::object& queries, std::int64_t ef, float margin, const py::object& include,
           const py::object& scores, const py::object& ids, std::intptr_t where) {
            Args args = args_for<Cpu>(HnswIndex::search_op, where);
            const Array x = args.in("queries", queries), shown = args.in("include", include);
            const Array s = args.out("scores", scores), a = args.out("ids", ids);
            const py::gil_scoped_release nogil;
            index.search(x, ef, margin, shown, s, a, Cpu{static_cast<int>(where)});
        },
        py::arg("index"), py::arg("queries"), py::arg("ef"), py::arg("margin"), py::arg("include"), py::arg("scores"),
        py::arg("ids"), py::arg("where"));
}

}  // namespace polyvec
