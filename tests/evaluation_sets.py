"""Where the full evaluation sets are: too large for the repository, so tests and bench cases skip without them."""

from __future__ import annotations

import os
import pathlib

import pytest

FOLDER = pathlib.Path(os.environ.get("POLYVEC_DATA") or pathlib.Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(scope="session")
def data():
    """The folder of the full evaluation sets."""
    if not FOLDER.is_dir():
        pytest.skip(f"needs the evaluation sets: no folder {FOLDER} (set POLYVEC_DATA)")
    return FOLDER
