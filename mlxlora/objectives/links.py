"""Links: functions of a score that change the reward which it implies."""

from collections.abc import Callable

import mlx.core as mx
from mlx.nn import log_sigmoid

from .numerics import safe_expm1

Link = Callable[[mx.array], mx.array]
"""Scores [S] -> scores [S]."""


def power(alpha: float) -> Link:
    """l -> (e^{αl} - 1)/α, and l at α = 0.

    On log-ratios: f-DPO's α-divergence (with α - 1 for α) and forward KL (α = -1) (Wang et al., 2023,
    https://arxiv.org/abs/2309.16240). On log-probabilities: AlphaPO's reward (with -α, Gupta et al., 2025,
    https://arxiv.org/abs/2501.03884).

    >>> round(power(-1.0)(mx.array(1.0)).item(), 4)  # 1 - 1/e
    0.6321
    """
    return (lambda scores: scores) if abs(alpha) < 1e-6 else (lambda scores: safe_expm1(alpha * scores) / alpha)


def js_link(scores: mx.array) -> mx.array:
    """l -> log 2 + log σ(l), the Jensen-Shannon divergence of f-DPO (https://arxiv.org/abs/2309.16240)."""
    return 0.6931471805599453 + log_sigmoid(scores)


F_DIVERGENCES: dict[str, Callable[[float], Link]] = {
    "reverse_kl": lambda _: power(0.0),
    "forward_kl": lambda _: power(-1.0),
    "js": lambda _: js_link,
    "alpha": lambda alpha: power(alpha - 1),
}
"""f-DPO's divergences: α -> link."""
