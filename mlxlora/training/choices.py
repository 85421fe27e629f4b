"""What a run chooses by the machine: measured before its first step, told in one line, the same on all ranks and after a resume.

A choice changes the order in which numbers are added, so it is part of a checkpoint (see `rounding`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ..data.batching import bucket
from ..data.packing import row_length
from ..models.attention_choice import attention_shapes, attention_table
from ..models.attention_shapes import MEASURED_FROM, rung, using
from ..models.recurrences import recurrence_by
from ..reporting.reporter import Reporter
from ..utils.measured import measurements, measuring
from .checkpoint import STATE, checkpoints
from .inputs import Run
from .rounding import check_choices

Choices = Mapping[str, Any]
"""JSON: "attention", the table of `attention_choice`; empty where nothing was measured."""


@contextmanager
def by_machine(run: Run, reporter: Reporter) -> Iterator[Choices]:
    """A run computes as its options say while the context lasts, else as measured here; yields what was measured."""
    training = run.options.training
    with recurrence_by(training.recurrence):
        found = run.ranks.of_rank0(_choices(run, reporter) if run.ranks.leads else None)
        with using(training.attention, found.get("attention")):
            yield found


def _choices(run: Run, reporter: Reporter) -> Choices:
    if run.options.output.resume and (before := earlier_choices(run.options.directory)) is not None:
        return before
    if run.options.training.attention != "auto" or not measuring():
        return {}
    longest = longest_row(run)
    if rung(longest) < MEASURED_FROM:
        return {}
    shapes = attention_shapes(run.model, packed=run.source.packing)
    table = attention_table(shapes, longest, run.options.training.batch_size, measurements(), reporter.note)
    return {"attention": table} if table else {}


def longest_row(run: Run) -> int:
    """Positions of the longest training row; of sampled completions half of their greatest length counts."""
    source, items = run.source, run.splits["train"].items
    if not len(items):
        return 1
    longest = max(len(example.tokens) for example in source.expected(items[int(np.argmax(source.lengths(items)))]))
    return row_length(longest, source.data.max_seq_length) if source.packing else bucket(longest - 1)


def earlier_choices(directory: Path) -> Choices | None:
    """Those of the run in a folder, which all of its checkpoints have; None if it has no checkpoint."""
    for path in checkpoints(directory):
        try:
            states = orjson.loads((path / STATE).read_bytes())["rounding"]
            found = states[0].get("choices", {}) if states else {}
            check_choices(found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: an earlier one is read
            continue
        return found
    return None
