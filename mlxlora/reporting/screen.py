"""Shows a run to a person at a terminal: a header, a table, and a bar below it, none wider than the window."""

import atexit
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from threading import Event, RLock, Thread
from typing import Any

from attrs import define, field
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..errors import printable
from ..utils.console import safe_console
from .columns import GENERAL, Layout, short_number
from .ending import command_lines, outcome_facts
from .history import curves
from .reporter import Values
from .terminal import Terminal, answer_names, telling
from .text import duration, leading_metric, shorten, sparkline
from .wrapped import flat, print_pairs

_BAR = 24  # characters of a bar, at most
_OFTEN = 0.25  # seconds between two drawings of the bar
_SHOWN = 300  # characters of an answer


@define
class _Row:
    """A row of the table that may still get its validation.

    Attributes:
        records: of its step by split.
        samples: to print below it.
    """

    records: dict[str, Values] = field(factory=dict)
    samples: list[Values] = field(factory=list)

    @property
    def step(self) -> int:
        return next((row["step"] for row in self.records.values()), -1)


class Screen(Terminal):
    """Draws a table with a heading, and the newest row and a bar below it.

    The newest row stays open until the next step, so that a validation after this step goes into the same row.

    Args:
        columns: names of `columns.TABLE_COLUMNS`, the most important first.
        quiet: print results and warnings only.
        console: where to print; default: stdout.
        clock: current time in seconds, for the time left.
        evaluated: whether `mlxlora eval` has the loss of the method.
    """

    def __init__(
        self,
        columns: Sequence[str] = GENERAL,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        evaluated: bool = False,
    ) -> None:
        super().__init__(quiet, console or safe_console(), clock, evaluated=evaluated)
        self._columns = columns
        self._layout: Layout | None = None
        self._row, self._above = _Row(), dict[str, float]()
        self._lines = 0  # since the heading
        self._recent: deque[Values] = deque(maxlen=24)  # of training: what the sparkline shows
        self._gigabytes: float | None = None
        self._counted = (0, 0)  # of the stage
        self._live: Live | None = None
        self._ended = Event()  # of the thread that draws the bar again
        self._drawing = RLock()  # a line and the bar each move the cursor by the height of the last bar, so one waits for the other
        self._unicode = self.console.encoding.startswith("utf")

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """Shows a bar, or the seconds so far, until it is over."""
        self._counted = (done, total)
        super().stage(text, done, total)
        if not text and self._began is None:
            self._stop()
        elif not self.quiet:
            self._refresh()

    def overview(self, facts: Values) -> None:
        if not self.quiet:
            self._say("")
            self._print_pairs(facts)
            self._say("")

    def record(self, row: Values) -> None:
        if row["split"] == "train":
            self._recent.append(row)
            self._gigabytes = row.get("peak_memory_gb", self._gigabytes)
        if row["split"] == "valid":
            self._improvement.add(row)
        if self.quiet:
            return
        if row["split"] == "test":
            self._close()
            shown = {name: short_number(value) for name, value in row.items() if name in ("loss", "perplexity", "reward")}
            self._say(f"test  {'  '.join(f'{name} {value}' for name, value in shown.items())}", "bold")
            return
        if self._row.step != row["step"] or row["split"] in self._row.records:
            self._close()
        left = self.seconds_left() if row["split"] == "train" else None
        self._row.records = {**self._row.records, row["split"]: row if left is None else {**row, "seconds left": left}}
        self._refresh()

    def samples(self, step: int, rows: Sequence[Values]) -> None:
        self._row.samples += telling(rows)

    def progress(self, step: int, total: int) -> None:
        super().progress(step, total)
        if not self.quiet:
            if step > self._row.step >= 0:
                self._close()
            self._refresh()

    def note(self, text: str, warning: bool = False) -> None:
        if warning or not self.quiet:
            self._close()
            self._say(f"warning: {text}" if warning else text, "yellow" if warning else "")

    def answers(self, rows: Sequence[Values]) -> None:
        self._stop()
        self._prompt = str(rows[0]["prompt"]) if rows else ""
        for row in rows:
            self._say("")
            self._print_pairs({name: self._shown(row[name]) for name in answer_names(row)}, styles={"after": "bold"})

    def finish(self, summary: Values) -> None:
        """What improved and where things are, then the next commands."""
        self._stop()
        self._say("")
        if "adapters" not in summary:
            self._print_pairs(summary)
            return
        self._print_pairs(self._improvement.facts() | outcome_facts(summary))
        commands = self._next(summary)
        self._say("\nNext:" if commands else "", "bold")
        for command in commands:
            for line in command_lines(command, self.console.width - 2):
                self.console.print(Text(f"  {printable(line)}"), soft_wrap=True)  # the terminal folds: it can be pasted

    # --- the table ----------------------------------------------------------------------------

    def _close(self) -> None:
        """Prints the open row and its samples."""
        row, self._row = self._row, _Row()
        if row.records:
            layout = self._fitting()
            if not self._lines:
                self._print_text(layout.heading())
            line = layout.line(row.records, self._above, self._unicode)
            self._above |= layout.values(row.records)
            self._print_text(line)
            self._lines += 1
        for sample in () if self.quiet else row.samples:
            self._print_sample(sample)
        if self._lines > max(self.console.height - 6, 8):
            self._lines = 0  # the heading left the window

    @property
    def _shown_columns(self) -> list[str]:
        """Without those of validation as long as there is none."""
        return [name for name in self._columns if self._improvement.first or not name.startswith("valid")]

    def _fitting(self) -> Layout:
        """The columns for the width of the window as it is now; a new width gets a new heading."""
        layout = Layout.of(self._shown_columns, self._config, self.console.width)
        if layout != self._layout:
            self._layout, self._lines = layout, 0
        return layout

    def _print_sample(self, sample: Values) -> None:
        """Prompt, answer, reward: on one line if they fit, else below each other."""
        prompt, answer, expected = (self._shown(sample.get(name)) for name in ("prompt", "completion", "expected"))
        reward = "" if sample.get("reward") is None else f"reward {float(sample['reward']):.3g}"
        line = f"    {prompt} {'→' if self._unicode else '->'} {answer}"
        more = "; ".join(part for part in (reward, f"expected {expected}" if expected else "") if part)
        line += f"  ({more})" if more else ""
        if cell_len(line) <= self.console.width:
            self._print_text(Text(line, style="dim"))
            self._lines += 1
            return
        shown = {name: text for name, text in (("prompt", prompt), ("answer", answer), ("expected", expected)) if text}
        shown |= {"reward": reward.removeprefix("reward ")} if reward else {}
        self._print_pairs(shown, indent=4, styles=dict.fromkeys(shown, "dim"))
        self._lines += len(shown)

    def _shown(self, text: Any) -> str:
        return "" if text is None else shorten(flat(str(text), self._newline), _SHOWN)

    @property
    def _newline(self) -> str:
        return "⏎" if self._unicode else "\\n"

    def _say(self, text: str, style: str = "") -> None:
        """Prints a text that wraps between words."""
        with self._drawing:
            self.console.print(Text(printable(text), style=style, overflow="fold"), soft_wrap=False)
        self._lines += bool(self._lines)

    def _print_text(self, line: Text) -> None:
        with self._drawing:
            self.console.print(line, no_wrap=True, overflow="crop", crop=True, soft_wrap=False)

    def _print_pairs(self, pairs: Values, indent: int = 1, styles: Mapping[str, str] = {}) -> None:
        with self._drawing:
            print_pairs(self.console, pairs, indent=indent, styles=styles)

    # --- below the table ----------------------------------------------------------------------

    def _refresh(self) -> None:
        idle = self._began is None and self._stage is None
        if not self.console.is_terminal or self.console.is_dumb_terminal or (idle and self._live is None):
            return
        with self._drawing:
            if self._live is None:
                self._live = Live(console=self.console, transient=True, auto_refresh=False, get_renderable=self._below)
                self._live.start()
                self._ended = Event()
                Thread(target=self._draw_again, args=(self._live, self._ended), daemon=True).start()
                atexit.register(self._stop)  # so that an error does not leave the cursor hidden
            self._live.refresh()

    def _draw_again(self, live: Live, ended: Event) -> None:
        """Keeps the times in the bar up to date."""
        while not ended.wait(_OFTEN):
            with self._drawing:
                if not ended.is_set():
                    live.refresh()

    def _below(self) -> Any:
        """The open row and the bar."""
        width = self.console.width
        lines, records = [self._bar()], self._row.records  # once: another thread draws
        if records:
            layout = Layout.of(self._shown_columns, self._config, width)
            heading = [] if self._lines else [layout.heading()]
            lines = [*heading, layout.line(records, self._above, self._unicode), *lines]
        return Group(*(_cropped(line, width) for line in lines))

    def _bar(self) -> Text:
        """`━━━━ 40/600  1:05 left  0.05 GB  loss ▁▂▃`, as much of it as fits; the first three always."""
        if self._began is None:
            return Text() if self._stage is None else self._stage_bar(*self._stage)
        left = self.seconds_left()
        parts = [f"{self.step}/{self.total}", self._beginning() if left is None else f"{duration(left)} left"]
        if self._gigabytes is not None:
            parts.append(f"{self._gigabytes:.2f} GB")
        text = "  ".join(parts)
        if (trend := self._trend()) and len(text) + len(trend) + _BAR + 4 <= self.console.width:
            text += f"  {trend}"
        return self._drawn(self.step, self.total, text)

    def _stage_bar(self, what: str, since: float) -> Text:
        (done, total), seconds = self._counted, self._clock() - since
        if not total:
            return Text("  ".join([what, *([f"{done:,}"] if done else []), duration(seconds)]))
        speed = f"  {done / seconds:,.0f}/s" if done > seconds > 0 else ""
        return self._drawn(done, total, f"{what}  {done:,}/{total:,}{speed}")

    def _first_step(self, since: float) -> None:
        """The bar has said it."""

    def _beginning(self) -> str:
        """What takes time before the first step."""
        since = self._clock() - self._began[1] if self._began else 0.0
        return f"compiling, once per run  {duration(since)}"

    def _drawn(self, done: int, total: int, text: str) -> Text:
        """A bar before a text, as long as there is room."""
        size = min(_BAR, self.console.width - cell_len(text) - 2)
        if size < 4:
            return Text(text)
        filled = min(round(size * done / max(total, 1)), size)
        full, rest = ("━", "━") if self._unicode else ("#", "-")
        return Text.assemble((full * filled, "green"), (rest * (size - filled), "dim"), f"  {text}")

    def _trend(self) -> str:
        """The last values of the leading metric as bars."""
        if not self._recent or not self._unicode:
            return ""
        name = leading_metric(self._recent[-1])
        values = [value for _, value in curves(self._recent).get(name, {}).get("train", ())]
        return f"{name} {sparkline(values)}" if len(values) > 1 else ""

    def _stop(self) -> None:
        self._close()
        with self._drawing:
            if self._live is not None:
                self._ended.set()
                self._live.stop()
                self._live = None
                atexit.unregister(self._stop)


def _cropped(line: Text, width: int) -> Text:
    line.truncate(width, overflow="crop")
    return line
