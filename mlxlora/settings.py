"""Settings in layers: flags over a YAML file over the starter's defaults over the built-in ones.

Every option is a YAML key of the same name, with dashes or underscores. This module reads such a file, checks every value
against the type and the validator of its option, and writes a resolved configuration that is itself a valid file.
"""

import difflib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs
import yaml

from .errors import InputError

ALIASES = {
    "num_epochs": "epochs",
    "fine_tune_type": "train_type",
    "temp": "temperature",
    "dpo_loss_type": "loss_type",
    "dpo_cpo_loss_type": "loss_type",
    "lora_parameters.rank": "rank",
    "lora_parameters.scale": "scale",
    "lora_parameters.dropout": "dropout",
    "lora_parameters.keys": "lora_keys",
}
"""Other names of an option, those of mlx-lm among them; a dot separates the keys of a nested mapping."""

TRAIN = "train"
"""mlx-lm's switch between training and testing: accepted, because the subcommand already says it."""

Fields = Mapping[str, attrs.Attribute]


def fields_of(*groups: type) -> dict[str, attrs.Attribute]:
    """The options of some groups by name."""
    return {field.name: field for group in groups for field in attrs.fields(group)}


def read(path: str | Path, fields: Fields, strict: bool = True) -> dict[str, Any]:
    """The options that a YAML file sets; `null` leaves an option at its default.

    Args:
        path: the YAML file.
        fields: the options that exist, by name.
        strict: whether a key that names none of them is an error; else it is left out.

    Raises:
        InputError: unreadable file, unknown or repeated key, or a value that the option does not take.
    """
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value, line in _entries(Path(path)):
        name, where = ALIASES.get(key, key), f"{path}:{line}"
        if name in lines:
            raise InputError(f"{where}: {key} is already set in line {lines[name]}; remove one of them")
        lines[name] = line
        if name in fields:
            if value is not None:
                values[name] = _checked(fields[name], key, value, where)
        elif strict:
            _check_unknown(key, value, fields, where)
    return values


def dump(*groups: Any) -> dict[str, Any]:
    """The options of built groups as one flat mapping that `read` takes back, lists for tuples.

    >>> from mlxlora.config import SFTOptions
    >>> dump(SFTOptions(loss_type="dft"))
    {'loss_type': 'dft', 'objective': None}
    """
    flat = {name: value for group in groups for name, value in attrs.asdict(group, recurse=False).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def build(group: type, values: Mapping[str, Any]) -> Any:
    """One group of options from those of `values` that it has."""
    return group(**{field.name: values[field.name] for field in attrs.fields(group) if field.name in values})


def gather(kinds: Sequence[type], groups: Sequence[Any], options: Mapping[str, Any]) -> dict[type, Any]:
    """One group of every kind: those given, the others from single options; a single option changes a given group.

    Raises:
        InputError: an option that no group has, or a group that the method does not take.
    """
    given = {type(group): group for group in groups}
    if unknown := [kind.__name__ for kind in given if kind not in kinds]:
        raise InputError(f"this method takes no {', '.join(unknown)}; it takes {', '.join(kind.__name__ for kind in kinds)}")
    fields = fields_of(*kinds)
    for name in options:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise InputError(f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else ""))
    mine = {kind: {f.name: options[f.name] for f in attrs.fields(kind) if f.name in options} for kind in kinds}
    return {kind: attrs.evolve(given[kind], **mine[kind]) if kind in given else kind(**mine[kind]) for kind in kinds}


def coerce(value: Any, kind: Any) -> Any:
    """A value as the type of an option; text is read as a flag would be, so YAML's `1e-5` is a number.

    >>> coerce("1e-5", float), coerce("q_proj, v_proj", tuple[str, ...]), coerce([1, 2], tuple[float, ...] | None)
    (1e-05, ('q_proj', 'v_proj'), (1.0, 2.0))

    Raises:
        ValueError: it is not one; the message says what is expected.
    """
    kind = plain_type(kind)
    if get_origin(kind) is Literal:
        return _choice(value, get_args(kind))
    if get_origin(kind) is tuple:
        return _tuple(value, get_args(kind)[0])
    return _PARSERS[kind](value)


def plain_type(kind: Any) -> Any:
    """`T` for `T | None`.

    >>> plain_type(float | None)
    <class 'float'>
    """
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    return next(part for part in get_args(kind) if part is not type(None))


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"one of {', '.join(map(str, choices))}")
    return value


def _tuple(value: Any, kind: Any) -> tuple[Any, ...]:
    items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
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


def _checked(field: attrs.Attribute, key: str, value: Any, where: str) -> Any:
    try:
        value = coerce(value, field.type)
    except ValueError as error:
        raise InputError(f"{where}: {key} must be {error}, got {value!r}") from None
    try:
        if field.validator:  # attrs keeps an empty list
            field.validator(None, field, value)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return value


def _check_unknown(key: str, value: Any, fields: Fields, where: str) -> None:
    if key == TRAIN and value in (True, None):
        return
    if key == TRAIN:
        raise InputError(f"{where}: train must be true, got {value!r}; to test without training, run `mlxlora eval`")
    names = [*fields, *(alias for alias, name in ALIASES.items() if name in fields)]
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "see --help for the options of this command"
    raise InputError(f"{where}: unknown key {key}; {hint}")


def _entries(path: Path) -> Iterator[tuple[str, Any, int]]:
    """(key, value, line) of a YAML mapping; keys of a nested mapping that has aliases are joined by a dot."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise InputError(f"{path}:1: expected `key: value` lines, got {loader.construct_object(root, deep=True)!r}")
        yield from _walk(loader, root, path) if root is not None else ()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --config takes a YAML file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; --config takes a YAML file") from None
    except yaml.YAMLError as error:
        raise InputError(_syntax(path, error)) from None


def _walk(loader: yaml.SafeLoader, node: yaml.MappingNode, path: Path, prefix: str = "") -> Iterator[tuple[str, Any, int]]:
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(f"{path}:{line}: a key must be text, got {loader.construct_object(key_node, deep=True)!r}")
        key = prefix + key_node.value.replace("-", "_")
        if isinstance(value_node, yaml.MappingNode) and any(alias.startswith(key + ".") for alias in ALIASES):
            yield from _walk(loader, value_node, path, key + ".")
        else:
            yield key, loader.construct_object(value_node, deep=True), line


def _syntax(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    return f"{where}: not valid YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"
