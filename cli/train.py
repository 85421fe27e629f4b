"""The training commands, one for each row of `METHODS`."""

import inspect
from collections.abc import Callable
from typing import Any

from mlxlora.methods import METHODS, Method

from .flags import flags

_DATA = "--model mlx-community/Qwen3-0.6B-4bit --data my-data"


def training_command(method: Method[Any, Any]) -> Callable[..., None]:
    """The command that trains by a method, with a flag for each of its options."""

    def train(**groups: Any) -> None:
        method(*groups.values())

    keyword = inspect.Parameter.KEYWORD_ONLY
    groups = [inspect.Parameter(kind.__name__, keyword, annotation=kind) for kind in method.kinds.kinds()]
    train.__signature__ = inspect.Signature(groups)  # type: ignore[attr-defined]
    train.__name__, train.__doc__ = method.name, method.help
    return flags(method=method)(train)


TRAINING = {name: (training_command(method), f"{_DATA} {method.example}") for name, method in METHODS.items()}
"""By name: the command, and the flags of an example."""
