"""Strings that know where each of their characters comes from.

A chat template cuts, trims and joins the fields of messages. `Traced` is a `str` whose methods carry the origin of every
character along, so that the rendered text says which message wrote which characters.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from operator import index
from types import BuiltinMethodType
from typing import Any, NamedTuple, SupportsIndex

SEVERAL = -1
"""The message of characters that come from several messages and cannot be told apart."""


class Origin(NamedTuple):
    """Where characters come from.

    Attributes:
        message: the index of the message that holds them; None: the template's own text.
        field: the message's key, such as "content"; None for the template's own text.
        turn: the message that the template was writing; None: none.
        marked: whether they stand between `{% generation %}` marks.
    """

    message: int | None = None
    field: str | None = None
    turn: int | None = None
    marked: bool = False


Runs = tuple[tuple[int, Origin], ...]
"""Lengths in characters with their origins, in order."""


class Writing(threading.local):
    """What a template is doing in this thread.

    Attributes:
        turn: the message that it writes; None: none.
        lost: whether an operation lost the origins of a message's characters.
        printed: whether it printed an object in Python's notation.
        loops: of each loop it is in, what it wrote before, and whether the loop is over messages.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A template begins."""
        self.turn: int | None = None
        self.lost = self.printed = False
        self.loops: list[tuple[int | None, bool]] = []


writing = Writing()


@lru_cache(maxsize=4096)
def _origin(message: int | None, field: str | None, turn: int | None, marked: bool) -> Origin:
    return Origin(message, field, turn, marked)


def runs_of(text: str) -> Runs:
    """The origins of a text; a plain one is what the template writes now."""
    if isinstance(text, Traced):
        return text.runs
    return ((len(text), _origin(None, None, writing.turn, False)),) if text else ()


def _merged(runs: Iterable[tuple[int, Origin]]) -> Runs:
    out: list[tuple[int, Origin]] = []
    for length, origin in runs:
        if length and out and out[-1][1] == origin:
            out[-1] = (out[-1][0] + length, origin)
        elif length:
            out.append((length, origin))
    return tuple(out)


def _cut(runs: Runs, start: int, stop: int) -> Runs:
    out, at = [], 0
    for length, origin in runs:
        inside = min(stop, at + length) - max(start, at)
        if inside > 0:
            out.append((inside, origin))
        at += length
        if at >= stop:
            break
    return tuple(out)


class Traced(str):
    """A string with the origin of each character; every method of `str` keeps it as exactly as it can.

    >>> text = Traced("Hi", ((2, Origin(0, "content")),)) + "!"
    >>> [(length, origin.message) for length, origin in text.runs]
    [(2, 0), (1, None)]
    """

    __slots__ = ("runs",)
    runs: Runs

    def __new__(cls, value: str = "", runs: Runs | None = None) -> "Traced":
        self = super().__new__(cls, value)
        self.runs = runs_of(value) if runs is None else runs
        return self

    def _part(self, start: int, stop: int) -> "Traced":
        return Traced(str.__getitem__(self, slice(start, stop)), _cut(self.runs, start, stop))

    def _parts(self, texts: Iterable[str], gap: int | None) -> "list[Traced]":
        """The parts of a split, `gap` characters apart; None: apart by white space."""
        out, at = [], 0
        for text in texts:
            at = str.find(self, text, at) if gap is None else at
            out.append(self._part(at, at + len(text)))
            at += len(text) + (gap or 0)
        return out

    def __str__(self) -> str:  # str(self) keeps the origins too
        return self

    def __add__(self, other: str) -> "Traced":
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "Traced":
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> "Traced":
        if not isinstance(key, slice):
            at = range(len(self))[index(key)]
            return self._part(at, at + 1)
        start, stop, step = key.indices(len(self))
        return self._part(start, max(start, stop)) if step == 1 else joined(self[i] for i in range(start, stop, step))

    def __iter__(self) -> Iterator["Traced"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (self._part(i, i + 1) for i in range(len(self)))

    def strip(self, chars: str | None = None, /) -> "Traced":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "Traced":
        return self._part(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> "Traced":
        return self._part(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> "Traced":
        return self._part(len(prefix) if self.startswith(prefix) else 0, len(self))

    def removesuffix(self, suffix: str, /) -> "Traced":
        return self._part(0, len(self) - (len(suffix) if self.endswith(suffix) else 0))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> "list[Traced]":  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._parts(str.split(self, sep, maxsplit), None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> "list[Traced]":  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._parts(str.rsplit(self, sep, maxsplit), None if sep is None else len(sep))

    def splitlines(self, keepends: bool = False) -> "list[Traced]":  # pyright: ignore[reportIncompatibleMethodOverride]
        lines = self._parts(str.splitlines(self, True), 0)
        return lines if keepends else [line._part(0, len(str.splitlines(line)[0])) for line in lines]

    def partition(self, sep: str, /) -> "tuple[Traced, Traced, Traced]":
        first, second, third = self._parts(str.partition(self, sep), 0)
        return first, second, third

    def rpartition(self, sep: str, /) -> "tuple[Traced, Traced, Traced]":
        first, second, third = self._parts(str.rpartition(self, sep), 0)
        return first, second, third

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> "Traced":
        if not old:
            return Traced(blended(str.replace(self, old, new, count), (self, new)))
        return joined(_between(new, self.split(old, count)))

    def join(self, texts: Iterable[str], /) -> "Traced":
        return joined(_between(self, list(texts)))


def _between(separator: str, texts: Sequence[str]) -> Iterator[str]:
    for i, text in enumerate(texts):
        if i:
            yield separator
        yield text


def joined(texts: Iterable[str]) -> Traced:
    """The texts behind one another."""
    parts = list(texts)
    return Traced("".join(parts), _merged(run for part in parts for run in runs_of(part)))


def blended(text: str, sources: Any) -> str:
    """A text that some operation made of traced ones: it belongs to their message as a whole, or to several.

    Args:
        text: plain.
        sources: strings, and lists and dicts of them; the text stays plain if none is traced.
    """
    origins = {(origin.message, origin.field) for origin in _origins(sources) if origin.message is not None}
    if not origins:
        return text
    messages = {message for message, _ in origins}
    message, field = next(iter(origins)) if len(messages) == 1 else (SEVERAL, None)
    return Traced(text, ((len(text), _origin(message, field, writing.turn, False)),) if text else ())


def _origins(value: Any) -> Iterator[Origin]:
    if isinstance(value, Traced):
        yield from (origin for _, origin in value.runs)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _origins(key)
            yield from _origins(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _origins(item)


def marked(text: str) -> Traced:
    """The text, between `{% generation %}` marks."""
    return Traced(text, tuple((length, _origin(*origin[:3], True)) for length, origin in runs_of(text)))


def written(text: str) -> Runs:
    """The origins of a text that is printed now, each with the message that the template writes."""
    turn = writing.turn
    return tuple(
        (length, origin if origin.turn is not None or turn is None else _origin(origin.message, origin.field, turn, origin.marked))
        for length, origin in runs_of(text)
    )


def traced_value(value: Any, message: int, field: str) -> Any:
    """A message's field with every string in it traced; objects note when they are printed in Python's notation."""
    if isinstance(value, str):
        return Traced(value, ((len(value), _origin(message, field, None, False)),) if value else ())
    if isinstance(value, dict):
        return TracedObject({traced_value(key, message, field): traced_value(item, message, field) for key, item in value.items()})
    return [traced_value(item, message, field) for item in value] if isinstance(value, list) else value


class TracedObject(dict):
    """An object in a message."""

    def __repr__(self) -> str:
        writing.printed = True
        return super().__repr__()


class TracedMessage(dict):
    """A message; printed as a whole, in Python's notation, its words have no origins."""

    def __repr__(self) -> str:
        writing.lost = True
        return super().__repr__()


