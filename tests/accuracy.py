"""How exact an op must be: each belongs to a class, and the class fixes the bound. No test has a tolerance of its own.

`scale` is the size of the largest sum of absolute products behind an entry (for a dot product sum |x_i y_i|), so that
cancellation in the result does not count against the kernel.
"""

from __future__ import annotations

import numpy as np


def on_host(x):
    """Return `x` as a numpy array, wherever it lies."""
    if hasattr(x, "__dlpack_device__") and int(x.__dlpack_device__()[0]) == 2:
        x = x.cpu() if hasattr(x, "cpu") else x.get()  # torch, CuPy
    return np.asarray(x)


def eps(dtype) -> float:
    """Distance from 1 to the next number of the dtype."""
    return float(np.finfo(dtype).eps)


def assert_elementwise(actual, expected, scale, *, operations: int = 16):
    """A fixed number of roundings an entry: products, norms of few components."""
    actual = on_host(actual)
    _assert_within(actual, expected, operations * eps(actual.dtype) * np.asarray(scale))


def assert_reduction(actual, expected, scale, *, length: int):
    """A dot product or sum of `length` terms accumulated in the result's dtype.

    The worst case grows with length; blocked and fused accumulation stays near its square root.
    """
    actual = on_host(actual)
    _assert_within(actual, expected, (4 + 2 * np.sqrt(length)) * eps(actual.dtype) * np.asarray(scale))


def assert_sum_of_scores(actual, expected, scale, *, length: int, terms):
    """The sum of functions, of slope at most 1, of scores that are each a reduction: their errors add up over `terms`.

    The sum itself is of parts that are small enough to keep its error below 64 roundings of the result.
    """
    actual = on_host(actual)
    bound = (4 + 2 * np.sqrt(length)) * np.asarray(scale) * np.asarray(terms) + 64 * (1 + np.abs(expected))
    _assert_within(actual, expected, eps(actual.dtype) * bound)


def assert_exact(actual, expected):
    """Ids, codes, counts, selections: equal, not close."""
    np.testing.assert_array_equal(on_host(actual), on_host(expected))


def _assert_within(actual, expected, bound):
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    tiny = 1e-30  # an exact zero has scale 0
    same_infinity = np.isinf(expected) & (actual == expected)
    with np.errstate(invalid="ignore"):
        error = np.where(same_infinity, 0, np.abs(actual.astype(np.float64) - expected))
    worst = np.max(error / (bound + tiny), initial=0)
    assert worst <= 1, f"error is {worst:.2f} times the bound of its class"
