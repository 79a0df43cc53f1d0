"""What the ops share: checks of arguments, and what they do under autocast."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def require_tensors_or_duals(op: str, **arguments: Any) -> None:
    """Refuse arrays of other libraries: only tensors carry a graph."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a torch tensor, got {type(x).__name__}")


def require_tensors(op: str, **arguments: Any) -> None:
    """Refuse tensors with a tangent, too: an op would lose it, and derivatives in forward mode would be zeros."""
    require_tensors_or_duals(op, **arguments)
    if forward_ad._current_level < 0:  # outside forward mode: almost always
        return
    for name, x in arguments.items():
        if x.is_floating_point() and _has_tangent(x):
            raise TypeError(
                f"{op}: {name} must have no tangent, got a dual tensor; derivatives are those of backward alone"
            )


def _has_tangent(x: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(x).tangent is not None
    except RuntimeError:  # torch does not look into what vmap gives a function inside of jvp
        return True


def one_of(op: str, name: str, value: str, options: tuple[str, ...]) -> str:
    """Return `value` when it is one of `options`."""
    if value not in options:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def in_float32(*ops: Any) -> None:
    """Have autocast hand float32 to `ops`, whatever narrower type the layers before them compute in."""
    for op in ops:
        op.register_autocast("cpu", torch.float32)
        op.register_autocast("cuda", torch.float32)


def widened(x: Tensor) -> Tensor:
    """Return `x` as float32 under autocast, unchanged elsewhere: for functions of several ops."""
    return x.float() if torch.is_autocast_enabled(x.device.type) else x


def narrowed(x: Tensor) -> Tensor:
    """Return `x` in the dtype that autocast multiplies in: its own on a GPU, float32 on a CPU; unchanged without it."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype("cuda") if x.is_cuda else torch.float32)
