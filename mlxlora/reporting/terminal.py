"""Prints a run as lines."""

import re
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from ..errors import printable
from ..utils.console import safe_console
from .columns import is_tie
from .ending import ON_PAGE, Improvement, next_commands
from .reporter import Reporter, Values
from .text import duration, metric_text, runs_of_text, shorten


class Terminal(Reporter):
    """Prints one aligned line of names and values for each record: for pipes and logs. `Screen` draws a table for people.

    Args:
        quiet: print results and warnings only.
        console: where to print; default: stdout.
        clock: current time in seconds, for the time left.
        evaluated: whether `mlxlora eval` has the loss of the method.
    """

    def __init__(
        self,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        evaluated: bool = False,
    ) -> None:
        self.console = console or safe_console(soft_wrap=True)
        self.quiet = quiet
        self._clock, self._evaluated = clock, evaluated
        self._began: tuple[int, float] | None = None
        self.step, self.total = 0, 0
        self._config: Values = {}
        self._improvement = Improvement()
        self._prompt = ""  # of an answer, for the commands at the end
        self._stage: tuple[str, float] | None = None  # what goes on, and since when

    def start(self, config: Values) -> None:
        self._config = config

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """Prints a line when something that took more than a second is over."""
        now = self._clock()
        if text:
            self._stage = (text, now) if self._stage is None or self._stage[0] != text else self._stage
        elif self._stage is not None:
            (what, since), self._stage = self._stage, None
            if now - since > 1 and self._began is None and not self.quiet:
                self.note(f"{what}: {took(now - since, done)}")

    def overview(self, facts: Values) -> None:
        if not self.quiet:
            self._table(facts)

    def record(self, row: Values) -> None:
        """Prints one line: step, split, loss [nats], tokens_per_second, peak_memory_gb and every other metric."""
        if row["split"] == "valid":
            self._improvement.add(row)
        if not self.quiet:
            seconds = self.seconds_left() if row["split"] == "train" else None
            self._print(record_line(row, self.total, "" if seconds is None else duration(seconds)))

    def samples(self, step: int, rows: Sequence[Values]) -> None:
        """Prints the best and the worst completion of the last batch, or all if they have no rewards."""
        if self.quiet:
            return
        for row in telling(rows):
            reward = f"reward {metric_text('reward', row['reward'])}  " if row.get("reward") is not None else ""
            self._print(f"    {reward}{shorten(str(row['prompt']), 80)!r} -> {shorten(str(row['completion']), 160)!r}")

    def progress(self, step: int, total: int) -> None:
        self.step, self.total = step, total
        if self._began is None:
            self._began = (step, self._clock())
        elif step == self._began[0] + 1:
            self._first_step(self._began[1])

    def note(self, text: str, warning: bool = False) -> None:
        if warning:
            self._print(f"warning: {text}")
        elif not self.quiet:
            self._print(text)

    def answers(self, rows: Sequence[Values]) -> None:
        """Prints each prompt with the expected answer, if there is one, and the model's answers before and after training."""
        self._prompt = str(rows[0]["prompt"]) if rows else ""
        for row in rows:
            self._print("")
            self._table({name: shorten(" ".join(str(row[name]).split()), 320) for name in answer_names(row)})

    def finish(self, summary: Values) -> None:
        shown = {name: value for name, value in summary.items() if name not in ON_PAGE}
        self._table({**shown, **(self._improvement.facts() if "adapters" in summary else {})})
        for command in self._next(summary):
            self._print(f"next: {command}")

    def _next(self, summary: Values) -> list[str]:
        """The commands that come after a run that ended as it should."""
        if self.quiet or "adapters" not in summary:
            return []
        known = {"validated": self._improvement.first is not None, "evaluated": self._evaluated}
        return next_commands(self._config, str(summary["adapters"]), self._prompt, **known)

    def example(self, tokens: Sequence[int], loss_mask: Sequence[bool], decode: Callable[[Sequence[int]], str]) -> None:
        """Prints an example, see `show_example`."""
        if not self.quiet:
            show_example(tokens, loss_mask, decode, self.console)

    def seconds_left(self) -> float | None:
        """Time left at the average speed so far; None before the first step."""
        if self._began is None or self.step == self._began[0]:
            return None
        first, since = self._began
        return (self._clock() - since) / (self.step - first) * (self.total - self.step)

    def _first_step(self, since: float) -> None:
        """Says what the first step took if that was long: it compiles."""
        if not self.quiet and (seconds := self._clock() - since) > 1:
            self._print(f"first step, compiled once per run: {took(seconds, 0)}")

    def _table(self, summary: Values) -> None:
        width = max(map(len, summary), default=0)
        for name, value in summary.items():
            self._print(f"{name:<{width}}  {metric_text(name, value)}")

    def _print(self, text: str) -> None:
        self.console.print(Text(printable(text)), soft_wrap=True)


def took(seconds: float, done: int) -> str:
    """The time of something that is over, and its speed if it counted.

    >>> took(2.0, 600), took(2.0, 1), took(2.0, 0)
    ('600 in 2.0 s (300/s)', '1 in 2.0 s', '2.0 s')
    """
    speed = f" ({done / seconds:,.0f}/s)" if done > seconds else ""
    return f"{done:,} in {seconds:.1f} s{speed}" if done else f"{seconds:.1f} s"


def telling(rows: Sequence[Values]) -> list[Values]:
    """The samples to show: of rewarded ones the best and the worst, or one if all rewards are equal; else the first three.

    >>> telling([{"completion": "a", "reward": 1.0}, {"completion": "a", "reward": 1.0}])
    [{'completion': 'a', 'reward': 1.0}]
    """
    rewarded = sorted((row for row in rows if row.get("reward") is not None), key=lambda row: row["reward"])
    if not rewarded:
        return list(rows[:3])
    best, worst = rewarded[-1], rewarded[0]
    return [best] if best["reward"] == worst["reward"] else [best, worst]


def answer_names(row: Values) -> list[str]:
    """What is shown of an answer, in this order."""
    return [name for name in ("prompt", "expected", "before", "after") if name != "expected" or row.get(name)]


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
    tie = {"rewards/accuracies": "tie"} if is_tie(row) else {}
    others = [f"{_SHORT.get(name, name)} {tie.get(name) or metric_text(name, row[name])}" for name in names]
    parts = [place, f"{row['split']:<5}", f"loss {metric_text('loss', row['loss'])}", *others, *([f"left {left}"] if left else [])]
    return "  ".join(parts)


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
    console = console or safe_console()
    text = Text(
        "first example, trained tokens marked:\n" if not console.is_terminal else "first example, trained tokens in green:\n"
    )
    for part, is_trained in runs_of_text(tokens, list(map(bool, loss_mask)), decode):
        shown = shorten(printable(part), limit)
        marked = f"[[{shown}]]" if is_trained and not console.is_terminal else shown
        text.append(marked, style="bold green" if is_trained else "dim")
    text.rstrip()
    console.print(text, soft_wrap=True)
