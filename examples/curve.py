"""Draw a metric of some runs over their steps as an SVG: one line a run, the mean in bold.

python examples/curve.py reward reward.svg RUN...        # folders with metrics.jsonl
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 260, 48, 34


def read(run: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of the training reports that have the metric."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["step"], row[metric]) for row in rows if row["split"] == "train" and metric in row]


def line(points: Sequence[tuple[int, float]], last: int, top: float, style: str) -> str:
    """A polyline in the coordinates of the picture."""
    x = [LEFT + step / last * (WIDTH - LEFT - 12) for step, _ in points]
    y = [HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - 14) for _, value in points]
    return f'<polyline fill="none" {style} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))}"/>'


def draw(metric: str, runs: Sequence[Path]) -> str:
    """The whole picture; the runs report at the same steps."""
    curves = [read(run, metric) for run in runs]
    steps = [step for step, _ in curves[0]]
    mean = [(step, sum(c[i][1] for c in curves) / len(curves)) for i, step in enumerate(steps)]
    last, top = steps[-1], max(1.0, *(value for curve in curves for _, value in curve))
    parts = [line(curve, last, top, 'stroke="#9db8d9" stroke-width="1.2"') for curve in curves]
    parts.append(line(mean, last, top, 'stroke="#1f5fa8" stroke-width="2.4"'))
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - 14)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * top:.2f}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 10}">step 0</text>')
    parts.append(f'<text x="{WIDTH - 12}" y="{HEIGHT - 10}" text-anchor="end">step {last}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{metric}, {len(runs)} seeds and their mean</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>"]) + "\n"


def main() -> None:
    if len(sys.argv) < 4:
        sys.exit((__doc__ or "").strip())
    metric, out, *runs = sys.argv[1:]
    Path(out).write_text(draw(metric, [Path(run) for run in runs]), encoding="utf-8")


if __name__ == "__main__":
    main()
