"""Bench cases: `pytest bench`, or `pytest bench --benchmark-json=results.json` for `python -m bench.report`.

A case is a test that hands its contenders to the fixture `compare`, as calls without arguments that take a millisecond
or more (loop inside for anything shorter)::

    def test_product(compare, rng):
        torch = pytest.importorskip("torch")
        x, y = ...
        compare(
            lambda: pv.hypercomplex.product(x, y),
            {"torch": lambda: torch_product(x, y)},
            check=lambda result: np.testing.assert_allclose(result, expected, rtol=1e-5),
            flops=32 * n, bytes=48 * n,
        )

`check` sees one result of every contender before anything is timed. Then rounds alternate between all of them, so that
a ratio compares the same moments of a noisy machine; it is the median over rounds of rival time / our time. The
fixture `curve` does the same for recall against queries per second. Both keep their figures in the JSON's `extra_info`
and in the summary at the end of the run.

Every library runs on one thread; `--threads 2` gives all of them two. `--large folder` runs the cases that take minutes
to build what they time, and keeps that in the folder for the next run.
"""

from __future__ import annotations

import lzma
import os
import re
import statistics
import time

import pytest

from evaluation_sets import data  # noqa: F401 (a fixture)

THREAD_VARIABLES = ("POLYVEC_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
                    "RAYON_NUM_THREADS")  # fmt: skip
summary = []


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="threads of polyvec and of every rival")
    parser.addoption(
        "--large", metavar="FOLDER", help="run cases of a million vectors, which keep what they build here"
    )


def pytest_configure(config):
    # Before any of these libraries is imported: some read their variable once.
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(config.getoption("--threads"))
    config.addinivalue_line("filterwarnings", "ignore")  # rivals may warn


def seconds(call):
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best(call, rounds=7):
    """The fastest of a few calls: for ceilings."""
    return min(seconds(call) for _ in range(rounds))


@pytest.fixture(scope="session")
def threads(request):
    return request.config.getoption("--threads")


@pytest.fixture(scope="module")
def faiss(threads):
    module = pytest.importorskip("faiss")
    module.omp_set_num_threads(threads)
    return module


@pytest.fixture(scope="module")
def glosses(data):  # noqa: F811
    """117,659 x 384, normalised."""
    import numpy as np

    with lzma.open(data / "wordnet-glosses-minilm" / "vectors_i8.npy.xz") as file:
        x = np.load(file).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def note():
    """`note(line)`: one more line in the summary."""
    return summary.append


@pytest.fixture
def peak_megabytes():
    """Measures how much more memory the process holds during a call than before it (Linux)."""

    def status(field):
        with open("/proc/self/status") as file:
            return int(re.search(rf"{field}:\s+(\d+) kB", file.read())[1]) / 1024

    def measure(call):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak becomes what is held now
        before = status("VmRSS")
        call()
        return status("VmHWM") - before

    return measure


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def ceilings():
    """What this machine does at most, measured now: sgemm in GFLOP/s, reading and copying memory in GB/s."""
    import numpy as np

    n = 1536
    a, b, c = (np.ones((n, n), np.float32) for _ in range(3))
    x, y = (np.ones(1 << 26, np.float32) for _ in range(2))  # 256 MB each: larger than the last cache
    return {
        "sgemm": 2 * n**3 / best(lambda: np.matmul(a, b, out=c)) / 1e9,
        "read": 2 * x.nbytes / best(lambda: x.dot(y)) / 1e9,
        "copy": 2 * x.nbytes / best(lambda: np.copyto(y, x)) / 1e9,
    }


def alternate(benchmark, contenders, budget):
    """Time all contenders in turn, the first by pytest-benchmark itself; returns {name: seconds a round}."""
    (_, ours), *rivals = contenders.items()
    times = {name: [] for name, _ in rivals}
    once = sum(seconds(call) for call in contenders.values())
    rounds = min(max(5, int(budget / once)), 50)

    def setup():
        for name, call in rivals:
            times[name].append(seconds(call))

    benchmark.pedantic(ours, setup=setup, rounds=rounds)
    return {next(iter(contenders)): list(benchmark.stats.stats.data), **times}


def ratios(times):
    """Median over rounds of rival time / our time."""
    (_, ours), *rivals = times.items()
    return {
        name: statistics.median(theirs / mine for theirs, mine in zip(rival, ours, strict=True))
        for name, rival in rivals
    }


@pytest.fixture
def compare(benchmark, ceilings, threads):
    """`compare(ours, rivals, *, check, flops=None, bytes=None, budget=3.0)`; see the top of this file.

    flops and bytes are those of one call: what the task needs, not what an implementation spends.
    budget is in seconds, for all rounds together (five at least).
    """

    def run(ours, rivals, *, check, flops=None, bytes=None, budget=3.0):
        contenders = {"polyvec": ours, **rivals}
        for call in contenders.values():
            check(call())
        times = alternate(benchmark, contenders, budget)
        median = statistics.median(times["polyvec"])
        info = {
            "threads": threads,
            "ceilings": ceilings,
            "seconds": {name: {"median": statistics.median(t), "min": min(t)} for name, t in times.items()},
            "ratios": ratios(times),
        }
        if flops:
            info["gflops"] = flops / median / 1e9
            info["of_sgemm"] = info["gflops"] / ceilings["sgemm"]
        if bytes:
            info["gbs"] = bytes / median / 1e9
            info["of_copy"] = info["gbs"] / ceilings["copy"]
        benchmark.extra_info.update(info)
        line = f"{benchmark.fullname}: {median * 1e3:.3f} ms"
        if flops:
            line += f", {info['gflops']:.1f} GFLOP/s ({info['of_sgemm']:.0%} of sgemm)"
        if bytes:
            line += f", {info['gbs']:.1f} GB/s ({info['of_copy']:.0%} of copy)"
        line += "".join(f", {ratio:.2f}x {name}" for name, ratio in info["ratios"].items())
        summary.append(line)
        return info

    return run


@pytest.fixture
def curve(benchmark, threads):
    """`curve(ours, rivals, *, settings, recall, queries, budget=5.0)`: recall against queries per second.

    Contenders are calls of one setting (ef, candidates, ...); recall(result) is a number; queries is how many one call
    answers. extra_info["curve"] becomes {name: [{"setting", "recall", "qps"}, ...]}.
    """

    def run(ours, rivals, *, settings, recall, queries, budget=5.0):
        contenders = {"polyvec": ours, **rivals}
        points = {
            name: [{"setting": s, "recall": float(recall(call(s))), "times": []} for s in settings]
            for name, call in contenders.items()
        }

        def sweep(name):
            for point in points[name]:
                point["times"].append(seconds(lambda point=point: contenders[name](point["setting"])))

        alternate(benchmark, {name: lambda name=name: sweep(name) for name in contenders}, budget)
        for name, curve_points in points.items():
            for point in curve_points:
                point["qps"] = queries / statistics.median(point.pop("times"))
            summary.append(
                f"{benchmark.fullname}, {name}: "
                + ", ".join(f"{p['setting']}: {p['recall']:.3f} at {p['qps']:,.0f}/s" for p in curve_points)
            )
        benchmark.extra_info.update(threads=threads, curve=points)
        return points

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    import polyvec

    machine_info["polyvec"] = polyvec.runtime_info()


def pytest_terminal_summary(terminalreporter):
    if summary:
        terminalreporter.section("polyvec and its rivals (ratio: rival time / our time)")
        for line in summary:
            terminalreporter.line(line)
