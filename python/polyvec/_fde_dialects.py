"""What differs between implementations of fixed dimensional encodings: bucket ids, ties, matrices drawn from a seed.

Each `draw` returns what the implementation draws from a seed: hyperplanes (R, d, bits), projections (R, d, width) or
None, and the final sketch (index, sign) or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Shape(NamedTuple):
    """The sizes of an encoder's matrices; width is None without projections, final_dim without a final sketch."""

    repetitions: int
    dim: int
    bits: int
    width: int | None
    final_dim: int | None

    @property
    def long_dim(self) -> int:
        """Width of the encoding before the final sketch."""
        return self.repetitions * (1 << self.bits) * (self.width or self.dim)


Drawn = tuple[Array, Array | None, tuple[Array, Array] | None]


class Dialect(NamedTuple):
    """One implementation's choices."""

    draw: Callable[[int, Shape], Drawn]
    lowest_bucket: bool = False  # a tie in filling goes to the first token of the lowest bucket, not to the first token
    gray: bool = False  # buckets are numbered in Gray-code order, the first plane first
    wrong_inverse: bool = False  # the Gray code is inverted by applying it once more
    wide: bool = False  # also projects to dim columns or more


def sign_words(bits: int, dialect: Dialect) -> tuple[Array, Array]:
    """Return, for each bucket id, its tokens' sign bits (plane j at bit j), and those that it is filled from."""
    ids = np.arange(2**bits)
    if not dialect.gray:
        return ids, ids
    words = _reversed(ids ^ ids >> 1, bits)
    if not dialect.wrong_inverse:
        return words, words
    prefix = ids.copy()
    for shift in (1, 2, 4, 8):
        prefix ^= prefix >> shift
    return words, _reversed(prefix, bits)


def _reversed(words: Array, bits: int) -> Array:
    return sum(((words >> j & 1) << (bits - 1 - j) for j in range(bits)), np.zeros_like(words))


# The paper's form, and fastembed's: one numpy generator


def _draw_paper(seed: int, shape: Shape) -> Drawn:
    rng = np.random.default_rng(seed)
    planes = rng.standard_normal((shape.repetitions, shape.dim, shape.bits))
    projections = None
    if shape.width is not None:
        projections = rng.choice([-1, 1], (shape.repetitions, shape.dim, shape.width)) / np.sqrt(shape.width)
    return planes, projections, _numpy_sketch(rng, shape)


def _numpy_sketch(rng: np.random.Generator, shape: Shape) -> tuple[Array, Array] | None:
    if shape.final_dim is None:
        return None
    return rng.integers(0, shape.final_dim, shape.long_dim), rng.choice([-1.0, 1.0], shape.long_dim)


# muvera-py: a numpy generator a matrix


def _draw_muvera_py(seed: int, shape: Shape) -> Drawn:
    planes = np.empty((shape.repetitions, shape.dim, shape.bits))
    projections = None if shape.width is None else np.zeros((shape.repetitions, shape.dim, shape.width))
    for r in range(shape.repetitions):
        planes[r] = np.random.default_rng(seed + r).standard_normal((shape.dim, shape.bits))
        if projections is not None:
            rng = np.random.default_rng(seed + r)
            column = rng.integers(0, shape.width, shape.dim)
            projections[r, np.arange(shape.dim), column] = rng.choice([-1.0, 1.0], shape.dim)
    return planes, projections, _numpy_sketch(np.random.default_rng(seed), shape)


# Google's: std::mt19937 and the distributions of libstdc++


def _draw_google(seed: int, shape: Shape) -> Drawn:
    planes = np.empty((shape.repetitions, shape.bits, shape.dim), np.float32)
    projections = None if shape.width is None else np.zeros((shape.repetitions, shape.dim, shape.width))
    for r in range(shape.repetitions):
        planes[r] = _libstdcxx_normals(seed + r, shape.bits * shape.dim).reshape(shape.bits, shape.dim)
        if projections is not None and shape.width is not None:
            column, sign = _libstdcxx_sketch(seed + r, shape.dim, shape.width)
            projections[r, np.arange(shape.dim), column] = sign
    sketch = None if shape.final_dim is None else _libstdcxx_sketch(seed, shape.long_dim, shape.final_dim)
    return planes.swapaxes(1, 2), projections, sketch


def _mt19937(seed: int, n: int) -> Array:
    generator = np.random.RandomState(seed % 2**32)  # seeds as std::mt19937 does
    return generator.randint(0, 2**32, n, dtype=np.uint32)


def _libstdcxx_normals(seed: int, n: int) -> Array:
    """std::normal_distribution<float>: the polar method, the second of a pair first."""
    one, two = np.float32(1), np.float32(2)
    attempts = n + 64
    while True:
        uniform = _mt19937(seed, 2 * attempts).astype(np.float32) / np.float32(2**32)
        x, y = (two * np.minimum(uniform, np.nextafter(one, np.float32(0))) - one).reshape(-1, 2).T
        square = x * x + y * y
        kept = (square > 0) & (square <= 1)
        if 2 * kept.sum() >= n:
            break
        attempts *= 2
    x, y, square = x[kept], y[kept], square[kept]
    scale = np.sqrt(-two * np.log(square.astype(np.float64)).astype(np.float32) / square)
    return np.stack([y * scale, x * scale], 1).ravel()[:n]


