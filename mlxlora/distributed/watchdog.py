"""Saves and ends a rank that waits too long for the others."""

import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attrs import define, field

from ..errors import InputError, printable, quoted
from ..utils.output import say

TIMEOUT = "MLXLORA_RANK_TIMEOUT"
"""Environment variable: how many seconds a rank waits for the others at most."""

_DEFAULT_TIMEOUT = 1800.0  # seconds; others may be sampling, computing rewards or writing meanwhile
_GRACE = 60.0  # seconds for the current step to finish
_GRACE_OF_NOTHING = 5.0  # seconds if there is nothing to save, so that a message can finish


_LONGEST = 1e7  # seconds: 115 days


def timeout() -> float:
    """Seconds that a rank waits for the others at most.

    Raises:
        InputError: the environment variable is no such number.
    """
    text = os.environ.get(TIMEOUT) or str(_DEFAULT_TIMEOUT)
    with suppress(ValueError):
        seconds = float(text)
        if math.isfinite(seconds) and 0 < seconds <= _LONGEST:
            return seconds
    raise InputError(f"{TIMEOUT} must be seconds above 0 and at most {_LONGEST:,.0f}, got {quoted(text)}")


_WATCHER = """
import json, os, select, signal, socket, sys
parent, limit, rank, addresses = json.loads(sys.argv[1])
if not select.select([sys.stdin], [], [], limit)[0]:
    silent = []
    for other, (host, port) in addresses:
        try:
            socket.create_connection((host, port), 2).close()
        except OSError:
            silent.append(f"rank {other} ({host}:{port})")
    who = ", ".join(silent) or "the others"
    text = f"mlxlora: error: rank {rank} waited {limit:.0f} s for the other ranks; no answer from {who}"
    print(text, file=sys.stderr, flush=True)
    os.kill(parent, signal.SIGTERM)
"""


@contextmanager
def arriving(rank: int, limit: float) -> Iterator[None]:
    """Ends this process with a message if it still connects to the other ranks after `limit` seconds.

    MLX holds Python's lock while it connects, so that no thread can watch: another process does.
    """
    order = json.dumps([os.getpid(), limit, rank, [pair for pair in enumerate(_addresses()) if pair[0] != rank]])
    watcher = subprocess.Popen([sys.executable, "-I", "-S", "-c", _WATCHER, order], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        assert watcher.stdin
        watcher.stdin.close()  # which the watcher sees, also after a kill
        watcher.wait()


def _addresses() -> list[tuple[str, int]]:
    """Host and port of each rank of the ring; none with other backends."""
    with suppress(OSError, ValueError, TypeError, IndexError, AttributeError):
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_bytes()) if "MLX_HOSTFILE" in os.environ else []
        parts = [own[0].rpartition(":") for own in hosts]
        return [(printable(host), int(port)) for host, _, port in parts]
    return []


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
