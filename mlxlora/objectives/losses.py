"""Losses of preferences: (scores of the chosen [P], of the rejected [P]) -> [P].

c and r are the scores of a pair, σ is the logistic function, ε label smoothing. The methods in `preference` and `kto` choose the
score that goes with a loss.
"""

import math
from collections.abc import Callable

import mlx.core as mx
from mlx.nn import log_sigmoid

from ..errors import InputError

PairLoss = Callable[[mx.array, mx.array], mx.array]
LabelLoss = Callable[[mx.array, mx.array], mx.array]
"""(scores [S], label [S] bool) -> [S], the loss of a completion that is good or bad on its own."""


def sigmoid(*, beta: float, label_smoothing: float = 0.0, margin: float = 0.0) -> PairLoss:
    """-(1-ε)·log σ(z) - ε·log σ(-z), z = β(c - r) - margin.

    DPO (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, eq. 7), with ε cDPO (Mitchell, 2023), with a margin
    γ SimPO (Meng et al., 2024, https://arxiv.org/abs/2405.14734, eq. 6).

    >>> round(sigmoid(beta=0.1)(mx.array(2.0), mx.array(2.0)).item(), 4)  # log 2
    0.6931
    """
    _smoothing(label_smoothing)

    def loss(c: mx.array, r: mx.array) -> mx.array:
        z = beta * (c - r) - margin
        clean = -log_sigmoid(z)
        return (1 - label_smoothing) * clean - label_smoothing * log_sigmoid(-z) if label_smoothing else clean

    return loss


def hinge(*, beta: float, margin: float = 1.0) -> PairLoss:
    """max(0, margin - β(c - r)) (SLiC, Zhao et al., 2023, https://arxiv.org/abs/2305.10425; RSO, Liu et al., 2023, 2309.06657).

    >>> hinge(beta=0.5)(mx.array([4.0, 1.0]), mx.array([1.0, 1.0])).tolist()
    [0.0, 1.0]
    """
    return lambda c, r: mx.maximum(margin - beta * (c - r), 0)


def ipo(*, beta: float) -> PairLoss:
    """(c - r - 1/(2β))² (Azar et al., 2023, https://arxiv.org/abs/2310.12036, eq. 17; β is its τ).

    >>> ipo(beta=0.25)(mx.array(3.0), mx.array(2.0)).item()
    1.0
    """
    _positive("beta", beta)
    return lambda c, r: mx.square(c - r - 1 / (2 * beta))


def dpop(*, beta: float, penalty: float = 50.0) -> PairLoss:
    """-log σ(β(c - r - λ·max(0, -c))), λ = penalty (Pal et al., 2024, https://arxiv.org/abs/2402.13228).

    >>> round(dpop(beta=0.1, penalty=2.0)(mx.array(-5.0), mx.array(-10.0)).item(), 4)  # -log σ(0.1(5 - 10))
    0.9741
    """
    return lambda c, r: -log_sigmoid(beta * (c - r - penalty * mx.maximum(-c, 0)))


def robust(*, beta: float, label_smoothing: float = 0.0) -> PairLoss:
    """[-(1-ε)·log σ(z) + ε·log σ(-z)] / (1-2ε), z = β(c - r) (Chowdhury et al., 2024, https://arxiv.org/abs/2403.00409)."""
    _smoothing(label_smoothing)

    def loss(c: mx.array, r: mx.array) -> mx.array:
        z = beta * (c - r)
        return (label_smoothing * log_sigmoid(-z) - (1 - label_smoothing) * log_sigmoid(z)) / (1 - 2 * label_smoothing)

    return loss


def exo_pair(*, beta: float, label_smoothing: float) -> PairLoss:
    """KL((σ(z), σ(-z)) || (1-ε, ε)), z = β(c - r) (Ji et al., 2024, https://arxiv.org/abs/2402.00856, eq. 16).

    Raises:
        InputError: ε is 0, where the divergence is infinite, or not below 0.5.
    """
    if label_smoothing <= 0:
        raise InputError(f"exo_pair needs label_smoothing > 0, got {label_smoothing}")
    _smoothing(label_smoothing)
    prior = math.log1p(-label_smoothing), math.log(label_smoothing)

    def loss(c: mx.array, r: mx.array) -> mx.array:
        z = beta * (c - r)
        return mx.sigmoid(z) * (log_sigmoid(z) - prior[0]) + mx.sigmoid(-z) * (log_sigmoid(-z) - prior[1])

    return loss


def nca_pair(*, beta: float) -> PairLoss:
    """-log σ(βc) - ½·log σ(-βc) - ½·log σ(-βr) (Chen et al., 2024, https://arxiv.org/abs/2402.05369)."""
    return lambda c, r: -log_sigmoid(beta * c) - 0.5 * log_sigmoid(-beta * c) - 0.5 * log_sigmoid(-beta * r)


def bco_pair(*, beta: float) -> PairLoss:
    """-log σ(βc) - log σ(-βr) (Jung et al., 2024, https://arxiv.org/abs/2404.04656)."""
    return lambda c, r: -log_sigmoid(beta * c) - log_sigmoid(-beta * r)


def sppo_hard(*, beta: float) -> PairLoss:
    """(c - 1/(2β))² + (r + 1/(2β))² (Wu et al., 2024, https://arxiv.org/abs/2405.00675, eq. 4.7 with hard preferences)."""
    _positive("beta", beta)
    return lambda c, r: mx.square(c - 0.5 / beta) + mx.square(r + 0.5 / beta)


def apo_zero(*, beta: float) -> PairLoss:
    """1 - σ(βc) + σ(βr): chosen up, rejected down (D'Oosterlinck et al., 2024, https://arxiv.org/abs/2408.06266, eq. 7)."""
    return lambda c, r: mx.sigmoid(-beta * c) + mx.sigmoid(beta * r)


def apo_down(*, beta: float) -> PairLoss:
    """σ(βc) + 1 - σ(β(c - r)): both down, rejected further (https://arxiv.org/abs/2408.06266, eq. 8)."""
    return lambda c, r: mx.sigmoid(beta * c) + mx.sigmoid(-beta * (c - r))


def discopop(*, beta: float, tau: float = 0.05) -> PairLoss:
    """-log σ(z)·(1-m) + e^{-z}·m, m = σ(z/τ), z = β(c - r) (Lu et al., 2024, https://arxiv.org/abs/2406.08414, eq. 5).

    e^{-z}·m is computed as exp(log σ(z/τ) - z), which is finite where e^{-z} is not.
    """
    if not 0 < tau <= 1:
        raise InputError(f"discopop needs 0 < tau <= 1, got {tau}")

    def loss(c: mx.array, r: mx.array) -> mx.array:
        z = beta * (c - r)
        return -log_sigmoid(z) * mx.sigmoid(-z / tau) + mx.exp(log_sigmoid(z / tau) - z)

    return loss


def one_minus_value(*, beta: float) -> LabelLoss:
    """1 - σ(βs) of a desirable completion, 1 - σ(-βs) of an undesirable one.

    With s = l - z KTO's (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306, without the weights), with s = l
    unpaired APO-zero's (https://arxiv.org/abs/2408.06266).

    >>> [round(x, 4) for x in one_minus_value(beta=1.0)(mx.array([0.0, 2.0, 2.0]), mx.array([True, True, False])).tolist()]
    [0.5, 0.1192, 0.8808]
    """
    return lambda scores, label: mx.sigmoid(-beta * mx.where(label, scores, -scores))


def _smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing is the share of flipped labels and must be in [0, 0.5), got {label_smoothing}")


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise InputError(f"{name} must be > 0, got {value}")
