"""Objectives are weighted sums of named means, and they add: `nll() + 0.1 * kl()`."""

from collections.abc import Callable

import mlx.core as mx
from attrs import field, frozen

from ..batch import Batch, completions
from .quantity import Function, Quantity, quantity

Weights = Callable[[Batch], tuple[mx.array, mx.array]]
Selection = Callable[[Batch], mx.array]
Reduction = Callable[[Selection], Weights]
Metrics = dict[str, mx.array]


@frozen
class Term:
    """A named weighted mean: Σ values·weights / count.

    Attributes:
        name: key of the mean among the metrics.
        values: (logps [N], batch) -> [N], [S] or [P]; the only part that sees the policy. It declares the columns of the batch
            that the term needs, those of the weights too.
        weights: batch -> (weights that broadcast to the values, count []); a function of the data alone.
    """

    name: str
    values: Quantity = field(converter=quantity)
    weights: Weights


@frozen
class Objective:
    """Σ coefficient·term. Objectives form a vector space: add them, scale them.

    A term with coefficient 0 is a metric: it is reported and not optimized.
    """

    terms: tuple[tuple[float, Term], ...]

    def __attrs_post_init__(self) -> None:
        names = [t.name for _, t in self.terms]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"terms of an objective must have unique names, got {', '.join(twice)} twice; give one a name=")

    def __add__(self, other: "Objective") -> "Objective":
        return Objective(self.terms + other.terms)

    def __sub__(self, other: "Objective") -> "Objective":
        return self + -1.0 * other

    def __rmul__(self, scale: float) -> "Objective":
        return Objective(tuple((scale * c, t) for c, t in self.terms))

    @property
    def needs(self) -> frozenset[str]:
        """Columns of the batch that some term reads."""
        return frozenset().union(*(t.values.needs for _, t in self.terms))

    @property
    def optimizes(self) -> frozenset[str]:
        """Columns that an optimized term may have a gradient through."""
        return frozenset().union(*(t.values.differentiates for c, t in self.terms if c))

    def counts(self, batch: Batch) -> Metrics:
        """Denominator of every term: a function of the data, so that batches and ranks can pool theirs."""
        return {t.name: t.weights(batch)[1].astype(mx.float32) for _, t in self.terms}

    def __call__(self, logps: mx.array, batch: Batch, counts: Metrics | None = None) -> tuple[mx.array, Metrics]:
        """The scalar loss and the mean of every term, over `counts` (this batch's if None)."""
        counts = self.counts(batch) if counts is None else counts
        loss, means = mx.array(0.0), {}
        for coefficient, t in self.terms:
            means[t.name] = weighted_sum(t.values(logps, batch), t.weights(batch)[0]) / mx.maximum(counts[t.name], 1)
            if coefficient:
                loss = loss + coefficient * means[t.name]
        # slices of one array, because mx.compile raises IndexError for two equal outputs, such as those of equal terms (mlx 0.32.4)
        constants = mx.stop_gradient(mx.stack([loss, *means.values()]))
        return loss, dict(zip(["loss", *means], constants, strict=True))


NOTHING = Objective(())
"""The objective without terms: `objective + NOTHING` is the objective."""


def weighted_sum(values: mx.array, weights: mx.array) -> mx.array:
    """Σ values·weights, where a weight of 0 silences even an infinite value, and its gradient.

    >>> weighted_sum(mx.array([1.0, float("inf")]), mx.array([2.0, 0.0])).item()
    2.0
    """
    weights = weights.astype(mx.float32)
    return mx.where(weights != 0, values * weights, 0.0).sum()


def term(name: str, values: Function, weights: Weights) -> Objective:
    """An objective of one term with coefficient 1; see `Term`.

    `values` may be a plain function; `reads` declares the columns that it needs beside the log-probabilities.
    """
    return Objective(((1.0, Term(name, values, weights)),))


def watch(name: str, values: Function, weights: Weights) -> Objective:
    """A metric: a term with coefficient 0."""
    return 0.0 * term(name, values, weights)


# --- how a selection of tokens becomes (weights, count) -----------------------------------


def token_mean(of: Selection = completions) -> Weights:
    """Every selected token weighs the same (SFT; DAPO)."""

    def weights(batch: Batch) -> tuple[mx.array, mx.array]:
        selected = of(batch)
        return selected, selected.sum()

    return weights


def sequence_mean(of: Selection = completions) -> Weights:
    """Every sequence weighs the same, and so does each of its tokens (GRPO): 1/|y| each, over S."""

    def weights(batch: Batch) -> tuple[mx.array, mx.array]:
        per_sequence = 1.0 / mx.maximum(batch.lengths, 1)
        return of(batch) * by_token(per_sequence, batch), sequence_count(batch)

    return weights


def sequence_sum(of: Selection = completions) -> Weights:
    """The mean over sequences of the sum over their tokens (LUSPO)."""
    return lambda batch: (of(batch), sequence_count(batch))


def fixed_length(length: int) -> Reduction:
    """Every sequence is divided by the same `length` (Dr. GRPO)."""
    return lambda of=completions: lambda batch: (of(batch) / length, sequence_count(batch))


def batch_mean(of: Selection = completions) -> Weights:
    """`token_mean` of each batch by itself, then the mean over the batches of a step (BNPO)."""
    return lambda batch: (of(batch) / mx.maximum(of(batch).sum(), 1), mx.array(1))


def per_pair(batch: Batch) -> tuple[mx.array, mx.array]:
    """Every preference pair weighs the same."""
    return mx.array(1.0), mx.array(batch.sequences // 2)


def per_sequence(batch: Batch) -> tuple[mx.array, mx.array]:
    """Every sequence weighs the same, for values [S]."""
    return mx.array(1.0), sequence_count(batch)


def sequence_count(batch: Batch) -> mx.array:
    """S, as an array."""
    return mx.array(batch.sequences)


def by_token(per_sequence: mx.array, batch: Batch) -> mx.array:
    """[S] to [N]: each token gets its sequence's value, bucket filler 0.

    The transpose of `token_sum`, and like it not a gather: its gradient would be a scatter-add.
    """
    member = batch.sequence[None] == mx.arange(batch.sequences)[:, None]
    return mx.where(member, per_sequence[:, None], 0).sum(axis=0)