def _libstdcxx_sketch(seed: int, n: int, size: int) -> tuple[Array, Array]:
    """Alternate draws of std::uniform_int_distribution(0, size - 1) and std::bernoulli_distribution(0.5)."""
    spare = 64
    words = _mt19937(seed, 3 * n + spare)  # one for an index, two for a sign
    used = 0  # words before here are decided
    while True:  # one round a rejected word
        draws = words[: 3 * n].reshape(n, 3)
        low = draws[used:, 0].astype(np.uint64) * np.uint64(size) & np.uint64(2**32 - 1)
        rejected = np.flatnonzero(low < -size % 2**32 % size)
        if not len(rejected):
            break
        used += int(rejected[0])
        words = np.delete(words, 3 * used)
        if len(words) < 3 * n:
            spare *= 2
            words = np.concatenate([words, _mt19937(seed, 3 * n + spare)[3 * n + spare // 2 :]])
    index = (draws[:, 0].astype(np.uint64) * np.uint64(size)) >> np.uint64(32)
    uniform = (draws[:, 1] + draws[:, 2] * 2.0**32) / 2.0**64
    return index.astype(np.int64), np.where(uniform < 0.5, 1.0, -1.0)


# OpenSearch: java.util.Random


def _draw_opensearch(seed: int, shape: Shape) -> Drawn:
    count = shape.repetitions * shape.bits * shape.dim
    attempts = count + 64
    booleans = shape.repetitions * shape.dim * (shape.width or 0)
    while True:
        states = _java_states(seed, 4 * attempts + booleans)
        high, low = states[: 4 * attempts].reshape(-1, 2).T
        x, y = (((high >> 22 << 27) + (low >> 21)) * 2.0**-52 - 1).reshape(-1, 2).T
        square = x * x + y * y
        kept = np.flatnonzero((square > 0) & (square < 1))[: (count + 1) // 2]
        if 2 * len(kept) >= count:
            break
        attempts *= 2
    x, y, square = x[kept], y[kept], square[kept]
    scale = np.sqrt(-2 * np.log(square) / square)
    planes = np.stack([x * scale, y * scale], 1).ravel()[:count]
    used = 4 * (kept[-1] + 1) if count else 0
    projections = None
    if shape.width is not None:
        signs = np.where(states[used : used + booleans] >> 47, 1.0, -1.0)
        projections = _rows(signs, shape.repetitions, shape.width, shape.dim) / np.sqrt(shape.width)
    sketch = _numpy_sketch(np.random.default_rng(seed), shape)
    return _rows(planes, shape.repetitions, shape.bits, shape.dim), projections, sketch


def _java_states(seed: int, n: int) -> Array:
    """The first n states of 48 bits of java.util.Random."""
    multiplier, increment, mask = 0x5DEECE66D, 0xB, 2**48 - 1
    powers = np.multiply.accumulate(np.full(n, multiplier, np.uint64))  # modulo 2^64, a multiple of 2^48
    sums = np.cumsum(np.concatenate([np.ones(1, np.uint64), powers[:-1]]))
    start = np.uint64((seed ^ multiplier) & mask)
    states: Array = powers * start + sums * np.uint64(increment)
    states &= np.uint64(mask)
    return states.view(np.int64)


def _rows(x: Array, *shape: int) -> Array:
    """Matrices that were drawn row by row, with their rows as columns."""
    matrices: Array = x.reshape(shape).swapaxes(1, 2)
    return matrices


# Weaviate: Go's math/rand/v2 PCG, from a constant


def _draw_weaviate(seed: int, shape: Shape) -> Drawn:
    normals, signs = shape.bits * shape.dim, shape.dim * (shape.width or 0)
    words = _go_pcg(0x532CA5105169B1DF + seed, 0x385AB5285169B1AC, shape.repetitions * (2 * normals + signs))
    words = words.reshape(shape.repetitions, 2 * normals + signs)
    first, second = (words[:, : 2 * normals] & np.uint64(2**53 - 1)).reshape(-1, 2).T / 2.0**53
    planes = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
    projections = None
    if shape.width is not None:
        drawn = (words[:, 2 * normals :] & np.uint64(1)) * 2.0 - 1
        projections = _rows(drawn, shape.repetitions, shape.width, shape.dim) / np.sqrt(shape.width)
    sketch = _numpy_sketch(np.random.default_rng(seed), shape)
    return _rows(planes, shape.repetitions, shape.bits, shape.dim), projections, sketch


def _go_pcg(high: int, low: int, n: int) -> Array:
    """The first n words of rand.NewPCG(high, low)."""
    mask = 2**128 - 1
    multiplier = 2549297995355413924 << 64 | 4865540595714422341
    increment = 6364136223846793005 << 64 | 1442695040888963407
    state = (high % 2**64) << 64 | low
    states = np.empty((n, 2), np.uint64)
    for i in range(n):
        state = (state * multiplier + increment) & mask
        states[i] = state >> 64, state & (2**64 - 1)
    words: Array = states[:, 0]
    words = (words ^ words >> np.uint64(32)) * np.uint64(0xDA942042E4DD58B5)
    words ^= words >> np.uint64(48)
    words *= states[:, 1] | np.uint64(1)
    return words


DIALECTS = {
    "paper": Dialect(_draw_paper),
    "google": Dialect(_draw_google, gray=True, wide=True),
    "fastembed": Dialect(_draw_paper, lowest_bucket=True),
    "weaviate": Dialect(_draw_weaviate, wide=True),
    "opensearch": Dialect(_draw_opensearch, lowest_bucket=True, wide=True),
    "muvera-py": Dialect(_draw_muvera_py, gray=True, wrong_inverse=True, wide=True),
}
