"""Index files: what is written can be read, by anyone; what is damaged is refused with a FormatError."""

import json
import os
import stat

import numpy as np
import pytest
from safetensors.numpy import load_file

import polyvec as pv
from accuracy import assert_exact
from polyvec import _files
from polyvec._files import State

KIND = "test.Thing"


@pytest.fixture
def state(rng):
    return State(
        {
            "vectors": rng.standard_normal((5, 3)).astype(np.float32),
            "ids": rng.integers(-(2**60), 2**60, 5),  # 60 bytes into the data: not aligned for int64
            "none": np.empty((0, 4), np.uint32),
            "removed": np.array([True, False, True]),
            "scalar": np.array(7, np.uint8),
        },
        {"metric": "ip", "scale": 0.1, "name": "naïve", "nested": {"k": [1, 2, None]}},
    )


def identity(state):
    return state


@pytest.fixture
def path(tmp_path, state):
    path = tmp_path / "thing.pv"
    _files.save(path, KIND, state)
    return path


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("lazy", [(), ("vectors",)])
def test_what_is_saved_is_loaded(path, state, mmap, lazy):
    tensors, params = _files.load(path, KIND, identity, mmap=mmap, lazy=lazy)
    assert params == state.params
    assert tensors.keys() == state.tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == state.tensors[name].dtype
        assert tensor.flags.aligned
        assert_exact(tensor, state.tensors[name])
    assert tensors["vectors"].ctypes.data % 64 == 0
    assert not tensors["vectors"].flags.writeable


@pytest.mark.parametrize(
    "codec",
    [
        pv.quantize.ScalarQuantizer(8, bits=np.int64(4)),
        pv.quantize.RaBitQ(8, bits=np.int64(4)),
        pv.quantize.ProductQuantizer(8, 2, bits=np.int64(4)),
        pv.quantize.ResidualQuantizer(8, 2, bits=np.int64(4)),
    ],
    ids=lambda codec: type(codec).__name__,
)
def test_parameters_given_as_numpy_integers_can_be_saved(rng, tmp_path, codec):
    codec.fit(rng.standard_normal((50, 8), np.float32)).save(tmp_path / "codec")
    assert type(codec).load(tmp_path / "codec").bits == 4


def test_anyone_can_read_the_tensors(path, state):
    for name, tensor in load_file(path).items():
        assert_exact(tensor, state.tensors[name])


def test_equal_states_give_equal_bytes(path, state):
    before = path.read_bytes()
    _files.save(path, KIND, state)
    assert path.read_bytes() == before


def test_states_join_and_part(state):
    joined = _files.join(left=state, right=State({"x": np.arange(3)}, {"y": 2}))
    assert _files.part(joined, "left") == state
    assert _files.part(joined, "right").params == {"y": 2}


def test_saving_replaces_in_one_step(path, state):
    link = path.with_name("link.pv")
    link.symlink_to(path)
    mapped = _files.load(path, KIND, identity, mmap=True)
    _files.save(link, KIND, State({"new": np.arange(4)}, {}))
    assert link.is_symlink()
    assert_exact(mapped.tensors["vectors"], state.tensors["vectors"])  # the old file lives on under its mapping
    assert_exact(_files.load(path, KIND, identity).tensors["new"], np.arange(4))
    assert sorted(p.name for p in path.parent.iterdir()) == ["link.pv", "thing.pv"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(path, state, monkeypatch, failing):
    before = path.read_bytes()

    def no_space(*args):
        raise OSError(28, "No space left on device")

    if failing == "write":
        monkeypatch.setattr(_files, "_bytes_of", lambda tensor: no_space())
        monkeypatch.setattr(_files, "_digest", lambda x: "")
    else:
        monkeypatch.setattr(os, failing, no_space)
    with pytest.raises(OSError, match="No space left on device"):
        _files.save(path, KIND, state)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_unwritable_path_is_the_systems_own_error(tmp_path, state):
    with pytest.raises(FileNotFoundError):
        _files.save(tmp_path / "missing" / "thing.pv", KIND, state)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        _files.save(tmp_path / "file" / "thing.pv", KIND, state)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        _files.save(tmp_path / "folder", KIND, state)
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "folder"), None)
    assert ".tmp" not in str(caught.value)
    (tmp_path / "folder").rmdir()
    with pytest.raises(FileNotFoundError):
        _files.load(tmp_path / "missing.pv", KIND, identity)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_killed_processes_left_is_removed_in_time(path, state):
    """An hour later, unless it is being written to; files of other names stay."""
    left, fresh, locked = (path.with_name(f"thing.pv.{digits}.tmp") for digits in ("0123abcd", "00000001", "00000002"))
    others = [path.with_name(name) for name in ("thing.pv.0123.tmp", "other.pv.0123abcd.tmp", "xthing.pv.0123abcd.tmp")]
    for file in (left, fresh, locked, *others):
        file.touch()
        if file != fresh:
            os.utime(file, (0, 0))
    with open(locked, "r+b") as file:
        _files._lock(file)
        _files.save(path, KIND, state)
    assert set(path.parent.iterdir()) == {path, fresh, locked, *others}
    _files.save(path, KIND, state)
    assert set(path.parent.iterdir()) == {path, fresh, *others}


