/// The table of contents of polyvec._cuda.
#include <cuda_runtime_api.h>

#include "clusters.hpp"
#include "fde.hpp"
#include "hypercomplex.hpp"
#include "maxsim.hpp"
#include "run_op.hpp"
#include "scan.hpp"
#include "soft_assign.hpp"
#include "status.hpp"
#include "vq_linear.hpp"

namespace polyvec {
namespace {

/// What this module was built for and what it finds; never fails, whatever the machine lacks.
py::dict info() {
    int runtime = 0, count = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaError_t status = cudaGetDeviceCount(&count);
    py::list devices;
    for (int i = 0; status == cudaSuccess && i < count; ++i) {
        cudaDeviceProp device;
        status = cudaGetDeviceProperties(&device, i);
        if (status == cudaSuccess) devices.append(device.name);
    }
    cudaGetLastError();  // reported here, so that no later launch finds it
    py::dict result;
    result["architectures"] = py::str(POLYVEC_CUDA_ARCHITECTURES).attr("split")();
    result["runtime"] = concat(runtime / 1000, ".", runtime % 1000 / 10);
    result["devices"] = devices;
    result["error"] = status == cudaSuccess ? py::object(py::none()) : py::str(text_of(status));
    return result;
}

}  // namespace
}  // namespace polyvec

PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) {
    using namespace polyvec;
    m.doc() = "Compiled CUDA kernels of polyvec. Strict: polyvec's Python functions prepare its arguments.";
    register_errors();
    m.def("info", &info);
    bind_certified_topk<Cuda>(m);
    bind_clusters<Cuda>(m);
    bind_fde<Cuda>(m);
    bind_fde_blocks<Cuda>(m);
    bind_hypercomplex<Cuda>(m);
    bind_maxsim<Cuda>(m);
    bind_packed_tokens<Cuda>(m);
    bind_scan<Cuda>(m);
    bind_soft_assign<Cuda>(m);
    bind_vq_linear<Cuda>(m);
}
