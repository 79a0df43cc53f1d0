"""An index as one safetensors file: checked in every part when read, replaced in one step when written.

A class that is saved is a `Saved`: it has `state()`, which returns its tensors by name and its parameters (JSON), and a
`from_state` that builds it from them and refuses what does not fit together. `join` and `part` put several states into
one file.

The metadata key "polyvec" holds JSON: the format's `version`, the `kind` of object, its `params`, for every tensor
[dtype, shape, xxh3 of its bytes], and the `xxh3` of this JSON without that entry. Any safetensors reader can open the
tensors.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from mmap import ACCESS_READ
from mmap import mmap as map_file
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError, safe_open

from polyvec._arrays import aligned_bytes
from polyvec._errors import FormatError

VERSION = 1

_LEFTOVER_AGE = 3600  # seconds: a file system may not show the locks of other machines, but it shows what they write
_ALIGNMENT = 64  # of the first tensor within the file: a cache line
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
_SavedT = TypeVar("_SavedT", bound="Saved")


class State(NamedTuple):
    """What a file holds: `tensors` by name, and `params` that JSON can express."""

    tensors: dict[str, npt.NDArray[Any]]
    params: dict[str, Any]


class Saved:
    """What has a state has a file."""

    __slots__ = ()
    _KIND: ClassVar[str]  # public name of the class, "hnsw.Index": only it can load the file

    def state(self) -> State:
        """Return what `save` writes."""
        raise NotImplementedError

    @classmethod
    def from_state(cls: type[_SavedT], state: State) -> _SavedT:
        """Build an object from what `state` returned."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what `state` returns to one file, which replaces an existing one only when it is complete.

        Parameters
        ----------
        path : path

        Raises
        ------
        RuntimeError
            Before `fit`, of a class that has it.
        OSError
            The system's own: a missing folder, no permission, a full disk. An existing file is untouched then.

        Notes
        -----
        A safetensors file with checksums, whose tensors any reader of that format can open. It is written beside `path`
        under a name that ends in ".tmp". What a process that was killed left there is removed by a later call, an hour
        after its last change or more.
        """
        save(path, self._KIND, self.state())

    @classmethod
    def load(cls: type[_SavedT], path: str | os.PathLike[str]) -> _SavedT:
        """Read what `save` wrote.

        Parameters
        ----------
        path : path

        Returns
        -------
        Self
            An object of the class, whose arrays are read-only.

        Raises
        ------
        FormatError
            The file is damaged, truncated, of another kind or of a newer format.
        OSError
            The system's own.
        """
        return load(path, cls._KIND, cls.from_state)


def join(**states: State) -> State:
    """Put the states of an object's parts into one: tensor `t` of part `p` is named `p.t`."""
    tensors = {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.tensors.items()}
    return State(tensors, {name: state.params for name, state in states.items()})


def part(state: State, name: str) -> State:
    """Return part `name` of a joined state."""
    prefix = f"{name}."
    tensors = {key.removeprefix(prefix): value for key, value in state.tensors.items() if key.startswith(prefix)}
    return State(tensors, state.params[name])


