"""Formats numbers and text: short."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

from .reporter import Values

_Kind = TypeVar("_Kind")
_BLOCKS = "▁▂▃▄▅▆▇█"


_FORMATS = {
    "loss": "{:.4f}",
    "grad_norm": "{:.3f}",
    "learning_rate": "{:.2e}",
    "tokens": "{:,}",
    "tokens_per_second": "{:,.0f}",
    "training_tokens_per_second": "{:,.0f}",
    "rollout_tokens_per_second": "{:,.0f}",
    "peak_memory_gb": "{:.2f}",
}


def leading_metric(record: Values) -> str:
    """The metric to watch: the reward if there is one, because the loss of a sampled run stays near 0; else the loss."""
    return "reward" if "reward" in record else "loss"


def metric_text(name: str, value: Any) -> str:
    """Formats the value of a metric.

    >>> metric_text("learning_rate", 1e-5), metric_text("accuracy", 0.51), metric_text("tokens", 12345)
    ('1.00e-05', '0.5100', '12,345')
    """
    if isinstance(value, str) or value is None:
        return str(value)
    if name in _FORMATS:
        text = _FORMATS[name].format(value)
        return text if text.strip("-0.,") else text.lstrip("-")  # a loss of -1e-9 is 0.0000
    return f"{value:#.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def amount(number: float) -> str:
    """A large number in three digits.

    >>> amount(512), amount(596_049_920), amount(1_230_000_000)
    ('512', '596M', '1.23B')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Formats seconds as hours, minutes and seconds.

    >>> duration(65), duration(3661)
    ('1:05', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float]) -> str:
    """Draws values as bars between their minimum and maximum, with a gap for one that is not finite.

    >>> sparkline([1, 2, 3, 8])
    '▁▂▃█'
    """
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return " " * len(values)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(_BLOCKS[round((v - low) / span * (len(_BLOCKS) - 1))] if abs(v) < float("inf") else " " for v in values)


def trend(values: Sequence[float]) -> str:
    """Whether the last value is below (-), above (+) or at (=) the one before.

    >>> trend([3.0, 2.0])
    '-'
    """
    if len(values) < 2 or values[-1] == values[-2]:
        return "="
    return "-" if values[-1] < values[-2] else "+"


def runs_of_text(tokens: Sequence[int], kinds: Sequence[_Kind], decode: Callable[[Sequence[int]], str]) -> list[tuple[str, _Kind]]:
    """Decodes runs of neighboring tokens of one kind, as parts of the whole text: alone, a run may lose its leading space."""
    parts, end, before = [], 0, ""
    for kind, run in groupby(kinds):
        end += len(list(run))
        whole = decode(tokens[:end])
        parts.append((whole[len(before) :], kind))
        before = whole
    return parts


def shorten(text: str, limit: int) -> str:
    """Cuts the middle out of a long text.

    >>> shorten("abcdefghijklmnopqrstuvwxyz", 10)
    'abcde ... [16 characters] ... vwxyz'
    """
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... [{len(text) - 2 * half} characters] ... {text[-half:]}"
