"""Draws curves as SVG elements of a page, in the page's colors, so that they follow light and dark mode.

By hand, because matplotlib is optional, its SVG brings its own colors, and a page of 30 charts would take seconds.
"""

import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

from attrs import evolve, frozen

from ..utils.integers import ceil_div
from .history import compact

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 240, 56, 14, 42, 38
MOST = 400  # points of a line; more are averaged in groups of neighbors
_FEW = 30  # points of a line that is not smoothed
_LINEAR = ("learning_rate", "tokens", "num_tokens")  # metrics that are never on a logarithmic axis
_FACTORS = 50.0  # between the lowest and the highest value of a logarithmic axis

Point = tuple[float, float]


@frozen
class Line:
    """A curve: its name, its points in the order of x, the index of its color in the page, whether points alone are drawn."""

    name: str
    points: Sequence[Point]
    color: int = 0
    dotted: bool = False


def chart(title: str, lines: Sequence[Line], metric: str = "") -> str:
    """Draws curves over their steps as an SVG element, with the last value of each beside its name.

    A noisy line is smoothed, with its points faint behind it. Where the values before the first step would squeeze all others,
    they stand at the edge; where values differ by factors, the axis is logarithmic.

    Args:
        title: in words.
        lines: the curves.
        metric: its name in metrics.jsonl.

    Returns:
        The element; empty if no point is finite.
    """
    drawn = [evolve(line, points=thinned([p for p in line.points if math.isfinite(p[1])])) for line in lines]
    points = [point for line in drawn for point in line.points]
    if not points:
        return ""
    low, high, log = bounds(points)
    log = log and not any(name in _LINEAR for name in metric.split())  # it may follow its split
    across = _Scale.of([x for x, _ in points], LEFT, WIDTH - RIGHT)
    up = _Scale.of([low, high], HEIGHT - BOTTOM, TOP + 6, log=log)
    label = f'aria-label="{escape(title)}" data-metric="{escape(metric or title)}"'
    parts = [f'<text class="title" x="8" y="16">{escape(title)}</text>', *_legend(lines, log), *_grid(up), *_step_labels(across)]
    parts += [part for line in drawn for part in _curve(line, across, up)]
    return "\n".join([f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" {label}>', *parts, "</svg>"])


def bounds(points: Sequence[Point]) -> tuple[float, float, bool]:
    """The lowest and highest value of the axis, and whether it is logarithmic.

    >>> bounds([(0, 9.0), (1, 2.0), (2, 1.0), (3, 1.5)]), bounds([(1, 1000.0), (2, 10.0), (3, 1.0)])
    ((1.0, 2.0, False), (1.0, 1000.0, True))
    """
    values = [value for _, value in points]
    later = [value for step, value in points if step > 0]
    low, high = min(values), max(values)
    if len(later) > 2 and 0 < max(later) - min(later) < (high - low) / 3:
        low, high = min(later), max(later)
    return low, high, low > 0 and high / low >= _FACTORS


def smoothed(points: Sequence[Point]) -> list[Point]:
    """An average over neighbors on both sides, so that it does not lag; a value counts half as much a thirtieth further.

    >>> smoothed([(1, 2.0), (2, 2.0)])
    [(1, 2.0), (2, 2.0)]
    """
    keep = 0.5 ** (30 / max(len(points), 30))
    values = [value for _, value in points]
    sides = zip(_forgetting(values, keep), reversed(_forgetting(values[::-1], keep)), strict=True)
    found = [((a + c - (1 - keep) * v) / (b + d - (1 - keep))) for ((a, b), (c, d)), v in zip(sides, values, strict=True)]
    return [(step, value) for (step, _), value in zip(points, found, strict=True)]


def _forgetting(values: Sequence[float], keep: float) -> list[tuple[float, float]]:
    """The weighted sum up to each value, and its weight."""
    total, weight, found = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        found.append((total, weight))
    return found


def is_noisy(points: Sequence[Point]) -> bool:
    """Whether a curve goes up and down so much that its course is hard to see.

    >>> is_noisy([(i, i % 2) for i in range(40)]), is_noisy([(i, float(i)) for i in range(40)])
    (True, False)
    """
    values = [value for _, value in points]
    ways = sum(abs(b - a) for a, b in pairwise(values))
    return len(values) > _FEW and ways > 1.5 * (max(values) - min(values))


@frozen
class _Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end`; `ticks` are the round values between."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, log: bool = False) -> "_Scale":
        low, high = min(values), max(values)
        if log:
            powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
            return cls(low, high, start, end, tuple(10.0**power for power in powers[:: ceil_div(len(powers), 6) or 1]), True)
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        return cls(low, high, start, end, ticks(low, high))

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(x) for x in (self.low, self.high, max(value, self.low))) if self.log else (self.low, self.high, value)
        )
        return self.start + min(max((at - low) / (high - low), 0.0), 1.0) * (self.end - self.start)


def ticks(low: float, high: float, most: int = 5) -> tuple[float, ...]:
    """At most `most` round values within a range: multiples of 1, 2 or 5 times a power of ten.

    >>> ticks(0.13, 2.4)
    (0.5, 1.0, 1.5, 2.0)
    """
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return tuple(float(f"{i * step:.15g}") for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """Reduces points to at most `most`: the means of groups of neighbors.

    >>> thinned([(1, 2.0), (2, 4.0), (3, 6.0), (4, 8.0)], 2)
    [(1.5, 3.0), (3.5, 7.0)]
    """
    size = ceil_div(len(points), most) or 1
    if size == 1:
        return list(points)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _legend(lines: Sequence[Line], log: bool) -> Iterator[str]:
    """Names with a mark in the color of their line and the last value, as many as fit."""
    x = 8.0
    if log:
        yield f'<text class="tick" x="{WIDTH - RIGHT}" y="16" text-anchor="end">log axis</text>'
    for line in (line for line in lines if line.points):
        name = line.name if len(line.name) <= 24 else f"…{line.name[-23:]}"
        text = f"{name} {compact(line.points[-1][1])}"
        width = 16 + 6.2 * len(text)
        if x + width > WIDTH:
            break
        yield f'<rect class="fill{line.color}" x="{x:.0f}" y="26" width="8" height="8" rx="2"/>'
        yield f'<text x="{x + 12:.0f}" y="34">{escape(text)}</text>'
        x += width + 6


def _grid(up: _Scale) -> Iterator[str]:
    for tick in up.ticks:
        y = up(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{compact(tick)}</text>'


def _step_labels(across: _Scale) -> Iterator[str]:
    for tick in (t for t in across.ticks if t == int(t)):
        yield f'<text class="tick" x="{across(tick):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{compact(tick)}</text>'
    yield f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 7}" text-anchor="middle">step</text>'


def _curve(line: Line, across: _Scale, up: _Scale) -> Iterator[str]:
    """The line and its points; a page's script finds the points by their titles, so hovering shows their values."""
    raw = [(across(x), up(y)) for x, y in line.points]
    many = len(raw) > _FEW and not line.dotted
    if len(raw) > 1:
        noisy = many and is_noisy(line.points)
        if noisy:
            yield _path(raw, f"line raw line{line.color}")
        path = [(across(x), up(y)) for x, y in smoothed(line.points)] if noisy else raw
        yield _path(path, f"line{' dotted' if line.dotted else ''} line{line.color}")
    for (x, y), (step, value) in zip(raw, line.points, strict=True):
        name = escape(f"{line.name}, step {step:,.0f}: {value:.6g}")
        outside = " outside" if not up.low <= value <= up.high else ""
        yield (
            f'<circle class="fill{line.color}{" hidden" if many else ""}{outside}" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="{3.5 if line.dotted else 2.5}"><title>{name}</title></circle>'
        )


def _path(places: Sequence[Point], kind: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="{kind}" points="{points}"/>'
