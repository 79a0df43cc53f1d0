"""The thread pool: fork, concurrency, how many threads run, and who may stop them."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import polyvec as pv
from accuracy import assert_exact
from polyvec import _core

SOURCES = pathlib.Path(__file__).parents[1] / "cpp"
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

SETUP = """
import multiprocessing, os, threading
import numpy as np, polyvec as pv
x = np.random.default_rng(0).standard_normal((4000, 4, 32), np.float32)
square = lambda _=None: pv.hypercomplex.product(x, x, num_threads=2)
expected = square()  # the pool has run
equal = lambda: np.array_equal(square(), expected)
"""


@pytest.fixture(autouse=True)
def _default_setting():
    yield
    pv.set_num_threads(None)


def test_a_forked_child_and_its_parent_go_on(python):
    code = """
child = os.fork()
if child == 0:
    grandchild = os.fork()  # before the child has a pool of its own
    if grandchild == 0:
        os._exit(0 if equal() else 1)
    os._exit(0 if equal() and os.waitpid(grandchild, 0)[1] == 0 else 1)
print(equal(), os.waitpid(child, 0)[1])
"""
    assert python("-c", SETUP + code).stdout == "True 0\n"


def test_fork_while_another_thread_computes(python):
    code = """
stop = threading.Event()
def work():
    while not stop.is_set():
        square()
busy = threading.Thread(target=work)
busy.start()
statuses = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if equal() else 1)
    statuses.append(os.waitpid(child, 0)[1])
stop.set()
busy.join()
print(equal(), set(statuses))
"""
    assert python("-c", SETUP + code).stdout == "True {0}\n"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(python, tmp_path, method):
    code = f"""
def child(seed):
    return float(pv.hypercomplex.norm(np.full((4, 50_000), seed, np.float32), num_threads=2)[-1])
if __name__ == "__main__":
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        print(pool.map(child, range(4)), equal())
"""
    script = tmp_path / "script.py"  # spawned children import the main module from its file
    script.write_text(SETUP + code)
    assert python(str(script)).stdout == "[0.0, 2.0, 4.0, 6.0] True\n"


def test_python_threads_compute_at_once(rng):
    inputs = [rng.standard_normal((500, 4, 64), np.float32) for _ in range(8)]
    expected = [pv.hypercomplex.product(x, x, num_threads=1) for x in inputs]
    with ThreadPoolExecutor(4) as executor:
        for _ in range(10):
            results = executor.map(lambda x: pv.hypercomplex.product(x, x, num_threads=2), inputs)
            for actual, wanted in zip(results, expected, strict=True):
                assert_exact(actual, wanted)


def test_the_setting_and_its_context():
    default = pv.get_num_threads()
    pv.set_num_threads(3)
    assert pv.get_num_threads() == pv.runtime_info()["num_threads"] == 3
    with pv.num_threads(5):
        assert pv.get_num_threads() == 5
        with pytest.raises(ZeroDivisionError), pv.num_threads(1):
            raise ZeroDivisionError
        assert pv.get_num_threads() == 5
    assert pv.get_num_threads() == 3
    pv.set_num_threads(None)
    assert pv.get_num_threads() == default


def test_threadpoolctl_limits_polyvec():
    pv.set_num_threads(4)
    with threadpool_limits(1):
        assert pv.get_num_threads() == 1
    with threadpool_limits({"polyvec": 2}):
        assert pv.get_num_threads() == 2
    (entry,) = [info for info in threadpool_info() if info["user_api"] == "polyvec"]
    assert (entry["num_threads"], entry["version"], entry["isa"]) == (4, pv.__version__, _core.active_isa())


PRINT_SETTING = "import polyvec as pv; print(pv.get_num_threads())"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"POLYVEC_NUM_THREADS": "3", "OMP_NUM_THREADS": "2"}, "3"),
        ({"POLYVEC_NUM_THREADS": "", "OMP_NUM_THREADS": "2"}, "2"),
        ({"POLYVEC_NUM_THREADS": "", "OMP_NUM_THREADS": "5,3"}, "5"),  # OpenMP's form for nested regions
        ({"POLYVEC_NUM_THREADS": "", "OMP_NUM_THREADS": ""}, str(_core.available_cpus())),
    ],
)
def test_the_environment_sets_the_default(python, environment, expected):
    assert python("-c", PRINT_SETTING, **environment).stdout == f"{expected}\n"


@pytest.mark.parametrize("value", ["0", "-2", "many"])
def test_an_unusable_environment_is_an_error_at_import(python, value):
    done = python("-c", "import polyvec", POLYVEC_NUM_THREADS=value, check=False)
    assert done.returncode == 1
    text = f"ImportError: POLYVEC_NUM_THREADS must be a positive integer, got {value}"
    assert done.stderr.rstrip().endswith(text)


@linux
def test_the_default_follows_the_affinity_mask(python):
    code = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {PRINT_SETTING}"
    assert python("-c", code, POLYVEC_NUM_THREADS="", OMP_NUM_THREADS="").stdout == "1\n"


@linux
def test_threads_start_only_when_there_is_work_for_them(python):
    code = """
