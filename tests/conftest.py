"""Fixtures that every test file shares."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from elsewhere import Elsewhere, load_cuda_on_host
from evaluation_sets import data  # noqa: F401 (a fixture)
from polyvec import _backend, _core

if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("no deadline", deadline=None)  # no test asserts a time
    hypothesis.settings.load_profile("no deadline")
else:
    import no_hypothesis

    sys.modules["hypothesis"] = no_hypothesis


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=["cpu", "cuda", "cuda-on-host"],
        default="cpu",
        help="cuda: run the tests whose arrays can lie on a GPU, put them there, and run no other test; "
        "cuda-on-host: the same without a GPU, by the kernels' code built for the CPU",
    )


def _on_gpu(config):
    return config.getoption("device") != "cpu"


def pytest_configure(config):
    device = config.getoption("device")
    if device == "cuda-on-host" and load_cuda_on_host() is None:
        raise pytest.UsageError("--device cuda-on-host: needs a build with -DPOLYVEC_CUDA_ON_HOST=ON")
    if device == "cuda":
        module = _backend.cuda_module()
        error = "polyvec was built without CUDA" if module is None else module.info()["error"]
        if error:
            raise pytest.UsageError(f"--device cuda: {error}")


def pytest_generate_tests(metafunc):
    on_gpu = _on_gpu(metafunc.config)
    modules = {
        "cpu": {"numpy": "numpy", "torch": "torch"},
        "cuda": {"torch-cuda": "torch", "cupy": "cupy"},
        "cuda-on-host": {"elsewhere": "numpy"},
    }
    for fixture, device in (("lib", metafunc.config.getoption("device")), ("cpu_lib", "cpu")):
        if fixture in metafunc.fixturenames:
            found = [name for name, module in modules[device].items() if importlib.util.find_spec(module)]
            metafunc.parametrize(fixture, found, indirect=True)
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", _core.available_isas()[: 1 if on_gpu else None], indirect=True)


def pytest_collection_modifyitems(config, items):
    if not _on_gpu(config):
        return
    others = [item for item in items if not {"lib", "on_device", "gpu"} & set(item.fixturenames)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture
def rng(request):
    """A generator seeded by the test's own name: the same numbers in any order of tests."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def isa(request):
    """Each instruction-set level that this CPU can run."""
    before = _core.active_isa()
    _core.force_isa(request.param)
    yield request.param
    _core.force_isa(before)


def _to(library):
    if library == "numpy":
        return np.asarray
    if library == "elsewhere":
        return Elsewhere
    if library == "cupy":
        import cupy

        return cupy.asarray
    import torch

    return torch.from_numpy if library == "torch" else lambda x: torch.from_numpy(x).cuda()


def _require_cuda_form(request):
    """Skip tests of what no GPU serves yet: by the file's name, test_<stem>.py."""
    stem = request.path.stem.removeprefix("test_")
    if stem.startswith("cuda"):
        return
    if stem.startswith("torch") and request.config.getoption("device") == "cuda-on-host":
        pytest.skip("torch has no arrays that pretend to lie on a GPU")
    served = {"torch", *(name.partition("_")[0] for name in dir(_backend.cuda_module()))}
    if stem not in served:
        pytest.skip(f"{stem} has no CUDA form yet")


@pytest.fixture
def lib(request):
    """Turns a numpy array into an array of each library at hand: of those on a GPU with --device cuda."""
    if _on_gpu(request.config):
        _require_cuda_form(request)
    return _to(request.param)


@pytest.fixture
def cpu_lib(request):
    """The same for functions that no GPU serves; their tests are left out with --device cuda."""
    return _to(request.param)


@pytest.fixture(scope="module")
def on_device(request):
    """Leaves a numpy array as it is, and makes it a torch tensor on a GPU with --device cuda."""
    if not _on_gpu(request.config):
        return np.asarray
    _require_cuda_form(request)
    return _to("torch-cuda" if request.config.getoption("device") == "cuda" else "elsewhere")


@pytest.fixture
def gpu(request):
    """Torch, for tests of what only a GPU has (streams, graphs)."""
    if request.config.getoption("device") != "cuda":
        pytest.skip("needs a GPU: pytest tests --device cuda")
    return pytest.importorskip("torch")


@pytest.fixture
def python():
    """A fresh interpreter: python("-c", code, check=True, **environment) -> CompletedProcess with text output."""

    def run(*arguments, check=True, **environment):
        done = subprocess.run(
            [sys.executable, "-Wignore", *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stderr
        return done

    return run
