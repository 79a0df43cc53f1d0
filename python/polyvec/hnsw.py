"""Approximate nearest neighbours in a graph that grows, shrinks, and lives in a file."""

from __future__ import annotations

import itertools
import math
import os
import threading
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polyvec import _backend, _core, _files
from polyvec._arrays import (
    Array,
    ArrayT,
    as_array,
    as_count,
    as_float32,
    as_id,
    as_ids,
    as_number,
    as_selection,
    choice,
    output,
    outputs,
    require_cpu,
)
from polyvec._files import State
from polyvec._knn_graph import knn_graph
from polyvec._progress import Progress, reporting

__all__ = ["Index", "knn_graph"]

Metric = Literal["cosine", "ip", "l2"]
Storage = Literal["float32", "float16", "bfloat16", "int8", "int4"]
Kept = Literal["float32", "float16", "bfloat16", "int8"]

_FLOATS = ("float32", "float16", "bfloat16")

_QUERIES = 512  # compared with all vectors between two reports of progress
_CHUNK = 1024  # vectors linked between two reports of progress; searches may run in between


class Index(_files.Saved):
    """Find the nearest of many vectors by walking a graph of neighbours: a few thousand comparisons, not all of them.

    Hierarchical navigable small worlds: every vector is linked with up to 2 m near vectors in different directions,
    and one in m, one in m^2, ... also take part in coarser graphs above, where each search begins.

    Parameters
    ----------
    dim : int
        Width d of the vectors.
    metric : {"cosine", "ip", "l2"}
        "cosine": inner product of unit vectors; vectors are stored scaled to norm 1, and a zero vector has cosine 0
        with everything. "ip": inner product, higher is better. "l2": *squared* distance, lower is better.
    storage : {"float32", "float16", "bfloat16", "int8", "int4"}
        What searches compare on their way: vectors as they are kept, or codes beside them. "float16" rounds elements to
        11 significant bits (up to 65,504), "bfloat16" to 8 (up to 3.4e38): half the memory, at most half the time to
        wait for it, and scores that are exact for the rounded vectors. "int8" and "int4": codes of a byte, or of half a
        byte, an element, each vector with a scale of its own (its largest element is 127, or 7); the best candidates
        are compared again by the kept vectors. They fetch a quarter and an eighth of the bytes of float32, and search
        about twice and two to three times as fast at the same recall where elements are of one size, as in embeddings;
        building gains, too. Where a few elements, or an offset common to all vectors, are far larger than what tells
        vectors apart, "int8" needs a larger `ef` and "int4" more so; and they gain little where all vectors stay in the
        cache. `freeze` replaces all of these on the way by codes of two to four bits an element.
    rerank : {"float32", "float16", "bfloat16", "int8"}, optional
        What vectors are kept in beside the codes of "int8" and "int4"; float32 when None. "int8" rounds them to such
        codes (by cosine of norm 1 again): with storage "int8" these are all that is kept. Scores are exact for the
        rounded vectors, up to 1 % of the true neighbours are others, and an index takes a third to a half of the
        memory.
    m : int
        Links of a vector, in [2, 1024]; 2 m at the ground level. More serve high recall and many dimensions.
    ef_construction : int
        Candidates kept while linking a vector. More give a better graph and take longer.
    hierarchy : bool
        False: all vectors take part at the ground level alone, where searches start at the first of them. Recall and
        speed are about the same; frozen graphs gain from knowing which vectors every search passes.
    seed : int
        Of the random levels, at least 0.

    Notes
    -----
    Memory: 4 d + 8 m bytes a vector (kept in 16 bits 2 d + 8 m, in int8 d + 8 m), codes of d or d / 2 bytes, rounded up
    to a multiple of 64, and 8 more, and about 26 + 4 m / (m - 1) beside; room doubles as it fills up. So d = 384 takes
    1.7 KB in float32, 1.9 KB with "int4" codes, 0.74 KB with these and `rerank="int8"`, 0.55 KB where both are "int8".
    Removed vectors keep theirs until they are more than the others; then, and when `compact` is called, it is given
    back.

    Threads: any number of searches may run at once, from any threads. A call that changes the index waits for them and
    they for it; `add` lets searches pass now and then, and `compact` does not keep them waiting.

    The same calls give the same graph, bit for bit, with any number of threads: vectors are linked in batches (up to
    3 % of the index) that search the graph of before and are compared with one another. `search` advances a few queries
    in turn on each thread, so that one computes while the vectors of another come from memory: batches are faster than
    single queries.

    "ip" finds true inner products as long as the norms are alike. Where they are not, or where queries come from
    elsewhere than the vectors, such a graph can miss the best (no triangle inequality holds): `fit_queries` links the
    vectors that a sample of such queries wants together. Measure recall against `polyvec.scan.topk`, or use that.

    References
    ----------
    Malkov and Yashunin 2018: Efficient and robust approximate nearest neighbor search using hierarchical navigable
    small world graphs, algorithms 1 to 5. Manohar et al. 2024: ParlayANN, section 3 (batches).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> index = pv.hnsw.Index(2, metric="l2")
    >>> index.add(np.array([[0, 0], [3, 0], [0, 4]], np.float32), [10, 20, 30])
    >>> scores, ids = index.search(np.array([[2, 0]], np.float32), 2)
    >>> scores, ids
    (array([[1., 4.]], dtype=float32), array([[20, 10]]))
    """

    _KIND = "hnsw.Index"

    def __init__(
        self,
        dim: int,
        *,
        metric: Metric = "cosine",
        storage: Storage = "float32",
        rerank: Kept | None = None,
        m: int = 16,
        ef_construction: int = 200,
        hierarchy: bool = True,
        seed: int = 0,
    ) -> None:
        op = self._KIND
        self._params: dict[str, Any] = {
            "dim": as_count(op, "dim", dim),
            "metric": choice(op, "metric", metric, ("cosine", "ip", "l2")),
            "storage": choice(op, "storage", storage, (*_FLOATS, "int8", "int4")),
            "m": as_count(op, "m", m, least=2),
            "ef_construction": as_count(op, "ef_construction", ef_construction),
            "seed": as_count(op, "seed", seed, least=0),
        }
        if not hierarchy:
            self._params["hierarchy"] = False
        if rerank is not None:
            if storage in _FLOATS:
                raise ValueError(f"{op}: rerank must be None unless storage is 'int8' or 'int4', got {rerank!r}")
            if choice(op, "rerank", rerank, (*_FLOATS, "int8")) != "float32":
                self._params["rerank"] = rerank
        self._core = _core.HnswIndex(self._core_params())
        self._changing = threading.RLock()  # one change at a time; `progress` may look at the index

    def _core_params(self, *, frozen: bool = False) -> _core.HnswParams:
        params = {"hierarchy": True, "frozen": frozen, **self._params}
        storage, rerank = params.pop("storage"), params.pop("rerank", "float32")
        if storage in _FLOATS or storage == rerank:
            storage, rerank = "vectors", storage
        return _core.HnswParams(**params, storage=storage, kept=rerank)

    @property
    def dim(self) -> int:
        """Width d of the vectors."""
        return int(self._params["dim"])

    @property
    def metric(self) -> str:
        """How vectors are compared: "cosine", "ip" or "l2"."""
        return str(self._params["metric"])

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """The ids in the index, in the order of adding (frozen: in no order), shape (len(index),)."""
        with self._changing:
            out = np.empty(len(self), np.int64)
            _core.hnsw_ids(self._core, out, 0)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of memory that vectors and graph take, with the room kept for more; mapped files count."""
        return int(self._core.bytes())

    @property
    def frozen(self) -> bool:
        """Whether `freeze` made the index, and nothing has changed it since."""
        return bool(self._core.frozen())

    def __len__(self) -> int:
        return int(self._core.size())

    def __contains__(self, id: int) -> bool:  # noqa: A002 (the word of the glossary)
        number = as_id(self._KIND, id)
        return number is not None and bool(self._core.contains(number))

    def __repr__(self) -> str:
        params = ", ".join(f"{name}={value!r}" for name, value in self._params.items())
        return f"hnsw.Index({params}, {len(self)} vectors{', frozen' if self.frozen else ''})"

    def add(
        self, vectors: Array, ids: Any = None, *, progress: Progress = None, num_threads: int | None = None
    ) -> None:
        """Add vectors.

        Parameters
        ----------
        vectors : array of shape (n, d), float32 | float16 | bfloat16
            Copied, and rounded where `storage` or `rerank` says so.
        ids : integer array of shape (n,), optional
            Names that `search` returns: any distinct 64-bit integers but -1 that are not in the index. By default
            running numbers after the largest id so far, from 0.
        progress : bool or callable, optional
            True shows a bar; a callable is called with (done, n) now and then.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Raises
        ------
        ValueError
            Another shape, NaN or Inf, numbers too large for what vectors are kept in, an id twice or in the index
            already. The index is as it was before.
        TypeError
            Vectors of another dtype, ids that are not integers.
        KeyboardInterrupt
            Ctrl-C, or what `progress` raises, ends the call within a second: the vectors before some row are in the
            index then, those after it are not, as `len` tells.

        Notes
        -----
        About ef_construction * m comparisons a vector: O(n log n) in all. To replace a vector, `remove` its id first.
        """
        op = "hnsw.Index.add"
        x: Any = as_array(op, "vectors", vectors, dtypes=_FLOATS, ndim=2)
        n = int(x.shape[0])
        if x.shape[1] != self.dim:
            raise ValueError(f"{op}: vectors must have d = {self.dim}, got {x.shape[1]}")
        _backend.require_finite(op, "vectors", x, num_threads)
        names = None if ids is None else as_ids(op, "ids", ids)
        if names is not None and len(names) != n:
            raise ValueError(f"{op}: ids must have one entry a vector ({n}), got {len(names)}")
        with self._changing, reporting(op, progress, n, "vectors") as count:
            core = self._growing(op, num_threads)
            if names is None:
                first = max(0, self._core.largest_id() + 1)
                if first + n > 2**63:
                    raise ValueError(f"{op}: ids must be given, no numbers are left after {first - 1}")
                names = np.arange(first, first + n, dtype=np.int64)
            _backend.run(op, "hnsw_reserve", x, core, x, names, num_threads=num_threads)
            self._core = core
            for begin in range(0, n, _CHUNK):
                chunk = slice(begin, begin + _CHUNK)
                _backend.run(op, "hnsw_add", x, self._core, x[chunk], names[chunk], num_threads=num_threads)
                count(min(_CHUNK, n - begin))

    def search(
        self,
        queries: ArrayT,
        k: int,
        *,
        ef: int | None = None,
        margin: float | None = None,
        include: Any = None,
        out: tuple[ArrayT, ArrayT] | None = None,
        num_threads: int | None = None,
    ) -> tuple[ArrayT, ArrayT]:
        """Find the k best vectors for each query.

        Parameters
        ----------
        queries : array of shape (nq, d), float32 | float16 | bfloat16
        k : int
        ef : int, optional
            Candidates kept on the way, at least k; max(k, 64) by default. More give better recall and take longer,
            both in proportion. With `ef >= len(index)` the search is exact, without `margin`.
        margin : float, optional
            At least 0: a walk goes on while something is left to follow that is nearer than 1 + margin times the k-th
            best distance (not squared; of unit vectors that is sqrt(2 - 2 cosines)). So hard queries take longer walks
            than easy ones, and the same recall takes fewer comparisons. Try 0.02 to 0.1. `ef` is the most candidates
            then, max(k, 1000) by default. Not with "ip", where nothing is a distance.
        include : integer array of shape (c,) or iterable of ids, or bool array of shape (c,), optional
            Which vectors may be found: their ids (others than the index has are passed over), or a mask over the ids
            0 to c - 1: 0 and 1 of an integer dtype are ids. All when None.
        out : pair of arrays of shape (nq, k), float32 and int64, optional
            Written and returned.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        scores : array of shape (nq, k), float32
            Best first, of the index's metric: inner products and cosines fall, squared distances ("l2") rise.
        ids : array of shape (nq, k), int64
            Where fewer than k vectors were found the rest is -1, with score -inf ("l2": +inf).

        Raises
        ------
        ValueError
            Another shape, k or ef below 1, a margin below 0 or with "ip".
        TypeError
            Queries of another dtype.

        Notes
        -----
        About ef * m comparisons a query (with `margin` what is near decides), 2 d flops and 4 d bytes each (kept in 16
        bits: 2 d). With "int8" they are of d bytes, with "int4" of d / 2, with a frozen index of d / 8 and one in
        four of another d / 8 (of 64 where d is at most 192); then as many candidates are scored by the kept vectors as
        may be among the k best. Products are summed in float32, whatever the dtypes. Same result for any number of
        threads, and for a query alone or among others. A query with NaN finds nothing. Removed vectors are passed
        through without counting as candidates.

        So are vectors that `include` leaves out: where it lets one in ten pass, a walk takes ten times as many steps.
        Where that costs more than to compare all that pass, and where a walk does not come to an end in that time,
        because those near the query do not, all that pass are compared: exact, and never much slower than that. A call
        looks up the ids first, or those of all vectors for a mask: pass many queries at once.

        References
        ----------
        Al-Jazzazi et al. 2025: Distance adaptive beam search for provably accurate graph-based nearest neighbor search,
        section 3 (`margin`).

        Examples
        --------
        >>> import numpy as np, polyvec as pv
        >>> index = pv.hnsw.Index(2, metric="l2")
        >>> index.add(np.array([[0, 0], [3, 0], [0, 4]], np.float32), [10, 20, 30])
        >>> index.search(np.zeros((1, 2), np.float32), 2, include=[30, 20, 7])[1]
        array([[20, 30]])
        """
        op = "hnsw.Index.search"
        x: Any = as_array(op, "queries", queries, dtypes=_FLOATS, ndim=2)
        if x.shape[1] != self.dim:
            raise ValueError(f"{op}: queries must have d = {self.dim}, got {x.shape[1]}")
        k = as_count(op, "k", k)
        reach, usual = -1.0, 64
        if margin is not None:
            reach, usual = as_number(op, "margin", margin), 1000
            if not 0 <= reach < math.inf:
                raise ValueError(f"{op}: margin must be a finite number of at least 0, got {margin}")
            if self.metric == "ip":
                raise ValueError(f"{op}: margin must be None unless metric is 'cosine' or 'l2', got {margin}")
        ef = max(k, usual) if ef is None else as_count(op, "ef", ef)
        scores, ids = outputs(op, out, x, (int(x.shape[0]), k), ("float32", "int64"), ("scores", "ids"))
        include = as_selection(op, "include", include, None)
        _backend.run(op, "hnsw_search", x, self._core, x, ef, reach, include, scores, ids, num_threads=num_threads)
        return scores, ids

    def get(self, ids: Any, *, out: Any = None) -> Any:
        """Return the stored vectors of `ids`.

        Parameters
        ----------
        ids : integer array of shape (n,)
        out : array of shape (n, d), float32, optional

        Returns
        -------
        array of shape (n, d), float32, in ids' library
            As they are kept: as they were added, scaled to norm 1 where the metric is "cosine", and rounded.

        Raises
        ------
        IndexError
            An id that is not in the index.
        """
        op = "hnsw.Index.get"
        names = as_ids(op, "ids", ids)
        out = output(op, out, names, (int(names.shape[0]), self.dim), "float32")
        _backend.run(op, "hnsw_get", names, self._core, names, out)
        return out

    def remove(self, ids: Any, *, num_threads: int | None = None) -> None:
        """Remove vectors: no search returns them any more, and their ids can be added again.

        Parameters
        ----------
        ids : integer array of shape (n,)
        num_threads : int, optional
            CPU threads where `compact` is due; the process setting when None.

        Raises
        ------
        IndexError
            An id that is not in the index; then nothing is removed.
        ValueError
            An id twice.
        KeyboardInterrupt
            Ctrl-C ends the call within a second; the vectors are removed, or none is.

        Notes
        -----
        The vectors stay where they are as way-marks of the graph, and keep their memory, until they are more than the
        others; then `compact` is called, and links these as if they were added now. So no more slots than two a vector
        are in use, and to replace all vectors, in any number of calls, takes about twice as long as to add them.
        """
        op = "hnsw.Index.remove"
        names = as_ids(op, "ids", ids)
        with self._changing:
            core = self._growing(op, num_threads)
            _backend.run(op, "hnsw_remove", names, core, names)
            self._core = core
            self._core = self._growing(op, num_threads)

    def compact(self, *, num_threads: int | None = None) -> None:
        """Give back the memory of removed vectors, and the time that searches take to pass through them.

        Parameters
        ----------
        num_threads : int, optional
            CPU threads; the process setting when None.

        Raises
        ------
        KeyboardInterrupt
            Ctrl-C ends the call within a second; the index is as it was before.

        Notes
        -----
        Links to removed vectors give way to links to those that these led to, the best of them as `add` chooses: a
        fraction of the time to add all, the shorter the fewer are removed. Where more than half are removed, the others
        are linked anew, as if they were added now in one call; links of `fit_queries` are lost then. The index is
        written beside the old one, and searches may run meanwhile.

        References
        ----------
        Singh et al. 2021: FreshDiskANN, section 4.2 (links past removed vectors).

        Examples
        --------
        >>> import numpy as np, polyvec as pv
        >>> index = pv.hnsw.Index(2, metric="l2")
        >>> index.add(np.array([[0, 0], [3, 0], [0, 4]], np.float32), [10, 20, 30])
        >>> index.remove([10])
        >>> index.compact()
        >>> index.ids
        array([20, 30])
        """
        threads = _backend.threads("hnsw.Index.compact", num_threads)
        with self._changing:
            if self._core.slots() > len(self):
                self._core = _core.hnsw_compact(self._core, threads)

    def _growing(self, op: str, num_threads: int | None) -> _core.HnswIndex:
        """Return what can be changed: a copy where the index is frozen, or more slots are removed than left."""
        threads = _backend.threads(op, num_threads)
        if self.frozen or self._core.slots() > 2 * len(self):
            return _core.hnsw_compact(self._core, threads)
        return self._core

    def fit_queries(
        self, queries: Array, *, k: int = 100, progress: Progress = None, num_threads: int | None = None
    ) -> None:
        """Add links for queries like these: what they look for is not always near each other, but found together.

        The k best vectors of each query are found by comparing all; each of them and the next are linked, both ways,
        where their 2 m links leave room, those of the first ranks before others. So a walk that has come to one of the
        best goes on to the rest, vectors that no others had linked to among them.

        Parameters
        ----------
        queries : array of shape (nq, d), float32 | float16 | bfloat16
            A sample of what will be searched, thousands if possible; those that are searched later need not be in it.
        k : int
            As many as searches will ask for, or more.
        progress : bool or callable, optional
            As for `add`, in queries.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Raises
        ------
        ValueError
            Another shape, NaN or Inf, k below 1.
        TypeError
            Queries of another dtype.
        KeyboardInterrupt
            Ctrl-C, or what `progress` raises, ends the call within a second; the index is sound, with some of the links
            or none.

        Notes
        -----
        2 nq n d flops for the comparison with all, and 8 nq k bytes meanwhile (and 8 n d where vectors are kept in
        int8). Searches may run at once. The same calls give the same links with any number of threads. Vectors that are
        added later can take the place of such links: fit after adding.

        Steps of a walk then compare more vectors, so that it pays where the graph lacks links that queries need: for
        users and items of a factorisation, with norms of all sizes, nothing else brings the last of the best within
        reach. Encodings by `polyvec.fde` have norms alike, and gain what a larger `ef` gives for the same time.

        References
        ----------
        Chen et al. 2024: RoarGraph, sections 4.1 and 4.2 (links between vectors that the same query is close to);
        Jaiswal et al. 2022: OOD-DiskANN, section 4.1. Here consecutive ranks are linked, not all pairs of them.

        Examples
        --------
        >>> import numpy as np, polyvec as pv
        >>> rng = np.random.default_rng(0)
        >>> index = pv.hnsw.Index(8, metric="ip")
        >>> index.add(rng.standard_normal((500, 8), np.float32))
        >>> index.fit_queries(rng.standard_normal((200, 8), np.float32) + 1, k=20)
        """
        op = "hnsw.Index.fit_queries"
        x: Any = as_array(op, "queries", queries, dtypes=_FLOATS, ndim=2)
        n = int(x.shape[0])
        if x.shape[1] != self.dim:
            raise ValueError(f"{op}: queries must have d = {self.dim}, got {x.shape[1]}")
        k = as_count(op, "k", k)
        require_cpu(op, "queries", x)
        _backend.require_finite(op, "queries", x, num_threads)
        with self._changing, reporting(op, progress, n, "queries") as count:
            self._core = self._growing(op, num_threads)
            ranks = self._nearest(op, as_float32(x), k, count, num_threads)
            for one, next_one in itertools.pairwise(ranks):
                _backend.run(op, "hnsw_link", one, self._core, one, next_one, num_threads=num_threads)

    def _nearest(
        self, op: str, queries: npt.NDArray[np.float32], k: int, count: Any, num_threads: int | None
    ) -> npt.NDArray[np.int64]:
        """Slots of the k best of all vectors, shape (k, nq), -1 where there are fewer; `count` is told of progress."""
        tensors = self.state().tensors
        bias = np.where(tensors["removed"], np.float32(-np.inf), np.float32(0))
        vectors = tensors["vectors"]
        if self._params.get("rerank") == "int8":
            live = ~tensors["removed"]
            vectors = np.zeros((len(live), self.dim), np.float32)
            vectors[live] = self.get(tensors["ids"][live])
        k, metric = min(k, len(self)), "l2" if self.metric == "l2" else "ip"  # of vectors as they are kept
        ranks = np.empty((k, len(queries)), np.int64)
        for begin in range(0, len(queries) if k else 0, _QUERIES):
            block = queries[begin : begin + _QUERIES]
            scores, slots = np.empty((len(block), k), np.float32), np.empty((len(block), k), np.int64)
            _backend.run(
                op, "scan_topk", block,
                block, None, None, vectors, None, bias, None, None, scores, slots, metric,
                num_threads=num_threads,
            )  # fmt: skip
            ranks[:, begin : begin + _QUERIES] = slots.T
            count(len(block))
        return ranks

    def freeze(self, *, num_threads: int | None = None) -> Index:
        """Return a copy that searches faster until it is changed: less memory to read on the way, in a better order.

        Each vector x has a code of two bits an element, which stands for R (x - c): c is the mean of all vectors, R a
        random rotation that makes elements about normal, whatever the data. Walks compare the signs, one cache line
        where d = 384, and both bits of those that may be near; the best candidates are then scored by the kept vectors,
        so that scores are as exact as ever. Where a cache line holds whole codes, they have as many bits as fit: two
        up to d = 192, three up to 128, four up to 96. Vectors that near ones link to lie near each other.

        Parameters
        ----------
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        Index
            With the same ids, vectors and parameters, and `frozen` true, without what was removed (see `compact`). It
            is searched, saved and loaded as any index. Its first `add`, `remove` or `fit_queries` thaws it: makes the
            codes that `storage` says in place of these, in the time to read all vectors. Freeze it again afterwards.

        Raises
        ------
        ValueError
            The index is frozen already; d above 131072.

        Notes
        -----
        Memory: 4 d (kept in 16 bits: 2 d, in int8: d) + d / 4 + 8 m bytes a vector and up to 170 more; with d = 384 and
        m = 16 1.2 times the vectors alone in float32, and 0.44 times those with `rerank="int8"`. This index keeps its
        own until it is dropped.

        It pays where an index is larger than the CPU's caches: what is saved is memory to wait for. A small one is
        searched as fast with "int8", the more so for large k, as more candidates are scored in float32, and one of up
        to 128 dimensions as fast with "int4".

        Where vectors differ by less than such codes can tell, as near copies in few dimensions do, candidates come in
        a rough order, and recall for the same `ef` is lower than before: raise `ef`.

        References
        ----------
        Gao and Long 2024: RaBitQ, sections 3.1 and 3.2 (rotation, unbiased estimate); Gao et al. 2025: Practical and
        asymptotically optimal quantization of high-dimensional vectors (several bits an element).

        Examples
        --------
        >>> import numpy as np, polyvec as pv
        >>> index = pv.hnsw.Index(2, metric="l2")
        >>> index.add(np.array([[0, 0], [3, 0], [0, 4]], np.float32), [10, 20, 30])
        >>> index.freeze().search(np.array([[2, 0]], np.float32), 2)
        (array([[1., 4.]], dtype=float32), array([[20, 10]]))
        """
        frozen = Index(**self._params)
        frozen._core = _core.hnsw_freeze(self._core, _backend.threads("hnsw.Index.freeze", num_threads))
        return frozen

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> Index:
        """Read an index that `save` wrote.

        Parameters
        ----------
        path : path
        mmap : bool
            Leave vectors, codes and ground-level links in the file and read what a search touches. The first
            change copies them into memory.

        Returns
        -------
        Index

        Raises
        ------
        FormatError
            The file is damaged, truncated, of another kind or of a newer format.
        OSError
            The system's own.

        Notes
        -----
        Everything is verified before use: checksums, shapes, ids, every link. With mmap only the bytes of vectors and
        codes are not: damage there changes scores, and can do no more.
        """
        return _files.load(path, cls._KIND, cls.from_state, mmap=mmap, lazy=("vectors", "codes"))

    def state(self) -> State:
        """Return what `save` writes.

        Returns
        -------
        State
            Read-only tensors that share the index's memory until its next change, and the parameters.

        Notes
        -----
        The tensors are `vectors`, `links`, `levels`, `upper_links`, `ids`, `removed`; with "int8" and "int4" `codes`
        and `factors` (scales, and squared norms for "l2"); frozen other `codes` and `frame` (c, and the signs that make
        R). bfloat16 is written as its bits (U16), vectors in int8 as codes are (U8, 128 for 0), with `scales`, or,
        where they are all that is kept, with `factors` and no `codes`.
        """
        tensors, entry, largest_id = _core.hnsw_state(self._core)
        params = {**self._params, "entry": entry, "largest_id": largest_id}
        return State(tensors, {**params, **({"frozen": True} if self.frozen else {})})

    @classmethod
    def from_state(cls, state: State) -> Index:
        """Build an index from a state.

        Parameters
        ----------
        state : State
            As `state` returned it. The tensors are used in place until the first change.

        Returns
        -------
        Index

        Raises
        ------
        FormatError
            A state that does not fit together.
        """
        params = dict(state.params)
        entry, largest_id = params.pop("entry"), params.pop("largest_id", -1)
        frozen = params.pop("frozen", False)
        index = cls(**params)
        index._core = _core.hnsw_load(index._core_params(frozen=frozen), entry, largest_id, dict(state.tensors))
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        return Index.from_state, (self.state(),)
