"""The training commands, one for each row of `METHODS`."""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from mlxlora.methods import METHODS, Method

from .flags import flags

_DATA = "--model mlx-community/Qwen3-0.6B-4bit --data my-data"


COLLECTED: ContextVar[list[tuple[Any, ...]] | None] = ContextVar("collected", default=None)
"""Gets the options of training commands in place of their methods, for a sweep; None: they train."""


def training_command(method: Method[Any, Any]) -> Callable[..., None]:
    """The command that trains by a method, with a flag for each of its options."""

    def train(**groups: Any) -> None:
        collected = COLLECTED.get()
        if collected is None:
            method(*groups.values())
        else:
            collected.append(tuple(groups.values()))

    keyword = inspect.Parameter.KEYWORD_ONLY
    groups = [inspect.Parameter(kind.__name__, keyword, annotation=kind) for kind in method.kinds.kinds()]
    train.__signature__ = inspect.Signature(groups)  # type: ignore[attr-defined]
    train.__name__, train.__doc__ = method.name, method.help
    return flags(method=method)(train)


TRAINING = {name: (training_command(method), f"{_DATA} {method.example}") for name, method in METHODS.items()}
"""By name: the command, and the flags of an example."""
