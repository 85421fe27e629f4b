"""Which rows make which batch, and how many steps there are: functions of the options and the data alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from attrs import frozen

from ..config.options import Training
from ..data.batching import Make, MicroBatch, Order, grouped, stream
from ..data.prefetch import prefetched
from ..data.sources import Source, Split
from ..errors import InputError
from ..utils.integers import ceil_div


@frozen(eq=False)
class Schedule:
    """The rows of a run in the order of its batches.

    Attributes:
        source: how rows become batches.
        splits: the items of train, valid and test.
        training: batch size, accumulation, steps or epochs, seed.
    """

    source: Source
    splits: Mapping[str, Split]
    training: Training

    def items(self, split: str) -> Sequence[Any]:
        """The items of a split; none if there is no such split."""
        return self.splits[split].items

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return total_steps(self.training, len(self.items("train")), self.source.repeats)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training rows."""
        return total_steps(self.training, len(self.items("train")), self.source.repeats, epochs=1.0)

    @property
    def batches(self) -> int:
        """Training batches of the run."""
        return _batches(self.training, len(self.items("train")), self.training.epochs)

    @property
    def is_live(self) -> bool:
        """Whether a batch is sampled or measured with the current policy, so that it cannot be made ahead of time."""
        return self.source.online or self.source.live

    def order(self, split: str) -> Order:
        """The order of a split: training rows are shuffled, the others keep the order of the file."""
        seed = self.training.seed if split == "train" and self.source.data.shuffle else None
        return Order(self.source.lengths(self.items(split)), self.training.batch_size, seed)

    def rows_used(self, split: str, limit: int) -> list[int]:
        """The rows of the first `limit` batches of a split, in ascending order; -1 = all of one pass."""
        if not self.items(split) or not limit:
            return []
        order = self.order(split)
        batches = islice(order.batches(), order.per_epoch() if limit < 0 else limit)
        return sorted({row for batch in batches for row in batch})

    def check(self) -> None:
        """Checks the batch size.

        Raises:
            InputError: a batch is larger than the training set.
        """
        rows, size = len(self.items("train")), self.training.batch_size
        if size > rows:
            raise InputError(f"--batch-size {size} is larger than the training set of {rows} rows; use --batch-size {rows} or less")


def total_steps(training: Training, rows: int, repeats: int = 1, *, epochs: float | None = None) -> int:
    """Optimizer steps of a run, `repeats` on every batch; the last step may accumulate fewer batches.

    Args:
        training: batch size, accumulation, steps or epochs.
        rows: training rows.
        repeats: steps on every batch.
        epochs: of other runs than the one that `training` describes.

    >>> total_steps(Training(epochs=2, batch_size=4, grad_accumulation_steps=2), rows=10)
    3
    """
    epochs = training.epochs if epochs is None else epochs
    steps = ceil_div(_batches(training, rows, epochs), training.grad_accumulation_steps)
    return steps if epochs is None else steps * repeats


def _batches(training: Training, rows: int, epochs: float | None) -> int:
    if epochs is None:
        return training.iters * training.grad_accumulation_steps
    return max(1, math.ceil(epochs * ceil_div(rows, training.batch_size)))


def batches_of_steps(schedule: Schedule, make: Make, done: int) -> Iterator[tuple[MicroBatch, ...]]:
    """The batches of each optimizer step after step `done`; batches that do not depend on the policy are made ahead of time."""
    accumulate = schedule.training.grad_accumulation_steps
    used = done // schedule.source.repeats * accumulate
    micros = stream(schedule.items("train"), schedule.order("train"), make, used)
    steps = grouped(islice(micros, max(schedule.batches - used, 0)), accumulate)
    return steps if schedule.is_live else prefetched(steps)


def batches_of_split(schedule: Schedule, make: Make, split: str, limit: int = -1) -> Iterator[MicroBatch]:
    """The batches of a split other than train, once and in order; at most `limit` of them (-1 = all)."""
    order = schedule.order(split)
    count = order.per_epoch() if limit < 0 else min(limit, order.per_epoch())
    return islice(stream(schedule.items(split), order, make), count)
