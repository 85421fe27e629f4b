"""Values that hold while a context lasts, for functions whose signature has no room for an argument."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Held = TypeVar("Held")


@contextmanager
def assigned(variable: ContextVar[Held], value: Held) -> Iterator[None]:
    """The variable has this value while the context lasts."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
