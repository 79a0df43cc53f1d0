"""MaxSim, the exact score of late interaction: each query token finds its most similar document token, and these
similarities are summed.

Queries and documents are token sets: a `polyvec.Ragged`, `(values, offsets)`, a list of (n_i, d) arrays, or a padded
(n, t, d) array, alone or with its lengths as `(padded, lengths)`. Padding is excluded: it takes no part in any maximum
or sum. A document without tokens scores -inf, so that it is never found ahead of another; a query without tokens
scores 0. Documents that are scored many times are prepared once by `pack`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from polyvec import _backend, _files
from polyvec._arrays import as_array, as_count, as_id_lists, as_ids, choice, dtype_name, output, outputs
from polyvec._ragged import Ragged, as_ragged

__all__ = ["PackedTokens", "align", "pack", "score", "topk"]

_FLOATS = ("float32", "float64")
_PACKED = ("float32",)


class PackedTokens:
    """Token sets prepared for scoring, as `pack` makes them; accepted wherever token sets are.

    `packed[a:b]` are the documents a to b - 1 and share the memory of `packed`.

    Parameters
    ----------
    sets : Ragged, float32
        Finite tokens; `pack` checks them.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> packed = pv.maxsim.pack(np.ones((3, 2, 4), np.float32))
    >>> packed[1:]
    PackedTokens(2 documents, 4 tokens, dim=4, dtype='float32')
    """

    __slots__ = ("_sets",)

    def __init__(self, sets: Ragged) -> None:
        self._sets = sets

    @property
    def dtype(self) -> str:
        """How tokens are stored."""
        return dtype_name(self._sets.values)

    @property
    def dim(self) -> int:
        """Width d of the tokens."""
        return self._sets.dim

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._sets.values.nbytes + self._sets.offsets.nbytes)

    def __len__(self) -> int:
        return len(self._sets)

    def __getitem__(self, documents: slice) -> PackedTokens:
        if not isinstance(documents, slice):
            raise TypeError(f"PackedTokens: index must be a slice, got {type(documents).__name__}; use take(ids)")
        start, stop, step = documents.indices(len(self))
        if step != 1:
            return self.take(np.arange(start, stop, step))
        offsets = self._sets.offsets[start : max(start, stop) + 1]
        return PackedTokens(Ragged(self._sets.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0]))

    def take(self, ids: Any) -> PackedTokens:
        """Return some of the documents; their tokens are copied.

        Parameters
        ----------
        ids : integer array of shape (n,)
            Documents, in the order wanted.

        Returns
        -------
        PackedTokens
        """
        ids = np.asarray(as_ids("PackedTokens.take", "ids", ids))
        outside = np.flatnonzero((ids < 0) | (ids >= len(self)))
        if len(outside):
            at = int(outside[0])
            raise IndexError(f"PackedTokens.take: ids must be in [0, {len(self)}), got {ids[at]} at position {at}")
        return PackedTokens(self._sets.take(ids))

    def state(self) -> _files.State:
        """Return what `save` writes.

        Returns
        -------
        State
            `values` and `offsets`, and the dtype.
        """
        return _files.State({"values": self._sets.values, "offsets": self._sets.offsets}, {"dtype": self.dtype})

    @classmethod
    def from_state(cls, state: _files.State) -> PackedTokens:
        """Build packed tokens from a state.

        Parameters
        ----------
        state : State
            As `state` returned it.

        Returns
        -------
        PackedTokens
        """
        choice("PackedTokens.from_state", "dtype", state.params["dtype"], _PACKED)
        return cls(as_ragged("PackedTokens.from_state", "tokens", Ragged(**state.tensors)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens as one safetensors file, whole or not at all.

        Parameters
        ----------
        path : path
            An existing file is replaced.
        """
        _files.save(path, "maxsim.PackedTokens", self.state())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> PackedTokens:
        """Read tokens that `save` wrote.

        Parameters
        ----------
        path : path
        mmap : bool
            Leave the tokens in the file: they are read, unverified, when they are scored.

        Returns
        -------
        PackedTokens

        Raises
        ------
        FormatError
            A file that is damaged, truncated or something else.
        """
        return _files.load(path, "maxsim.PackedTokens", cls.from_state, mmap=mmap, lazy=("values",))

    def __repr__(self) -> str:
        tokens = self._sets.values.shape[0]
        return f"PackedTokens({len(self)} documents, {tokens} tokens, dim={self.dim}, dtype={self.dtype!r})"


