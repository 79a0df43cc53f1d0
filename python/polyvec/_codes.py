"""Codecs of integers: scalar quantisation and RaBitQ. Public as `polyvec.quantize.ScalarQuantizer` and `.RaBitQ`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from polyvec import _backend, _core
from polyvec._arrays import ArrayT, as_count, as_float32, choice, empty, is_array
from polyvec._codec import Codec, Floats, codes_of, vectors_of
from polyvec._progress import Progress

_BLOCK_ROWS = 1 << 14  # rows converted, rotated and encoded at a time
_MAX_DIM = 32768


class IntegerCodec(Codec):
    """What the codecs of integers have in common."""

    bits: int

    # ---- what a codec says of itself

    def _parts(self) -> str:
        """The parts of a code behind its numbers: any of s(cale), m(ean), o(ffset), e(rror)."""
        raise NotImplementedError

    def _decode(self, op: str, codes: Any, out: Any, num_threads: int | None) -> None:
        raise NotImplementedError

    def _weights(self, op: str, queries: Floats, num_threads: int | None) -> tuple[Floats, Floats, Floats]:
        """Return weights, mean weights and constants (CodesSearch) of prepared queries, which may be overwritten."""
        raise NotImplementedError

    # ---- how far its scores may be off, for `Refined`; all in float64

    def _reach(self, decoded: npt.NDArray[np.float64]) -> Any:
        """Return the norms of what a query's weights are multiplied with (CodesSearch)."""
        raise NotImplementedError

    def _rounding(self, queries: npt.NDArray[np.float64]) -> Any:
        """Return the norms that the rounding of the weights may have: half a step of 127 of the largest, each."""
        raise NotImplementedError

    def _least_distance(self, queries: npt.NDArray[np.float64], scores: npt.NDArray[np.float64], lost: float) -> Any:
        """Return the least squared distance of a vector that scores so, of which the code lost so much."""
        raise NotImplementedError

    # ---- the codec

    @property
    def code_size(self) -> int:
        """Bytes of a code."""
        return int(_core.code_size(self.dim, self.bits, self._parts()))

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._PARAMS[1:])
        return f"{type(self).__name__}({self.dim}, {options}){'' if self._is_fitted() else ', not fitted'}"

    def encode(
        self, x: ArrayT, *, out: ArrayT | None = None, progress: Progress = None, num_threads: int | None = None
    ) -> ArrayT:
        """Return the code of each vector.

        Parameters
        ----------
        x : array of shape (n, dim), float32 | float16 | bfloat16
            A memory map is read block by block.
        out : array of shape (n, code_size), uint8, optional
            Written and returned; a memory map is written block by block.
        progress : None, bool or callable
            True shows a bar; a callable is called with (done, total) rows.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        array of shape (n, code_size), uint8, x's library and device

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Rows of another width, NaN or Inf.

        Notes
        -----
        Codes have the same bits at every instruction-set level and for any number of threads. Beside x and the codes it
        needs 4 * 16,384 * dim bytes.
        """
        return self._encode_blocks(f"{self._KIND}.encode", x, out, progress, num_threads)

    def decode(self, codes: ArrayT, *, out: ArrayT | None = None, num_threads: int | None = None) -> ArrayT:
        """Return the vectors that codes stand for.

        Parameters
        ----------
        codes : array of shape (n, code_size), uint8
        out : array of shape (n, dim), float32, optional
        num_threads : int, optional

        Returns
        -------
        array of shape (n, dim), float32, codes' library and device
            With metric "cosine" they stand for the directions of what was encoded.

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Codes of another size.
        """
        op = f"{self._KIND}.decode"
        table, out = self._decode_arguments(op, codes, out)
        self._decode(op, table, np.asarray(out), num_threads)
        return out

    def search(
        self,
        queries: ArrayT,
        codes: Any,
        k: int,
        *,
        include: Any = None,
        out: tuple[ArrayT, ArrayT] | None = None,
        num_threads: int | None = None,
    ) -> tuple[ArrayT, ArrayT]:
        """Return the k codes that score best against each query, without decoding them.

        Parameters
        ----------
        queries : array of shape (nq, dim), float32 | float16 | bfloat16
        codes : array of shape (n, code_size), uint8, or PackedCodes
            One query searches packed codes up to twice as fast. A memory map is read once for 512 queries.
        k : int
        include : bool array of shape (n,) or integer array of shape (m,), optional
            Which codes take part: a mask, or their rows. All when None.
        out : pair of arrays of shape (nq, k), float32 and int64, optional
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        scores : array of shape (nq, k), float32, queries' library and device
            Best first, equal scores by smaller id. "ip", "cosine": higher is better; "l2": squared distances.
        ids : array of shape (nq, k), int64
            Rows of `codes`. Where fewer than k take part: id -1 with score -inf ("l2": inf).

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Queries or codes of another width, k below 1, a mask of another length.
        IndexError
            A row in `include` outside the codes.

        Notes
        -----
        A query is rounded to 127 steps of its largest element (in the codec's scale); its products with the numbers of
        a code are exact integers. dim multiply-adds of bytes a pair of query and code; for one query the scan reads
        code_size bytes a code. A query's result does not depend on the other queries, on packing, the instruction-set
        level or num_threads, and one with NaN or Inf finds nothing. Reads its arguments only; several threads may call
        it at once.
        """
        op = f"{self._KIND}.search"
        rows, table, taking_part, out = self._search_arguments(op, queries, codes, k, include, out)
        mask = _mask(op, taking_part, len(codes))
        prepared = as_float32(rows, copy=True)
        if self.metric == "cosine":
            _backend.run(op, "codes_unit_rows", prepared, prepared, num_threads=num_threads)
        weights = self._weights(op, prepared, num_threads)
        _backend.run(
            op, "codes_search", prepared,
            *weights, table, len(codes), mask, *out, self.bits, self._parts(), self.metric == "l2",
            num_threads=num_threads,
        )  # fmt: skip
        return out

    @property
    def _block_shape(self) -> tuple[int, ...]:
        return int(_core.code_columns(self.dim, self.bits, self._parts())), 16, 4

    def _pack(self, op: str, codes: npt.NDArray[np.uint8], blocks: Any, num_threads: int | None) -> None:
        _backend.run(op, "codes_pack", codes, codes, blocks, self.dim, self.bits, self._parts(),
                     num_threads=num_threads)  # fmt: skip

    # ---- arguments

    def _set_form(self, dim: int, bits: int, choices: tuple[int, ...], metric: str) -> None:
        op = self._KIND
        self.dim = as_count(op, "dim", dim)
        if self.dim > _MAX_DIM:
            raise ValueError(f"{op}: dim must be at most {_MAX_DIM}, got {self.dim}")
        self.bits = choice(op, "bits", as_count(op, "bits", bits), choices)
        self.metric = choice(op, "metric", metric, ("ip", "l2", "cosine"))
        for name in self._shapes():
            setattr(self, name, None)

    def _block(self, op: str, rows: Any, begin: int, num_threads: int | None) -> Floats:
        """Return a block of rows as float32, finite and, for "cosine", of norm 1; a copy."""
        block = as_float32(rows[begin : begin + _BLOCK_ROWS], copy=True)
        _backend.require_finite(op, "x", block, num_threads, first_row=begin)
        if self.metric == "cosine":
            _backend.run(op, "codes_unit_rows", block, block, num_threads=num_threads)
        return block


