"""A time limit on foreign Python code, in any thread."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from attrs import define

_LOOK = 0.25  # seconds between two checks, while a thread is watched


class TooLong(Exception):
    """Raised in a thread that exceeds its time limit."""


@define(eq=False)
class _Watched:
    thread: int
    deadline: float
    struck: bool = False


_watched: set[_Watched] = set()
_lock = threading.Lock()
_wake = threading.Event()
_watcher: threading.Thread | None = None


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises `TooLong` in this thread after this time; a block that ends sooner pays microseconds.

    The error comes between two Python instructions: a running call into C, such as a product of huge numbers, ends first.

    Raises:
        TooLong: the block exceeded the limit.
    """
    own = _Watched(threading.get_ident(), time.monotonic() + seconds)
    with _lock:
        _watched.add(own)
        _start()
    _wake.set()
    try:
        yield
    finally:
        with _lock:
            _watched.discard(own)
            if own.struck:  # an error raised at the very end must not reach later code
                _raise_in(own.thread, None)


def _start() -> None:
    """Starts the watcher thread; a forked process has none."""
    global _watcher
    if _watcher is None or not _watcher.is_alive():
        _watcher = threading.Thread(target=_watch, daemon=True, name="mlxlora-limits")
        _watcher.start()


def _watch() -> None:
    while True:
        with _lock:
            for late in [own for own in _watched if own.deadline < time.monotonic()]:
                late.struck, late.deadline = True, time.monotonic() + _LOOK  # again: a destructor may have swallowed it
                _raise_in(late.thread, TooLong)
            idle = not _watched
            if idle:
                _wake.clear()
        _wake.wait() if idle else time.sleep(_LOOK)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind) if kind else None)
