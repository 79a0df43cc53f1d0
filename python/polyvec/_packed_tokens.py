"""Token sets prepared for scoring: `pack` and its kin of `polyvec.maxsim`, which says what they are scored by."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from polyvec import _backend, _files
from polyvec._arrays import (
    as_array,
    as_count,
    as_ids,
    choice,
    device_name,
    dtype_name,
    empty,
    is_torch,
    joined,
    rows_of,
)
from polyvec._errors import CudaError
from polyvec._kmeans import train_centroids
from polyvec._ragged import Ragged, as_ragged

STORED = {
    "float32": "float32", "bfloat16": "uint16", "float16": "float16", "int8": "uint8", "residual2": "uint8",
    "residual4": "uint8", "centroid": "uint16",
}  # fmt: skip
_PARTS = ("scales", "centroid_ids", "centroids", "bucket_weights")
RESIDUAL_BITS = {"residual2": 2, "residual4": 4}
MOST_CENTROIDS = 1 << 16  # where a token is nothing else


def stored_width(dtype: str, d: int) -> int:
    """Elements that a token of width d takes."""
    if dtype == "centroid":
        return 1
    if dtype == "bfloat16":
        return d + d % 2
    if dtype in ("float32", "float16"):
        return d
    return -(-d // 4) * RESIDUAL_BITS.get(dtype, 8) // 2


def _check_centroids(op: str, centroid_ids: Any, centroids: Any, dim: int) -> None:
    if centroids.shape[1] != dim:
        raise ValueError(f"{op}: centroids must have d = {dim}, got {centroids.shape[1]}")
    n = int(centroids.shape[0])
    if len(centroid_ids) and not (int(centroid_ids.min()) >= 0 and int(centroid_ids.max()) < n):
        raise IndexError(f"{op}: codes must be in [0, {n}), got {int(centroid_ids.min())} to {int(centroid_ids.max())}")


def _as_uint16(x: Any) -> Any:
    """The integers `x`, in their library; torch converts few dtypes to uint16 on a GPU."""
    if not is_torch(x):
        return x.astype(np.uint16)
    import torch

    return x.to(torch.int16).view(torch.uint16)


def _joined(a: Any, b: Any) -> Any:
    """The rows of both, in a's library; None where one has none."""
    if a is None or b is None:
        return None
    if is_torch(a):
        import torch

        # torch does not join uint16 on a GPU
        parts = [x.view(torch.int16) if x.dtype == torch.uint16 else x for x in (a, torch.as_tensor(b))]
        return torch.cat(parts).view(a.dtype)
    return np.concatenate([a, np.asarray(b)]) if device_name(a) == "cpu" else joined([a, b])


def _swapped(tensors: dict[str, Any], dtype: str, other: str) -> dict[str, Any]:
    """The tensors, torch's of `dtype` as `other`: torch can pickle uint16, but not read it."""

    def swapped(x: Any) -> Any:
        if not is_torch(x) or dtype_name(x) != dtype:
            return x
        import torch

        return x.view(getattr(torch, other))

    return {name: swapped(x) for name, x in tensors.items()}


def _unpickled(dtype: str, dim: int, tensors: dict[str, Any]) -> PackedTokens:
    stored = _swapped(tensors, "int16", "uint16")
    sets = Ragged(stored.pop("values"), stored.pop("offsets"))
    return PackedTokens(sets, dtype, dim, **stored)


