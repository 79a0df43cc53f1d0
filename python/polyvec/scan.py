"""Exact search: every query against every item, without storing the product.

The score of a query q and an item x, `bias` being an optional number an item:

=========  ==============================  ================
metric     score                           best
=========  ==============================  ================
"ip"       q . x + bias                    highest
"cosine"   q . x / (|q| |x|) + bias        highest
"l2"       |q - x|^2 - bias                lowest
=========  ==============================  ================

A cosine with a zero vector is 0. Inner products keep their sign, and l2 is the squared distance: a bias always raises
an item's standing.

Queries are float32; items may be stored in fewer bits, which is read from memory as it is:

========================  ====================  =====================================================================
items                     x                     q
========================  ====================  =====================================================================
float32, float16          the item              the query
bfloat16                  the item              the query rounded to bfloat16
int8, float32 `scales`    scale * the item      the query rounded to 127 steps of its largest element, which is finite
========================  ====================  =====================================================================

For "cosine" a query is divided by |q| first, and rounded then. Sums are float32 (whole numbers for int8) and products
exact, at every instruction-set level. bfloat16 comes from torch, from ml_dtypes, or as its bits in a numpy array of
uint16. `scales` (n,) may be left out: 1. One query is limited by memory: bfloat16 and float16 take half the time of
float32, int8 a quarter.

On a GPU nothing is known of the contents of arrays before the kernel meets them, so that bad ones raise no error: an
excluded or known id outside the items names none; a pair with such an id scores NaN, and so does the rank or the hinge
of a target that lies outside or scores NaN; the nearest to a row with NaN is -1. Scores come from tensor cores: of
float32 rows, in two float16 parts that keep 22 of 24 bits, of the others as they are. What `topk` and `nearest` return
is scored once more in float32, squared distances directly. It takes up to 400 MB of the stream-ordered memory pool, and
as much as the queries where they are rounded or of unit length.
"""

from __future__ import annotations

from typing import Any

from polyvec import _backend
from polyvec._arrays import (
    ArrayT,
    as_array,
    as_count,
    as_id_lists,
    as_ids,
    as_number,
    choice,
    device_name,
    dtype_name,
    empty,
    output,
    outputs,
)
from polyvec._block_sparse import BlockSparse

__all__ = ["hinge", "logsumexp", "nearest", "rank", "score_pairs", "topk"]

_METRICS = ("ip", "l2", "cosine")


_ITEM_DTYPES = ("float32", "bfloat16", "float16", "int8", "uint16")


def _items(op: str, d: int, items: Any, scales: Any, names: tuple[str, str]) -> tuple[Any, Any]:
    items = as_array(op, names[1], items, dtypes=_ITEM_DTYPES, ndim=2)
    if items.shape[1] != d:
        raise ValueError(f"{op}: {names[1]} must have the same d as {names[0]} ({d}), got {items.shape[1]}")
    return items, None if scales is None else as_array(op, "scales", scales, ndim=1)


def _vectors(op: str, queries: Any, items: Any, scales: Any, names: tuple[str, str]) -> tuple[Any, Any, Any]:
    queries = as_array(op, names[0], queries, ndim=2)
    items, scales = _items(op, queries.shape[1], items, scales, names)
    if dtype_name(items) == "int8":
        _backend.require_finite(op, names[0], queries)  # nothing else can be quantised
    return queries, items, scales


def _stored(op: str, queries: Any, items: Any, scales: Any) -> tuple[tuple[Any, Any, Any], int, Any, Any]:
    """As `_vectors` for queries that may be block-sparse: ((values, blocks, offsets), their number, items, scales)."""
    names = ("queries", "items")
    if not isinstance(queries, BlockSparse):
        dense, items, scales = _vectors(op, queries, items, scales, names)
        return (dense, None, None), int(dense.shape[0]), items, scales
    items, scales = _items(op, queries.d, items, scales, names)
    if dtype_name(items) == "int8" and device_name(queries.values) == "cpu":
        _backend.require_finite(op, names[0], queries.to_dense())
    return (queries.values, *queries.placed), len(queries), items, scales


def _bias(op: str, bias: Any) -> Any:
    return None if bias is None else as_array(op, "bias", bias, ndim=1)


