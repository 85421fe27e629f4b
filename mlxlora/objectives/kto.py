"""Kahneman-Tversky optimization: completions that are good or bad on their own."""

import mlx.core as mx

from ..batch import Batch, column
from ..errors import choose
from .losses import one_minus_value
from .objective import NOTHING, Objective, per_sequence, watch
from .quantity import reads
from .scores import Score, above_reference_point, log_ratio, sum_logps
from .terms import judgment, watch_labels

KTO_SCORES: dict[str, Score] = {"kto": above_reference_point, "apo_zero_unpaired": log_ratio}


@reads("reference_point")
def reference_point(logps: mx.array, batch: Batch) -> mx.array:
    """[S]: KTO's z, nats."""
    return column(batch, "reference_point")


def kto(*, loss_type: str = "kto", beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """λ_D·(1 - σ(β(l - z))) of desirable, λ_U·(1 - σ(β(z - l))) of undesirable completions, l = log π/π_ref.

    Kahneman-Tversky optimization (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306), the mean over
    completions; z is `batch.reference_point`. `apo_zero_unpaired` has z = 0.

    Args:
        loss_type: a name of `KTO_SCORES`.
        desirable_weight: λ_D.
        undesirable_weight: λ_U; λ_D·desirable rows should be 1 to 4/3 of λ_U·undesirable rows.

    Raises:
        InputError: unknown loss type.
    """
    score = choose(KTO_SCORES, loss_type, "loss-type")
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return (
        judgment(score, one_minus_value(beta=beta), name=loss_type, **weights)
        + (watch("kl", reference_point, per_sequence) if "reference_point" in score.needs else NOTHING)
        + watch_labels("rewards", log_ratio, scale=beta)
        + watch_labels("logps", sum_logps)
    )
