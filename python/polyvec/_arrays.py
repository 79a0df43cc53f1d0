"""Array libraries behind one small interface: what every public function does with its arguments before the kernel.

Arrays come in as numpy arrays, torch tensors, other DLPack arrays or (nested) lists, and results go out as the kind of
the first array argument, on its device; CPU arrays of libraries other than torch give numpy results. Nothing is moved
between devices and no float dtype is changed silently; an input that is not C-contiguous is copied once.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np


class Array(Protocol):
    """What polyvec accepts as an array: a shape, a dtype and DLPack (numpy, torch, CuPy, JAX, ...)."""

    @property
    def shape(self) -> Any:
        """Lengths of the axes."""

    @property
    def dtype(self) -> Any:
        """The library's own dtype object."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Export to another library without a copy."""


ArrayT = TypeVar("ArrayT", bound=Array)


def _root(x: Any) -> str:
    return type(x).__module__.partition(".")[0]


@cache  # a call asks a dozen times
def is_array_type(kind: type) -> bool:
    """Whether values of a type are arrays."""
    return hasattr(kind, "__dlpack__")


@cache
def needs_device_check(kind: type) -> bool:
    """Whether arrays of a type may lie elsewhere than on a CPU."""
    return is_array_type(kind) and not issubclass(kind, np.ndarray)


@cache
def _is_torch_type(kind: type) -> bool:
    return hasattr(kind, "requires_grad") and hasattr(kind, "data_ptr")


def is_array(x: Any) -> bool:
    """Whether `x` is an array rather than a list or a number."""
    return is_array_type(type(x))  # type: ignore[arg-type]


def is_torch(x: Any) -> bool:
    """Whether `x` is a torch tensor; never imports torch."""
    return _is_torch_type(type(x))  # type: ignore[arg-type]


def dtype_name(x: Any) -> str:
    """Name of the dtype as users write it: float32, bfloat16, int64."""
    return _text_of_dtype(x.dtype)