def _mask(op: str, selection: npt.NDArray[Any] | None, n: int) -> npt.NDArray[np.bool_] | None:
    """Return which of n codes take part."""
    if selection is None or selection.dtype == np.bool_:
        return selection
    outside = np.flatnonzero((selection < 0) | (selection >= n))
    if len(outside):
        raise IndexError(f"{op}: include must be in [0, {n}), got {selection[outside[0]]} at position {outside[0]}")
    mask = np.zeros(n, np.bool_)
    mask[selection] = True
    return mask


class ScalarQuantizer(IntegerCodec):
    """Codes of one number a dimension: c_j = round((x_j - low) / step), of 8, 6 or 4 bits.

    `search` compares queries, rounded to 8 bits, with codes directly. The score of a code is that of the vector it
    decodes to.

    Parameters
    ----------
    dim : int
        Width d of the vectors.
    bits : {8, 6, 4}
        Bits of a number.
    ranges : {"all", "dimension", "vector"}
        What a range of values is fitted to: all values, those of each dimension, or those of each vector, which keeps
        its range in 8 bytes of its code.
    metric : {"ip", "l2", "cosine"}
        What `search` ranks by: inner products or cosines, higher is better; or squared distances, lower is better.
        Codes of "l2" have 4 bytes more, for the norm; those of "cosine" forget the norm.

    Attributes
    ----------
    mid, step : numpy arrays of shape (dim,), float32
        A number c stands for mid + step * (c - (2^bits - 1) / 2). None before `fit`; not used with ranges="vector".
    code_size : int
        Bytes of a code: dim * bits / 8, rounded up, and what ranges and metric add.
    nbytes : int
        Bytes of what `fit` found.

    References
    ----------
    Aguerrebere et al. (2023): Similarity search in the blink of an eye with compressed indices, section 3 (a range a
    vector).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.random.default_rng(0).standard_normal((1000, 32), np.float32)
    >>> codec = pv.quantize.ScalarQuantizer(32, bits=6, metric="cosine").fit(x)
    >>> codes = codec.encode(x)
    >>> codes.shape, codes.dtype
    ((1000, 24), dtype('uint8'))
    >>> scores, ids = codec.search(x[:2], codes, 10)
    >>> ids[:, 0].tolist()
    [0, 1]
    """

    _KIND = "quantize.ScalarQuantizer"
    _PARAMS = ("dim", "bits", "ranges", "metric")
    mid: Any  # float32 or, before `fit`, None; so are the others
    step: Any

    def __init__(self, dim: int, *, bits: int = 8, ranges: str = "all", metric: str = "ip") -> None:
        self._set_form(dim, bits, (8, 6, 4), metric)
        self.ranges: str = choice(self._KIND, "ranges", ranges, ("all", "dimension", "vector"))

    def fit(self, x: Any, *, train_size: int = 16384, num_threads: int | None = None) -> ScalarQuantizer:
        """Find the ranges for vectors like these: from the smallest to the largest value, shrunk where that loses less.

        Parameters
        ----------
        x : array of shape (n, dim), float32 | float16 | bfloat16
            At least one row.
        train_size : int
            Look at this many rows at most, evenly spaced.
        num_threads : int, optional

        Returns
        -------
        ScalarQuantizer
            Itself.

        Raises
        ------
        ValueError
            No rows, rows of another width, NaN or Inf.

        Notes
        -----
        Of 15 ranges, all about the same middle, the one whose codes have the least squared error. Values outside a
        range become its end.
        """
        op = f"{self._KIND}.fit"
        rows = vectors_of(op, "x", x, self.dim)
        train_size = as_count(op, "train_size", train_size)
        if len(rows) == 0:
            raise ValueError(f"{op}: x must have at least 1 row, got 0")
        sample = rows[:: -(-len(rows) // train_size)]
        blocks = [self._block(op, sample, b, num_threads) for b in range(0, len(sample), _BLOCK_ROWS)]
        values = np.concatenate(blocks)
        axis = None if self.ranges == "all" else 0
        low, high = values.min(axis), values.max(axis)
        mid = np.broadcast_to(low / 2 + high / 2, (self.dim,)).astype(np.float32)
        step = np.broadcast_to((high / 2 - low / 2) / ((2**self.bits - 1) / 2), (self.dim,)).astype(np.float32)
        if self.ranges == "vector":
            self.mid, self.step = np.zeros_like(mid), np.ones_like(step)
            return self
        codes = np.empty((len(values), _core.code_size(self.dim, self.bits, "")), np.uint8)
        decoded = np.empty_like(values)
        errors = []
        shrunk = [step * np.float32(share) for share in np.linspace(1, 0.3, 15)]
        for candidate in shrunk:
            _backend.run(op, "codes_scalar_encode", values, values, mid, candidate, codes, self.bits, "",
                         num_threads=num_threads)  # fmt: skip
            _backend.run(op, "codes_decode", values, codes, mid, candidate, decoded, self.bits, "",
                         num_threads=num_threads)  # fmt: skip
            errors.append(np.square(decoded - values).sum(dtype=np.float64))
        self.mid, self.step = mid, shrunk[int(np.argmin(errors))]
        return self

    def _parts(self) -> str:
        return ("sm" if self.ranges == "vector" else "") + ("o" if self.metric == "l2" else "")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"mid": (self.dim,), "step": (self.dim,)}

    def _table(self) -> tuple[Floats | None, Floats | None]:
        return (None, None) if self.ranges == "vector" else (self.mid, self.step)

    def _encode(self, op: str, rows: Floats, codes: Any, num_threads: int | None) -> None:
        _backend.run(
            op, "codes_scalar_encode", rows,
            rows, *self._table(), codes, self.bits, self._parts(),
            num_threads=num_threads,
        )  # fmt: skip

    def _decode(self, op: str, codes: Any, out: Any, num_threads: int | None) -> None:
        _backend.run(
            op, "codes_decode", codes, codes, *self._table(), out, self.bits, self._parts(), num_threads=num_threads
        )

    def _weights(self, op: str, queries: Floats, num_threads: int | None) -> tuple[Floats, Floats, Floats]:
        mid, step = self._table()
        with np.errstate(invalid="ignore", over="ignore"):  # what is not a number finds nothing
            sums = queries.sum(1, dtype=np.float64)
            middle = np.zeros_like(sums) if mid is None else (queries * mid.astype(np.float64)).sum(1)
            if self.metric == "l2":
                middle = np.square(queries, dtype=np.float64).sum(1) - 2 * middle
            weights = queries if step is None else queries * step
            return weights, sums.astype(np.float32), middle.astype(np.float32)

    def _reach(self, decoded: npt.NDArray[np.float64]) -> Any:
        """Of the numbers less their middle."""
        if self.ranges == "vector":  # the middle of a range is within it
            return np.asarray(np.sqrt(self.dim) * np.ptp(decoded, axis=1))
        steps = np.float64(self.step)
        return np.linalg.norm(np.divide(decoded - self.mid, steps, out=np.zeros_like(decoded), where=steps > 0), axis=1)

    def _rounding(self, queries: npt.NDArray[np.float64]) -> Any:
        """Weights are queries times steps."""
        weights = queries if self.ranges == "vector" else queries * self.step
        return np.abs(weights).max(1) / 254 * np.sqrt(self.dim)

    def _least_distance(self, queries: npt.NDArray[np.float64], scores: npt.NDArray[np.float64], lost: float) -> Any:
        """Scores are distances from decoded vectors."""
        return np.maximum(np.sqrt(np.maximum(scores, 0)) - lost, 0) ** 2


def rotation_signs(dim: int, seed: int) -> Floats:
    """Return what `codes_rotate` rotates by: of each of its rounds the signs, over the root of the length."""
    power = 1 << (dim.bit_length() - 1)
    signs: Floats = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), (4, dim))
    signs[0::2, :power] *= np.float32(power**-0.5)
    signs[1::2, dim - power :] *= np.float32(power**-0.5)
    return signs


