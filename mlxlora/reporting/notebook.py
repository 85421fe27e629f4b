"""Runs in notebooks: a page for a finished run, and a picture that changes while it trains. Needs IPython only where it is."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from .history import SPLITS, Record, curves
from .html import PageParts, run_page
from .reporter import Reporter, Values
from .svg import Line, chart
from .text import leading_metric, metric_text

_HEIGHT = 560  # pixels of a page in a notebook
_STYLE = (
    "svg{font:11px system-ui,sans-serif;fill:currentColor;max-width:440px}svg .title{font-size:13px;font-weight:600}"
    "svg .grid{stroke:#8884}svg .line{fill:none;stroke-width:1.8}svg .hidden{fill-opacity:0}"
    "svg .line0{stroke:#1f6fb5}svg .fill0{fill:#1f6fb5}svg .line1{stroke:#d0661b}svg .fill1{fill:#d0661b}"
    "svg .line2{stroke:#2d8a57}svg .fill2{fill:#2d8a57}"
)


def framed(record: Record, summary: Values) -> str:
    """The page of a run as an element that keeps its style to itself."""
    page = run_page(record, more=PageParts(summary))
    return f'<iframe srcdoc="{escape(page)}" style="width:100%;height:{_HEIGHT}px;border:0"></iframe>'


def in_notebook() -> bool:
    """Whether IPython shows output as a notebook does; a terminal of IPython does not.

    >>> in_notebook()
    False
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and type(shell).__name__ != "TerminalInteractiveShell" and hasattr(shell, "kernel")


class Live(Reporter):
    """A picture that changes while a run trains: a bar, the last figures, the curves of loss and reward.

    Args:
        show: (HTML, whether it replaces the last one); default: IPython's display.
    """

    def __init__(self, show: Any = None) -> None:
        self._show = show or partial(_display, f"mlxlora-{id(self)}")
        self._records: list[Values] = []
        self._step, self._total, self._shown = 0, 0, False

    def progress(self, step: int, total: int) -> None:
        self._step, self._total = step, total

    def record(self, row: Values) -> None:
        self._records.append(row)
        self._draw()

    def finish(self, summary: Values) -> None:
        if self._records:
            self._draw()

    def _draw(self) -> None:
        self._show(live_html(self._records, self._step, self._total), self._shown)
        self._shown = True


def live_html(records: Sequence[Values], step: int, total: int) -> str:
    """The picture: a bar for the steps, the last record of each split, the curves."""
    latest: Mapping[str, Values] = {str(row["split"]): row for row in records}
    bar = f'<progress max="{max(total, 1)}" value="{step}" style="width:240px"></progress> step {step:,} of {total:,}'
    figures = " · ".join(escape(_figure(split, row)) for split, row in latest.items())
    drawn = {name: splits for name, splits in curves(records).items() if name in ("loss", "reward")}
    pictures = [chart(name, [Line(s, splits[s], i) for i, s in enumerate(SPLITS) if s in splits]) for name, splits in drawn.items()]
    return f"<div><style scoped>{_STYLE}</style>{bar}<br>{figures}<br>{''.join(pictures)}</div>"


def _figure(split: str, row: Values) -> str:
    name = leading_metric(row)
    return f"{split} {name} {metric_text(name, row[name])}"


def _display(name: str, html: str, again: bool) -> None:
    from IPython.display import HTML, display, update_display  # pyright: ignore[reportMissingImports]

    (update_display if again else display)(HTML(html), display_id=name)
