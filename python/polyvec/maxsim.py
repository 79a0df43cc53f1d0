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

A document in which nothing takes part scores `empty`: -inf, so that it is never found ahead of another. A query without
tokens scores 0 against any document.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from polyvec import _backend, _files
from polyvec._arrays import (
    as_array,
    as_count,
    as_id_lists,
    as_ids,
    choice,
    dtype_name,
    empty,
    is_torch,
    output,
    outputs,
)
from polyvec._ragged import Ragged, as_ragged, is_padded

__all__ = [
    "CertifiedTopk",
    "PackedTokens",
    "align",
    "certified_topk",
    "from_residuals",
    "pack",
    "score",
    "score_matrix",
    "score_pairs",
    "topk",
]

_FLOATS = ("float32", "float64")
_STORED = {
    "float32": "float32", "bfloat16": "uint16", "float16": "float16", "int8": "uint8", "residual2": "uint8",
    "residual4": "uint8",
}  # fmt: skip
_PARTS = ("scales", "centroid_ids", "centroids", "bucket_weights")
_RESIDUAL = {"residual2": 2, "residual4": 4}  # bits of a code


def _stored_width(dtype: str, d: int) -> int:
    """Elements that a token of width d takes."""
    if dtype == "bfloat16":
        return d + d % 2
    if dtype in ("float32", "float16"):
        return d
    return -(-d // 4) * _RESIDUAL.get(dtype, 8) // 2


def _check_centroids(op: str, centroid_ids: Any, centroids: Any, dim: int) -> None:
    if centroids.shape[1] != dim:
        raise ValueError(f"{op}: centroids must have d = {dim}, got {centroids.shape[1]}")
    n = int(centroids.shape[0])
    if len(centroid_ids) and not (int(centroid_ids.min()) >= 0 and int(centroid_ids.max()) < n):
        raise IndexError(f"{op}: codes must be in [0, {n}), got {int(centroid_ids.min())} to {int(centroid_ids.max())}")


def _joined(a: Any, b: Any) -> Any:
    """The rows of both, in a's library; None where one has none."""
    if a is None or b is None:
        return None
    if is_torch(a):
        import torch

        return torch.cat([a, torch.as_tensor(b)])
    return np.concatenate([a, np.asarray(b)])


class PackedTokens:
    """Token sets prepared for scoring, as `pack` makes them; accepted wherever document token sets are.

    `packed[a:b]` are the documents a to b - 1 and share the memory of `packed`.

    Parameters
    ----------
    sets : Ragged
        Finite tokens, as stored; `pack` and `from_residuals` make them.
    dtype : str
        How they are stored.
    dim : int
        Width d of the tokens.
    scales : array of shape (T,), float32, optional
    centroid_ids : array of shape (T,), int32, optional
    centroids : array of shape (n, d), float32, optional
    bucket_weights : array of shape (4,) | (16,), float32, optional
    bounds : array of shape (n_docs, 3), float32, optional
        How far the tokens of a document are from the floats that they were; `certified_topk` needs it.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> packed = pv.maxsim.pack(np.ones((3, 2, 4), np.float32))
    >>> packed[1:]
    PackedTokens(2 documents, 4 tokens, dim=4, dtype='float32')
    """

    __slots__ = ("_bounds", "_dim", "_dtype", "_of_tokens", "_sets", "_shared")

    def __init__(
        self,
        sets: Ragged,
        dtype: str,
        dim: int,
        *,
        scales: Any = None,
        centroid_ids: Any = None,
        centroids: Any = None,
        bucket_weights: Any = None,
        bounds: Any = None,
    ) -> None:
        self._sets = sets
        self._dtype = dtype
        self._dim = dim
        self._of_tokens = {"scales": scales, "centroid_ids": centroid_ids}
        self._shared = {"centroids": centroids, "bucket_weights": bucket_weights}
        self._bounds = bounds

    @property
    def dtype(self) -> str:
        """How tokens are stored."""
        return self._dtype

    @property
    def dim(self) -> int:
        """Width d of the tokens."""
        return self._dim

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(int(x.nbytes) for x in self._tensors().values())

    def __len__(self) -> int:
        return len(self._sets)

    def _tensors(self) -> dict[str, Any]:
        parts = {"values": self._sets.values, "offsets": self._sets.offsets, **self._of_tokens, **self._shared}
        return {name: x for name, x in {**parts, "bounds": self._bounds}.items() if x is not None}

    def _stored(self) -> tuple[Any, ...]:
        """The tokens as the kernels take them."""
        parts = {**self._of_tokens, **self._shared}
        return (self._sets.values, self._sets.offsets, *(parts[name] for name in _PARTS))

    def _with(self, sets: Ragged, rows: Any, documents: Any) -> PackedTokens:
        of_tokens = {name: None if x is None else x[rows] for name, x in self._of_tokens.items()}
        bounds = None if self._bounds is None else self._bounds[documents]
        return PackedTokens(sets, self._dtype, self._dim, **of_tokens, **self._shared, bounds=bounds)

    def __getitem__(self, documents: slice) -> PackedTokens:
        if not isinstance(documents, slice):
            raise TypeError(f"PackedTokens: index must be a slice, got {type(documents).__name__}; use take(ids)")
        start, stop, step = documents.indices(len(self))
        if step != 1:
            return self.take(np.arange(start, stop, step))
        stop = max(start, stop)
        offsets = self._sets.offsets[start : stop + 1]
        rows = slice(int(offsets[0]), int(offsets[-1]))
        return self._with(Ragged(self._sets.values[rows], offsets - offsets[0]), rows, slice(start, stop))

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
        rows = Ragged(np.arange(self._sets.offsets[-1])[:, None], self._sets.offsets).take(ids).values[:, 0]
        return self._with(self._sets.take(ids), rows, ids)

    def append(self, docs: Any, *, num_threads: int | None = None) -> PackedTokens:
        """Return the documents and more of them behind, packed in the same way.

        Parameters
        ----------
        docs : token sets, float32
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        PackedTokens
            A copy; this one stays as it is. Append many documents at a time.

        Raises
        ------
        ValueError
            NaN or Inf in a token, another width.

        Notes
        -----
        Residual codes refer to the centroids and bucket weights that there are: pack anew when documents have drifted
        away from them. Documents of `from_residuals` have no bounds, and what is appended to them has none.
        """
        op = "PackedTokens.append"
        sets = _finite_sets(op, docs, self.dim, num_threads)
        parts: dict[str, Any] = {}
        if self.dtype in _RESIDUAL:
            ids = _nearest(op, sets.values, self._shared["centroids"], num_threads)
            parts = {**self._shared, "centroid_ids": ids}
        more = _encoded(op, sets, self.dtype, parts, num_threads)
        of_tokens = {name: _joined(x, more._of_tokens[name]) for name, x in self._of_tokens.items()}
        offsets = np.concatenate([self._sets.offsets, more._sets.offsets[1:] + self._sets.offsets[-1]])
        joined = Ragged(_joined(self._sets.values, more._sets.values), offsets)
        bounds = _joined(self._bounds, more._bounds)
        return PackedTokens(joined, self.dtype, self.dim, **of_tokens, **self._shared, bounds=bounds)

    def state(self) -> _files.State:
        """Return what `save` writes.

        Returns
        -------
        State
            The tokens as stored, and how.
        """
        return _files.State(self._tensors(), {"dtype": self.dtype, "dim": self.dim})

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
        op = "PackedTokens.from_state"
        dtype = choice(op, "dtype", state.params["dtype"], tuple(_STORED))
        dim = as_count(op, "dim", state.params["dim"], least=0)
        parts = dict(state.tensors)
        sets = Ragged(parts.pop("values"), parts.pop("offsets"))
        sets = as_ragged(op, "tokens", sets, dtypes=(_STORED[dtype],), dim=_stored_width(dtype, dim))
        expected = {"int8": ["scales"]}.get(dtype, [])
        if dtype in _RESIDUAL:
            expected = ["bucket_weights", "centroid_ids", "centroids", "scales"]
            _check_centroids(op, parts["centroid_ids"], parts["centroids"], dim)
        if sorted(parts.keys() - {"bounds"}) != expected:
            raise ValueError(f"{op}: tensors must be {expected}, got {sorted(parts)}")
        return cls(sets, dtype, dim, **parts)

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


def pack(docs: Any, dtype: str = "float32", *, centroids: Any = None, num_threads: int | None = None) -> PackedTokens:
    """Check documents and prepare them for scoring, once for many calls.

    Parameters
    ----------
    docs : token sets, float32
    dtype : {"float32", "bfloat16", "float16", "int8", "residual4", "residual2"}
        How tokens are stored. "float32" keeps the values as they are, without a copy where they are C-contiguous: do
        not change them afterwards. The others take a half, a quarter, an eighth or a sixteenth of the memory, and
        round: "bfloat16" to 8 significant bits, "float16" to 11, "int8" to 127 steps of the token's largest element;
        "residual4" and "residual2" store the nearest centroid and 4 or 2 bits for each element of the difference.
    centroids : array of shape (n, d), float32, optional
        For residuals. None trains `2 ** floor(log2(16 * sqrt(T)))` of them for T tokens, as many as ColBERTv2, by 4
        steps of k-means on at most 16 tokens for each.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    PackedTokens

    Raises
    ------
    ValueError
        NaN or Inf in a token; an unknown dtype; an element that is infinite in float16; centroids without need or
        of another width.
    TypeError
        Tokens or centroids that are not float32.

    Notes
    -----
    Queries stay float32. Scored against int8 (and residual) tokens, each query token is rounded to 127 steps of its
    largest element as well, and the products are summed exactly; where the CPU multiplies bfloat16, queries are rounded
    to it. Scores have the same bits in any batch on one kind of CPU.

    Residuals are replaced by the nearest of 4 or 16 weights, which are the quantiles (k + 1/2) / n of all elements of
    all residuals, as in ColBERTv2; each token is then scaled to the length that it had. Packing them costs 2 T n d
    flops.

    References
    ----------
    ColBERTv2 (Santhanam et al. 2022), section 3.3.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> pv.maxsim.pack([np.eye(3, dtype=np.float32), np.ones((2, 3), np.float32)])
    PackedTokens(2 documents, 5 tokens, dim=3, dtype='float32')
    """
    op = "maxsim.pack"
    choice(op, "dtype", dtype, tuple(_STORED))
    sets = _finite_sets(op, docs, None, num_threads)
    if dtype not in _RESIDUAL:
        if centroids is not None:
            raise ValueError(f"{op}: centroids must be None for {dtype}, got {type(centroids).__name__}")
        return _encoded(op, sets, dtype, {}, num_threads)
    if centroids is None:
        centroids = _trained(op, sets.values, num_threads)
    centroids = as_array(op, "centroids", centroids, ndim=2)
    _backend.require_finite(op, "centroids", centroids, num_threads)
    if centroids.shape[1] != sets.dim or not len(centroids):
        raise ValueError(f"{op}: centroids must have shape (n, {sets.dim}), got {tuple(centroids.shape)}")
    ids = _nearest(op, sets.values, centroids, num_threads)
    weights = empty(sets.values, (1 << _RESIDUAL[dtype],), "float32")
    _backend.run(op, "maxsim_buckets", sets.values, sets.values, ids, centroids, weights, num_threads=num_threads)
    parts = {"centroid_ids": ids, "centroids": centroids, "bucket_weights": weights}
    return _encoded(op, sets, dtype, parts, num_threads)


def _finite_sets(op: str, docs: Any, dim: int | None, num_threads: int | None) -> Ragged:
    sets = as_ragged(op, "docs", docs, dim=dim)
    row = _backend.run(op, "first_nonfinite_row", sets.values, sets.values, num_threads=num_threads)
    if row >= 0:
        doc = int(np.searchsorted(sets.offsets, row, side="right")) - 1
        token = row - int(sets.offsets[doc])
        raise ValueError(f"{op}: docs must be finite, got NaN or Inf in token {token} of document {doc}")
    return sets


def _trained(op: str, tokens: Any, num_threads: int | None) -> Any:
    """Return centroids that begin as tokens, evenly taken."""
    n, dim = int(tokens.shape[0]), int(tokens.shape[1])
    k = max(1, min(n, 1 << int(16 * n**0.5).bit_length() >> 1))
    centroids, updated = (empty(tokens, (1, k, dim), "float32") for _ in range(2))
    if n == 0:
        centroids[:] = 0
        return centroids[0]
    rows = min(n, 16 * k)
    sample = tokens[np.arange(rows) * n // rows]
    centroids[0] = sample[np.arange(k) * rows // k]
    labels, inertia = empty(tokens, (1, rows), "int64"), np.empty(1)
    for _ in range(4):
        _backend.run(
            op, "quantize_kmeans_step", tokens,
            sample[None], centroids, labels, inertia, updated, "l2",
            num_threads=num_threads,
        )  # fmt: skip
        centroids, updated = updated, centroids
    return centroids[0]


def _nearest(op: str, tokens: Any, centroids: Any, num_threads: int | None) -> Any:
    ids = empty(tokens, (int(tokens.shape[0]),), "int64")
    distances = empty(tokens, (int(tokens.shape[0]),), "float32")
    _backend.run(op, "scan_nearest", tokens, tokens, centroids, ids, distances, "l2", num_threads=num_threads)
    return ids.int() if is_torch(ids) else ids.astype(np.int32)


def _encoded(op: str, docs: Ragged, dtype: str, parts: dict[str, Any], num_threads: int | None) -> PackedTokens:
    """Store finite tokens; `parts` is what residual codes refer to."""
    if dtype == "float32":
        return PackedTokens(docs, dtype, docs.dim)
    tokens, n = docs.values, int(docs.values.shape[0])
    codes = empty(tokens, (n, _stored_width(dtype, docs.dim)), _STORED[dtype])
    if _STORED[dtype] != "uint8":
        _backend.run(op, "maxsim_pack", tokens, tokens, codes, None, num_threads=num_threads)
        return PackedTokens(Ragged(codes, docs.offsets), dtype, docs.dim)
    scales, bounds = empty(tokens, (n,), "float32"), empty(tokens, (len(docs), 3), "float32")
    packed = PackedTokens(Ragged(codes, docs.offsets), dtype, docs.dim, scales=scales, bounds=bounds, **parts)
    if dtype == "int8":
        _backend.run(op, "maxsim_pack", tokens, tokens, codes, scales, num_threads=num_threads)
    else:
        _backend.run(
            op, "maxsim_compress", tokens,
            tokens, docs.offsets, codes, scales, *(parts[name] for name in _PARTS[1:]),
            num_threads=num_threads,
        )  # fmt: skip
    _backend.run(op, "maxsim_bounds", tokens, tokens, packed._stored(), bounds, num_threads=num_threads)
    return packed


def from_residuals(
    codes: Any,
    residuals: Any,
    centroids: Any,
    bucket_weights: Any,
    offsets: Any,
    *,
    normalize: bool = True,
    num_threads: int | None = None,
) -> PackedTokens:
    """Take tokens that ColBERTv2 compressed, as its index files hold them.

    `token = centroids[codes] + bucket_weights[bits of residuals]`, scaled to length 1 when `normalize`.

    Parameters
    ----------
    codes : array of shape (T,), integer
        Centroid of each token.
    residuals : array of shape (T, d * bits / 8), uint8
        2 or 4 bits a dimension, the first in the highest bits of a byte, each with its lowest bit first. Not copied.
    centroids : array of shape (n, d), float32
    bucket_weights : array of shape (4,) | (16,), float32
        What the bits stand for.
    offsets : array of shape (n_docs + 1,), integer
        Where each document's tokens begin (ColBERT's `doclens`, summed).
    normalize : bool
        As ColBERT does when it decompresses.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    PackedTokens

    Raises
    ------
    ValueError
        Shapes that do not fit together; NaN or Inf in centroids.
    IndexError
        A code that no centroid has.

    Notes
    -----
    Scores take the product with the centroid in float32. Weights are rounded to 127 steps of the largest, and query
    tokens to 127 steps of their largest element; products with them are summed exactly.

    References
    ----------
    ColBERTv2 (Santhanam et al. 2022), section 3.3; PLAID (Santhanam et al. 2022), section 4.5.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> weights = np.array([-0.2, -0.1, 0.1, 0.2], np.float32)
    >>> centroids = np.eye(4, dtype=np.float32)
    >>> pv.maxsim.from_residuals([0, 3], np.zeros((2, 1), np.uint8), centroids, weights, [0, 2])
    PackedTokens(1 documents, 2 tokens, dim=4, dtype='residual2')
    """
    op = "maxsim.from_residuals"
    centroids = as_array(op, "centroids", centroids, ndim=2)
    residuals = as_array(op, "residuals", residuals, dtypes=("uint8",), ndim=2)
    weights = as_array(op, "bucket_weights", bucket_weights, ndim=1)
    _backend.require_finite(op, "centroids", centroids, num_threads)
    dtype = {bits: name for name, bits in _RESIDUAL.items()}.get(len(weights).bit_length() - 1, "")
    if not dtype or len(weights) not in (4, 16):
        raise ValueError(f"{op}: bucket_weights must have 4 or 16 entries, got {len(weights)}")
    n, dim = int(residuals.shape[0]), int(centroids.shape[1])
    if residuals.shape[1] != _stored_width(dtype, dim):
        raise ValueError(
            f"{op}: residuals must have {_stored_width(dtype, dim)} bytes a token, got {residuals.shape[1]}"
        )
    ids = as_ids(op, "codes", codes)
    if len(ids) != n:
        raise ValueError(f"{op}: codes must have one entry a token ({n}), got {len(ids)}")
    _check_centroids(op, ids, centroids, dim)
    ids = ids.int() if is_torch(ids) else ids.astype(np.int32)
    sets = Ragged(residuals, offsets)
    scales = empty(residuals, (n,), "float32")
    scales[:] = 1
    if normalize:
        stored = (residuals, sets.offsets, None, ids, centroids, weights)
        _backend.run(op, "maxsim_residual_scales", residuals, stored, scales, num_threads=num_threads)
    return PackedTokens(sets, dtype, dim, scales=scales, centroid_ids=ids, centroids=centroids, bucket_weights=weights)


def _float_sets(
    op: str, name: str, x: Any, mask: Any, dtypes: tuple[str, ...], dim: int | None = None, like: str = ""
) -> Ragged:
    if isinstance(x, PackedTokens) and mask is None:
        if x.dtype != "float32":
            raise TypeError(f"{op}: {name} must be {' or '.join(dtypes)}, got tokens packed as {x.dtype}")
        x = x._sets
    return as_ragged(op, name, x, dtypes=dtypes, dim=dim, like=like, mask=mask)


def _queries_and_docs(
    op: str, queries: Any, docs: Any, masks: tuple[Any, Any], num_threads: int | None
) -> tuple[Ragged, tuple[Any, ...], int]:
    """Read both; an empty list of one kind has the width of the other. The documents as the kernels take them."""
    packed = isinstance(docs, PackedTokens) and docs.dtype != "float32" and masks[1] is None
    if isinstance(queries, list) and not queries:
        like = docs if packed else _float_sets(op, "docs", docs, masks[1], _FLOATS)
        dtype = "float32" if packed else dtype_name(like.values)
        sets = _float_sets(op, "queries", queries, masks[0], (dtype,), like.dim)
    else:
        sets = _float_sets(op, "queries", queries, masks[0], ("float32",) if packed else _FLOATS)
    if not packed:
        like = _float_sets(op, "docs", docs, masks[1], (dtype_name(sets.values),), sets.dim, like="queries")
        return sets, (like.values, like.offsets, None, None, None, None), len(like)
    if docs.dim != sets.dim:
        raise ValueError(f"{op}: docs must have the same d as queries ({sets.dim}), got {docs.dim}")
    if "scales" in docs._tensors():
        _backend.require_finite(op, "queries", sets.values, num_threads)
    return sets, docs._stored(), len(docs)


def _missing(op: str, padding: str, empty: float, docs: Any, offsets: Any) -> tuple[int, float]:
    """Return the number of tokens under which a zero vector takes part in a document, and the score of an empty one."""
    choice(op, "padding", padding, ("exclude", "zero", "relu"))
    if not isinstance(empty, (int, float)) or empty != empty:
        raise ValueError(f"{op}: empty must be a number, got {empty!r}")
    if padding == "zero":
        padded = docs[0] if isinstance(docs, tuple) else docs
        return int(padded.shape[1] if is_padded(docs) else np.diff(offsets).max(initial=0)), empty
    return 0 if padding == "exclude" else np.iinfo(np.int64).max, empty


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
    queries : token sets, float32 | float64
    docs : token sets of queries' dtype and width, or PackedTokens
    query_mask, doc_mask : bool array of shape (n, t), optional
        Which tokens of padded queries, of padded documents count.
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
    array of shape (nq, nd); queries' dtype, library and device

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
    q, stored, n = _queries_and_docs(op, queries, docs, (query_mask, doc_mask), num_threads)
    missing = _missing(op, padding, empty, docs, stored[1])
    out = output(op, out, q.values, (len(q), n), dtype_name(q.values))
    _backend.run(op, "maxsim_score", q.values, q.values, q.offsets, stored, *missing, out, num_threads=num_threads)
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
    query_mask, doc_mask : bool array of shape (n, t), optional
        Which tokens of padded queries, of padded documents count.
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
    array of shape (n,); queries' dtype, library and device

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
    q, stored, _ = _queries_and_docs(op, queries, docs, (query_mask, doc_mask), num_threads)
    missing = _missing(op, padding, empty, docs, stored[1])
    out = output(op, out, q.values, (len(q),), dtype_name(q.values))
    _backend.run(
        op, "maxsim_score_pairs", q.values, q.values, q.offsets, stored, *missing, out, num_threads=num_threads
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
    query_mask: Any = None,
    doc_mask: Any = None,
    padding: str = "exclude",
    empty: float = -np.inf,
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
    query_mask, doc_mask : bool array of shape (n, t), optional
        Which tokens of padded queries, of padded documents count.
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
        k below 1, widths that differ, offsets that run backwards, a mask of another shape.
    TypeError
        Dtypes other than float32 and float64, or two different ones.
    IndexError
        A candidate outside the documents.

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
    """
    op = "maxsim.topk"
    k = as_count(op, "k", k)
    q, stored, _ = _queries_and_docs(op, queries, docs, (query_mask, doc_mask), num_threads)
    missing = _missing(op, padding, empty, docs, stored[1])
    offsets, ids = as_id_lists(op, "candidates", candidates)
    scores, found = outputs(op, out, q.values, (len(q), k), ("float32", "int64"), ("scores", "ids"))
    _backend.run(
        op, "maxsim_topk", q.values,
        q.values, q.offsets, stored, *missing, offsets, ids, scores, found,
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
    nearly all, so that `topk` of the float tokens is faster. Holds up to 64 MB of scores at a time.

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
    if _STORED[packed.dtype] != "uint8":
        raise TypeError(f"{op}: packed must be int8 or residual codes, got {packed.dtype}")
    if packed._bounds is None:
        raise ValueError(f"{op}: packed must have bounds, as pack makes them")
    q, stored, _ = _queries_and_docs(op, queries, packed, (None, None), num_threads)
    floats = _float_sets(op, "docs", docs, None, ("float32",), q.dim, like="queries")
    scores, ids = outputs(op, out, q.values, (len(q), k), ("float32", "int64"), ("scores", "ids"))
    rescored = empty(q.values, (len(q),), "int64")
    _backend.run(
        op, "maxsim_certified_topk", q.values,
        q.values, q.offsets, stored, packed._bounds, floats.values, floats.offsets, scores, ids, rescored,
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
    q = as_ragged(op, "queries", queries, dtypes=_FLOATS)
    d = as_ragged(op, "docs", docs, dtypes=(dtype_name(q.values),), dim=q.dim, like="queries")
    if pairs and len(d) != len(q):
        raise ValueError(f"{op}: docs must have one document a query ({len(q)}), got {len(d)}")
    tokens = int(q.values.shape[0])
    scores = empty(q.values, (len(q),) if pairs else (len(q), len(d)), dtype_name(q.values))
    rows = empty(q.values, (tokens,) if pairs else (len(d), tokens), "int32")
    _backend.run(op, "maxsim_match", q.values, q.values, q.offsets, d.values, d.offsets, scores, rows)
    return scores, rows


def match_gradient(queries: Ragged, docs: Ragged, grad: Any, rows: Any, *, of_docs: bool) -> Any:
    """Return the gradient for the tokens of the queries, or of the documents, given that of the scores of `match`."""
    op = "maxsim.match_gradient"
    dtype = dtype_name(queries.values)
    q, d = (as_ragged(op, name, x, dtypes=(dtype,)) for name, x in (("queries", queries), ("docs", docs)))
    grad = as_array(op, "grad", grad, dtypes=(dtype,))
    like = d.values if of_docs else q.values
    out = empty(like, tuple(like.shape), dtype)
    _backend.run(op, "maxsim_match_gradient", like, q.values, q.offsets, d.values, d.offsets, grad, rows, of_docs, out)
    return out
