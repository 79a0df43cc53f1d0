"""The tokens of an index's documents: packed as `maxsim.pack` packs them, and growing in number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from polyvec import _files
from polyvec._kmeans import train_centroids, training_rows
from polyvec._packed_tokens import (
    RESIDUAL_BITS,
    STORED,
    PackedTokens,
    bucket_weights_of,
    centroid_count,
    encoded,
    nearest_centroids,
    stored_width,
)
from polyvec._ragged import Ragged

_BLOCK = 4096  # documents decoded at a time


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


class TokenStore:
    """Documents, numbered in the order of `append`.

    Where tokens refer to centroids, these are trained on the first documents, and anew when there are to be twice as
    many, for four times the tokens: all tokens are then decoded and stored again.
    """

    def __init__(self, dim: int, dtype: str, count: Callable[[int], int] = centroid_count) -> None:
        """`count` says how many centroids so many tokens get."""
        self._dim, self._dtype, self._count = dim, dtype, count
        shared: dict[str, npt.NDArray[np.float32]] = {}
        if dtype == "centroid" or dtype in RESIDUAL_BITS:
            shared["centroids"] = np.zeros((1, dim), np.float32)
        if dtype in RESIDUAL_BITS:
            shared["bucket_weights"] = np.zeros(1 << RESIDUAL_BITS[dtype], np.float32)
        self._begin(shared)

    def _begin(self, shared: dict[str, npt.NDArray[np.float32]]) -> None:
        self._shared = shared
        self._parts = {"values": Rows(stored_width(self._dtype, self._dim), STORED[self._dtype])}
        if STORED[self._dtype] == "uint8":
            self._parts["scales"] = Rows(1, np.float32)
        if self._dtype in RESIDUAL_BITS:
            self._parts["centroid_ids"] = Rows(1, np.int32)
        self._offsets = Rows.of(np.zeros((1, 1), np.int64))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self._offsets.view()[-1, 0])

    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self._offsets.view()[:, 0])

    @property
    def nbytes(self) -> int:
        return self.packed().nbytes

    def packed(self) -> PackedTokens:
        """Return the documents, in the memory of the store."""
        offsets = self._offsets.view()[:, 0]
        parts = {name: rows.view()[: offsets[-1]] for name, rows in self._parts.items()}
        sets = Ragged(parts.pop("values"), offsets)
        columns = {name: part[:, 0] for name, part in parts.items()}
        return PackedTokens(sets, self._dtype, self._dim, **columns, **self._shared)

    def prepare(self, op: str, held: PackedTokens, docs: Ragged, num_threads: int | None) -> None:
        """Train the centroids that `docs` need beside the documents `held`, and store those again, if it is time."""
        if not self._shared:
            return
        n, more = int(held.offsets[-1]), len(docs.values)
        count = self._count(n + more)
        if count < 2 * len(self._shared["centroids"]):
            return
        rows = training_rows(n + more, count)
        parts = [
            block.values[rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(block.values))] - first]
            for first, block in _decoded(held, num_threads)
        ]
        tokens = np.concatenate([*parts, np.asarray(docs.values)[rows[rows >= n] - n]])
        shared = {"centroids": train_centroids(op, tokens, count, num_threads)}
        if self._dtype in RESIDUAL_BITS:
            ids = nearest_centroids(op, tokens, shared["centroids"], num_threads)
            shared["bucket_weights"] = bucket_weights_of(op, tokens, ids, shared["centroids"], self._dtype, num_threads)
        renewed = TokenStore(self._dim, self._dtype)
        renewed._begin(shared)
        for _, block in _decoded(held, num_threads):
            renewed.append(op, block, num_threads)
        self._shared, self._parts, self._offsets = shared, renewed._parts, renewed._offsets

    def append(self, op: str, docs: Ragged, num_threads: int | None) -> None:
        parts: dict[str, Any] = dict(self._shared)
        if self._shared:
            parts["centroid_ids"] = nearest_centroids(op, docs.values, self._shared["centroids"], num_threads)
        tensors = encoded(op, docs, self._dtype, parts, num_threads, bounded=False).state().tensors
        for name, rows in self._parts.items():
            rows.truncate(self.num_tokens)  # a call that was cut short may have left more
            rows.append(_columns(tensors[name]))
        self._offsets.append(docs.offsets[1:, None] + self.num_tokens)

    def truncate(self, n: int) -> None:
        """Keep the first n documents."""
        self._offsets.truncate(n + 1)

    def keep(self, numbers: npt.NDArray[np.int64]) -> None:
        """Keep these documents, renumbered in their order."""
        self._take(self.packed().take(numbers))

    def restore(self, state: _files.State) -> None:
        """Take over the state of packed tokens, whose arrays are used in place until the first change."""
        packed = PackedTokens.from_state(state)
        if packed.dtype != self._dtype or packed.dim != self._dim:
            raise ValueError(f"tokens must be {self._dtype} of width {self._dim}, got {packed.dtype} of {packed.dim}")
        self._take(packed)

    def _take(self, packed: PackedTokens) -> None:
        tensors = packed.state().tensors
        self._shared = {name: tensors[name] for name in self._shared}
        self._parts = {name: Rows.of(_columns(tensors[name])) for name in self._parts}
        self._offsets = Rows.of(tensors["offsets"][:, None])


def _decoded(packed: PackedTokens, num_threads: int | None) -> Iterator[tuple[int, Ragged]]:
    """Yield the documents as floats, some at a time, and the number of their first token."""
    for begin in range(0, len(packed), _BLOCK):
        yield int(packed.offsets[begin]), packed[begin : begin + _BLOCK].decode(num_threads=num_threads)


def _columns(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return x[:, None] if x.ndim == 1 else x
