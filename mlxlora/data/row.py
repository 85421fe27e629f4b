"""A row of a data set, and how the bytes of a line become one."""

from typing import Any

import orjson
from attrs import frozen

from ..errors import InputError, described

ONE_PER_LINE = "write one JSON object per line"
"""The remedy for a broken line of JSONL."""


@frozen
class Row:
    """One JSON object with its file and line; lines count from 1."""

    fields: dict[str, Any]
    file: str
    line: int

    @property
    def location(self) -> str:
        """ "file:line", the start of every message about the row."""
        return f"{self.file}:{self.line}"


def as_row(value: Any, file: str, line: int) -> Row:
    """The row of a JSON value.

    Raises:
        InputError: it is no object.
    """
    if not isinstance(value, dict):
        raise InputError(f"{file}:{line}: a row must be a JSON object, got {described(value)}")
    return Row(value, file, line)


def parse_json(content: bytes, file: str, line: int, remedy: str = ONE_PER_LINE) -> Any:
    """The JSON value that bytes hold, after a byte order mark.

    Raises:
        InputError: they are not JSON, which has no NaN, or not UTF-8.
    """
    try:
        return orjson.loads(content.removeprefix(b"\xef\xbb\xbf").strip())
    except orjson.JSONDecodeError as error:
        start = content[:60].decode("utf-8", "replace").strip()
        fault = "not UTF-8" if "UTF-8" in error.msg else f"not JSON ({error.msg}, column {error.colno})"
        raise InputError(f"{file}:{line}: {fault}: {start!r}; {remedy}") from None
