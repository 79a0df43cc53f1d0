"""What this installation is and what it runs on."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np

from polyvec import _backend, _core


def runtime_info() -> dict[str, Any]:
    """Describe this installation: version, instruction sets, threads, CUDA.

    Returns
    -------
    dict
        `version`, `python`, `numpy`, `machine`; `isa` (active level), `isa_choice` (how it was chosen) and `isas`
        (those this CPU can run, best first; POLYVEC_ISA forces one); `num_threads` (the setting) and `cpus` (affinity
        mask capped by the cgroup quota);
        `cuda`: None when polyvec was built without it, else `architectures` it was compiled for, `runtime` version,
        `devices` (names) and `error` (why no device can be used, or None).

    Notes
    -----
    The level is chosen at the first use and stays: the best one that the CPU has, unless AVX2 is more than a tenth
    faster than AVX-512 in a test of a millisecond. Levels round differently in the last bits, because they add in
    another order; at one level results have the same bits in every run and for any number of threads. Name a level by
    POLYVEC_ISA to have the same bits on different machines.

    Examples
    --------
    >>> import polyvec as pv
    >>> info = pv.runtime_info()
    >>> info["isa"] in info["isas"]
    True
    """
    from polyvec import __version__

    cuda = _backend.cuda_module()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "isa": _core.active_isa(),
        "isa_choice": _core.isa_choice(),
        "isas": _core.available_isas(),
        "num_threads": _core.get_num_threads(),
        "cpus": _core.available_cpus(),
        "cuda": None if cuda is None else cuda.info(),
    }