class RaBitQ(IntegerCodec):
    """Codes of 1 to 8 bits a dimension of randomly rotated vectors, with unbiased scores and a bound on their error.

    A vector less the mean of the data is rotated, and replaced by the grid point closest to it in angle; a factor makes
    up for the angle that is left, so that over the choice of the rotation the expected score is the exact one.

    Parameters
    ----------
    dim : int
        Width d of the vectors.
    bits : int
        Bits of a number, 1 to 8.
    metric : {"ip", "l2", "cosine"}
        What `search` ranks by: inner products or cosines, higher is better; or squared distances, lower is better.
        Codes of "l2" have 4 bytes more, for the norm; those of "cosine" forget the norm.
    seed : int
        The same seed gives the same rotation.

    Attributes
    ----------
    centroid : numpy array of shape (dim,), float32
        The mean of the vectors given to `fit`; None before.
    signs : numpy array of shape (4, dim), float32
        The rotation: four times, multiply by a row and transform the first, or in turn the last, 2^floor(log2 dim)
        elements by Hadamard's matrix.
    code_size : int
        Bytes of a code: dim * bits / 8, rounded up, and 6 (a factor and the error; "l2": 10).
    nbytes : int
        Bytes of what `fit` found.

    References
    ----------
    Gao and Long (2024): RaBitQ, sections 3.1 to 3.3. Gao et al. (2025): Practical and asymptotically optimal
    quantization of high-dimensional vectors, section 3 (more than one bit).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.random.default_rng(0).standard_normal((1000, 64), np.float32)
    >>> codec = pv.quantize.RaBitQ(64, bits=2, metric="l2").fit(x)
    >>> codes = codec.encode(x)
    >>> codes.shape
    (1000, 26)
    >>> scores, ids = codec.search(x[:2], codes, 10)
    >>> ids[:, 0].tolist()
    [0, 1]
    """

    _KIND = "quantize.RaBitQ"
    _PARAMS = ("dim", "bits", "metric", "seed")
    centroid: Any
    signs: Any

    def __init__(self, dim: int, *, bits: int = 4, metric: str = "ip", seed: int = 0) -> None:
        self._set_form(dim, bits, tuple(range(1, 9)), metric)
        self.seed = as_count(self._KIND, "seed", seed, least=0)

    def fit(self, x: Any, *, train_size: int = 65536, num_threads: int | None = None) -> RaBitQ:
        """Find the mean of vectors like these.

        Parameters
        ----------
        x : array of shape (n, dim), float32 | float16 | bfloat16
            At least one row.
        train_size : int
            Look at this many rows at most, evenly spaced.
        num_threads : int, optional

        Returns
        -------
        RaBitQ
            Itself.

        Raises
        ------
        ValueError
            No rows, rows of another width, NaN or Inf.
        """
        op = f"{self._KIND}.fit"
        rows = vectors_of(op, "x", x, self.dim)
        train_size = as_count(op, "train_size", train_size)
        if len(rows) == 0:
            raise ValueError(f"{op}: x must have at least 1 row, got 0")
        sample = rows[:: -(-len(rows) // train_size)]
        total = np.zeros(self.dim)
        for begin in range(0, len(sample), _BLOCK_ROWS):
            total += self._block(op, sample, begin, num_threads).sum(0, dtype=np.float64)
        self.centroid = (total / len(sample)).astype(np.float32)
        self.signs = rotation_signs(self.dim, self.seed)
        return self

    def errors(self, codes: ArrayT) -> ArrayT:
        """Return how far the scores of codes can be off: the error that `encode` measured, rounded up.

        The score of query q and a code is off by at most eps |q - centroid| errors for "l2" twice that, and
        eps |q| errors for "ip" and "cosine", with a probability of at least 1 - 2 exp(-c eps^2) over the choice of the
        rotation. eps = 1.9 holds in nearly all cases; the error has the standard deviation of eps = 1.

        Parameters
        ----------
        codes : array of shape (n, code_size), uint8

        Returns
        -------
        array of shape (n,), float32, codes' library and device
            |r| sqrt((1 - cos^2) / (cos^2 (dim - 1))): r is the vector less the centroid, cos its cosine with the code.

        Raises
        ------
        ValueError
            Codes of another size.

        References
        ----------
        Gao and Long (2024): RaBitQ, theorem 3.2.
        """
        op = f"{self._KIND}.errors"
        table = codes_of(op, codes, self.code_size)
        out = empty(codes if is_array(codes) else table, (len(table),), "float32")
        np.asarray(out)[:] = np.ascontiguousarray(table[:, -2:]).view(np.float16)[:, 0]
        return out  # type: ignore[no-any-return]

    def _parts(self) -> str:
        return "soe" if self.metric == "l2" else "se"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"centroid": (self.dim,), "signs": (4, self.dim)}

    def _encode(self, op: str, rows: Floats, codes: Any, num_threads: int | None) -> None:
        rows -= self.centroid
        _backend.run(op, "codes_rotate", rows, self.signs, rows, False, num_threads=num_threads)
        _backend.run(op, "codes_rabitq_encode", rows, rows, codes, self.bits, self._parts(), num_threads=num_threads)

    def _decode(self, op: str, codes: Any, out: Any, num_threads: int | None) -> None:
        _backend.run(op, "codes_decode", codes, codes, None, None, out, self.bits, self._parts(),
                     num_threads=num_threads)  # fmt: skip
        _backend.run(op, "codes_rotate", out, self.signs, out, True, num_threads=num_threads)
        out += self.centroid

    def _weights(self, op: str, queries: Floats, num_threads: int | None) -> tuple[Floats, Floats, Floats]:
        with np.errstate(invalid="ignore", over="ignore"):  # what is not a number finds nothing
            if self.metric == "l2":
                queries -= self.centroid
                constants = np.square(queries, dtype=np.float64).sum(1)
            else:
                constants = (queries * self.centroid.astype(np.float64)).sum(1)
        _backend.run(op, "codes_rotate", queries, self.signs, queries, False, num_threads=num_threads)
        return queries, np.zeros(len(queries), np.float32), constants.astype(np.float32)

    def _reach(self, decoded: npt.NDArray[np.float64]) -> Any:
        """Of what the rotation turned."""
        return np.linalg.norm(decoded - self.centroid, axis=1)

    def _rounding(self, queries: npt.NDArray[np.float64]) -> Any:
        """Weights are rotated queries, less the centroid for "l2"."""
        weights = np.array(queries - self.centroid if self.metric == "l2" else queries, np.float32)
        _backend.run("quantize.RaBitQ", "codes_rotate", weights, self.signs, weights, False)
        return 1.001 * np.abs(np.float64(weights)).max(1) / 254 * np.sqrt(self.dim)

    def _least_distance(self, queries: npt.NDArray[np.float64], scores: npt.NDArray[np.float64], lost: float) -> Any:
        """Scores know the norm, and the inner product but for what the code lost."""
        return scores - 2 * np.linalg.norm(queries - self.centroid, axis=1) * lost
