"""The first stages of `retrieve.MultiVectorIndex`: what finds candidates for exact MaxSim."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from polyvec import _files, fde, hnsw, maxsim, quantize, scan
from polyvec._kmeans import train_centroids, training_rows
from polyvec._packed_tokens import MOST_CENTROIDS, centroid_count, nearest_centroids
from polyvec._ragged import Ragged

Floats = npt.NDArray[np.float32]
Included = npt.NDArray[np.int64] | None  # numbers of documents, rising; None: all


class Rows:
    """A matrix that grows: capacity doubles, so that adding costs a copy a row on average."""

    def __init__(self, width: int, dtype: Any) -> None:
        self._data = np.empty((0, width), dtype)
        self._n = 0

    @classmethod
    def of(cls, data: npt.NDArray[Any]) -> Rows:
        rows = cls(data.shape[1], data.dtype)
        rows._data, rows._n = data, len(data)
        return rows

    def __len__(self) -> int:
        return self._n

    def append(self, rows: npt.NDArray[Any]) -> None:
        need = self._n + len(rows)
        if need > len(self._data):
            grown = np.empty((max(need, 2 * len(self._data)), self._data.shape[1]), self._data.dtype)
            grown[: self._n] = self._data[: self._n]
            self._data = grown
        self._data[self._n : need] = rows
        self._n = need

    def truncate(self, n: int) -> None:
        self._n = min(self._n, n)

    def view(self) -> npt.NDArray[Any]:
        return self._data[: self._n]


class FirstStage(Protocol):
    """Documents are numbered in the order of `add`."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def prepare(self, op: str, held: Ragged, docs: Ragged, num_threads: int | None) -> None:
        """Learn what `add` of the documents needs beside those held, or raise before anything changes."""

    def add(self, docs: Ragged, num_threads: int | None) -> None: ...

    def truncate(self, n: int) -> None:
        """Keep the first n documents."""

    def search(self, queries: Ragged, k: int, include: Included, num_threads: int | None) -> npt.NDArray[np.int64]:
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
        self._dim = dim
        self._centroids = np.zeros((1, dim), np.float32)
        self._tokens = Rows(1, np.uint16)
        self._offsets = Rows.of(np.zeros((1, 1), np.int64))  # of the documents among the tokens

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def nbytes(self) -> int:
        return self._centroids.nbytes + self._tokens.view().nbytes + self._offsets.view().nbytes

    def prepare(self, op: str, held: Ragged, docs: Ragged, num_threads: int | None) -> None:
        """Train centroids when there are to be twice as many: four times the tokens."""
        n, more = len(held.values), len(docs.values)
        count = min(max(1, centroid_count(n + more) // 2), MOST_CENTROIDS)
        if count < 2 * len(self._centroids):
            return
        rows = training_rows(n + more, count)
        sample = np.concatenate([held.values[rows[rows < n]], np.asarray(docs.values)[rows[rows >= n] - n]])
        centroids = train_centroids(op, sample, count, num_threads)
        tokens = Rows(1, np.uint16)
        tokens.append(nearest_centroids(op, held.values, centroids, num_threads)[:, None])
        self._centroids, self._tokens, self._offsets = centroids, tokens, Rows.of(held.offsets[:, None].copy())

    def add(self, docs: Ragged, num_threads: int | None) -> None:
        ids = nearest_centroids("MultiVectorIndex.add", docs.values, self._centroids, num_threads)
        self._offsets.append(docs.offsets[1:, None] + len(self._tokens))
        self._tokens.append(ids[:, None])

    def truncate(self, n: int) -> None:
        self._offsets.truncate(n + 1)
        self._tokens.truncate(int(self._offsets.view()[-1, 0]))

    def search(self, queries: Ragged, k: int, include: Included, num_threads: int | None) -> npt.NDArray[np.int64]:
        docs = self._packed() if include is None else self._packed().take(include)
        ids = np.asarray(maxsim.topk(queries, docs, k, num_threads=num_threads)[1])
        return ids if include is None else np.append(include, -1)[ids]

    def _packed(self) -> maxsim.PackedTokens:
        offsets = self._offsets.view()[:, 0]
        sets = Ragged(self._tokens.view()[: offsets[-1]], offsets)
        return maxsim.PackedTokens(sets, "centroid", self._dim, centroids=self._centroids)

    def state(self) -> _files.State:
        return self._packed().state()

    def restore(self, state: _files.State) -> None:
        packed = maxsim.PackedTokens.from_state(state)
        if packed.dtype != "centroid" or packed.dim != self._dim:
            raise ValueError("first stage must be of centroids, as wide as the tokens")
        tensors = packed.state().tensors
        self._centroids = tensors["centroids"]
        self._tokens, self._offsets = Rows.of(tensors["values"]), Rows.of(tensors["offsets"][:, None])


class EncodedStage:
    """Documents as one vector each."""

    def __init__(self, encoder: fde.Encoder) -> None:
        self._encoder = encoder

    def prepare(self, op: str, held: Ragged, docs: Ragged, num_threads: int | None) -> None:
        pass

    def add(self, docs: Ragged, num_threads: int | None) -> None:
        self._add(np.asarray(self._encoder.encode_docs(docs, num_threads=num_threads)), num_threads)

    def search(self, queries: Ragged, k: int, include: Included, num_threads: int | None) -> npt.NDArray[np.int64]:
        encodings = np.asarray(self._encoder.encode_queries(queries, num_threads=num_threads))
        return self._search(encodings, k, include, num_threads)

    def _add(self, encodings: Floats, num_threads: int | None) -> None:
        raise NotImplementedError

    def _search(self, encodings: Floats, k: int, include: Included, num_threads: int | None) -> npt.NDArray[np.int64]:
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

    def _add(self, encodings: Floats, num_threads: int | None) -> None:
        self._rows.append(encodings)

    def _search(self, encodings: Floats, k: int, include: Included, num_threads: int | None) -> npt.NDArray[np.int64]:
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

    def prepare(self, op: str, held: Ragged, docs: Ragged, num_threads: int | None) -> None:
        if self._quantizer.codebooks is not None:
            return
        if len(docs) < 256:
            raise ValueError(f'{op}: docs must be at least 256 to train first_stage "pq", got {len(docs)}')
        sample = docs.take(np.linspace(0, len(docs) - 1, min(len(docs), self._TRAIN_DOCS)).astype(np.int64))
        encodings = self._encoder.encode_docs(sample, num_threads=num_threads)
        self._quantizer.fit(np.asarray(encodings), num_threads=num_threads)

    def truncate(self, n: int) -> None:
        self._codes.truncate(n)

    def _add(self, encodings: Floats, num_threads: int | None) -> None:
        self._codes.append(self._quantizer.encode(encodings, num_threads=num_threads))

    def _search(self, encodings: Floats, k: int, include: Included, num_threads: int | None) -> npt.NDArray[np.int64]:
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
    """A graph over the encodings."""

    def __init__(self, encoder: fde.Encoder) -> None:
        super().__init__(encoder)
        self._index = hnsw.Index(encoder.output_dim, metric="ip", storage="int8")

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        return self._index.nbytes

    def truncate(self, n: int) -> None:
        extra = self._index.ids[self._index.ids >= n]
        if len(extra):
            self._index.remove(extra)

    def _add(self, encodings: Floats, num_threads: int | None) -> None:
        first = len(self)
        self._index.add(encodings, np.arange(first, first + len(encodings)), num_threads=num_threads)

    def _search(self, encodings: Floats, k: int, include: Included, num_threads: int | None) -> npt.NDArray[np.int64]:
        ids: Any = self._index.search(encodings, k, include=include, num_threads=num_threads)[1]
        return ids  # type: ignore[no-any-return]

    def state(self) -> _files.State:
        return self._index.state()

    def restore(self, state: _files.State) -> None:
        index = hnsw.Index.from_state(state)
        if index.dim != self._encoder.output_dim:
            raise ValueError("the graph must be of the encoder's width")
        self._index = index


_ENCODED: dict[str, type[FlatStage] | type[CodeStage] | type[GraphStage]] = {
    "hnsw": GraphStage,
    "pq": CodeStage,
    "flat": FlatStage,
}
FIRST_STAGES = ("centroids", *_ENCODED)


def first_stage_of(name: str, dim: int, encoder: fde.Encoder | None) -> FirstStage:
    """Return an empty stage; those without an encoder are "centroids"."""
    return CentroidStage(dim) if encoder is None else _ENCODED[name](encoder)
