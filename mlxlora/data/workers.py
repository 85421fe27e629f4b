"""Tokenizes rows in processes of their own: Python's lock lets one thread at a time render a template.

A worker is a fresh interpreter that is sent the tokenizer and then chunks of rows. It is no fork, which a process with threads and
a GPU does not survive, and it does not import the user's script again. What a worker cannot do, this process does: then the
result, an error and its message are those of one process.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from ..utils.child import Child

_Chunk = TypeVar("_Chunk")
_Made = TypeVar("_Made")

MOST_WORKERS = 8  # workers
_AHEAD = 3  # chunks a worker that are sent or finished before they are asked for
_PROGRAM = "from mlxlora.data.workers import work; work()"


def worker_count() -> int:
    """One worker a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def mapped(make: Callable[[_Chunk], _Made], chunks: Iterable[_Chunk], workers: int) -> Generator[_Made, None, None]:
    """`make` of each chunk, in order; worker processes do it if there are several and `make` can be sent to them."""
    sent = _sendable(make) if workers > 1 else None
    if sent is None:
        yield from map(make, chunks)
        return
    with ExitStack() as ends:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(workers):
            idle.put(ends.enter_context(_Worker(sent)))
        threads = ThreadPoolExecutor(workers, "tokenize")
        ends.callback(threads.shutdown, wait=False, cancel_futures=True)
        for chunk, made in _in_order(threads, idle, chunks, _AHEAD * workers):
            yield make(chunk) if made is None else made


def _in_order(
    threads: ThreadPoolExecutor, idle: "SimpleQueue[_Worker]", chunks: Iterable[Any], ahead: int
) -> Iterator[tuple[Any, Any]]:
    """The chunks with what a worker made of them, None where it failed."""

    def sent(chunk: Any) -> Any:
        worker = idle.get()
        try:
            return worker.made(chunk)
        finally:
            idle.put(worker)

    waiting: deque[tuple[Any, Future]] = deque()
    for chunk in chunks:
        waiting.append((chunk, threads.submit(sent, chunk)))
        if len(waiting) >= ahead:
            chunk, future = waiting.popleft()
            yield chunk, future.result()
    for chunk, future in waiting:
        yield chunk, future.result()


def _sendable(make: Any) -> bytes | None:
    """A function as bytes; None if another process cannot have it, such as one that was defined in a notebook."""
    try:
        return pickle.dumps(make)
    except Exception:  # whatever an object raises that cannot be copied
        return None


class _Worker:
    """A process that makes something of chunks. Ctrl-C does not reach it; it ends when its input does, or this process."""

    def __init__(self, make: bytes) -> None:
        folders = [str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "TOKENIZERS_PARALLELISM": "false"}
        self._child = Child.start(_PROGRAM, "-P", stderr=subprocess.DEVNULL, env=environment)
        self._make: bytes | None = make

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.process.wait()
        for pipe in (self._child.process.stdin, self._child.process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def made(self, chunk: Any) -> Any:
        """What the worker made of a chunk; None if it could not."""
        reader: Any = self._child.process.stdout
        writer: Any = self._child.process.stdin
        try:
            if self._make is not None:
                pickle.dump(self._make, writer)
                self._make = None
            pickle.dump(chunk, writer)
            writer.flush()
            return pickle.load(reader)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):  # it was killed, for example for its memory
            return None


def work() -> None:
    """The program of a worker."""
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # what a tokenizer prints is no reply
        make = pickle.loads(pickle.load(sys.stdin.buffer))
        with suppress(EOFError):
            while True:
                pickle.dump(_attempt(make, pickle.load(sys.stdin.buffer)), replies)
                replies.flush()


def _attempt(make: Callable[[Sequence[Any]], Any], chunk: Sequence[Any]) -> Any:
    try:
        return make(chunk)
    except Exception:  # the other process meets it again, and says it
        return None
