#include "array_io.hpp"

#include <pybind11/numpy.h>

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

void require_few_axes(const char* op, const char* name, std::int64_t ndim) {
    require(ndim <= Array::max_ndim, op, name, " must have at most ", Array::max_ndim, " axes, got ", ndim);
}

struct Extent {
    const char *begin, *end;
};

/// The bytes between the first and the last element of `a`.
Extent extent_of(const Array& a) {
    if (a.size() == 0) return {nullptr, nullptr};
    std::int64_t below = 0, above = 1;
    for (int i = 0; i < a.ndim; ++i) (a.stride(i) < 0 ? below : above) += (a.dim(i) - 1) * a.stride(i);
    const auto bytes = static_cast<std::int64_t>(size_of(a.dtype));
    return {a.as<const char>() + below * bytes, a.as<const char>() + above * bytes};
}

/// torch's export of a tensor as it is, or null where `object` is none. Its `__dlpack__` takes longer, in Python, and
/// has one stream wait for another, though kernels are queued on the stream that the tensor's own work is on.
py::object export_of_torch(const py::object& object) {
    static py::handle tensor, to_dlpack;  // held as long as the process runs
    if (!tensor) {
        const py::dict modules = py::module_::import("sys").attr("modules");
        if (!modules.contains("torch")) return {};
        const py::module_ torch = py::module_::import("torch");
        to_dlpack = py::object(torch.attr("utils").attr("dlpack").attr("to_dlpack")).release();
        tensor = py::object(torch.attr("Tensor")).release();
    }
    return py::isinstance(object, tensor) ? py::object(to_dlpack(object)) : py::object();
}

bool overlap(const Array& a, const Array& b) {
    const Extent x = extent_of(a), y = extent_of(b);
    return x.begin < y.end && y.begin < x.end;
}

}  // namespace

void Args::unsupported(const char* name, const py::handle& object) const {
    const std::string dtype = py::hasattr(object, "dtype") ? std::string(py::str(object.attr("dtype"))) : "unknown";
    fail<TypeError>(op_, name, " has a dtype that polyvec does not read: ", dtype);
}

Array Args::read_numpy(const char* name, const py::array& array) {
    const py::dtype dtype = array.dtype();
    std::optional<DType> known = dtype_of(dtype.kind(), static_cast<std::size_t>(dtype.itemsize()));
    // ml_dtypes' bfloat16 is a user-defined type that numpy itself only knows by name.
    if (!known && std::string(py::str(dtype)) == "bfloat16") known = DType::bf16;
    if (!known || dtype.byteorder() == '>') unsupported(name, array);

    require_few_axes(op_, name, array.ndim());
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
    py::object capsule = export_of_torch(object);
    if (!capsule)
        capsule = device_ == Device::cuda ? object.attr("__dlpack__")(py::arg("stream") = stream_)
                                          : object.attr("__dlpack__")();
    const dlpack::Tensor* tensor = nullptr;
    bool writable = true;
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
        tensor = &static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->dl_tensor;
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
        const auto* managed =
            static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
        require<TypeError>(managed->version.major <= 1, op_, name, " must be exported by DLPack 1 or older, got ",
                           managed->version.major);
        tensor = &managed->dl_tensor;
        writable = !(managed->flags & 1);
    } else {
        fail<TypeError>(op_, name, " must export a DLPack tensor");
    }

    static constexpr char kinds[] = {'i', 'u', 'f', '?', 'B', '?', 'b'};
    const dlpack::DataType type = tensor->dtype;
    std::optional<DType> dtype;
    if (type.lanes == 1 && type.code < sizeof kinds)
        dtype =
            type.code == dlpack::kBfloat && type.bits == 16 ? DType::bf16 : dtype_of(kinds[type.code], type.bits / 8);
    if (!dtype) unsupported(name, object);

    require_few_axes(op_, name, tensor->ndim);
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

Array Args::read(const char* name, const py::object& object) {
    Array a;
    if (py::isinstance<py::array>(object)) {
        a = read_numpy(name, py::reinterpret_borrow<py::array>(object));
    } else if (py::hasattr(object, "__dlpack__")) {
        a = read_dlpack(name, object);
    } else {
        fail<TypeError>(op_, name, " must be an array, got ", std::string(py::str(py::type::of(object))));
    }
    require<TypeError>(a.device == device_, op_, name, " must be on ", name_of(device_), ", got ", name_of(a.device));
    if (device_index_ < 0) device_index_ = a.device_index;
    require<TypeError>(device_ == Device::cpu || a.device_index == device_index_, op_, name,
                       " must be on cuda:", device_index_, " as the first array, got cuda:", a.device_index);
    return a;
}

Array Args::in(const char* name, const py::object& object) {
    if (object.is_none()) return {};
    inputs_.push_back(read(name, object));
    return inputs_.back();
}

Array Args::out(const char* name, const py::object& object) {
    const Array a = read(name, object);
    for (const Array& input : inputs_) require(!overlap(a, input), op_, name, " must not overlap ", input.name);
    return a;
}

}  // namespace polyvec
