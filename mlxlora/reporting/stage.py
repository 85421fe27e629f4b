"""Long work before the first step, such as tokenizing: a bar in a terminal, a line in a log if it took more than a second."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..utils.ticks import listening
from .reporter import Reporter

_OFTEN = 0.1  # seconds between two reports


@contextmanager
def announced(reporter: Reporter, text: str, total: int = 0, *, at_once: bool = True) -> Iterator[None]:
    """Reports what goes on within, and how many items of `total` passed `ticking`.

    Args:
        reporter: is told.
        text: what goes on.
        total: how many items there are; 0: unknown.
        at_once: report before the first item; else work without items is not reported.
    """
    done, told = 0, time.monotonic() if at_once else 0.0

    def seen(count: int) -> None:
        nonlocal done, told
        done += count
        if time.monotonic() - told > _OFTEN:
            told = time.monotonic()
            reporter.stage(text, done, total)

    if at_once:
        reporter.stage(text, 0, total)
    try:
        with listening(seen):
            yield
    finally:
        reporter.stage("", done, total)
