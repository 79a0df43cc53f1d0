"""The graph of nearest neighbours, public as `polyvec.hnsw.knn_graph`."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polyvec import _backend
from polyvec._arrays import ArrayT, aligned_bytes, as_array, as_count, as_float32, choice, rows_of
from polyvec._codes import rotation_signs
from polyvec._kmeans import lloyd, seed_centroids, step, train_centroids, training_rows
from polyvec._progress import Progress, reporting

_ALL = 2048  # rows that are all compared with each other
_FEW_DIMS = 4  # in which clusters have few neighbours, and 4 bits a dimension tell few rows apart
_CLUSTER = 56  # rows of a cluster, or more where there would be more than 1.5 sqrt(n) clusters
_SUBSPACES = 96  # of codes, unless these would be wider than
_MOST_WIDTH = 8
_CHUNK = 8192  # rows between two reports of progress
_PROBES = 40
_SURVEYED = 64  # rows whose recall is measured
_RECALL = 0.92  # at least, of these
_EFFORT = 4  # of a second try: as many times the clusters and the candidates

Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


def knn_graph(
    x: ArrayT,
    k: int,
    *,
    metric: Literal["cosine", "l2"] = "l2",
    probes: int | None = None,
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
    probes : int, optional
        Clusters that a row is compared with, of 56 rows each, or of sqrt(n) / 1.5 where that is more: more of them give
        better recall and take longer. None: 40, as long as that gives a recall of .92 in a sample of the rows.
    progress : bool or callable, optional
        True shows a bar; a callable is given (done, total): rows, once as they are encoded and once as they are
        compared, and anew with another total where they are compared another way.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    indptr : array of shape (n + 1,), int64
    indices : array of shape (number of neighbours,), int64
    distances : array of that shape, float32
        A sparse matrix by rows (CSR): the neighbours of row i are ``indices[indptr[i] : indptr[i + 1]]``, nearest
        first. There are k of them, or all other rows where these are fewer.

    Raises
    ------
    ValueError
        Another number of axes, NaN or Inf, k or probes out of range.
    TypeError
        x of another dtype.

    Notes
    -----
    Rows are compared by codes of 4 bits a subspace, up to 96 subspaces or one for 8 dimensions. The best 2 k + 20 by
    these are put in order by the rows themselves, together with those that have the row among their own best. With 4
    dimensions or fewer all rows of the clusters around a row's own are compared, without codes.

    Codes are trained on values clipped to the middle 99 % of each dimension, and tell rows apart at the scale of
    a row's own cluster, so that outliers, heavy tails and dimensions of another scale cost little. What they cannot
    tell apart, such as rows whose norms spread over orders of magnitude, is found out unless probes are given: the
    neighbours of 64 rows are compared with the exact ones. With a recall below .92 four times as many clusters and
    candidates are tried where that is much faster than comparing all rows with each other, and otherwise, or where that
    does not suffice, all are. So they are at once up to 2,048 rows, and where an estimate takes that for faster: for
    many neighbours (about 300 of 20,000 x 128) or few rows. Rows that find fewer than k in their clusters are compared
    with all, too. Same result for any number
    of threads. Beside x it takes some 60 * n * k bytes. With scipy: ``csr_matrix((distances, indices, indptr),
    (n, n))``; for UMAP's `precomputed_knn` reshape to (n, k).

    References
    ----------
    Jegou, Douze and Schmid (2011): Product quantization for nearest neighbor search, section IV (codes in clusters).
    Andre, Kermarrec and Le Scouarnec (2015): Cache locality is not enough, section 4 (tables in registers).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> pv.hnsw.knn_graph(np.array([[0], [1], [3]], np.float32), 1)
    (array([0, 1, 2, 3]), array([1, 0, 1]), array([1., 1., 4.], dtype=float32))
    """
    op = "hnsw.knn_graph"
    given: Any = as_array(op, "x", x, dtypes=("float32", "float16", "bfloat16"), ndim=2)
    k = as_count(op, "k", k)
    fixed = None if probes is None else as_count(op, "probes", probes)
    choice(op, "metric", metric, ("l2", "cosine"))
    _backend.require_finite(op, "x", given, num_threads)
    n, d = (int(length) for length in given.shape)
    k = min(k, max(n - 1, 0))
    neighbors, distances = np.full((n, k), -1, np.int64), np.empty((n, k), np.float32)
    if n > _ALL and d <= _FEW_DIMS:
        neighbors, distances = _by_rows(op, given, k, metric, fixed or _PROBES, progress, num_threads)
    elif n > _ALL and fixed:
        neighbors, distances = _by_codes(op, given, k, metric, fixed, 2 * k + 20, progress, num_threads)
    elif n > _ALL:
        exact, codes = _costs(n, d, k)
        for effort in (1, _EFFORT):
            if exact < codes * effort**1.5:  # what is spent on codes that do not suffice should be little
                break
            neighbors, distances = _by_codes(
                op, given, k, metric, effort * _PROBES, effort * (2 * k + 20), progress, num_threads
            )
            if _recall(op, given, neighbors, distances, metric, num_threads) >= _RECALL:
                break
            neighbors.fill(-1)
    _complete(op, given, neighbors, distances, metric, progress, num_threads)
    return np.arange(n + 1, dtype=np.int64) * k, neighbors.ravel(), distances.ravel()


