"""Products with weights that are product codes, public as polyvec.quantize.vq_linear and polyvec.torch.vq_linear."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyvec import _backend
from polyvec._arrays import ArrayT, as_array, device_name, empty, output
from polyvec._product_quantizer import ProductQuantizer


def vq_linear(
    x: ArrayT,
    codes: Any,
    codebooks: Any,
    *,
    bias: Any = None,
    out: ArrayT | None = None,
    num_threads: int | None = None,
) -> ArrayT:
    """Multiply by compressed weights without decompressing them: x @ W.T + bias, where codes stand for the rows of W.

    Parameters
    ----------
    x : array of shape (n, d), float32
    codes : array of shape (outputs, code_size), uint8
        The rows of W as `ProductQuantizer.encode` writes them.
    codebooks : ProductQuantizer, or array of shape (m, 256 or 16, d / m), float32
        The fitted quantizer, on a CPU; or the `codebooks` of one without rotation, where 16 codewords are codes of 4
        bits.
    bias : array of shape (outputs,), float32, optional
    out : array of shape (n, outputs), float32, optional
    num_threads : int, optional
        CPU threads; the process setting when None. The result does not depend on it.

    Returns
    -------
    array of shape (n, outputs), float32, x's library and device

    Raises
    ------
    ValueError
        Shapes that do not fit.
    TypeError
        Other dtypes.
    RuntimeError
        A quantizer before `fit`.

    Notes
    -----
    Each input becomes tables of its pieces' products with all codewords (2 k d flops), and an output is the sum of m
    entries. It reads m bytes of codes (4 bits: m / 2) for d weights of 4 bytes, but its time grows with n: it is many
    times faster than to decode W for one input, and still for 16; beside W kept in full, for a few inputs only, where
    pieces are long (16 and more) or codes have 4 bits. With a quantizer that rotates, inputs are rotated first (2 d^2
    flops each).

    References
    ----------
    Jegou, Douze and Schmid (2011): Product quantization for nearest neighbor search, section III.A (sums of tables).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> weights = np.random.default_rng(0).standard_normal((500, 32), np.float32)
    >>> pq = pv.quantize.ProductQuantizer(32, 8).fit(weights)
    >>> codes, x = pq.encode(weights), np.ones((2, 32), np.float32)
    >>> y = pv.quantize.vq_linear(x, codes, pq)
    >>> y.shape, bool(np.allclose(y, x @ pq.decode(codes).T, atol=1e-4))
    ((2, 500), True)
    """
    op = "quantize.vq_linear"
    quantizer = codebooks if isinstance(codebooks, ProductQuantizer) else None
    if quantizer is not None:
        quantizer._require_fitted(op)
        codebooks = quantizer.codebooks
    x, codes, codebooks = _inputs(op, x, codes, codebooks)
    if bias is not None:
        bias = as_array(op, "bias", bias, ndim=1)
    out = output(op, out, x, (int(x.shape[0]), int(codes.shape[0])), "float32")
    rows: Any = x
    if quantizer is not None and device_name(x) != "cpu":
        raise TypeError(f"{op}: codebooks must be an array for x on a GPU, got ProductQuantizer")
    if quantizer is not None and int(x.shape[1]) == quantizer.dim:  # another width is refused below
        rows = quantizer._rotated(np.asarray(x))
    _backend.run(op, "vq_linear", x, rows, codes, codebooks, bias, out, num_threads=num_threads)
    return out


def vq_linear_gradient(
    x: Any,
    codes: Any,
    codebooks: Any,
    grad: Any,
    *,
    of_x: bool,
    of_codebooks: bool,
    num_threads: int | None = None,
) -> tuple[Any, Any]:
    """Return the gradients of `vq_linear` for x and for the codebooks; None where it is not asked for."""
    op = "quantize.vq_linear_gradient"
    x, codes, codebooks = _inputs(op, x, codes, codebooks)
    grad = as_array(op, "grad", grad, ndim=2)
    dx, dcodebooks = (
        empty(like, tuple(like.shape), "float32") if wanted else None
        for like, wanted in ((x, of_x), (codebooks, of_codebooks))
    )
    _backend.run(op, "vq_linear_gradient", x, x, codes, codebooks, grad, dx, dcodebooks, num_threads=num_threads)
    return dx, dcodebooks


def decode(codes: Any, codebooks: Any, *, num_threads: int | None = None) -> Any:
    """Return the weights that codes stand for, in the codebooks' library."""
    op = "quantize.decode"
    codes = as_array(op, "codes", codes, dtypes=("uint8",), ndim=2)
    codebooks = as_array(op, "codebooks", codebooks, ndim=3)
    out = empty(codebooks, (int(codes.shape[0]), int(codebooks.shape[0] * codebooks.shape[2])), "float32")
    _backend.run(op, "quantize_pq_decode", codebooks, codes, codebooks, out, num_threads=num_threads)
    return out


def add_decode_gradient(grad: Any, codes: Any, dcodebooks: Any, *, num_threads: int | None = None) -> None:
    """Add the gradient of `decode` for the codebooks to `dcodebooks`, given that of the weights."""
    op = "quantize.decode_gradient"
    grad = as_array(op, "grad", grad, ndim=2)
    codes = as_array(op, "codes", codes, dtypes=("uint8",), ndim=2)
    _backend.run(op, "quantize_pq_decode_gradient", grad, grad, codes, dcodebooks, num_threads=num_threads)


def _inputs(op: str, x: Any, codes: Any, codebooks: Any) -> tuple[Any, Any, Any]:
    x = as_array(op, "x", x, ndim=2)
    codes = as_array(op, "codes", codes, dtypes=("uint8",), ndim=2)
    return x, codes, as_array(op, "codebooks", codebooks, ndim=3)
