"""The thread setting of the process, and its threadpoolctl controller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from polyvec import _core
from polyvec._arrays import as_count


def get_num_threads() -> int:
    """Return how many threads a call uses when it is not told otherwise."""
    return _core.get_num_threads()


def set_num_threads(n: int | None) -> None:
    """Set how many threads calls use; None goes back to the default.

    The default is POLYVEC_NUM_THREADS, else OMP_NUM_THREADS, else the CPUs that this process may use.
    """
    _core.set_num_threads(0 if n is None else as_count("set_num_threads", "n", n))


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Use `n` threads within a `with` block."""
    before = _core.get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        _core.set_num_threads(before)


def _register_controller() -> None:
    """Make `threadpoolctl.threadpool_limits` act on polyvec; a process without threadpoolctl needs nothing."""
    try:
        from threadpoolctl import LibController, register
    except ImportError:
        return

    class PolyvecController(LibController):  # type: ignore[misc]
        user_api = "polyvec"
        internal_api = "polyvec"
        filename_prefixes = ("_core",)
        check_symbols = ("polyvec_get_num_threads", "polyvec_set_num_threads")

        def get_num_threads(self) -> int:
            return int(self.dynlib.polyvec_get_num_threads())

        def set_num_threads(self, num_threads: int) -> None:
            self.dynlib.polyvec_set_num_threads(num_threads)

        def get_version(self) -> str:
            from polyvec import __version__

            return __version__

        def set_additional_attributes(self) -> None:
            self.isa = _core.active_isa()

    register(PolyvecController)


_register_controller()
