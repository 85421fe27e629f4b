"""Knowledge distillation: how far the policy's distribution at each scored token is from a teacher's, over the whole vocabulary.

A column of the batch that the scorer adds, with its gradient; it goes through the head in chunks, as log-probabilities do,
so that nothing of size [N, V] is kept.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import asdict, frozen

from ..batch import Batch
from ..objectives.divergences import Divergence
from .logprobs import Scorer, scorer
from .modes import evaluating, freeze


@frozen(eq=False, kw_only=True)
class TeacherScorer(Scorer):
    """A scorer whose batches have `divergence` [N] too, with its gradient.

    Attributes:
        teacher: reads the same tokens; nothing of it is trained.
        measure: (teacher's, policy's log-probabilities) -> divergence.
    """

    teacher: Scorer
    measure: Divergence

    def __call__(self, batch: Batch, *, gradient: bool = True) -> tuple[mx.array, Batch]:
        with_teacher = mx.stop_gradient(self.teacher.hidden(batch))

        def inner(hidden: mx.array, rows: mx.array) -> mx.array:
            teacher = self.teacher.logits(with_teacher[rows]).astype(mx.float32)
            policy = self.logits(hidden).astype(mx.float32)
            known = min(teacher.shape[-1], policy.shape[-1])  # what exceeds it is padding of one of the two
            p, q = (z - mx.logsumexp(z, axis=-1, keepdims=True) for z in (teacher[:, :known], policy[:, :known]))
            logps = mx.take_along_axis(policy, batch.targets[rows][:, None], axis=-1)[:, 0] - mx.logsumexp(policy, axis=-1)
            return mx.stack([logps, self.measure(mx.stop_gradient(p), q)])

        scores = self._head(inner, gradient)(self.hidden(batch), mx.arange(batch.positions.size))
        logps, divergence = mx.where(batch.sequence < batch.sequences, scores, 0.0)
        return logps, batch._replace(divergence=divergence)


def with_teacher(score: Scorer, teacher: nn.Module, measure: Divergence) -> TeacherScorer:
    """`score` with a teacher; its chunks are half as large, for they hold two distributions."""
    freeze(teacher).eval()
    with evaluating(teacher):
        other = scorer(teacher, temperature=score.temperature)
    mx.eval(teacher.parameters())
    fields: dict[str, Any] = asdict(score, recurse=False) | {"entropy": True, "chunk": max(score.chunk // 2, 32)}
    return TeacherScorer(**fields, teacher=other, measure=measure)  # entropy: a second score that has a gradient
