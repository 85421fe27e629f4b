"""Choosing by name."""

from collections.abc import Mapping
from typing import TypeVar

from .errors import InputError, quoted

Entry = TypeVar("Entry")


def choose(table: Mapping[str, Entry], name: str, option: str) -> Entry:
    """The entry of a table of names.

    >>> choose({"token": 1, "sequence": 2}, "tokens", "importance-level")
    Traceback (most recent call last):
    mlxlora.errors.InputError: --importance-level must be one of token, sequence, got 'tokens'

    Raises:
        InputError: no such name; the message lists the accepted ones.
    """
    if name not in table:
        raise InputError(f"--{option} must be one of {', '.join(table)}, got {quoted(name)}")
    return table[name]
