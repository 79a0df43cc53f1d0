"""Which instruction-set level runs: what is offered, what is chosen, and what the user may force."""

import ctypes
import pathlib
import platform
import re

import numpy as np
import pytest

import polyvec as pv
from polyvec import _core

X86_FEATURES = {  # names as /proc/cpuinfo writes them (lzcnt is abm there)
    "amx": {"amx_bf16", "amx_int8", "amx_tile"},
    "avx512_bf16": {
        "avx512_bf16",
        "avx512_vnni",
        "avx512vbmi",
        "avx512_vbmi2",
        "avx512_bitalg",
        "avx512_vpopcntdq",
    },
    "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "avx2": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
    "base": set(),
}


@pytest.mark.skipif(
    not (pathlib.Path("/proc/cpuinfo").exists() and platform.machine() == "x86_64"), reason="needs Linux on x86-64"
)
def test_levels_are_those_that_the_kernel_reports():
    line = next(line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = set(line.partition(":")[2].split())
    if ctypes.CDLL(None).syscall(158, 0x1023, 18) != 0:  # arch_prctl: Linux can refuse the process its matrices
        flags.discard("amx_tile")
    expected, missing = [], set()
    for level, needs in reversed(X86_FEATURES.items()):  # a level includes those below it
        missing |= needs - flags
        if not missing:
            expected.insert(0, level)
    assert _core.available_isas() == expected


INFO = "import polyvec as pv; info = pv.runtime_info(); print(info['isa'], info['isa_choice'], sep='; ')"


def test_the_default_is_the_best_level_or_the_faster_one(python):
    isa, choice = python("-c", INFO, POLYVEC_ISA="").stdout.strip().split("; ")
    levels = _core.available_isas()
    if "avx2" not in levels[1:]:
        assert (isa, choice) == (levels[0], "the best that this CPU has")
        return
    ratio = float(re.fullmatch(rf"timed: {levels[0]} is ([\d.]+) times as fast as avx2", choice)[1])
    assert isa in (levels[0], "avx2")
    if abs(ratio * 1.1 - 1) > 0.01:  # the text is rounded
        assert isa == ("avx2" if ratio * 1.1 < 1 else levels[0])


@pytest.mark.parametrize("level", _core.available_isas())
def test_the_environment_forces_a_level(python, level):
    assert python("-c", INFO, POLYVEC_ISA=level).stdout == f"{level}; POLYVEC_ISA\n"
    code = (
        "import numpy as np, polyvec as pv; x = np.ones((4, 9), np.float32);"
        "print(pv.hypercomplex.norm(x).tolist() == [2.0] * 9, pv.runtime_info()['isa'])"
    )
    assert python("-c", code, POLYVEC_ISA=level).stdout == f"True {level}\n"


def test_a_forced_level_stays(python):
    code = (
        "import numpy as np; from polyvec import _core, hypercomplex;"
        "_core.force_isa(_core.available_isas()[-1]);"  # before anything was timed
        "_core.isa_choice(); hypercomplex.norm(np.ones((4, 9), np.float32)); print(_core.active_isa())"
    )
    assert python("-c", code, POLYVEC_ISA="").stdout.strip() == _core.available_isas()[-1]


@pytest.mark.parametrize("level", ["AVX2", "sse9"])
def test_an_unknown_level_is_an_error_at_import(python, level):
    done = python("-c", "import polyvec", POLYVEC_ISA=level, check=False)
    text = f"ImportError: POLYVEC_ISA must be one of {', '.join(_core.available_isas())}, got {level}"
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(text)


def test_a_level_that_this_cpu_lacks_is_an_error():
    elsewhere = "neon" if platform.machine() == "x86_64" else "avx2"
    with pytest.raises(ValueError, match="isa must be one of") as caught:
        _core.force_isa(elsewhere)
    assert str(caught.value) == f"isa must be one of {', '.join(_core.available_isas())}, got {elsewhere}"


def test_levels_can_be_switched_in_a_process(isa):
    assert pv.runtime_info()["isa"] == isa


def test_levels_agree(rng):
    x, y = (rng.standard_normal((7, 4, 33), np.float32) for _ in range(2))
    before, results = _core.active_isa(), []
    for level in _core.available_isas():
        _core.force_isa(level)
        results.append(pv.hypercomplex.product(x, y))
    _core.force_isa(before)
    for result in results:  # fused multiply-add rounds once where the base level rounds twice
        np.testing.assert_allclose(result, results[0], rtol=0, atol=1e-5)
