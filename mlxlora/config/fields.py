"""How options are declared: groups of fields, each with a default, a help text and checks that name the flag.

This module imports neither mlx nor transformers, so that `mlxlora --help` stays fast.
"""

import math
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

import attrs

from ..errors import InputError, quoted
from ..utils.paths import checked_path

LARGEST_INTEGER, LARGEST_SEED, LARGEST_FLOAT = 2**31 - 1, 2**63 - 1, 1e100
"""Bounds of every option that has no narrower ones."""

PATHS = frozenset(
    {"adapter_path", "data", "gguf", "model", "objective", "peft", "reference_model_path", "resume_adapter_file"}
    | {"judge_model", "reward_file", "reward_model", "save_path", "teacher_model"}
)
"""Options that name a file, a folder, or something of the hub."""

GroupClass = TypeVar("GroupClass", bound=type)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def group(panel: str) -> Callable[[GroupClass], GroupClass]:
    """Makes a class a frozen group of options with keyword arguments.

    The help texts of its fields become the `Attributes` of its docstring, so that each text is written once.

    Args:
        panel: the heading of these options in `--help`.
    """

    def decorate(cls: GroupClass) -> GroupClass:
        made: Any = attrs.define(frozen=True, kw_only=True, slots=False, field_transformer=_ordered)(cls)
        described = "\n".join(f"    {field.name}: {field.metadata['help']}" for field in attrs.fields(made))
        made.__doc__ = f"{(cls.__doc__ or panel).strip()}\n\nAttributes:\n{described}\n"
        made.PANEL = panel
        return made

    return decorate


def panel_of(options: type) -> str:
    """The heading of a group in `--help`.

    >>> from mlxlora.config.options import Training
    >>> panel_of(Training)
    'Training'
    """
    return options.PANEL  # type: ignore[attr-defined]


def option(default: Any, help: str, *checks: Any, order: int = 0) -> Any:
    """A field of a group.

    A `Literal` type is its own check. The value None passes every check.

    Args:
        default: the value without a flag.
        help: what `--help`, the docstring and the documentation say.
        checks: attrs validators; their errors name the flag, the rule and the value.
        order: fields of a lower order come first in the help.
    """
    validators = [_finite, _bounded, _sound, _offered, *map(_reported, checks)]
    convert: Any = attrs.Converter(_settled, takes_field=True)  # type: ignore[call-arg]
    return attrs.field(default=default, converter=convert, validator=validators, metadata={"help": help, "order": order})


def python_option(default: Any, help: str) -> Any:
    """A field of a group that is neither a flag nor a key of a file, because its values are objects."""
    return attrs.field(default=default, validator=_offered, metadata={"help": help, "order": _AT_THE_END, _ONLY_PYTHON: True})


def only_python(field: attrs.Attribute) -> bool:
    """Whether an option is neither a flag nor a key of a file."""
    return _ONLY_PYTHON in field.metadata


_ONLY_PYTHON = "python"
_AT_THE_END = 2


def dashed(name: str) -> str:
    """The flag of an option.

    >>> dashed("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def plain_type(kind: Any) -> Any:
    """`T` for `T | None`; of several types the first, which flags and files have, while Python may pass any.

    >>> plain_type(float | None), plain_type(str | list | None)
    (<class 'float'>, <class 'str'>)
    """
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    return next(part for part in get_args(kind) if part is not type(None))


def flag_type(kind: Any) -> Any:
    """The type of a flag of an option.

    >>> flag_type(str | list | None), flag_type(int | list)
    (str | None, <class 'int'>)
    """
    plain = str if is_mapping(kind) else plain_type(kind)
    return plain | None if type(None) in get_args(kind) else plain


def is_given(value: Any, kind: Any) -> bool:
    """Whether a value is an object that only Python can pass, in place of one that a flag or a file has.

    >>> is_given(len, str | Callable[..., Any]), is_given("len", str | Callable[..., Any]), is_given(len, str)
    (True, False, False)
    """
    others = [part for part in get_args(kind) if part is not type(None)][1:] if plain_type(kind) is not kind else []
    return bool(others) and not isinstance(value, str | int | float | list | tuple)


def choices(kind: Any) -> tuple[Any, ...]:
    """The values of a `Literal` type; of any other type none.

    >>> choices(Literal["a", "b"] | None), choices(str)
    (('a', 'b'), ())
    """
    kind = plain_type(kind)
    return get_args(kind) if get_origin(kind) is Literal else ()


def names_in(values: tuple[Any, ...]) -> str:
    """The rule that a value is one of a few.

    >>> names_in(("a", "b"))
    'one of a, b'
    """
    return f"one of {', '.join(map(str, values))}"


def _settled(value: Any, field: Any) -> Any:
    """What Python passes: text for a path; a tuple for a list, so that a group stays what it is; one text is a list of one."""
    if isinstance(value, PathLike):
        return str(value)
    if not is_list(field.type) or value is None:
        return value
    return (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)


def is_mapping(kind: Any) -> bool:
    """Whether the value of an option is an object, which flags give as JSON."""
    return get_origin(plain_type(kind)) is Mapping


def is_list(kind: Any) -> bool:
    """Whether an option takes several values.

    >>> is_list(Sequence[str] | None), is_list(str)
    (True, False)
    """
    return get_origin(plain_type(kind)) in (tuple, Sequence)


def _ordered(_: type, fields: list[attrs.Attribute]) -> list[attrs.Attribute]:
    ordered = sorted(fields, key=lambda field: field.metadata.get("order", 0))
    return [field.evolve(converter=_path_of(field.name)) if field.name in PATHS else field for field in ordered]


def _path_of(name: str) -> Callable[[Any], Any]:
    """Checks the paths of an option, as text, and expands `~`; leaves alone what Python passed in place of a path."""

    def convert(value: Any) -> Any:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return type(value)(convert(item) for item in value)
        if not isinstance(value, str | os.PathLike):
            return value
        checked = checked_path(value, dashed(name))
        return str(checked) if not isinstance(value, str) or value.startswith("~") else value

    return convert


def _finite(_: Any, field: Any, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{dashed(field.name)} must be a finite number, got {quoted(value)}")


def _bounded(_: Any, field: Any, value: Any) -> None:
    """MLX keeps sizes in 32 bits and computes in 32-bit floating point; seeds have 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    most = LARGEST_SEED if field.name == "seed" else LARGEST_INTEGER if isinstance(value, int) else LARGEST_FLOAT
    if abs(value) > most:
        raise InputError(f"{dashed(field.name)} must be at most {most:,}, got {quoted(value)}")