@cache  # numpy takes microseconds to spell a dtype
def _text_of_dtype(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def device_name(x: Any) -> str:
    """Either "cpu" or "cuda"."""
    if isinstance(x, np.ndarray):
        return "cpu"
    if is_torch(x):
        return x.device.type  # type: ignore[no-any-return]
    kind, _ = x.__dlpack_device__()
    return {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}.get(int(kind), f"device type {int(kind)}")


def _cast_hint(x: Any, dtype: str) -> str:
    return f"; cast it with .to(torch.{dtype})" if is_torch(x) else f"; cast it with .astype('{dtype}')"


# Public functions and their twins in polyvec.torch, which nothing here imports.
DIFFERENTIABLE = {
    "hypercomplex.normalize": "normalize",
    "hypercomplex.product": "product",
    "hypercomplex.relation_query": "relation_query",
    "maxsim.pool": "pool",
    "maxsim.score": "maxsim",
    "maxsim.score_pairs": "maxsim_pairs",
    "quantize.vq_linear": "vq_linear",
    "scan.logsumexp": "logsumexp",
    "scan.nearest": "vq_assign",
    "scan.score_pairs": "score_pairs",
}


def _refuse_grad(op: str, name: str, x: Any) -> None:
    if getattr(x, "requires_grad", False):
        twin = f"polyvec.torch.{DIFFERENTIABLE[op]} or " if op in DIFFERENTIABLE else ""
        raise TypeError(f"{op}: {name} must not require grad, got a tensor that does; use {twin}.detach()")


def _one_of(names: Sequence[str]) -> str:
    return " or ".join(names)


def as_array(
    op: str, name: str, x: Any, *, dtypes: Sequence[str] = ("float32",), ndim: int | None = None, dense: bool = True
) -> Any:
    """Return `x` as an array that a kernel can read.

    Parameters
    ----------
    op, name : str
        The public function and the argument, for messages.
    x : array or nested list
        Lists become numpy arrays of the first of `dtypes`.
    dtypes : sequence of str
        The dtypes the function takes; anything else is a TypeError, never a cast.
    ndim : int, optional
        The number of axes that `x` must have.
    dense : bool
        Whether to copy `x` when it is not C-contiguous.
    """
    if not isinstance(x, np.ndarray):
        if not is_array(x):
            try:
                x = np.asarray(x, dtype=dtypes[0])
            except (TypeError, ValueError):
                raise TypeError(f"{op}: {name} must be an array of {_one_of(dtypes)}, got {type(x).__name__}") from None
        _refuse_grad(op, name, x)
        x = native(x)
    dtype = dtype_name(x)
    if dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {_one_of(dtypes)}, got {dtype}{_cast_hint(x, dtypes[0])}")
    if ndim is not None and len(x.shape) != ndim:
        axes = "axis" if ndim == 1 else "axes"
        raise ValueError(f"{op}: {name} must have {ndim} {axes}, got shape {tuple(x.shape)}")
    return contiguous(x) if dense else x


def as_ids(op: str, name: str, x: Any, *, ndim: int | None = 1, like: Any = None) -> Any:
    """Return integer ids as a contiguous int64 array; other integer dtypes are converted, floats and 2^63 are refused.

    A list goes to the GPU that `like` is on; an array stays where it is.
    """
    if not is_array(x):
        x = np.asarray(x)
        if x.size == 0:
            x = x.astype(np.int64)
        if like is not None and device_name(like) != "cpu":
            x = to_device_of(like, x)
    x = native(x)
    dtype = dtype_name(x)
    if not dtype.startswith(("int", "uint")):
        raise TypeError(f"{op}: {name} must be integers, got {dtype}")
    if dtype != "int64":
        x = x.long() if is_torch(x) else x.astype("int64")
        if dtype == "uint64" and (x < 0).any():  # wrapped
            raise ValueError(f"{op}: {name} must be below 2^63, got {int(x[x < 0][0]) + 2**64}")
    return as_array(op, name, x, dtypes=("int64",), ndim=ndim)


def as_id(op: str, value: Any) -> int | None:
    """Return one id as an int, None where no 64-bit integer is it."""
    if not hasattr(value, "__index__"):
        raise TypeError(f"{op}: id must be an integer, got {type(value).__name__}")
    number = int(value.__index__())
    return number if -(2**63) <= number < 2**63 else None


def as_id_lists(op: str, name: str, lists: Any, like: Any) -> tuple[Any, Any]:
    """Return the offsets and the ids of one list of ids a query, as `as_ids` does; both None where there are none."""
    if lists is None:
        return None, None
    if not (isinstance(lists, tuple) and len(lists) == 2):
        raise TypeError(f"{op}: {name} must be a pair (offsets, ids), got {type(lists).__name__}")
    return as_ids(op, f"{name} offsets", lists[0], like=like), as_ids(op, f"{name} ids", lists[1], like=like)


def require_cpu(op: str, name: str, x: Any) -> None:
    """Refuse an array on a GPU where only the CPU computes."""
    if device_name(x) != "cpu":
        raise TypeError(f"{op}: {name} must be on cpu, got {device_name(x)}; this function has no CUDA form yet")


def as_selection(op: str, name: str, x: Any, n: int | None, each: str = "code") -> np.ndarray[Any, Any] | None:
    """Check which of n take part: return a mask (of any length where n is None) or rows of them, None for all.

    Rows may be any iterable, as their order does not count.
    """
    if x is None:
        return None
    if not is_array(x):
        given = np.asarray(x)
        x = np.asarray(list(x)) if given.ndim == 0 and isinstance(x, Iterable) and not isinstance(x, str) else given
        if x.size == 0:
            x = x.astype(np.int64)
    if dtype_name(x) != "bool":
        return np.asarray(as_ids(op, name, x))
    mask = np.asarray(as_array(op, name, x, dtypes=("bool",), ndim=1))
    if n is not None and len(mask) != n:
        raise ValueError(f"{op}: {name} must have one entry a {each} ({n}), got {len(mask)}")
    return mask


def as_float32(x: Any, *, copy: bool = False) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a C-contiguous numpy array of checked values on the CPU; a view where `x` is one and `copy` is False."""
    if is_torch(x) and dtype_name(x) != "float32":
        x = x.float()
    x = np.asarray(x)
    return np.array(x, np.float32, order="C") if copy else np.ascontiguousarray(x, np.float32)


def native(x: Any) -> Any:
    """Return `x`, or its memory as a numpy array when it is a CPU array of a library other than numpy and torch."""
    if isinstance(x, np.ndarray):
        return x
    if is_torch(x):
        return x.resolve_neg() if x.is_neg() else x  # z.conj().imag has a lazy minus, which DLPack does not export
    return np.from_dlpack(x) if device_name(x) == "cpu" and dtype_name(x) != "bfloat16" else x


def contiguous(x: Any) -> Any:
    """Return `x` itself when it is C-contiguous, else one copy that is."""
    if isinstance(x, np.ndarray):
        return x if x.flags.c_contiguous else np.ascontiguousarray(x)
    if is_torch(x):
        return x.contiguous()
    xp = namespace(x)
    return xp.ascontiguousarray(x) if hasattr(xp, "ascontiguousarray") else x  # others hand out dense arrays only


def namespace(x: Any) -> Any:
    """Return the functions of the array API for `x`, which is no torch tensor."""
    return x.__array_namespace__() if hasattr(x, "__array_namespace__") else importlib.import_module(_root(x))


def joined(arrays: Sequence[Any]) -> Any:
    """Return the rows of arrays on a GPU, one array after the other."""
    xp = namespace(arrays[0])
    return (xp.concat if hasattr(xp, "concat") else xp.concatenate)(arrays)


def rows_of(x: Any, rows: Any) -> Any:
    """Return `x[rows]` for numpy `rows`; torch does not index uint16 on a GPU."""
    if not is_torch(x) or x.device.type == "cpu":
        return x[rows]
    import torch

    at = torch.from_numpy(rows).to(x.device)
    return x.view(torch.int16)[at].view(x.dtype) if x.dtype == torch.uint16 else x[at]


def to_device_of(like: Any, x: Any) -> Any:
    """Return the numpy array `x` as an array of `like`'s library and device."""
    if is_torch(like):
        import torch

        return torch.from_numpy(x).to(like.device)
    return namespace(like).asarray(x)


def to_host(x: Any) -> Any:
    """Return a GPU array as a numpy array, and anything else as it is. Waits for the GPU."""
    if not is_array(x) or device_name(x) == "cpu":
        return x
    return x.cpu().numpy() if is_torch(x) else x.get()


@cache  # numpy takes as long to read a name as to allocate
def _numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(name)


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Allocate an array in the library and on the device of `like`."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, _numpy_dtype(dtype))
    if is_torch(like):
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if device_name(like) == "cpu":
        return np.empty(shape, dtype)
    xp = namespace(like)
    return xp.empty(shape, dtype=getattr(xp, dtype))


def aligned_bytes(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return new memory that begins with a cache line, where numpy's own does with any 16 bytes."""
    line = 64
    memory = np.empty(size + line, np.uint8)
    first = -memory.ctypes.data % line
    return memory[first : first + size]


def output(op: str, out: Any, like: Any, shape: tuple[int, ...], dtype: str, *, name: str = "out") -> Any:
    """Return `out` after checking that it is exactly what the function writes, or a new array when it is None."""
    if out is None:
        return empty(like, shape, dtype)
    if not is_array(out):
        raise TypeError(f"{op}: {name} must be an array, got {type(out).__name__}")
    if tuple(out.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(out.shape)}")
    if dtype_name(out) != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {dtype_name(out)}")
    if device_name(out) != device_name(like):
        raise TypeError(f"{op}: {name} must be on {device_name(like)}, got {device_name(out)}")
    _refuse_grad(op, name, out)
    if contiguous(out) is not out and not (is_torch(out) and out.is_contiguous()):
        raise ValueError(f"{op}: {name} must be C-contiguous")
    return out


def outputs(
    op: str, out: Any, like: Any, shape: tuple[int, ...], dtypes: tuple[str, str], names: tuple[str, str]
) -> tuple[Any, Any]:
    """`output` for a function that returns two arrays of one shape; `out` is None or a pair."""
    if out is None:
        return empty(like, shape, dtypes[0]), empty(like, shape, dtypes[1])
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"{op}: out must be a pair of arrays ({names[0]}, {names[1]}), got {type(out).__name__}")
    first = output(op, out[0], like, shape, dtypes[0], name=f"out {names[0]}")
    second = output(op, out[1], like, shape, dtypes[1], name=f"out {names[1]}")
    return first, second


def as_count(op: str, name: str, value: Any, *, least: int = 1) -> int:
    """Return `value` as an int of 64 bits, refusing anything below `least` and anything that is not a whole number."""
    if type(value) is int and least <= value < 2**63:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    count = int(value.__index__())
    if count < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {count}")
    if count >= 2**63:
        raise ValueError(f"{op}: {name} must be below 2^63, got {count}")
    return count


def as_number(op: str, name: str, value: Any) -> float:
    """Check a number argument."""
    if isinstance(value, bool) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def choice(op: str, name: str, value: Any, options: Sequence[Any]) -> Any:
    """Return `value` when it is one of `options`."""
    if value not in options:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value
