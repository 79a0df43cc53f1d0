"""k-means clustering, public as polyvec.quantize.kmeans."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from polyvec import _backend
from polyvec._arrays import (
    as_array,
    as_count,
    as_float32,
    choice,
    contiguous,
    empty,
    is_torch,
    require_cpu,
    to_device_of,
    to_host,
)
from polyvec._progress import Progress, reporting

_BLOCK_ELEMENTS = 1 << 24  # of x that are labelled at a time, after batches: 64 MB
_SEED_ROWS = 64  # k-means++ looks at this many rows a centroid


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
    minibatch: int | None = None,
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
    minibatch : int, optional
        Look at this many random rows an iteration instead of all, with metric "l2": each centroid becomes the mean of
        all rows that went to it so far. For x that does not fit in memory, or is too large to be read max_iter times.
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
    a row beside x; n x k distances are never stored. With AVX2 and from 64 columns on, bytes compare rows with most
    centroids, within bounds that are proven, and float32 decides between those that are left.

    With `minibatch` all iterations run, whatever the tolerance; the inertia of x may rise from one to the next. Of a
    memory map the rows of the start and of the batches are read, then once all rows, in blocks, for labels and inertia.
    A centroid that has had no row yet moves to the row of the batch farthest from its own centroid.

    References
    ----------
    Arthur and Vassilvitskii (2007): k-means++, section 2.2. Dhillon and Modha (2001): spherical k-means, section 3.
    Sculley (2010): Web-scale k-means clustering, section 2 (`minibatch`).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.array([[0, 0], [0, 1], [9, 0], [9, 1]], np.float32)
    >>> result = pv.quantize.kmeans(x, 2, init="strided")
    >>> result.centroids.tolist(), result.labels.tolist(), result.inertia
    ([[0.0, 0.5], [9.0, 0.5]], [0, 0, 1, 1], 1.0)
    """
    op = "quantize.kmeans"
    rows = as_array(op, "x", x, ndim=2, dense=minibatch is None)
    k = as_count(op, "k", k)
    max_iter = as_count(op, "max_iter", max_iter)
    choice(op, "metric", metric, ("l2", "cosine", "ip"))
    seed = as_count(op, "seed", seed, least=0)
    if not tolerance >= 0:
        raise ValueError(f"{op}: tolerance must be at least 0, got {tolerance}")
    n, d = (int(s) for s in rows.shape)
    if k > n:
        raise ValueError(f"{op}: k must be at most the number of rows of x ({n}), got {k}")
    if minibatch is None:
        _backend.require_finite(op, "x", rows, num_threads)
    else:
        minibatch = as_count(op, "minibatch", minibatch)
        require_cpu(op, "x", rows)
        if metric != "l2":
            raise ValueError(f"{op}: minibatch must be None unless metric is 'l2', got {minibatch}")
    rng = np.random.default_rng(seed)
    if isinstance(init, str):
        choice(op, "init", init, ("k-means++", "random", "strided"))
        some = rows if minibatch is None else _start_rows(op, rows, k, init, rng, num_threads)
        start = seed_centroids(op, some[None], k, metric, init, rng, num_threads)
    else:
        start = as_array(op, "init", init, ndim=2)
        if tuple(start.shape) != (k, d):
            raise ValueError(f"{op}: init must have shape {(k, d)}, got {tuple(start.shape)}")
        _backend.require_finite(op, "init", start, num_threads)
        start = start[None]
    with reporting(op, progress, max_iter, "iterations") as report:
        if minibatch is not None:
            found = _average_batches(op, rows, np.asarray(start[0]), minibatch, max_iter, rng, report, num_threads)
            return _label_blocks(op, rows, found, max_iter, num_threads)
        centroids, labels, inertia, iterations = lloyd(
            op, rows[None], start, metric, max_iter, tolerance, report, num_threads
        )
    return KMeansResult(centroids[0], labels[0], float(inertia[0]), iterations)


class KMeansSelection(NamedTuple):
    """What `kmeans_select` found; a tuple with names.

    Parameters
    ----------
    result : KMeansResult
        Of the number of clusters that was chosen.
    k : int
        That number.
    scores : numpy array of shape (len(k_range),), float64
        For each number of clusters the inertia ("elbow") or the mean silhouette.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.repeat(np.eye(4, dtype=np.float32), 9, 0)
    >>> found = pv.quantize.kmeans_select(x, [3, 4, 5], criterion="silhouette")
    >>> found.k, float(found.scores[1])
    (4, 1.0)
    """

    result: KMeansResult
    k: int
    scores: npt.NDArray[np.float64]


