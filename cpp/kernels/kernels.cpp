// Gathers the engines' tables of this ISA level. One line an engine.
#include "tables.hpp"

#define POLYVEC_TEXT_(x) #x
#define POLYVEC_TEXT(x) POLYVEC_TEXT_(x)

namespace polyvec::POLYVEC_ISA {

extern const HypercomplexKernels hypercomplex_kernels;
extern const DistanceKernels distance_kernels;
extern const IntegerDistanceKernels int8_distance_kernels, int4_distance_kernels;
extern const BitDistanceKernels bit_distance_kernels;
extern const MaxsimKernels maxsim_kernels;
extern const ScanKernels scan_kernels;
extern const FdeKernels fde_kernels;
extern const QuantizeKernels quantize_kernels;
extern const CodesKernels codes_kernels;
extern const SoftAssignKernels soft_assign_kernels;
extern const PqKernels pq_kernels;
extern const PqLossKernels pq_loss_kernels;
extern const RqKernels rq_kernels;

extern const Kernels table;
const Kernels table{
    .isa = POLYVEC_TEXT(POLYVEC_ISA),
    .hypercomplex = &hypercomplex_kernels,
    .distance = &distance_kernels,
    .int8_distance = &int8_distance_kernels,
    .int4_distance = &int4_distance_kernels,
    .bit_distance = &bit_distance_kernels,
    .maxsim = &maxsim_kernels,
    .scan = &scan_kernels,
    .fde = &fde_kernels,
    .quantize = &quantize_kernels,
    .codes = &codes_kernels,
    .soft_assign = &soft_assign_kernels,
    .pq = &pq_kernels,
    .pq_loss = &pq_loss_kernels,
    .rq = &rq_kernels,
};

}  // namespace polyvec::POLYVEC_ISA
