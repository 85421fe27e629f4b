"""Signatures of functions that pass their options on."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def also_takes(inner: Callable[..., Any], *, but: tuple[str, ...] = ()) -> Callable[[_Function], _Function]:
    """Shows the keyword options of `inner` in the signature of a function that passes its `**options` on to it.

    Args:
        inner: gets the options.
        but: options that the function sets itself.

    >>> def area(*, width=1, height=1): ...
    >>> @also_takes(area, but=("height",))
    ... def square(*, name="", **options): ...
    >>> str(inspect.signature(square))
    "(*, name='', width=1)"
    """

    def show(function: _Function) -> _Function:
        own, of_inner = (_keywords(f) for f in (function, inner))
        more = {name: p for name, p in of_inner.items() if name not in (*own, *but)}
        function.__signature__ = inspect.signature(function).replace(parameters=[*own.values(), *more.values()])  # type: ignore[attr-defined]
        return function

    return show


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
