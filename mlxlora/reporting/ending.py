"""What is said when a run ends: what improved, and the commands that come next."""

import os
import shlex
from pathlib import Path

from attrs import define

from .columns import short_number
from .reporter import Values
from .text import duration, leading_metric, metric_text

ON_PAGE = ("shapes compiled",)
"""Results that the page shows and the terminal does not."""


@define
class Improvement:
    """The validations of a run: the first, the best and the last."""

    first: Values | None = None
    best: Values | None = None
    last: Values | None = None

    def add(self, row: Values) -> None:
        """Counts a validation; the first of a run cannot be the best, because nothing is trained yet."""
        value = row.get(leading_metric(row))
        if not isinstance(value, int | float) or value != value:
            return
        self.first, self.last = self.first or row, row
        if row["step"] and (self.best is None or self._better(row, self.best)):
            self.best = row

    def facts(self) -> dict[str, str]:
        """What improved, in one line.

        >>> seen = Improvement()
        >>> for step, loss in ((0, 2.5), (20, 1.25), (40, 1.5)):
        ...     seen.add({"step": step, "loss": loss})
        >>> seen.facts()
        {'valid loss': '2.5000 at step 0, 1.2500 at step 20 (best), 1.5000 at step 40'}
        """
        if self.first is None or self.last is None or self.first is self.last:
            return {}
        name = leading_metric(self.last)
        rows = {row["step"]: row for row in (self.first, self.best, self.last) if row is not None}
        best = self.best["step"] if self.best else None
        texts = [f"{short_number(row[name])} at step {step:,}{' (best)' if step == best else ''}" for step, row in rows.items()]
        return {f"valid {name}": ", ".join(texts)}

    @staticmethod
    def _better(row: Values, other: Values) -> bool:
        name = leading_metric(row)
        return row[name] > other[name] if name == "reward" else row[name] < other[name]


def outcome_facts(summary: Values) -> dict[str, str]:
    """The results of a run as people read them.

    >>> outcome_facts({"steps": 40, "shapes compiled": 3, "seconds": 70.4, "best valid loss": 1.1749, "adapters": "a"})
    {'time': '1:10 (40 steps)', 'adapters': 'a'}
    """
    time = {"time": f"{duration(summary['seconds'])} ({summary['steps']:,} steps)"} if "seconds" in summary else {}
    hidden = ("steps", "seconds", *ON_PAGE)
    others = {name: value for name, value in summary.items() if name not in hidden and not name.startswith("best valid")}
    return time | {name: metric_text(name, value) for name, value in others.items()}


def next_commands(
    config: Values, directory: str, prompt: str = "", *, validated: bool = False, evaluated: bool = False
) -> list[str]:
    """The commands that use what a run left; none if its model has no name.

    Args:
        config: the options of the run.
        directory: its folder.
        prompt: to answer.
        validated: whether the run has validation rows.
        evaluated: whether `mlxlora eval` has the loss of its method.
    """
    model = config.get("model")
    if not isinstance(model, str):
        return []
    folder = shlex.quote(_short_path(directory))
    asked = prompt if prompt and len(prompt) <= 60 and prompt.isprintable() else "Hello"
    commands = [f"mlxlora generate --adapter-path {folder} --prompt {shlex.quote(asked)}"]
    split = "test" if config.get("test") else "valid"
    if validated and (rewards := config.get("rewards")) and not config.get("reward_model"):
        own = f" --reward-file {shlex.quote(config['reward_file'])}" if config.get("reward_file") else ""
        commands.append(f"mlxlora eval --adapter-path {folder} --split {split} --rewards {shlex.quote(','.join(rewards))}{own}")
    elif evaluated and (validated or config.get("test")):
        commands.append(f"mlxlora eval --adapter-path {folder} --split {split}")
    if Path(model).is_absolute():  # long; the adapters know it
        commands.append(f"mlxlora chat --adapter-path {folder}")
    else:
        commands.append(f"mlx_lm.chat --model {shlex.quote(model)} --adapter-path {folder}")
    commands.append(f"mlxlora fuse --adapter-path {folder} --save-path {shlex.quote(_short_path(directory) + '-fused')}")
    return commands


def command_lines(command: str, width: int) -> list[str]:
    r"""A command in lines that fit, for a shell: all but the last end in a backslash.

    >>> command_lines("mlxlora fuse --adapter-path a --save-path b", 32)
    ['mlxlora fuse --adapter-path a \\', '    --save-path b']
    """
    words, lines = command.split(" --"), []
    line = words[0]
    for word in words[1:]:
        if len(line) + len(word) + 5 > width:
            lines.append(f"{line} \\")
            line = f"    --{word}"
        else:
            line += f" --{word}"
    return [*lines, line]


def _short_path(path: str) -> str:
    """A path as it is, or relative to the working folder if that is shorter."""
    if not Path(path).is_absolute():
        return path
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) and not relative.startswith("..") else path
