"""Counts the items that long work has passed, for a bar: the work says what it iterates over, a caller listens if it wants to."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TypeVar

from .context import assigned

Item = TypeVar("Item")
Listener = Callable[[int], object]
"""Gets how many items were passed since its last call."""

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def ticking(items: Iterable[Item], size: Callable[[Item], int] = lambda _: 1) -> Iterable[Item]:
    """The items; the listener, if there is one, hears of each after it was used.

    Args:
        items: what the work iterates over.
        size: how many an item counts for.
    """
    listener = _LISTENER.get()
    return items if listener is None else _heard(items, size, listener)


def listening(listener: Listener) -> AbstractContextManager[None]:
    """Whatever ticks within is heard by `listener`.

    >>> heard = []
    >>> with listening(heard.append):
    ...     total = sum(ticking([5, 6]))
    >>> total, heard
    (11, [1, 1])
    """
    return assigned(_LISTENER, listener)


def _heard(items: Iterable[Item], size: Callable[[Item], int], listener: Listener) -> Iterator[Item]:
    for item in items:
        yield item
        listener(size(item))
