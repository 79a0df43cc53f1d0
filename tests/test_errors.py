"""The rules that every function shares, by type and full text: the message is part of the API."""

import types

import numpy as np
import pytest

import polyvec as pv
from polyvec import _arrays, _backend, _core

X = np.zeros((2, 3), np.float32)


class OnGpu:
    """What polyvec asks of a CUDA array before it calls a kernel."""

    shape, dtype = (2, 3), np.dtype(np.float32)

    def __dlpack__(self, **options):
        raise AssertionError("never exported")

    def __dlpack_device__(self):
        return (2, 0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: _arrays.as_array("f", "x", [[1.0], [2.0, 3.0]]),
            TypeError,
            "f: x must be an array of float32, got list",
        ),
        (lambda: _arrays.as_array("f", "x", "abc"), TypeError, "f: x must be an array of float32, got str"),
        (lambda: _arrays.as_array("f", "x", X, ndim=1), ValueError, "f: x must have 1 axis, got shape (2, 3)"),
        (lambda: _arrays.as_array("f", "x", X, ndim=3), ValueError, "f: x must have 3 axes, got shape (2, 3)"),
        (
            lambda: _arrays.as_array("f", "x", X, dtypes=("float64", "uint8")),
            TypeError,
            "f: x must be float64 or uint8, got float32; cast it with .astype('float64')",
        ),
        (lambda: _arrays.as_count("f", "k", 0), ValueError, "f: k must be at least 1, got 0"),
        (lambda: _arrays.as_count("f", "k", -1, least=0), ValueError, "f: k must be at least 0, got -1"),
        (lambda: _arrays.as_count("f", "k", 2.0), TypeError, "f: k must be an integer, got float"),
        (lambda: _arrays.as_count("f", "k", True), TypeError, "f: k must be an integer, got bool"),
        (lambda: _arrays.as_count("f", "k", None), TypeError, "f: k must be an integer, got NoneType"),
        (
            lambda: _arrays.choice("f", "metric", "dot", ("ip", "l2")),
            ValueError,
            "f: metric must be one of 'ip', 'l2', got 'dot'",
        ),
        (
            lambda: _arrays.outputs("f", X, X, (2, 3), ("float32", "int64"), ("scores", "ids")),
            TypeError,
            "f: out must be a pair of arrays (scores, ids), got ndarray",
        ),
        (
            lambda: _arrays.outputs("f", (X, X), X, (2, 3), ("float32", "int64"), ("scores", "ids")),
            TypeError,
            "f: out ids must be int64, got float32",
        ),
        (
            lambda: _backend.run("f", "scan_topk", OnGpu(), OnGpu(), X),
            TypeError,
            "f: arrays must be on one device, got cuda and cpu",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("module", "error", "text"),
    [
        (
            None,
            RuntimeError,
            "f: polyvec was built without CUDA; install it with: pip install polyvec -Ccmake.define.POLYVEC_CUDA=ON",
        ),
        (
            types.SimpleNamespace(),
            TypeError,
            "f: arrays must be on cpu, got cuda; this function has no CUDA form yet",
        ),
    ],
)
def test_cuda_arrays_where_cuda_is_missing(monkeypatch, module, error, text):
    monkeypatch.setattr(_backend, "cuda_module", lambda: module)
    with pytest.raises(error) as caught:
        _backend.run("f", "first_nonfinite_row", OnGpu())
    assert str(caught.value) == text


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_data_that_is_indexed_must_be_finite(rng, isa, lib, bad, dtype):
    x = rng.standard_normal((3000, 17)).astype(dtype)
    _backend.require_finite("f", "x", lib(x), None)
    for row, column in [(2999, 16), (1500, 0), (7, 9), (0, 16)]:  # the first bad row is named
        x[row, column] = bad
        for num_threads in (1, 2, 7):
            with pytest.raises(ValueError, match="x must be finite") as caught:
                _backend.require_finite("f", "x", lib(x), num_threads)
            assert str(caught.value) == f"f: x must be finite, got NaN or Inf in row {row}"


def test_largest_and_smallest_numbers_are_finite():
    limits = np.finfo(np.float32)
    x = np.array([[limits.max, limits.min, limits.smallest_subnormal, -0.0]], np.float32)
    _backend.require_finite("f", "x", x)


def test_arrays_have_at_most_eight_axes():
    x = np.zeros((1,) * 7 + (4, 1), np.float32)
    with pytest.raises(ValueError, match="axes") as caught:
        pv.hypercomplex.product(x, x)
    assert str(caught.value) == "hypercomplex.product: x must have at most 8 axes, got 9"


def test_own_exception_types_are_caught_by_their_standard_parents():
    assert issubclass(pv.FormatError, ValueError)
    assert issubclass(pv.CudaError, RuntimeError)


def test_the_core_is_strict():
    with pytest.raises(TypeError) as caught:
        _core.hypercomplex_norm([[1.0]], X, False, 1)
    assert str(caught.value) == "hypercomplex.norm: x must be an array, got <class 'list'>"
    with pytest.raises(ValueError, match="contiguous") as caught:
        _core.hypercomplex_norm(np.zeros((4, 6), np.float32)[:, ::2], X[0].copy(), False, 1)
    assert str(caught.value) == "hypercomplex.norm: x must be contiguous"
    with pytest.raises(TypeError) as caught:
        _core.hypercomplex_norm(np.zeros((4, 3), np.float32), None, False, 1)
    assert str(caught.value) == "hypercomplex.norm: out must be an array, got <class 'NoneType'>"