def topk(
    queries: ArrayT | BlockSparse,
    items: Any,
    k: int,
    *,
    metric: str = "ip",
    bias: Any = None,
    scales: Any = None,
    exclude: tuple[Any, Any] | None = None,
    out: tuple[Any, Any] | None = None,
    num_threads: int | None = None,
) -> tuple[ArrayT, ArrayT]:
    """Find the k best items of each query, best first; equal scores come by smaller id.

    Parameters
    ----------
    queries : array of shape (nq, d), float32, or BlockSparse
    items : array of shape (n, d), float32 | bfloat16 | float16 | int8
    k : int
        At least 1. Where fewer than k items take part, the rest is id -1 with score -inf (+inf for "l2").
    metric : {"ip", "l2", "cosine"}
        "ip" and "cosine": higher is better. "l2": squared distance, lower is better.
    bias : array of shape (n,), float32, optional
        Added to the score of each item; for "l2" it is taken off the distance.
    scales : array of shape (n,), float32, optional
        What int8 items are multiplied by.
    exclude : (offsets, ids), optional
        Integer arrays of shapes (nq + 1,) and (m,): query i does not get the items `ids[offsets[i]:offsets[i + 1]]`,
        in any order.
    out : pair of arrays of shape (nq, k), float32 and int64, optional
        Written and returned.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    scores : array of shape (nq, k), float32, queries' library and device
    ids : array of shape (nq, k), int64

    Raises
    ------
    ValueError
        Shapes that do not fit, k below 1, an unknown metric, offsets that run backwards, NaN or Inf in queries of int8
        items.
    TypeError
        A dtype that is not listed, ids that are not integers.
    IndexError
        An excluded id outside the items.

    Notes
    -----
    2 nq n d flops, accumulated in float32; items are read once for thousands of queries, and for few queries memory is
    the limit. Beside the outputs it needs at most about 20 MB a thread. Items are not searched for NaN: one whose score
    is NaN or -inf is never returned. With "l2" the items are chosen by q . x - |x|^2 / 2, whose rounding
    can swap the last of them where distances differ by less than about 1e-7 |x|^2; the returned distances are
    computed directly, without that cancellation, and ordered. The result does not depend on the number of threads.

    Block-sparse queries meet items only where they have blocks, in steps of 16 entries, if they are few or sparse
    enough (one with half of its blocks, 16 with an eighth); if not, as dense ones. A share p of the blocks is a share p
    of the arithmetic, but of the reading only where blocks are longer than two cache lines; "l2" and "cosine" read all
    for the norms of the items. Whether a NaN or Inf in an item counts where queries have no block is left open. On a
    GPU, up to 8 queries with "ip" skip what is zero in all of them; others are dense there.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> items = np.float32([[0, 1], [2, 0], [1, 1]])
    >>> scores, ids = pv.scan.topk(np.float32([[1, 0]]), items, 2)
    >>> scores.tolist(), ids.tolist()
    ([[2.0, 1.0]], [[1, 2]])
    >>> pv.scan.topk(np.float32([[1, 0]]), np.int8([[0, 1], [8, 0]]), 1, scales=np.float32([1, 0.25]))[0]
    array([[2.]], dtype=float32)
    """
    op = "scan.topk"
    stored, n, x, s = _stored(op, queries, items, scales)
    q = stored[0]
    k = as_count(op, "k", k)
    choice(op, "metric", metric, _METRICS)
    scores, ids = outputs(op, out, q, (n, k), ("float32", "int64"), ("scores", "ids"))
    lists = as_id_lists(op, "exclude", exclude, q)
    _backend.run(
        op, "scan_topk", q, *stored, x, s, _bias(op, bias), *lists, scores, ids, metric, num_threads=num_threads
    )
    return scores, ids


def nearest(
    x: ArrayT,
    centroids: Any,
    *,
    metric: str = "l2",
    scales: Any = None,
    out: tuple[Any, Any] | None = None,
    num_threads: int | None = None,
) -> tuple[ArrayT, ArrayT]:
    """Find the one best centroid of each row; of equal ones the smaller id.

    Parameters
    ----------
    x : array of shape (n, d), float32
    centroids : array of shape (k, d), float32 | bfloat16 | float16 | int8
        At least one row.
    metric : {"l2", "ip", "cosine"}
        "l2": squared distance, lower is better. "ip" and "cosine": higher is better.
    scales : array of shape (k,), float32, optional
        What int8 centroids are multiplied by.
    out : pair of arrays of shape (n,), int64 and float32, optional
        Written and returned.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    ids : array of shape (n,), int64, x's library and device
    distances : array of shape (n,), float32
        Squared distances, or inner products, or cosines.

    Raises
    ------
    ValueError
        Shapes that do not fit, no centroid, an unknown metric, NaN or Inf in x or in centroids.
    TypeError
        A dtype that is not listed.

    Notes
    -----
    2 n k d flops, accumulated in float32. With "l2" the centroid is chosen by x . c - |c|^2 / 2, and its distance
    computed directly, without cancellation. Rows of x are split among threads; the result does not depend on how.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> ids, distances = pv.scan.nearest(np.float32([[0.5, 0], [5, 5]]), np.float32([[1, 0], [4, 4]]))
    >>> ids.tolist(), distances.tolist()
    ([0, 1], [0.25, 2.0])
    """
    op = "scan.nearest"
    rows, table, s = _vectors(op, x, centroids, scales, ("x", "centroids"))
    choice(op, "metric", metric, _METRICS)
    _backend.require_finite(op, "x", rows, num_threads)
    if dtype_name(table) != "int8":
        _backend.require_finite(op, "centroids", table, num_threads)
    ids, distances = outputs(op, out, rows, (int(rows.shape[0]),), ("int64", "float32"), ("ids", "distances"))
    _backend.run(op, "scan_nearest", rows, rows, table, s, ids, distances, metric, num_threads=num_threads)
    return ids, distances


