/// CUDA's own errors as text and as exceptions; host code only.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "polyvec/error.hpp"

namespace polyvec {

inline std::string text_of(cudaError_t status) {
    int driver = 0;  // stays 0 where there is none, which CUDA itself calls an insufficient one
    if (status == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
        return "no CUDA driver is installed";
    return concat(cudaGetErrorString(status), " (", cudaGetErrorName(status), ")");
}

inline void check(const char* op, cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // reported here, so that no later launch finds it
    fail<CudaError>(op, "CUDA failed: ", text_of(status));
}

}  // namespace polyvec
