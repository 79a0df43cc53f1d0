"""k-means clustering, public as polyvec.quantize.kmeans."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from polyvec import _backend
from polyvec._arrays import as_array, as_count, choice, contiguous, empty
from polyvec._progress import Progress, reporting

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
        start = seed_centroids(op, rows[None], k, metric, init, np.random.default_rng(seed), num_threads)
    else:
        start = as_array(op, "init", init, ndim=2)
        if tuple(start.shape) != (k, d):
            raise ValueError(f"{op}: init must have shape {(k, d)}, got {tuple(start.shape)}")
        _backend.require_finite(op, "init", start, num_threads)
        start = start[None]
    with reporting(op, progress, max_iter, "iterations") as report:
        centroids, labels, inertia, iterations = lloyd(
            op, rows[None], start, metric, max_iter, tolerance, report, num_threads
        )
    return KMeansResult(centroids[0], labels[0], float(inertia[0]), iterations)


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
