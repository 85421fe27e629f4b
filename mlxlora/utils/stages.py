"""Long work deep in the program, such as a download: it says what it does, and a caller shows it if it wants to."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from .context import assigned

Show = Callable[[str, int, int], object]
"""Gets what goes on, how many items are done, and how many there are (0: unknown); an empty text ends it."""

_SHOW: ContextVar[Show | None] = ContextVar("show", default=None)
_MEGABYTE = 1_000_000
_OFTEN = 0.1  # seconds between two reports


def shown_by(show: Show) -> AbstractContextManager[None]:
    """Whatever is `staged` or downloaded within is shown by `show`."""
    return assigned(_SHOW, show)


@contextmanager
def staged(text: str) -> Iterator[None]:
    """Says what goes on while the context lasts.

    >>> with shown_by(lambda *told: print(told)), staged("loading a"):
    ...     pass
    ('loading a', 0, 0)
    ('', 0, 0)
    """
    show = _SHOW.get() or (lambda *_: None)
    show(text, 0, 0)
    try:
        yield
    finally:
        show("", 0, 0)


@contextmanager
def downloading(name: str) -> Iterator[type[Any] | None]:
    """Gives a class of bars for `snapshot_download`; None where nobody listens, so that huggingface_hub shows its own bars."""
    show = _SHOW.get()
    if show is None:
        yield None
        return
    try:
        yield _bar_class(f"downloading {name}, MB", show)
    finally:
        show("", 0, 0)


def _bar_class(text: str, show: Show) -> type[Any]:
    """Bars that draw nothing: the one of the bytes on disk is shown; others count files, or bytes of the network."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts = options.get("unit") == "B" and not str(options.get("name")).endswith(".transfer")
            self._told = 0.0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            now = time.monotonic()
            if self._counts and now - self._told > _OFTEN:
                self._told = now
                show(text, round(self.n / _MEGABYTE), round((self.total or 0) / _MEGABYTE))

    return Bar
