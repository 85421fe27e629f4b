"""Where a run is between two steps, and its form in a checkpoint."""

import math
from collections.abc import Mapping
from math import nan
from typing import Any, get_args

import mlx.core as mx
from attrs import asdict, define, field

from ..data.pooled import Pooled, Statistic, pooled, results
from ..utils.rng import random_key
from .rounding import check_states


@define
class Window:
    """What the steps since the last report measured.

    Attributes:
        metrics: by name; those of the loss are means over the steps, all others are pooled over what they count.
        steps: steps that changed the model.
        skipped: steps that did not.
        tokens: tokens that the model read.
        learning_rate: of the last step.
        seconds_waited: for batches.
        seconds_stepped: for everything else.
    """

    metrics: dict[str, Pooled] = field(factory=dict)
    steps: int = 0
    skipped: int = 0
    tokens: int = 0
    learning_rate: float = 0.0
    seconds_waited: float = 0.0
    seconds_stepped: float = 0.0

    def __bool__(self) -> bool:
        return self.steps + self.skipped > 0

    def add(self, metrics: Mapping[str, Pooled]) -> None:
        """Counts a step with its metrics."""
        self.metrics = pooled([self.metrics, metrics])
        self.steps += 1

    def report(self) -> dict[str, float]:
        """The metrics, speeds and counts of the steps; loss and norm are NaN if all steps were skipped."""
        seconds = self.seconds_waited + self.seconds_stepped
        found = {"loss": nan, "grad_norm": nan} if not self.steps else results(self.metrics)
        return {
            "loss": found.pop("loss"),
            "grad_norm": found.pop("grad_norm"),
            "learning_rate": self.learning_rate,
            "tokens_per_second": self.tokens / seconds,
            "training_tokens_per_second": self.tokens / self.seconds_stepped,
            **({"skipped": self.skipped} if self.skipped else {}),
            **found,
        }


@define
class Progress:
    """The state of a run between steps; all of it is saved, so that a resumed run reports what an uninterrupted one would.

    Attributes:
        step: optimizer steps so far.
        tokens: tokens that the model read so far.
        window: what the steps since the last report measured.
        best: the lowest validation loss so far.
        waited: validations since then.
        skipped: skipped steps in a row, up to the last step.
        stop: why the run ends early, or empty.
        rounding: what decides the shapes and divisions of later batches, for each rank; see `rounding`.
        owed: names of hooks that the last step still has to call, because one of them failed.
        key: the random state after the last step.
        latest: the metrics of the last step; not saved.
    """

    step: int = 0
    tokens: int = 0
    window: Window = field(factory=Window)
    best: float | None = None
    waited: int = 0
    skipped: int = 0
    stop: str = ""
    rounding: list[Any] = field(factory=list)
    owed: list[str] = field(factory=list)
    key: mx.array = field(factory=random_key, metadata={"apart": True})
    latest: Mapping[str, float] = field(factory=dict, metadata={"apart": True})


def state_of(progress: Progress) -> dict[str, Any]:
    """The progress as JSON, without the random state and the last step's metrics."""
    return asdict(progress, filter=lambda attribute, _: "apart" not in attribute.metadata)


def progress_of(state: Mapping[str, Any], key: mx.array) -> Progress:
    """The inverse of `state_of`, after JSON, which has no NaN.

    Raises:
        ValueError, TypeError, AttributeError: no run wrote this state.
    """
    window = {**state.get("window", {})}
    metrics = {name: _metric(values) for name, values in window.pop("metrics", {}).items()}
    progress = Progress(**{**state, "window": Window(metrics, **window)}, key=key)  # type: ignore[arg-type]
    counts = [progress.step, progress.tokens, progress.waited, progress.skipped]
    counts += [progress.window.steps, progress.window.skipped, progress.window.tokens]
    if not all(type(count) is int and 0 <= count < 1 << 53 for count in counts):
        raise ValueError("step, tokens, waited, skipped and those of the window must be counts")
    numbers = [progress.window.learning_rate, progress.window.seconds_waited, progress.window.seconds_stepped]
    if not all(map(_is_number, numbers)) or not (progress.best is None or _is_number(progress.best)):
        raise ValueError("best, learning_rate and seconds must be numbers")
    if not isinstance(progress.stop, str) or "step" not in state:
        raise ValueError("stop must be a text, and there must be a step")
    if not (isinstance(progress.owed, list) and all(isinstance(name, str) for name in progress.owed)):
        raise ValueError("owed must be names of hooks")
    check_states(progress.rounding)
    return progress


def _metric(values: Mapping[str, Any]) -> Pooled:
    known: dict[str, Any] = {name: nan if value is None else value for name, value in values.items()}
    metric = Pooled(**known)
    numbers = (metric.count, metric.value, metric.squares)
    if metric.statistic not in get_args(Statistic) or not all(map(_is_number, numbers)) or not math.isfinite(metric.count):
        raise ValueError("a metric of the window must have a statistic, a count and numbers")
    return metric


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
