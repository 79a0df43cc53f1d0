"""What an installation says about itself."""

import importlib.metadata
import platform
import re

import numpy as np
import pytest

import polyvec as pv


def test_runtime_info():
    info = pv.runtime_info()
    assert info["version"] == pv.__version__
    assert info["python"] == platform.python_version()
    assert info["numpy"] == np.__version__
    assert info["isa"] in info["isas"]
    assert info["num_threads"] == pv.get_num_threads()
    assert info["cpus"] >= 1
    assert info["cuda"] is None or {"architectures", "runtime", "devices", "error"} <= set(info["cuda"])


def test_the_installed_version_is_the_package_s():
    try:
        installed = importlib.metadata.version("polyvec")
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        pytest.skip("runs from the source tree")
    assert installed == pv.__version__


def test_the_command_line_prints_it(python):
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in python("-m", "polyvec", "info").stdout.splitlines())
    info = pv.runtime_info()
    assert lines["version"] == pv.__version__
    assert lines["isas"] == ", ".join(info["isas"])
    assert lines["num_threads"] == str(info["num_threads"])
    assert any(key.startswith("cuda") for key in lines)


def test_the_command_line_refuses_what_it_does_not_know(python):
    done = python("-m", "polyvec", "frobnicate", check=False)
    assert done.returncode == 2
    assert "invalid choice: 'frobnicate'" in done.stderr


def test_import_leaves_torch_alone(python):
    assert python("-c", "import sys, polyvec; print('torch' in sys.modules)").stdout == "False\n"
