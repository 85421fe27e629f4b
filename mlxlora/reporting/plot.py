"""metrics.png: every metric of a run in one picture, drawn by matplotlib (optional)."""

from pathlib import Path

from ..utils.files import atomic_file
from ..utils.integers import ceil_div
from .history import PICTURE, SPLITS, Record, read_record
from .reporter import Reporter, Values

_ACROSS = 3


class Plot(Reporter):
    """Draws metrics.png into the folder of a run when it ends or is interrupted."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def finish(self, summary: Values) -> None:
        plot(read_record(self.directory), self.directory / PICTURE)


def plot(record: Record, file: Path) -> None:
    """Draws a panel per metric with a line per split; writes nothing if there are no metrics."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    curves = record.curves()
    if not curves:
        return
    down = ceil_div(len(curves), _ACROSS)
    figure = Figure(figsize=(4.6 * _ACROSS, 2.8 * down), layout="constrained")
    panels = figure.subplots(down, _ACROSS, squeeze=False).flat
    for (name, splits), panel in zip(curves.items(), panels, strict=False):
        for i, split in ((i, split) for i, split in enumerate(SPLITS) if split in splits):
            steps, values = zip(*splits[split], strict=True)
            panel.plot(steps, values, marker="." if len(steps) <= 40 else "", color=f"C{i}", label=split)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("step", fontsize=8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for panel in list(panels):
        panel.set_axis_off()
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
