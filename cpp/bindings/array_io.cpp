#include "array_io.hpp"

#include <pybind11/numpy.h>

#include <cstring>
#include <optional>

#include "dlpack_abi.hpp"
#include "polyvec/error.hpp"

namespace polyvec {
namespace {

std::optional<DType> dtype_of(char kind, std::size_t bytes) {
    if (kind == 'f') {
        if (bytes == 8) return DType::f64;
        if (bytes == 4) return DType::f32;
        if (bytes == 2) return DType::f16;
    } else if (kind == 'i') {
        if (bytes == 8) return DType::i64;
        if (bytes == 4) return DType::i32;
        if (bytes == 1) return DType::i8;
    } else if (kind == 'u') {
        if (bytes == 8) return DType::u64;
        if (bytes == 4) return DType::u32;
        if (bytes == 2) return DType::u16;
        if (bytes == 1) return DType::u8;
    } else if (kind == 'b' && bytes == 1) {
        return DType::boolean;
    }
    return std::nullopt;
}

[[noreturn]] void unsupported(const char* name, const py::handle& object) {
    const std::string dtype = py::hasattr(object, "dtype") ? std::string(py::str(object.attr("dtype"))) : "unknown";
    throw TypeError(concat(name, " has a dtype that polyvec does not read: ", dtype));
}

void check_ndim(const char* name, std::int64_t ndim) {
    if (ndim > Array::max_ndim)
        throw std::invalid_argument(concat(name, " must have at most ", Array::max_ndim, " axes, got ", ndim));
}

}  // namespace

Array Args::read_numpy(const char* name, const py::array& array) {
    const py::dtype dtype = array.dtype();
    std::optional<DType> known = dtype_of(dtype.kind(), static_cast<std::size_t>(dtype.itemsize()));
    // ml_dtypes' bfloat16 is a user-defined type that numpy itself only knows by name.
    if (!known && std::string(py::str(dtype)) == "bfloat16") known = DType::bf16;
    if (!known || dtype.byteorder() == '>') unsupported(name, array);

    check_ndim(name, array.ndim());
    Array a;
    a.name = name;
    a.data = const_cast<void*>(array.data());
    a.dtype = *known;
    a.ndim = static_cast<int>(array.ndim());
    a.writable = array.writeable();
    for (int i = 0; i < a.ndim; ++i) {
        a.shape[i] = array.shape(i);
        a.strides[i] = array.strides(i) / array.itemsize();
    }
    return a;
}

Array Args::read_dlpack(const char* name, const py::object& object) {
    py::object capsule =
        device_ == Device::cuda ? object.attr("__dlpack__")(py::arg("stream") = stream_) : object.attr("__dlpack__")();
    const dlpack::Tensor* tensor = nullptr;
    bool writable = true;
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
        tensor = &static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->dl_tensor;
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
        const auto* managed =
            static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
        if (managed->version.major > 1)
            throw TypeError(concat(name, " is exported by DLPack ", managed->version.major, ", polyvec reads up to 1"));
        tensor = &managed->dl_tensor;
        writable = !(managed->flags & 1);
    } else {
        throw TypeError(concat(name, " does not export a DLPack tensor"));
    }

    static constexpr char kinds[] = {'i', 'u', 'f', '?', 'B', '?', 'b'};
    const dlpack::DataType type = tensor->dtype;
    std::optional<DType> dtype;
    if (type.lanes == 1 && type.code < sizeof kinds)
        dtype =
            type.code == dlpack::kBfloat && type.bits == 16 ? DType::bf16 : dtype_of(kinds[type.code], type.bits / 8);
    if (!dtype) unsupported(name, object);

    check_ndim(name, tensor->ndim);
    Array a;
    a.name = name;
    a.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
    a.dtype = *dtype;
    const std::int32_t where = tensor->device.device_type;
    a.device = where == dlpack::kCPU || where == dlpack::kCUDAHost ? Device::cpu : Device::cuda;
    a.device_index = tensor->device.device_id;
    a.ndim = tensor->ndim;
    a.writable = writable;
    std::int64_t dense = 1;
    for (int i = a.ndim - 1; i >= 0; --i) {
        a.shape[i] = tensor->shape[i];
        a.strides[i] = tensor->strides ? tensor->strides[i] : dense;
        dense *= a.shape[i];
    }
    owners_.push_back(std::move(capsule));  // an unconsumed capsule frees its tensor when it goes
    return a;
}

Array Args::in(const char* name, const py::object& object) {
    Array a;
    if (object.is_none()) return a;
    if (py::isinstance<py::array>(object)) {
        a = read_numpy(name, py::reinterpret_borrow<py::array>(object));
    } else if (py::hasattr(object, "__dlpack__")) {
        a = read_dlpack(name, object);
    } else {
        throw TypeError(concat(name, " must be an array, got ", std::string(py::str(py::type::of(object)))));
    }
    if (a.device != device_)
        throw TypeError(concat(name, " must be on ", name_of(device_), ", got ", name_of(a.device)));
    return a;
}

Array Args::out(const char* name, const py::object& object) {
    Array a = in(name, object);
    if (!a) throw TypeError(concat(name, " must be an array, got None"));
    return a;
}

}  // namespace polyvec
