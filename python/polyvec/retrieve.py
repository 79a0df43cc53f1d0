"""The moves strung together: multi-vector retrieval (encode, search, rescore) and link prediction (compose, scan)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from polyvec import _backend, _files, fde, hypercomplex, maxsim, scan
from polyvec._arrays import as_array, as_count, as_id, as_ids, as_selection, choice, is_torch, outputs
from polyvec._first_stages import FIRST_STAGES, first_stage_of
from polyvec._progress import Progress, reporting
from polyvec._ragged import Ragged, as_ragged
from polyvec._token_store import Rows, TokenStore

__all__ = ["LinkPredictor", "MultiVectorIndex"]

_BLOCK = 256  # documents encoded and indexed at a time: bounds the memory of their encodings
_FLOAT16_END = 65520  # rounds to infinity
_STORAGES = ("float32", "bfloat16", "float16", "int8", "residual4", "residual2")


class MultiVectorIndex(_files.Saved):
    """Find the best documents for a query when both are sets of vectors.

    A first stage finds candidates, and MaxSim on the kept token vectors ranks them:
    score(q, d) = sum_i max_j <q_i, d_j>.

    Parameters
    ----------
    dim : int
        Width of the token vectors.
    encoder : fde.Encoder, optional
        `fde.Encoder(dim)` when None. "centroids" has none.
    first_stage : {"centroids", "hnsw", "pq", "flat"}, optional
        "centroids" scores all documents with each token rounded to the nearest of a few thousand centroids
        (`maxsim.pack`). The others encode a document as one vector (`fde.Encoder`) and search the encodings: by a
        graph; by product-quantised codes (256 centroids for every 8 dimensions, trained on the first documents added,
        at least 256 of them); or all of them, exactly. None: "hnsw" where an encoder is given, else "centroids".
    storage : {"float32", "bfloat16", "float16", "int8", "residual4", "residual2"}
        How tokens are kept, and so what is scored: see `maxsim.pack`.

    Notes
    -----
    Memory a token: 4 dim bytes, 2 dim in 16 bits, dim + 4 with "int8", dim / 2 + 8 or dim / 4 + 8 with residuals; with
    "centroids" 2 more. A document without them: its encoding (4 * output_dim bytes; 1.5 * output_dim with
    "hnsw", output_dim / 8 with "pq") and the graph's links.

    Centroids, of the first stage as of residuals, are trained on the documents of the first `add`, and anew, with all
    tokens assigned and stored again, whenever there are four times as many tokens: begin with many documents, and
    residuals are not rounded twice. Searches may run at the same time; `add` and `remove` must run alone.

    References
    ----------
    PLAID (Santhanam et al. 2022), section 4.2 (centroids); ColBERTv2 (Santhanam et al. 2022), section 3.3 (residuals);
    MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings (Dhulipala et al. 2024), sections 2 and 3.2 (the
    other stages).

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> rng = np.random.default_rng(0)
    >>> docs = [rng.standard_normal((n, 16)).astype(np.float32) for n in (5, 3, 8)]
    >>> index = pv.retrieve.MultiVectorIndex(16, first_stage="flat")
    >>> index.add(docs, ids=[10, 20, 30])
    >>> scores, ids = index.search([docs[2]], k=1)
    >>> ids
    array([[30]])
    """

    _KIND = "retrieve.MultiVectorIndex"

    def __init__(
        self,
        dim: int,
        *,
        encoder: fde.Encoder | None = None,
        first_stage: str | None = None,
        storage: str = "float32",
    ) -> None:
        op = "MultiVectorIndex"
        self.dim = as_count(op, "dim", dim)
        if first_stage is None:
            first_stage = "centroids" if encoder is None else "hnsw"
        self.first_stage = choice(op, "first_stage", first_stage, FIRST_STAGES)
        self.storage = choice(op, "storage", storage, _STORAGES)
        if encoder is not None and first_stage == "centroids":
            raise ValueError(f'{op}: encoder must be None with first_stage "centroids", got {encoder!r}')
        if encoder is None and first_stage != "centroids":
            encoder = fde.Encoder(self.dim)
        if encoder is not None and encoder.dim != self.dim:
            raise ValueError(f"{op}: encoder must have dim {self.dim}, got {encoder.dim}")
        self.encoder = encoder
        self._ids = Rows(1, np.int64)  # -1: removed
        self._num_removed = 0  # of these: searches need not look at all ids
        self._tokens = TokenStore(self.dim, self.storage)
        self._stage = first_stage_of(first_stage, self.dim, encoder)

    def __len__(self) -> int:
        return len(self._ids) - self._num_removed

    def __contains__(self, id: int) -> bool:  # noqa: A002 (the word of the glossary)
        number = as_id("MultiVectorIndex", id)
        return number is not None and number >= 0 and bool((self._ids.view() == number).any())

    def __repr__(self) -> str:
        storage = "" if self.storage == "float32" else f", storage={self.storage!r}"
        return (
            f"MultiVectorIndex({len(self)} documents, {self._num_tokens()} tokens, dim={self.dim}, "
            f"first_stage={self.first_stage!r}{storage})"
        )

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """The documents' ids, in the order in which they were added, shape (len(index),)."""
        ids: npt.NDArray[np.int64] = self._names()[self._alive()]
        return ids

    @property
    def nbytes(self) -> int:
        """Bytes held: tokens, first stage, ids; those of removed documents count until their memory is used again."""
        return int(self._tokens.nbytes + self._stage.nbytes + self._ids.view().nbytes)

    def _names(self) -> npt.NDArray[np.int64]:
        """The id of each document held, by its number; -1 where it was removed."""
        return self._ids.view()[:, 0]

    def _alive(self) -> npt.NDArray[np.int64]:
        """The numbers of the documents that were not removed."""
        return np.flatnonzero(self._names() >= 0)

    def _num_tokens(self) -> int:
        return int(self._tokens.lengths()[self._alive()].sum())

    def add(
        self,
        docs: Any,
        ids: Any = None,
        *,
        progress: Progress = None,
        num_threads: int | None = None,
    ) -> None:
        """Add documents.

        Parameters
        ----------
        docs : token sets, float32
            A Ragged, (values, offsets), a list of (n_i, dim) arrays, or a padded array (with lengths).
        ids : integer array of shape (n,), optional
            Unique; by default numbers from the largest id in the index + 1.
        progress : bool or callable, optional
            True shows a bar; a callable is given (done, total) documents.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Raises
        ------
        ValueError
            Wrong width, NaN or Inf in a token, an element too large for float16, ids that repeat or are already there,
            too few documents to train "pq"; the index is unchanged.

        Notes
        -----
        Works in blocks of 256 documents. Ctrl-C leaves the finished blocks in the index and nothing of the others.
        """
        op = "MultiVectorIndex.add"
        sets = as_ragged(op, "docs", docs, dim=self.dim)
        _backend.require_finite(op, "docs", sets.values, num_threads)
        if self.storage == "float16" and not bool((abs(sets.values) < _FLOAT16_END).all()):
            raise ValueError(f"{op}: docs must be at most 65504 with storage 'float16', got {abs(sets.values).max()}")
        new_ids = self._new_ids(op, ids, len(sets))
        for part in (self._stage, self._tokens):
            part.prepare(op, self._tokens.packed(), sets, num_threads)
        with reporting(op, progress, len(sets), "documents") as report:
            for start in range(0, len(sets), _BLOCK):
                block = slice(start, min(start + _BLOCK, len(sets)))
                self._add_block(op, sets, new_ids, block, num_threads)
                report(block.stop - block.start)

    def _new_ids(self, op: str, ids: Any, n: int) -> npt.NDArray[np.int64]:
        if ids is None:
            first = int(self._names().max(initial=-1)) + 1
            if first + n > 2**63:
                raise ValueError(f"{op}: ids must be given, no numbers are left after {first - 1}")
            return np.arange(first, first + n, dtype=np.int64)
        new = np.asarray(as_ids(op, "ids", ids))
        if len(new) != n:
            raise ValueError(f"{op}: ids must have one entry a document ({n}), got {len(new)}")
        if n and new.min() < 0:
            raise ValueError(f"{op}: ids must not be negative, got {new.min()}")
        values, counts = np.unique(new, return_counts=True)
        if n and counts.max() > 1:
            raise ValueError(f"{op}: ids must be unique, got {values[counts > 1][0]} twice")
        there = np.isin(new, self._names())
        if there.any():
            raise ValueError(f"{op}: ids must be new, got {new[there][0]}, which is in the index")
        return new

    def _add_block(
        self, op: str, sets: Ragged, new_ids: npt.NDArray[np.int64], block: slice, num_threads: int | None
    ) -> None:
        n = len(self._ids)  # a block that Ctrl-C cut short may have left more in the parts: they are cut back first
        begin, end = int(sets.offsets[block.start]), int(sets.offsets[block.stop])
        part = Ragged(np.asarray(sets.values[begin:end]), sets.offsets[block.start : block.stop + 1] - begin)
        self._stage.truncate(n)
        self._stage.add(part, num_threads)
        self._tokens.truncate(n)
        self._tokens.append(op, part, num_threads)
        self._ids.append(new_ids[block, None])  # from here on the block is in the index

    def remove(self, ids: Any) -> None:
        """Remove documents: no search returns them any more, and their ids can be added again.

        Parameters
        ----------
        ids : integer array of shape (n,)

        Raises
        ------
        IndexError
            An id that is not in the index; then nothing is removed.
        ValueError
            An id twice.

        Notes
        -----
        The memory of removed documents is given back when they are a quarter of all, by a copy of the rest ("hnsw"
        keeps their encodings as way-marks of the graph until they are half of all).
        """
        op = "MultiVectorIndex.remove"
        numbers = self._numbers(op, ids)
        values, counts = np.unique(numbers, return_counts=True)
        if len(values) < len(numbers):
            raise ValueError(f"{op}: ids must be unique, got {self._names()[values[counts > 1][0]]} twice")
        names = self._names().copy()  # it may lie in a file
        names[numbers] = -1
        self._take_ids(names)  # from here on they are removed, even if Ctrl-C ends what follows
        self._stage.remove(values)
        if len(self) <= 0.75 * len(self._ids):
            alive = self._alive()
            self._stage.truncate(len(self._ids))
            stage, tokens, kept = copy(self._stage), copy(self._tokens), Rows.of(names[alive, None])
            stage.keep(alive)
            tokens.keep(alive)
            # Nothing is called between these: Ctrl-C leaves the parts as they were, or all of them renewed
            self._stage, self._tokens, self._ids, self._num_removed = stage, tokens, kept, 0

    def _take_ids(self, names: npt.NDArray[np.int64]) -> None:
        self._ids, self._num_removed = Rows.of(names[:, None]), int(np.count_nonzero(names < 0))

    def get(self, ids: Any, *, num_threads: int | None = None) -> Ragged:
        """Return the tokens of documents.

        Parameters
        ----------
        ids : integer array of shape (n,)
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        Ragged
            n token sets, float32: as they were added, rounded as `storage` says.

        Raises
        ------
        IndexError
            An id that is not in the index.
        """
        numbers = self._numbers("MultiVectorIndex.get", ids)
        return self._tokens.packed().take(numbers).decode(num_threads=num_threads)

    def _numbers(self, op: str, ids: Any) -> npt.NDArray[np.int64]:
        """Return the numbers of the documents `ids`, which must be in the index."""
        wanted = np.asarray(as_ids(op, "ids", ids))
        distinct, places = np.unique(wanted, return_inverse=True)
        held = self._held(distinct)
        numbers = np.full(len(distinct), -1)
        numbers[np.searchsorted(distinct, self._names()[held])] = held
        numbers = numbers[places]
        if (numbers < 0).any():
            raise IndexError(f"{op}: ids must be in the index, got {wanted[numbers < 0][0]}")
        return numbers

    def _held(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the numbers of the documents that have one of `ids`, rising."""
        return np.flatnonzero(np.isin(self._names(), ids[ids >= 0]))

    def search(
        self,
        queries: Any,
        k: int,
        *,
        candidates: int | None = None,
        include: Any = None,
        out: tuple[Any, Any] | None = None,
        num_threads: int | None = None,
    ) -> tuple[Any, Any]:
        """Return the k best documents of each query.

        Parameters
        ----------
        queries : token sets, float32
        k : int
        candidates : int, optional
            How many documents the first stage hands to MaxSim, at least k; max(k, 200) by default. More is slower and
            closer to the result of scoring all; with as many as may be found, the first stage is not needed and the
            result is just that.
        include : integer array of shape (c,) or iterable of ids, or bool array of shape (c,), optional
            Which documents may be found: their ids (others than the index has are passed over), or a mask over the ids
            0 to c - 1: 0 and 1 of an integer dtype are ids. All when None.
        out : pair of arrays, optional
            (scores, ids) of the returned shapes and dtypes.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        scores : array of shape (nq, k), float32
            MaxSim of the tokens as they are kept, best first; -inf where there are fewer than k documents.
        ids : array of shape (nq, k), int64
            -1 where there are fewer than k documents. Both in the queries' library.

        Notes
        -----
        Cost a query: one search of the first stage, `candidates` MaxSim scores. "centroids": see `maxsim.pack`.
        """
        op = "MultiVectorIndex.search"
        k = as_count(op, "k", k)
        candidates = max(k, 200) if candidates is None else as_count(op, "candidates", candidates)
        if candidates < k:
            raise ValueError(f"{op}: candidates must be at least k ({k}), got {candidates}")
        sets = as_ragged(op, "queries", queries, dim=self.dim)
        n = len(self._ids)
        lists, included = None, self._included(op, include)
        if candidates < (n if included is None else len(included)):
            lists, included = _candidate_lists(self._stage.search(sets, candidates, included, num_threads), n), None
        scores, numbers = maxsim.topk(
            sets, self._tokens.packed(), k, candidates=lists, include=included, out=out, num_threads=num_threads
        )
        return scores, self._to_ids(numbers)

    def _included(self, op: str, include: Any) -> npt.NDArray[np.int64] | None:
        """Return the numbers of the documents that may be found, rising; None for all."""
        chosen = as_selection(op, "include", include, None)
        if chosen is None:
            return self._alive() if self._num_removed else None
        return self._held(np.flatnonzero(chosen) if chosen.dtype == bool else chosen)

    def _to_ids(self, numbers: Any) -> Any:
        """Replace documents' numbers by their ids, in place; -1 stays."""
        view = numbers.numpy() if is_torch(numbers) else np.asarray(numbers)
        if len(self._ids):
            np.copyto(view, np.where(view >= 0, self._names()[view], -1))
        return numbers

    def state(self) -> _files.State:
        """Return what `save` writes.

        Returns
        -------
        State
            Tokens, encoder (if any) and first stage, which share the index's memory, and the parameters.
        """
        for part in (self._stage, self._tokens):
            part.truncate(len(self._ids))  # what a call of add that was cut short may have left
        own = _files.State({"ids": self._names()}, {"dim": self.dim, "first_stage": self.first_stage})
        parts = {"documents": own, "tokens": self._tokens.packed().state(), "stage": self._stage.state()}
        if self.encoder is not None:
            parts["encoder"] = self.encoder.state()
        return _files.join(**parts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> MultiVectorIndex:
        """Read an index that `save` wrote.

        Parameters
        ----------
        path : path
        mmap : bool
            Leave the token vectors in the file and read those of candidates when they are scored; their checksum is
            then not verified.

        Returns
        -------
        MultiVectorIndex

        Raises
        ------
        FormatError
            The file is damaged, truncated, something else, or of a newer format.
        """
        return _files.load(path, cls._KIND, cls.from_state, mmap=mmap, lazy=("tokens.values",))

    @classmethod
    def from_state(cls, state: _files.State) -> MultiVectorIndex:
        """Build an index from a state.

        Parameters
        ----------
        state : State
            As `state` returned it. The tensors are used in place until the first change.

        Returns
        -------
        MultiVectorIndex

        Raises
        ------
        ValueError, TypeError, LookupError
            A state that does not fit together.
        """
        own, tokens = _files.part(state, "documents"), _files.part(state, "tokens")
        first_stage, encoder = own.params["first_stage"], None
        if first_stage != "centroids":
            encoder = fde.Encoder.from_state(_files.part(state, "encoder"))
        index = cls(own.params["dim"], encoder=encoder, first_stage=first_stage, storage=tokens.params["dtype"])
        index._tokens.restore(tokens)
        index._stage.restore(_files.part(state, "stage"))
        if not len(index._tokens) == len(own.tensors["ids"]) == len(index._stage):
            raise ValueError("ids, tokens and first stage must agree in length")
        index._take_ids(own.tensors["ids"])
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        return MultiVectorIndex.from_state, (self.state(),)


def _candidate_lists(rows: npt.NDArray[np.int64], n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Turn (nq, c) rows into (offsets, ids), without the missing ones (-1) and those beyond the index's n."""
    found = (rows >= 0) & (rows < n)
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(found.sum(1), out=offsets[1:])
    return offsets, rows[found]


class LinkPredictor:
    """Predict the missing entity of a triple with hypercomplex embeddings.

    score(h, r, t) = <q, t> with q = h (*) r / |r| (+ translation_r + head_translation_h), plus bias_t; with metric="l2"
    it is -|q - t|^2 + bias_t. Tails are found by an inner-product (or distance) scan with q; heads by the transposed
    rotation of t, which turns the same score into an inner product with h, or with "l2" into the distance from h:
    rotors of complex numbers, quaternions and octonions keep distances. With others, or where rotors or translations
    belong to the head, all heads are turned into q(h) first, for each relation asked.

    Parameters
    ----------
    entities : array of shape (N, C, d), float32
    relations : array of shape (R, C, d), float32
        Rotors; (2R, C, d) with `reciprocal`; (N, C, d) with rotate_by="head".
    algebra : {"quaternion", "dihedron", "complex", "octonion"} or (a, b)
    metric : {"ip", "l2"}
    rotate_by : {"relation", "head"}
        "head": an entity's own rotor turns it, made of its text; `translations` are then required, for nothing else
        tells relations apart.
    translations : array of shape (R, C, d), or (2R, C, d) with `reciprocal`; optional
        Added after the rotation: one a relation.
    head_translations : array like `entities`, optional
        Added after the rotation: one a head.
    bias : array of shape (N,), float32, optional
        Added to the score of each entity that is ranked.
    normalize : bool
        Divide rotors by their Euclidean norms.
    reciprocal : bool
        The embeddings were trained with a reciprocal for each relation: row r + R asks for the head of relation r,
        and heads are predicted by score(t, r + R, h).

    Notes
    -----
    Robin and Lion are rotate_by="head" with `head_translations`, Tetra is entities that hold text in three of their
    four components, all with metric="l2": see `hypercomplex.relation_query`. A bias of the given entity (b_h of a tail
    query) changes no ranking and is left out.

    References
    ----------
    Robin, Lion and Tetra (S01), scoring function; QuatE (Zhang et al. 2019); Canonical tensor decomposition for
    knowledge base completion (Lacroix et al. 2018) for reciprocals and filtered ranking.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> entities = np.eye(4, dtype=np.float32).reshape(4, 4, 1)  # 1, i, j, k
    >>> relations = entities[1:2]  # multiply by i: j * i = -k, so the best tail of i is not 1 but ...
    >>> predictor = pv.retrieve.LinkPredictor(entities, relations)
    >>> scores, ids = predictor.predict_tails([0], [0], k=1)
    >>> ids  # 1 * i = i
    array([[1]])
    """

    def __init__(
        self,
        entities: Any,
        relations: Any,
        *,
        algebra: hypercomplex.Algebra = "quaternion",
        metric: str = "ip",
        rotate_by: str = "relation",
        translations: Any = None,
        head_translations: Any = None,
        bias: Any = None,
        normalize: bool = True,
        reciprocal: bool = False,
    ) -> None:
        op = "LinkPredictor"
        self._rotate_by = choice(op, "rotate_by", rotate_by, ("relation", "head"))
        components = len(hypercomplex.sign_table(algebra))
        self._entities: Any = as_array(op, "entities", entities, ndim=3)
        self._relations: Any = as_array(op, "relations", relations, ndim=3)
        if self._entities.shape[1] != components:
            raise ValueError(
                f"{op}: entities must have {components} components for this algebra, got {self._entities.shape[1]}"
            )
        if tuple(self._relations.shape[1:]) != tuple(self._entities.shape[1:]):
            raise ValueError(
                f"{op}: relations must have the last two axes of entities {tuple(self._entities.shape[1:])}, "
                f"got {tuple(self._relations.shape[1:])}"
            )
        if rotate_by == "head" and self._relations.shape[0] != self.num_entities:
            raise ValueError(
                f"{op}: relations must have one row an entity ({self.num_entities}) with rotate_by='head', "
                f"got {self._relations.shape[0]}"
            )
        if rotate_by == "head" and translations is None:
            raise ValueError(f"{op}: translations must be given with rotate_by='head', got None")
        self._translations: Any = None
        if translations is not None:
            like = self._relations if rotate_by == "relation" else None
            self._translations = self._shifts(op, "translations", translations, "relations", like)
        self._head_translations: Any = None
        if head_translations is not None:
            self._head_translations = self._shifts(
                op, "head_translations", head_translations, "entities", self._entities
            )
        self._bias: Any = None
        if bias is not None:
            self._bias = as_array(op, "bias", bias, ndim=1)
            if self._bias.shape[0] != self.num_entities:
                raise ValueError(
                    f"{op}: bias must have one entry an entity ({self.num_entities}), got {self._bias.shape[0]}"
                )
        name, by_relation = (
            ("relations", self._relations) if rotate_by == "relation" else ("translations", self._translations)
        )
        self._relation_rows = int(by_relation.shape[0])
        if reciprocal and self._relation_rows % 2:
            raise ValueError(f"{op}: {name} must be even in number with reciprocals, got {self._relation_rows}")
        self._algebra = algebra
        self._metric = choice(op, "metric", metric, ("ip", "l2"))
        self._normalize = bool(normalize)
        self._reciprocal = bool(reciprocal)
        # Whether heads are found by the transposed rotation of the tail.
        turning = rotate_by == "relation" and head_translations is None and not reciprocal
        self._adjoint = metric == "ip" and turning
        self._orthogonal = metric == "l2" and turning and self._rotors_keep_distances()
        self._items = self._entities.reshape(self.num_entities, -1)

    def _shifts(self, op: str, name: str, shifts: Any, like_name: str, like: Any) -> Any:
        """Check translations: of the shape of `like`, or, without it, any number of rows like those of entities."""
        shifts = as_array(op, name, shifts, ndim=3)
        if like is not None and tuple(shifts.shape) != tuple(like.shape):
            raise ValueError(
                f"{op}: {name} must have the shape of {like_name} {tuple(like.shape)}, got {tuple(shifts.shape)}"
            )
        if tuple(shifts.shape[1:]) != tuple(self._entities.shape[1:]):
            raise ValueError(
                f"{op}: {name} must have the last two axes of entities {tuple(self._entities.shape[1:])}, "
                f"got {tuple(shifts.shape[1:])}"
            )
        return shifts

    def _rotors_keep_distances(self) -> bool:
        composition = [hypercomplex.sign_table(name) for name in ("complex", "quaternion", "octonion")]
        if not self._normalize or hypercomplex.sign_table(self._algebra) not in composition:
            return False
        return bool((hypercomplex.norm(self._relations) > 0).all())  # those of norm 0 stay 0

    @property
    def num_entities(self) -> int:
        """Number of entities N."""
        return int(self._entities.shape[0])

    @property
    def num_relations(self) -> int:
        """Number of relations R, not counting reciprocals."""
        return self._relation_rows // (2 if self._reciprocal else 1)

    def __repr__(self) -> str:
        return (
            f"LinkPredictor({self.num_entities} entities, {self.num_relations} relations, algebra={self._algebra!r}, "
            f"metric={self._metric!r}, d={self._entities.shape[2]})"
        )

    def predict_tails(
        self,
        heads: Any,
        relations: Any,
        k: int,
        *,
        known: Any = None,
        out: tuple[Any, Any] | None = None,
        num_threads: int | None = None,
    ) -> tuple[Any, Any]:
        """Return the k best tails t of each (head, relation, t).

        Parameters
        ----------
        heads, relations : integer arrays of shape (n,)
        k : int
        known : integer array of shape (m, 3), optional
            Triples (head, relation, tail) that are not to be returned.
        out : pair of arrays, optional
            (scores, ids) of the returned shapes and dtypes.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        scores : array of shape (n, k), float32
            Best first (also with metric="l2", where they are negative squared distances); -inf where missing.
        ids : array of shape (n, k), int64
            Entities; -1 where missing. Both in the library of `entities`.

        Raises
        ------
        ValueError
            k below 1, heads and relations of different lengths.
        IndexError
            An entity or a relation that does not exist.
        """
        op = "LinkPredictor.predict_tails"
        heads, relations = self._pair(op, ("heads", heads), ("relations", relations))
        return self._predict(op, "tail", heads, relations, k, known, out, num_threads)

    def predict_heads(
        self,
        relations: Any,
        tails: Any,
        k: int,
        *,
        known: Any = None,
        out: tuple[Any, Any] | None = None,
        num_threads: int | None = None,
    ) -> tuple[Any, Any]:
        """Return the k best heads h of each (h, relation, tail).

        Parameters
        ----------
        relations, tails : integer arrays of shape (n,)
        k : int
        known : integer array of shape (m, 3), optional
            Triples (head, relation, tail) that are not to be returned.
        out : pair of arrays, optional
            (scores, ids) of the returned shapes and dtypes.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        scores : array of shape (n, k), float32
            Best first, as for `predict_tails`.
        ids : array of shape (n, k), int64

        Raises
        ------
        ValueError
            k below 1, relations and tails of different lengths.
        IndexError
            An entity or a relation that does not exist.
        """
        op = "LinkPredictor.predict_heads"
        relations, tails = self._pair(op, ("relations", relations), ("tails", tails))
        return self._predict(op, "head", tails, relations, k, known, out, num_threads)

    def evaluate(self, triples: Any, *, known: Any = None, num_threads: int | None = None) -> dict[str, float]:
        """Rank the true tail and the true head of each triple among all entities.

        Parameters
        ----------
        triples : integer array of shape (n, 3)
            (head, relation, tail).
        known : integer array of shape (m, 3), optional
            All true triples (train, validation and test): they do not count against the one that is ranked.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        dict
            "mrr" (mean reciprocal rank), "hits@1", "hits@3", "hits@10", "mean_rank": means over the 2 n queries, ties
            counted at their mean rank ("realistic").

        Raises
        ------
        ValueError
            No triples, or arrays of another shape.
        IndexError
            An entity or a relation that does not exist.

        Notes
        -----
        2 N C d flops a query (where heads must be turned, of 4096 triples all entities once a relation, too). Scores
        are never stored: memory does not grow with N times n.
        """
        op = "LinkPredictor.evaluate"
        triples = self._triples(op, "triples", triples)
        if not len(triples):
            raise ValueError(f"{op}: triples must not be empty")
        ranks = np.concatenate(self._ranks_of_both(op, triples, known, "realistic", num_threads))
        hits = {f"hits@{n}": float(np.mean(ranks <= n)) for n in (1, 3, 10)}
        return {"mrr": float(np.mean(1 / ranks)), **hits, "mean_rank": float(np.mean(ranks))}

    def ranks(
        self, triples: Any, *, known: Any = None, ties: str = "realistic", num_threads: int | None = None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the ranks of the true head and of the true tail of each triple among all entities; 1 is the best.

        What `evaluate` averages: for figures by relation or side, or tests of significance.

        Parameters
        ----------
        triples : integer array of shape (n, 3)
            (head, relation, tail).
        known : integer array of shape (m, 3), optional
            All true triples: they do not count against the one that is ranked (filtered ranks).
        ties : {"realistic", "optimistic", "pessimistic"}
            What an entity that scores exactly as the true one counts, as in `scan.rank`.
        num_threads : int, optional
            CPU threads; the process setting when None.

        Returns
        -------
        head_ranks, tail_ranks : numpy arrays of shape (n,), float64
            Halves occur among realistic ranks.

        Raises
        ------
        ValueError
            Arrays of another shape, an unknown rule for ties.
        IndexError
            An entity or a relation that does not exist.

        Notes
        -----
        Costs what `evaluate` does.

        References
        ----------
        On the Ambiguity of Rank-Based Evaluation of Entity Alignment or Link Prediction Methods (Berrendorf et al.
        2020), section 3: the three ranks.

        Examples
        --------
        >>> import numpy as np, polyvec as pv
        >>> entities = np.eye(4, dtype=np.float32).reshape(4, 4, 1)  # 1, i, j, k
        >>> predictor = pv.retrieve.LinkPredictor(entities, entities[1:2])  # multiply by i
        >>> predictor.ranks([[0, 0, 1], [0, 0, 2]])
        (array([1., 3.]), array([1., 3.]))
        """
        op = "LinkPredictor.ranks"
        choice(op, "ties", ties, ("realistic", "optimistic", "pessimistic"))
        return self._ranks_of_both(op, self._triples(op, "triples", triples), known, ties, num_threads)

    def _pair(self, op: str, *named: tuple[str, Any]) -> list[npt.NDArray[np.int64]]:
        arrays = [np.asarray(as_ids(op, name, ids)) for name, ids in named]
        if len(arrays[0]) != len(arrays[1]):
            raise ValueError(
                f"{op}: {named[1][0]} must have the same length as {named[0][0]} ({len(arrays[0])}), "
                f"got {len(arrays[1])}"
            )
        for (name, _), ids in zip(named, arrays, strict=True):
            self._check_range(op, name, ids, self.num_relations if name == "relations" else self.num_entities)
        return arrays

    def _triples(self, op: str, name: str, triples: Any) -> npt.NDArray[np.int64]:
        array = np.asarray(as_ids(op, name, triples, ndim=2))
        if array.shape[1] != 3:
            raise ValueError(f"{op}: {name} must have 3 columns (head, relation, tail), got {array.shape[1]}")
        for column, end in zip(array.T, (self.num_entities, self.num_relations, self.num_entities), strict=True):
            self._check_range(op, name, column, end)
        return array

    @staticmethod
    def _check_range(op: str, name: str, ids: npt.NDArray[np.int64], end: int) -> None:
        bad = np.flatnonzero((ids < 0) | (ids >= end))
        if len(bad):
            raise IndexError(f"{op}: {name} must be in [0, {end}), got {ids[bad[0]]} at position {bad[0]}")

    def _scans(
        self, side: str, anchors: npt.NDArray[np.int64], relations: npt.NDArray[np.int64], num_threads: int | None
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Yield (rows, queries, items): the scans that score every entity on `side` for rows of the batch."""

        def rotate(ids: Any, relation_ids: Any, *, adjoint: bool = False) -> Any:
            return hypercomplex.relation_query(
                self._entities,
                self._relations,
                ids,
                relation_ids,
                algebra=self._algebra,
                rotate_by=self._rotate_by,
                translations=None if adjoint else self._translations,
                head_translations=None if adjoint else self._head_translations,
                normalize=self._normalize,
                adjoint=adjoint,
                num_threads=num_threads,
            )

        everything = slice(None)
        if side == "tail":
            yield everything, rotate(anchors, relations), self._items
        elif self._reciprocal:
            yield everything, rotate(anchors, relations + self.num_relations), self._items
        elif self._adjoint:
            yield everything, rotate(anchors, relations, adjoint=True), self._items
        elif self._orthogonal:
            yield everything, self._turned_back(anchors, relations, num_threads), self._items
        else:  # the score is no product or distance of h and a vector of t: rotate all heads, one relation at a time
            for relation in np.unique(relations):
                rows = np.flatnonzero(relations == relation)
                heads = np.arange(self.num_entities)
                yield rows, self._items[anchors[rows]], rotate(heads, np.full_like(heads, relation))

    def _turned_back(
        self, anchors: npt.NDArray[np.int64], relations: npt.NDArray[np.int64], num_threads: int | None
    ) -> Any:
        """Return h with h (*) r + c = t: unit rotors keep distances, |h' (*) r + c - t| = |h' - h|."""
        tails = self._entities[anchors]
        if self._translations is not None:
            tails = tails - self._translations[relations]
        return hypercomplex.relation_query(
            tails,
            self._relations,
            np.arange(len(anchors)),
            relations,
            algebra=self._algebra,
            adjoint=True,
            num_threads=num_threads,
        )

    def _predict(
        self,
        op: str,
        side: str,
        anchors: npt.NDArray[np.int64],
        relations: npt.NDArray[np.int64],
        k: int,
        known: Any,
        out: tuple[Any, Any] | None,
        num_threads: int | None,
    ) -> tuple[Any, Any]:
        k = as_count(op, "k", k)
        known = None if known is None else self._triples(op, "known", known)
        exclude = _true_answers(known, side, anchors, relations)
        scores, ids = outputs(op, out, self._items, (len(anchors), k), ("float32", "int64"), ("scores", "ids"))
        for rows, queries, items in self._scans(side, anchors, relations, num_threads):
            found, found_ids = scan.topk(
                queries,
                items,
                k,
                metric=self._metric,
                bias=self._bias,
                exclude=_rows_of(exclude, rows),
                num_threads=num_threads,
            )
            scores[rows] = -found if self._metric == "l2" else found
            ids[rows] = found_ids
        if side == "head" and self._adjoint and self._translations is not None:
            # <h (*) r + c, t> = <h, adjoint query> + <c, t>: the constant of the (r, t) pair.
            shifts = self._translations.reshape(self._relations.shape[0], -1)
            scores += scan.score_pairs(shifts[relations], self._items, anchors[:, None], num_threads=num_threads)
        return scores, ids

    def _ranks_of_both(
        self, op: str, triples: npt.NDArray[np.int64], known: Any, ties: str, num_threads: int | None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        known = None if known is None else self._triples(op, "known", known)
        heads, tails = np.empty(len(triples)), np.empty(len(triples))
        for side, ranks in (("head", heads), ("tail", tails)):
            for start in range(0, len(triples), _RANK_BLOCK):
                block = slice(start, start + _RANK_BLOCK)
                ranks[block] = self._ranks(triples[block], side, known, ties, num_threads)
        return heads, tails

    def _ranks(
        self, triples: npt.NDArray[np.int64], side: str, known: Any, ties: str, num_threads: int | None
    ) -> npt.NDArray[np.float64]:
        heads, relations, tails = np.ascontiguousarray(triples.T)
        anchors, targets = (heads, tails) if side == "tail" else (tails, heads)
        exclude = _true_answers(known, side, anchors, relations)
        ranks = np.empty(len(triples))
        for rows, queries, items in self._scans(side, anchors, relations, num_threads):
            ranks[rows] = np.asarray(
                scan.rank(
                    queries,
                    items,
                    targets[rows],
                    metric=self._metric,
                    bias=self._bias,
                    known=_rows_of(exclude, rows),
                    ties=ties,
                    num_threads=num_threads,
                )
            )
        return ranks


_RANK_BLOCK = 4096  # triples ranked at a time: bounds the memory of their query vectors

_Lists = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _true_answers(
    known: npt.NDArray[np.int64] | None,
    side: str,
    anchors: npt.NDArray[np.int64],
    relations: npt.NDArray[np.int64],
) -> _Lists | None:
    """Return for each (anchor, relation) the entities that `known` has on `side`, as (offsets, ids)."""
    if known is None:
        return None
    anchor, answer = (known[:, 0], known[:, 2]) if side == "tail" else (known[:, 2], known[:, 0])
    width = max(int(relations.max(initial=0)), int(known[:, 1].max(initial=0))) + 1
    keys = anchor * width + known[:, 1]
    order = np.argsort(keys, kind="stable")
    keys, wanted = keys[order], anchors * width + relations
    first, last = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
    return _gather_lists(answer[order], first, last - first)


def _gather_lists(
    values: npt.NDArray[np.int64], first: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> _Lists:
    """Concatenate values[first[i] : first[i] + lengths[i]] into (offsets, ids)."""
    offsets = np.zeros(len(first) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets, values[np.repeat(first - offsets[:-1], lengths) + np.arange(offsets[-1])]


def _rows_of(lists: _Lists | None, rows: Any) -> _Lists | None:
    if lists is None or isinstance(rows, slice):
        return lists
    offsets, ids = lists
    return _gather_lists(ids, offsets[:-1][rows], np.diff(offsets)[rows])