def _costs(n: int, d: int, k: int) -> tuple[float, float]:
    """Return what comparing a row with all others, and by codes, takes: estimates in ns on a Zen 3 core."""
    return (0.035 * d + 1) * n + 300 * k, 13_000 + 80 * d + (500 + 0.8 * d) * k


def _recall(
    op: str, x: Any, neighbors: npt.NDArray[np.int64], distances: npt.NDArray[np.float32], metric: str,
    num_threads: int | None,
) -> float:  # fmt: skip
    """Return the share of the nearest of some rows that was found; equally near ones count as well."""
    n, k = neighbors.shape
    rows = np.arange(_SURVEYED) * n // _SURVEYED
    ids, nearest = _nearest_others(op, as_float32(x), rows, k, metric, num_threads)
    found = distances[rows] <= nearest[:, -1:]
    for own, neighbors_found, exact in zip(found, neighbors[rows], ids, strict=True):
        own |= np.isin(neighbors_found, exact)
    return float(found.mean())


def _complete(
    op: str, x: Any, neighbors: npt.NDArray[np.int64], distances: npt.NDArray[np.float32], metric: str,
    progress: Progress, num_threads: int | None,
) -> None:  # fmt: skip
    """Compare rows that found too few, or nothing was tried for, with all others."""
    incomplete = np.flatnonzero((neighbors < 0).any(axis=1))
    if len(incomplete) == 0:
        return
    items = as_float32(x)
    with reporting(op, progress, len(incomplete), "rows") as report:
        for first in range(0, len(incomplete), _ALL):
            rows = incomplete[first : first + _ALL]
            neighbors[rows], distances[rows] = _nearest_others(op, items, rows, neighbors.shape[1], metric, num_threads)
            report(len(rows))


def _nearest_others(
    op: str, items: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], k: int, metric: str, num_threads: int | None
) -> Found:
    """Compare some rows of the items with all others; -1 where there are fewer than k."""
    scores, ids = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    _backend.run(op, "scan_topk", items, items[rows], None, None, items, None, None, np.arange(len(rows) + 1), rows,
                 scores, ids, metric, num_threads=num_threads)  # fmt: skip
    return ids, scores if metric == "l2" else 1 - scores


def _by_rows(op: str, x: Any, k: int, metric: str, probes: int, progress: Progress, num_threads: int | None) -> Found:
    """Compare the rows of each cluster with those of the clusters around it."""
    n = int(x.shape[0])
    centroids = _centroids(op, x, metric, num_threads)
    labels, around = np.empty(n, np.int64), np.empty((len(centroids), min(probes, len(centroids))), np.int64)
    for first in range(0, n, _CHUNK):
        _label(op, _rows(op, x[first : first + _CHUNK], metric, num_threads), centroids,
               labels[first : first + _CHUNK], num_threads)  # fmt: skip
    _backend.run(op, "scan_topk", centroids, centroids, None, None, centroids, None, None, None, None,
                 np.empty(around.shape, np.float32), around, "l2", num_threads=num_threads)  # fmt: skip
    order, begins = _clusters(labels, len(centroids))
    neighbors, distances = np.empty((n, k), np.int64), np.empty((n, k), np.float32)
    with reporting(op, progress, n, "rows") as report:
        for cluster in np.flatnonzero(np.diff(begins)):
            others = [order[begins[c] : begins[c + 1]] for c in around[cluster] if c != cluster]
            rows = np.concatenate([order[begins[cluster] : begins[cluster + 1]], *others])
            count = int(begins[cluster + 1] - begins[cluster])
            ids, distances[rows[:count]] = _nearest_others(
                op, as_float32(rows_of(x, rows)), np.arange(count), k, metric, num_threads
            )
            neighbors[rows[:count]] = np.where(ids < 0, -1, rows[ids])
            report(count)
    return neighbors, distances


