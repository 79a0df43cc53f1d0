/// The structs of the DLPack ABI that we read, declared here: a public, frozen interface of a few lines.
/// https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace polyvec::dlpack {

struct Version {
    std::uint32_t major, minor;
};

enum DeviceType : std::int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kCUDAManaged = 13 };

struct Device {
    std::int32_t device_type, device_id;
};

enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct DataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null means row-major
    std::uint64_t byte_offset;
};

/// What a capsule named "dltensor" points to.
struct ManagedTensor {
    Tensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(ManagedTensor*);
};

/// What a capsule named "dltensor_versioned" points to.
struct ManagedTensorVersioned {
    Version version;
    void* manager_ctx;
    void (*deleter)(ManagedTensorVersioned*);
    std::uint64_t flags;  // bit 0: read-only
    Tensor dl_tensor;
};

}  // namespace polyvec::dlpack
