"""Residual quantisation, public as polyvec.quantize.ResidualQuantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from polyvec import _backend
from polyvec._arrays import ArrayT, as_count, choice
from polyvec._codec import Floats
from polyvec._kmeans import lloyd, seed_centroids
from polyvec._product_quantizer import CodebookCodec
from polyvec._progress import Progress, reporting

_WIDTHS = 5
_NORM_BITS = 24
_MOST_BEAM = 256

Codes = npt.NDArray[np.uint8]


class ResidualQuantizer(CodebookCodec):
    """Codes of m levels: a vector is the sum of one codeword of each level, which codes what the levels before left.

    `fit` finds the 2^bits codewords of a level by k-means on the residuals of the levels before. `encode` looks for the
    best sum with a beam: the `beam` best sums of the first levels are extended by all codewords of the next. A code
    takes m bytes, or m / 2 with 4 bits, and 3 bytes more with metric "l2". At equal bytes it loses less than
    `ProductQuantizer`, takes longer to encode, and is searched about as fast.

    Parameters
    ----------
    dim : int
        Width d of the vectors.
    levels : int
        Number m of codewords in a sum.
    bits : {8, 4}
        Bits of a level's code.
    metric : {"ip", "l2"}
        What `search` ranks by: inner products, higher is better; or squared distances, lower is better.
    beam : int
        Sums that `fit` and `encode` keep of a vector from level to level, at most 256; 1 is greedy.
    seed : int
        The same seed gives the same codebooks.

    Attributes
    ----------
    codebooks : numpy array of shape (levels, 2**bits, dim), float32
        None before `fit`.
    code_size : int
        Bytes of a code.
    nbytes : int
        Bytes of the codebooks.

    Notes
    -----
    Inner products of a query with all codewords (2 2^bits m d flops) are the tables of `search`. A distance |q - x|^2 =
    |q|^2 - 2 <q, x> + |x|^2 has cross terms of the codewords in |x|^2, which no table of one level holds: a code of
    "l2" keeps it, as an integer of 24 bits, whose digits are scored by tables like the levels. Its range is what
    the codebooks can reach at most, (sum of the levels' longest codewords)^2, so that none is clipped; its rounding, at
    most 2^-25 of that range, is about that of a float32.

    References
    ----------
    Chen, Guan and Wang (2010): Approximate nearest neighbor search by residual vector quantization, section 3. Babenko
    and Lempitsky (2014): Additive quantization for extreme vector compression, sections 3.2 (beam search) and 3.3
    (search by tables, with the norm in the code). Liu et al. (2015): Improved residual vector quantization for
    high-dimensional approximate nearest neighbor search (k-means from subspaces on).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.random.default_rng(0).standard_normal((1000, 32), np.float32)
    >>> rq = pv.quantize.ResidualQuantizer(32, 8, metric="l2").fit(x)
    >>> codes = rq.encode(x)
    >>> codes.shape, codes.dtype
    ((1000, 11), dtype('uint8'))
    >>> scores, ids = rq.search(x[:2], codes, 10)
    >>> ids[:, 0].tolist()
    [0, 1]
    """

    _KIND = "quantize.ResidualQuantizer"
    _PARAMS = ("dim", "levels", "bits", "metric", "beam", "seed")

    def __init__(
        self, dim: int, levels: int, *, bits: int = 8, metric: str = "ip", beam: int = 8, seed: int = 0
    ) -> None:
        op = self._KIND
        self.dim = as_count(op, "dim", dim)
        self.levels = as_count(op, "levels", levels)
        self.bits: int = choice(op, "bits", as_count(op, "bits", bits), (8, 4))
        self.metric: str = choice(op, "metric", metric, ("ip", "l2"))
        self.beam = as_count(op, "beam", beam)
        if self.beam > _MOST_BEAM:
            raise ValueError(f"{op}: beam must be at most {_MOST_BEAM}, got {self.beam}")
        self.seed = as_count(op, "seed", seed, least=0)
        self.codebooks = None
        self._products: tuple[Floats, Floats] | None = None  # codebooks, and what _all_products made of them

    @property
    def code_size(self) -> int:
        """Bytes of a code."""
        columns = self.levels + self._norm_digits
        return columns if self.bits == 8 else (columns + 1) // 2

    def __repr__(self) -> str:
        return (
            f"ResidualQuantizer({self.dim}, {self.levels}, bits={self.bits}, metric={self.metric!r}, "
            f"beam={self.beam}, seed={self.seed}){'' if self._is_fitted() else ', not fitted'}"
        )

    def fit(
        self,
        x: Any,
        *,
        max_iter: int = 10,
        train_size: int | None = None,
        progress: Progress = None,
        num_threads: int | None = None,
    ) -> ResidualQuantizer:
        """Find the codebooks for vectors like these.

        Parameters
        ----------
        x : array of shape (n, dim), float32 | float16 | bfloat16
            At least 2^bits rows. Of a memory map only the rows that are drawn are read.
        max_iter : int
            Iterations of k-means at most, for each level and each of five widths (Notes).
        train_size : int, optional
            Fit to this many random rows at most; 256 rows a codeword, 256 * 2^bits, when None.
        progress : None, bool or callable
            True shows a bar; a callable is called with (done, total) iterations.
        num_threads : int, optional

        Returns
        -------
        ResidualQuantizer
            Itself.

        Raises
        ------
        ValueError
            Too few rows, rows of another width, NaN or Inf in the rows that are drawn.

        Notes
        -----
        Residuals have no structure that k-means could hold on to in many dimensions: it ends in poor local
        optima. So it starts in the first few of their principal directions, and goes on from what it found in
        more of them, d^(1/5), d^(2/5), ..., d (Liu et al. 2015). The residuals of a level are those of the best sums of
        the levels before. 2 train_size 2^bits dim flops an iteration in all dimensions, and as many to extend the beams
        by a level. Needs the rows four times as float32.
        """
        op = f"{self._KIND}.fit"
        max_iter = as_count(op, "max_iter", max_iter)
        codewords = 1 << self.bits
        rng = np.random.default_rng(self.seed)
        rows = self._training_rows(op, x, train_size, rng, num_threads)
        codebooks = np.empty((self.levels, codewords, self.dim), np.float32)
        products = _room_for_products(codebooks)
        beams, scores = _empty_beams(len(rows))
        residuals = rows
        with reporting(op, progress, self.levels * len(_widths(self.dim)) * max_iter, "iterations") as report:
            for level in range(self.levels):
                if level:
                    residuals = rows - self._sums(op, beams[:, 0], codebooks[:level], num_threads)
                codebooks[level] = _cluster(op, residuals, codewords, max_iter, rng, report, num_threads)
                if level + 1 < self.levels:
                    _write_products(codebooks, level, products)
                    known = codebooks[: level + 1]
                    beams, scores = self._extend(op, rows, known, products, beams, scores, self.beam, num_threads)
        self.codebooks = codebooks
        return self

    def encode(
        self, x: ArrayT, *, out: ArrayT | None = None, progress: Progress = None, num_threads: int | None = None
    ) -> ArrayT:
        """Return the code of each vector: the best sum of codewords (squared distance) that the beam finds.

        Parameters
        ----------
        x : array of shape (n, dim), float32 | float16 | bfloat16
            A memory map is read block by block.
        out : array of shape (n, code_size), uint8, optional
            Written and returned; a memory map is written block by block.
        progress : None, bool or callable
            True shows a bar; a callable is called with (done, total) rows.
        num_threads : int, optional

        Returns
        -------
        array of shape (n, code_size), uint8, x's library and device
            Level by level, then the digits of the squared norm with metric "l2". With 4 bits, byte j holds digit 2 j in
            its low and 2 j + 1 in its high four bits.

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Rows of another width, NaN or Inf.

        Notes
        -----
        2 2^bits m d flops a vector, whatever the beam, which costs m^2 / 2 2^bits additions for each of its sums: the
        inner products of all pairs of codewords are kept from the first call on, 2 (2^bits m)^2 bytes. Codes do not
        depend on num_threads, nor on the other rows.
        """
        return self._encode_blocks(f"{self._KIND}.encode", x, out, progress, num_threads)

    def decode(
        self,
        codes: ArrayT,
        *,
        levels: int | None = None,
        out: ArrayT | None = None,
        num_threads: int | None = None,
    ) -> ArrayT:
        """Return the vectors that codes stand for.

        Parameters
        ----------
        codes : array of shape (n, code_size), uint8
        levels : int, optional
            Add up the first levels only: a coarser vector. All when None.
        out : array of shape (n, dim), float32, optional
        num_threads : int, optional

        Returns
        -------
        array of shape (n, dim), float32, codes' library and device
            Sums in float64, rounded.

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Codes of another size, levels out of range.
        """
        op = f"{self._KIND}.decode"
        table, out = self._decode_arguments(op, codes, out)
        levels = self.levels if levels is None else as_count(op, "levels", levels)
        if levels > self.levels:
            raise ValueError(f"{op}: levels must be at most {self.levels}, got {levels}")
        _backend.run(
            op, "quantize_rq_decode", table, table, self.codebooks[:levels], np.asarray(out), num_threads=num_threads
        )
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
        k : int
        include : bool array of shape (n,) or integer array of shape (j,), optional
            Which codes take part: a mask, or their rows. All when None.
        out : pair of arrays of shape (nq, k), float32 and int64, optional
        num_threads : int, optional

        Returns
        -------
        scores : array of shape (nq, k), float32, queries' library and device
            metric "ip": inner products, higher is better; "l2": squared distances, lower is better. Best first, equal
            scores by smaller id.
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
        The scan is that of `ProductQuantizer.search`, by tables of 2^bits inner products a level: 2 2^bits m d flops a
        query for the tables, then code_size bytes a code. A score is the float32 sum of a code's entries; distances
        are |q|^2 less such a sum, off by a few roundings of (|q| + |x|)^2. Eight queries are searched at a time. A
        query's result does not depend on the other queries, on packing, nor on num_threads, and one with NaN or Inf
        finds nothing. Reads its arguments only; several threads may call it at once.
        """
        op = f"{self._KIND}.search"
        rows, table, taking_part, out = self._search_arguments(op, queries, codes, k, include, out)
        step = self._norm_step(self.codebooks) if self.metric == "l2" else 0.0
        _backend.run(
            op, "quantize_rq_search", rows,
            rows, table, len(codes), self.codebooks, taking_part, *out, self.metric == "l2", step,
            num_threads=num_threads,
        )  # fmt: skip
        return out

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"codebooks": (self.levels, 1 << self.bits, self.dim)}

    def _encode(self, op: str, rows: Floats, codes: Any, num_threads: int | None) -> None:
        codebooks, products = self.codebooks, self._all_products(self.codebooks)
        beams, _ = self._extend(op, rows, codebooks, products, *_empty_beams(len(rows)), 1, num_threads)
        digits = beams[:, 0]
        if self.metric == "l2":
            sums = self._sums(op, digits, codebooks, num_threads)
            digits = np.concatenate([digits, self._digits_of_norms(codebooks, sums)], 1)
        codes[:] = _bytes_of(digits, self.bits)

    # ---- sums of codewords

    def _extend(
        self,
        op: str,
        rows: Floats,
        codebooks: Floats,
        products: Floats,
        beams: Codes,
        scores: Floats,
        kept: int,
        num_threads: int | None,
    ) -> tuple[Codes, Floats]:
        """Add the levels that beams lack; return the `kept` best sums of each, and the scores of the whole beam."""
        levels, most = len(codebooks), beams.shape[1] * codebooks.shape[1] ** (len(codebooks) - beams.shape[2])
        width = min(self.beam, most)
        out = np.empty((len(rows), min(kept, width), levels), np.uint8), np.empty((len(rows), width), np.float32)
        _backend.run(
            op, "quantize_rq_extend", rows, rows, codebooks, products, beams, scores, *out, num_threads=num_threads
        )
        return out

    def _all_products(self, codebooks: Floats) -> Floats:
        """Return the inner products of all pairs of levels, which are kept as long as the codebooks are the same."""
        if self._products is None or self._products[0] is not codebooks:
            products = _room_for_products(codebooks)
            for level in range(len(codebooks)):
                _write_products(codebooks, level, products)
            self._products = codebooks, products
        return self._products[1]

    def _sums(self, op: str, labels: Codes, codebooks: Floats, num_threads: int | None) -> Floats:
        """Return the sums of the codewords (n, dim) of labels (n, levels)."""
        sums = np.empty((len(labels), self.dim), np.float32)
        codes = _bytes_of(labels, self.bits)
        _backend.run(op, "quantize_rq_decode", codes, codes, codebooks, sums, num_threads=num_threads)
        return sums

    # ---- squared norms

    @property
    def _norm_digits(self) -> int:
        return _NORM_BITS // self.bits if self.metric == "l2" else 0

    def _norm_step(self, codebooks: Floats) -> float:
        longest = np.sqrt(np.square(codebooks, dtype=np.float64).sum(2).max(1)).sum()
        return float(longest**2) / ((1 << _NORM_BITS) - 1)

    def _digits_of_norms(self, codebooks: Floats, sums: Floats) -> Codes:
        steps = np.einsum("ij,ij->i", sums, sums, dtype=np.float64) / max(self._norm_step(codebooks), 1e-300)
        numbers = np.minimum(np.rint(steps), (1 << _NORM_BITS) - 1).astype(np.int64)
        shifts = np.arange(self._norm_digits) * self.bits
        digits: Codes = (numbers[:, None] >> shifts & ((1 << self.bits) - 1)).astype(np.uint8)
        return digits


