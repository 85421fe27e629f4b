"""Rows that Python passes: lists of dictionaries, splits by name, data sets, frames, and anything else of rows with a length."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from attrs import frozen

from ..config.given import GIVEN, is_path
from ..errors import InputError, described, listed
from .rows import SPLIT_NAMES, Row, SplitRows, read_splits, without_filler

_NAMES = {name: split for split, names in SPLIT_NAMES.items() for name in names}


_WAYS = ("to_dicts", "to_pylist")  # polars' and pyarrow's methods; a table of pyarrow does not iterate
_MISSING = ("NAType", "NaTType")  # pandas' classes of what is missing


@frozen
class MemoryRow(Row):
    """A row that Python passed; its number counts from 0, as an index does."""

    @property
    def location(self) -> str:
        """ "data[17]", the start of every message about the row."""
        return f"{self.file}[{self.line}]"


def memory_splits(data: Any) -> dict[str, SplitRows]:
    """The splits "train", "valid" and "test" of rows in memory; plain rows are for training.

    Args:
        data: rows, or rows by the name of their split.

    Raises:
        InputError: it is neither, a row is not a dictionary, or there are no training rows.

    >>> memory_splits([{"text": "a"}])["train"][0].location
    'data[0]'
    >>> list(memory_splits({"train": [{"text": "a"}], "validation": [{"text": "b"}]}))
    ['train', 'valid']
    """
    if not isinstance(data, Mapping):
        return {"train": _rows(data, "data")}
    if unknown := [name for name in data if name not in _NAMES]:
        raise InputError(
            f"data: a dictionary has rows by split ({', '.join(_NAMES)}), got {listed(map(str, unknown))}; "
            "pass rows as a list of dictionaries"
        )
    splits: dict[str, SplitRows] = {_NAMES[name]: _rows(rows, f"data[{name!r}]") for name, rows in data.items()}
    if not splits.get("train"):
        raise InputError(f"data: no train split; found {listed(data) or 'nothing'}")
    return splits


def splits_of(data: Any, asked: Mapping[str, str] | None = None) -> dict[str, SplitRows]:
    """The splits of rows in memory, or of what a path or a hub name names; see `read_splits`.

    Raises:
        InputError: there are no such rows, or they are broken.
    """
    if is_path(data):
        return read_splits(str(data), asked)
    if asked:
        raise InputError(f"--{next(iter(asked))}-split is for hub data sets; leave it out")
    return memory_splits(data)


def _rows(data: Any, name: str) -> list[Row]:
    return [_row(fields, name, number) for number, fields in enumerate(_records(data, name))]


def _records(data: Any, name: str) -> Iterable[Any]:
    """The rows of a container; frames and tables have methods of their own for that."""
    text = isinstance(data, str | bytes)
    if text or not hasattr(data, "__len__") or not any(hasattr(data, way) for way in ("__iter__", *_WAYS)):
        rows = "a list of dictionaries, a data set, a frame, or where such rows are"
        once = "; list(...) keeps what can be read once only" if hasattr(data, "__iter__") and not text else ""
        remedy = "; .collect() makes a frame of it" if hasattr(data, "collect") else once
        raise InputError(f"{name} must be rows: {rows}, got {described(data)}{remedy}")
    if not len(data):
        raise InputError(f"{name} has no rows; pass at least one")
    if way := next((way for way in _WAYS if hasattr(data, way)), None):
        return getattr(data, way)()
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas
        return data.to_dict(orient="records")
    return data


def _row(fields: Any, name: str, number: int) -> Row:
    if not isinstance(fields, Mapping):
        text = "; write {'text': ...} for plain text" if isinstance(fields, str) else ""
        raise InputError(f"{name}[{number}]: a row must be a dictionary, got {described(fields)}{text}")
    return MemoryRow(without_filler({str(key): _plain(value) for key, value in fields.items()}), name, number)


def _plain(value: Any) -> Any:
    """A value as JSON has it: lists for arrays and tuples, None for what a frame marks as missing."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if type(value).__name__ in _MISSING or (isinstance(value, float) and value != value) else value


def stored_rows(splits: Mapping[str, Sequence[Row]]) -> str:
    """The text that stands for rows in memory in the files of a run; other rows have another one.

    >>> stored_rows({"train": [Row({"text": "a"}, "data", 0)]})  # doctest: +ELLIPSIS
    '1 rows (given in Python, ...)'
    """
    digest, count = hashlib.sha256(), 0
    for name, rows in splits.items():
        digest.update(name.encode())
        for row in rows:
            digest.update(orjson.dumps(row.fields, default=repr, option=orjson.OPT_SORT_KEYS))
            count += 1
    return f"{count} rows {GIVEN}, {digest.hexdigest()[:12]})"
