"""What a run does between steps: report, validate, tell the user's callbacks."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx.core as mx
from attrs import frozen

from ..config.options import Output
from ..data.batching import MicroBatch
from ..distributed.ranks import Ranks
from ..reporting.callbacks import Callbacks
from ..reporting.reporter import Reporter
from .checkpoint import FOLDER
from .evaluate import Evaluate
from .loop import Every, Hook
from .micro_batch import BatchDivider
from .progress import Progress, Window

REPORT, VALIDATION, CHECKPOINT = "report", "validation", "checkpoint"
"""Names of hooks in a checkpoint."""

FIRST = ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second")
"""Metrics at the beginning of every training record."""


@frozen(eq=False)
class Report:
    """Reports the steps since the last report, and the samples of the last batches.

    Attributes:
        reporter: gets them.
        divider: knows the largest memory use of the steps before the last measurement.
        online: the policy samples during the run, so training has a speed of its own.
        token_metrics: the objective has `token_metrics`; `num_tokens`, TRL's name of `tokens`, goes with them.
    """

    reporter: Reporter
    divider: BatchDivider
    online: bool
    token_metrics: bool = False

    def __call__(self, progress: Progress, micros: Sequence[MicroBatch] = ()) -> None:
        seen = progress.window.report() | {"tokens": progress.tokens}
        alone = seen.pop("training_tokens_per_second")
        self.reporter.record(
            {
                "step": progress.step,
                "split": "train",
                **{name: seen.pop(name) for name in FIRST},
                "peak_memory_gb": max(mx.get_peak_memory(), self.divider.peak) / 1e9,
                **({"training_tokens_per_second": alone} if self.online else {}),
                **seen,
                **({"num_tokens": progress.tokens} if self.token_metrics else {}),
            }
        )
        progress.window = Window()  # after the record, which may fail
        self.reporter.samples(progress.step, [sample for micro in micros for sample in micro.samples])


@frozen(eq=False)
class Validation:
    """Means over the validation split; keeps the best adapters, and stops a run that no longer gets better.

    Attributes:
        evaluate: micro-batches to metrics.
        batches: the validation batches, each time anew; None: no validation.
        reporter: gets the metrics.
        output: --keep-best and --patience.
        save: writes the adapters as they are.
    """

    evaluate: Evaluate
    batches: Callable[[], Iterable[MicroBatch]] | None
    reporter: Reporter
    output: Output
    save: Callable[[], None]

    def first(self, progress: Progress) -> None:
        """Before the first step; it cannot be the best."""
        self._measured(progress)

    def __call__(self, progress: Progress, _: Sequence[MicroBatch] = ()) -> None:
        loss = self._measured(progress)
        if loss is None:
            return
        if math.isfinite(loss) and (progress.best is None or loss < progress.best):
            progress.best, progress.waited = loss, 0
            if self.output.keep_best:
                self.save()
        else:
            progress.waited += 1
        if self.output.patience and progress.waited >= self.output.patience:
            progress.stop = f"no better validation loss in {progress.waited} validations"

    def _measured(self, progress: Progress) -> float | None:
        """The validation loss; None without validation."""
        if self.batches is None:
            return None
        metrics = self.evaluate(self.batches())
        self.reporter.record({"step": progress.step, "split": "valid", **metrics})
        return metrics["loss"]


@frozen(eq=False)
class Told:
    """What the user's callbacks are told between steps, and what they ask for.

    Attributes:
        callbacks: of rank 0; others have none.
        ranks: stop together.
        directory: the folder of the run.
    """

    callbacks: Callbacks
    ranks: Ranks
    directory: Path

    def settle(self, progress: Progress) -> None:
        """Stops the run if a callback asked for that.

        Raises:
            SharedError: a callback raised an error.
        """
        progress.stop = progress.stop or self.callbacks.settle(self.ranks.of_rank0)

    def after_steps(self, multiple: int, total: int) -> Sequence[Every]:
        """Hooks before that of the checkpoint, so that a run that stops has one."""

        def told(progress: Progress, _: Sequence[MicroBatch]) -> None:
            self.callbacks.step(progress.step, progress.latest)
            if progress.step % multiple == 0:
                self.settle(progress)

        return self._where_asked(told, total)

    def saving(self, checkpoint: Callable[[Progress], None]) -> Hook:
        """The hook that writes a checkpoint, and tells of it."""

        def save(progress: Progress, _: Sequence[MicroBatch]) -> None:
            progress.owed = []  # this is the last hook with a name, and the checkpoint says so
            checkpoint(progress)
            self.callbacks.checkpoint(progress.step, self.directory / FOLDER / f"{progress.step:07d}")

        return save

    def at_the_end(self, total: int) -> Sequence[Every]:
        """Hooks after that of the checkpoint."""
        return self._where_asked(lambda progress, _: self.settle(progress), total, looks=False)

    def _where_asked(self, hook: Hook, total: int, *, looks: bool = True) -> Sequence[Every]:
        """The hook if rank 0 has callbacks. All ranks wait for a step that these look at: they add up sums in one order."""
        asked, sees_steps = self.ranks.of_rank0([bool(self.callbacks), self.callbacks.sees_steps])
        return [Every(1, hook, total, beside=not (looks and sees_steps))] if asked else []
