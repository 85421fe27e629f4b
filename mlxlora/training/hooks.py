"""What a run does between steps: report, validate."""

import math
from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx
from attrs import frozen

from ..config.options import Output
from ..data.batching import MicroBatch
from ..reporting.reporter import Reporter
from .evaluate import Evaluate
from .micro_batch import BatchDivider
from .progress import Progress, Window

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
        seen, progress.window = progress.window.report() | {"tokens": progress.tokens}, Window()
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
