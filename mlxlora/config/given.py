"""What Python passes in place of text: rows, functions, objects. Files of a run name them, and cannot bring them back."""

from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any, Protocol, TypeVar

from ..errors import InputError

PathOrName = str | PathLike[str]
"""A path or a hub name."""

_Entry = TypeVar("_Entry", covariant=True)


class RowsInMemory(Protocol[_Entry]):
    """A list of dictionaries, a data set, a frame, or anything else that has a length and iterates over rows."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_Entry]: ...


Data = PathOrName | RowsInMemory[Any] | Mapping[str, RowsInMemory[Any]]
"""RowsInMemory, where they are, or splits by name."""


class Network(Protocol):
    """A loaded model: an mlx-lm model, or any `mlx.nn.Module` like it."""

    def parameters(self) -> Any: ...
    def trainable_parameters(self) -> Any: ...
    def update_modules(self, modules: dict, strict: bool = True) -> Any: ...


Model = PathOrName | Network | tuple[Network, Any]
"""A model folder or hub name, a loaded model, or what `mlxlora.load` returns: a model and its tokenizer."""


class UpdateRule(Protocol):
    """An optimizer of `mlx.optimizers`."""

    state: Any

    def init(self, parameters: dict) -> Any: ...
    def apply_gradients(self, gradients: dict, parameters: dict) -> Any: ...


GIVEN = "(given in Python"
"""Is in the text that stands in a file for what Python passed."""


def is_path(value: Any) -> bool:
    """Whether a value is text or a path, so that a file can hold it.

    >>> is_path("rows.jsonl"), is_path([{"text": "a"}])
    (True, False)
    """
    return isinstance(value, str | PathLike)


def name_of(value: Any) -> str:
    """The name of a function, or of the class of another object.

    >>> name_of(len), name_of(3)
    ('len', 'int')
    """
    return getattr(value, "__name__", None) or type(value).__name__


def storable(value: Any) -> Any:
    """A value as a configuration file holds it: lists for tuples, text for paths and for what Python passed.

    >>> storable(("a", 1)), storable(len)
    (['a', 1], 'len (given in Python)')
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): storable(item) for name, item in value.items()}
    return f"{name_of(value)} {GIVEN})"


def check_storable(values: Mapping[str, Any], named: Callable[[str], str]) -> None:
    """Checks that no option of a file was an object that only Python has.

    Args:
        values: options of a file that nothing overrides.
        named: an option -> the place of it in a message.

    Raises:
        InputError: one was.
    """
    for name, value in values.items():
        parts = value if isinstance(value, list | tuple) else (value,)
        for part in parts:
            if isinstance(part, str) and GIVEN in part:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{named(name)}: {part}, so no file has it; go on in Python, or give {flag}")
