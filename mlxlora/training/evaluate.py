"""Means over a whole split, pooled: every row counts, and every token has the same weight."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..batch import Batch
from ..data.batching import MicroBatch
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
                for pooled, part in zip((total, count), parts, strict=True):
                    pooled.update({name: pooled[name] + float(np.array(value)) for name, value in part.items()})
        everyone = ranks.totals(*total.values(), *count.values())
        halves = everyone[: len(names)], everyone[len(names) :]
        means = {name: t / max(c, 1) for name, t, c in zip(names, *halves, strict=True)}
        return _with_loss(objective, means)

    return evaluate


def mean_measures(micros: Iterable[MicroBatch], ranks: Ranks = ALONE) -> dict[str, float]:
    """Means over the rows of all ranks of the metrics of the micro-batches; the loss is the negative reward."""
    total: dict[str, float] = {}
    count = 0
    for micro in micros:
        count += len(micro.rows)
        total = {name: total.get(name, 0.0) + value * len(micro.rows) for name, value in micro.metrics.items()}
    names = ranks.of_rank0(list(total))
    *sums, rows = ranks.totals(*(total[name] for name in names), count)
    means = {name: value / max(rows, 1) for name, value in zip(names, sums, strict=True)}
    return {"loss": -means["reward"], **means}


def _with_loss(objective: Objective, means: dict[str, float]) -> dict[str, float]:
    loss = sum(c * means[t.name] for c, t in objective.terms)
    perplexity = {"perplexity": _exp(means["nll"])} if "nll" in means else {}
    return {"loss": loss, **means, **perplexity}


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
