"""Block-sparse rows: long vectors of which only some blocks, all of one width, are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from polyvec._arrays import as_array, as_count, as_ids, device_name, to_device_of, to_host


class BlockSparse:
    """Rows of width d that are zero but for some blocks of `block` entries: what a scan of them may skip.

    Row i has the blocks `offsets[i]` to `offsets[i + 1]`: entries `[blocks[j] * block, (blocks[j] + 1) * block)` of the
    row are `values[j]`, for j of that range, and all others are 0.

    Parameters
    ----------
    values : array of shape (total, block), float32
        The stored blocks of all rows, one row after the other. Copied only where they are not C-contiguous.
    blocks : array of shape (total,), integer
        In [0, d / block), ascending within a row. Kept as a numpy int32 array, and where values lie on a GPU, there.
    offsets : array of shape (n + 1,), integer
        Starts at 0, never runs backwards, ends at total. Kept as a numpy int64 array, and there.
    d : int
        Width of the rows, a multiple of block.

    Raises
    ------
    ValueError
        Blocks or offsets that do not fit together.
    TypeError
        Values that are not float32, blocks or offsets that are not integers.

    Notes
    -----
    A row of density p needs p * (1 + 1 / block) of its dense memory.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> rows = pv.BlockSparse(np.ones((3, 2), np.float32), blocks=[0, 2, 1], offsets=[0, 2, 3], d=6)
    >>> rows
    BlockSparse(2 rows, 3 blocks of 2, d=6)
    >>> rows.to_dense()
    array([[1., 1., 0., 0., 1., 1.],
           [0., 0., 1., 1., 0., 0.]], dtype=float32)
    """

    __slots__ = ("_blocks", "_placed", "d", "offsets", "values")

    def __init__(self, values: Any, blocks: Any, offsets: Any, d: int) -> None:
        op = "BlockSparse"
        self.values: Any = as_array(op, "values", values, ndim=2)
        self.d = as_count(op, "d", d)
        total, block = (int(size) for size in self.values.shape)
        if block == 0 or self.d % block:
            raise ValueError(f"{op}: d must be a multiple of the width of values ({block}), got {self.d}")
        if self.d // block > 2**31:
            raise ValueError(f"{op}: d must be at most 2^31 times the width of values ({block}), got {self.d}")
        ids = np.asarray(as_ids(op, "blocks", to_host(blocks)))
        bounds = np.asarray(as_ids(op, "offsets", to_host(offsets)))
        if len(ids) != total:
            raise ValueError(f"{op}: blocks must have one entry a row of values ({total}), got {len(ids)}")
        bad = np.flatnonzero((ids < 0) | (ids >= self.d // block))
        if len(bad):
            raise ValueError(f"{op}: blocks must be in [0, {self.d // block}), got {ids[bad[0]]} at position {bad[0]}")
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != total or (bounds[1:] < bounds[:-1]).any():
            raise ValueError(
                f"{op}: offsets must run from 0 to the number of rows of values ({total}) and never backwards, "
                f"got {bounds.tolist() if len(bounds) < 8 else f'{bounds[0]} to {bounds[-1]}'}"
            )
        begins = np.zeros(total + 1, bool)
        begins[bounds] = True
        bad = np.flatnonzero((ids[1:] <= ids[:-1]) & ~begins[1:total])
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"{op}: blocks must be ascending within a row, got {ids[i]} then {ids[i + 1]} at position {i}"
            )
        self._blocks: npt.NDArray[np.int32] | None = ids.astype(np.int32)
        self.offsets: npt.NDArray[np.int64] = bounds
        self._placed: Any = None

    @classmethod
    def on_device(cls, values: Any, blocks: Any, offsets: tuple[npt.NDArray[np.int64], Any], d: int) -> BlockSparse:
        """Take int32 blocks that lie on the GPU of `values`, and offsets on the host and there, all unchecked."""
        rows = cls.__new__(cls)
        rows.values, rows._blocks, rows.offsets, rows._placed, rows.d = (
            values,
            None,
            offsets[0],
            (blocks, offsets[1]),
            d,
        )
        return rows

    @property
    def blocks(self) -> npt.NDArray[np.int32]:
        """Which blocks are stored, shape (total,), on the host."""
        if self._blocks is None:
            self._blocks = np.asarray(to_host(self._placed[0]))
        return self._blocks

    @property
    def placed(self) -> tuple[Any, Any]:
        """The blocks and the offsets on the device of the values: copied there once, by the values' library."""
        if self._placed is None:
            on_host = (self.blocks, self.offsets)
            cpu = device_name(self.values) == "cpu"
            self._placed = on_host if cpu else tuple(to_device_of(self.values, x) for x in on_host)
        return self._placed  # type: ignore[no-any-return]

    @property
    def block(self) -> int:
        """Entries of a block."""
        return int(self.values.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (n, d) of the rows when dense."""
        return len(self), self.d

    @property
    def nbytes(self) -> int:
        """Bytes of values, blocks and offsets."""
        return int(self.values.shape[0] * (4 * self.block + 4) + self.offsets.nbytes)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def to_dense(self) -> Any:
        """Return the rows as an array of shape (n, d), float32, of the library and device of `values`."""
        n, block = len(self), self.block
        rows = np.repeat(np.arange(n), np.diff(self.offsets))
        at = rows * (self.d // block) + self.blocks
        if isinstance(self.values, np.ndarray):
            dense = np.zeros((n * (self.d // block), block), np.float32)
        else:
            dense = to_device_of(self.values, np.zeros((n * (self.d // block), block), np.float32))
            at = to_device_of(self.values, at)
        dense[at] = self.values
        return dense.reshape(n, self.d)

    def __repr__(self) -> str:
        where = f", {device_name(self.values)}" if device_name(self.values) != "cpu" else ""
        total = int(self.values.shape[0])
        return f"BlockSparse({len(self)} rows, {total} blocks of {self.block}, d={self.d}{where})"
