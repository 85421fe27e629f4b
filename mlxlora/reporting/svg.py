"""Draws curves as SVG elements of a page, in the page's colors, so that they follow light and dark mode.

By hand, because matplotlib is optional, its SVG brings its own colors, and a page of 30 charts would take seconds.
"""

import math
from collections.abc import Iterator, Sequence
from html import escape

from attrs import frozen

from ..utils.integers import ceil_div
from .history import compact

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 230, 52, 12, 42, 28
MOST = 400  # points of a line; more are averaged in groups of neighbors

Point = tuple[float, float]


@frozen
class Line:
    """A curve: its name, its points in the order of x, and the index of its color in the page."""

    name: str
    points: Sequence[Point]
    color: int = 0


def chart(title: str, lines: Sequence[Line]) -> str:
    """Draws curves over their steps as an SVG element, with the last value of each beside its name.

    Returns:
        The element; empty if no point is finite.
    """
    drawn = [Line(line.name, thinned([p for p in line.points if math.isfinite(p[1])]), line.color) for line in lines]
    points = [point for line in drawn for point in line.points]
    if not points:
        return ""
    across = _Scale.of([x for x, _ in points], LEFT, WIDTH - RIGHT)
    up = _Scale.of([y for _, y in points], HEIGHT - BOTTOM, TOP + 6)
    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>', *_legend(lines)]
    parts += [*_grid(up), *_step_labels(across)]
    parts += [part for line in drawn for part in _curve(line, across, up)]
    return "\n".join([f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">', *parts, "</svg>"])


@frozen
class _Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end`; `ticks` are the round values between."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> "_Scale":
        low, high = min(values), max(values)
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        return cls(low, high, start, end, ticks(low, high))

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


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


def _legend(lines: Sequence[Line]) -> Iterator[str]:
    """Names with a mark in the color of their line and the last value, as many as fit."""
    x = float(LEFT)
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
        yield f'<text class="tick" x="{across(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{compact(tick)}</text>'


def _curve(line: Line, across: _Scale, up: _Scale) -> Iterator[str]:
    """The line and its points: visible if they are few. Hovering over a point shows its value."""
    places = [(across(x), up(y)) for x, y in line.points]
    if len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline class="line line{line.color}" points="{path}"/>'
    radius = 2.5 if len(places) <= 40 else 4
    seen = "" if len(places) <= 40 else " hidden"
    for (x, y), (step, value) in zip(places, line.points, strict=True):
        label = escape(f"{line.name}, step {step:,.0f}: {value:.6g}")
        yield f'<circle class="fill{line.color}{seen}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{label}</title></circle>'
