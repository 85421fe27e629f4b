"""Scores: how good the policy thinks each completion is, (logps [N], batch) -> [S].

The functions at the end turn one score into another and compose: `per_token(transformed(log_ratio, power(-1.0)))`.
"""

import mlx.core as mx

from ..batch import Batch, column, halves, token_offsets, token_sum
from ..errors import InputError
from .links import Link
from .numerics import log1mexp
from .quantity import Quantity, reads

Score = Quantity


def per_token(of: Score) -> Score:
    """The score divided by |y|, the completion's number of tokens."""
    return reads(*of.needs)(lambda logps, batch: of(logps, batch) / mx.maximum(batch.lengths, 1))


@reads()
def sum_logps(logps: mx.array, batch: Batch) -> mx.array:
    """log π(y|x) (CPO, SLiC)."""
    return token_sum(logps, batch)


@reads("ref_logps")
def log_ratio(logps: mx.array, batch: Batch) -> mx.array:
    """log π(y|x) - log π_ref(y|x) (DPO)."""
    return token_sum(logps - column(batch, "ref_logps"), batch)


@reads()
def mean_logps(logps: mx.array, batch: Batch) -> mx.array:
    """log π(y|x) / |y| (SimPO)."""
    return per_token(sum_logps)(logps, batch)


@reads("ref_logps")
def mean_log_ratio(logps: mx.array, batch: Batch) -> mx.array:
    """`log_ratio` / |y| (IPO, as its authors run it)."""
    return per_token(log_ratio)(logps, batch)


@reads("reference_point", "ref_logps")
def above_reference_point(logps: mx.array, batch: Batch) -> mx.array:
    """`log_ratio` - z, z the divergence of the whole policy from the reference, a constant (KTO)."""
    return log_ratio(logps, batch) - column(batch, "reference_point")


@reads("ref_logps")
def sorted_differences(logps: mx.array, batch: Batch) -> mx.array:
    """[2P]: sort(log π_c - log π_r), then sort(log ref_c - log ref_r), each over the pairs of the batch.

    Their difference is AOT's (Melnyk et al., 2024, https://arxiv.org/abs/2406.05882).
    """
    (c, r), (ref_c, ref_r) = (halves(token_sum(values, batch)) for values in (logps, column(batch, "ref_logps")))
    return mx.concatenate([_ascending(c - r), _ascending(ref_c - ref_r)])


@reads()
def log_odds(logps: mx.array, batch: Batch) -> mx.array:
    """log p/(1 - p), p = π(y|x)^(1/|y|) (ORPO, eq. 4)."""
    log_p = mean_logps(logps, batch)
    return log_p - log1mexp(log_p)


# --- scores from scores ---------------------------------------------------------------------


def sorted_halves(of: Score) -> Score:
    """Chosen scores in ascending order, then rejected ones: pairs by rank (unpaired AOT, https://arxiv.org/abs/2406.05882)."""

    def values(logps: mx.array, batch: Batch) -> mx.array:
        c, r = halves(of(logps, batch))
        return mx.concatenate([_ascending(c), _ascending(r)])

    return reads(*of.needs)(values)


def length_desensitized(of: Score, *, alpha: float | None) -> Score:
    """Tokens past the shorter completion of their pair weigh α, in policy and reference.

    LD-DPO (Liu et al., 2024, https://arxiv.org/abs/2409.06411). None leaves the score as it is, which is what α = 1 computes.

    Raises:
        InputError: α is not in [0, 1].
    """
    if alpha is None:
        return of
    if not 0 <= alpha <= 1:
        raise InputError(f"ld_alpha must be in [0, 1], got {alpha}")

    def values(logps: mx.array, batch: Batch) -> mx.array:
        shared = mx.minimum(*halves(batch.lengths))
        limit = mx.concatenate([shared, shared, mx.zeros((1,), shared.dtype)])[batch.sequence]  # 0 for bucket filler
        weight = mx.where(token_offsets(batch) < limit, 1.0, alpha)
        ref = None if batch.ref_logps is None else batch.ref_logps * weight
        return of(logps * weight, batch._replace(ref_logps=ref))

    return reads(*of.needs)(values)


def transformed(of: Score, link: Link) -> Score:
    """`link` of each score: the reward that another divergence than reverse KL implies."""
    return reads(*of.needs)(lambda logps, batch: link(of(logps, batch)))


def _ascending(scores: mx.array) -> mx.array:
    return scores[mx.argsort(mx.stop_gradient(scores))]
