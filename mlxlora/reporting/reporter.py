"""The reporter protocol, and the files metrics.jsonl and samples.jsonl."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from ..utils.files import atomic_file

Values = Mapping[str, Any]
"""Named values: a record of metrics (step, split, loss, ...), a sample, an answer, a configuration or the results of a run."""
_NO_METRICS = {"step", "split"}


class Reporter(Protocol):
    """What a run calls; a subclass overrides the events that it uses."""

    def start(self, config: Values) -> None:
        """Before the first step, with every option of the run by name."""

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """While something long goes on before the first step: what, and how many items of how many; an empty text ends it."""

    def overview(self, facts: Values) -> None:
        """Before the first step: what the run is, a text for each name, such as model, trained, data."""

    def record(self, row: Values) -> None:
        """At every report, validation and test."""

    def samples(self, step: int, rows: Sequence[Values]) -> None:
        """At every report of a run that samples: completions with their rewards; in other runs, at validations: answers."""

    def progress(self, step: int, total: int) -> None:
        """After every step, and once before the first, with the step that the run starts from."""

    def note(self, text: str, warning: bool = False) -> None:
        """A message for the user."""

    def example(self, tokens: Sequence[int], loss_mask: Sequence[bool], decode: Callable[[Sequence[int]], str]) -> None:
        """Before the first step: the tokens of the first training example, and which of them are trained on."""

    def answers(self, rows: Sequence[Values]) -> None:
        """After the last step: prompts, the expected answers, and the model's answers before and after training."""

    def finish(self, summary: Values) -> None:
        """After the last step, with the results; also when the run is interrupted."""


class ReporterGroup(Reporter):
    """Several reporters as one: each gets every event."""

    def __init__(self, *members: Reporter) -> None:
        self.members = members

    def start(self, config: Values) -> None:
        for member in self.members:
            member.start(config)

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        for member in self.members:
            member.stage(text, done, total)

    def overview(self, facts: Values) -> None:
        for member in self.members:
            member.overview(facts)

    def record(self, row: Values) -> None:
        for member in self.members:
            member.record(row)

    def samples(self, step: int, rows: Sequence[Values]) -> None:
        for member in self.members:
            member.samples(step, rows)

    def progress(self, step: int, total: int) -> None:
        for member in self.members:
            member.progress(step, total)

    def note(self, text: str, warning: bool = False) -> None:
        for member in self.members:
            member.note(text, warning)

    def example(self, tokens: Sequence[int], loss_mask: Sequence[bool], decode: Callable[[Sequence[int]], str]) -> None:
        for member in self.members:
            member.example(tokens, loss_mask, decode)

    def answers(self, rows: Sequence[Values]) -> None:
        for member in self.members:
            member.answers(rows)

    def finish(self, summary: Values) -> None:
        for member in self.members:
            member.finish(summary)


def numbers(record: Values) -> dict[str, float]:
    """The metrics of a record: every number but its step. Curves, tables and trackers show these.

    >>> numbers({"step": 5, "split": "train", "loss": 2.5, "kl": None, "note": "text"})
    {'loss': 2.5}
    """
    return {name: value for name, value in record.items() if name not in _NO_METRICS and isinstance(value, int | float)}


class MetricsFile(Reporter):
    """Appends every record to metrics.jsonl as one JSON object; non-finite numbers become null."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def record(self, row: Values) -> None:
        """Writes the line in one call, so that readers never see half of it."""
        line = orjson.dumps(dict(row), default=float, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
        with self.path.open("ab", buffering=0) as file:
            written = file.write(line)
            if written < len(line):  # the disk is full: writing the rest raises the error
                file.write(line[written:])


class SamplesFile(Reporter):
    """Appends completions to samples.jsonl, one JSON object each."""

    def __init__(self, path: str | Path) -> None:
        self._file = MetricsFile(path)

    def samples(self, step: int, rows: Sequence[Values]) -> None:
        for row in rows:
            self._file.record({"step": step, **row})


def truncate_after(path: str | Path, step: int) -> None:
    """Drops the records of later steps and the half line that a killed run left, before a run resumes."""
    path = Path(path)
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines() if _step_of(line) <= step]
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def drop_record(path: Path, step: int, split: str) -> None:
    """Drops the record of a split at a step, which the resumed run writes."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) != step or orjson.loads(line).get("split") != split]
    if len(kept) < len(lines):
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> float:
    try:
        return orjson.loads(line)["step"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return float("inf")
