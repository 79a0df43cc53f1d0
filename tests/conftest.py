"""Fixtures that every test file shares."""

from __future__ import annotations

import importlib.util
import os
import pathlib

import numpy as np
import pytest

from polyvec import _core


@pytest.fixture
def rng(request):
    """A generator seeded by the test's own name: the same numbers in any order of tests."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture(params=_core.available_isas())
def isa(request):
    """Each instruction-set level that this CPU can run."""
    before = _core.active_isa()
    _core.force_isa(request.param)
    yield request.param
    _core.force_isa(before)


def _libraries():
    yield "numpy"
    if importlib.util.find_spec("torch"):
        yield "torch"


@pytest.fixture(params=_libraries())
def lib(request):
    """Turns a numpy array into an array of each library at hand."""
    if request.param == "numpy":
        return np.asarray
    import torch

    return torch.from_numpy


DATA = pathlib.Path(os.environ.get("POLYVEC_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data():
    """The folder of the full evaluation sets, which the repository does not carry."""
    if not DATA.is_dir():
        pytest.skip(f"needs the evaluation sets: no folder {DATA} (set POLYVEC_DATA)")
    return DATA
