"""Codes that are searched first and vectors that decide: public as `polyvec.quantize.Refined`."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from polyvec import _backend, _files
from polyvec._arrays import as_count, as_float32, as_selection, choice, dtype_name, is_array, outputs
from polyvec._codec import Floats
from polyvec._codes import IntegerCodec
from polyvec._files import Saved, State
from polyvec._progress import Progress, reporting

_BLOCK_ROWS = 1 << 14
_BLOCK_CANDIDATES = 1 << 20  # rescored at a time
_FAR = 32  # vectors of which codes lost most: one of them alone would spoil the bound for all
_MOST_BY_CODE = 1 / 32  # of all vectors, as candidates: more of them cost what comparing with all does
_CODECS = ("ProductQuantizer", "RaBitQ", "ResidualQuantizer", "ScalarQuantizer")


class RefinedCodes(NamedTuple):
    """What `Refined.encode` returns; a tuple with names.

    Parameters
    ----------
    codes : array of shape (n, code_size), uint8
        The codec's; `search` takes them packed as well.
    vectors : array of shape (n, dim), float32 | float16 | int8
        What decides.
    scales : array of shape (n,), float32, or None
        Of int8 vectors: a vector is its scale times the integers.
    bounds : array of shape (n, 2), float32, or None
        What `certified` needs: the norms of what the code lost and of what it kept, in its own scale.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.eye(4, dtype=np.float32)
    >>> encoded = pv.quantize.Refined(pv.quantize.RaBitQ(4), rerank="int8").fit(x).encode(x)
    >>> encoded.vectors.dtype, encoded.bounds
    (dtype('int8'), None)
    """

    codes: Any
    vectors: Any
    scales: Any
    bounds: Any


class CertifiedResult(NamedTuple):
    """What `Refined.search` returns with `certified=True`.

    Parameters
    ----------
    scores : array of shape (nq, k), float32
    ids : array of shape (nq, k), int64
    rescored : array of shape (nq,), int64
        How many vectors were compared with the query.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.random.default_rng(0).standard_normal((500, 8), np.float32)
    >>> codec = pv.quantize.Refined(pv.quantize.ScalarQuantizer(8), factor=4).fit(x)
    >>> codec.search(x[:2], codec.encode(x), 1, certified=True).rescored
    array([4, 4])
    """

    scores: Any
    ids: Any
    rescored: Any


class Refined(Saved):
    """A codec that finds `factor` times as many candidates, and vectors that put them in order.

    Parameters
    ----------
    codec : ScalarQuantizer | RaBitQ | ProductQuantizer | ResidualQuantizer
        Finds the candidates; `metric` and `dim` are its own.
    rerank : {"float32", "float16", "int8"}
        How the vectors are kept: 4, 2 or 1 bytes an element (and 4 a vector with "int8").
    factor : int
        Candidates for each result asked for.

    Attributes
    ----------
    nbytes : int
        Bytes of what `fit` found.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.random.default_rng(0).standard_normal((1000, 32), np.float32)
    >>> codec = pv.quantize.Refined(pv.quantize.RaBitQ(32, bits=1), rerank="float16", factor=20).fit(x)
    >>> encoded = codec.encode(x)
    >>> scores, ids = codec.search(x[:2], encoded, 5)
    >>> bool(abs(scores[0, 0] - x[ids[0, 0]] @ x[0]) < 0.1)
    True
    """

    _KIND = "quantize.Refined"

    def __init__(self, codec: Any, *, rerank: str = "float32", factor: int = 10) -> None:
        op = self._KIND
        if type(codec).__name__ not in _CODECS:
            raise TypeError(f"{op}: codec must be {' or '.join(_CODECS)}, got {type(codec).__name__}")
        self.codec = codec
        self.rerank: str = choice(op, "rerank", rerank, ("float32", "float16", "int8"))
        self.factor = as_count(op, "factor", factor)

    @property
    def nbytes(self) -> int:
        """Bytes of what `fit` found."""
        return sum(int(tensor.nbytes) for tensor in self.codec.state().tensors.values())

    def __repr__(self) -> str:
        return f"Refined({self.codec!r}, rerank={self.rerank!r}, factor={self.factor})"

    def fit(self, x: Any, *, num_threads: int | None = None) -> Refined:
        """Fit the codec to vectors like these.

        Parameters
        ----------
        x : array of shape (n, dim), float32
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        Refined
            Itself.
        """
        self.codec.fit(x, num_threads=num_threads)
        return self

    def encode(self, x: Any, *, progress: Progress = None, num_threads: int | None = None) -> RefinedCodes:
        """Return the codes and the vectors as they are kept.

        Parameters
        ----------
        x : array of shape (n, dim), float32
            Or another dtype that the codec takes.
        progress : None, bool or callable
            True shows a bar; a callable is called with (done, total) rows.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        RefinedCodes
            numpy arrays. Slices of all parts belong together. With rerank="float32" and a codec of integers it has the
            bounds that `certified` needs.

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Rows of another width, NaN or Inf; with rerank="float16" also numbers beyond 65,504.
        TypeError
            Another dtype.
        """
        op = "quantize.Refined.encode"
        x = x if is_array(x) else np.asarray(x, np.float32)
        _require_float(op, "x", x)
        n, dim = len(x), self.codec.dim
        codes = np.empty((n, self.codec.code_size), np.uint8)
        vectors = np.empty((n, dim), self.rerank)
        scales = np.empty(n, np.float32) if self.rerank == "int8" else None
        certifiable = self.rerank == "float32" and isinstance(self.codec, IntegerCodec)
        bounds = np.empty((n, 2), np.float32) if certifiable else None
        with reporting(op, progress, n, "rows") as report:
            for begin in range(0, n, _BLOCK_ROWS):
                block = slice(begin, min(begin + _BLOCK_ROWS, n))
                rows = as_float32(x[block])
                codes[block] = self.codec.encode(rows, num_threads=num_threads)
                if scales is not None:
                    scales[block] = np.abs(rows).max(1) / 127
                    vectors[block] = np.rint(rows / np.maximum(scales[block], np.float32(1e-38))[:, None])
                else:
                    with np.errstate(over="ignore"):
                        vectors[block] = rows
                    _backend.require_finite(op, "x", vectors[block], num_threads, first_row=begin)
                if bounds is not None:
                    bounds[block] = self._bounds(rows, codes[block], num_threads)
                report(len(rows))
        return RefinedCodes(codes, vectors, scales, bounds)

    def decode(self, encoded: RefinedCodes) -> Floats:
        """Return the vectors as float32.

        Parameters
        ----------
        encoded : RefinedCodes

        Returns
        -------
        numpy array of shape (n, dim), float32
        """
        vectors = np.asarray(encoded.vectors).astype(np.float32)
        return vectors if encoded.scales is None else vectors * np.asarray(encoded.scales)[:, None]

    def search(
        self,
        queries: Any,
        encoded: RefinedCodes,
        k: int,
        *,
        certified: bool = False,
        include: Any = None,
        out: tuple[Any, Any] | None = None,
        num_threads: int | None = None,
    ) -> Any:
        """Return the best k of the codec's factor * k best, by their vectors.

        Parameters
        ----------
        queries : array of shape (nq, dim), float32 | float16 | bfloat16
        encoded : RefinedCodes
        k : int
        certified : bool
            Take more candidates until no other vector can be among the k best, whatever its code lost.
        include : bool array of shape (n,) or integer array of shape (m,), optional
            Which vectors take part, as of the codec's `search`.
        out : pair of arrays of shape (nq, k), float32 and int64, optional
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        scores, ids : arrays of shape (nq, k), float32 and int64, queries' library and device
            Scores of queries and vectors in float32, as of `scan.score_pairs`; best first, equal ones by smaller id.
            Missing ones: id -1, score -inf ("l2": inf). With `certified` a CertifiedResult, which also says how many
            vectors were compared.

        Raises
        ------
        RuntimeError
            Before `fit`.
        ValueError
            Shapes that do not fit, k below 1; with `certified` no bounds (only float32 vectors and codecs of integers
            have them), or queries with NaN or Inf.

        Notes
        -----
        A score by a code is at most |query| |what the code lost| and the rounding of the query off (Cauchy and
        Schwarz). When the last candidate's score and the largest such bound still reach the k-th best, the 32 vectors
        of which codes lost most become candidates as well, then four times as many are taken, and when that would be
        more than a 32nd of all, the query is compared with all vectors. RaBitQ of 8 bits certifies with the fewest (it
        clips no outliers); codes of 1 and 2 bits rarely do, and searches take as long as `scan.topk` then.
        """
        op = "quantize.Refined.search"
        if not isinstance(encoded, RefinedCodes):
            raise TypeError(f"{op}: encoded must be RefinedCodes, got {type(encoded).__name__}")
        k = as_count(op, "k", k)
        if not is_array(queries):
            queries = np.asarray(queries, np.float32)
        _require_float(op, "queries", queries)
        if certified and encoded.bounds is None:
            raise ValueError(f"{op}: encoded must have bounds, of float32 vectors and a codec of integers, got none")
        rows, n = as_float32(queries), len(encoded.codes)
        out = outputs(op, out, queries, (len(rows), k), ("float32", "int64"), ("scores", "ids"))
        scores, ids = np.asarray(out[0]), np.asarray(out[1])
        rescored, todo, wanted = np.zeros(len(rows), np.int64), np.arange(len(rows)), min(self.factor * k, max(n, 1))
        chosen = as_selection(op, "include", include, n)
        taking_part = n if chosen is None else len(np.arange(n)[chosen])
        far, largest = np.empty(0, np.int64), (0.0, 0.0)
        if certified:
            _backend.require_finite(op, "queries", rows, num_threads)
            largest = _largest(encoded.bounds)
        by_code, may_add_far = True, n > 2 * _FAR
        coarse, found = self.codec.search(rows, encoded.codes, wanted, include=chosen, num_threads=num_threads)
        while len(todo):
            candidates = _with(found, far)
            self._rescore(op, rows, encoded, todo, candidates, (scores, ids), num_threads)
            rescored[todo] = (candidates >= 0).sum(1) if by_code else taking_part
            if not certified or wanted >= n:
                break
            lacks = self._may_lack(rows[todo], coarse, found, scores[todo], largest)
            todo, coarse, found = todo[lacks], coarse[lacks], found[lacks]
            if not len(todo):
                break
            if may_add_far:
                may_add_far = False
                far, largest = _farthest(encoded.bounds, chosen)
                continue
            wanted *= 4
            if by_code and wanted > n * _MOST_BY_CODE:
                by_code, wanted, largest = False, 2 * k + 16, (0.0, 0.0)
            wanted = min(wanted, n)
            few = rows[todo]
            if by_code:
                coarse, found = self.codec.search(few, encoded.codes, wanted, include=chosen, num_threads=num_threads)
            else:
                coarse, found = self._nearest(op, few, encoded, wanted, chosen, num_threads)
        return CertifiedResult(*out, rescored) if certified else out

    def state(self) -> State:
        """Return what `save` writes.

        Returns
        -------
        State
            The codec's state and the parameters.

        Raises
        ------
        RuntimeError
            Before `fit`.
        """
        own = {"kind": type(self.codec).__name__, "rerank": self.rerank, "factor": self.factor}
        return _files.join(codec=self.codec.state(), refined=State({}, own))

    @classmethod
    def from_state(cls, state: State) -> Refined:
        """Build one from a state.

        Parameters
        ----------
        state : State
            As `state` returned it. The tensors are used in place.

        Returns
        -------
        Refined

        Raises
        ------
        ValueError, TypeError, LookupError
            A state that does not fit together.
        """
        own = dict(state.params["refined"])
        kind = choice(f"{cls._KIND}.load", "codec", own.pop("kind"), _CODECS)
        # By name: `quantize` imports this file.
        codec = getattr(importlib.import_module("polyvec.quantize"), kind)
        return cls(codec.from_state(_files.part(state, "codec")), **own)

    def _bounds(self, rows: Floats, codes: Any, num_threads: int | None) -> Floats:
        decoded = np.float64(self.codec.decode(codes, num_threads=num_threads))
        exact = np.float64(rows)
        if self.codec.metric == "cosine":
            exact = _unit(exact)
        lost = np.linalg.norm(exact - decoded, axis=1)
        return np.stack([lost, self.codec._reach(decoded)], 1).astype(np.float32)

    def _rescore(
        self,
        op: str,
        queries: Floats,
        encoded: RefinedCodes,
        todo: npt.NDArray[np.int64],
        candidates: npt.NDArray[np.int64],
        out: tuple[Floats, npt.NDArray[np.int64]],
        num_threads: int | None,
    ) -> None:
        """Write the best of the candidates of the queries `todo`."""
        (scores, ids), k = out, out[0].shape[1]
        worst = np.float32(np.inf if self.codec.metric == "l2" else -np.inf)
        scores[todo], ids[todo] = worst, -1
        at_a_time = max(1, _BLOCK_CANDIDATES // max(1, candidates.shape[1]))
        for begin in range(0, len(todo) if len(encoded.codes) else 0, at_a_time):
            some = todo[begin : begin + at_a_time]
            rows = candidates[begin : begin + at_a_time]
            values = np.empty(rows.shape, np.float32)
            known = np.ascontiguousarray(np.maximum(rows, 0))
            few = np.ascontiguousarray(queries[some])
            _backend.run(
                op, "scan_score_pairs", few,
                few, None, None, np.ascontiguousarray(encoded.vectors), encoded.scales, known, None, values,
                self.codec.metric,
                num_threads=num_threads,
            )  # fmt: skip
            values[(rows < 0) | np.isnan(values)] = worst
            order = np.lexsort((rows, values if self.codec.metric == "l2" else -values))[:, :k]
            best = np.take_along_axis(values, order, 1)
            found = order.shape[1]
            scores[some, :found] = best
            ids[some, :found] = np.where(best == worst, -1, np.take_along_axis(rows, order, 1))

    def _nearest(
        self,
        op: str,
        queries: Floats,
        encoded: RefinedCodes,
        k: int,
        chosen: npt.NDArray[Any] | None,
        num_threads: int | None,
    ) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Compare with all vectors: what the codec's search returns, without codes."""
        bias, n = None, len(encoded.codes)
        if chosen is not None:
            bias = np.full(n, -np.inf, np.float32)  # no score of a vector outside is ahead of another
            bias[chosen] = 0
        scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        vectors = np.ascontiguousarray(encoded.vectors)
        _backend.run(
            op, "scan_topk", queries,
            np.ascontiguousarray(queries), None, None, vectors, None, bias, None, None, scores, ids, self.codec.metric,
            num_threads=num_threads,
        )  # fmt: skip
        return scores, np.where(np.isinf(scores), -1, ids)

    def _may_lack(
        self,
        queries: Floats,
        coarse: Floats,
        candidates: npt.NDArray[np.int64],
        scores: Floats,
        largest: tuple[float, ...],
    ) -> npt.NDArray[np.bool_]:
        """Whether a vector that was no candidate may score as well as the k-th best."""
        q = np.float64(queries)
        if self.codec.metric == "cosine":
            q = _unit(q)
        lost, reach = largest
        complete = candidates[:, -1] >= 0  # else all are candidates
        last, least = (np.where(complete, column, 0).astype(np.float64) for column in (coarse[:, -1], scores[:, -1]))
        rounding = self.codec._rounding(q) * reach
        size = np.linalg.norm(q, axis=1) + np.sqrt(np.abs(last)) + lost + reach
        rounding += 1e-5 * (np.abs(last) + np.abs(least) + size * lost + 1e-3 * size**2)  # float32 sums, generously
        if self.codec.metric == "l2":
            best_possible = self.codec._least_distance(q, last - 2 * rounding, lost)
            lacks = best_possible <= least
        else:
            lacks = last + np.linalg.norm(q, axis=1) * lost + rounding >= least
        return np.asarray(lacks & complete, np.bool_)