def _sound(_: Any, field: Any, value: Any) -> None:
    """Text that files, paths and messages can hold: UTF-8 without zero bytes."""
    for text in value if isinstance(value, list | tuple) else (value,):
        if isinstance(text, str) and ("\0" in text or text.encode(errors="ignore").decode() != text):
            raise InputError(f"{dashed(field.name)} must be UTF-8 text without zero bytes, got {quoted(text)}")


def _offered(_: Any, field: Any, value: Any) -> None:
    offered = choices(field.type)
    if offered and value is not None and not is_given(value, field.type) and value not in offered:
        raise InputError(f"{dashed(field.name)} must be {names_in(offered)}, got {quoted(value)}")


def _reported(check: Any) -> Any:
    """The check, with an error of one line for the user."""

    def run(options: Any, field: Any, value: Any) -> None:
        if value is None or is_given(value, field.type):
            return
        try:
            check(options, field, value)
        except (ValueError, TypeError):
            raise InputError(f"{dashed(field.name)} must be {_rule(check)}, got {quoted(value)}") from None

    return run


def _rule(check: Any) -> str:
    bound = getattr(check, "bound", None)
    if bound is not None:
        return f"{check.compare_op} {bound}"
    return names_in(check.options) if hasattr(check, "options") else repr(check)


class AllOrCount:
    """Checks a count; -1 stands for all."""

    bound, compare_op = "1", "-1 or >="

    def __call__(self, _: Any, __: Any, value: int) -> None:
        if value != -1 and value < 1:
            raise ValueError


class AutoOrCount:
    """Checks a count; the word auto leaves it to the program."""

    def __repr__(self) -> str:
        return "auto or a number >= 1"

    def __call__(self, _: Any, __: Any, value: str) -> None:
        if value != "auto" and not (str(value).isdecimal() and int(value)):
            raise ValueError


class EachOf:
    """Checks a list whose entries are some of a few names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __repr__(self) -> str:
        return f"a list of {', '.join(self.names)}"

    def __call__(self, _: Any, __: Any, value: tuple[str, ...]) -> None:
        if not set(value) <= set(self.names):
            raise ValueError


class Betas:
    """Checks the two decay rates of an optimizer's moments."""

    def __repr__(self) -> str:
        return "two numbers in [0, 1)"

    def __call__(self, _: Any, __: Any, value: Any) -> None:
        if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
            raise ValueError


class Pattern:
    """Checks entries `name=number`; the name is the end of a module's path, or a regular expression for such an end."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"a list of module=number, such as q_proj=16, each a {'whole ' if self.kind is int else ''}number above 0"

    def __call__(self, _: Any, __: Any, value: tuple[str, ...]) -> None:
        for name, _equals, number in (entry.rpartition("=") for entry in value):
            if not name or not 0 < self.kind(number) <= LARGEST_INTEGER:
                raise ValueError
            _check_expression(name)


def _check_expression(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(str(error)) from None


class Start:
    """Checks how adapters start."""

    def __repr__(self) -> str:
        return "default, pissa or pissa_niter_N, such as pissa_niter_8"

    def __call__(self, _: Any, __: Any, value: str) -> None:
        if not re.fullmatch(r"default|pissa(_niter_[1-9]\d*)?", value):
            raise ValueError