def kmeans_select(
    x: Any,
    k_range: Any,
    *,
    criterion: str = "elbow",
    max_iter: int = 25,
    tolerance: float = 1e-4,
    seed: int = 0,
    progress: Progress = None,
    num_threads: int | None = None,
) -> KMeansSelection:
    """Choose a number of clusters: run `kmeans` with each of some numbers and keep the best of them.

    Parameters
    ----------
    x : array of shape (n, d), float32
    k_range : sequence of ints
        Numbers of clusters in ascending order, each at most n; for "elbow" at least three, for "silhouette" at least
        one, from 2 on.
    criterion : {"elbow", "silhouette"}
        "elbow": where the curve of the inertia bends most, the point farthest below the line through its ends.
        "silhouette": the greatest mean over rows of (b - a) / max(a, b), where a and b are a row's distances from its
        own and from the next nearest centroid (the simplified silhouette).
    max_iter, tolerance, seed
        As of `kmeans`.
    progress : None, bool or callable
        True shows a bar; a callable is called with (done, total) numbers of clusters.
    num_threads : int, optional
        CPU threads; the process setting when None. The result does not depend on it.

    Returns
    -------
    KMeansSelection
        `.result`, `.k`, `.scores`. Of equally good numbers the smallest.

    Raises
    ------
    ValueError
        Numbers that are too few, not ascending or out of range, an unknown criterion, NaN or Inf in x.
    TypeError
        Dtypes other than float32.

    Notes
    -----
    Costs the sum of the runs; a silhouette costs as much as one more iteration.

    References
    ----------
    Satopaa et al. (2011): Finding a "kneedle" in a haystack, section III (elbow). Hruschka, de Castro and Campello
    (2004): Evolutionary algorithms for clustering gene-expression data, section 2 (simplified silhouette).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> rng = np.random.default_rng(0)
    >>> x = 40 * rng.standard_normal((1, 5, 8), np.float32) + rng.standard_normal((50, 5, 8), np.float32)
    >>> pv.quantize.kmeans_select(x.reshape(250, 8), range(1, 12)).k
    5
    """
    op = "quantize.kmeans_select"
    rows = as_array(op, "x", x, ndim=2)
    choice(op, "criterion", criterion, ("elbow", "silhouette"))
    numbers = [as_count(op, "k_range", k) for k in k_range]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"{op}: k_range must ascend, got {numbers}")
    elbow = criterion == "elbow"
    if len(numbers) < (3 if elbow else 1):
        raise ValueError(f"{op}: k_range must have at least {3 if elbow else 1} numbers, got {len(numbers)}")
    if not elbow and numbers[0] < 2:
        raise ValueError(f"{op}: k_range must start at 2 or above for 'silhouette', got {numbers[0]}")
    if numbers[-1] > rows.shape[0]:
        raise ValueError(f"{op}: k_range must be at most the number of rows of x ({rows.shape[0]}), got {numbers[-1]}")
    results, scores = [], np.empty(len(numbers))
    with reporting(op, progress, len(numbers), "numbers of clusters") as report:
        for i, k in enumerate(numbers):
            result = kmeans(rows, k, max_iter=max_iter, tolerance=tolerance, seed=seed, num_threads=num_threads)
            results.append(result)
            scores[i] = result.inertia if elbow else _silhouette(op, rows, result.centroids, num_threads)
            report(1)
    best = int(np.argmax(_depths(np.array(numbers), scores) if elbow else scores))
    return KMeansSelection(results[best], numbers[best], scores)