import os, numpy as np, polyvec as pv
def started(rows, num_threads):
    before = len(os.listdir("/proc/self/task"))
    pv.hypercomplex.norm(np.ones((rows, 4, 64), np.float32), num_threads=num_threads)
    return len(os.listdir("/proc/self/task")) - before
print(started(4, 8), started(5000, 1), started(5000, 3), started(5000, 2), started(5000, 5))
"""
    assert python("-c", code, OPENBLAS_NUM_THREADS="1").stdout == "0 0 2 0 2\n"


LONG_CALLS = {  # minutes each, if nothing stops them
    "scan.topk": "pv.scan.topk(x, x, 10, num_threads=num_threads)",
    "hnsw.Index.add": "pv.hnsw.Index(128).add(x, num_threads=num_threads)",
    "fde.Encoder.encode_docs": "pv.fde.Encoder(128, repetitions=2000, simhash_bits=6, projection_dim=8, "
    "final_dim=64).encode_docs(x.reshape(-1, 32, 128), num_threads=num_threads)",
    "fde.carve": "pv.fde.carve(x[None], threshold=99, num_threads=num_threads)",
    "quantize.kmeans_sets": "pv.quantize.kmeans_sets([x[:60_000]], 6000, num_threads=num_threads)",
    "maxsim.pool": "pv.maxsim.pool([x[:20_000], x[20_000:40_000]], 2, method='ward', num_threads=num_threads)",
    "quantize.kmeans": "pv.quantize.kmeans(x, 20_000, num_threads=num_threads)",
    "maxsim.score": "pv.maxsim.score(x.reshape(-1, 32, 128), x.reshape(-1, 32, 128), num_threads=num_threads)",
}


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("call", LONG_CALLS)
def test_ctrl_c_stops_long_work(call, num_threads):
    code = f"""
import signal
import numpy as np, polyvec as pv
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with Ctrl-C ignored
x = np.random.default_rng(0).random((200_000, 128), np.float32)
num_threads = {num_threads}
print("ready", flush=True)
try:
    {LONG_CALLS[call]}
except KeyboardInterrupt:
    small = pv.scan.topk(x[:3], x[:100], 1, num_threads=num_threads)  # the pool still works
    print("stopped", small[1].shape)
"""
    environment = {**os.environ, "POLYVEC_ISA": _core.available_isas()[-1]}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[0] == "stopped (3, 1)\n"
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0, ValueError, "num_threads must be at least 1, got 0"),
        (-3, ValueError, "num_threads must be at least 1, got -3"),
        (1.5, TypeError, "num_threads must be an integer, got float"),
        (True, TypeError, "num_threads must be an integer, got bool"),
    ],
)
def test_errors(value, error, text):
    with pytest.raises(error) as caught:
        pv.hypercomplex.norm(np.ones((4, 3), np.float32), num_threads=value)
    assert str(caught.value) == f"hypercomplex.norm: {text}"
    with pytest.raises(error) as caught:
        pv.set_num_threads(value)
    assert str(caught.value) == f"set_num_threads: {text.replace('num_threads', 'n', 1)}"


def test_numpy_integers_are_thread_counts():
    pv.set_num_threads(np.int32(2))
    assert pv.get_num_threads() == 2


def test_the_pool_in_cpp(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not (compiler and SOURCES.is_dir()):
        pytest.skip("needs a C++ compiler and polyvec's sources")
    program = tmp_path / "parallel"
    source = pathlib.Path(__file__).parent / "cpp" / "parallel.cpp"
    flags = ["-std=c++20", "-O1", "-pthread", f"-I{SOURCES / 'include'}"]
    subprocess.run([compiler, *flags, source, SOURCES / "src" / "parallel.cpp", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("", 0)
