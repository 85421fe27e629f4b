"""What a user sees instead of a traceback: one line that says what is wrong, where, the value and the remedy."""

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxdict = 3, 20, 20, 20
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 100
_LONGER = reprlib.Repr()
_LONGER.maxlevel, _LONGER.maxlist, _LONGER.maxtuple, _LONGER.maxdict = 12, 60, 60, 60
_LONGER.maxstring = _LONGER.maxother = _LONGER.maxlong = 200


_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Escapes what a terminal would obey: control characters, changes of direction, halves of characters; keeps tabs and line ends.

    >>> printable("a" + chr(27) + "[31m")
    'a\\\\x1b[31m'
    """
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class _Shown(Exception):
    """An error whose message has names from outside, which a terminal must not obey."""

    def __str__(self) -> str:
        return printable(super().__str__())


class InputError(_Shown, ValueError):
    """Bad usage or bad data (exit code 2): the message names the file and line, the value and the remedy."""


class RunError(_Shown, RuntimeError):
    """A run that could not go on through no fault of its input (exit code 1), such as a non-finite loss."""


class SharedError(RunError):
    """A failure that every rank of a distributed run meets, so that only rank 0 says it."""


class LostError(SharedError):
    """Another rank is gone, so nothing can be done together any more."""


def quoted(value: Any) -> str:
    """A value for a message: on one line, and brief however long it is or how often it contains itself.

    >>> quoted("a\\nb"), len(quoted("x" * 10**6)), len(quoted([[[["x"] * 10**3] * 10**3] * 10**3] * 10**3)) < 300
    ("'a\\\\nb'", 100, True)
    """
    text = _BRIEF.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def described(value: Any) -> str:
    """A value's type and beginning, on one line, for a message about its type.

    >>> described(3)
    'int 3'
    """
    text = " ".join(_LONGER.repr(value).split())  # repr fails for deep values, and takes long for large ones
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def listed(names: Iterable[str], shown: int = 12, separator: str = ", ") -> str:
    """Names that came with data, for a message: on one line, each brief, those past `shown` as a number.

    >>> listed(["prompt", "a\\nb"]), listed(map(str, range(99)), shown=2)
    ('prompt, a b', '0, 1 and 97 more')
    """
    every = list(names)
    return separator.join(map(plain, every[:shown])) + (f" and {len(every) - shown} more" if len(every) > shown else "")


def plain(value: Any) -> str:
    """A value for a message as `quoted` has it, but text without quotes.

    >>> plain("a\\nb"), plain(["a"])
    ('a b', "['a']")
    """
    text = " ".join(value.split()) if isinstance(value, str) else quoted(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def reason(error: BaseException, limit: int = 200) -> str:
    """The message of an error on one line of at most `limit` characters; its type if it has no message.

    >>> reason(ValueError("a\\nb")), reason(KeyError())
    ('a b', 'KeyError')
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


def one_line(error: BaseException, limit: int = 300) -> str:
    """Type and message of an error on one line.

    >>> one_line(ValueError("a\\nb")), one_line(KeyError())
    ('ValueError: a b', 'KeyError')
    """
    name, text = type(error).__name__, reason(error, limit)
    return name if text == name else f"{name}: {text}"


_Entry = TypeVar("_Entry")


def choose(table: Mapping[str, _Entry], name: str, option: str) -> _Entry:
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