def _depths(numbers: npt.NDArray[np.int64], inertia: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return how far each point of the curve lies below the line through its ends."""
    share = (numbers - numbers[0]) / (numbers[-1] - numbers[0])
    depths: npt.NDArray[np.float64] = inertia[0] + share * (inertia[-1] - inertia[0]) - inertia
    return depths


def _silhouette(op: str, rows: Any, centroids: Any, num_threads: int | None) -> float:
    shape = int(rows.shape[0]), 2
    squares, ids = empty(rows, shape, "float32"), empty(rows, shape, "int64")
    _backend.run(
        op, "scan_topk", rows,
        rows, None, None, centroids, None, None, None, None, squares, ids, "l2",
        num_threads=num_threads,
    )  # fmt: skip
    own, other = np.sqrt(np.asarray(to_host(squares), np.float64)).T
    return float(np.divide(other - own, other, out=np.zeros_like(own), where=other > 0).mean())


# ---- batches


def _batch(op: str, rows: Any, size: int, rng: np.random.Generator, num_threads: int | None) -> npt.NDArray[np.float32]:
    """Return `size` random rows, or all, in their order."""
    n = int(rows.shape[0])
    ids = np.sort(rng.choice(n, size, replace=False, shuffle=False)) if size < n else np.arange(n)
    batch = as_float32(rows[ids])
    bad = _backend.run(op, "first_nonfinite_row", batch, batch, num_threads=num_threads)
    if bad >= 0:
        raise ValueError(f"{op}: x must be finite, got NaN or Inf in row {ids[bad]}")
    return batch


def _start_rows(
    op: str, rows: Any, k: int, init: str, rng: np.random.Generator, num_threads: int | None
) -> npt.NDArray[np.float32]:
    """Return the rows that a start is drawn from."""
    n = int(rows.shape[0])
    if init == "strided":
        start = as_float32(rows[np.arange(k) * n // k])
        _backend.require_finite(op, "x", start, num_threads)
        return start
    return _batch(op, rows, min(n, k if init == "random" else _SEED_ROWS * k), rng, num_threads)


def _average_batches(
    op: str,
    rows: Any,
    start: npt.NDArray[np.float32],
    size: int,
    max_iter: int,
    rng: np.random.Generator,
    report: Any,
    num_threads: int | None,
) -> npt.NDArray[np.float32]:
    """Return the centroids after so many batches (Sculley 2010, algorithm 1)."""
    k, size = len(start), min(size, int(rows.shape[0]))
    centroids: npt.NDArray[np.float32] = start.copy()
    counts = np.zeros(k, np.int64)
    labels, inertia, means = np.empty((1, size), np.int64), np.empty(1), np.empty((1, *start.shape), np.float32)
    for _ in range(max_iter):
        batch = _batch(op, rows, size, rng, num_threads)
        step(op, batch[None], centroids[None], labels, inertia, means, "l2", num_threads)
        members = np.bincount(labels[0], minlength=k)
        counts += members
        rates = np.where(counts > 0, members / np.maximum(counts, 1), 1.0)  # without any so far: where `step` moved it
        centroids += (rates[:, None] * (means[0] - centroids)).astype(np.float32)
        report(1)
    return centroids


def _label_blocks(
    op: str, rows: Any, centroids: npt.NDArray[np.float32], iterations: int, num_threads: int | None
) -> KMeansResult:
    """Label all rows, block by block."""
    n, d = (int(s) for s in rows.shape)
    labels, total, part = np.empty(n, np.int64), 0.0, np.empty(1)
    size = max(1, _BLOCK_ELEMENTS // max(d, 1))
    for begin in range(0, n, size):
        block = as_float32(rows[begin : begin + size])
        _backend.require_finite(op, "x", block, num_threads, first_row=begin)
        step(op, block[None], centroids[None], labels[None, begin : begin + size], part, None, "l2", num_threads)
        total += float(part[0])
    if is_torch(rows):
        return KMeansResult(to_device_of(rows, centroids), to_device_of(rows, labels), total, iterations)
    return KMeansResult(centroids, labels, total, iterations)


def seed_centroids(
    op: str, x: Any, k: int, metric: str, init: str, rng: np.random.Generator, num_threads: int | None
) -> Any:
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


def lloyd(
    op: str,
    x: Any,
    start: Any,
    metric: str,
    max_iter: int,
    tolerance: float,
    report: Any,
    num_threads: int | None,
    *,
    label: bool = True,
) -> tuple[Any, Any, npt.NDArray[np.float64], int]:
    """Iterate on problems (problems, n, d) from centroids (problems, k, d) until all have converged.

    Unless `label`, the centroids alone count: the last time they move, rows are not labelled anew.
    """
    problems, n, _ = (int(s) for s in x.shape)
    buffers = [empty(x, tuple(start.shape), "float32") for _ in range(2)]
    labels = empty(x, (problems, n), "int64")
    inertia, previous = np.empty(problems), np.full(problems, np.inf)
    centroids = start
    for iteration in range(max_iter + 1):
        last = iteration == max_iter
        if last and not label:
            break
        updated = None if last else buffers[iteration % 2]
        step(op, x, centroids, labels, inertia, updated, metric, num_threads)
        if last or (previous <= (1 + tolerance) * inertia).all():
            break
        centroids, previous = updated, inertia.copy()
        report(1)
    return centroids, labels, inertia, iteration


def step(
    op: str, x: Any, centroids: Any, labels: Any, inertia: Any, updated: Any, metric: str, num_threads: int | None
) -> None:
    """Label every row with its nearest centroid; write the means to `updated` unless it is None."""
    _backend.run(
        op, "quantize_kmeans_step", x,
        x, centroids, labels, inertia, updated, metric,
        num_threads=num_threads,
    )  # fmt: skip


def training_rows(n: int, k: int) -> npt.NDArray[np.int64]:
    """Return the rows of n, evenly taken, that `train_centroids` looks at for k centroids: at most 16 for each."""
    rows = min(n, 16 * k)
    return np.arange(rows) * n // max(rows, 1)


def train_centroids(op: str, x: Any, k: int, num_threads: int | None) -> Any:
    """Return centroids that begin as rows of x, evenly taken: 4 steps of k-means on the `training_rows`."""
    n, dim = int(x.shape[0]), int(x.shape[1])
    centroids, updated = (empty(x, (1, k, dim), "float32") for _ in range(2))
    if n == 0:
        centroids[:] = 0
        return centroids[0]
    sample = x[training_rows(n, k)]
    rows = int(sample.shape[0])
    centroids[0] = sample[np.arange(k) * rows // k]
    labels, inertia = empty(x, (1, rows), "int64"), np.empty(1)
    for _ in range(4):
        _backend.run(
            op, "quantize_kmeans_step", x,
            sample[None], centroids, labels, inertia, updated, "l2",
            num_threads=num_threads,
        )  # fmt: skip
        centroids, updated = updated, centroids
    return centroids[0]
