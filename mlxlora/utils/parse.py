"""Reads small files of unknown origin within bounds: a few bytes must not become gigabytes, hours or endless recursion."""

import math
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, listed, quoted
from .paths import not_special, within

MOST_YAML, MOST_VALUES, MOST_LEVELS = 1 << 19, 100_000, 40
"""Bytes of a YAML file; values and levels after all aliases are followed."""

MOST_LINES = 1 << 29
"""Bytes of a JSONL file that a run left."""

_WHOLE, _NAMES = 2**53, 1000


class PlainLoader(yaml.SafeLoader):
    """PyYAML's own rules; mlx-lm changes those of `SafeLoader` for the whole process, so that `._` becomes a number."""

    yaml_implicit_resolvers = dict(yaml.resolver.Resolver.yaml_implicit_resolvers)  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Stops at a depth that is refused anyway: PyYAML's time is quadratic in it."""
        if self._level > 2 * MOST_LEVELS:
            raise RecursionError
        self._level += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1


def yaml_text(file: Path, flag: str) -> str:
    """The text of a YAML file.

    Raises:
        InputError: it is too large, or not a plain file.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    size = not_special(file, flag).stat().st_size
    if size > MOST_YAML:
        raise InputError(f"{file}: {size:,} bytes of YAML, {MOST_YAML:,} are the limit")
    return file.read_text(encoding="utf-8")


def check_node(root: yaml.Node | None, named: str) -> None:
    """Checks how large the value of a YAML node is, before it is made: aliases multiply.

    Raises:
        InputError: it has too many values or levels, or contains itself.
    """
    _measure(root, named, {}, 0)


def _measure(node: yaml.Node | None, named: str, known: dict[int, tuple[int, int]], level: int) -> tuple[int, int]:
    """The number of values and of levels of a node with its aliases."""
    if not isinstance(node, yaml.CollectionNode):
        return 1, 0
    if known.get(id(node)) == _BEGUN or level + known.get(id(node), _BEGUN)[1] > MOST_LEVELS:
        raise InputError(f"{named}: lists or mappings are nested too deeply; {MOST_LEVELS} levels are the limit")
    if id(node) not in known:
        known[id(node)] = _BEGUN
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        found = [_measure(part, named, known, level + 1) for part in parts]
        known[id(node)] = 1 + sum(values for values, _ in found), 1 + max((levels for _, levels in found), default=0)
    if known[id(node)][0] > MOST_VALUES:
        raise InputError(f"{named}: more than {MOST_VALUES:,} values with all aliases; write them out, or leave some out")
    return known[id(node)]


_BEGUN = (0, 0)  # of a node whose parts are being measured: it must not be among them


def yaml_mapping(file: Path) -> dict[str, Any]:
    """The options that a YAML file of unknown origin holds, as JSON has them: dates and other values of YAML become text.

    Raises:
        InputError: it is too large or deep, or is no mapping.
        Exception: it is no YAML; PyYAML raises more than its own errors.
    """
    return deepcopy(_mapping(yaml_text(within(file), "--resume"), str(file)))


@lru_cache(maxsize=1)
def _mapping(text: str, named: str) -> dict[str, Any]:
    """The card and the page of a run read the same file, and PyYAML is slow."""
    loader = PlainLoader(text)
    node = loader.get_single_node()
    check_node(node, named)
    value = {} if node is None else loader.construct_document(node)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{named}: damaged: not the options of a run, but {listed([str(value)])}")
    return {str(name): _as_json(item) for name, item in value.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_as_json(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def sound_records(records: list[Any]) -> list[dict[str, Any]]:
    """Metrics of a run of unknown origin: a step that is a count, a split that is text, and numbers that are finite.

    Other values become None. Names that are empty are left out, and so are those past the first thousand.

    >>> sound_records([{"step": 1, "split": "train", "loss": 2.0, "x": 1e999}, {"step": "?"}, 3])
    [{'step': 1, 'split': 'train', 'loss': 2.0, 'x': None}]
    """
    names: dict[str, None] = {}
    kept = []
    for record in filter(_is_placed, records):
        for name in record:
            if len(names) < _NAMES and name.strip():
                names.setdefault(name)
        kept.append({name: value if name == "split" else _number(value) for name, value in record.items() if name in names})
    return kept


def sound_samples(samples: list[Any]) -> list[dict[str, Any]]:
    """Completions of a run of unknown origin: text, numbers and messages; what is something else becomes text."""
    return [{name: _text_or_messages(value) for name, value in sample.items()} for sample in filter(_is_placed, samples)]


def _is_placed(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("split", ""), str):
        return False
    step = record.get("step", 0)
    return type(step) is int and 0 <= step < _WHOLE


def _number(value: Any) -> Any:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    return value if fits else None


def _text_or_messages(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value)
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(map(str, value))
    return value if isinstance(value, list) and all(map(_is_message, value)) else quoted(value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str | None)
