"""Compression: k-means clustering, and product quantisation of vectors into a few bytes each.

A codec is fitted to a sample of vectors, encodes vectors into uint8 codes, decodes them, and searches codes without
decoding them. Codes belong to the codec that made them; they are plain arrays and are kept, sliced and saved as such.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from polyvec import _backend, _files
from polyvec._arrays import (
    ArrayT,
    as_array,
    as_count,
    choice,
    contiguous,
    device_name,
    empty,
    is_array,
    output,
    outputs,
)
from polyvec._codes import RaBitQ, ScalarQuantizer
from polyvec._files import State
from polyvec._progress import Progress, reporting
from polyvec._refined import CertifiedResult, Refined, RefinedCodes
from polyvec._soft_assign import soft_assign as soft_assign
from polyvec._soft_assign import soft_assign_gradient as soft_assign_gradient

__all__ = [
    "CertifiedResult",
    "KMeansResult",
    "ProductQuantizer",
    "RaBitQ",
    "Refined",
    "RefinedCodes",
    "ScalarQuantizer",
    "kmeans",
]

_SEED_ROWS = 64  # k-means++ looks at this many rows a centroid
_OPQ_ROUNDS = 10
_BLOCK_ROWS = 1 << 16  # rows rotated at a time


class KMeansResult(NamedTuple):
    """What `kmeans` found; a tuple with names.

    Parameters
    ----------
    centroids : array of shape (k, d), float32
        x's library and device; of norm 1 for the metrics "cosine" and "ip".
    labels : array of shape (n,), int64
        The nearest of `centroids` for each row.
    inertia : float
        The sum over rows of |x - c|^2 (l2), 1 - <x, c> / |x| (cosine) or |x| - <x, c> (ip).
    iterations : int
        How often the centroids were moved.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> centroids, labels, inertia, iterations = pv.quantize.kmeans(np.eye(3, dtype=np.float32), 3)
    >>> sorted(labels.tolist()), inertia
    ([0, 1, 2], 0.0)
    """

    centroids: Any
    labels: Any
    inertia: float
    iterations: int


def kmeans(
    x: Any,
    k: int,
    *,
    metric: str = "l2",
    init: Any = "k-means++",
    max_iter: int = 25,
    tolerance: float = 1e-4,
    seed: int = 0,
    progress: Progress = None,
    num_threads: int | None = None,
) -> KMeansResult:
    """Find k centroids with a small sum of distances from every row to its nearest one (Lloyd's iterations).

    Each iteration labels every row with its nearest centroid, then moves every centroid to the mean of its rows. A
    centroid without rows moves to the row farthest from its own centroid. The inertia never rises.

    Parameters
    ----------
    x : array of shape (n, d), float32
    k : int
        Number of centroids, at most n.
    metric : {"l2", "cosine", "ip"}
        "l2": squared distance. "cosine" and "ip": spherical, centroids have norm 1 and rows go to the one of highest
        cosine; rows count by their direction alone ("cosine"), or by their length, too ("ip").
    init : {"k-means++", "random", "strided"} or array of shape (k, d)
        Where to start: rows drawn with probability proportional to the squared distance from those already drawn (from
        a random sample of 64 k rows where x has more); k different random rows; rows 0, n/k, 2n/k, ...; or given.
    max_iter : int
        How often the centroids move at most.
    tolerance : float
        Stop when an iteration lowers the inertia by no more than this fraction of it.
    seed : int
        The same seed gives the same bits.
    progress : None, bool or callable
        True shows a bar; a callable is called with (done, total) iterations.
    num_threads : int, optional
        CPU threads; the process setting when None. The result does not depend on it.

    Returns
    -------
    KMeansResult
        `.centroids` (k, d), `.labels` (n,), `.inertia`, `.iterations`; the labels and the inertia belong to the
        centroids.

    Raises
    ------
    ValueError
        k larger than n, NaN or Inf in x or init, shapes that do not fit, an unknown metric or start.
    TypeError
        Dtypes other than float32.

    Notes
    -----
    2 n k d flops an iteration; means and inertia are accumulated in float64, in the order of the rows. Memory: 24 bytes
    a row beside x; n x k distances are never stored.

    References
    ----------
    Arthur and Vassilvitskii (2007): k-means++, section 2.2. Dhillon and Modha (2001): spherical k-means, section 3.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.array([[0, 0], [0, 1], [9, 0], [9, 1]], np.float32)
    >>> result = pv.quantize.kmeans(x, 2, init="strided")
    >>> result.centroids.tolist(), result.labels.tolist(), result.inertia
    ([[0.0, 0.5], [9.0, 0.5]], [0, 0, 1, 1], 1.0)
    """
    op = "quantize.kmeans"
    rows = as_array(op, "x", x, ndim=2)
    k = as_count(op, "k", k)
    max_iter = as_count(op, "max_iter", max_iter)
    choice(op, "metric", metric, ("l2", "cosine", "ip"))
    seed = as_count(op, "seed", seed, least=0)
    if not tolerance >= 0:
        raise ValueError(f"{op}: tolerance must be at least 0, got {tolerance}")
    n, d = (int(s) for s in rows.shape)
    if k > n:
        raise ValueError(f"{op}: k must be at most the number of rows of x ({n}), got {k}")
    _backend.require_finite(op, "x", rows, num_threads)
    if isinstance(init, str):
        choice(op, "init", init, ("k-means++", "random", "strided"))
        start = _start(op, rows[None], k, metric, init, np.random.default_rng(seed), num_threads)
    else:
        start = as_array(op, "init", init, ndim=2)
        if tuple(start.shape) != (k, d):
            raise ValueError(f"{op}: init must have shape {(k, d)}, got {tuple(start.shape)}")
        _backend.require_finite(op, "init", start, num_threads)
        start = start[None]
    with reporting(op, progress, max_iter, "iterations") as report:
        centroids, labels, inertia, iterations = _lloyd(
            op, rows[None], start, metric, max_iter, tolerance, report, num_threads
        )
    return KMeansResult(centroids[0], labels[0], float(inertia[0]), iterations)


def _start(op: str, x: Any, k: int, metric: str, init: str, rng: np.random.Generator, num_threads: int | None) -> Any:
    """Return k rows of each problem of `x` (problems, n, d) to start from."""
    problems, n = int(x.shape[0]), int(x.shape[1])
    if init == "strided":
        return contiguous(x[:, np.arange(k) * n // k])
    if init == "random":
        return contiguous(x[:, rng.choice(n, k, replace=False)])
    if n > _SEED_ROWS * k:
        x = contiguous(x[:, np.sort(rng.choice(n, _SEED_ROWS * k, replace=False))])
    rows = np.empty((problems, k), np.int64)
    _backend.run(op, "quantize_kmeans_seed", x, x, rows, int(rng.integers(2**63)), metric, num_threads=num_threads)
    return contiguous(x[np.arange(problems)[:, None], rows])


def _lloyd(
    op: str,
    x: Any,
    start: Any,
    metric: str,
    max_iter: int,
    tolerance: float,
    report: Any,
    num_threads: int | None,
) -> tuple[Any, Any, npt.NDArray[np.float64], int]:
    """Iterate on problems (problems, n, d) from centroids (problems, k, d) until all have converged."""
    problems, n, _ = (int(s) for s in x.shape)
    buffers = [empty(x, tuple(start.shape), "float32") for _ in range(2)]
    labels = empty(x, (problems, n), "int64")
    inertia, previous = np.empty(problems), np.full(problems, np.inf)
    centroids = start
    for iteration in range(max_iter + 1):
        last = iteration == max_iter
        updated = None if last else buffers[iteration % 2]
        _step(op, x, centroids, labels, inertia, updated, metric, num_threads)
        if last or (previous <= (1 + tolerance) * inertia).all():
            break
        centroids, previous = updated, inertia.copy()
        report(1)
    return centroids, labels, inertia, iteration


def _step(
    op: str, x: Any, centroids: Any, labels: Any, inertia: Any, updated: Any, metric: str, num_threads: int | None
) -> None:
    """Label every row with its nearest centroid; write the means to `updated` unless it is None."""
    _backend.run(
        op, "quantize_kmeans_step", x,
        x, centroids, labels, inertia, updated, metric,
        num_threads=num_threads,
    )  # fmt: skip


class ProductQuantizer:
    """Codes of m subspaces: a vector is cut into m pieces, and each becomes the number of its nearest codeword.

    `fit` finds 2^bits codewords for each subspace by k-means. A code takes m bytes, or m / 2 with 4 bits. `search`
    compares float queries with codes directly: the score of a code is the exact score of the vector it decodes to.

    The codebooks minimise the squared error, for both metrics.

    Parameters
    ----------
    dim : int
        Width d of the vectors.
    m : int
        Number of subspaces, a divisor of dim.
    bits : {8, 4}
        Bits of a subspace's code.
    metric : {"ip", "l2"}
        What `search` ranks by: inner products, higher is better; or squared distances, lower is better.
    rotation : {None, "random", "opq"}
        Turn vectors before they are cut: "random" spreads the variance evenly, "opq" fits the rotation to the data so
        that the codes lose least (and takes longer to fit). Neither changes inner products or distances.
    seed : int
        The same seed gives the same codebooks.

    Attributes
    ----------
    codebooks : numpy array of shape (m, 2**bits, dim // m), float32
        The codewords of (rotated) vectors; None before `fit`.
    rotation_matrix : numpy array of shape (dim, dim), float32, or None
        R: the rows of `x @ R.T` are cut and coded.
    code_size : int
        Bytes of a code.

    References
    ----------
    Jegou, Douze and Schmid (2011): Product quantization for nearest neighbor search, sections II and III. Ge, He, Ke
    and Sun (2014): Optimized product quantization, sections 3 and 4 (rotation="opq").

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.random.default_rng(0).standard_normal((1000, 32), np.float32)
    >>> pq = pv.quantize.ProductQuantizer(32, 8, metric="l2").fit(x)
    >>> codes = pq.encode(x)
    >>> codes.shape, codes.dtype
    ((1000, 8), dtype('uint8'))
    >>> scores, ids = pq.search(x[:2], codes, 10)
    >>> ids[:, 0].tolist()
    [0, 1]
    """

    def __init__(
        self,
        dim: int,
        m: int,
        *,
        bits: int = 8,
        metric: str = "ip",
        rotation: str | None = None,
        seed: int = 0,
    ) -> None:
        op = "quantize.ProductQuantizer"
        self.dim = as_count(op, "dim", dim)
        self.m = as_count(op, "m", m)
        if self.dim % self.m:
            raise ValueError(f"{op}: m must divide dim ({self.dim}), got {self.m}")
        self.bits: int = choice(op, "bits", bits, (8, 4))
        self.metric: str = choice(op, "metric", metric, ("ip", "l2"))
        self.rotation: str | None = choice(op, "rotation", rotation, (None, "random", "opq"))
        self.seed = as_count(op, "seed", seed, least=0)
        self.codebooks: npt.NDArray[np.float32] | None = None
        self.rotation_matrix: npt.NDArray[np.float32] | None = None

    @property
    def code_size(self) -> int:
        """Bytes of a code: m, or m / 2 rounded up with 4 bits."""
        return self.m if self.bits == 8 else (self.m + 1) // 2

    def __repr__(self) -> str:
        return (
            f"ProductQuantizer({self.dim}, {self.m}, bits={self.bits}, metric={self.metric!r}, "
            f"rotation={self.rotation!r}, seed={self.seed}){'' if self.codebooks is not None else ', not fitted'}"
        )

    def fit(
        self,
        x: Any,
        *,
        max_iter: int = 25,
        train_size: int = 65536,
        progress: Progress = None,
        num_threads: int | None = None,
    ) -> ProductQuantizer:
        """Find the codebooks (and the rotation) for vectors like these.

        Parameters
        ----------
        x : array of shape (n, dim), float32
            At least 2^bits rows.
        max_iter : int
            Iterations of k-means in each subspace.
        train_size : int
            Fit to this many random rows at most: 256 rows a codeword are plenty.
        progress : None, bool or callable
            True shows a bar; a callable is called with (done, total) iterations.
        num_threads : int, optional

        Returns
        -------
        ProductQuantizer
            Itself.

        Raises
        ------
        ValueError
            Too few rows, rows of another width, NaN or Inf.

        Notes
        -----
        2 train_size 2^bits dim flops an iteration. "opq" alternates 20 times between one such iteration and the best
        rotation for the codes it gave (a dim x dim singular value decomposition), from a rotation that spreads the
        principal directions evenly over the subspaces.
        """
        op = "quantize.ProductQuantizer.fit"
        rows = self._vectors(op, "x", x)
        max_iter = as_count(op, "max_iter", max_iter)
        codewords = 1 << self.bits
        train_size = as_count(op, "train_size", train_size, least=codewords)
        if len(rows) < codewords:
            raise ValueError(f"{op}: x must have at least 2^bits rows ({codewords}), got {len(rows)}")
        _backend.require_finite(op, "x", rows, num_threads)
        rng = np.random.default_rng(self.seed)
        if len(rows) > train_size:
            rows = rows[np.sort(rng.choice(len(rows), train_size, replace=False))]

        rounds = _OPQ_ROUNDS + 2 if self.rotation == "opq" else 0
        with reporting(op, progress, rounds + max_iter, "iterations") as report:
            rotation, start = None, None
            if self.rotation == "random":
                rotation = np.linalg.qr(rng.standard_normal((self.dim, self.dim)))[0].astype(np.float32)
            elif self.rotation == "opq":
                rotation, start = self._optimized_rotation(op, rows, rng, report, num_threads)
            pieces = self._cut(rows, rotation)
            if start is None:
                start = _start(op, pieces, codewords, "l2", "k-means++", rng, num_threads)
            centroids, _, _, _ = _lloyd(op, pieces, start, "l2", max_iter, 1e-4, report, num_threads)
        self.codebooks, self.rotation_matrix = centroids, rotation
        return self

    def _optimized_rotation(
        self, op: str, rows: npt.NDArray[np.float32], rng: np.random.Generator, report: Any, num_threads: int | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return a rotation and codebooks, each the best for the other in turn (Ge et al. 2014, section 3.2)."""
        codewords = 1 << self.bits
        labels, inertia = np.empty((self.m, len(rows)), np.int64), np.empty(self.m)

        def move(codebooks: Any, pieces: Any) -> Any:
            updated = np.empty_like(codebooks)
            _step(op, pieces, codebooks, labels, inertia, updated, "l2", num_threads)
            report(1)
            return updated

        starts = []
        for rotation in (np.eye(self.dim, dtype=np.float32), _spread_principal_directions(rows, self.m)):
            pieces = self._cut(rows, rotation)
            codebooks = move(_start(op, pieces, codewords, "l2", "k-means++", rng, num_threads), pieces)
            starts.append((inertia.sum(), rotation, codebooks))
        _, rotation, codebooks = min(starts, key=lambda start: start[0])
        for _ in range(_OPQ_ROUNDS):
            codebooks = move(codebooks, self._cut(rows, rotation))
            decoded = np.take_along_axis(codebooks, labels[:, :, None], 1).transpose(1, 0, 2).reshape(rows.shape)
            left, _, right = np.linalg.svd((decoded.T @ rows).astype(np.float64))
            rotation = (left @ right).astype(np.float32)
        return rotation, codebooks

    def encode(self, x: ArrayT, *, out: ArrayT | None = None, num_threads: int | None = None) -> ArrayT:
        """Return the code of each vector: the nearest codeword (squared distance) of every subspace.

        Parameters
        ----------
        x : array of shape (n, dim), float32
        out : array of shape (n, code_size), uint8, optional
        num_threads : int, optional

        Returns
        -------
        array of shape (n, code_size), uint8, x's library and device
            With 4 bits, byte j holds subspace 2 j in its low and 2 j + 1 in its high four bits.

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Rows of another width, NaN or Inf.

        Notes
        -----
        2 2^bits dim flops a vector, float32 sums. Codes do not depend on num_threads.
        """
        op = "quantize.ProductQuantizer.encode"
        codebooks = self._fitted(op)
        rows = self._vectors(op, "x", x)
        _backend.require_finite(op, "x", rows, num_threads)
        like = x if is_array(x) else rows
        out = output(op, out, like, (len(rows), self.code_size), "uint8")
        codes = np.asarray(out)
        for begin in range(0, len(rows), _BLOCK_ROWS):
            block = slice(begin, begin + _BLOCK_ROWS)
            part = self._rotated(rows[block])
            _backend.run(op, "quantize_pq_encode", part, part, codebooks, codes[block], num_threads=num_threads)
        return out

    def decode(self, codes: ArrayT, *, out: ArrayT | None = None, num_threads: int | None = None) -> ArrayT:
        """Return the vectors that codes stand for.

        Parameters
        ----------
        codes : array of shape (n, code_size), uint8
        out : array of shape (n, dim), float32, optional
        num_threads : int, optional

        Returns
        -------
        array of shape (n, dim), float32, codes' library and device

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Codes of another size.
        """
        op = "quantize.ProductQuantizer.decode"
        codebooks = self._fitted(op)
        table = self._codes(op, codes)
        like = codes if is_array(codes) else table
        out = output(op, out, like, (len(table), self.dim), "float32")
        rows = np.asarray(out)
        _backend.run(op, "quantize_pq_decode", table, table, codebooks, rows, num_threads=num_threads)
        if self.rotation_matrix is not None:
            for begin in range(0, len(rows), _BLOCK_ROWS):
                block = slice(begin, begin + _BLOCK_ROWS)
                rows[block] = rows[block] @ self.rotation_matrix
        return out

    def search(
        self,
        queries: ArrayT,
        codes: Any,
        k: int,
        *,
        out: tuple[ArrayT, ArrayT] | None = None,
        num_threads: int | None = None,
    ) -> tuple[ArrayT, ArrayT]:
        """Return the k codes that score best against each query, without decoding them.

        Parameters
        ----------
        queries : array of shape (nq, dim), float32
        codes : array of shape (n, code_size), uint8
        k : int
        out : pair of arrays of shape (nq, k), float32 and int64, optional
        num_threads : int, optional

        Returns
        -------
        scores : array of shape (nq, k), float32, queries' library and device
            metric "ip": inner products, higher is better; "l2": squared distances, lower is better. Best first, equal
            scores by smaller id.
        ids : array of shape (nq, k), int64
            Rows of `codes`. Where k is larger than n: id -1 with score -inf ("l2": inf).

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Queries or codes of another width, k below 1.

        Notes
        -----
        Asymmetric: queries are not quantised. A query's table holds the score of each codeword with its piece (2
        2^bits dim flops); a code's score is the float32 sum of one entry a byte, 4-bit codes by pairs. Batches share
        the codes: m bytes of traffic a code for 16 queries (AVX-512). A query's result does not depend on the other
        queries nor on num_threads. Reads its arguments only; several threads may call it at once.
        """
        op = "quantize.ProductQuantizer.search"
        codebooks = self._fitted(op)
        rows = self._rotated(self._vectors(op, "queries", queries))
        table = self._codes(op, codes)
        k = as_count(op, "k", k)
        like = queries if is_array(queries) else rows
        out = outputs(op, out, like, (len(rows), k), ("float32", "int64"), ("scores", "ids"))
        _backend.run(
            op, "quantize_pq_search", rows, rows, table, codebooks, *out, self.metric == "l2", num_threads=num_threads
        )  # fmt: skip
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted quantizer to one file, which replaces an existing one only when it is complete.

        Parameters
        ----------
        path : path

        Raises
        ------
        RuntimeError
            Before `fit`.
        OSError
            The system's own: a missing folder, no permission, a full disk. An existing file is untouched then.

        Notes
        -----
        A safetensors file with checksums: tensors `codebooks` and, with a rotation, `rotation_matrix`.
        """
        _files.save(path, "quantize.ProductQuantizer", self.state())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProductQuantizer:
        """Read a quantizer that `save` wrote.

        Parameters
        ----------
        path : path

        Returns
        -------
        ProductQuantizer

        Raises
        ------
        FormatError
            The file is damaged, truncated, of another kind or of a newer format.
        OSError
            The system's own.
        """
        return _files.load(path, "quantize.ProductQuantizer", cls.from_state)

    def state(self) -> State:
        """Return what `save` writes.

        Returns
        -------
        State
            The tensors, shared with the quantizer, and the parameters.

        Raises
        ------
        RuntimeError
            Before `fit`.
        """
        tensors = {"codebooks": self._fitted("quantize.ProductQuantizer.state")}
        if self.rotation_matrix is not None:
            tensors["rotation_matrix"] = self.rotation_matrix
        names = ("dim", "m", "bits", "metric", "rotation", "seed")
        return State(tensors, {name: getattr(self, name) for name in names})

    @classmethod
    def from_state(cls, state: State) -> ProductQuantizer:
        """Build a quantizer from a state.

        Parameters
        ----------
        state : State
            As `state` returned it. The tensors are used in place.

        Returns
        -------
        ProductQuantizer

        Raises
        ------
        ValueError, TypeError, LookupError
            A state that does not fit together.
        """
        self = cls(**state.params)
        self.codebooks = _tensor(state, "codebooks", (self.m, 1 << self.bits, self.dim // self.m))
        if self.rotation is not None:
            self.rotation_matrix = _tensor(state, "rotation_matrix", (self.dim, self.dim))
        return self

    def _fitted(self, op: str) -> npt.NDArray[np.float32]:
        if self.codebooks is None:
            raise RuntimeError(f"{op}: the quantizer must be fitted before; call fit(x)")
        return self.codebooks

    def _vectors(self, op: str, name: str, x: Any) -> npt.NDArray[np.float32]:
        rows = _on_host(op, name, as_array(op, name, x, ndim=2))
        if rows.shape[1] != self.dim:
            raise ValueError(f"{op}: {name} must have d = {self.dim}, got {rows.shape[1]}")
        return rows

    def _codes(self, op: str, codes: Any) -> npt.NDArray[np.uint8]:
        table = _on_host(op, "codes", as_array(op, "codes", codes, dtypes=("uint8",), ndim=2))
        if table.shape[1] != self.code_size:
            raise ValueError(f"{op}: codes must have {self.code_size} bytes a row, got {table.shape[1]}")
        return table

    def _rotated(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return x if self.rotation_matrix is None else x @ self.rotation_matrix.T

    def _cut(self, x: npt.NDArray[np.float32], rotation: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
        """Return the pieces (m, n, dim // m) of the rotated rows."""
        if rotation is not None:
            x = x @ rotation.T
        return np.ascontiguousarray(x.reshape(len(x), self.m, -1).transpose(1, 0, 2))


def _on_host(op: str, name: str, x: Any) -> npt.NDArray[Any]:
    """Return a numpy view of an array of any library."""
    if device_name(x) != "cpu":
        raise TypeError(f"{op}: {name} must be on cpu, got {device_name(x)}; this function has no CUDA form yet")
    return np.asarray(x)


def _tensor(state: State, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    tensor = state.tensors[name]
    if tensor.shape != shape or tensor.dtype != np.float32:
        raise ValueError(f"{name} must be float32 of shape {shape}, got {tensor.dtype} of shape {tensor.shape}")
    return tensor


def _spread_principal_directions(x: npt.NDArray[np.float32], m: int) -> npt.NDArray[np.float32]:
    """Return the rotation onto the principal directions, dealt to m subspaces so that their variances multiply alike.

    Largest first, each direction goes to the subspace whose variances have the smallest product so far and which has
    room (Ge et al. 2014, section 4.2).
    """
    centred = x - x.mean(0)
    variances, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    logs = np.log(np.maximum(variances, 1e-9 * variances[-1] + 1e-30))  # ascending, as variances are
    subspaces: list[list[int]] = [[] for _ in range(m)]
    products = np.zeros(m)
    for direction in range(len(logs) - 1, -1, -1):
        room = [s for s in range(m) if len(subspaces[s]) < len(logs) // m]
        smallest = min(room, key=lambda s: products[s])
        subspaces[smallest].append(direction)
        products[smallest] += logs[direction] - logs[0]  # relative to the least, or it would lower the product
    rotation: npt.NDArray[np.float32] = directions.T[[i for s in subspaces for i in s]].astype(np.float32)
    return rotation
