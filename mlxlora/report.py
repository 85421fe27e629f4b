"""What a run tells: hooks that the loop calls, for the terminal and for metrics.jsonl."""

import atexit
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from .files import atomic_file

Kind = TypeVar("Kind")
Row = Mapping[str, Any]
"""step, split (train, valid or test), loss, ... and any metric by name; docs: `Terminal.record`."""

_BLOCKS = "▁▂▃▄▅▆▇█"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Reporter(Protocol):
    """What the loop calls; a subclass overrides what it cares about."""

    def start(self, config: Row) -> None:
        """Before the first step, with every option of the run by name."""

    def record(self, row: Row) -> None:
        """At every report, validation and test."""

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """At every report of a run that samples: completions with their rewards; else at validations: answers, without."""

    def progress(self, step: int, total: int) -> None:
        """After every step, and before the first with the step that the run starts from."""

    def note(self, text: str, warning: bool = False) -> None:
        """Something that a user wants to know, or has to (warning)."""

    def answers(self, rows: Sequence[Row]) -> None:
        """After the last step: prompts, the answers that are expected, and the model's before and after training."""

    def finish(self, summary: Row) -> None:
        """After the last step, with the results; also where the run was interrupted."""


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

    def example(self, tokens: Sequence[int], scored: Sequence[bool], decode: Callable[[Sequence[int]], str]) -> None:
        """Prints a row as the model reads it, as `show_example` does."""
        if not self._quiet:
            show_example(tokens, scored, decode, self.console)

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


class MetricsFile(Reporter):
    """Appends every record to metrics.jsonl as one JSON object; non-finite numbers become null."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def record(self, row: Row) -> None:
        """Writes the whole line in one call, so that a reader never sees half of it."""
        line = orjson.dumps(dict(row), default=float, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
        with self.path.open("ab", buffering=0) as file:
            written = file.write(line)
            if written < len(line):  # the disk took a part; it says why when it is given the rest
                file.write(line[written:])


class SamplesFile(Reporter):
    """Appends completions to samples.jsonl, one JSON object each."""

    def __init__(self, path: str | Path) -> None:
        self._file = MetricsFile(path)

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        for row in rows:
            self._file.record({"step": step, **row})


def truncate_after(path: str | Path, step: int) -> None:
    """Drops the records of later steps, and the half line that a killed run left: what comes before a resumed run."""
    path = Path(path)
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines() if _step_of(line) <= step]
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> float:
    try:
        return orjson.loads(line)["step"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return float("inf")


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


def _leading(row: Row) -> str:
    """The metric to watch: what is sampled has a reward, and a loss that stays near 0 whatever is learnt."""
    return "reward" if "reward" in row else "loss"


def _headline(row: Row) -> dict[str, str]:
    """What the bar shows of a record: the loss or reward of its split and, of training, accuracy, speed and memory."""
    name = _leading(row)
    if row["split"] != "train":
        return {str(row["split"]): _value(name, row[name])}
    names = (name, "rewards/accuracies", "tokens_per_second", "peak_memory_gb")
    return {_SHORT.get(name, name): _value(name, row[name]) for name in names if name in row}


def _value(name: str, value: Any) -> str:
    if isinstance(value, str) or value is None:
        return str(value)
    if name in _FORMATS:
        text = _FORMATS[name].format(value)
        return text if text.strip("-0.,") else text.lstrip("-")  # a loss of -1e-9 is 0.0000
    return f"{value:#.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(65), duration(3661)
    ('1:05', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float]) -> str:
    """Values as bars between their least and their greatest; a gap for one that is not finite.

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


def show_example(
    tokens: Sequence[int],
    scored: Sequence[bool],
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
    for part, is_scored in runs_of_text(tokens, list(map(bool, scored)), decode):
        shown = shorten(printable(part), limit)
        marked = f"[[{shown}]]" if is_scored and not console.is_terminal else shown
        text.append(marked, style="bold green" if is_scored else "dim")
    console.print(text, soft_wrap=True)


def printable(text: str) -> str:
    """Text whose control characters, which a terminal would obey, are spelt out; tabs and line ends stay.

    >>> printable("a" + chr(27) + "[31m")
    'a\\\\x1b[31m'
    """
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def runs_of_text(tokens: Sequence[int], kinds: Sequence[Kind], decode: Callable[[Sequence[int]], str]) -> list[tuple[str, Kind]]:
    """The texts of neighbouring tokens of one kind, cut from the whole: alone, a run may lose its leading space."""
    parts, end, before = [], 0, ""
    for kind, run in groupby(kinds):
        end += len(list(run))
        whole = decode(tokens[:end])
        parts.append((whole[len(before) :], kind))
        before = whole
    return parts


def shorten(text: str, limit: int) -> str:
    """Text without its middle.

    >>> shorten("abcdefghijklmnopqrstuvwxyz", 10)
    'abcde ... [16 characters] ... vwxyz'
    """
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... [{len(text) - 2 * half} characters] ... {text[-half:]}"
