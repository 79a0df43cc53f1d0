"""Clusters of many small sets at once: public as `polyvec.quantize.kmeans_sets` and `polyvec.maxsim.pool`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from polyvec import _backend
from polyvec._arrays import as_count, choice, device_name, empty
from polyvec._ragged import Ragged, as_ragged


class KMeansSetsResult(NamedTuple):
    """What `kmeans_sets` found; a tuple with names.

    Parameters
    ----------
    centroids : Ragged
        The centroids of each set, one set's after another's.
    labels : array of shape (T,), int64
        The cluster of each row, counted within its set.
    inertia : numpy array of shape (n,), float64
        The sum of squared distances of a set's rows from their centroids.
    iterations : numpy array of shape (n,), int64
        These two are numpy arrays on a CPU, and lie beside the sets on a GPU.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> sets = [np.eye(3, dtype=np.float32), np.ones((4, 3), np.float32)]
    >>> pv.quantize.kmeans_sets(sets, 2).inertia
    array([1., 0.])
    """

    centroids: Ragged
    labels: Any
    inertia: Any
    iterations: Any


def kmeans_sets(
    sets: Any,
    k: int | None = None,
    *,
    ratio: float | None = None,
    max_iter: int = 25,
    tolerance: float = 0.0,
    num_threads: int | None = None,
) -> KMeansSetsResult:
    """Cluster each of many sets of rows by itself, in one call (Lloyd's iterations, squared distances).

    Iterations start from evenly spaced rows: on the tokens of documents that is as good as k-means++. A cluster without
    rows takes the row farthest from its centroid.

    Parameters
    ----------
    sets : token sets, float32
        A Ragged, (values, offsets), a list of (n_i, d) arrays, or a padded array, alone or with lengths.
    k : int, optional
        Clusters of a set; a set of no more rows keeps them.
    ratio : float, optional
        Instead of k: clusters for each row of a set, in (0, 1], rounded down, at least one.
    max_iter : int
        How often the centroids move at most.
    tolerance : float
        Stop when an iteration lowers the inertia of the set by no more than this fraction of it.
    num_threads : int, optional
        CPU threads; the process setting when None. The result does not depend on it.

    Returns
    -------
    KMeansSetsResult
        `.centroids`, `.labels`, `.inertia`, `.iterations`; centroids are the means of the rows with their label.
        Centroids and labels are in the library of the sets.

    Raises
    ------
    ValueError
        Neither k nor ratio or both, values out of range, NaN or Inf in a row.
    TypeError
        Dtypes other than float32.

    Notes
    -----
    2 n k d flops an iteration and set of n rows, at most: rows are compared with the means that moved, and with others
    only where these may have become the nearest. One thread works on a set, whose rows stay in its caches.

    References
    ----------
    Veneroso et al. (2025): CRISP, section 3.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.array([[0, 0], [0, 1], [9, 0], [9, 1], [5, 5]], np.float32)
    >>> result = pv.quantize.kmeans_sets((x, [0, 4, 5]), 2)
    >>> result.centroids.offsets.tolist(), result.centroids.values.tolist(), result.labels.tolist()
    ([0, 2, 3], [[0.0, 0.5], [9.0, 0.5], [5.0, 5.0]], [0, 0, 1, 1, 0])
    """
    return cluster("quantize.kmeans_sets", "sets", sets, k, ratio, "kmeans", max_iter, tolerance, num_threads)


def pool(
    docs: Any,
    k: int | None = None,
    *,
    ratio: float | None = None,
    method: str = "kmeans",
    max_iter: int = 20,
    num_threads: int | None = None,
) -> Ragged:
    """Replace the tokens of each document by the means of their clusters: fewer tokens, nearly the same scores.

    Parameters
    ----------
    docs : token sets, float32
    k : int, optional
        Tokens that a document keeps; one of no more tokens stays as it is.
    ratio : float, optional
        Instead of k: tokens to keep for each token of the document, in (0, 1], rounded down, at least one.
    method : {"kmeans", "ward"}
        Lloyd's iterations from evenly spaced tokens, or Ward's hierarchical clustering.
    max_iter : int
        Iterations of "kmeans" at most.
    num_threads : int, optional
        CPU threads; the process setting when None. The result does not depend on it.

    Returns
    -------
    Ragged
        Means of tokens, in the documents' library. They are shorter than the tokens: normalise them where the model's
        tokens have norm 1 and scores should stay cosines.

    Raises
    ------
    ValueError
        Neither k nor ratio or both, values out of range, an unknown method, NaN or Inf in a token.
    TypeError
        Dtypes other than float32.

    Notes
    -----
    At most 2 n k d flops an iteration and document of n tokens; "ward" 2 n^2 d flops and 4 n^2 bytes.

    On a GPU nothing waits for values: a document with NaN or Inf has means of NaN. "ward" takes 4 d bytes a token
    there, and about 9 n^2 d flops.

    References
    ----------
    Veneroso et al. (2025): CRISP, section 3 (k-means). Clavie et al. (2024): Reducing the footprint of multi-vector
    retrieval with minimal performance impact via token pooling, section 3 (Ward).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> docs = [np.array([[1, 0], [0, 1], [3, 0]], np.float32), np.ones((1, 2), np.float32)]
    >>> pv.maxsim.pool(docs, 2, method="ward").values.tolist()
    [[0.5, 0.5], [3.0, 0.0], [1.0, 1.0]]
    """
    op = "maxsim.pool"
    choice(op, "method", method, ("kmeans", "ward"))
    return cluster(op, "docs", docs, k, ratio, method, max_iter, 0.0, num_threads).centroids


def cluster(
    op: str,
    name: str,
    sets: Any,
    k: int | None,
    ratio: float | None,
    method: str,
    max_iter: int,
    tolerance: float,
    num_threads: int | None,
) -> KMeansSetsResult:
    """Do what both functions do."""
    ragged = as_ragged(op, name, sets)
    if (k is None) == (ratio is None):
        raise ValueError(f"{op}: k or ratio must be given, and not both, got k={k}, ratio={ratio}")
    max_iter = as_count(op, "max_iter", max_iter)
    if not tolerance >= 0:
        raise ValueError(f"{op}: tolerance must be at least 0, got {tolerance}")
    if ratio is None:
        counts = np.minimum(ragged.lengths, as_count(op, "k", k))
    else:
        if not 0 < ratio <= 1:
            raise ValueError(f"{op}: ratio must be in (0, 1], got {ratio}")
        counts = np.clip((ratio * ragged.lengths).astype(np.int64), np.minimum(1, ragged.lengths), ragged.lengths)
    offsets = np.zeros(len(ragged) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    centroids = Ragged(empty(ragged.values, (int(offsets[-1]), ragged.dim), "float32"), offsets)
    return _cluster_into(op, name, ragged, centroids, method, max_iter, tolerance, num_threads)


def _cluster_into(
    op: str,
    name: str,
    ragged: Ragged,
    centroids: Ragged,
    method: str,
    max_iter: int,
    tolerance: float,
    num_threads: int | None,
) -> KMeansSetsResult:
    """Cluster sets into as many means each as `centroids` has room for, and write them there."""
    values, n = ragged.values, len(ragged)
    labels = empty(values, (int(values.shape[0]),), "int64")
    on_cpu = device_name(values) == "cpu"
    if on_cpu:
        inertia, iterations = np.empty(n), np.empty(n, np.int64)
    else:
        inertia, iterations = empty(values, (n,), "float64"), empty(values, (n,), "int64")
    _backend.run(
        op, "clusters_of_sets", values,
        values, ragged.placed_offsets, centroids.placed_offsets, centroids.values, labels, inertia, iterations,
        max_iter, tolerance, method == "ward", num_threads=num_threads,
    )  # fmt: skip
    if on_cpu and np.isnan(inertia).any():
        _backend.require_finite(op, name, values, num_threads)
    return KMeansSetsResult(centroids, labels, inertia, iterations)


def pool_into(docs: Ragged, means: Ragged, *, method: str, max_iter: int) -> Any:
    """Write the means of `pool` where `means` has room for them, and return the number of each token's."""
    op = "maxsim.pool"
    return _cluster_into(op, "docs", as_ragged(op, "docs", docs), means, method, max_iter, 0.0, None).labels
