"""Which compiled module serves an array, and with which `where` (threads on a CPU, a stream on a GPU)."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from polyvec import _core
from polyvec._arrays import as_count, device_name, is_array, is_torch

_MISSING = "polyvec was built without CUDA; install it with: pip install polyvec -Ccmake.define.POLYVEC_CUDA=ON"


def cuda_module() -> ModuleType | None:
    """Return the CUDA module, or None when it was not built. It imports without a driver or a GPU."""
    try:
        return importlib.import_module("polyvec._cuda")
    except ModuleNotFoundError:
        return None


def _stream_of(x: Any) -> int:
    if is_torch(x):
        import torch

        return int(torch.cuda.current_stream(x.device).cuda_stream)
    if type(x).__module__.partition(".")[0] == "cupy":
        import cupy

        return int(cupy.cuda.get_current_stream().ptr)
    return 0


def threads(op: str, num_threads: int | None) -> int:
    """Return the thread count a kernel is given: 0 stands for the process setting."""
    return 0 if num_threads is None else as_count(op, "num_threads", num_threads)


def run(op: str, function: str, like: Any, *args: Any, num_threads: int | None = None) -> Any:
    """Call `function` of the module that serves `like`'s device, on which all array arguments must be."""
    device = device_name(like)
    for arg in args:
        if is_array(arg) and device_name(arg) != device:
            raise TypeError(f"{op}: arrays must be on one device, got {device} and {device_name(arg)}")
    if device == "cpu":
        return getattr(_core, function)(*args, threads(op, num_threads))
    if device != "cuda":
        raise TypeError(f"{op}: arrays must be on cpu or cuda, got {device}")
    module = cuda_module()
    if module is None:
        raise RuntimeError(f"{op}: {_MISSING}")
    if not hasattr(module, function):
        raise TypeError(f"{op}: arrays must be on cpu, got cuda; this function has no CUDA form yet")
    return getattr(module, function)(*args, _stream_of(like))


def require_finite(op: str, name: str, x: Any, num_threads: int | None = None) -> None:
    """Refuse NaN and Inf in `x` (n, ...) by row: for data that will be indexed."""
    row = run(op, "first_nonfinite_row", x, x, num_threads=num_threads)
    if row >= 0:
        raise ValueError(f"{op}: {name} must be finite, got NaN or Inf in row {row}")
