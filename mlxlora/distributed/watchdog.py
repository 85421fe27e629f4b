"""Saves and ends a rank that waits too long for the others."""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attrs import define, field

from ..utils.output import say

TIMEOUT = "MLXLORA_RANK_TIMEOUT"
"""Environment variable: how many seconds a rank waits for the others at most."""

_DEFAULT_TIMEOUT = 1800.0  # seconds; others may be sampling, computing rewards or writing meanwhile
_GRACE = 60.0  # seconds for the current step to finish
_GRACE_OF_NOTHING = 5.0  # seconds if there is nothing to save, so that a message can finish


def timeout() -> float:
    """Seconds that a rank waits for the others at most."""
    return float(os.environ.get(TIMEOUT) or _DEFAULT_TIMEOUT)


def nothing() -> None:
    """The `rescue` before the first step and after the last: there is nothing to save."""


@define(eq=False)
class Watch:
    """Ends this process on SIGTERM, or if it waits too long for the others.

    MLX cannot interrupt a wait for other ranks, so a thread watches. It saves only while the process waits: memory then holds
    the state after a whole step.

    Attributes:
        rank: the number of this process.
        limit: seconds that a wait may take.
        rescue: saves the state after the last step and reports where; does nothing at first.
    """

    rank: int
    limit: float
    rescue: Callable[[], None] = nothing
    _busy: threading.Lock = field(factory=threading.Lock, init=False)
    _since: float | None = field(default=None, init=False)

    def start(self) -> None:
        """Starts to watch the main thread, which has to call this."""
        listen, wake = socket.socketpair()
        wake.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: None)  # the thread handles it
            signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._busy.acquire()
        threading.Thread(target=self._look, args=(listen, wake), name="watch", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Encloses a wait for the other ranks."""
        self._since = time.monotonic()
        self._busy.release()
        try:
            yield
        finally:
            self._busy.acquire()
            self._since = None

    def _look(self, listen: socket.socket, _: socket.socket) -> None:
        while True:
            readable, *_rest = select.select([listen], [], [], 1.0)
            if readable and signal.SIGTERM in listen.recv(64):
                self._end("stopped by the launcher, because another rank ended")
            since = self._since
            if since is not None and time.monotonic() - since > self.limit:
                self._end(f"timed out after {self.limit:.0f} s without the other ranks (set {TIMEOUT} to wait longer)")

    def _end(self, why: str) -> None:
        """Does not return."""
        try:
            if self._busy.acquire(timeout=_GRACE if self.rescue is not nothing else _GRACE_OF_NOTHING):
                self.rescue()
        finally:
            if self.rank <= 1:  # rank 0 may be the one that is gone
                name = f"rank {self.rank}: " if self.rank else ""
                say(f"mlxlora: error: {name}{why}")
            os._exit(1)
