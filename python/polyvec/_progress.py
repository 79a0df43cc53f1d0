"""How long work is reported: the argument `progress` of functions that take seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = bool | Callable[[int, int], object] | None


@contextmanager
def reporting(op: str, progress: Progress, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Yield a function to call with the number of `unit` done since its last call.

    Parameters
    ----------
    op : str
        The public function: the bar's label, and for messages.
    progress : None, bool or callable
        None or False: silent. True: a tqdm bar. A callable is called with (done, total); what it raises ends the work.
    total : int
    unit : str
        What is counted, in the plural.
    """
    done = 0

    def count(step: int) -> None:
        nonlocal done
        done += step
        if callable(progress):
            progress(done, total)

    if progress is None or progress is False or callable(progress):
        yield count
    elif progress is True:
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=op, unit=f" {unit}", unit_scale=True) as bar:
            yield bar.update
    else:
        raise TypeError(
            f"{op}: progress must be None, a bool or a callable (done, total), got {type(progress).__name__}"
        )
