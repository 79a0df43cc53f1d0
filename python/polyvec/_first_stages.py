"""The first stages of `retrieve.MultiVectorIndex`: what finds candidates for exact MaxSim."""

from __future__ import annotations

from copy import copy
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from polyvec import _files, fde, hnsw, maxsim, quantize, scan
from polyvec._packed_tokens import MOST_CENTROIDS, PackedTokens, centroid_count
from polyvec._ragged import Ragged
from polyvec._token_store import Rows, TokenStore

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]  # of documents, rising
Included = Numbers | None  # None: all


class FirstStage(Protocol):
    """Documents are numbered in the order of `add`."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def prepare(self, op: str, held: PackedTokens, docs: Ragged, num_threads: int | None) -> None:
        """Learn what `add` of the documents needs beside those held, or raise before anything changes."""

    def add(self, docs: Ragged, num_threads: int | None) -> None: ...

    def truncate(self, n: int) -> None:
        """Keep the first n documents."""

    def remove(self, numbers: Numbers) -> None:
        """Take documents out, which keep their numbers and are not in `include` any more."""

    def keep(self, numbers: Numbers) -> None:
        """Keep these documents, renumbered in their order; a copy made by `copy.copy` before has all still."""

    def search(self, queries: Ragged, k: int, include: Included, num_threads: int | None) -> Numbers:
        """Return (nq, k) documents, of those in `include`, some of which may be -1 or cut off."""

    def state(self) -> _files.State: ...

    def restore(self, state: _files.State) -> None:
        """Take over a state into a stage that is empty."""


class CentroidStage:
    """Every token as the nearest of some centroids, scored by MaxSim.

    Half as many centroids as `pack` trains: with all of them, products with queries cost more than better candidates
    save.
    """

    def __init__(self, dim: int) -> None:
        self._tokens = TokenStore(dim, "centroid", lambda n: min(max(1, centroid_count(n) // 2), MOST_CENTROIDS))

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def nbytes(self) -> int:
        return self._tokens.nbytes

    def prepare(self, op: str, held: PackedTokens, docs: Ragged, num_threads: int | None) -> None:
        self._tokens.prepare(op, held, docs, num_threads)

    def add(self, docs: Ragged, num_threads: int | None) -> None:
        self._tokens.append("MultiVectorIndex.add", docs, num_threads)

    def truncate(self, n: int) -> None:
        self._tokens.truncate(n)

    def remove(self, numbers: Numbers) -> None:
        pass

    def keep(self, numbers: Numbers) -> None:
        tokens = copy(self._tokens)
        tokens.keep(numbers)
        self._tokens = tokens

    def search(self, queries: Ragged, k: int, include: Included, num_threads: int | None) -> Numbers:
        return np.asarray(maxsim.topk(queries, self._tokens.packed(), k, include=include, num_threads=num_threads)[1])

    def state(self) -> _files.State:
        return self._tokens.packed().state()

    def restore(self, state: _files.State) -> None:
        self._tokens.restore(state)


class EncodedStage:
    """Documents as one vector each."""

    def __init__(self, encoder: fde.Encoder) -> None:
        self._encoder = encoder

    def prepare(self, op: str, held: PackedTokens, docs: Ragged, num_threads: int | None) -> None:
        pass

    def remove(self, numbers: Numbers) -> None:
        pass

    def add(self, docs: Ragged, num_threads: int | None) -> None:
        self._add(np.asarray(self._encoder.encode_docs(docs, num_threads=num_threads)), num_threads)

    def search(self, queries: Ragged, k: int, include: Included, num_threads: int | None) -> Numbers:
        encodings = np.asarray(self._encoder.encode_queries(queries, num_threads=num_threads))
        return self._search(encodings, k, include, num_threads)

    def _add(self, encodings: Floats, num_threads: int | None) -> None:
        raise NotImplementedError

    def _search(self, encodings: Floats, k: int, include: Included, num_threads: int | None) -> Numbers:
        raise NotImplementedError


class FlatStage(EncodedStage):
    """All encodings, scanned exactly."""

    def __init__(self, encoder: fde.Encoder) -> None:
        super().__init__(encoder)
        self._rows = Rows(encoder.output_dim, np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        return self._rows.view().nbytes

    def truncate(self, n: int) -> None:
        self._rows.truncate(n)

    def keep(self, numbers: Numbers) -> None:
        self._rows = Rows.of(self._rows.view()[numbers])

    def _add(self, encodings: Floats, num_threads: int | None) -> None:
        self._rows.append(encodings)

    def _search(self, encodings: Floats, k: int, include: Included, num_threads: int | None) -> Numbers:
        rows, bias = self._rows.view(), None
        if include is not None:
            bias = np.full(len(rows), -np.inf, np.float32)
            bias[include] = 0
        scores, ids = scan.topk(encodings, rows, k, bias=bias, num_threads=num_threads)
        return np.asarray(ids) if include is None else np.where(np.isneginf(scores), -1, ids)

    def state(self) -> _files.State:
        return _files.State({"encodings": self._rows.view()}, {})

    def restore(self, state: _files.State) -> None:
        encodings = state.tensors["encodings"]
        if encodings.shape[1:] != (self._encoder.output_dim,):
            raise ValueError("encodings must be those of the encoder")
        self._rows = Rows.of(encodings)


class CodeStage(EncodedStage):
    """Product-quantised encodings, scanned: 8 dimensions a byte."""

    _TRAIN_DOCS = 8192

    def __init__(self, encoder: fde.Encoder) -> None:
        super().__init__(encoder)
        self._quantizer = quantize.ProductQuantizer(encoder.output_dim, encoder.output_dim // 8, bits=8, metric="ip")
        self._codes = Rows(encoder.output_dim // 8, np.uint8)

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def nbytes(self) -> int:
        return self._codes.view().nbytes

    def prepare(self, op: str, held: PackedTokens, docs: Ragged, num_threads: int | None) -> None:
        if self._quantizer.codebooks is not None:
            return
        if len(docs) < 256:
            raise ValueError(f'{op}: docs must be at least 256 to train first_stage "pq", got {len(docs)}')
        sample = docs.take(np.linspace(0, len(docs) - 1, min(len(docs), self._TRAIN_DOCS)).astype(np.int64))
        encodings = self._encoder.encode_docs(sample, num_threads=num_threads)
        self._quantizer.fit(np.asarray(encodings), num_threads=num_threads)

    def truncate(self, n: int) -> None:
        self._codes.truncate(n)

    def keep(self, numbers: Numbers) -> None:
        self._codes = Rows.of(self._codes.view()[numbers])

    def _add(self, encodings: Floats, num_threads: int | None) -> None:
        self._codes.append(self._quantizer.encode(encodings, num_threads=num_threads))

    def _search(self, encodings: Floats, k: int, include: Included, num_threads: int | None) -> Numbers:
        codes = self._codes.view()
        ids: Any = self._quantizer.search(encodings, codes, k, include=include, num_threads=num_threads)[1]
        return ids  # type: ignore[no-any-return]

    def state(self) -> _files.State:
        codes = _files.State({"codes": self._codes.view()}, {})
        return _files.join(codes=codes, quantizer=self._quantizer.state())

    def restore(self, state: _files.State) -> None:
        codes = _files.part(state, "codes").tensors["codes"]
        quantizer = quantize.ProductQuantizer.from_state(_files.part(state, "quantizer"))
        if quantizer.dim != self._encoder.output_dim or codes.shape[1:] != (quantizer.m,):
            raise ValueError("codes must be those of the quantizer, and both those of the encoder")
        self._quantizer, self._codes = quantizer, Rows.of(codes)


class GraphStage(EncodedStage):
    """A graph over the encodings. Its names of documents rise with their numbers, and stay when those change."""

    def __init__(self, encoder: fde.Encoder) -> None:
        super().__init__(encoder)
        self._index = hnsw.Index(encoder.output_dim, metric="ip", storage="int4", rerank="int8")
        self._names = Rows(1, np.int64)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def nbytes(self) -> int:
        return self._index.nbytes + self._names.view().nbytes

    def truncate(self, n: int) -> None:
        self.remove(np.arange(n, len(self)))
        self._names.truncate(n)

    def remove(self, numbers: Numbers) -> None:
        if len(numbers):
            self._drop(self._names.view()[numbers, 0])

    def _drop(self, names: Numbers) -> None:
        self._index.remove(names[np.isin(names, self._index.ids)])

    def keep(self, numbers: Numbers) -> None:
        self._names = Rows.of(self._names.view()[numbers])

    def _add(self, encodings: Floats, num_threads: int | None) -> None:
        first = int(self._names.view()[-1, 0]) + 1 if len(self) else 0
        names = np.arange(first, first + len(encodings))
        if len(names) and first in self._index:  # a call that was cut short may have left some
            self._drop(names)
        self._index.add(encodings, names, num_threads=num_threads)
        self._names.append(names[:, None])

    def _search(self, encodings: Floats, k: int, include: Included, num_threads: int | None) -> Numbers:
        names = self._names.view()[:, 0]
        if include is not None:
            include = None if len(include) == len(self._index) else names[include]
        found: Any = self._index.search(encodings, k, include=include, num_threads=num_threads)[1]
        return np.where(found >= 0, np.searchsorted(names, found), -1)

    def state(self) -> _files.State:
        names = _files.State({"of_documents": self._names.view()[:, 0]}, {})
        return _files.join(graph=self._index.state(), names=names)

    def restore(self, state: _files.State) -> None:
        index = hnsw.Index.from_state(_files.part(state, "graph"))
        names = _files.part(state, "names").tensors["of_documents"]
        if index.dim != self._encoder.output_dim:
            raise ValueError("the graph must be of the encoder's width")
        if names.ndim != 1 or names.dtype != np.int64 or (np.diff(names) <= 0).any():
            raise ValueError("the names of documents must rise")
        if not np.isin(index.ids, names).all():
            raise ValueError("the graph must have no other documents")
        self._index, self._names = index, Rows.of(names[:, None])


_ENCODED: dict[str, type[FlatStage] | type[CodeStage] | type[GraphStage]] = {
    "hnsw": GraphStage,
    "pq": CodeStage,
    "flat": FlatStage,
}
FIRST_STAGES = ("centroids", *_ENCODED)


def first_stage_of(name: str, dim: int, encoder: fde.Encoder | None) -> FirstStage:
    """Return an empty stage; those without an encoder are "centroids"."""
    return CentroidStage(dim) if encoder is None else _ENCODED[name](encoder)
