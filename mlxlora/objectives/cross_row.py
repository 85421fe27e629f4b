"""Which terms of an objective compare the rows of a batch, so that the batch cannot be divided.

Sorting over a batch, a quantile of it and a mean of its own are such comparisons. The objective itself is probed, so that a user's
own objective is covered too: on made-up sequences, a batch must be worth as much as its two parts together.
"""

import mlx.core as mx
import numpy as np

from ..batch import Batch
from .objective import Metrics, Objective

_PAIRS = 8
_LENGTHS = np.array([3, 5, 4, 7, 6, 4, 9, 5, 2, 6, 3, 8, 7, 3, 5, 4])  # of the chosen, then of the rejected
_SCALES = (1.0, 3.0, 10.0)  # of log-probabilities, nats: small ones hide curvature, large ones are clipped
_CLOSE = 1e-5  # relative


def compares_rows(objective: Objective) -> list[str]:
    """The names of the terms that compare rows.

    >>> from mlxlora.objectives.objective import batch_mean, token_mean
    >>> from mlxlora.objectives.terms import nll
    >>> compares_rows(nll(per=token_mean) + nll(per=batch_mean, name="by_batch"))
    ['by_batch']
    """
    pairs = [pair for scale in _SCALES for pair in _means(objective, scale)]
    mx.eval([pair[1:] for pair in pairs])  # at once: waiting for each number takes longer than computing it
    found = {name for name, a, b in pairs if abs(a.item() - b.item()) > _CLOSE * max(abs(a.item()), 1)}
    return [t.name for _, t in objective.terms if t.name in found]


def _means(objective: Objective, scale: float) -> list[tuple[str, mx.array, mx.array]]:
    """Each term's name, its mean over the whole batch, and its mean over the two parts."""
    whole, *two = (_made_up(pairs, scale) for pairs in (range(_PAIRS), range(3), range(3, _PAIRS)))
    counts = _summed(*(objective.counts(batch) for _, batch in two))
    parts = _summed(*(objective(*part, counts)[1] for part in two))
    together = objective(*whole)[1]
    return [(t.name, together[t.name], parts[t.name]) for _, t in objective.terms]


def _summed(a: Metrics, b: Metrics) -> Metrics:
    return {name: a[name] + b[name] for name in a}


def _made_up(pairs: range, scale: float) -> tuple[mx.array, Batch]:
    """(log-probabilities, batch) of some of the pairs; every column is there."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(2 * _PAIRS), _LENGTHS)
    sequences = [*pairs, *(_PAIRS + pair for pair in pairs)]
    kept = np.isin(owner, sequences)

    def by_token(low: float, high: float) -> mx.array:
        return mx.array(rng.uniform(low, high, owner.size)[kept].astype(np.float32))

    def by_sequence(low: float, high: float) -> mx.array:
        return mx.array(rng.uniform(low, high, 2 * _PAIRS)[sequences].astype(np.float32))

    place = {s: i for i, s in enumerate(sequences)}
    sequence = mx.array([place[s] for s in owner[kept].tolist()])
    batch = Batch(
        tokens=mx.zeros((len(sequences), 16), mx.int32),
        positions=mx.zeros(sequence.size, mx.int32),
        targets=mx.zeros(sequence.size, mx.int32),
        sequence=sequence,
        lengths=mx.array(_LENGTHS[sequences]),
        ref_logps=by_token(-2 * scale, 0),
        old_logps=by_token(-2 * scale, 0),
        advantages=by_sequence(-2, 2),
        preference_score=by_sequence(0.5, 1)[: len(pairs)],
        label=by_sequence(-1, 1) > 0,
        reference_point=by_sequence(0, 1),
        from_reference=by_sequence(-1, 1) > 0,
        divergence=by_token(0, 1),
        entropy=by_token(0, 3),
        correct=by_token(0, 1),
        log_sum_sq_probs=by_token(-3, 0),
    )
    return by_token(-2 * scale, 0), batch