def _widths(dim: int) -> list[int]:
    """How many principal directions k-means works in, one after the other."""
    return sorted({int(np.ceil(dim ** (step / _WIDTHS) - 1e-9)) for step in range(1, _WIDTHS + 1)})


def _cluster(
    op: str, x: Floats, k: int, max_iter: int, rng: np.random.Generator, report: Any, num_threads: int | None
) -> Floats:
    """Return k centroids, found in ever more principal directions of the rows."""
    centred = x - x.mean(0)
    _, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64))  # ascending
    directions = directions[:, ::-1].astype(np.float32)
    turned = np.matmul(x, directions, out=centred)
    centroids: Any = None
    for width in _widths(x.shape[1]):
        part = np.ascontiguousarray(turned[None, :, :width])
        if centroids is None:
            centroids = seed_centroids(op, part, k, "l2", "k-means++", rng, num_threads)
        else:
            centroids = np.pad(centroids, ((0, 0), (0, 0), (0, width - centroids.shape[2])))
        centroids, _, _, done = lloyd(op, part, centroids, "l2", max_iter, 1e-4, report, num_threads, label=False)
        report(max_iter - done)
    found: Floats = centroids[0] @ directions.T
    return found


def _empty_beams(n: int) -> tuple[Codes, Floats]:
    """One sum of no codewords for each of n rows."""
    return np.empty((n, 1, 0), np.uint8), np.zeros((n, 1), np.float32)


def _room_for_products(codebooks: Floats) -> Floats:
    levels, codewords, _ = codebooks.shape
    return np.empty(codewords**2 * levels * (levels - 1) // 2, np.float32)


def _write_products(codebooks: Floats, level: int, products: Floats) -> None:
    """Write the inner products of a level's codewords with those of the levels before, where RqExtend reads them."""
    codewords, dim = codebooks.shape[1:]
    at = codewords**2 * level * (level - 1) // 2
    part = products[at : at + level * codewords**2].reshape(level * codewords, codewords)
    np.matmul(codebooks[:level].reshape(-1, dim), codebooks[level].T, out=part)


def _bytes_of(digits: Codes, bits: int) -> Codes:
    """Return digits (n, columns) as bytes: those of 4 bits two by two, the even ones low."""
    if bits == 8:
        return np.ascontiguousarray(digits)
    if digits.shape[1] % 2:
        digits = np.pad(digits, ((0, 0), (0, 1)))
    pairs: Codes = digits[:, ::2] | digits[:, 1::2] << np.uint8(4)
    return pairs
