"""Checks that the ops share."""

from typing import Any

from torch import Tensor


def require_tensors(op: str, **arguments: Any) -> None:
    """Refuse arrays of other libraries: only tensors carry a graph."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a torch tensor, got {type(x).__name__}")