def rank(
    queries: ArrayT,
    items: Any,
    targets: Any,
    *,
    metric: str = "ip",
    bias: Any = None,
    scales: Any = None,
    known: tuple[Any, Any] | None = None,
    ties: str = "realistic",
    out: Any = None,
    num_threads: int | None = None,
) -> ArrayT:
    """Return the rank of one target item among all items for each query; 1 is the best.

    `optimistic = 1 + (items better than the target)`, `pessimistic = (items better or equal, the target among them)`,
    `realistic` is their mean.

    Parameters
    ----------
    queries : array of shape (nq, d), float32
    items : array of shape (n, d), float32 | bfloat16 | float16 | int8
    targets : integer array of shape (nq,)
        The item whose rank is asked for.
    metric : {"ip", "l2", "cosine"}
        "ip" and "cosine": higher is better. "l2": squared distance, lower is better.
    bias : array of shape (n,), float32, optional
        Added to the score of each item; for "l2" it is taken off the distance.
    scales : array of shape (n,), float32, optional
        What int8 items are multiplied by.
    known : (offsets, ids), optional
        Integer arrays of shapes (nq + 1,) and (m,): for query i the items `ids[offsets[i]:offsets[i + 1]]`, in any
        order, do not count, except the target itself: the filtered rank.
    ties : {"realistic", "optimistic", "pessimistic"}
        What an item that scores exactly as the target counts.
    out : array of shape (nq,), float64, optional
        Written and returned.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    array of shape (nq,), float64, queries' library and device

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown metric or rule for ties, offsets that run backwards, a target whose score is
        NaN.
    TypeError
        A dtype that is not listed, ids that are not integers.
    IndexError
        A target or a known id outside the items.

    Notes
    -----
    2 nq n d flops, accumulated in float32; the scores of a query with different items are computed alike, so that equal
    items tie. An item whose score is NaN counts for nothing. The nq x n scores are never stored: it needs about 20 MB.
    The result does not depend on the number of threads.

    References
    ----------
    Translating Embeddings for Modeling Multi-relational Data (Bordes et al. 2013), section 4.2: the filtered setting.
    On the Ambiguity of Rank-Based Evaluation of Entity Alignment or Link Prediction Methods (Berrendorf et al. 2020),
    section 3: the three ranks.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> items = np.float32([[3], [2], [2], [1]])
    >>> queries = np.ones((2, 1), np.float32)
    >>> pv.scan.rank(queries, items, [1, 3], known=([0, 1, 3], [0, 0, 2]))
    array([1.5, 2. ])
    """
    op = "scan.rank"
    q, x, s = _vectors(op, queries, items, scales, ("queries", "items"))
    choice(op, "metric", metric, _METRICS)
    choice(op, "ties", ties, ("realistic", "optimistic", "pessimistic"))
    targets = as_ids(op, "targets", targets, like=q)
    out = output(op, out, q, (int(q.shape[0]),), "float64")
    lists = as_id_lists(op, "known", known, q)
    settings = out, metric, ties
    _backend.run(op, "scan_rank", q, q, x, s, targets, _bias(op, bias), *lists, *settings, num_threads=num_threads)
    return out  # type: ignore[no-any-return]


