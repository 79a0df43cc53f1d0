"""Fixtures that every test file shares."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from evaluation_sets import data  # noqa: F401 (a fixture)
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
