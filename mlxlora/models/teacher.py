"""Knowledge distillation: the divergence of the policy's distribution from a teacher's, over the whole vocabulary.

The scorer adds it as a column of the batch, with its gradient. Both heads run in chunks, as for log-probabilities, so nothing of
size [N, V] is kept.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import asdict, frozen

from ..batch import Batch
from ..objectives.divergences import Divergence
from .distribution import statistics
from .logprobs import Scorer, scorer
from .modes import evaluating, freeze
from .normalize import log_softmax


@frozen(eq=False, kw_only=True)
class TeacherScorer(Scorer):
    """A scorer whose batches have `divergence` [N] too, with its gradient.

    Attributes:
        teacher: reads the same tokens and is not trained.
        measure: (teacher's, policy's log-probabilities) -> divergence.
    """

    teacher: Scorer
    measure: Divergence

    def __call__(self, batch: Batch, *, gradient: bool = True) -> tuple[mx.array, Batch]:
        of_teacher = mx.stop_gradient(self.teacher.hidden(batch))

        def inner(hidden: mx.array, rows: mx.array) -> mx.array:
            logits = self.logits(hidden)
            logps, *columns = statistics(logits, batch.targets[rows], self.columns)
            both = self.teacher.logits(of_teacher[rows]), logits
            known = min(z.shape[-1] for z in both)  # a larger vocabulary is padded
            p, q = (log_softmax(z.astype(mx.float32)[:, :known]) for z in both)
            return mx.stack([logps, self.measure(mx.stop_gradient(p), q), *columns])

        scores = self._head(inner, gradient)(self.hidden(batch), mx.arange(batch.positions.size))
        return self._filled(batch, scores, ("divergence",))

    @property
    def others(self) -> dict[str, int]:
        """See `Scorer`."""
        return {"the teacher": self.teacher.vocabulary}

    @property
    def kinds(self) -> int:
        """How many scores have a gradient, the divergence among them."""
        return 2 + sum(self.columns.values())


def with_teacher(score: Scorer, teacher: nn.Module, measure: Divergence) -> TeacherScorer:
    """`score` with a teacher; its chunks are half as large, because they hold two distributions."""
    freeze(teacher).eval()
    with evaluating(teacher):
        other = scorer(teacher, temperature=score.temperature)
    mx.eval(teacher.parameters())
    fields: dict[str, Any] = asdict(score, recurse=False) | {"chunk": max(score.chunk // 2, 32)}
    return TeacherScorer(**fields, teacher=other, measure=measure)
