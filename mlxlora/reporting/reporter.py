"""The reporter protocol, and the files metrics.jsonl and samples.jsonl."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import orjson

from ..utils.files import atomic_file

Kind = TypeVar("Kind")
Row = Mapping[str, Any]
"""step, split (train, valid or test), loss, ... and any metric by name; docs: `Terminal.record`."""


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
