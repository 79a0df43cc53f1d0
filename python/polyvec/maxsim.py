"""MaxSim, the exact score of late interaction: each query token finds its most similar document token, and these
similarities are summed.

Queries and documents are token sets: a `polyvec.Ragged`, `(values, offsets)`, a list of (n_i, d) arrays, or a padded
(n, t, d) array, alone or with its lengths as `(padded, lengths)`. Masks drop further tokens of a padded array.
Documents that are scored many times are prepared once by `pack`.

A query token that is dropped adds nothing to any sum. What takes part in place of document tokens differs between
libraries:

- `padding="exclude"`: nothing. As maxsim-cpu, ColBERT on a GPU and, with `empty=-1e9`, sentence-transformers.
- `padding="zero"`: a zero vector in each document that has fewer tokens than padded `docs` have rows, or, in any other
  form of token sets, than the longest of `docs` has. As PyLate, and as colpali-engine within one of its batches.
- `padding="relu"`: a zero vector in every document, so that no maximum is below 0. As ColBERT on a CPU.

On a GPU, tokens are bfloat16 and float16, too, and their scores float32; queries are rounded to bfloat16 or float16
where packed documents are, and their products with the centroids of residuals to float16. Offsets are copied there
once a `polyvec.Ragged`: pass one that is kept, and calls copy and wait for nothing. A candidate outside the documents
is left out. The bits of a score of 16-bit tokens can depend on whether a call has few queries or many.

A document in which nothing takes part scores `empty`: -inf, so that it is never found ahead of another. A query without
tokens scores 0 against any document.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from polyvec import _backend
from polyvec._arrays import (
    as_array,
    as_count,
    as_id_lists,
    as_number,
    as_selection,
    choice,
    device_name,
    dtype_name,
    empty,
    output,
    outputs,
    to_device_of,
)
from polyvec._clusters import pool
from polyvec._clusters import pool_into as pool_into
from polyvec._packed_tokens import STORED, PackedTokens, from_residuals, pack
from polyvec._ragged import Ragged, as_ragged, is_padded

__all__ = [
    "CertifiedTopk",
    "PackedTokens",
    "align",
    "certified_topk",
    "from_residuals",
    "pack",
    "pool",
    "score",
    "score_matrix",
    "score_pairs",
    "topk",
]

_FLOATS = ("float32", "float64")
_HALVES = ("bfloat16", "float16")  # tokens on a GPU


def _float_sets(
    op: str, name: str, x: Any, mask: Any, dtypes: tuple[str, ...], dim: int | None = None, like: str = ""
) -> Ragged:
    """Return token sets of one of `dtypes`, or of 16 bits where they are on a GPU."""
    if isinstance(x, PackedTokens) and mask is None:
        if x.dtype != "float32":
            raise TypeError(f"{op}: {name} must be {' or '.join(dtypes)}, got tokens packed as {x.dtype}")
        x = x._sets
    return as_ragged(op, name, x, dtypes=dtypes, dim=dim, like=like, mask=mask, on_gpu=_HALVES)


def _score_dtype(tokens: Any) -> str:
    dtype = dtype_name(tokens)
    return "float32" if dtype in _HALVES else dtype


def _queries_and_docs(
    op: str, queries: Any, docs: Any, masks: tuple[Any, Any], num_threads: int | None
) -> tuple[Ragged, tuple[Any, ...], Any]:
    """Return the queries, the documents as the kernels take them, and the documents' offsets on the host.

    An empty list of one kind has the width of the other.
    """
    packed = isinstance(docs, PackedTokens) and docs.dtype != "float32" and masks[1] is None
    if isinstance(queries, list) and not queries:
        like = docs if packed else _float_sets(op, "docs", docs, masks[1], _FLOATS)
        dtype = "float32" if packed else dtype_name(like.values)
        sets = _float_sets(op, "queries", queries, masks[0], (dtype,), like.dim)
    else:
        sets = _float_sets(op, "queries", queries, masks[0], ("float32",) if packed else _FLOATS)
    if not packed:
        like = _float_sets(op, "docs", docs, masks[1], (dtype_name(sets.values),), sets.dim, like="queries")
        if dtype_name(like.values) != dtype_name(sets.values):
            as_array(op, "docs", like.values, dtypes=(dtype_name(sets.values),))  # says so
        return sets, (like.values, like.placed_offsets, None, None, None, None), like.offsets
    if docs.dim != sets.dim:
        raise ValueError(f"{op}: docs must have the same d as queries ({sets.dim}), got {docs.dim}")
    if docs.dtype not in _HALVES:
        _backend.require_finite(op, "queries", sets.values, num_threads)
    return sets, docs._stored(), docs._sets.offsets


def _missing(op: str, padding: str, empty: float, docs: Any, offsets: Any) -> tuple[int, float]:
    """Return the number of tokens under which a zero vector takes part in a document, and the score of an empty one."""
    choice(op, "padding", padding, ("exclude", "zero", "relu"))
    empty = as_number(op, "empty", empty)
    if empty != empty:
        raise ValueError(f"{op}: empty must be a number, got {empty}")
    if padding == "zero":
        padded = docs[0] if isinstance(docs, tuple) else docs
        return int(padded.shape[1] if is_padded(docs) else np.diff(offsets).max(initial=0)), empty
    return 0 if padding == "exclude" else np.iinfo(np.int64).max, empty


def _chosen(op: str, include: Any, n: int) -> Any:
    """Return the numbers of the documents that take part, rising; None for all."""
    chosen = as_selection(op, "include", include, n, "document")
    if chosen is None:
        return None
    chosen = np.flatnonzero(chosen) if chosen.dtype == bool else np.unique(chosen)
    if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < n:
        raise IndexError(f"{op}: include must be in [0, {n}), got {chosen[0] if chosen[0] < 0 else chosen[-1]}")
    return chosen


def score(
    queries: Any,
    docs: Any,
    *,
    query_mask: Any = None,
    doc_mask: Any = None,
    padding: str = "exclude",
    empty: float = -np.inf,
    out: Any = None,
    num_threads: int | None = None,
) -> Any:
    """Score every query against every document.

    `out[q, d] = sum_i max_j <queries[q][i], docs[d][j]>`, higher is better.

    Parameters
    ----------
    queries : token sets, float32 | float64; on a GPU bfloat16 | float16, too
    docs : token sets of queries' dtype and width, or PackedTokens
    query_mask, doc_mask : bool or integer array of shape (n, t), optional
        Which tokens of padded queries, of padded documents count; integers are 0 and 1.
    padding : {"exclude", "zero", "relu"}
        What takes part in place of missing document tokens: see the head of this module.
    empty : float
        Score of a document in which nothing takes part.
    out : array of shape (nq, nd), queries' dtype, optional
        Written and returned.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    array of shape (nq, nd); queries' dtype (float32 for bfloat16 and float16), library and device

    Raises
    ------
    ValueError
        Widths that differ, offsets that run backwards, a mask or an `out` of another shape.
    TypeError
        Dtypes other than float32 and float64, or two different ones.

    Notes
    -----
    2 d flops a pair of tokens; no similarity is ever stored. Inner products are summed in the tokens' dtype, the maxima
    of a query in float64. A score does not depend on the other queries and documents of the call, nor on the number of
    threads: it has the same bits in any batch. A similarity that is NaN is never the maximum.

    References
    ----------
    ColBERT (Khattab and Zaharia 2020), section 3.2.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> query = np.eye(2, dtype=np.float32)
    >>> docs = [np.array([[1, 0], [0.5, 0.5]], np.float32), np.array([[0, 2]], np.float32)]
    >>> pv.maxsim.score([query], docs)
    array([[1.5, 2. ]], dtype=float32)
    """
    op = "maxsim.score"
    q, stored, doc_offsets = _queries_and_docs(op, queries, docs, (query_mask, doc_mask), num_threads)
    missing = _missing(op, padding, empty, docs, doc_offsets)
    out = output(op, out, q.values, (len(q), len(doc_offsets) - 1), _score_dtype(q.values))
    _backend.run(
        op, "maxsim_score", q.values, q.values, q.placed_offsets, stored, *missing, out, num_threads=num_threads
    )
    return out


def score_pairs(
    queries: Any,
    docs: Any,
    *,
    query_mask: Any = None,
    doc_mask: Any = None,
    padding: str = "exclude",
    empty: float = -np.inf,
    out: Any = None,
    num_threads: int | None = None,
) -> Any:
    """Score each query against one document: `out[i]` is the score of query i and document i.

    Parameters
    ----------
    queries : n token sets, float32 | float64
    docs : n token sets of queries' dtype and width, or PackedTokens
    query_mask, doc_mask : bool or integer array of shape (n, t), optional
        Which tokens of padded queries, of padded documents count; integers are 0 and 1.
    padding : {"exclude", "zero", "relu"}
        What takes part in place of missing document tokens: see the head of this module.
    empty : float
        Score of a document in which nothing takes part.
    out : array of shape (n,), queries' dtype, optional
        Written and returned.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    array of shape (n,); queries' dtype (float32 for bfloat16 and float16), library and device

    Raises
    ------
    ValueError
        Numbers of sets or widths that differ, offsets that run backwards, a mask or an `out` of another shape.
    TypeError
        Dtypes other than float32 and float64, or two different ones.

    Notes
    -----
    A score has the bits that `score` gives it. Residual tokens cost a product of every query token with all centroids
    as well.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> queries = np.ones((2, 3, 4), np.float32)
    >>> pv.maxsim.score_pairs(queries, [np.ones((1, 4), np.float32), -np.ones((5, 4), np.float32)])
    array([ 12., -12.], dtype=float32)
    >>> pv.maxsim.score_pairs(queries, queries, query_mask=[[1, 1, 0], [1, 0, 0]])
    array([8., 4.], dtype=float32)
    """
    op = "maxsim.score_pairs"
    q, stored, doc_offsets = _queries_and_docs(op, queries, docs, (query_mask, doc_mask), num_threads)
    missing = _missing(op, padding, empty, docs, doc_offsets)
    out = output(op, out, q.values, (len(q),), _score_dtype(q.values))
    _backend.run(
        op, "maxsim_score_pairs", q.values, q.values, q.placed_offsets, stored, *missing, out, num_threads=num_threads
    )
    return out


def score_matrix(query: Any, doc: Any, *, out: Any = None, num_threads: int | None = None) -> Any:
    """Return all token similarities of one pair: `out[i, j] = <query[i], doc[j]>`.

    Parameters
    ----------
    query : array of shape (tq, d), float32 | float64
    doc : array of shape (td, d), query's dtype
    out : array of shape (tq, td), query's dtype, optional
        Written and returned.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    array of shape (tq, td); query's dtype, library and device
        -inf where a similarity is NaN.

    Raises
    ------
    ValueError
        Widths that differ, arrays of other rank, an `out` of another shape.
    TypeError
        Dtypes other than float32 and float64, or two different ones.

    Notes
    -----
    The similarities have the bits that `score` takes the maxima of.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> pv.maxsim.score_matrix(np.eye(2, dtype=np.float32), np.array([[0, 2], [1, 0], [3, 4]], np.float32))
    array([[0., 1., 3.],
           [2., 0., 4.]], dtype=float32)
    """
    op = "maxsim.score_matrix"
    q = as_array(op, "query", query, dtypes=_FLOATS, ndim=2)
    d = as_array(op, "doc", doc, dtypes=(dtype_name(q),), ndim=2)
    out = output(op, out, q, (int(q.shape[0]), int(d.shape[0])), dtype_name(q))
    _backend.run(op, "maxsim_score_matrix", q, q, d, out, num_threads=num_threads)
    return out


def topk(
    queries: Any,
    docs: Any,
    k: int,
    *,
    candidates: tuple[Any, Any] | None = None,
    include: Any = None,
    query_mask: Any = None,
    doc_mask: Any = None,
    padding: str = "exclude",
    empty: float = -np.inf,
    out: tuple[Any, Any] | None = None,
    num_threads: int | None = None,
) -> tuple[Any, Any]:
    """Return the k best documents of each query: of all, of some, or of the candidates named for each.

    Parameters
    ----------
    queries : token sets, float32 | float64; on a GPU bfloat16 | float16, too
    docs : token sets of queries' dtype and width, or PackedTokens
    k : int
        At most 4096 on a GPU.
    candidates : (offsets of shape (nq + 1,), ids of shape (n,)), integer arrays, optional
        Query q chooses from the documents `ids[offsets[q]:offsets[q + 1]]`. An id that a list names twice is ranked
        twice.
    include : bool array of shape (n_docs,) or integer array of shape (c,), on a CPU, optional
        Which documents all queries choose from; instead of `candidates`.
    query_mask, doc_mask : bool or integer array of shape (n, t), optional
        Which tokens of padded queries, of padded documents count; integers are 0 and 1.
    padding : {"exclude", "zero", "relu"}
        What takes part in place of missing document tokens: see the head of this module.
    empty : float
        Score of a document in which nothing takes part.
    out : pair of arrays, optional
        (scores, ids) of the returned shapes and dtypes.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    scores : array of shape (nq, k), float32
        As `score` gives them, best first; for float64 tokens rounded to float32 before they are compared. -inf where
        there are fewer than k documents.
    ids : array of shape (nq, k), int64
        Equal scores by the smaller id; -1 where there are fewer than k documents. Both in the queries' library.

    Raises
    ------
    ValueError
        k below 1, widths that differ, offsets that run backwards, a mask of another shape, both `candidates` and
        `include`.
    TypeError
        Dtypes other than float32 and float64, or two different ones.
    IndexError
        A candidate, or a document to include, outside the documents.

    Notes
    -----
    Costs what `score` costs for the same pairs, and never stores all scores.

    References
    ----------
    ColBERT (Khattab and Zaharia 2020), sections 3.2 and 3.5.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> query = np.eye(2, dtype=np.float32)
    >>> docs = [np.array([[1, 0], [0.5, 0.5]], np.float32), np.array([[0, 2]], np.float32)]
    >>> pv.maxsim.topk([query], docs, 1)
    (array([[2.]], dtype=float32), array([[1]]))
    >>> pv.maxsim.topk([query], docs, 1, candidates=([0, 1], [0]))
    (array([[1.5]], dtype=float32), array([[0]]))
    >>> pv.maxsim.topk([query], docs, 1, include=[True, False])
    (array([[1.5]], dtype=float32), array([[0]]))
    """
    op = "maxsim.topk"
    k = as_count(op, "k", k)
    q, stored, doc_offsets = _queries_and_docs(op, queries, docs, (query_mask, doc_mask), num_threads)
    missing = _missing(op, padding, empty, docs, doc_offsets)
    chosen = _chosen(op, include, len(doc_offsets) - 1)
    if chosen is not None and candidates is not None:
        raise ValueError(f"{op}: candidates must be None with include")
    if chosen is not None and device_name(q.values) != "cpu":
        every = np.arange(len(q) + 1) * len(chosen), np.tile(chosen, len(q))
        candidates, chosen = tuple(to_device_of(q.values, x) for x in every), None
    offsets, ids = as_id_lists(op, "candidates", candidates, q.values)
    scores, found = outputs(op, out, q.values, (len(q), k), ("float32", "int64"), ("scores", "ids"))
    _backend.run(
        op, "maxsim_topk", q.values,
        q.values, q.placed_offsets, stored, *missing, offsets, ids, chosen, scores, found,
        num_threads=num_threads,
    )  # fmt: skip
    return scores, found


class CertifiedTopk(NamedTuple):
    """What `certified_topk` returns.

    Parameters
    ----------
    scores : array of shape (nq, k), float32
        As `topk` returns them.
    ids : array of shape (nq, k), int64
    rescored : array of shape (nq,), int64
        How many documents were scored by their float tokens.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> docs = np.eye(6, dtype=np.float32)[:, None]
    >>> pv.maxsim.certified_topk(docs[:2], pv.maxsim.pack(docs, "int8"), docs, k=1).rescored
    array([1, 1])
    """

    scores: Any
    ids: Any
    rescored: Any


def certified_topk(
    queries: Any,
    packed: PackedTokens,
    docs: Any,
    k: int,
    *,
    out: tuple[Any, Any] | None = None,
    num_threads: int | None = None,
) -> CertifiedTopk:
    """Return what `topk(queries, docs, k)` returns, bit for bit, in a fraction of its time: by screening packed tokens.

    All documents are scored as packed. A score is at most `sum_i |q_i| max_j |r_j| + |q_i - q'_i| max_j |d'_j|` away
    from the exact one (r_j what packing took from token j, d'_j what it left, q'_i the rounded query token), so that
    only documents which can still be among the best are scored by their float tokens.

    Parameters
    ----------
    queries : token sets, float32
    packed : PackedTokens
        `docs` as `pack` makes them, of dtype "int8", "residual4" or "residual2".
    docs : token sets, float32
        The very tokens that were packed.
    k : int
    out : pair of arrays, optional
        (scores, ids) of the returned shapes and dtypes.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    CertifiedTopk
        `.scores` and `.ids` of shape (nq, k), as of `topk`; `.rescored` of shape (nq,), int64: how many documents were
        scored by their float tokens. In the queries' library.

    Raises
    ------
    ValueError
        k below 1, widths or lengths that differ, packed tokens that have no bounds, queries with NaN or Inf.
    TypeError
        Tokens packed as something else; dtypes other than float32.

    Notes
    -----
    Only lengths are compared: other tokens than those that were packed give a wrong result. The bound counts every
    rounding of the two computations. First the k best as packed are scored exactly; the k-th of these scores is what a
    bound has to reach. Of real documents, int8 tokens leave one in a hundred to be rescored; residual codes leave
    nearly all, so that `topk` of the float tokens is faster. Holds up to 64 MB of scores at a time. On a GPU tokens are
    int8 and k at most 4096; nothing waits for how many are left, for which there is room (256 MB).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> docs = np.random.default_rng(0).standard_normal((100, 6, 8), np.float32)
    >>> scores, ids, rescored = pv.maxsim.certified_topk(docs[[7]], pv.maxsim.pack(docs, "int8"), docs, k=1)
    >>> ids, rescored
    (array([[7]]), array([1]))
    """
    op = "maxsim.certified_topk"
    k = as_count(op, "k", k)
    if not isinstance(packed, PackedTokens):
        raise TypeError(f"{op}: packed must be PackedTokens, got {type(packed).__name__}")
    if STORED[packed.dtype] != "uint8":
        raise TypeError(f"{op}: packed must be int8 or residual codes, got {packed.dtype}")
    if packed._bounds is None:
        raise ValueError(f"{op}: packed must have bounds, as pack makes them")
    q, stored, _ = _queries_and_docs(op, queries, packed, (None, None), num_threads)
    floats = _float_sets(op, "docs", docs, None, ("float32",), q.dim, like="queries")
    if not np.array_equal(floats.offsets, packed._sets.offsets):
        raise ValueError(f"{op}: docs must have the lengths of the packed documents")
    scores, ids = outputs(op, out, q.values, (len(q), k), ("float32", "int64"), ("scores", "ids"))
    rescored = empty(q.values, (len(q),), "int64")
    _backend.run(
        op, "maxsim_certified_topk", q.values,
        q.values, q.placed_offsets, stored, packed._bounds, floats.values, floats.placed_offsets, scores, ids, rescored,
        num_threads=num_threads,
    )  # fmt: skip
    return CertifiedTopk(scores, ids, rescored)


def align(
    query: Any, doc: Any, *, out: tuple[Any, Any] | None = None, num_threads: int | None = None
) -> tuple[Any, Any]:
    """Say which document token each query token matches, and how well: what the sum of a score consists of.

    Parameters
    ----------
    query : array of shape (tq, d), float32 | float64
    doc : array of shape (td, d), query's dtype
    out : pair of arrays, optional
        (doc_token_ids, similarities) of the returned shapes and dtypes.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    doc_token_ids : array of shape (tq,), int64
        The most similar row of `doc`, the first of equals; -1 where `doc` has no rows.
    similarities : array of shape (tq,), query's dtype
        Its inner product with the query token; -inf where `doc` has no rows. Both in the query's library.

    Raises
    ------
    ValueError
        Widths that differ, arrays of other rank.
    TypeError
        Dtypes other than float32 and float64, or two different ones.

    Notes
    -----
    The similarities have the bits that `score` sums.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> pv.maxsim.align(np.eye(2, dtype=np.float32), np.array([[0, 2], [1, 0]], np.float32))
    (array([1, 0]), array([1., 2.], dtype=float32))
    """
    op = "maxsim.align"
    q = as_array(op, "query", query, dtypes=_FLOATS, ndim=2)
    d = as_array(op, "doc", doc, dtypes=(dtype_name(q),), ndim=2)
    n = (int(q.shape[0]),)
    ids, similarities = outputs(op, out, q, n, ("int64", dtype_name(q)), ("ids", "similarities"))
    _backend.run(op, "maxsim_align", q, q, d, ids, similarities, num_threads=num_threads)
    return ids, similarities


def match(queries: Ragged, docs: Ragged, *, pairs: bool) -> tuple[Any, Any]:
    """Return the scores of `score` (or `score_pairs`), and which row of its document each query token found.

    Rows are int32 of shape (nd, query tokens), or (query tokens,) for pairs; -1 where there is none.
    """
    op = "maxsim.score_pairs" if pairs else "maxsim.score"
    q = _float_sets(op, "queries", queries, None, _FLOATS)
    d = as_ragged(op, "docs", docs, dtypes=(dtype_name(q.values),), dim=q.dim, like="queries")
    if pairs and len(d) != len(q):
        raise ValueError(f"{op}: docs must have one document a query ({len(q)}), got {len(d)}")
    tokens = int(q.values.shape[0])
    scores = empty(q.values, (len(q),) if pairs else (len(q), len(d)), _score_dtype(q.values))
    rows = empty(q.values, (tokens,) if pairs else (len(d), tokens), "int32")
    _backend.run(op, "maxsim_match", q.values, q.values, q.placed_offsets, d.values, d.placed_offsets, scores, rows)
    return scores, rows


def match_gradient(
    queries: Ragged, docs: Ragged, grad: Any, rows: Any, *, of_queries: bool, of_docs: bool
) -> tuple[Any, Any]:
    """Return the gradients for the tokens of queries and documents, given that of the scores of `match`.

    None where it is not asked for.
    """
    op = "maxsim.match_gradient"
    dtype = dtype_name(queries.values)
    q, d = (as_ragged(op, name, x, dtypes=(dtype,)) for name, x in (("queries", queries), ("docs", docs)))
    grad = as_array(op, "grad", grad, dtypes=(_score_dtype(q.values),))
    sets = q.values, q.placed_offsets, d.values, d.placed_offsets

    def gradient(like: Any, docs: bool) -> Any:
        out = empty(like, tuple(like.shape), dtype)
        _backend.run(op, "maxsim_match_gradient", like, *sets, grad, rows, docs, out)
        return out

    return gradient(q.values, False) if of_queries else None, gradient(d.values, True) if of_docs else None
