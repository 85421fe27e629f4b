"""Batches made while a step runs: `mx.eval` releases Python's lock, so that a thread can collate meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import TypeVar

Item = TypeVar("Item")

_END = object()


def prefetched(items: Iterator[Item], ahead: int = 2) -> Iterator[Item]:
    """The items, at most `ahead` of them made in advance by a thread, in the same order.

    What `items` raises is raised here, where the item would have come. The thread ends with the items, when this
    generator is closed or forgotten, and with the program. MLX's streams belong to threads: arrays made from numbers
    may be used here, results that are yet to be computed may not.

    >>> list(prefetched(iter([1, 2, 3])))
    [1, 2, 3]
    """
    queue: Queue[tuple[Item | object, BaseException | None]] = Queue(ahead)
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


def _fill(items: Iterator[Item], queue: Queue, closed: threading.Event) -> None:
    """Puts the items, then their end or the error, until nobody wants them."""
    try:
        for item in items:
            _put(queue, (item, None), closed)
            if closed.is_set():
                return
        _put(queue, (_END, None), closed)
    except BaseException as error:  # raised again where the item would have come
        _put(queue, (None, error), closed)


def _put(queue: Queue, entry: tuple, closed: threading.Event) -> None:
    while not closed.is_set():
        with suppress(Full):
            queue.put(entry, timeout=0.1)
            return


def _empty(queue: Queue) -> None:
    """So that the thread, which may be waiting to put, sees at once that it is over."""
    with suppress(Empty):
        while True:
            queue.get_nowait()