def _unit(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the rows divided by their norms; a row of zeros stays one."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit: npt.NDArray[np.float64] = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
    return unit


def _require_float(op: str, name: str, x: Any) -> None:
    if dtype_name(x) not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16, got {dtype_name(x)}")


def _largest(bounds: npt.NDArray[np.float32]) -> tuple[float, float]:
    lost, kept = bounds.max(0, initial=0)
    return float(lost), float(kept)


def _farthest(
    bounds: npt.NDArray[np.float32], chosen: npt.NDArray[Any] | None
) -> tuple[npt.NDArray[np.int64], tuple[float, float]]:
    """Return the vectors of which codes lost most, those that take part, and the largest bounds of all others."""
    far = np.argpartition(bounds[:, 0], len(bounds) - _FAR)[-_FAR:]
    largest = _largest(np.delete(bounds, far, 0))
    if chosen is not None:
        far = far[chosen[far] if chosen.dtype == bool else np.isin(far, chosen)]
    return far, largest


def _with(candidates: npt.NDArray[np.int64], more: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return each row of candidates and what it lacks of `more`; -1 in place of what it has."""
    if not len(more):
        return candidates
    added = np.broadcast_to(more, (len(candidates), len(more))).copy()
    for row, known in zip(added, candidates, strict=True):
        row[np.isin(row, known)] = -1
    return np.concatenate([candidates, added], 1)
