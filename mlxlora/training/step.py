"""One optimizer step, the same for every objective."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from attrs import define, frozen
from mlx.utils import tree_flatten, tree_map

from ..batch import Batch
from ..data.pooled import Pooled
from ..distributed.ranks import ALONE, Ranks
from ..models.distribution import COLUMNS
from ..models.logprobs import Scorer, scorer
from ..models.modes import compute_cast, computing
from ..objectives.objective import Metrics, Objective
from .optimizers import put_state
from .trainable import Trained


class LazyResult(NamedTuple):
    """What a step will have measured, as arrays that may not be computed yet.

    Attributes:
        metrics: the mean of every term, loss, grad_norm, learning_rate, skipped.
        counts: [terms], what the mean of each term is taken over, in the order of the objective.
    """

    metrics: Metrics
    counts: mx.array


@frozen
class StepResult:
    """What a step measured.

    Attributes:
        numbers: as `LazyResult.metrics`.
        counts: what the mean of each metric is taken over, for terms that are metrics; those of the loss count once a step.
    """

    numbers: dict[str, float]
    counts: dict[str, float]

    @property
    def skipped(self) -> bool:
        """Whether the step changed nothing."""
        return bool(self.numbers["skipped"])

    @property
    def learning_rate(self) -> float:
        """That of this step."""
        return self.numbers["learning_rate"]

    @property
    def metrics(self) -> dict[str, Pooled]:
        """The means with what they are taken over: over several steps the loss is the mean of their losses, and the sum of its
        terms; metrics are pooled, so that steps without rows of a metric do not count."""
        means = {name: value for name, value in self.numbers.items() if name not in ("skipped", "learning_rate")}
        return {name: Pooled.mean(value, self.counts.get(name, 1.0)) for name, value in means.items()}


@define
class Step:
    """`step(*batches) -> metrics` updates the model once; several batches are the micro-batches of one large batch.

    Every mean is taken over the pooled count of its term, so the update does not depend on how the rows are divided. `idle` is
    any batch: a rank with fewer batches than others computes it to help them gather their slices of parameters. A step whose
    loss, gradient or new weights are not finite is skipped: weights and optimizer, with its step count, stay as they were.

    Attributes:
        whole: forward, backward and update of one batch.
        backward: forward and backward of one of several batches.
        update: applies a gradient, in place.
        objective: what to minimize.
        state: arrays that a step changes.
        trained: the trainable parameters, as the optimizer sees them.
        compilations: shapes traced so far.
        ranks: the processes that take this step together, each with its share of the batches; a share may be empty.
    """

    whole: Callable[[Batch], LazyResult]
    backward: Callable[..., Any]
    update: Callable[[Any, Metrics], Metrics]
    objective: Objective
    state: list[Any]
    trained: Trained
    compilations: int = 0
    ranks: Ranks = ALONE

    def __call__(self, *batches: Batch, idle: Batch | None = None) -> Metrics:
        result = self.begin(*batches, idle=idle)
        with self.ranks.computing():
            mx.eval(self.state, result)
        return result.metrics

    def begin(self, *batches: Batch, idle: Batch | None = None) -> LazyResult:
        """Dispatches the step without waiting; the metrics and the new weights in the model are lazy."""
        self.trained.pull()
        result = self.whole(batches[0]) if len(batches) == 1 and self.ranks.size == 1 else self._in_parts(batches, idle)
        with self.ranks.computing():
            mx.async_eval(self.trained.master_weights, result)
            self.trained.push()  # while the device works
            mx.async_eval(self.state)
        return result

    def ended(self, result: LazyResult, *, whole: bool = True) -> StepResult:
        """The result of `begin` as numbers; `whole` also waits for weights and optimizer, and for any step begun since."""
        with self.ranks.computing():
            mx.eval(result, *([self.state] if whole else []))
        counts = zip(self.objective.terms, result.counts.tolist(), strict=True)  # type: ignore[arg-type]
        watched = {term.name: count for (coefficient, term), count in counts if not coefficient}
        return StepResult({name: float(np.array(value)) for name, value in result.metrics.items()}, watched)

    def measured(self, *batches: Batch, idle: Batch | None = None) -> dict[str, float]:
        """The whole step, with metrics as numbers."""
        return self.ended(self.begin(*batches, idle=idle)).numbers

    def _in_parts(self, batches: Sequence[Batch], idle: Batch | None) -> LazyResult:
        with self.ranks.own_rng():
            counts = self.ranks.summed(reduce(_add, map(self.objective.counts, batches)) if batches else self._zeros())
            total = None
            for batch, over in self._passes(batches, counts, idle):
                part = self.backward(batch, over)
                total = part if total is None else _add(total, part)
                with self.ranks.computing():
                    mx.eval(total)  # holds the activations of one micro-batch at a time
            gradient, metrics = total or self._nothing()
            if self.ranks.sharded:  # the gradient of a slice is a sum already
                return LazyResult(self.update(gradient, self.ranks.summed(metrics)), stacked(counts))
            total = self.ranks.summed((gradient, metrics))
        return LazyResult(self.update(*total), stacked(counts))

    def _passes(self, batches: Sequence[Batch], counts: Metrics, idle: Batch | None) -> list[tuple[Batch, Metrics]]:
        """Each batch with its counts; ranks that gather slices pass through the model equally often, so some passes are idle."""
        passes = [(batch, counts) for batch in batches]
        if not self.ranks.sharded or idle is None:
            return passes
        missing = max(self.ranks.listed([len(passes)])) - len(passes)
        nothing = tree_map(lambda count: mx.full(count.shape, mx.inf), counts)  # makes every mean and its gradient 0
        return passes + [(idle, nothing)] * missing

    def _zeros(self) -> Metrics:
        return {term.name: mx.array(0.0) for _, term in self.objective.terms}

    def _nothing(self) -> tuple[Any, Metrics]:
        """Gradient and metrics of a rank without batches."""
        return tree_map(mx.zeros_like, self.trained.master_weights), {"loss": mx.array(0.0), **self._zeros()}


def make_step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    objective: Objective,
    *,
    score: Scorer | None = None,
    max_grad_norm: float = 0.0,
    ranks: Ranks = ALONE,
) -> Step:
    """Compiles `objective` into a step that trains the trainable parameters of `model`.

    Args:
        model: an mlx-lm model; all other parameters are frozen.
        optimizer: updates the trainable parameters.
        objective: what to minimize.
        score: log-probabilities of a batch; None: a scorer of the model with what the objective needs.
        max_grad_norm: clips the global norm of the gradient to this; 0 = off.
        ranks: the processes that take the steps together.

    Returns:
        A step. Its metrics are the mean of every term, `loss`, `grad_norm` (before clipping), `learning_rate` and `skipped` (1 for
        a skipped step, else 0).
    """
    score = score or scorer(model, columns=columns_of(objective))
    trained = Trained(model, optimizer)
    state = [model.state, optimizer.state, mx.random.state, trained.master_weights]
    compiled = partial(mx.compile, inputs=state, outputs=state)
    cast = compute_cast(model)

    def gradient(batch: Batch, counts: Metrics) -> tuple[Any, Metrics]:
        step.compilations += 1  # this line runs when a new shape is traced

        def loss(parameters: Any) -> tuple[mx.array, Metrics]:
            model.update(parameters)
            return objective(*score(batch), counts)

        with computing(model, trained.unpack(cast(trained.master_weights))) as parameters:
            (_, metrics), grads = mx.value_and_grad(loss)(parameters)
        return tree_map(lambda g, p: g.astype(p.dtype), trained.pack(grads), trained.master_weights), metrics

    def apply(grads: Any, metrics: Metrics) -> Metrics:
        grads, norm = _clipped(grads, max_grad_norm, ranks)
        before = tree_map(lambda leaf: leaf, [trained.master_weights, optimizer.state])  # new containers
        master_weights = optimizer.apply_gradients(grads, trained.master_weights)
        good = mx.isfinite(metrics["loss"]) & mx.isfinite(norm) & (ranks.pooled(_broken(master_weights, before[0]), norm) == 0)
        now = tree_map(partial(mx.where, good), [master_weights, optimizer.state], before)
        put_state([trained.master_weights, optimizer.state], now)
        return {**metrics, "grad_norm": norm, "learning_rate": optimizer.learning_rate, "skipped": ~good}

    @compiled
    def whole(batch: Batch) -> LazyResult:
        counts = objective.counts(batch)
        return LazyResult(apply(*gradient(batch, counts)), stacked(counts))

    step = Step(whole, compiled(gradient), compiled(apply), objective, state, trained, ranks=ranks)
    return step


def stacked(counts: Metrics) -> mx.array:
    """[terms], one array because mx.compile raises IndexError for equal outputs (mlx 0.32.4)."""
    return mx.stack(list(counts.values()))


def columns_of(objective: Objective) -> dict[str, bool]:
    """The columns that a scorer has to compute for an objective; True: it optimizes one, so the column needs a gradient."""
    return {name: name in objective.optimizes for name in COLUMNS if name in objective.needs}


def _clipped(grads: Any, max_grad_norm: float, ranks: Ranks) -> tuple[Any, mx.array]:
    """(gradient, its global norm before clipping)."""
    norm = mx.sqrt(ranks.pooled(sum(_sum_of_squares(g) for _, g in tree_flatten(grads))))  # type: ignore[arg-type]
    if not max_grad_norm:
        return grads, norm
    scale = mx.minimum(1.0, max_grad_norm / (norm + 1e-6))
    return tree_map(lambda g: (g * scale).astype(g.dtype), grads), norm


def _broken(now: Any, before: Any) -> mx.array:
    """How many arrays have a number that was finite and no longer is."""
    intact = tree_map(lambda a, b: (mx.isfinite(a) | ~mx.isfinite(b)).all(), now, before)
    return (~mx.stack([leaf for _, leaf in tree_flatten(intact)])).sum()  # type: ignore[arg-type]


def _sum_of_squares(g: mx.array, block: int = 512) -> mx.array:
    """In float32 and in blocks, because a CPU adds numbers one after the other, which loses precision in long vectors."""
    squares = mx.square(g.astype(mx.float32).reshape(-1))
    whole = squares.size // block * block
    return squares[:whole].reshape(-1, block).sum(axis=-1).sum() + squares[whole:].sum()


def _add(a: Any, b: Any) -> Any:
    return tree_map(mx.add, a, b)
