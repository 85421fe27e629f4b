"""Which way rows attend: as asked for, or as measured, by the shape of a layer and the length of its rows."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import mlx.core as mx

from ..utils.context import assigned

MEASURED_FROM = 512  # positions: below, no choice matters

AttentionTable = Mapping[str, Mapping[str, str]]
"""By name of a shape, by length (a power of two): "fused", or "chunked 256" with the queries of a chunk."""

_CHOICE: ContextVar[str] = ContextVar("attention", default="auto")
_MEASURED: ContextVar[AttentionTable | None] = ContextVar("measured attention", default=None)
SHAPES: ContextVar["set[AttentionShape] | None"] = ContextVar("shapes of attention", default=None)
"""Gets the shapes of rows that attend while it is set. All three are read below mlx-lm's functions, whose signatures are fixed."""


class AttentionShape(NamedTuple):
    """What decides, beside the length, which way of attending is faster."""

    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: mx.Dtype
    window: int | None = None
    packed: bool = False
    sinks: bool = False

    @property
    def name(self) -> str:
        """For messages, files and checkpoints."""
        widths = f"{self.width}" if self.width == self.value_width else f"{self.width} and {self.value_width}"
        dtype = str(self.dtype).removeprefix("mlx.core.")
        heads = f"attention of {self.heads} heads ({self.kv_heads} of keys) of {widths}, {dtype}"
        more = {f", window {self.window}": self.window, ", packed": self.packed, ", sinks": self.sinks}
        return heads + "".join(text for text, holds in more.items() if holds)


@contextmanager
def using(choice: str, measured: AttentionTable | None = None) -> Iterator[None]:
    """How rows attend while the context lasts.

    Args:
        choice: "fused", "chunked" (in chunks of the usual size), "chunked 256", or "auto": as measured, else as constants guess.
        measured: see `attention_choice`.
    """
    with assigned(_CHOICE, choice), assigned(_MEASURED, measured):
        yield


def attention_way(shape: AttentionShape | None, length: int) -> str:
    """How such rows attend, as `using` has it: "auto" where that was neither asked for nor measured.

    Rows longer than all measured ones attend in chunks if the longest of these do; chunks gain with length.
    """
    choice, known = _CHOICE.get(), (_MEASURED.get() or {}).get(shape.name if shape else "")
    if choice != "auto" or not known or rung(length) < MEASURED_FROM:
        return choice
    if found := known.get(str(rung(length))):
        return found
    longest = known[str(max(map(int, known)))]
    return "auto" if longest == "fused" else longest


def measured_size(way: str) -> int | None:
    """Queries of a chunk; None: the usual number.

    >>> measured_size("chunked 256"), measured_size("chunked")
    (256, None)
    """
    size = way.partition(" ")[2]
    return int(size) if size else None


def is_way(value: object) -> bool:
    """Whether a value is an entry of a table."""
    return isinstance(value, str) and re.fullmatch(r"fused|chunked [1-9]\d{0,5}", value) is not None


def rung(length: int) -> int:
    """The power of two next to a length, by ratio.

    >>> rung(1280), rung(1536)
    (1024, 2048)
    """
    return 1 << round(math.log2(length))
