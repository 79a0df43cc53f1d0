"""Fixed dimensional encodings (MUVERA): a set of vectors becomes one vector, so that inner-product search finds sets.

The inner product of a query's and a document's encoding approximates their MaxSim, times the number of repetitions.
Token sets are accepted in every form of `polyvec.maxsim`: a `polyvec.Ragged`, `(values, offsets)`, a list of (n_i, d)
arrays, or a padded (n, t, d) array, alone or with its lengths as `(padded, lengths)`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from polyvec import _backend, _core, _fde_dialects, _files
from polyvec._arrays import (
    as_array,
    as_count,
    as_ids,
    as_number,
    choice,
    device_name,
    empty,
    output,
    to_device_of,
    to_host,
)
from polyvec._block_sparse import BlockSparse
from polyvec._progress import Progress, reporting
from polyvec._ragged import Ragged, as_ragged

__all__ = ["Encoder", "carve"]

_KIND = "fde.Encoder"
_SETS_PER_REPORT = 1024  # a tenth of a second of work

Floats = npt.NDArray[np.float32]


class Encoder(_files.Saved):
    """Encodes token sets as vectors whose inner product approximates MaxSim, times `repetitions`.

    In each repetition r, hyperplanes cut the space into 2^simhash_bits buckets, by the bits j of a token where
    `<token, hyperplanes[r, :, j]> > 0`. Each bucket becomes one block of the encoding::

        query block     = sum of the bucket's tokens, 0 when there are none
        document block  = mean of the bucket's tokens; of an empty bucket the token that differs in the fewest bits
        encoding        = the blocks times projections[r], in the order [repetition][bucket][column]

    With `final_dim`, a count sketch shortens it: `out[index[i]] += sign[i] * encoding[i]`.

    Parameters
    ----------
    dim : int
        Width d of the tokens, which should have norm 1 or nearly so.
    repetitions : int
        R. More are better, and cost output.
    simhash_bits : int
        Hyperplanes a repetition, 0 to 16.
    projection_dim : int or None
        Columns that a block is projected to. None: blocks keep the tokens' dim columns; so do dim or more with the
        dialects "paper" and "fastembed".
    final_dim : int, optional
        Width of the encoding after the count sketch; none when None.
    fill_empty : bool
        Fill the empty buckets of documents; they are 0 otherwise.
    seed : int
        Draws the matrices that are not given, as the dialect says.
    dialect : {"paper", "google", "fastembed", "weaviate", "opensearch", "muvera-py"}
        Whose bucket ids, ties and matrices: see Notes. Encodings of different dialects do not go together.
    hyperplanes : array of shape (R, dim, simhash_bits), float32, optional
    projections : array of shape (R, dim, projection_dim), float32, optional
        Used as they are: any scale is the caller's.
    final_projection : (index, sign), arrays of shape (n,), integer and float32, optional

    Attributes
    ----------
    output_dim : int
        Width of an encoding: final_dim, or R * 2^simhash_bits * projection_dim.
    hyperplanes : numpy array of shape (R, dim, simhash_bits), float32, read-only
    projections : numpy array of shape (R, dim, projection_dim), float32, read-only; or None
    final_projection : (index int32, sign float32), numpy arrays of shape (n,), read-only; or None

    Raises
    ------
    ValueError
        A size out of range, a matrix of another shape or with NaN or Inf, an unknown dialect.
    IndexError
        An entry of final_projection's index outside [0, final_dim).
    TypeError
        Matrices of another dtype.

    Notes
    -----
    Encodings are not divided by R, as in the paper: an inner product is about R times the MaxSim, and the ranking is
    the same. Bucket ids are those of float64 arithmetic: signs too close to 0 for float32 are decided there. All else
    is summed in float32. Immutable, so that threads may share an encoder.

    In every dialect values are summed in float32, a token set without tokens is 0, and `fill_empty` and given matrices
    are as above; the dialects say the rest, and equal their originals up to float32 rounding:

    "paper"
        Bit j of a bucket's id is the sign at plane j. Of tokens equally near, an empty bucket takes the first. One
        `numpy.random.default_rng(seed)` draws `standard_normal((R, dim, simhash_bits))`, then
        `choice([-1, 1], (R, dim, projection_dim)) / sqrt(projection_dim)`, then the sketch: index
        `integers(0, final_dim, n)` and sign `choice([-1, 1], n)`, n the length before it.
    "google"
        google/graph-mining: buckets in Gray-code order; projections without scale that add each input dimension, with
        a sign, to one column. Repetition r draws its matrices from `std::mt19937(seed + r)` with the distributions of
        libstdc++ (GCC 11 or newer), the sketch from `std::mt19937(seed)`: equal to those compiled here, entry by entry.
        The original's logarithms may differ in the last bit on other C libraries.
    "fastembed"
        `Muvera(dim, random_seed=seed)`: as "paper", but of tokens equally near, an empty bucket takes the first one of
        the bucket of lowest id. The hyperplanes are rounded to float32, which fastembed keeps in float64.
    "weaviate"
        Ids and ties as "paper", always projected. Weaviate's one seed is `seed=0`. The generator equals Go's published
        values; not compared with a running Weaviate, nor is its overflow at 65,536 tokens a bucket reproduced.
    "opensearch"
        Ties as "fastembed", always projected, drawn from `java.util.Random(seed)`: equal to Java's, but which draw is
        which entry changed between revisions of k-NN's proposed encoder; this is the latest one read, [R][row][dim].
    "muvera-py"
        sionic-ai/muvera-py, and its ports: as "google", from `numpy.random.default_rng(seed + r)`. It reproduces their
        bug: to fill an empty bucket, its Gray code is inverted by applying it once more, and the token nearest to that
        other bucket is taken (28 of 32 buckets differ at 5 bits). To compare with them only.

    Google's, Weaviate's, OpenSearch's and muvera-py's own form of the final sketch is the count sketch, or none: where
    there is none, `default_rng(seed)` draws it as in "paper".

    References
    ----------
    MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings (Dhulipala et al. 2024), section 2; it recommends
    (repetitions, simhash_bits, projection_dim) = (20, 5, 16), (20, 4, 8) or (20, 3, 8), or without projection
    (40, 6, None) and final_dim=10240.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> encoder = pv.fde.Encoder(4, repetitions=3, simhash_bits=2, projection_dim=2)
    >>> encoder
    Encoder(dim=4, repetitions=3, simhash_bits=2, projection_dim=2, output_dim=24, dialect='paper')
    >>> tokens = np.eye(4, dtype=np.float32)
    >>> encoder.encode_docs([tokens, tokens[:1]]).shape
    (2, 24)
    """

    _KIND = _KIND

    def __init__(
        self,
        dim: int,
        *,
        repetitions: int = 20,
        simhash_bits: int = 5,
        projection_dim: int | None = 16,
        final_dim: int | None = None,
        fill_empty: bool = True,
        seed: int = 0,
        dialect: str = "paper",
        hyperplanes: Any = None,
        projections: Any = None,
        final_projection: tuple[Any, Any] | None = None,
    ) -> None:
        op = _KIND
        self.dim = as_count(op, "dim", dim)
        self.repetitions = as_count(op, "repetitions", repetitions)
        self.simhash_bits = as_count(op, "simhash_bits", simhash_bits, least=0)
        self.dialect = str(choice(op, "dialect", dialect, tuple(_fde_dialects.DIALECTS)))
        self._rules = _fde_dialects.DIALECTS[self.dialect]
        self.projection_dim = None if projection_dim is None else as_count(op, "projection_dim", projection_dim)
        if self.projection_dim is not None and self.projection_dim >= self.dim and not self._rules.wide:
            self.projection_dim = None
        if self.simhash_bits > 16:
            raise ValueError(f"{op}: simhash_bits must be at most 16, got {simhash_bits}")
        self.final_dim = None if final_dim is None else as_count(op, "final_dim", final_dim)
        self.fill_empty = bool(fill_empty)
        if projections is not None and self.projection_dim is None:
            raise ValueError(
                f"{op}: projections must be None without a projection_dim below dim ({self.dim}), "
                f"got shape {tuple(np.shape(projections))}"
            )
        if final_projection is not None and self.final_dim is None:
            raise ValueError(
                f"{op}: final_projection must be None without a final_dim, got {type(final_projection).__name__}"
            )

        seed = as_count(op, "seed", seed, least=0)
        shape = _fde_dialects.Shape(self.repetitions, self.dim, self.simhash_bits, self.projection_dim, self.final_dim)
        missing = (
            hyperplanes is None
            or (projections is None and self.projection_dim is not None)
            or (final_projection is None and self.final_dim is not None)
        )
        drawn = self._rules.draw(seed, shape) if missing else (None, None, None)
        self.hyperplanes = _matrix("hyperplanes", hyperplanes, drawn[0], shape[:3])
        self.projections: Floats | None = None
        if self.projection_dim is not None:
            wanted = self.repetitions, self.dim, self.projection_dim
            self.projections = _matrix("projections", projections, drawn[1], wanted)
        self.final_projection: tuple[npt.NDArray[np.int32], Floats] | None = None
        index: Any = None
        sign: Any = None
        if self.final_dim is not None:
            index, sign = _sketch(final_projection, drawn[2], shape.long_dim)
        words, sources = _fde_dialects.sign_words(self.simhash_bits, self._rules)
        self._matrices = _core.FdeMatrices(
            self.hyperplanes, self.projections, index, sign, self.final_dim or 0, words, sources
        )
        if self.final_dim is not None:
            self.final_projection = _frozen(index.astype(np.int32)), sign
        self.output_dim: int = self._matrices.output_dim

    def encode_queries(
        self,
        tokens: Any,
        *,
        sparse: bool = False,
        dtype: str = "float32",
        out: Any = None,
        num_threads: int | None = None,
        progress: Progress = None,
    ) -> Any:
        """Encode queries: the blocks are sums of tokens, and empty buckets stay 0.

        Parameters
        ----------
        tokens : token sets, float32, width dim
        sparse : bool
            Return the blocks of the buckets that hold a token, and not the zeros of all others.
        dtype, out, num_threads, progress
            As for `encode_docs`; sparse encodings are float32 and take no `out`, as their size is not known before.

        Returns
        -------
        array of shape (n, output_dim), dtype; the tokens' library and device
            0 for a query without tokens. With "int8" a pair, as for `encode_docs`.
        BlockSparse of shape (n, output_dim), if sparse
            Its blocks are those of the buckets. `to_dense()` has the bits of the dense encodings.

        Raises
        ------
        ValueError
            Tokens of another width, offsets that run backwards, an `out` of another shape; sparse encodings with a
            final_dim, which leaves no zeros, with an `out` or another dtype.
        TypeError
            Tokens that are not float32.

        Notes
        -----
        As for `encode_docs`. Of a query of 32 ColBERTv2 tokens, about 53, 34 and 21 % of the blocks hold a token at 4,
        5 and 6 simhash_bits. Sparse encodings on a GPU wait once for the number of their blocks.

        References
        ----------
        MUVERA (Dhulipala et al. 2024), section 2, equation of the query encoding.

        Examples
        --------
        >>> import numpy as np, polyvec as pv
        >>> tokens = np.ones((1, 3, 4), np.float32)
        >>> encoder = pv.fde.Encoder(4, repetitions=1, simhash_bits=0, projection_dim=None)
        >>> encoder.encode_queries(tokens)
        array([[3., 3., 3., 3.]], dtype=float32)
        >>> encoder.encode_docs(tokens)
        array([[1., 1., 1., 1.]], dtype=float32)
        >>> pv.fde.Encoder(4).encode_queries(tokens, sparse=True)
        BlockSparse(1 rows, 20 blocks of 4, d=2560)
        """
        op = "fde.Encoder.encode_queries"
        if not sparse:
            return self._encode(op, tokens, dtype, out, num_threads, progress, docs=False)
        if dtype != "float32":
            raise ValueError(f"{op}: dtype must be float32 with sparse=True, got {dtype}")
        if self.final_dim is not None:
            raise ValueError(f"{op}: sparse must be False with a final_dim, got final_dim={self.final_dim}")
        if out is not None:
            raise ValueError(f"{op}: out must be None with sparse=True, got {type(out).__name__}")
        return self._encode_sparse(op, tokens, num_threads, progress)

    def encode_docs(
        self,
        tokens: Any,
        *,
        dtype: str = "float32",
        out: Any = None,
        num_threads: int | None = None,
        progress: Progress = None,
    ) -> Any:
        """Encode documents: the blocks are means of tokens, and empty buckets are filled.

        Parameters
        ----------
        tokens : token sets, float32, width dim
        dtype : {"float32", "float16", "int8"}
            What encodings are rounded to, in half or a quarter of the memory; `scan` searches all three. In "int8" a
            row has its own scale, its largest absolute value / 127.
        out : array of shape (n, output_dim), dtype, optional
            Written and returned; with "int8" a pair of it and a float32 array of shape (n,). It may be a
            `numpy.memmap`: with `progress`, it is filled 1024 sets at a time.
        num_threads : int, optional
            CPU threads; the process setting when None.
        progress : bool or callable, optional
            True: a progress bar. A callable is called with (done, total).

        Returns
        -------
        array of shape (n, output_dim), dtype; the tokens' library and device
            0 for a document without tokens.
        scales : array of shape (n,), float32, if "int8"
            An encoding is its row times its scale: `scan.topk(queries, codes, k, scales=scales)`.

        Raises
        ------
        ValueError
            Tokens of another width, offsets that run backwards, an `out` of another shape; on a CPU, encodings beyond
            65504 in float16 or not finite in int8.
        TypeError
            Tokens that are not float32.

        Notes
        -----
        With T tokens and B = 2^simhash_bits buckets: 2 T d R simhash_bits flops for the signs, T d R additions, and
        at most 2 min(B, 2 T) d R projection_dim flops for the projections, since tokens are summed before they are
        projected, and a token that fills several buckets is projected once. The encoding before a final sketch is
        never stored. A NaN or Inf in a token reaches its set's encoding, and no other. Bits do not depend on the number
        of threads, nor on the other sets of the call.

        On a GPU nothing waits for values: encodings beyond 65504 are infinite in float16, and a row that is not finite
        has the scale NaN in int8. The first call there copies the matrices to the device and waits for that.

        References
        ----------
        MUVERA (Dhulipala et al. 2024), section 2, equation of the document encoding, fill_empty_clusters and final
        projections.

        Examples
        --------
        >>> import numpy as np, polyvec as pv
        >>> encoder = pv.fde.Encoder(4, repetitions=2, simhash_bits=1, projection_dim=None)
        >>> encoder.encode_docs([np.ones((1, 4), np.float32), np.ones((0, 4), np.float32)]).sum(1)
        array([16.,  0.], dtype=float32)
        >>> codes, scales = encoder.encode_docs([np.ones((1, 4), np.float32)], dtype="int8")
        >>> pv.scan.topk(encoder.encode_queries(np.ones((1, 2, 4), np.float32)), codes, 1, scales=scales)[1]
        array([[0]])
        """
        return self._encode("fde.Encoder.encode_docs", tokens, dtype, out, num_threads, progress, docs=True)

    def _encode(
        self, op: str, tokens: Any, dtype: str, out: Any, num_threads: int | None, progress: Progress, *, docs: bool
    ) -> Any:
        sets = as_ragged(op, "tokens", tokens, dim=self.dim)
        choice(op, "dtype", dtype, ("float32", "float16", "int8"))
        n, scaled = len(sets), dtype == "int8"
        if scaled and not (out is None or (isinstance(out, tuple) and len(out) == 2)):
            raise TypeError(f"{op}: out must be a pair of arrays (codes, scales) in int8, got {type(out).__name__}")
        rows, scales = (None, None) if out is None else out if scaled else (out, None)
        rows = output(op, rows, sets.values, (n, self.output_dim), dtype)
        scales = output(op, scales, sets.values, (n if scaled else 0,), "float32", name="out scales")
        fill, lowest_bucket = docs and self.fill_empty, self._rules.lowest_bucket
        step = _SETS_PER_REPORT if progress else max(1, n)
        with reporting(op, progress, n, "documents" if docs else "queries") as report:
            for first in range(0, n, step):
                part = slice(first, first + step)
                some = sets if step >= n else _sets_of(sets, part)
                _backend.run(
                    op, "fde_encode", some.values, self._matrices, some.values, some.placed_offsets, rows[part],
                    scales[part], docs, fill, lowest_bucket, num_threads=num_threads,
                )  # fmt: skip
                report(len(some))
        return (rows, scales) if scaled else rows

    def _encode_sparse(self, op: str, tokens: Any, num_threads: int | None, progress: Progress) -> BlockSparse:
        sets = as_ragged(op, "tokens", tokens, dim=self.dim)
        n, width = len(sets), self.projection_dim or self.dim
        ids = self.partition(sets.values, num_threads=num_threads)
        on_gpu = device_name(sets.values) != "cpu"

        def run(function: str, some: Ragged, ids: Any, *arrays: Any) -> None:
            values, offsets = some.values, some.placed_offsets
            _backend.run(op, function, values, self._matrices, values, offsets, ids, *arrays, num_threads=num_threads)

        counts = empty(sets.values, (n,), "int64") if on_gpu else np.empty(n, np.int64)
        run("fde_count_blocks", sets, ids, counts)
        bounds = np.concatenate([[0], np.cumsum(to_host(counts))])  # waits for a GPU: the size depends on it
        total = int(bounds[-1])
        found = empty(sets.values, (total, width), "float32")
        blocks = empty(sets.values, (total,), "int32") if on_gpu else np.empty(total, np.int32)
        with reporting(op, progress, n, "queries") as report:
            step = _SETS_PER_REPORT if progress else max(1, n)
            for first in range(0, n, step):
                end = min(first + step, n)
                some = sets if step >= n else _sets_of(sets, slice(first, end))
                tokens = ids if step >= n else ids[int(sets.offsets[first]) : int(sets.offsets[end])]
                rows = slice(int(bounds[first]), int(bounds[end]))
                some_bounds = _placed(sets.values, bounds[first : end + 1] - rows.start)
                run("fde_encode_blocks", some, tokens, some_bounds, found[rows], blocks[rows])
                report(end - first)
        if on_gpu:
            return BlockSparse.on_device(found, blocks, (bounds, _placed(found, bounds)), self.output_dim)
        return BlockSparse(found, blocks, bounds, self.output_dim)

    def partition(self, tokens: Any, *, out: Any = None, num_threads: int | None = None) -> Any:
        """Return the bucket of each token in each repetition.

        Parameters
        ----------
        tokens : array of shape (T, dim), float32
        out : array of shape (T, R), int32, optional
            Written and returned.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        array of shape (T, R), int32; the tokens' library and device
            Bucket ids in [0, 2^simhash_bits). Bit j is 1 where `<token, hyperplanes[r, :, j]> > 0` in float64; in the
            dialects "google" and "muvera-py", these bits, the first plane's the highest, are the id's Gray code.

        Raises
        ------
        ValueError
            Tokens of another rank or width, an `out` of another shape.
        TypeError
            Tokens that are not float32.

        Notes
        -----
        2 d R simhash_bits flops a token.

        References
        ----------
        MUVERA (Dhulipala et al. 2024), section 2: SimHash as the partition of the space.

        Examples
        --------
        >>> import numpy as np, polyvec as pv
        >>> planes = np.eye(3, dtype=np.float32)[None]  # bit j of the one repetition: the sign of entry j
        >>> encoder = pv.fde.Encoder(3, repetitions=1, simhash_bits=3, projection_dim=None, hyperplanes=planes)
        >>> encoder.partition(np.array([[0, 0, 0], [1, -1, 1]], np.float32))
        array([[0],
               [5]], dtype=int32)
        """
        op = "fde.Encoder.partition"
        rows = as_array(op, "tokens", tokens, ndim=2)
        out = output(op, out, rows, (int(rows.shape[0]), self.repetitions), "int32")
        _backend.run(op, "fde_partition", rows, self._matrices, rows, out, num_threads=num_threads)
        return out

    def state(self) -> _files.State:
        """Return what `save` writes.

        Returns
        -------
        State
            The matrices, and the parameters but `seed`.
        """
        tensors: dict[str, npt.NDArray[Any]] = {"hyperplanes": self.hyperplanes}
        if self.projections is not None:
            tensors["projections"] = self.projections
        if self.final_projection is not None:
            tensors["sketch_index"], tensors["sketch_sign"] = self.final_projection
        names = ("dim", "repetitions", "simhash_bits", "projection_dim", "final_dim", "fill_empty", "dialect")
        return _files.State(tensors, {**{name: getattr(self, name) for name in names}, "matrices": self.matrices_hash})

    @property
    def matrices_hash(self) -> str:
        """XXH3 of the dialect and all matrices: encoders of one hash and one `fill_empty` encode to the same bits."""
        return _files.digest_of_all(self.dialect, self.hyperplanes, self.projections, *(self.final_projection or ()))

    @classmethod
    def from_state(cls, state: _files.State) -> Encoder:
        """Build an encoder from a state: the matrices are those of the state, whatever numpy draws today.

        Parameters
        ----------
        state : State
            As `state` returned it.

        Returns
        -------
        Encoder
        """
        matrices: dict[str, Any] = {"hyperplanes": state.tensors["hyperplanes"]}
        if state.params["projection_dim"] is not None:
            matrices["projections"] = state.tensors["projections"]
        if state.params["final_dim"] is not None:
            matrices["final_projection"] = state.tensors["sketch_index"], state.tensors["sketch_sign"]
        options = {name: value for name, value in state.params.items() if name != "matrices"}
        encoder = cls(**options, **matrices)
        if encoder.matrices_hash != state.params["matrices"]:
            raise ValueError(f"matrices_hash must be {state.params['matrices']}, got {encoder.matrices_hash}")
        return encoder

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder.from_state, (self.state(),)

    def __repr__(self) -> str:
        names = ("dim", "repetitions", "simhash_bits", "projection_dim", "output_dim")
        return f"Encoder({', '.join(f'{name}={getattr(self, name)}' for name in names)}, dialect={self.dialect!r})"


def carve(queries: Any, *, threshold: float = 0.7, num_threads: int | None = None) -> Ragged:
    """Replace the tokens of each query that lie close together by their sum: fewer tokens, nearly the same MaxSim.

    Ball carving: the first token left takes every token left whose product with it is at least `threshold`, and itself;
    this is repeated until none is left. A query of fewer tokens is scored in proportionally less time.

    Parameters
    ----------
    queries : token sets, float32
    threshold : float
        A product, so a cosine where tokens have norm 1. Above their largest product every token stays.
    num_threads : int, optional
        CPU threads; the process setting when None. The result does not depend on it.

    Returns
    -------
    Ragged
        The sums of the balls of each query, in the order of their first tokens; the queries' library.

    Raises
    ------
    ValueError
        A threshold that is NaN, offsets that run backwards.
    TypeError
        Tokens that are not float32, a threshold that is not a number.

    Notes
    -----
    At most n^2 d flops a query of n tokens; threads share queries, and the products of a very long one. Products and
    sums are accumulated in float64: balls are the same at every instruction-set level. A token with NaN is a ball of
    its own. Of 32 ColBERTv2 tokens 9 to 15 are left. On a GPU it waits once, for the number of balls.

    References
    ----------
    MUVERA (Dhulipala et al. 2024), section 3.2: ball carving.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> query = np.float32([[1, 0], [0, 1], [0.75, 0.5]])
    >>> pv.fde.carve([query]).values.tolist()
    [[1.75, 0.5], [0.0, 1.0]]
    """
    op = "fde.carve"
    sets = as_ragged(op, "queries", queries)
    tokens = as_array(op, "queries", sets.values, ndim=2)
    threshold = as_number(op, "threshold", threshold)
    ids, offsets = empty(tokens, (int(tokens.shape[0]),), "int32"), sets.placed_offsets
    counts = np.empty(len(sets), np.int64) if device_name(tokens) == "cpu" else empty(tokens, (len(sets),), "int64")
    where: dict[str, Any] = {"num_threads": num_threads}
    _backend.run(op, "fde_carve", tokens, tokens, offsets, threshold, ids, counts, **where)
    bounds = np.concatenate([[0], np.cumsum(to_host(counts))])
    sums = empty(tokens, (int(bounds[-1]), sets.dim), "float32")
    _backend.run(op, "fde_sum_balls", tokens, tokens, offsets, ids, _placed(tokens, bounds), sums, **where)
    return Ragged(sums, bounds)


def _placed(like: Any, x: npt.NDArray[Any]) -> Any:
    """Return a numpy array where the device of `like` reads it."""
    return x if device_name(like) == "cpu" else to_device_of(like, x)


def _sets_of(sets: Ragged, part: slice) -> Ragged:
    """Return a part of the sets as a view."""
    offsets = sets.offsets[part.start : part.stop + 1]
    return Ragged(sets.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])


def _frozen(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    x.flags.writeable = False
    return x


def _matrix(name: str, given: Any, drawn: Any, shape: tuple[int, ...]) -> Floats:
    """Return a read-only copy of the given matrix after checking its shape, and that it is finite; or the drawn one."""
    if given is None:
        return _frozen(np.ascontiguousarray(drawn, np.float32))
    matrix: Floats = np.asarray(as_array(_KIND, name, given)).copy()
    if matrix.shape != shape:
        raise ValueError(f"{_KIND}: {name} must have shape {shape}, got {matrix.shape}")
    _backend.require_finite(_KIND, name, matrix)
    return _frozen(matrix)


def _sketch(given: Any, drawn: Any, n: int) -> tuple[npt.NDArray[np.int64], Floats]:
    if given is None:
        return drawn[0], _matrix("", None, drawn[1], (n,))
    if not (isinstance(given, tuple) and len(given) == 2):
        raise TypeError(f"{_KIND}: final_projection must be a pair (index, sign), got {type(given).__name__}")
    index = np.asarray(as_ids(_KIND, "final_projection index", given[0]))
    if index.shape != (n,):
        raise ValueError(f"{_KIND}: final_projection index must have shape {(n,)}, got {index.shape}")
    return index, _matrix("final_projection sign", given[1], None, (n,))