def message_of(value: Any) -> int | None:
    """Which message an object of a template is; None: none."""
    role = value.get("role") if isinstance(value, dict) else None
    return role.runs[0][1].message if isinstance(role, Traced) and role.runs else None


def traceable(method: Any) -> Any:
    """A method of a plain string as that of a traced one, which keeps the origins of its arguments."""
    if isinstance(method, BuiltinMethodType) and type(method.__self__) is str:
        return getattr(Traced(method.__self__), method.__name__)
    return method


def _same_length(name: str) -> Any:
    plain = getattr(str, name)

    def method(self: Traced) -> str:
        text = plain(self)
        return Traced(text, self.runs) if len(text) == len(self) else blended(text, self)

    method.__doc__ = plain.__doc__
    return method


def _as_a_whole(name: str) -> Any:
    plain = getattr(str, name)

    def method(self: Traced, *args: Any, **kwargs: Any) -> Any:
        text = plain(self, *args, **kwargs)
        return blended(text, (self, args, kwargs)) if isinstance(text, str) else text

    method.__doc__ = plain.__doc__
    return method


for _name in ("upper", "lower", "title", "capitalize", "casefold", "swapcase"):
    setattr(Traced, _name, _same_length(_name))
for _name in ("__mul__", "__rmul__", "__mod__", "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format_map"):
    setattr(Traced, _name, _as_a_whole(_name))
