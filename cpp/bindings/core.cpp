/// The table of contents of polyvec._core.
#include "clusters.hpp"
#include "codes.hpp"
#include "fde.hpp"
#include "hnsw.hpp"
#include "hypercomplex.hpp"
#include "knn_graph.hpp"
#include "maxsim.hpp"
#include "polyvec/finite.hpp"
#include "polyvec/isa.hpp"
#include "polyvec/parallel.hpp"
#include "quantize.hpp"
#include "quantize_pq.hpp"
#include "quantize_pq_loss.hpp"
#include "quantize_rq.hpp"
#include "run_op.hpp"
#include "scan.hpp"
#include "soft_assign.hpp"
#include "vq_linear.hpp"

// The names that threadpoolctl looks up in this library.
extern "C" {
__attribute__((visibility("default"))) int polyvec_get_num_threads() {
    return polyvec::get_num_threads();
}
__attribute__((visibility("default"))) void polyvec_set_num_threads(int n) {
    polyvec::set_num_threads(n);
}
}

namespace polyvec {
namespace {

/// Runs Python's signal handlers; true when one raised (Ctrl-C). Only Python's main thread has any to run.
bool interrupt_hook() {
    const py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

void bind_runtime(py::module_& m) {
    m.def("available_isas", &available_isas);
    m.def("active_isa", &active_isa);
    m.def("isa_choice", &isa_choice);
    m.def("force_isa", &force_isa, py::arg("name"));
    m.def("available_cpus", &available_cpus);
    m.def("get_num_threads", &get_num_threads);
    m.def("set_num_threads", &set_num_threads, py::arg("n"));
    m.def(
        "first_nonfinite_row",
        [](const py::object& x, std::intptr_t where) {
            const char* op = "first_nonfinite_row";
            Args args = args_for<Cpu>(op, where);
            const Array a = args.in("x", x);
            if (a.dtype != DType::f16 && a.dtype != DType::bf16 && a.dtype != DType::u16) require_float(op, a);
            require_contiguous(op, a);
            const py::gil_scoped_release nogil;
            return first_nonfinite_row(a, Cpu{static_cast<int>(where)});
        },
        py::arg("x"), py::arg("where"));
}

}  // namespace
}  // namespace polyvec

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
    using namespace polyvec;
    m.doc() = "Compiled CPU kernels of polyvec. Strict: polyvec's Python functions prepare its arguments.";
    register_errors();
    check_isa_variable();  // an unusable POLYVEC_ISA is an error at import, not at first use
    get_num_threads();     // and so is an unusable POLYVEC_NUM_THREADS
    set_interrupt_hook(interrupt_hook);
    bind_runtime(m);
    bind_hnsw(m);
    bind_hypercomplex<Cpu>(m);
    bind_maxsim<Cpu>(m);
    bind_packed_tokens<Cpu>(m);
    bind_certified_topk<Cpu>(m);
    bind_scan<Cpu>(m);
    bind_scan_gradient<Cpu>(m);
    bind_fde_matrices(m);
    bind_fde<Cpu>(m);
    bind_fde_blocks<Cpu>(m);
    bind_quantize<Cpu>(m);
    bind_codes<Cpu>(m);
    bind_clusters<Cpu>(m);
    bind_knn_graph<Cpu>(m);
    bind_soft_assign<Cpu>(m);
    bind_quantize_pq<Cpu>(m);
    bind_quantize_pq_loss<Cpu>(m);
    bind_quantize_rq<Cpu>(m);
    bind_vq_linear<Cpu>(m);
}
