"""Means over a whole split, pooled: every row counts, and every token has the same weight."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..batch import Batch
from ..data.batching import MicroBatch
from ..data.pooled import pooled, results
from ..distributed.ranks import ALONE, Ranks
from ..models.logprobs import Scorer
from ..models.modes import evaluating
from ..objectives.objective import Metrics, Objective

Evaluate = Callable[[Iterable[MicroBatch]], dict[str, float]]


def make_evaluate(model: nn.Module, objective: Objective, score: Scorer, ranks: Ranks = ALONE) -> Evaluate:
    """Compiles `evaluate(micro-batches) -> {name: mean}`: for every term, its sum over the micro-batches / its count over them.

    The loss is Σ coefficient·mean of the pooled means; `perplexity` = exp(nll) is added if `nll` is a term. Each of the `ranks`
    sums its own micro-batches, and all get the same means.
    """
    state = [model.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def sums(batch: Batch) -> tuple[Metrics, Metrics]:
        logps, seen = score(batch, gradient=False)
        counts = objective.counts(seen)
        _, means = objective(logps, seen, counts)
        return {name: means[name] * mx.maximum(counts[name], 1) for name in counts}, counts

    def evaluate(micros: Iterable[MicroBatch]) -> dict[str, float]:
        names = [t.name for _, t in objective.terms]
        total: dict[str, float] = dict.fromkeys(names, 0.0)
        count: dict[str, float] = dict.fromkeys(names, 0.0)
        with evaluating(model):
            for micro in micros:
                if micro.is_padding and not ranks.sharded:
                    continue
                parts = sums(micro.batch)
                with ranks.computing():
                    mx.eval(parts)
                if micro.is_padding:
                    continue
                for found, part in zip((total, count), parts, strict=True):
                    found.update({name: found[name] + float(np.array(value)) for name, value in part.items()})
        everyone = ranks.totals(*total.values(), *count.values())
        return _report(objective, everyone[: len(names)], everyone[len(names) :])

    return evaluate


def _report(objective: Objective, totals: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """Loss, means, perplexity; a metric that counts nothing is left out."""
    entries = list(zip(objective.terms, totals, counts, strict=True))
    means = {term.name: total / max(count, 1) for (_, term), total, count in entries}
    loss = sum(coefficient * means[term.name] for coefficient, term in objective.terms)
    reported = {term.name: means[term.name] for (coefficient, term), _, count in entries if coefficient or count}
    perplexity = {"perplexity": _exp(means["nll"])} if "nll" in means else {}
    return {"loss": loss, **reported, **perplexity}


def mean_measures(micros: Iterable[MicroBatch]) -> dict[str, float]:
    """The metrics of the micro-batches, pooled; the loss is the negative mean reward, NaN without rewards.

    The metrics of a micro-batch are those of the rows of all ranks, so all ranks return the same.
    """
    metrics = results(pooled(micro.metrics for micro in micros))
    return {"loss": -metrics.get("reward", math.nan), **metrics}


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
