"""Codewords by softmax and their gradients: what `polyvec.torch.soft_assign` is made of."""

from __future__ import annotations

from typing import Any

from polyvec import _backend
from polyvec._arrays import as_array, dtype_name, empty

_FLOATS = ("float32", "float64")


def _inputs(op: str, x: Any, codebooks: Any, num_threads: int | None) -> tuple[Any, Any]:
    x = as_array(op, "x", x, dtypes=_FLOATS, ndim=2)
    codebooks = as_array(op, "codebooks", codebooks, dtypes=_FLOATS, ndim=3)
    _backend.require_finite(op, "x", x, num_threads)
    _backend.require_finite(op, "codebooks", codebooks, num_threads)
    return x, codebooks


def soft_assign(
    x: Any, codebooks: Any, *, temperature: float, hard: bool, num_threads: int | None = None
) -> tuple[Any, Any]:
    """Return the quantised rows of `x` (n, m * dsub) and the ids (n, m) of the likeliest codewords (m, k, dsub)."""
    op = "quantize.soft_assign"
    x, codebooks = _inputs(op, x, codebooks, num_threads)
    out = empty(x, tuple(x.shape), dtype_name(x))
    ids = empty(x, (int(x.shape[0]), int(codebooks.shape[0])), "int64")
    _backend.run(op, "soft_assign", x, x, codebooks, out, ids, float(temperature), hard, num_threads=num_threads)
    return out, ids


def soft_assign_gradient(
    x: Any,
    codebooks: Any,
    grad: Any,
    *,
    temperature: float,
    hard: bool,
    of_x: bool,
    of_codebooks: bool,
    num_threads: int | None = None,
) -> tuple[Any, Any]:
    """Return the gradients of `soft_assign` for x and for the codebooks; None where it is not asked for."""
    op = "quantize.soft_assign_gradient"
    x, codebooks = _inputs(op, x, codebooks, num_threads)
    grad = as_array(op, "grad", grad, dtypes=_FLOATS, ndim=2)
    dx, dcodebooks = (
        empty(like, tuple(like.shape), dtype_name(like)) if wanted else None
        for like, wanted in ((x, of_x), (codebooks, of_codebooks))
    )
    _backend.run(
        op, "soft_assign_gradient", x,
        x, codebooks, grad, dx, dcodebooks, float(temperature), hard,
        num_threads=num_threads,
    )  # fmt: skip
    return dx, dcodebooks