class PackedTokens(_files.Saved):
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

    _KIND = "maxsim.PackedTokens"
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
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each document's tokens begin, and where the last ones end, shape (len(packed) + 1,); read-only."""
        return self._sets.offsets

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(int(x.nbytes) for x in self._tensors().values())

    def __len__(self) -> int:
        return len(self._sets)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._dtype, self._dim, _swapped(self._tensors(), "uint16", "int16"))

    def _tensors(self) -> dict[str, Any]:
        parts = {"values": self._sets.values, "offsets": self._sets.offsets, **self._of_tokens, **self._shared}
        return {name: x for name, x in {**parts, "bounds": self._bounds}.items() if x is not None}

    def _stored(self) -> tuple[Any, ...]:
        """The tokens as the kernels take them."""
        parts = {**self._of_tokens, **self._shared}
        return (self._sets.values, self._sets.placed_offsets, *(parts[name] for name in _PARTS))

    def _with(self, sets: Ragged, rows: Any, documents: Any) -> PackedTokens:
        def chosen(x: Any, which: Any) -> Any:
            return None if x is None else x[which] if isinstance(which, slice) else rows_of(x, which)

        of_tokens = {name: chosen(x, rows) for name, x in self._of_tokens.items()}
        bounds = chosen(self._bounds, documents)
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

    def to(self, device: Any) -> PackedTokens:
        """Return the documents as torch tensors on a device, to be scored there; what lies there already is shared.

        Parameters
        ----------
        device : torch.device or str
            As `torch.Tensor.to` takes it: "cuda", "cuda:1", "cpu".

        Returns
        -------
        PackedTokens

        Raises
        ------
        CudaError
            A GPU where torch finds none.

        Examples
        --------
        >>> import torch, polyvec as pv
        >>> packed = pv.maxsim.pack(torch.ones(3, 2, 4), "int8").to("cpu")  # or "cuda"
        >>> packed
        PackedTokens(3 documents, 6 tokens, dim=4, dtype='int8')
        """
        import torch

        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise CudaError(f"PackedTokens.to: device must be cpu, as torch finds no GPU, got {device}")

        def moved(x: Any) -> Any:
            return None if x is None else torch.as_tensor(x).to(device)

        sets = Ragged(moved(self._sets.values), self._sets.offsets)
        parts = {name: moved(x) for name, x in {**self._of_tokens, **self._shared}.items()}
        return PackedTokens(sets, self._dtype, self._dim, **parts, bounds=moved(self._bounds))

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
        Centroids and bucket weights stay those that there are: pack anew when documents have drifted
        away from them. Documents of `from_residuals` have no bounds, and what is appended to them has none.
        """
        op = "PackedTokens.append"
        sets = _finite_sets(op, docs, self.dim, num_threads)
        parts: dict[str, Any] = {}
        if self._shared["centroids"] is not None:
            ids = nearest_centroids(op, sets.values, self._shared["centroids"], num_threads)
            parts = {**self._shared, "centroid_ids": ids}
        more = encoded(op, sets, self.dtype, parts, num_threads)
        of_tokens = {name: _joined(x, more._of_tokens[name]) for name, x in self._of_tokens.items()}
        offsets = np.concatenate([self._sets.offsets, more._sets.offsets[1:] + self._sets.offsets[-1]])
        joined = Ragged(_joined(self._sets.values, more._sets.values), offsets)
        bounds = _joined(self._bounds, more._bounds)
        return PackedTokens(joined, self.dtype, self.dim, **of_tokens, **self._shared, bounds=bounds)

    def decode(self, *, num_threads: int | None = None) -> Ragged:
        """Return the tokens as floats: what scores are of, but for the rounding of queries.

        Parameters
        ----------
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        Ragged
            float32, where the packed tokens lie. Documents packed as "float32" share their memory.

        Examples
        --------
        >>> import numpy as np, polyvec as pv
        >>> pv.maxsim.pack([np.array([[0.1, 254]], np.float32)], "int8").decode().values
        array([[  0., 254.]], dtype=float32)
        """
        if self.dtype == "float32":
            return self._sets
        op, values = "PackedTokens.decode", self._sets.values
        out = empty(values, (int(values.shape[0]), self.dim), "float32")
        _backend.run(op, "maxsim_decode", values, self._stored(), out, num_threads=num_threads)
        return self._sets.with_values(out)

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
        dtype = choice(op, "dtype", state.params["dtype"], tuple(STORED))
        dim = as_count(op, "dim", state.params["dim"], least=0)
        parts = dict(state.tensors)
        sets = Ragged(parts.pop("values"), parts.pop("offsets"))
        sets = as_ragged(op, "tokens", sets, dtypes=(STORED[dtype],), dim=stored_width(dtype, dim))
        n = int(sets.values.shape[0])
        for name, length in (("scales", n), ("centroid_ids", n), ("bounds", len(sets))):
            if name in parts and len(parts[name]) != length:
                raise ValueError(f"{op}: {name} must have {length} entries, got {len(parts[name])}")
        weights = 1 << RESIDUAL_BITS.get(dtype, 0)
        if "bucket_weights" in parts and len(parts["bucket_weights"]) != weights:
            raise ValueError(f"{op}: bucket_weights must have {weights} entries, got {len(parts['bucket_weights'])}")
        expected = {"int8": ["scales"], "centroid": ["centroids"]}.get(dtype, [])
        if dtype == "centroid":
            _check_centroids(op, np.asarray(sets.values), parts["centroids"], dim)
        if dtype in RESIDUAL_BITS:
            expected = ["bucket_weights", "centroid_ids", "centroids", "scales"]
            _check_centroids(op, parts["centroid_ids"], parts["centroids"], dim)
        if sorted(parts.keys() - {"bounds"}) != expected:
            raise ValueError(f"{op}: tensors must be {expected}, got {sorted(parts)}")
        return cls(sets, dtype, dim, **parts)

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
        return _files.load(path, cls._KIND, cls.from_state, mmap=mmap, lazy=("values",))

    def __repr__(self) -> str:
        tokens = self._sets.values.shape[0]
        return f"PackedTokens({len(self)} documents, {tokens} tokens, dim={self.dim}, dtype={self.dtype!r})"


def pack(docs: Any, dtype: str = "float32", *, centroids: Any = None, num_threads: int | None = None) -> PackedTokens:
    """Check documents and prepare them for scoring, once for many calls.

    Parameters
    ----------
    docs : token sets, float32
    dtype : {"float32", "bfloat16", "float16", "int8", "residual4", "residual2", "centroid"}
        How tokens are stored. "float32" keeps the values as they are, without a copy where they are C-contiguous: do
        not change them afterwards. The others take a half, a quarter, an eighth or a sixteenth of the memory, and
        round: "bfloat16" to 8 significant bits, "float16" to 11, "int8" to 127 steps of the token's largest element;
        "residual4" and "residual2" store the nearest centroid and 4 or 2 bits for each element of the difference;
        "centroid" stores the nearest centroid alone, in 2 bytes, for a first choice of candidates.
    centroids : array of shape (n, d), float32, optional
        For residuals and "centroid", there at most 65,536. None, on a CPU, trains `2 ** floor(log2(16 * sqrt(T)))` of
        them for T tokens, as many as ColBERTv2, by 4 steps of k-means on at most 16 tokens for each.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    PackedTokens

    Raises
    ------
    ValueError
        NaN or Inf in a token; an unknown dtype; an element that is infinite in 16 bits; centroids without need, of
        another width or too many, or none for residuals and "centroid" on a GPU.
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

    Scored against "centroid", a query token's products with all centroids are rounded to 255 steps between the least
    and the greatest: 2 n d flops a query token, then a look into a table and a maximum of bytes for each document
    token, where float32 tokens take 2 d flops. The 100 best of all hold nearly all of the 10
    exactly best: rescore them by `topk(..., candidates=...)`, as `retrieve.MultiVectorIndex` does.

    On a GPU tokens are stored as on a CPU, and stay there; products with centroids are kept in float16, not in steps.
    Nothing waits for values: an element beyond 65504 is infinite in float16, and a token with NaN or Inf keeps them, or
    has the scale NaN in int8.

    References
    ----------
    ColBERTv2 (Santhanam et al. 2022), section 3.3 (residuals); PLAID (Santhanam et al. 2022), section 4.2 (centroids
    alone).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> pv.maxsim.pack([np.eye(3, dtype=np.float32), np.ones((2, 3), np.float32)])
    PackedTokens(2 documents, 5 tokens, dim=3, dtype='float32')
    """
    op = "maxsim.pack"
    choice(op, "dtype", dtype, tuple(STORED))
    sets = _finite_sets(op, docs, None, num_threads)
    if dtype not in (*RESIDUAL_BITS, "centroid"):
        if centroids is not None:
            raise ValueError(f"{op}: centroids must be None for {dtype}, got {type(centroids).__name__}")
        return encoded(op, sets, dtype, {}, num_threads)
    if device_name(sets.values) != "cpu" and centroids is None:
        raise ValueError(f"{op}: centroids must be given for {dtype} on a GPU, got None")
    if centroids is None:
        count = centroid_count(int(sets.values.shape[0]))
        if dtype == "centroid":
            count = min(count, MOST_CENTROIDS)
        centroids = train_centroids(op, sets.values, count, num_threads)
    centroids = as_array(op, "centroids", centroids, ndim=2)
    _backend.require_finite(op, "centroids", centroids, num_threads)
    if centroids.shape[1] != sets.dim or not len(centroids):
        raise ValueError(f"{op}: centroids must have shape (n, {sets.dim}), got {tuple(centroids.shape)}")
    if dtype == "centroid" and len(centroids) > MOST_CENTROIDS:
        raise ValueError(f"{op}: centroids must be at most {MOST_CENTROIDS}, got {len(centroids)}")
    ids = nearest_centroids(op, sets.values, centroids, num_threads)
    if dtype == "centroid":
        return encoded(op, sets, dtype, {"centroid_ids": ids, "centroids": centroids}, num_threads)
    weights = bucket_weights_of(op, sets.values, ids, centroids, dtype, num_threads)
    parts = {"centroid_ids": ids, "centroids": centroids, "bucket_weights": weights}
    return encoded(op, sets, dtype, parts, num_threads)


def _finite_sets(op: str, docs: Any, dim: int | None, num_threads: int | None) -> Ragged:
    sets = as_ragged(op, "docs", docs, dim=dim)
    if device_name(sets.values) != "cpu":
        return sets  # it would wait
    row = _backend.run(op, "first_nonfinite_row", sets.values, sets.values, num_threads=num_threads)
    if row >= 0:
        doc = int(np.searchsorted(sets.offsets, row, side="right")) - 1
        token = row - int(sets.offsets[doc])
        raise ValueError(f"{op}: docs must be finite, got NaN or Inf in token {token} of document {doc}")
    return sets


def centroid_count(tokens: int) -> int:
    """Return how many centroids so many tokens get."""
    return max(1, min(tokens, 1 << int(16 * tokens**0.5).bit_length() >> 1))


def nearest_centroids(op: str, tokens: Any, centroids: Any, num_threads: int | None) -> Any:
    """Return the centroid of each token, int32."""
    ids = empty(tokens, (int(tokens.shape[0]),), "int64")
    distances = empty(tokens, (int(tokens.shape[0]),), "float32")
    _backend.run(op, "scan_nearest", tokens, tokens, centroids, None, ids, distances, "l2", num_threads=num_threads)
    return ids.int() if is_torch(ids) else ids.astype(np.int32)


def bucket_weights_of(
    op: str, tokens: Any, centroid_ids: Any, centroids: Any, dtype: str, num_threads: int | None
) -> Any:
    """Return what the codes of residuals stand for."""
    weights = empty(tokens, (1 << RESIDUAL_BITS[dtype],), "float32")
    _backend.run(op, "maxsim_buckets", tokens, tokens, centroid_ids, centroids, weights, num_threads=num_threads)
    return weights


def encoded(
    op: str, docs: Ragged, dtype: str, parts: dict[str, Any], num_threads: int | None, *, bounded: bool = True
) -> PackedTokens:
    """Store finite tokens; `parts` is what residual codes refer to. Bounds on errors are for `certified_topk` alone."""
    if dtype == "float32":
        return PackedTokens(docs, dtype, docs.dim)
    tokens, n = docs.values, int(docs.values.shape[0])
    if dtype == "centroid":
        ids = _as_uint16(parts["centroid_ids"]).reshape(n, 1)
        return PackedTokens(docs.with_values(ids), dtype, docs.dim, centroids=parts["centroids"])
    codes = empty(tokens, (n, stored_width(dtype, docs.dim)), STORED[dtype])
    if STORED[dtype] != "uint8":
        _backend.run(op, "maxsim_pack", tokens, tokens, codes, None, num_threads=num_threads)
        return PackedTokens(docs.with_values(codes), dtype, docs.dim)
    offsets = docs.placed_offsets
    scales = empty(tokens, (n,), "float32")
    bounds = empty(tokens, (len(docs), 3), "float32") if bounded else None
    packed = PackedTokens(docs.with_values(codes), dtype, docs.dim, scales=scales, bounds=bounds, **parts)
    if dtype == "int8":
        _backend.run(op, "maxsim_pack", tokens, tokens, codes, scales, num_threads=num_threads)
    else:
        _backend.run(
            op, "maxsim_compress", tokens,
            tokens, offsets, codes, scales, *(parts[name] for name in _PARTS[1:]),
            num_threads=num_threads,
        )  # fmt: skip
    if bounded:
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
        Shapes that do not fit together; NaN or Inf in centroids or weights; offsets that run backwards.
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
    _backend.require_finite(op, "bucket_weights", weights, num_threads)
    dtype = {bits: name for name, bits in RESIDUAL_BITS.items()}.get(len(weights).bit_length() - 1, "")
    if not dtype or len(weights) not in (4, 16):
        raise ValueError(f"{op}: bucket_weights must have 4 or 16 entries, got {len(weights)}")
    n, dim = int(residuals.shape[0]), int(centroids.shape[1])
    if residuals.shape[1] != stored_width(dtype, dim):
        raise ValueError(
            f"{op}: residuals must have {stored_width(dtype, dim)} bytes a token, got {residuals.shape[1]}"
        )
    ids = as_ids(op, "codes", codes)
    if len(ids) != n:
        raise ValueError(f"{op}: codes must have one entry a token ({n}), got {len(ids)}")
    _check_centroids(op, ids, centroids, dim)
    ids = ids.int() if is_torch(ids) else ids.astype(np.int32)
    sets = as_ragged(op, "residuals", (residuals, offsets), dtypes=("uint8",))
    scales = empty(residuals, (n,), "float32")
    scales[:] = 1
    if normalize:
        stored = (residuals, sets.placed_offsets, None, ids, centroids, weights)
        _backend.run(op, "maxsim_residual_scales", residuals, stored, scales, num_threads=num_threads)
    return PackedTokens(sets, dtype, dim, scales=scales, centroid_ids=ids, centroids=centroids, bucket_weights=weights)