def score_pairs(
    queries: ArrayT | BlockSparse,
    items: Any,
    ids: Any,
    *,
    metric: str = "ip",
    bias: Any = None,
    scales: Any = None,
    out: Any = None,
    num_threads: int | None = None,
) -> ArrayT:
    """Score each query with items of its own: `out[i, j]` is the score of query i and item `ids[i, j]`.

    Parameters
    ----------
    queries : array of shape (nq, d), float32, or BlockSparse
    items : array of shape (n, d), float32 | bfloat16 | float16 | int8
    ids : integer array of shape (nq, m)
        Rows of `items`, in any order, repeats allowed.
    metric : {"ip", "l2", "cosine"}
        "ip" and "cosine": higher is better. "l2": squared distance, lower is better.
    bias : array of shape (n,), float32, optional
        Added to the score of each item; for "l2" it is taken off the distance.
    scales : array of shape (n,), float32, optional
        What int8 items are multiplied by.
    out : array of shape (nq, m), float32, optional
        Written and returned.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    array of shape (nq, m), float32, queries' library and device

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown metric.
    TypeError
        A dtype that is not listed, ids that are not integers.
    IndexError
        An id outside the items.

    Notes
    -----
    2 nq m d flops (3 for "l2"), accumulated in float32, and nq m rows read from wherever they lie; they are prefetched,
    and no nq x m x d array is ever made. With "ip" a block-sparse query meets an item only where it has blocks.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> items = np.float32([[0, 1], [2, 0], [1, 1]])
    >>> pv.scan.score_pairs(np.float32([[1, 0]]), items, [[1, 1, 0]])
    array([[2., 2., 0.]], dtype=float32)
    """
    op = "scan.score_pairs"
    stored, n, x, s = _stored(op, queries, items, scales)
    q = stored[0]
    choice(op, "metric", metric, _METRICS)
    rows = as_ids(op, "ids", ids, ndim=2, like=q)
    out = output(op, out, q, (n, int(rows.shape[1])), "float32")
    _backend.run(op, "scan_score_pairs", q, *stored, x, s, rows, _bias(op, bias), out, metric, num_threads=num_threads)
    return out  # type: ignore[no-any-return]


def logsumexp(
    queries: ArrayT,
    items: Any,
    *,
    scale: float = 1.0,
    metric: str = "ip",
    bias: Any = None,
    scales: Any = None,
    exclude: tuple[Any, Any] | None = None,
    out: Any = None,
    num_threads: int | None = None,
) -> ArrayT:
    """Return the log of the sum over all items of exp(scale * score) for each query: the normaliser of a softmax.

    `scale * score - logsumexp` is the log-probability of an item, so this is what a contrastive loss takes beside the
    scores of its pairs. For "l2" the score is minus the squared distance, so that higher is better here as well.

    Parameters
    ----------
    queries : array of shape (nq, d), float32
    items : array of shape (n, d), float32 | bfloat16 | float16 | int8
    scale : float
        1 / temperature: positive, finite in float32.
    metric : {"ip", "l2", "cosine"}
        "l2": the score is minus the squared distance, -(|q - x|^2 - bias).
    bias : array of shape (n,), float32, optional
        Added to the score of each item.
    scales : array of shape (n,), float32, optional
        What int8 items are multiplied by.
    exclude : (offsets, ids), optional
        Integer arrays of shapes (nq + 1,) and (m,): for query i the items `ids[offsets[i]:offsets[i + 1]]`, in any
        order, do not take part.
    out : array of shape (nq,), float32, optional
        Written and returned.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    array of shape (nq,), float32, queries' library and device
        -inf where no item takes part.

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown metric, a scale that is not positive, offsets that run backwards, NaN or Inf
        in queries of int8 items.
    TypeError
        A dtype that is not listed, ids that are not integers, a scale that is not a number.
    IndexError
        An excluded id outside the items.

    Notes
    -----
    2 nq n d flops, accumulated in float32, and one exponential a pair, of differences from the largest score met, so
    that nothing overflows; their sums are put together in float64. The nq x n scores are never stored: it needs about
    20 MB, and 1 MB a thread. An item whose score is NaN counts for nothing, and an infinite score makes the result
    infinite. "l2" goes by 2 q . x - |x|^2 - |q|^2, whose rounding is about 1e-7 (|q| + |x|)^2. Items are split among
    threads by a fixed grid: the result does not depend on the number of threads.

    References
    ----------
    Representation Learning with Contrastive Predictive Coding (van den Oord et al. 2018), section 2.3: InfoNCE.
    Online normalizer calculation for softmax (Milakov and Gimelshein 2018), section 3: sums beside a running maximum.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> items = np.float32([[0, 0], [1, 0], [1, 0]])
    >>> pv.scan.logsumexp(np.float32([[2, 5]]), items, exclude=([0, 1], [0])).round(4)  # log(2) + 2
    array([2.6931], dtype=float32)
    """
    op = "scan.logsumexp"
    q, x, s = _vectors(op, queries, items, scales, ("queries", "items"))
    choice(op, "metric", metric, _METRICS)
    scale = as_number(op, "scale", scale)
    out = output(op, out, q, (int(q.shape[0]),), "float32")
    lists = as_id_lists(op, "exclude", exclude, q)
    settings = out, scale, metric
    _backend.run(op, "scan_logsumexp", q, q, x, s, _bias(op, bias), *lists, *settings, num_threads=num_threads)
    return out  # type: ignore[no-any-return]


