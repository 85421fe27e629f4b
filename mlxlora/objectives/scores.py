"""How good the policy thinks each completion is: (logps [N], batch) -> [S].

Every score has an attribute `needs`: the columns of the batch it reads. The functions that end this file turn one score
into another: they compose, `per_token(divergence(log_ratio, power(-1.0)))`.
"""

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx
from mlx.nn import log_sigmoid

from ..batch import Batch, column, halves, token_offsets, token_sum
from ..errors import InputError
from .numerics import log1mexp, safe_expm1


class Score(Protocol):
    """A function of log-probabilities, with the columns it reads."""

    needs: tuple[str, ...]

    def __call__(self, logps: mx.array, batch: Batch) -> mx.array: ...


def score(*needs: str) -> Callable[[Callable[[mx.array, Batch], mx.array]], Score]:
    """Marks a function as a score that reads the columns `needs`."""

    def mark(function: Callable[[mx.array, Batch], mx.array]) -> Score:
        function.needs = needs  # type: ignore[attr-defined]
        return function  # type: ignore[return-value]

    return mark


def _mean(sums: mx.array, batch: Batch) -> mx.array:
    return sums / mx.maximum(batch.lengths, 1)


@score()
def sum_logps(logps: mx.array, batch: Batch) -> mx.array:
    """log π(y|x) (CPO, SLiC)."""
    return token_sum(logps, batch)


@score()
def mean_logps(logps: mx.array, batch: Batch) -> mx.array:
    """log π(y|x) / |y| (SimPO)."""
    return _mean(token_sum(logps, batch), batch)


@score("ref_logps")
def log_ratio(logps: mx.array, batch: Batch) -> mx.array:
    """log π(y|x) - log π_ref(y|x) (DPO)."""
    return token_sum(logps - column(batch, "ref_logps"), batch)


@score("ref_logps")
def mean_log_ratio(logps: mx.array, batch: Batch) -> mx.array:
    """`log_ratio` / |y| (IPO, as its authors run it)."""
    return _mean(log_ratio(logps, batch), batch)


@score("ref_logps", "reference_point")
def above_reference_point(logps: mx.array, batch: Batch) -> mx.array:
    """`log_ratio` - z, z the divergence of the whole policy from the reference, a constant (KTO)."""
    return log_ratio(logps, batch) - column(batch, "reference_point")


@score("ref_logps")
def sorted_differences(logps: mx.array, batch: Batch) -> mx.array:
    """[2P]: sort(log π_c - log π_r), then sort(log ref_c - log ref_r), each over the pairs of the batch.

    Their difference is AOT's (Melnyk et al., 2024, https://arxiv.org/abs/2406.05882).
    """
    (c, r), (ref_c, ref_r) = (halves(token_sum(values, batch)) for values in (logps, column(batch, "ref_logps")))
    return mx.concatenate([_ascending(c - r), _ascending(ref_c - ref_r)])


@score()
def log_odds(logps: mx.array, batch: Batch) -> mx.array:
    """log p/(1 - p), p = π(y|x)^(1/|y|) (ORPO, eq. 4)."""
    log_p = mean_logps(logps, batch)
    return log_p - log1mexp(log_p)


# --- scores from scores ---------------------------------------------------------------------


def per_token(of: Score) -> Score:
    """The score divided by |y|, the completion's number of tokens."""
    return score(*of.needs)(lambda logps, batch: _mean(of(logps, batch), batch))


def sorted_halves(of: Score) -> Score:
    """Chosen scores in ascending order, then rejected ones: pairs by rank (unpaired AOT, https://arxiv.org/abs/2406.05882)."""

    def values(logps: mx.array, batch: Batch) -> mx.array:
        c, r = halves(of(logps, batch))
        return mx.concatenate([_ascending(c), _ascending(r)])

    return score(*of.needs)(values)


def length_desensitized(of: Score, *, alpha: float) -> Score:
    """Tokens past the shorter completion of their pair weigh α, in policy and reference.

    LD-DPO (Liu et al., 2024, https://arxiv.org/abs/2409.06411); α = 1 changes nothing.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"ld_alpha must be in [0, 1], got {alpha}")

    def values(logps: mx.array, batch: Batch) -> mx.array:
        shared = mx.minimum(*halves(batch.lengths))
        limit = mx.concatenate([shared, shared, mx.zeros((1,), shared.dtype)])[batch.sequence]  # 0 for bucket filler
        weight = mx.where(token_offsets(batch) < limit, 1.0, alpha)
        ref = None if batch.ref_logps is None else batch.ref_logps * weight
        return of(logps * weight, batch._replace(ref_logps=ref))

    return score(*of.needs)(values)


def transformed(of: Score, link: Callable[[mx.array], mx.array]) -> Score:
    """`link` of each score: the reward that another divergence than reverse KL implies."""
    return score(*of.needs)(lambda logps, batch: link(of(logps, batch)))


def power(alpha: float) -> Callable[[mx.array], mx.array]:
    """l -> (e^{αl} - 1)/α, and l at α = 0.

    On log-ratios it is f-DPO's α-divergence (with α - 1 for α) and forward KL (α = -1) (Wang et al., 2023,
    https://arxiv.org/abs/2309.16240); on log-probabilities AlphaPO's reward (with -α, Gupta et al., 2025,
    https://arxiv.org/abs/2501.03884).

    >>> round(power(-1.0)(mx.array(1.0)).item(), 4)  # 1 - 1/e
    0.6321
    """
    return (lambda scores: scores) if abs(alpha) < 1e-6 else (lambda scores: safe_expm1(alpha * scores) / alpha)


def jensen_shannon(scores: mx.array) -> mx.array:
    """l -> log 2 + log σ(l) (https://arxiv.org/abs/2309.16240)."""
    return 0.6931471805599453 + log_sigmoid(scores)


def _ascending(scores: mx.array) -> mx.array:
    return scores[mx.argsort(mx.stop_gradient(scores))]
