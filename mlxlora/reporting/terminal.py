"""What a run tells: hooks that the loop calls, for the terminal and for metrics.jsonl."""

import atexit
import re
import time
from collections import deque
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from .reporter import Reporter, Row
from .text import _leading, _value, duration, printable, runs_of_text, shorten, sparkline, trend


class Terminal(Reporter):
    """Live progress with the reports scrolling above it; plain aligned lines where stdout is no terminal.

    Args:
        quiet: print results and warnings only.
        console: where to print; default stdout.
        clock: seconds, for the time left.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._clock = clock
        self._losses: deque[float] = deque(maxlen=24)
        self._latest: dict[str, str] = {}
        self._began: tuple[int, float] | None = None
        self._step, self._total = 0, 0
        self._bar: tuple[Progress, TaskID] | None = None

    def record(self, row: Row) -> None:
        """Prints one line for step, split, loss [nats], tokens_per_second, peak_memory_gb and whatever else the row has."""
        if row["split"] == "train":
            self._losses.append(row[_leading(row)])
        self._latest |= _headline(row)
        if not self._quiet:
            left = self._left() if row["split"] == "train" else ""
            self._print(record_line(row, self._total, left), style="" if row["split"] == "train" else "bold")
            self._refresh()

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """Prints the best and the worst completion of the last batch; all, where they have no rewards."""
        if self._quiet or not rows:
            return
        rewarded = "reward" in rows[0]
        if rewarded:
            ranked = sorted(rows, key=lambda row: row["reward"] if row["reward"] is not None else float("-inf"))
            rows = (ranked[-1], ranked[0])
        for row in rows:
            answer = shorten(printable(str(row["completion"])), 160)
            reward = f"reward {_value('reward', row['reward'])}  " if rewarded else ""
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

    def answers(self, rows: Sequence[Row]) -> None:
        """Prints each prompt with the answer of its row, if it has one, and both of the model."""
        self._stop()
        for row in rows:
            names = [name for name in ("prompt", "expected", "before", "after") if name != "expected" or row.get(name)]
            self._print("")
            self._table({name: shorten(printable(" ".join(str(row[name]).split())), 320) for name in names})

    def finish(self, summary: Row) -> None:
        self._stop()
        self._table(summary)

    def example(self, tokens: Sequence[int], loss_mask: Sequence[bool], decode: Callable[[Sequence[int]], str]) -> None:
        """Prints a row as the model reads it, as `show_example` does."""
        if not self._quiet:
            show_example(tokens, loss_mask, decode, self.console)

    def _table(self, summary: Row) -> None:
        width = max(map(len, summary), default=0)
        for name, value in summary.items():
            self._print(f"{name:<{width}}  {_value(name, value)}")

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    def _left(self) -> str:
        """Time left at the pace so far."""
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
            atexit.register(self._stop)  # an error must not leave the terminal without its cursor
        bar, task = self._bar
        bar.update(task, completed=self._step, total=self._total, status=self._status())

    def _status(self) -> str:
        spark = sparkline(self._losses) if self.console.encoding.startswith("utf") else trend(self._losses)
        name = "reward" if "reward" in self._latest else "loss"
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
)  # in metrics.jsonl all the same


def record_line(row: Row, total: int = 0, left: str = "") -> str:
    """A record as one aligned line of `name value` pairs.

    >>> record_line({"step": 10, "split": "train", "loss": 2.5, "learning_rate": 1e-5, "accuracy": 0.75}, 600, "1:05")
    'step  10/600  train  loss 2.5000  lr 1.00e-05  accuracy 0.7500  left 1:05'
    """
    width = len(str(total))
    place = f"step {row['step']:>{width}}/{total}" if total else f"step {row['step']}"
    names = sorted((name for name in row if not _NOT_SHOWN.fullmatch(name)), key="reward".__ne__)  # the reward first
    others = [f"{_SHORT.get(name, name)} {_value(name, row[name])}" for name in names]
    parts = [place, f"{row['split']:<5}", f"loss {_value('loss', row['loss'])}", *others, *([f"left {left}"] if left else [])]
    return "  ".join(parts)


def _headline(row: Row) -> dict[str, str]:
    """What the bar shows of a record: the loss or reward of its split and, of training, accuracy, speed and memory."""
    name = _leading(row)
    if row["split"] != "train":
        return {str(row["split"]): _value(name, row[name])}
    names = (name, "rewards/accuracies", "tokens_per_second", "peak_memory_gb")
    return {_SHORT.get(name, name): _value(name, row[name]) for name in names if name in row}


def show_example(
    tokens: Sequence[int],
    loss_mask: Sequence[bool],
    decode: Callable[[Sequence[int]], str],
    console: Console | None = None,
    limit: int = 600,
) -> None:
    """Prints a row as the model reads it, special tokens and all, with the part it is scored on marked.

    Args:
        tokens: [T] ids.
        scored: [T], whether the model is trained to predict this token.
        decode: ids to text, special tokens kept.
        console: where to print; the scored part is green in a terminal and between [[ ]] elsewhere.
        limit: characters shown of each part; longer ones lose their middle.
    """
    console = console or Console(highlight=False)
    text = Text("first example, the scored part marked:\n" if not console.is_terminal else "first example, scored in green:\n")
    for part, is_trained in runs_of_text(tokens, list(map(bool, loss_mask)), decode):
        shown = shorten(printable(part), limit)
        marked = f"[[{shown}]]" if is_trained and not console.is_terminal else shown
        text.append(marked, style="bold green" if is_trained else "dim")
    console.print(text, soft_wrap=True)
