"""Product quantisation, public as polyvec.quantize.ProductQuantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from polyvec import _backend
from polyvec._arrays import ArrayT, as_count, as_float32, as_number, choice
from polyvec._block_sparse import BlockSparse
from polyvec._codec import Codec, Floats, vectors_of
from polyvec._kmeans import lloyd, seed_centroids, step
from polyvec._progress import Progress, reporting

_OPQ_ROUNDS = 10
_LOSS_ROUNDS = 10


class CodebookCodec(Codec):
    """What the codecs have in common whose codes are numbers of codewords."""

    bits: int
    codebooks: Any  # float32 or, before `fit`, None

    @property
    def _block_shape(self) -> tuple[int, ...]:
        return (self.code_size, 64) if self.bits == 8 else (-(-self.code_size // 4) * 4, 16)

    def _pack(self, op: str, codes: npt.NDArray[np.uint8], blocks: Any, num_threads: int | None) -> None:
        _backend.run(op, "quantize_pq_pack", codes, codes, blocks, num_threads=num_threads)

    def _training_rows(
        self, op: str, x: Any, train_size: int | None, rng: np.random.Generator, num_threads: int | None
    ) -> Floats:
        """Check the vectors that `fit` gets and return `train_size` random ones as float32, or all."""
        codewords = 1 << self.bits
        rows = vectors_of(op, "x", x, self.dim)
        train_size = 256 * codewords if train_size is None else as_count(op, "train_size", train_size, least=codewords)
        if len(rows) < codewords:
            raise ValueError(f"{op}: x must have at least 2^bits rows ({codewords}), got {len(rows)}")
        drawn = np.sort(rng.choice(len(rows), train_size, replace=False)) if len(rows) > train_size else None
        rows = as_float32(rows if drawn is None else rows[drawn])
        bad = _backend.run(op, "first_nonfinite_row", rows, rows, num_threads=num_threads)
        if bad >= 0:
            bad = bad if drawn is None else drawn[bad]
            raise ValueError(f"{op}: x must be finite, got NaN or Inf in row {bad}")
        return rows


class ProductQuantizer(CodebookCodec):
    """Codes of m subspaces: a vector is cut into m pieces, and each becomes the number of its nearest codeword.

    `fit` finds 2^bits codewords for each subspace by k-means. A code takes m bytes, or m / 2 with 4 bits. `search`
    compares float queries with codes directly: the score of a code is the exact score of the vector it decodes to.

    Codebooks and codes minimise the squared error |x - y|^2 of the vector y that a code decodes to, or with
    loss="anisotropic" what matters for the inner products that rank high.

    Parameters
    ----------
    dim : int
        Width d of the vectors.
    m : int
        Number of subspaces, a divisor of dim.
    bits : {8, 4}
        Bits of a subspace's code.
    metric : {"ip", "l2"}
        What `search` ranks by: inner products, higher is better; or squared distances, lower is better.
    rotation : {None, "random", "opq"}
        Turn vectors before they are cut: "random" spreads the variance evenly, "opq" fits the rotation to the data so
        that the codes lose least (and takes longer to fit). Neither changes inner products or distances.
    loss : {"squared", "anisotropic"}
        "anisotropic", for the metric "ip": |x - y|^2 + (h - 1) <x, x - y>^2 / |x|^2, in which the part of the error
        along x, which queries close to x meet in full, counts h = (d - 1) t^2 / (1 - t^2) times, at least once. The
        best of many inner products are told apart better; the squared error grows.
    threshold : float
        t in (0, 1), of "anisotropic": the cosine of query and vector from which on inner products should be right.
    seed : int
        The same seed gives the same codebooks.

    Attributes
    ----------
    codebooks : numpy array of shape (m, 2**bits, dim // m), float32
        The codewords of (rotated) vectors; None before `fit`.
    rotation_matrix : numpy array of shape (dim, dim), float32, or None
        R: the rows of `x @ R.T` are cut and coded.
    code_size : int
        Bytes of a code.
    nbytes : int
        Bytes of codebooks and rotation.

    References
    ----------
    Jegou, Douze and Schmid (2011): Product quantization for nearest neighbor search, sections II and III. Ge, He, Ke
    and Sun (2014): Optimized product quantization, sections 3 and 4 (rotation="opq"). Guo et al. (2020):
    Accelerating large-scale inference with anisotropic vector quantization, sections 3 and 4.2 (loss="anisotropic").
    Andre, Kermarrec and Le Scouarnec (2015): Cache locality is not enough, section 4 (`search`: tables in registers).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.random.default_rng(0).standard_normal((1000, 32), np.float32)
    >>> pq = pv.quantize.ProductQuantizer(32, 8, metric="l2").fit(x)
    >>> codes = pq.encode(x)
    >>> codes.shape, codes.dtype
    ((1000, 8), dtype('uint8'))
    >>> scores, ids = pq.search(x[:2], codes, 10)
    >>> ids[:, 0].tolist()
    [0, 1]
    """

    _KIND = "quantize.ProductQuantizer"
    _PARAMS = ("dim", "m", "bits", "metric", "rotation", "loss", "threshold", "seed")

    def __init__(
        self,
        dim: int,
        m: int,
        *,
        bits: int = 8,
        metric: str = "ip",
        rotation: str | None = None,
        loss: str = "squared",
        threshold: float = 0.2,
        seed: int = 0,
    ) -> None:
        op = self._KIND
        self.dim = as_count(op, "dim", dim)
        self.m = as_count(op, "m", m)
        if self.dim % self.m:
            raise ValueError(f"{op}: m must divide dim ({self.dim}), got {self.m}")
        self.bits: int = choice(op, "bits", as_count(op, "bits", bits), (8, 4))
        self.metric: str = choice(op, "metric", metric, ("ip", "l2"))
        self.rotation: str | None = choice(op, "rotation", rotation, (None, "random", "opq"))
        self.loss: str = choice(op, "loss", loss, ("squared", "anisotropic"))
        if self.loss == "anisotropic" and self.metric != "ip":
            raise ValueError(f"{op}: loss must be 'squared' unless metric is 'ip', got 'anisotropic'")
        self.threshold = as_number(op, "threshold", threshold)
        if not 0 < self.threshold < 1:
            raise ValueError(f"{op}: threshold must be in (0, 1), got {threshold}")
        self.seed = as_count(op, "seed", seed, least=0)
        self.codebooks = None
        self.rotation_matrix: Any = None  # as codebooks

    @property
    def code_size(self) -> int:
        """Bytes of a code: m, or m / 2 rounded up with 4 bits."""
        return self.m if self.bits == 8 else (self.m + 1) // 2

    def __repr__(self) -> str:
        loss = f"loss={self.loss!r}, threshold={self.threshold}, " if self.loss == "anisotropic" else ""
        return (
            f"ProductQuantizer({self.dim}, {self.m}, bits={self.bits}, metric={self.metric!r}, "
            f"rotation={self.rotation!r}, {loss}seed={self.seed}){'' if self._is_fitted() else ', not fitted'}"
        )

    def fit(
        self,
        x: Any,
        *,
        max_iter: int = 25,
        train_size: int | None = None,
        progress: Progress = None,
        num_threads: int | None = None,
    ) -> ProductQuantizer:
        """Find the codebooks (and the rotation) for vectors like these.

        Parameters
        ----------
        x : array of shape (n, dim), float32 | float16 | bfloat16
            At least 2^bits rows. Of a memory map only the rows that are drawn are read.
        max_iter : int
            Iterations of k-means in each subspace.
        train_size : int, optional
            Fit to this many random rows at most; 256 rows a codeword, 256 * 2^bits, when None.
        progress : None, bool or callable
            True shows a bar; a callable is called with (done, total) iterations.
        num_threads : int, optional

        Returns
        -------
        ProductQuantizer
            Itself.

        Raises
        ------
        ValueError
            Too few rows, rows of another width, NaN or Inf in the rows that are drawn.

        Notes
        -----
        2 train_size 2^bits dim flops an iteration. "opq" alternates 20 times between one such iteration and the best
        rotation for the codes it gave (a dim x dim singular value decomposition), from a rotation that spreads the
        principal directions evenly over the subspaces. "anisotropic" then alternates 10 times between the codes for the
        codebooks (as of `encode`) and, subspace by subspace, the codebooks for the codes (2 train_size dim^2 / m
        flops): its loss never rises.
        """
        op = f"{self._KIND}.fit"
        max_iter = as_count(op, "max_iter", max_iter)
        codewords = 1 << self.bits
        rng = np.random.default_rng(self.seed)
        rows = self._training_rows(op, x, train_size, rng, num_threads)

        rounds = (_OPQ_ROUNDS + 2) * (self.rotation == "opq") + _LOSS_ROUNDS * (self.loss == "anisotropic")
        with reporting(op, progress, rounds + max_iter, "iterations") as report:
            rotation, start = None, None
            if self.rotation == "random":
                rotation = np.linalg.qr(rng.standard_normal((self.dim, self.dim)))[0].astype(np.float32)
            elif self.rotation == "opq":
                rotation, start = self._optimized_rotation(op, rows, rng, report, num_threads)
            pieces = self._cut(rows, rotation)
            if start is None:
                start = seed_centroids(op, pieces, codewords, "l2", "k-means++", rng, num_threads)
            centroids, _, _, _ = lloyd(op, pieces, start, "l2", max_iter, 1e-4, report, num_threads, label=False)
            if self.loss == "anisotropic":
                self._reduce_loss(op, pieces, centroids, report, num_threads)
        self.codebooks, self.rotation_matrix = centroids, rotation
        return self

    def _optimized_rotation(
        self, op: str, rows: Floats, rng: np.random.Generator, report: Any, num_threads: int | None
    ) -> tuple[Floats, Floats]:
        """Return a rotation and codebooks, each the best for the other in turn (Ge et al. 2014, section 3.2)."""
        codewords = 1 << self.bits
        labels, inertia = np.empty((self.m, len(rows)), np.int64), np.empty(self.m)

        def move(codebooks: Any, pieces: Any) -> Any:
            updated = np.empty_like(codebooks)
            step(op, pieces, codebooks, labels, inertia, updated, "l2", num_threads)
            report(1)
            return updated

        starts = []
        for rotation in (np.eye(self.dim, dtype=np.float32), _spread_principal_directions(rows, self.m)):
            pieces = self._cut(rows, rotation)
            codebooks = move(seed_centroids(op, pieces, codewords, "l2", "k-means++", rng, num_threads), pieces)
            starts.append((inertia.sum(), rotation, codebooks))
        _, rotation, codebooks = min(starts, key=lambda start: start[0])
        for _ in range(_OPQ_ROUNDS):
            codebooks = move(codebooks, self._cut(rows, rotation))
            decoded = np.take_along_axis(codebooks, labels[:, :, None], 1).transpose(1, 0, 2).reshape(rows.shape)
            left, _, right = np.linalg.svd((decoded.T @ rows).astype(np.float64))
            rotation = (left @ right).astype(np.float32)
        return rotation, codebooks

    def _reduce_loss(self, op: str, pieces: Floats, codebooks: Floats, report: Any, threads: Any) -> None:
        """Alternate between codes and codebooks, each the better for the other (Guo et al. 2020, section 4.2)."""
        rows = np.ascontiguousarray(pieces.transpose(1, 0, 2).reshape(pieces.shape[1], -1))
        codes = np.empty((len(rows), self.code_size), np.uint8)
        _backend.run(op, "quantize_pq_encode", rows, rows, codebooks, codes, num_threads=threads)
        for _ in range(_LOSS_ROUNDS):
            _backend.run(op, "quantize_pq_improve", rows, rows, codebooks, codes, self._weight, num_threads=threads)
            _backend.run(op, "quantize_pq_move", pieces, pieces, codes, codebooks, self._weight, num_threads=threads)
            report(1)

    @property
    def _weight(self) -> float:
        """What the part of an error along its vector counts beyond the rest: h - 1."""
        ratio = self.threshold**2 / (1 - self.threshold**2)
        return max(0.0, (self.dim - 1) * ratio - 1)

    def encode(
        self, x: ArrayT, *, out: ArrayT | None = None, progress: Progress = None, num_threads: int | None = None
    ) -> ArrayT:
        """Return the code of each vector: the nearest codeword of every subspace, or what the loss prefers to it.

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
            With 4 bits, byte j holds subspace 2 j in its low and 2 j + 1 in its high four bits.

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Rows of another width, NaN or Inf.

        Notes
        -----
        2 2^bits dim flops a vector, float32 sums; twice that and 5 2^bits m flops a pass for "anisotropic", which from
        the nearest codewords on improves one subspace after the other until none changes, in 10 passes at most. Codes
        do not depend on num_threads, nor, with pieces of up to 16 elements, on the instruction-set level. Needs 64 MB
        beside x and the codes, twice that with a rotation.
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

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Codes of another size.
        """
        op = f"{self._KIND}.decode"
        table, out = self._decode_arguments(op, codes, out)
        rows = np.asarray(out)
        _backend.run(op, "quantize_pq_decode", table, table, self.codebooks, rows, num_threads=num_threads)
        if self.rotation_matrix is not None:
            for begin in range(0, len(rows), self._rows_at_once):
                block = slice(begin, begin + self._rows_at_once)
                rows[block] = rows[block] @ self.rotation_matrix
        return out

    def search(
        self,
        queries: Any,
        codes: Any,
        k: int,
        *,
        include: Any = None,
        out: tuple[Any, Any] | None = None,
        num_threads: int | None = None,
    ) -> tuple[Any, Any]:
        """Return the k codes that score best against each query, without decoding them.

        Parameters
        ----------
        queries : array of shape (nq, dim), float32 | float16 | bfloat16, or BlockSparse
        codes : array of shape (n, code_size), uint8, or PackedCodes
            Other codes than packed ones are packed on the way, block by block: several times slower for one query, a
            few percent for many.
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
        Asymmetric: queries are not quantised. A query's table holds the score of each codeword with its piece (2
        2^bits dim flops); a code's score is the float32 sum of its entries in the order of the subspaces. Where tables
        fit registers (4 bits; 8 bits with AVX-512 VBMI, with AVX2 for up to 7 queries) the scan adds entries rounded
        down to 8 bits. A sum of m of them is off by less than m steps, a step being 1/255 of the widest table (with
        AVX2 of the widest four together): the few codes that this leaves open are scored in float32, so that scores and
        order are exact nevertheless. With metric "ip", subspaces in which a query is zero are neither tabulated nor
        read: sparse queries over long codes (FDEs) cost as much as they have non-zero pieces. Batches share the codes:
        m bytes (4 bits: m / 2) of traffic a code for 16 queries. A query's result does not depend on the other queries,
        on packing, nor on num_threads. Reads its arguments only; several threads may call it at once.
        """
        op = f"{self._KIND}.search"
        if isinstance(queries, BlockSparse):
            queries = queries.to_dense()
        rows, table, taking_part, out = self._search_arguments(op, queries, codes, k, include, out)
        rows = self._rotated(rows)
        _backend.run(
            op, "quantize_pq_search", rows,
            rows, table, len(codes), self.codebooks, taking_part, *out, self.metric == "l2",
            num_threads=num_threads,
        )  # fmt: skip
        return out

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        turned = {} if self.rotation is None else {"rotation_matrix": (self.dim, self.dim)}
        return {"codebooks": (self.m, 1 << self.bits, self.dim // self.m), **turned}

    def _encode(self, op: str, rows: Floats, codes: Any, num_threads: int | None) -> None:
        rows = self._rotated(rows)
        _backend.run(op, "quantize_pq_encode", rows, rows, self.codebooks, codes, num_threads=num_threads)
        if self.loss == "anisotropic":
            _backend.run(
                op, "quantize_pq_improve", rows, rows, self.codebooks, codes, self._weight, num_threads=num_threads
            )

    def _rotated(self, x: Floats) -> Floats:
        return x if self.rotation_matrix is None else x @ self.rotation_matrix.T

    def _cut(self, x: Floats, rotation: Floats | None) -> Floats:
        """Return the pieces (m, n, dim // m) of the rotated rows."""
        if rotation is not None:
            x = x @ rotation.T
        return np.ascontiguousarray(x.reshape(len(x), self.m, -1).transpose(1, 0, 2))


def _spread_principal_directions(x: Floats, m: int) -> Floats:
    """Return the rotation onto the principal directions, dealt to m subspaces so that their variances multiply alike.

    Largest first, each direction goes to the subspace whose variances have the smallest product so far and which has
    room (Ge et al. 2014, section 4.2).
    """
    centred = x - x.mean(0)
    variances, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    logs = np.log(np.maximum(variances, 1e-9 * variances[-1] + 1e-30))  # ascending, as variances are
    subspaces: list[list[int]] = [[] for _ in range(m)]
    products = np.zeros(m)
    for direction in range(len(logs) - 1, -1, -1):
        room = [s for s in range(m) if len(subspaces[s]) < len(logs) // m]
        smallest = min(room, key=lambda s: products[s])
        subspaces[smallest].append(direction)
        products[smallest] += logs[direction] - logs[0]  # relative to the least, or it would lower the product
    rotation: Floats = directions.T[[i for s in subspaces for i in s]].astype(np.float32)
    return rotation