def hinge(
    queries: ArrayT,
    items: Any,
    targets: Any,
    *,
    margin: float = 1.0,
    metric: str = "ip",
    bias: Any = None,
    scales: Any = None,
    known: tuple[Any, Any] | None = None,
    out: Any = None,
    num_threads: int | None = None,
) -> ArrayT:
    """Return the sum over all other items x of max(0, margin - score(target) + score(x)) for each query.

    The margin ranking loss with every item as a negative, but the target and the known ones. For "l2" the score is
    minus the squared distance: an item counts that is not by `margin` farther away than the target.

    Parameters
    ----------
    queries : array of shape (nq, d), float32
    items : array of shape (n, d), float32 | bfloat16 | float16 | int8
    targets : integer array of shape (nq,)
        The item that should be ahead of the others.
    margin : float
        Finite in float32.
    metric : {"ip", "l2", "cosine"}
        "l2": the score is minus the squared distance, -(|q - x|^2 - bias).
    bias : array of shape (n,), float32, optional
        Added to the score of each item.
    scales : array of shape (n,), float32, optional
        What int8 items are multiplied by.
    known : (offsets, ids), optional
        Integer arrays of shapes (nq + 1,) and (m,): for query i the items `ids[offsets[i]:offsets[i + 1]]`, in any
        order, do not count.
    out : array of shape (nq,), float32, optional
        Written and returned.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    array of shape (nq,), float32, queries' library and device

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown metric, a margin that is not finite, offsets that run backwards, a target
        whose score is NaN, NaN or Inf in queries of int8 items.
    TypeError
        A dtype that is not listed, ids that are not integers, a margin that is not a number.
    IndexError
        A target or a known id outside the items.

    Notes
    -----
    2 nq n d flops, accumulated in float32; the terms are summed in float32 a few at a time, and these sums in float64.
    The nq x n scores are never stored: it needs about 20 MB, and 1 MB a thread. An item whose score is NaN counts for
    nothing. Items are split among threads by a fixed grid: the result does not depend on the number of threads.

    References
    ----------
    Translating Embeddings for Modeling Multi-relational Data (Bordes et al. 2013), section 2, equation 1: the loss, of
    sampled negatives.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> items = np.float32([[3], [2], [2.5], [1]])
    >>> pv.scan.hinge(np.ones((2, 1), np.float32), items, [0, 1], known=([0, 0, 1], [0]))
    array([0.5, 1.5], dtype=float32)
    """
    op = "scan.hinge"
    q, x, s = _vectors(op, queries, items, scales, ("queries", "items"))
    choice(op, "metric", metric, _METRICS)
    margin = as_number(op, "margin", margin)
    targets = as_ids(op, "targets", targets, like=q)
    out = output(op, out, q, (int(q.shape[0]),), "float32")
    lists = as_id_lists(op, "known", known, q)
    settings = out, margin, metric
    _backend.run(op, "scan_hinge", q, q, x, s, targets, _bias(op, bias), *lists, *settings, num_threads=num_threads)
    return out  # type: ignore[no-any-return]


def logsumexp_gradient(
    queries: Any,
    items: Any,
    bias: Any,
    result: Any,
    grad: Any,
    *,
    scale: float,
    of_queries: bool,
    of_items: bool,
    of_bias: bool,
    num_threads: int | None = None,
) -> tuple[Any, Any, Any]:
    """Return the gradients for queries, float32 items and bias, given that of the `result` of `logsumexp` by "ip".

    None where it is not asked for.
    """
    op = "scan.logsumexp_gradient"
    q, x, _ = _vectors(op, queries, items, None, ("queries", "items"))
    b = _bias(op, bias)
    of_each = (as_array(op, name, y, ndim=1) for name, y in (("result", result), ("grad", grad)))
    d_queries, d_items, d_bias = (
        empty(like, tuple(like.shape), "float32") if wanted else None
        for like, wanted in ((q, of_queries), (x, of_items), (b, of_bias))
    )
    _backend.run(
        op, "scan_logsumexp_gradient", q,
        q, x, b, *of_each, d_queries, d_items, d_bias, as_number(op, "scale", scale),
        num_threads=num_threads,
    )  # fmt: skip
    return d_queries, d_items, d_bias