def pack(docs: Any, dtype: str = "float32", *, num_threads: int | None = None) -> PackedTokens:
    """Check documents and prepare them for scoring, once for many calls.

    Parameters
    ----------
    docs : token sets, float32
    dtype : {"float32"}
        How tokens are stored. "float32" keeps the values as they are, without a copy where they are C-contiguous: do
        not change them afterwards.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    PackedTokens

    Raises
    ------
    ValueError
        NaN or Inf in a token; an unknown dtype.
    TypeError
        Tokens that are not float32.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> pv.maxsim.pack([np.eye(3, dtype=np.float32), np.ones((2, 3), np.float32)])
    PackedTokens(2 documents, 5 tokens, dim=3, dtype='float32')
    """
    op = "maxsim.pack"
    choice(op, "dtype", dtype, _PACKED)
    sets = _token_sets(op, "docs", docs, _PACKED)
    row = _backend.run(op, "first_nonfinite_row", sets.values, sets.values, num_threads=num_threads)
    if row >= 0:
        doc = int(np.searchsorted(sets.offsets, row, side="right")) - 1
        token = row - int(sets.offsets[doc])
        raise ValueError(f"{op}: docs must be finite, got NaN or Inf in token {token} of document {doc}")
    return PackedTokens(sets)


def _token_sets(op: str, name: str, x: Any, dtypes: tuple[str, ...], dim: int | None = None, like: str = "") -> Ragged:
    return as_ragged(op, name, x._sets if isinstance(x, PackedTokens) else x, dtypes=dtypes, dim=dim, like=like)


def _queries_and_docs(op: str, queries: Any, docs: Any) -> tuple[Ragged, Ragged]:
    """Read both; an empty list of one kind has the width of the other."""
    if isinstance(queries, list) and not queries:
        doc_sets = _token_sets(op, "docs", docs, _FLOATS)
        return _token_sets(op, "queries", queries, (dtype_name(doc_sets.values),), doc_sets.dim), doc_sets
    sets = _token_sets(op, "queries", queries, _FLOATS)
    return sets, _token_sets(op, "docs", docs, (dtype_name(sets.values),), sets.dim, like="queries")


def score(queries: Any, docs: Any, *, out: Any = None, num_threads: int | None = None) -> Any:
    """Score every query against every document.

    `out[q, d] = sum_i max_j <queries[q][i], docs[d][j]>`, higher is better.

    Parameters
    ----------
    queries : token sets, float32 | float64
    docs : token sets of queries' dtype and width, or PackedTokens
    out : array of shape (nq, nd), queries' dtype, optional
        Written and returned.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    array of shape (nq, nd); queries' dtype, library and device
        -inf for a document without tokens, 0 for a query without tokens (whatever the document).

    Raises
    ------
    ValueError
        Widths that differ, offsets that run backwards, an `out` of another shape.
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
    q, d = _queries_and_docs(op, queries, docs)
    out = output(op, out, q.values, (len(q), len(d)), dtype_name(q.values))
    _backend.run(op, "maxsim_score", q.values, q.values, q.offsets, d.values, d.offsets, out, num_threads=num_threads)
    return out


def topk(
    queries: Any,
    docs: Any,
    k: int,
    *,
    candidates: tuple[Any, Any] | None = None,
    out: tuple[Any, Any] | None = None,
    num_threads: int | None = None,
) -> tuple[Any, Any]:
    """Return the k best documents of each query: of all documents, or of the candidates named for each.

    Parameters
    ----------
    queries : token sets, float32 | float64
    docs : token sets of queries' dtype and width, or PackedTokens
    k : int
    candidates : (offsets of shape (nq + 1,), ids of shape (n,)), integer arrays, optional
        Query q chooses from the documents `ids[offsets[q]:offsets[q + 1]]`. An id that a list names twice is ranked
        twice.
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
        k below 1, widths that differ, offsets that run backwards.
    TypeError
        Dtypes other than float32 and float64, or two different ones.
    IndexError
        A candidate outside the documents.

    Notes
    -----
    Costs what `score` costs for the same pairs, and never stores all scores. Documents without tokens come last.

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
    """
    op = "maxsim.topk"
    k = as_count(op, "k", k)
    q, d = _queries_and_docs(op, queries, docs)
    offsets, ids = as_id_lists(op, "candidates", candidates)
    scores, found = outputs(op, out, q.values, (len(q), k), ("float32", "int64"), ("scores", "ids"))
    _backend.run(
        op, "maxsim_topk", q.values,
        q.values, q.offsets, d.values, d.offsets, offsets, ids, scores, found,
        num_threads=num_threads,
    )  # fmt: skip
    return scores, found


def align(query: Any, doc: Any, *, num_threads: int | None = None) -> tuple[Any, Any]:
    """Say which document token each query token matches, and how well: what the sum of a score consists of.

    Parameters
    ----------
    query : array of shape (tq, d), float32 | float64
    doc : array of shape (td, d), query's dtype
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
    ids, similarities = outputs(op, None, q, n, ("int64", dtype_name(q)), ("ids", "similarities"))
    _backend.run(op, "maxsim_align", q, q, d, ids, similarities, num_threads=num_threads)
    return ids, similarities