@pytest.mark.parametrize("mmap", [False, True])
def test_every_truncation_is_refused(path, mmap):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(pv.FormatError, match=r"^test.Thing.load: .*thing.pv "):
            _files.load(path, KIND, identity, mmap=mmap)
    path.write_bytes(whole + b"\0")
    with pytest.raises(pv.FormatError, match="is truncated or not a safetensors file"):
        _files.load(path, KIND, identity, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_every_flipped_bit_is_refused(path, state, mmap):
    """With mmap all but the lazy tensor: there a flip is the caller's risk, and stays the only difference."""
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    lazy = range(data, data + state.tensors["vectors"].nbytes) if mmap else range(0)
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        if position in lazy:
            loaded = _files.load(path, KIND, identity, mmap=True, lazy=("vectors",))
            assert loaded.tensors["vectors"].tobytes() != state.tensors["vectors"].tobytes()
        else:
            with pytest.raises(pv.FormatError):
                _files.load(path, KIND, identity, mmap=mmap, lazy=("vectors",))


def rewrite(path, **changes):
    """Change entries of the metadata and sign it again, as an attacker or a newer polyvec would."""
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    content = {**json.loads(header["__metadata__"]["polyvec"]), **changes}
    del content["xxh3"]
    content["xxh3"] = _files._digest(_files._canonical(content))
    header["__metadata__"]["polyvec"] = json.dumps(content)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[start:])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": 2}, "has format version 2, newer than this polyvec reads"),
        ({"version": "x"}, "has format version 'x'"),
        ({"kind": "test.Other"}, "holds another kind of object: test.Other"),
        ({"tensors": {}}, "is damaged: its tensors are not those that were saved"),
        ({"tensors": 3}, "is damaged: AttributeError: 'int' object has no attribute 'keys'"),
    ],
)
def test_foreign_metadata(path, changes, text):
    rewrite(path, **changes)
    with pytest.raises(pv.FormatError) as caught:
        _files.load(path, KIND, identity)
    assert str(caught.value) == f"test.Thing.load: {path} {text}"


def test_files_of_others(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": np.arange(3)}, path)
    with pytest.raises(pv.FormatError) as caught:
        _files.load(path, KIND, identity)
    assert str(caught.value) == f"test.Thing.load: {path} was not written by polyvec"
    for content in (b"", b"\x93NUMPY\x01\x00", b"\xff" * 8, b"PK\x03\x04" + bytes(40), b"{}" * 100):
        path.write_bytes(content)
        with pytest.raises(pv.FormatError, match="is truncated or not a safetensors file"):
            _files.load(path, KIND, identity)


def test_a_state_that_does_not_fit_together_is_a_damaged_file(path):
    def build(state):
        return state.params["absent"]

    with pytest.raises(pv.FormatError) as caught:
        _files.load(path, KIND, build)
    assert str(caught.value) == f"test.Thing.load: {path} is damaged: KeyError: 'absent'"
