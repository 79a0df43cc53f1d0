"""Ragged arrays: many sets of rows, one after the other, with offsets that say where each begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from polyvec._arrays import (
    as_array,
    as_ids,
    contiguous,
    device_name,
    dtype_name,
    is_array,
    is_torch,
    joined,
    native,
    rows_of,
    to_device_of,
    to_host,
)


class Ragged:
    """Sets of vectors of different sizes: set i is `values[offsets[i]:offsets[i + 1]]`.

    Parameters
    ----------
    values : array of shape (T, d)
        The rows of all sets, one set after the other. Kept as given (numpy, torch, ...), never copied.
    offsets : array of shape (n + 1,), integer
        Starts at 0, never runs backwards, ends at T. Kept as a numpy int64 array.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> sets = pv.Ragged(np.ones((5, 2), np.float32), [0, 2, 2, 5])
    >>> len(sets), sets.lengths.tolist(), sets[2].shape
    (3, [2, 0, 3], (3, 2))
    >>> sets[1:]  # consecutive sets share their rows with these
    Ragged(2 sets, 3 rows, d=2, float32)
    """

    __slots__ = ("_offsets", "_placed", "values")

    def __init__(self, values: Any, offsets: Any) -> None:
        values = native(values) if is_array(values) else np.asarray(values, dtype=np.float32)
        if len(values.shape) != 2:
            raise ValueError(f"Ragged: values must have 2 axes, got shape {tuple(values.shape)}")
        offsets = np.asarray(as_ids("Ragged", "offsets", to_host(offsets)))
        if len(offsets) == 0 or offsets[0] != 0:
            raise ValueError(f"Ragged: offsets must start at 0, got {offsets[0] if len(offsets) else 'none'}")
        back = np.flatnonzero(offsets[1:] < offsets[:-1])
        if len(back):
            i = int(back[0])
            raise ValueError(
                f"Ragged: offsets must not run backwards, got {offsets[i]} then {offsets[i + 1]} at position {i}"
            )
        if offsets[-1] != values.shape[0]:
            raise ValueError(
                f"Ragged: offsets must end at the number of rows of values ({values.shape[0]}), got {offsets[-1]}"
            )
        self.values: Any = values
        self._offsets: npt.NDArray[np.int64] | None = offsets
        self._placed: Any = offsets if device_name(values) == "cpu" else None

    @classmethod
    def on_device(cls, values: Any, offsets: Any) -> Ragged:
        """Take int64 offsets that lie where `values` do, unchecked: nothing waits for them on a GPU."""
        sets = cls.__new__(cls)
        sets.values, sets._placed, sets._offsets = values, offsets, None
        return sets

    @classmethod
    def from_list(cls, arrays: Sequence[Any], *, dim: int | None = None) -> Ragged:
        """Concatenate `(n_i, d)` arrays; `dim` is needed only when the list is empty."""
        arrays = [native(a) if is_array(a) else np.asarray(a, dtype=np.float32) for a in arrays]
        for i, a in enumerate(arrays):
            if len(a.shape) != 2:
                raise ValueError(f"Ragged: every array must have 2 axes, got shape {tuple(a.shape)} at position {i}")
            if a.shape[1] != arrays[0].shape[1]:
                raise ValueError(
                    f"Ragged: every array must have the same d as the first ({arrays[0].shape[1]}), "
                    f"got {a.shape[1]} at position {i}"
                )
            if dtype_name(a) != dtype_name(arrays[0]):
                raise TypeError(
                    f"Ragged: every array must have the dtype of the first ({dtype_name(arrays[0])}), "
                    f"got {dtype_name(a)} at position {i}"
                )
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([a.shape[0] for a in arrays], out=offsets[1:])
        if not arrays:
            if dim is None:
                raise ValueError("Ragged: dim must be given for an empty list")
            return cls(np.empty((0, dim), np.float32), offsets)
        if is_torch(arrays[0]):
            import torch

            return cls(torch.cat(list(arrays)), offsets)
        if isinstance(arrays[0], np.ndarray):
            return cls(np.concatenate(arrays), offsets)
        return cls(joined(arrays), offsets)

    @classmethod
    def from_padded(cls, x: Any, lengths: Any = None, *, mask: Any = None) -> Ragged:
        """Drop the padding of `x` (n, t, d): set i keeps its first `lengths[i]` rows (all t when None).

        Of these, a `mask` (n, t), bool or integers, keeps the rows where it is true, or 1 and not 0.
        """
        x = native(x) if is_array(x) else np.asarray(x, dtype=np.float32)
        if len(x.shape) != 3:
            raise ValueError(f"Ragged: a padded array must have 3 axes, got shape {tuple(x.shape)}")
        n, t, d = (int(s) for s in x.shape)
        if lengths is None and mask is None:
            return cls(contiguous(x).reshape(n * t, d), np.arange(n + 1, dtype=np.int64) * t)
        keep = np.ones((n, t), bool)
        if lengths is not None:
            lengths = np.asarray(as_ids("Ragged", "lengths", to_host(lengths)))
            if len(lengths) != n:
                raise ValueError(f"Ragged: lengths must have one entry a set ({n}), got {len(lengths)}")
            bad = np.flatnonzero((lengths < 0) | (lengths > t))
            if len(bad):
                raise ValueError(f"Ragged: lengths must be in [0, {t}], got {lengths[bad[0]]} at position {bad[0]}")
            keep = np.arange(t) < lengths[:, None]
        if mask is not None:
            keep = keep & _kept(mask, (n, t))
        offsets = np.zeros(n + 1, np.int64)
        np.cumsum(keep.sum(1), out=offsets[1:])
        if is_torch(x):
            import torch

            return cls(x[torch.from_numpy(keep).to(x.device)], offsets)
        return cls(x[to_device_of(x, keep)] if device_name(x) != "cpu" else x[keep], offsets)

    def with_values(self, values: Any) -> Ragged:
        """Return as many other rows, there, in the same sets: offsets on a GPU are not copied again."""
        sets = type(self).__new__(type(self))
        sets.values, sets._offsets, sets._placed = values, self._offsets, self._placed
        return sets

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each set begins, shape (n + 1,), on the host."""
        if self._offsets is None:
            self._offsets = np.asarray(to_host(self._placed))
        return self._offsets

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of rows of each set, shape (n,)."""
        return np.diff(self.offsets)

    @property
    def placed_offsets(self) -> Any:
        """The offsets on the device of the values: copied there once, by the values' library."""
        if self._placed is None:
            self._placed = to_device_of(self.values, self.offsets)
        return self._placed

    @property
    def dim(self) -> int:
        """Width d of the rows."""
        return int(self.values.shape[1])

    def __len__(self) -> int:
        return int((self._placed if self._offsets is None else self._offsets).shape[0]) - 1

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            begin, end, step = i.indices(len(self))
            if step != 1:
                return self.take(np.arange(begin, end, step))
            offsets = self.offsets[begin : max(begin, end) + 1]
            return Ragged(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])
        if not -len(self) <= i < len(self):
            raise IndexError(f"Ragged: index must be in [{-len(self)}, {len(self)}), got {i}")
        i %= len(self)
        return self.values[int(self.offsets[i]) : int(self.offsets[i + 1])]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def take(self, ids: Any) -> Ragged:
        """Return the sets `ids`, in that order, as a new Ragged (copies their rows)."""
        ids = np.asarray(as_ids("Ragged.take", "ids", ids))
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(f"Ragged.take: ids must be in [0, {len(self)}), got {ids.min()} to {ids.max()}")
        lengths = self.lengths[ids]
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        rows = np.repeat(self.offsets[:-1][ids] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(rows_of(self.values, rows), offsets)

    def __repr__(self) -> str:
        where = f", {device_name(self.values)}" if device_name(self.values) != "cpu" else ""
        return f"Ragged({len(self)} sets, {self.values.shape[0]} rows, d={self.dim}, {dtype_name(self.values)}{where})"


def _kept(mask: Any, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Check a mask: bool, or integers of 0 and 1 as tokenizers give them."""
    mask = native(to_host(mask) if is_array(mask) else np.asarray(mask))
    dtype = dtype_name(mask)
    if not dtype.startswith(("bool", "int", "uint")):
        raise TypeError(f"Ragged: mask must be bool, or integers of 0 and 1, got {dtype}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"Ragged: mask must have shape {shape}, got {tuple(mask.shape)}")
    mask = np.asarray(mask)
    kept: npt.NDArray[np.bool_] = mask.astype(bool)
    wrong = mask[mask != kept]
    if len(wrong):
        raise ValueError(f"Ragged: mask must be bool, or integers of 0 and 1, got {wrong[0]}")
    return kept


def is_padded(x: Any) -> bool:
    """Whether token sets are a padded array (n, t, d), alone or with its lengths."""
    if isinstance(x, tuple) and len(x) == 2:
        return len(getattr(x[0], "shape", ())) == 3
    return is_array(x) and len(x.shape) == 3


def as_ragged(
    op: str,
    name: str,
    x: Any,
    *,
    dtypes: Sequence[str] = ("float32",),
    dim: int | None = None,
    like: str = "",
    mask: Any = None,
    on_gpu: Sequence[str] = (),
) -> Ragged:
    """Return token sets in any accepted form as a Ragged of contiguous values, of `dtypes` or `on_gpu`, there.

    Accepted: a Ragged; `(values (T, d), offsets (n + 1,))`; `(padded (n, t, d), lengths (n,))`; a padded array
    (n, t, d) without padding; a list of `(n_i, d)` arrays. `dim` is the width that the sets must have, as the argument
    `like` has it. A `mask` (n, t) says which rows of a padded array are kept.
    """
    if mask is not None and not is_padded(x):
        raise ValueError(f"{op}: {name} must be a padded (n, t, d) array to take a mask, got {type(x).__name__}")
    try:
        if isinstance(x, Ragged):
            sets = x
        elif isinstance(x, tuple) and len(x) == 2 and len(getattr(x[1], "shape", (0,))) == 1:
            sets = Ragged.from_padded(*x, mask=mask) if is_padded(x) else Ragged(*x)
        elif is_array(x):
            if len(x.shape) != 3:
                raise ValueError(
                    f"{name} must be a Ragged, (values, offsets), a list of (n_i, d) arrays or a padded (n, t, d) "
                    f"array, got shape {tuple(x.shape)}"
                )
            sets = Ragged.from_padded(x, mask=mask)
        elif isinstance(x, (list, tuple)):
            sets = Ragged.from_list(x, dim=dim)
        else:
            raise TypeError(f"{name} must be a Ragged, (values, offsets) or a list of arrays, got {type(x).__name__}")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {str(error).replace('Ragged: ', f'{name}: ')}") from None
    if dim is not None and sets.dim != dim:
        rule = f"have the same d as {like} ({dim})" if like else f"have d = {dim}"
        raise ValueError(f"{op}: {name} must {rule}, got {sets.dim}")
    if device_name(sets.values) != "cpu":
        dtypes = (*dtypes, *on_gpu)
    values = as_array(op, name, sets.values, dtypes=dtypes, ndim=2)
    return sets if values is sets.values else Ragged(values, sets.offsets)
