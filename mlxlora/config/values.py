"""Converts values of YAML files and flags to the types of options."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import orjson

from .fields import choices, is_list, is_mapping, names_in, plain_type


def coerce(value: Any, kind: Any) -> Any:
    """Converts a value to the type of an option; reads text as a flag does, so that YAML's `1e-5` is a number.

    >>> coerce("1e-5", float), coerce("q_proj, v_proj", tuple[str, ...]), coerce([1, 2], tuple[float, ...] | None)
    (1e-05, ('q_proj', 'v_proj'), (1.0, 2.0))

    Raises:
        ValueError: it has another type; the message says what is expected.
    """
    kind = plain_type(kind)
    if offered := choices(kind):
        return _choice(value, offered)
    if is_mapping(kind):
        return _mapping(value)
    if is_list(kind):
        return _tuple(value, get_args(kind)[0])
    return _PARSERS[kind](value)


def _choice(value: Any, offered: tuple[Any, ...]) -> Any:
    if value not in offered:
        raise ValueError(names_in(offered))
    return value


def _mapping(value: Any) -> dict[str, Any]:
    try:
        value = orjson.loads(value) if isinstance(value, str) else value
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, Mapping):
        raise ValueError('a JSON object, such as {"enable_thinking": false}')
    return dict(value)


def _tuple(value: Any, kind: Any) -> tuple[Any, ...]:
    value = [f"{name}={item}" for name, item in value.items()] if isinstance(value, Mapping) else value
    items = [part.strip() for part in value.strip("[] ").split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("a list")
    try:
        return tuple(coerce(item, kind) for item in items)
    except ValueError as error:
        raise ValueError(f"a list, each {error}") from None


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text (in quotes)")
    return value


def _numeric(kind: Callable[[Any], Any], accepted: tuple[type, ...], expected: str) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        try:
            if isinstance(value, bool) or not isinstance(value, accepted):
                raise ValueError
            return kind(value)
        except ValueError:
            raise ValueError(expected) from None

    return parse


_PARSERS: dict[type, Callable[[Any], Any]] = {
    bool: _bool,
    int: _numeric(int, (int, str), "a whole number"),
    float: _numeric(float, (int, float, str), "a number"),
    str: _text,
}
