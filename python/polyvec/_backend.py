"""Which compiled module serves an array, and with which `where` (threads on a CPU, a stream on a GPU)."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

from polyvec import _core
from polyvec._arrays import as_count, device_name, is_array_type, is_torch, needs_device_check

_MISSING = "polyvec was built without CUDA; install it with: pip install polyvec -Ccmake.define.POLYVEC_CUDA=ON"


@cache
def cuda_module() -> ModuleType | None:
    """Return the CUDA module, or None when it was not built. It imports without a driver or a GPU."""
    try:
        return importlib.import_module("polyvec._cuda")
    except ModuleNotFoundError:
        return None


_DEFAULT_STREAM = 1  # cudaStreamLegacy; libraries say 0, which __dlpack__ does not take


def _stream_of(x: Any) -> int:
    stream = 0
    if is_torch(x):
        import torch

        stream = torch._C._cuda_getCurrentRawStream(x.device.index)  # without an object around it
    elif type(x).__module__.partition(".")[0] == "cupy":
        import cupy

        stream = cupy.cuda.get_current_stream(x.device.id).ptr
    return int(stream) or _DEFAULT_STREAM


def threads(op: str, num_threads: int | None) -> int:
    """Return the thread count a kernel is given: 0 stands for the process setting."""
    return 0 if num_threads is None else as_count(op, "num_threads", num_threads)


def run(op: str, function: str, like: Any, *args: Any, num_threads: int | None = None) -> Any:
    """Call `function` of the module that serves `like`'s device, on which all array arguments must be."""
    device = device_name(like)
    if device not in ("cpu", "cuda"):
        raise TypeError(f"{op}: arrays must be on cpu or cuda, got {device}")
    module = _core if device == "cpu" else cuda_module()
    kernel = getattr(module, function, None)
    if module is not None and kernel is None:
        raise TypeError(f"{op}: arrays must be on cpu, got cuda; this function has no CUDA form yet")
    in_question = needs_device_check if device == "cpu" else is_array_type  # a call of a graph takes microseconds
    for arg in args:
        if in_question(type(arg)) and device_name(arg) != device:  # type: ignore[arg-type]
            raise TypeError(f"{op}: arrays must be on one device, got {device} and {device_name(arg)}")
    if kernel is None:
        raise RuntimeError(f"{op}: {_MISSING}")
    return kernel(*args, threads(op, num_threads) if device == "cpu" else _stream_of(like))


def require_finite(op: str, name: str, x: Any, num_threads: int | None = None, *, first_row: int = 0) -> None:
    """Refuse NaN and Inf in `x` (n, ...) by row, the first being `first_row`. Not on a GPU: it would wait."""
    if device_name(x) == "cuda":
        return
    row = run(op, "first_nonfinite_row", x, x, num_threads=num_threads)
    if row >= 0:
        raise ValueError(f"{op}: {name} must be finite, got NaN or Inf in row {first_row + row}")