def _by_codes(
    op: str, x: Any, k: int, metric: str, probes: int, candidates: int, progress: Progress, num_threads: int | None
) -> Found:
    """Compare rows with the codes of those in the nearest clusters, and then with the best of these."""
    n, d = (int(length) for length in x.shape)
    width = min(-(-d // _SUBSPACES), _MOST_WIDTH)
    subspaces = -(-d // width)

    signs = rotation_signs(d, 0) if width == 1 else None  # wider subspaces use that dimensions go together

    def pieces_of(rows: Any) -> Any:
        if signs is None:
            return rows if d == subspaces * width else np.pad(rows, ((0, 0), (0, subspaces * width - d)))
        rotated = rows.copy()
        _backend.run(op, "codes_rotate", rotated, signs, rotated, False, num_threads=num_threads)
        return rotated

    def encode(rows: Any, out: Any) -> None:
        _backend.run(op, "quantize_pq_encode", rows, pieces_of(rows), codebooks, out, num_threads=num_threads)

    def packed(codes: Any) -> Any:
        shape = -(-len(codes) // 16), -(-codes.shape[1] // 4) * 4, 16
        blocks = aligned_bytes(math.prod(shape)).reshape(shape)
        _backend.run(op, "quantize_pq_pack", codes, codes, blocks, num_threads=num_threads)
        return blocks

    centroids = _centroids(op, x, metric, num_threads)
    sample = pieces_of(_rows(op, rows_of(x, training_rows(n, 256)), metric, num_threads))
    pieces = np.ascontiguousarray(sample.reshape(len(sample), subspaces, width).transpose(1, 0, 2))
    low, high = (bound.reshape(subspaces, 1, width) for bound in _outermost(sample))
    np.clip(pieces, low, high, out=pieces)
    start = seed_centroids(op, pieces, 16, "l2", "k-means++", np.random.default_rng(0), num_threads)
    codebooks = lloyd(op, pieces, start, "l2", 8, 1e-4, lambda _: None, num_threads, label=False)[0]

    labels, codes = np.empty(n, np.int64), np.empty((n, -(-subspaces // 2)), np.uint8)
    codes_of_centroids = np.empty((len(centroids), codes.shape[1]), np.uint8)
    encode(centroids, codes_of_centroids)
    kept = min(candidates, n - 1)
    ids, nearness = np.empty((n, kept), np.int64), np.empty((n, kept), np.float32)
    norms = np.ones(n, np.float32)
    with reporting(op, progress, 2 * n, "rows") as report:
        for first in range(0, n, _CHUNK):
            some = slice(first, min(first + _CHUNK, n))
            block = _rows(op, x[some], metric, num_threads)
            _label(op, block, centroids, labels[some], num_threads)
            encode(block, codes[some])
            if metric == "cosine":
                np.einsum("ij,ij->i", block, as_float32(x[some]), out=norms[some])
            report(len(block))
        order, begins = _clusters(labels, len(centroids))
        blocks, centroid_blocks = packed(codes[order]), packed(codes_of_centroids)
        inverse_norms = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
        for first in range(0, n, _CHUNK):
            some = slice(first, min(first + _CHUNK, n))
            rows = as_float32(rows_of(x, order[some]))
            block = rows if metric == "l2" else rows * inverse_norms[order[some], None]
            _backend.run(op, "knn_scan", block, pieces_of(block), codebooks, blocks, centroid_blocks, order, begins,
                         first, min(probes, len(centroids)), ids[some], num_threads=num_threads)  # fmt: skip
            _backend.run(op, "scan_score_pairs", rows, rows, None, None, x, None, ids[some], None, nearness[some],
                         "l2" if metric == "l2" else "ip", num_threads=num_threads)  # fmt: skip
            if metric == "cosine":
                nearness[some] = 1 - nearness[some] * inverse_norms[order[some], None] * inverse_norms[ids[some]]
            report(len(rows))
    neighbors, distances = np.empty((n, k), np.int64), np.empty((n, k), np.float32)
    _backend.run(op, "knn_merge", order, order, ids, nearness, neighbors, distances, num_threads=num_threads)
    return neighbors, distances


def _rows(op: str, rows: Any, metric: str, num_threads: int | None) -> Any:
    """Return rows as float32; of norm 1 for "cosine"."""
    if metric == "l2":
        return as_float32(rows)
    block = as_float32(rows, copy=True)
    _backend.run(op, "codes_unit_rows", block, block, num_threads=num_threads)
    return block


def _outermost(sample: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return what a 300th of the values of each dimension lie below, and above: of some of the rows."""
    some = np.ascontiguousarray(sample[:: max(1, len(sample) // 512)].T)
    rank = some.shape[1] // 300
    some.partition((rank, some.shape[1] - 1 - rank), axis=1)
    return some[:, rank], some[:, -1 - rank]


def _centroids(op: str, x: Any, metric: str, num_threads: int | None) -> npt.NDArray[np.float32]:
    n = int(x.shape[0])
    count = int(min(n / _CLUSTER, 1.5 * n**0.5))
    centroids: npt.NDArray[np.float32] = train_centroids(
        op, _rows(op, rows_of(x, training_rows(n, count)), metric, num_threads), count, num_threads
    )
    return centroids


def _label(op: str, rows: Any, centroids: Any, labels: npt.NDArray[np.int64], num_threads: int | None) -> None:
    """Write the nearest centroid of each row."""
    step(op, rows[None], centroids[None], labels[None], np.empty(1), None, "l2", num_threads)


def _clusters(labels: npt.NDArray[np.int64], count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows in the order of their clusters, and where each of these begins."""
    begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(labels, minlength=count))])
    return np.argsort(labels, kind="stable"), begins