def save(path: str | os.PathLike[str], kind: str, state: State) -> None:
    """Write `state` to `path`: the old file stays whole until the new one is, also when the machine stops meanwhile.

    Parameters
    ----------
    path : path
        An existing file is replaced. A symbolic link stays one.
    kind : str
        The public name of the saved class, "hnsw.Index": only it can load the file.
    state : State
        The tensors are written in their order, without a copy; the first begins at a multiple of 64 bytes.

    Raises
    ------
    OSError
        The system's own: a folder that is missing or cannot be written, a full disk. No trace is left then.
    """
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in state.tensors.items()}
    content: dict[str, Any] = {
        "version": VERSION,
        "kind": kind,
        "params": state.params,
        "tensors": {name: [_NAMES[t.dtype.name], list(t.shape), _digest(t)] for name, t in tensors.items()},
    }
    content["xxh3"] = _digest(_canonical(content))
    header: dict[str, Any] = {"__metadata__": {"polyvec": _canonical(content)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)

    target = os.path.realpath(os.fspath(path))
    temporary = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(OSError):  # of a file system without locks
                _lock(file)
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(_bytes_of(tensor).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):  # name the file that the caller asked for
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise
    _remove_leftovers(target)
    folder = os.open(os.path.dirname(target), os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, is on the disk now
    finally:
        os.close(folder)


def _lock(file: BinaryIO) -> None:
    """Mark the file as in use until it is closed, or the process is killed; raise an OSError when another does."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(target: str) -> None:
    """Remove what killed processes left of `target`: old, and locked by nobody."""
    folder, name = os.path.split(target)
    temporary = re.compile(re.escape(name) + r"\.[0-9a-f]{8}\.tmp")
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if temporary.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > _LEFTOVER_AGE:
                with contextlib.suppress(OSError), open(entry.path, "rb") as file:
                    _lock(file)
                    os.unlink(entry.path)


def load(
    path: str | os.PathLike[str],
    kind: str,
    build: Callable[[State], T],
    *,
    mmap: bool = False,
    lazy: Collection[str] = (),
) -> T:
    """Read a file that `save` wrote and return `build(state)`; the tensors are read-only.

    Parameters
    ----------
    path : path
    kind : str
        What was given to `save`.
    build : callable
        What it raises when the state does not fit together (ValueError, TypeError, LookupError, ...) becomes a
        FormatError that names the file.
    mmap : bool
        Leave the tensors in the file, which must then not be changed in place (`save` never does).
    lazy : names
        Tensors whose bytes are not read, and so not verified, with mmap=True. All else is verified always.

    Raises
    ------
    FormatError
        The file is damaged, truncated, of another kind, not polyvec's or of a newer format.
    OSError
        The system's own.
    """
    with open(path, "rb") as file, _format_errors(f"{kind}.load: {os.fspath(path)}"):
        return build(_read(file, kind, mmap, lazy if mmap else ()))


@contextlib.contextmanager
def _format_errors(subject: str) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{subject} {error}") from None
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"{subject} is damaged: {type(error).__name__}: {error}") from error


def _read(file: BinaryIO, kind: str, mmap: bool, lazy: Collection[str]) -> State:
    try:  # checks the header's size and JSON, and that the tensors fill the file without gap or overlap
        with safe_open(file.name, framework="numpy") as checked:
            metadata = checked.metadata() or {}
    except SafetensorError as error:
        raise FormatError(f"is truncated or not a safetensors file: {error}") from None
    if "polyvec" not in metadata:
        raise FormatError("was not written by polyvec")
    content = json.loads(metadata["polyvec"])
    version = content.pop("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise FormatError(f"has format version {version!r}" + (", newer than this polyvec reads" if newer else ""))
    expected = content.pop("xxh3")
    if _digest(_canonical({"version": version, **content})) != expected:
        raise FormatError("is damaged: its metadata does not match its checksum")
    if content["kind"] != kind:
        raise FormatError(f"holds another kind of object: {content['kind']}")

    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    del header["__metadata__"]
    if header.keys() != content["tensors"].keys():
        raise FormatError("is damaged: its tensors are not those that were saved")
    data = _map(file, 8 + length) if mmap else _load(file)
    tensors = {}
    for name, entry in header.items():
        dtype, shape, digest = content["tensors"][name]
        if (entry["dtype"], entry["shape"]) != (dtype, shape):
            raise FormatError(f"is damaged: tensor {name} is not of the dtype and shape that were saved")
        begin, end = entry["data_offsets"]
        tensor = data[begin:end].view(_DTYPES[dtype]).reshape(shape)
        if name not in lazy and _digest(tensor) != digest:
            raise FormatError(f"is damaged: tensor {name} does not match its checksum")
        tensors[name] = tensor if tensor.flags.aligned else tensor.copy()
    return State(tensors, content["params"])


def _map(file: BinaryIO, start: int) -> Bytes:
    return np.frombuffer(map_file(file.fileno(), 0, access=ACCESS_READ), np.uint8)[start:]


def _load(file: BinaryIO) -> Bytes:
    """Read the rest of the file into memory that is aligned as the file is."""
    size = os.fstat(file.fileno()).st_size - file.tell()
    data = aligned_bytes(size)
    if file.readinto(data.data) != size:  # type: ignore[attr-defined]
        raise FormatError("is truncated")
    data.flags.writeable = False
    return data


def _bytes_of(tensor: npt.NDArray[Any]) -> Bytes:
    return tensor.reshape(math.prod(tensor.shape)).view(np.uint8)


def _digest(x: str | npt.NDArray[Any]) -> str:
    return xxhash.xxh3_64_hexdigest(x.encode() if isinstance(x, str) else _bytes_of(x).data)


def digest_of_all(*parts: str | npt.NDArray[Any] | None) -> str:
    """Return one checksum of texts and contiguous arrays, their shapes and order; None counts as a part, too."""
    shapes = [None if part is None else part if isinstance(part, str) else list(part.shape) for part in parts]
    digests = [_digest(part) for part in parts if part is not None]
    return _digest(_canonical([shapes, digests]))


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
