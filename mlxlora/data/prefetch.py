"""Batches that a thread makes while a step runs: `mx.eval` releases Python's lock."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import TypeVar

_Item = TypeVar("_Item")

_END = object()


def prefetched(items: Iterator[_Item], ahead: int = 2) -> Iterator[_Item]:
    """The items in the same order; a thread makes up to `ahead` of them in advance.

    An error of `items` is raised here in the place of its item. The thread ends after the last item, when this generator is
    closed or collected, and with the program. MLX's streams belong to threads: `items` may return arrays made from numbers, but
    not results that are still to be computed.

    >>> list(prefetched(iter([1, 2, 3])))
    [1, 2, 3]
    """
    queue: Queue[tuple[_Item | object, BaseException | None]] = Queue(ahead)
    closed = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, queue, closed), name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if error:
                raise error
            if item is _END:
                return
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        _empty(queue)
        thread.join()


def _fill(items: Iterator[_Item], queue: Queue, closed: threading.Event) -> None:
    """Puts the items, then their end or the error, until the generator is closed."""
    try:
        for item in items:
            _put(queue, (item, None), closed)
            if closed.is_set():
                return
        _put(queue, (_END, None), closed)
    except BaseException as error:  # raised again by the generator
        _put(queue, (None, error), closed)


def _put(queue: Queue, entry: tuple, closed: threading.Event) -> None:
    while not closed.is_set():
        with suppress(Full):
            queue.put(entry, timeout=0.1)
            return


def _empty(queue: Queue) -> None:
    """Makes room, so that a thread that waits to put sees at once that the generator is closed."""
    with suppress(Empty):
        while True:
            queue.get_nowait()
