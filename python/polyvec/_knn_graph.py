"""The graph of nearest neighbours, public as `polyvec.hnsw.knn_graph`."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polyvec import _backend
from polyvec._arrays import ArrayT, as_array, as_count, as_float32, choice, rows_of
from polyvec._kmeans import train_centroids, training_rows
from polyvec._progress import Progress, reporting

_ALL = 2048  # rows that are all compared with each other
_CLUSTER = 56  # rows of a cluster, or more where there would be more than 3 sqrt(n) clusters
_CHUNK = 8192  # rows between two reports of progress
_MISSING = 0x7FFFFFFF  # instead of a row, which has no more bits: the highest one is the kernels' own


def knn_graph(
    x: ArrayT,
    k: int,
    *,
    metric: Literal["cosine", "l2"] = "l2",
    probes: int = 12,
    passes: int = 2,
    progress: Progress = None,
    num_threads: int | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Find the k nearest other rows of every row: the graph that UMAP, t-SNE and clustering start from.

    Parameters
    ----------
    x : array of shape (n, d), float32 | float16 | bfloat16
    k : int
        Neighbours of a row; the row itself is not among them, its copies are.
    metric : {"l2", "cosine"}
        "l2": *squared* distances; take the root for tools that expect Euclidean ones. "cosine": 1 - cosine.
    probes : int
        Clusters of neighbouring rows that a row is compared with, of 56 rows each, or of sqrt(n) / 3 where that is
        more. More probes give better recall and take longer.
    passes : int
        How often a row is then compared with the neighbours of its neighbours.
    progress : bool or callable, optional
        True shows a bar; a callable is given (done, total): rows, once for the clusters and once a pass.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    indptr : array of shape (n + 1,), int64
    indices : array of shape (number of neighbours,), int64
    distances : array of that shape, float32
        A sparse matrix by rows (CSR): the neighbours of row i are ``indices[indptr[i] : indptr[i + 1]]``, nearest
        first. There are k of them, or all other rows that were found where these are fewer.

    Raises
    ------
    ValueError
        Another number of axes, NaN or Inf, k, probes or passes out of range.
    TypeError
        x of another dtype.

    Notes
    -----
    Rows are compared in one byte an element, and what is returned by the rows themselves. Same result for any number of
    threads; exact up to 2,048 rows but for what bytes confuse. Beside x it takes n * d bytes, and some 40 * n * k. With
    scipy: ``csr_matrix((distances, indices, indptr), (n, n))``; for UMAP's `precomputed_knn` reshape to (n, k).

    References
    ----------
    NN-descent (Dong, Charikar and Li 2011): Efficient k-nearest neighbor graph construction for generic similarity
    measures, sections 2.2 to 2.4.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> pv.hnsw.knn_graph(np.array([[0], [1], [3]], np.float32), 1)
    (array([0, 1, 2, 3]), array([1, 0, 1]), array([1., 1., 4.], dtype=float32))
    """
    op = "hnsw.knn_graph"
    given: Any = as_array(op, "x", x, dtypes=("float32", "float16", "bfloat16"), ndim=2)
    k, probes, passes = as_count(op, "k", k), as_count(op, "probes", probes), as_count(op, "passes", passes, least=0)
    choice(op, "metric", metric, ("l2", "cosine"))
    _backend.require_finite(op, "x", given, num_threads)
    n, d = (int(length) for length in given.shape)
    if n > _ALL:
        order, begins, probed = _clusters(op, given, metric, probes, num_threads)
    else:
        order, begins, probed, passes = np.arange(n), np.array([0, n]), np.zeros((n, 1), np.int64), 0
    codes = np.empty((n, -(-max(d, 1) // 64) * 64), np.uint8), np.empty((n, 2), np.float32), metric == "l2"

    kept = k + max(5, k // 3)  # what is close to being a neighbour leads to neighbours
    degree = min(kept, max(12, min(4 * k // 5, 32)))
    ids, distances = np.empty((n, kept), np.int32), np.empty((n, kept), np.float32)
    better, nearer = np.empty_like(ids), np.empty_like(distances)
    reverse = np.empty((n, degree), np.int32)
    with reporting(op, progress, n * (1 + passes), "rows") as report:
        for first in range(0, n, _CHUNK):
            block = _rows(op, given, order[first : first + _CHUNK], metric, num_threads)
            _backend.run(op, "knn_encode", block, block, first, codes, num_threads=num_threads)
        for first in range(0, n, _CHUNK):
            last = min(first + _CHUNK, n)
            _backend.run(op, "knn_join", ids, codes, begins, probed, first, last, ids, distances,
                         num_threads=num_threads)  # fmt: skip
            report(last - first)
        for _ in range(passes):
            _backend.run(op, "knn_reverse", ids, ids, degree, reverse, num_threads=num_threads)
            for first in range(0, n, _CHUNK):
                last = min(first + _CHUNK, n)
                _backend.run(op, "knn_refine", ids, codes, ids, distances, reverse, degree, first, last, better,
                             nearer, num_threads=num_threads)  # fmt: skip
                report(last - first)
            ids, better, distances, nearer = better, ids, nearer, distances

    place = np.empty(n, np.int64)  # of a row among those in the order of their clusters
    place[order] = np.arange(n)
    exact = np.empty((n, kept), np.int64)
    inverse_norms = _inverse_norms(given) if metric == "cosine" else np.ones(n, np.float32)
    for first in range(0, n, _CHUNK):
        some = slice(first, min(first + _CHUNK, n))
        listed = ids[place[some]] & _MISSING
        missing = listed == _MISSING
        exact[some] = order[np.where(missing, 0, listed)]
        queries: Any = as_float32(given[some])  # as they are: beside 16 bits they would be rounded again
        kind = "l2" if metric == "l2" else "ip"
        _backend.run(op, "scan_score_pairs", queries, queries, None, None, given, None, exact[some], None,
                     distances[some], kind, num_threads=num_threads)  # fmt: skip
        if metric == "cosine":
            distances[some] = 1 - distances[some] * inverse_norms[some, None] * inverse_norms[exact[some]]
        distances[some][missing] = np.inf
    _backend.run(op, "knn_sort", exact, exact, distances, num_threads=num_threads)
    exact, distances = exact[:, :k], distances[:, :k]
    found = distances < np.inf
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(found.sum(axis=1))])
    return indptr, exact[found], distances[found]


def _rows(op: str, x: Any, rows: Any, metric: str, num_threads: int | None) -> Any:
    """Return some rows as float32; of norm 1 for "cosine"."""
    block = as_float32(rows_of(x, rows), copy=True)
    if metric == "cosine":
        _backend.run(op, "codes_unit_rows", block, block, num_threads=num_threads)
    return block


def _inverse_norms(x: Any) -> npt.NDArray[np.float32]:
    """Return 1 / |x|, 0 for a zero vector."""
    squares = [
        np.square(as_float32(x[i : i + _CHUNK]), dtype=np.float64).sum(1) for i in range(0, int(x.shape[0]), _CHUNK)
    ]
    with np.errstate(divide="ignore"):
        inverse = 1 / np.sqrt(np.concatenate([np.empty(0), *squares]))
    return np.where(np.isfinite(inverse), inverse, 0).astype(np.float32)


def _clusters(
    op: str, x: Any, metric: str, probes: int, num_threads: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows in the order of their clusters, where each begins, and which each row is compared with."""
    n = int(x.shape[0])
    count = int(min(n / _CLUSTER, 3 * n**0.5))
    sample = _rows(op, x, training_rows(n, count), metric, num_threads)
    centroids = train_centroids(op, sample, count, num_threads)
    probed = np.empty((n, min(probes, count)), np.int64)
    distances = np.empty(probed.shape, np.float32)
    for first in range(0, n, _CHUNK):
        some = slice(first, min(first + _CHUNK, n))
        block = _rows(op, x, np.arange(n)[some], metric, num_threads)
        _backend.run(op, "scan_topk", block, block, None, None, centroids, None, None, None, None, distances[some],
                     probed[some], "l2", num_threads=num_threads)  # fmt: skip
    order = np.argsort(probed[:, 0], kind="stable")
    begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(probed[:, 0], minlength=count))])
    return order, begins, np.ascontiguousarray(probed[order])
