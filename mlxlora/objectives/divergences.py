"""Divergences between two distributions over the vocabulary."""

import math
from collections.abc import Callable

import mlx.core as mx

from ..errors import InputError
from .numerics import row_sums

Divergence = Callable[[mx.array, mx.array], mx.array]
"""(log p [n, V] of the teacher, log q [n, V] of the policy) -> [n], nats."""


def forward_kl(teacher: mx.array, policy: mx.array) -> mx.array:
    """KL(p || q) = Σ p·(log p - log q): the policy covers whatever the teacher may say (Hinton et al., 2015, 1503.02531).

    >>> half, sure = mx.log(mx.array([[0.5, 0.5]])), mx.log(mx.array([[0.25, 0.75]]))
    >>> round(forward_kl(half, sure).item(), 4), round(forward_kl(sure, half).item(), 4)
    (0.1438, 0.1308)
    """
    return row_sums(mx.exp(teacher) * (teacher - policy))


def reverse_kl(teacher: mx.array, policy: mx.array) -> mx.array:
    """KL(q || p): the policy avoids what the teacher would not say (Gu et al., 2023, https://arxiv.org/abs/2306.08543)."""
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
