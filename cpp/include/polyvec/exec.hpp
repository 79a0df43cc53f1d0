/// Where and how an op runs. `run(const Op&, Cpu)` lives in src/, `run(const Op&, Cuda)` in cuda/.
#pragma once

#include <cstdint>

namespace polyvec {

struct Cpu {
    int num_threads = 0;  // 0: the process setting
};

struct Cuda {
    int device = 0;
    std::intptr_t stream = 0;  // the caller's current cudaStream_t; work is queued there and not waited for
};

}  // namespace polyvec
