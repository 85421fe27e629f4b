"""Knowledge distillation: how far the policy's distribution at each scored token is from a teacher's, over the whole vocabulary.

A column of the batch that the scorer adds, with its gradient; it goes through the head in chunks, as log-probabilities do,
so that nothing of size [N, V] is kept.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import asdict, frozen

from .adapters import freeze
from .errors import InputError
from .logprobs import Scorer, scorer
from .modes import evaluating
from .types import Batch

Divergence = Callable[[mx.array, mx.array], mx.array]
"""(log p [n, V] of the teacher, log q [n, V] of the policy) -> [n], nats."""


def forward_kl(teacher: mx.array, policy: mx.array) -> mx.array:
    """KL(p || q) = Σ p·(log p - log q): the policy covers all that the teacher might say (Hinton et al., 2015, 1503.02531).

    >>> half, sure = mx.log(mx.array([[0.5, 0.5]])), mx.log(mx.array([[0.25, 0.75]]))
    >>> round(forward_kl(half, sure).item(), 4), round(forward_kl(sure, half).item(), 4)
    (0.1438, 0.1308)
    """
    return (mx.exp(teacher) * (teacher - policy)).sum(axis=-1)


def reverse_kl(teacher: mx.array, policy: mx.array) -> mx.array:
    """KL(q || p): the policy says nothing that the teacher would not (Gu et al., 2023, https://arxiv.org/abs/2306.08543)."""
    return forward_kl(policy, teacher)


def jensen_shannon(beta: float) -> Divergence:
    """β·KL(p || m) + (1-β)·KL(q || m), m = βp + (1-β)q (GKD, Agarwal et al., 2023, https://arxiv.org/abs/2306.13649)."""
    if not 0 < beta < 1:
        raise InputError(f"--jsd-beta must be between 0 and 1, got {beta}")

    def divergence(teacher: mx.array, policy: mx.array) -> mx.array:
        mixture = mx.logaddexp(teacher + math.log(beta), policy + math.log1p(-beta))
        return beta * forward_kl(teacher, mixture) + (1 - beta) * forward_kl(policy, mixture)

    return divergence


DIVERGENCES: dict[str, Callable[[float], Divergence]] = {
    "forward_kl": lambda _: forward_kl,
    "reverse_kl": lambda _: reverse_kl,
    "jsd": jensen_shannon,
}


@frozen(eq=False, kw_only=True)
class TaughtScorer(Scorer):
    """A scorer whose batches have `divergence` [N] too, with its gradient.

    Attributes:
        teacher: reads the same tokens; nothing of it is trained.
        measure: (teacher's, policy's log-probabilities) -> divergence.
    """

    teacher: Scorer
    measure: Divergence

    def __call__(self, batch: Batch, *, gradient: bool = True) -> tuple[mx.array, Batch]:
        taught = mx.stop_gradient(self.teacher.hidden(batch))

        def inner(hidden: mx.array, rows: mx.array) -> mx.array:
            teacher = self.teacher.logits(taught[rows]).astype(mx.float32)
            policy = self.logits(hidden).astype(mx.float32)
            known = min(teacher.shape[-1], policy.shape[-1])  # what exceeds it is padding of one of the two
            p, q = (z - mx.logsumexp(z, axis=-1, keepdims=True) for z in (teacher[:, :known], policy[:, :known]))
            logps = mx.take_along_axis(policy, batch.targets[rows][:, None], axis=-1)[:, 0] - mx.logsumexp(policy, axis=-1)
            return mx.stack([logps, self.measure(mx.stop_gradient(p), q)])

        scores = self._head(inner, gradient)(self.hidden(batch), mx.arange(batch.where.size))
        logps, divergence = mx.where(batch.sequence < batch.sequences, scores, 0.0)
        return logps, batch._replace(divergence=divergence)


def taught(score: Scorer, teacher: nn.Module, measure: Divergence) -> TaughtScorer:
    """`score` with a teacher; its chunks are half as large, for they hold two distributions."""
    freeze(teacher).eval()
    with evaluating(teacher):
        other = scorer(teacher, temperature=score.temperature)
    mx.eval(teacher.parameters())
    fields: dict[str, Any] = asdict(score, recurse=False) | {"entropy": True, "chunk": max(score.chunk // 2, 32)}
    return TaughtScorer(**fields, teacher=other, measure=measure)  # entropy: a second score that has a gradient
