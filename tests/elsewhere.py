"""Arrays that say they lie on a GPU, though they do not: for the host side of CUDA calls, and for kernels on a CPU."""

import ctypes
import importlib.util
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
from numpy.lib.stride_tricks import as_strided


class Elsewhere:
    """A numpy array with another device, enough of the array interface for public functions and their tests."""

    def __init__(self, array, device=2, index=0):
        self.array, self.place, self.streams = np.asarray(array), (device, index), []
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def __dlpack_device__(self):
        return self.place

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        tensor = pointer(capsule, b"dltensor")
        device = (ctypes.c_int32 * 2).from_address(tensor + ctypes.sizeof(ctypes.c_void_p))  # after the data pointer
        device[:] = self.place
        return capsule

    def __array_namespace__(self):
        def of_arrays(function):
            return lambda *arrays: Elsewhere(function(*(a.array for a in arrays)), *self.place)

        def broadcast_to(x, shape):
            strides = np.broadcast_to(x.array, shape).strides
            return Elsewhere(as_strided(x.array, shape, strides), *self.place)  # DLPack 0 refuses read-only arrays

        return SimpleNamespace(
            float16="float16",
            float32="float32",
            float64="float64",
            int8="int8",
            uint8="uint8",
            uint16="uint16",
            int32="int32",
            int64="int64",
            empty=lambda shape, dtype: Elsewhere(np.full(shape, 77, dtype), *self.place),  # poison
            asarray=lambda x: Elsewhere(x, *self.place),
            ascontiguousarray=lambda x: x if x.array.flags.c_contiguous else of_arrays(np.ascontiguousarray)(x),
            broadcast_to=broadcast_to,
            concat=lambda arrays: Elsewhere(np.concatenate([a.array for a in arrays]), *self.place),
        )

    def __getitem__(self, key):
        return Elsewhere(self.array[key], *self.place)

    def __len__(self):
        return len(self.array)

    def __setitem__(self, key, value):
        self.array[key] = value

    def __getattr__(self, name):
        value = getattr(self.array, name)  # T, ndim, reshape, swapaxes, astype, repeat, ...
        if callable(value):
            return lambda *args, **kwargs: self._wrapped(value(*args, **kwargs))
        return self._wrapped(value)

    def _wrapped(self, value):
        return Elsewhere(value, *self.place) if isinstance(value, np.ndarray) else value

    def get(self):
        """Return the numpy array, as CuPy does."""
        return self.array


def load_cuda_on_host():
    """Make polyvec use the CUDA kernels as they were built for the CPU; None where they were not."""
    found = list((pathlib.Path(__file__).parent / "cuda_on_host").glob("_cuda.*"))
    if not found:
        return None
    spec = importlib.util.spec_from_file_location("polyvec._cuda", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["polyvec._cuda"] = module
    return module
