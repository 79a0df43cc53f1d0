"""What the codecs have in common.

A codec turns vectors into rows of uint8. It has `fit`, `encode`, `decode`, `pack`, `search`, `code_size`, `nbytes`,
`save`, `load`, `state` and `from_state`; `Refined` builds on these.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from polyvec import _backend
from polyvec._arrays import (
    ArrayT,
    aligned_bytes,
    as_array,
    as_count,
    as_float32,
    as_selection,
    is_array,
    output,
    outputs,
    require_cpu,
)
from polyvec._files import Saved, State
from polyvec._progress import Progress, reporting

Floats = npt.NDArray[np.float32]

_FLOATS = ("float32", "float16", "bfloat16")
_BLOCK_ELEMENTS = 1 << 24  # of vectors that are converted, checked, rotated and encoded at a time: 64 MB
_CodecT = TypeVar("_CodecT", bound="Codec")


class PackedCodes:
    """Codes in the order in which a scan reads them: what the `pack` of a codec returns.

    Parameters
    ----------
    blocks : numpy array of shape (ceil(n / B), columns, B) or (ceil(n / 16), columns, 16, 4), uint8
        Of codewords (ProductQuantizer, ResidualQuantizer) byte j of code i is `blocks[i // B, j, i % B]`. B is 16 for
        codes of 4 bits, whose bytes are padded to a multiple of 4 columns, and 64 for codes of 8 bits. Of integers
        (ScalarQuantizer, RaBitQ) `blocks[i // 16, j, i % 16]` are 4 bytes of code i; the error of RaBitQ, which a
        search does not read, is left out. The same on every machine.
    n : int
        Number of codes.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> x = np.random.default_rng(0).standard_normal((1000, 32), np.float32)
    >>> pq = pv.quantize.ProductQuantizer(32, 8, bits=4).fit(x)
    >>> packed = pq.pack(pq.encode(x))
    >>> packed, packed.blocks.shape
    (PackedCodes(1000 codes, 4000 bytes), (63, 4, 16))
    >>> pq.search(x[:2], packed, 10)[1].shape
    (2, 10)
    """

    __slots__ = ("blocks", "n")

    def __init__(self, blocks: npt.NDArray[np.uint8], n: int) -> None:
        op = "quantize.PackedCodes"
        blocks = as_array(op, "blocks", blocks, dtypes=("uint8",))
        if blocks.ndim not in (3, 4):
            raise ValueError(f"{op}: blocks must have 3 or 4 axes, got {blocks.ndim}")
        require_cpu(op, "blocks", blocks)
        self.blocks: npt.NDArray[np.uint8] = np.asarray(blocks)
        self.n = as_count(op, "n", n, least=0)
        width = self.blocks.shape[2]
        if width not in (16, 64):
            raise ValueError(f"{op}: blocks must hold 16 or 64 codes each, got {width}")
        if len(self.blocks) != -(-self.n // width):
            raise ValueError(
                f"{op}: blocks must have {-(-self.n // width)} rows for {self.n} codes, got {len(self.blocks)}"
            )

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        of_a_code = math.prod(self.blocks.shape[1:]) // self.blocks.shape[2]
        return f"PackedCodes({self.n} codes, {self.n * of_a_code} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.blocks.nbytes


class Codec(Saved):
    """Arguments, blocks of rows and files of a codec: a class adds its arithmetic, and the documentation of it."""

    _PARAMS: ClassVar[tuple[str, ...]]  # of the constructor, which the codec has as attributes
    dim: int
    metric: str

    # ---- what a codec says of itself

    @property
    def code_size(self) -> int:
        """Bytes of a code."""
        raise NotImplementedError

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the float32 arrays that `fit` finds: attributes, which are None before."""
        raise NotImplementedError

    def _encode(self, op: str, rows: Floats, codes: Any, num_threads: int | None) -> None:
        """Encode rows that `_block` returned."""
        raise NotImplementedError

    @property
    def _rows_at_once(self) -> int:
        return max(1, _BLOCK_ELEMENTS // self.dim)

    def _block(self, op: str, rows: Any, begin: int, num_threads: int | None) -> Floats:
        """Return the rows that are encoded at a time, from `begin` on: float32 and finite."""
        block = as_float32(rows[begin : begin + self._rows_at_once])
        _backend.require_finite(op, "x", block, num_threads, first_row=begin)
        return block

    @property
    def _block_shape(self) -> tuple[int, ...]:
        """Shape of a block of packed codes."""
        raise NotImplementedError

    def _pack(self, op: str, codes: npt.NDArray[np.uint8], blocks: Any, num_threads: int | None) -> None:
        raise NotImplementedError

    # ---- what follows from it

    @property
    def nbytes(self) -> int:
        """Bytes of what `fit` found."""
        arrays = [getattr(self, name) for name in self._shapes()]
        return sum(array.nbytes for array in arrays if array is not None)

    def state(self) -> State:
        """Return what `save` writes.

        Returns
        -------
        State
            The tensors, named as its attributes and shared with them, and the parameters.

        Raises
        ------
        RuntimeError
            Before `fit`.
        """
        self._require_fitted(f"{self._KIND}.state")
        tensors = {name: getattr(self, name) for name in self._shapes()}
        return State(tensors, {name: getattr(self, name) for name in self._PARAMS})

    @classmethod
    def from_state(cls: type[_CodecT], state: State) -> _CodecT:
        """Build a codec from a state.

        Parameters
        ----------
        state : State
            As `state` returned it. The tensors are used in place.

        Returns
        -------
        Self
            A codec of the class.

        Raises
        ------
        ValueError, TypeError, LookupError
            A state that does not fit together.
        """
        self = cls(**state.params)
        for name, shape in self._shapes().items():
            tensor = state.tensors[name]
            if tensor.shape != shape or tensor.dtype != np.float32:
                raise ValueError(f"{name} must be float32 of shape {shape}, got {tensor.dtype} of shape {tensor.shape}")
            setattr(self, name, tensor)
        return self

    def _is_fitted(self) -> bool:
        return all(getattr(self, name) is not None for name in self._shapes())

    def _require_fitted(self, op: str) -> None:
        if not self._is_fitted():
            raise RuntimeError(f"{op}: the quantizer must be fitted before; call fit(x)")

    def pack(self, codes: Any, *, num_threads: int | None = None) -> PackedCodes:
        """Return a copy of codes in the order in which `search` reads them: for codes that are searched often.

        Parameters
        ----------
        codes : array of shape (n, code_size), uint8
        num_threads : int, optional

        Returns
        -------
        PackedCodes

        Raises
        ------
        ValueError
            Codes of another size.
        """
        op = f"{self._KIND}.pack"
        table = codes_of(op, codes, self.code_size)
        shape = (-(-len(table) // self._block_shape[1]), *self._block_shape)
        blocks = aligned_bytes(math.prod(shape)).reshape(shape)  # registers of a scan never lie over two cache lines
        self._pack(op, table, blocks, num_threads)
        return PackedCodes(blocks, len(table))

    def _searched(self, op: str, codes: Any) -> npt.NDArray[np.uint8]:
        """Check the codes that `search` gets, packed or not, and return their rows or blocks."""
        if not isinstance(codes, PackedCodes):
            return codes_of(op, codes, self.code_size)
        if codes.blocks.shape[1:] != self._block_shape:
            raise ValueError(f"{op}: codes must have blocks of shape {self._block_shape}, got {codes.blocks.shape[1:]}")
        return codes.blocks

    def _encode_blocks(
        self, op: str, x: ArrayT, out: ArrayT | None, progress: Progress, num_threads: int | None
    ) -> ArrayT:
        """Do what `encode` does."""
        self._require_fitted(op)
        rows = vectors_of(op, "x", x, self.dim)
        out = output(op, out, x if is_array(x) else rows, (len(rows), self.code_size), "uint8")
        codes, begin = np.asarray(out), 0
        with reporting(op, progress, len(rows), "rows") as report:
            while begin < len(rows):
                block = self._block(op, rows, begin, num_threads)
                end = begin + len(block)
                self._encode(op, block, codes[begin:end], num_threads)
                report(len(block))
                begin = end
        return out

    def _decode_arguments(self, op: str, codes: Any, out: Any) -> tuple[npt.NDArray[np.uint8], Any]:
        """Check what `decode` gets; return the codes and the array for the vectors."""
        self._require_fitted(op)
        table = codes_of(op, codes, self.code_size)
        return table, output(op, out, codes if is_array(codes) else table, (len(table), self.dim), "float32")

    def _search_arguments(
        self, op: str, queries: Any, codes: Any, k: int, include: Any, out: tuple[Any, Any] | None
    ) -> tuple[Floats, npt.NDArray[np.uint8], npt.NDArray[Any] | None, tuple[Any, Any]]:
        """Check what `search` gets; return the queries as float32, the codes, which take part, and the output."""
        self._require_fitted(op)
        rows = vectors_of(op, "queries", queries, self.dim)
        table = self._searched(op, codes)
        k = as_count(op, "k", k)
        taking_part = as_selection(op, "include", include, len(codes))
        out = outputs(op, out, queries if is_array(queries) else rows, (len(rows), k), ("float32", "int64"),
                      ("scores", "ids"))  # fmt: skip
        return as_float32(rows), table, taking_part, out


def vectors_of(op: str, name: str, x: Any, dim: int) -> Any:
    """Check the vectors that a codec gets and return them in their library: conversion waits for a block's turn."""
    rows = as_array(op, name, x, dtypes=_FLOATS, ndim=2, dense=False)
    require_cpu(op, name, rows)
    if rows.shape[1] != dim:
        raise ValueError(f"{op}: {name} must have d = {dim}, got {rows.shape[1]}")
    return rows


def codes_of(op: str, codes: Any, code_size: int) -> npt.NDArray[np.uint8]:
    """Check the codes that a codec gets and return a numpy view of them."""
    table = as_array(op, "codes", codes, dtypes=("uint8",), ndim=2)
    require_cpu(op, "codes", table)
    if table.shape[1] != code_size:
        raise ValueError(f"{op}: codes must have {code_size} bytes a row, got {table.shape[1]}")
    return np.asarray(table)
