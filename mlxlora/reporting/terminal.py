"""Shows a run in the terminal."""

import atexit
import re
import time
from collections import deque
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from ..utils.terminal_text import printable
from .history import curves
from .reporter import Reporter, Values
from .text import duration, leading_metric, metric_text, runs_of_text, shorten, sparkline, trend


class Terminal(Reporter):
    """Shows live progress below the scrolling records; prints plain aligned lines if stdout is not a terminal.

    Args:
        quiet: print results and warnings only.
        console: where to print; default: stdout.
        clock: current time in seconds, for the time left.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._clock = clock
        self._recent: deque[Values] = deque(maxlen=24)  # of training: what the sparkline shows
        self._latest: dict[str, str] = {}
        self._began: tuple[int, float] | None = None
        self._step, self._total = 0, 0
        self._bar: tuple[Progress, TaskID] | None = None

    def record(self, row: Values) -> None:
        """Prints one line: step, split, loss [nats], tokens_per_second, peak_memory_gb and every other metric."""
        if row["split"] == "train":
            self._recent.append(row)
        self._latest |= _headline(row)
        if not self._quiet:
            left = self._left() if row["split"] == "train" else ""
            self._print(record_line(row, self._total, left), style="" if row["split"] == "train" else "bold")
            self._refresh()

    def samples(self, step: int, rows: Sequence[Values]) -> None:
        """Prints the best and the worst completion of the last batch, or all if they have no rewards."""
        if self._quiet or not rows:
            return
        rewarded = "reward" in rows[0]
        if rewarded:
            ranked = sorted(rows, key=lambda row: row["reward"] if row["reward"] is not None else float("-inf"))
            rows = (ranked[-1], ranked[0])
        for row in rows:
            answer = shorten(printable(str(row["completion"])), 160)
            reward = f"reward {metric_text('reward', row['reward'])}  " if rewarded else ""
            self._print(f"    {reward}{shorten(str(row['prompt']), 80)!r} -> {answer!r}", style="dim")

    def progress(self, step: int, total: int) -> None:
        self._step, self._total = step, total
        if self._began is None:
            self._began = (step, self._clock())
        if not self._quiet and self.console.is_terminal:
            self._refresh()

    def note(self, text: str, warning: bool = False) -> None:
        if warning:
            self._print(f"warning: {text}", style="yellow")
        elif not self._quiet:
            self._print(text)

    def answers(self, rows: Sequence[Values]) -> None:
        """Prints each prompt with the expected answer, if there is one, and the model's answers before and after training."""
        self._stop()
        for row in rows:
            names = [name for name in ("prompt", "expected", "before", "after") if name != "expected" or row.get(name)]
            self._print("")
            self._table({name: shorten(printable(" ".join(str(row[name]).split())), 320) for name in names})

    def finish(self, summary: Values) -> None:
        self._stop()
        self._table(summary)

    def example(self, tokens: Sequence[int], loss_mask: Sequence[bool], decode: Callable[[Sequence[int]], str]) -> None:
        """Prints an example, see `show_example`."""
        if not self._quiet:
            show_example(tokens, loss_mask, decode, self.console)

    def _table(self, summary: Values) -> None:
        width = max(map(len, summary), default=0)
        for name, value in summary.items():
            self._print(f"{name:<{width}}  {metric_text(name, value)}")

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    def _left(self) -> str:
        """Time left at the average speed so far."""
        if self._began is None or self._step == self._began[0]:
            return ""
        first, since = self._began
        return duration((self._clock() - since) / (self._step - first) * (self._total - self._step))

    def _refresh(self) -> None:
        if not self.console.is_terminal or self._began is None:
            return
        if self._bar is None:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[status]}", markup=False))
            bar = Progress(*columns, console=self.console, transient=True)
            self._bar = (bar, bar.add_task("", total=self._total, status=""))
            bar.start()
            atexit.register(self._stop)  # so that an error does not leave the cursor hidden
        bar, task = self._bar
        bar.update(task, completed=self._step, total=self._total, status=self._status())

    def _status(self) -> str:
        name = "reward" if "reward" in self._latest else "loss"
        values = [value for _, value in curves(self._recent).get(name, {}).get("train", ())]
        spark = sparkline(values) if self.console.encoding.startswith("utf") else trend(values)
        shown = {name: f"{self._latest[name]} {spark}"} if name in self._latest else {}
        left = {"left": self._left()} if self._left() else {}
        return "  ".join(f"{name} {value}" for name, value in (self._latest | shown | left).items())

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None
            atexit.unregister(self._stop)


_SHORT = {
    "learning_rate": "lr",
    "tokens_per_second": "tok/s",
    "training_tokens_per_second": "train tok/s",
    "rollout_tokens_per_second": "rollout tok/s",
    "peak_memory_gb": "GB",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "clipped",
    "frac_reward_zero_std": "no signal",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}
_NOT_SHOWN = re.compile(
    r"step|split|loss|nll|seconds|policy_loss|kl_penalty|clip_ratio/.*|rewards/.*/std|completions/m(in|ax)_length"
)  # metrics.jsonl has these, too


def record_line(row: Values, total: int = 0, left: str = "") -> str:
    """Formats a record as one aligned line of `name value` pairs.

    >>> record_line({"step": 10, "split": "train", "loss": 2.5, "learning_rate": 1e-5, "accuracy": 0.75}, 600, "1:05")
    'step  10/600  train  loss 2.5000  lr 1.00e-05  accuracy 0.7500  left 1:05'
    """
    width = len(str(total))
    place = f"step {row['step']:>{width}}/{total}" if total else f"step {row['step']}"
    names = sorted((name for name in row if not _NOT_SHOWN.fullmatch(name)), key="reward".__ne__)  # the reward first
    others = [f"{_SHORT.get(name, name)} {metric_text(name, row[name])}" for name in names]
    parts = [place, f"{row['split']:<5}", f"loss {metric_text('loss', row['loss'])}", *others, *([f"left {left}"] if left else [])]
    return "  ".join(parts)


def _headline(row: Values) -> dict[str, str]:
    """What the bar shows of a record: its loss or reward and, of training records, accuracy, speed and memory."""
    name = leading_metric(row)
    if row["split"] != "train":
        return {str(row["split"]): metric_text(name, row[name])}
    names = (name, "rewards/accuracies", "tokens_per_second", "peak_memory_gb")
    return {_SHORT.get(name, name): metric_text(name, row[name]) for name in names if name in row}


def show_example(
    tokens: Sequence[int],
    loss_mask: Sequence[bool],
    decode: Callable[[Sequence[int]], str],
    console: Console | None = None,
    limit: int = 600,
) -> None:
    """Prints an example as the model reads it, with special tokens, and marks the trained tokens.

    Args:
        tokens: [T] ids.
        loss_mask: [T], whether the model is trained to predict the token.
        decode: ids to text, with special tokens.
        console: where to print; trained tokens are green in a terminal and between [[ ]] elsewhere.
        limit: characters to show of each part; longer parts lose their middle.
    """
    console = console or Console(highlight=False)
    text = Text(
        "first example, trained tokens marked:\n" if not console.is_terminal else "first example, trained tokens in green:\n"
    )
    for part, is_trained in runs_of_text(tokens, list(map(bool, loss_mask)), decode):
        shown = shorten(printable(part), limit)
        marked = f"[[{shown}]]" if is_trained and not console.is_terminal else shown
        text.append(marked, style="bold green" if is_trained else "dim")
    console.print(text, soft_wrap=True)
