"""Ends a rank that waits for others too long, and saves what it has."""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attrs import define, field

PATIENCE = "MLXLORA_RANK_TIMEOUT"
"""Variable: the most seconds that a rank waits for the others."""

_LONGEST = 1800.0  # seconds; others may be sampling, rewarding or writing meanwhile
_GRACE = 60.0  # seconds in which a step that does not wait for others may end
_GRACE_OF_NOTHING = 5.0  # where there is nothing to save, but perhaps a message to end


# --- when others are gone -------------------------------------------------------------------------


def nothing() -> None:
    """What there is to rescue before the first step, and after the last."""


@define(eq=False)
class Watch:
    """Ends this process when it is told to (SIGTERM), or when it has waited for the others for too long.

    A process that waits for others in MLX cannot be interrupted, so a thread looks. It saves what there is only while the
    process waits: what is in memory is then the state after a whole step.

    Attributes:
        rank: this process.
        limit: seconds that a wait may take.
        rescue: saves the state after the last step, and tells where it is; does nothing at first.
    """

    rank: int
    limit: float
    rescue: Callable[[], None] = nothing
    _busy: threading.Lock = field(factory=threading.Lock, init=False)
    _since: float | None = field(default=None, init=False)

    def start(self) -> None:
        """To be called by the main thread, which is the one that is watched."""
        listen, wake = socket.socketpair()
        wake.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: None)  # what follows is up to the thread
            signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._busy.acquire()
        threading.Thread(target=self._look, args=(listen, wake), name="watch", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for others."""
        self._since = time.monotonic()
        self._busy.release()
        try:
            yield
        finally:
            self._busy.acquire()
            self._since = None

    def _look(self, listen: socket.socket, _: socket.socket) -> None:
        while True:
            heard, *_rest = select.select([listen], [], [], 1.0)
            if heard and signal.SIGTERM in listen.recv(64):
                self._end("stopped by its launcher, because another rank ended")
            since = self._since
            if since is not None and time.monotonic() - since > self.limit:
                self._end(f"the other ranks were not heard of for {self.limit:.0f} s ({PATIENCE} sets how long to wait)")

    def _end(self, why: str) -> None:
        """Does not return."""
        try:
            if self._busy.acquire(timeout=_GRACE if self.rescue is not nothing else _GRACE_OF_NOTHING):
                self.rescue()
        finally:
            if self.rank <= 1:  # the first may be the one that is gone
                name = f"rank {self.rank}: " if self.rank else ""
                print(f"mlxlora: error: {name}{why}", file=sys.stderr, flush=True)
            os._exit(1)
