"""The terms of the policy gradient: what an advantage does to the log-probabilities of sampled tokens.

ρ = π/π_old is the importance ratio, A the advantage of the completion. Without `batch.old_logps` the policy itself
sampled: ρ is 1 and keeps its gradient.
"""

import mlx.core as mx
from attrs import frozen

from ..batch import Batch, column, completions, token_sum
from ..errors import InputError
from .numerics import safe_exp, safe_expm1
from .objective import Objective, Reduction, by_token, sequence_mean, term, token_mean, watch
from .quantity import Function, Quantity, needs_of, reads

# --- importance ratios ------------------------------------------------------------------------


@frozen(slots=False)
class Ratio(Quantity):
    """An importance ratio, [N].

    Attributes:
        per: the mean of its metrics: over tokens, or over sequences where each has one ratio.
    """

    per: Reduction = token_mean


def _log_ratio(logps: mx.array, batch: Batch) -> mx.array:
    return logps - (mx.stop_gradient(logps) if batch.old_logps is None else batch.old_logps)


def _mean_log_ratio(logps: mx.array, batch: Batch) -> mx.array:
    means = token_sum(_log_ratio(logps, batch), batch) / mx.maximum(batch.lengths, 1)
    return by_token(means, batch)


token_ratio = Ratio(lambda logps, batch: safe_exp(_log_ratio(logps, batch)), per=token_mean)
"""π(y_t)/π_old(y_t) (PPO, GRPO)."""

sequence_ratio = Ratio(lambda logps, batch: safe_exp(_mean_log_ratio(logps, batch)), per=sequence_mean)
"""(π(y)/π_old(y))^(1/|y|) for every token of y (GSPO, Zheng et al., 2025, https://arxiv.org/abs/2507.18071)."""


# --- surrogates -------------------------------------------------------------------------------


def clipped_surrogate(
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    ratio: Ratio = token_ratio,
    per: Reduction = token_mean,
    name: str = "policy_loss",
) -> Objective:
    """-min(min(ρ, δ)·A, clip(ρ, 1-ε, 1+ε_high)·A).

    PPO (Schulman et al., 2017, https://arxiv.org/abs/1707.06347, eq. 7) with clip-higher (DAPO, 2503.14476) and
    the upper bound δ for negative advantages (INTELLECT-2, 2505.07291). Watches `clip_ratio/low_mean`,
    `clip_ratio/high_mean` and `clip_ratio/region_mean`, the shares of ratios that get no gradient because of clipping.

    Args:
        epsilon: ratios below 1 - ε get no gradient where A < 0.
        epsilon_high: ratios above 1 + ε_high get none where A > 0; None: ε.
        delta: upper bound of the ratio in the first product; None: no bound.
    """
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)

    def capped(logps: mx.array, batch: Batch) -> mx.array:
        rho = ratio(logps, batch)
        return rho if delta is None else mx.minimum(rho, delta)

    @reads("advantages")
    def surrogate(logps: mx.array, batch: Batch) -> mx.array:
        advantage = _advantage(batch)
        return -mx.minimum(capped(logps, batch) * advantage, mx.clip(ratio(logps, batch), low, high) * advantage)

    @reads("advantages")
    def below(logps: mx.array, batch: Batch) -> mx.array:
        return (capped(logps, batch) < low) & (_advantage(batch) < 0)

    @reads("advantages")
    def above(logps: mx.array, batch: Batch) -> mx.array:
        return (capped(logps, batch) > high) & (_advantage(batch) > 0)

    @reads("advantages")
    def outside(logps: mx.array, batch: Batch) -> mx.array:
        return below(logps, batch) | above(logps, batch)

    shares = ratio.per(completions)
    return (
        term(name, surrogate, per(completions))
        + watch("clip_ratio/low_mean", below, shares)
        + watch("clip_ratio/high_mean", above, shares)
        + watch("clip_ratio/region_mean", outside, shares)
    )


def cispo_surrogate(
    *, cap: float = 1.2, ratio: Ratio = token_ratio, per: Reduction = token_mean, name: str = "policy_loss"
) -> Objective:
    """-sg(min(ρ, cap))·A·log π (MiniMax-M1, 2025, https://arxiv.org/abs/2506.13585).

    Watches `cispo_clip_ratio`, the share of ratios above the cap where A > 0.
    """

    def weight(logps: mx.array, batch: Batch) -> mx.array:
        return mx.minimum(ratio(logps, batch), cap)

    @reads("advantages")
    def clipped(logps: mx.array, batch: Batch) -> mx.array:
        return (ratio(logps, batch) > cap) & (_advantage(batch) > 0)

    shares = ratio.per(completions)
    return reinforce(weight, per=per, name=name) + watch("cispo_clip_ratio", clipped, shares)


def sapo_surrogate(
    *,
    temperatures: tuple[float, float] = (1.0, 1.05),
    ratio: Ratio = token_ratio,
    per: Reduction = sequence_mean,
    name: str = "policy_loss",
) -> Objective:
    """-σ(τ(ρ - 1))·4/τ·A, a soft clip (SAPO, Gao et al., 2025, https://arxiv.org/abs/2511.20347).

    Args:
        temperatures: τ where A > 0, and elsewhere.
    """

    @reads("advantages")
    def values(logps: mx.array, batch: Batch) -> mx.array:
        advantage = _advantage(batch)
        tau = mx.where(advantage > 0, *temperatures)
        return -mx.sigmoid(tau * (ratio(logps, batch) - 1)) * 4 / tau * advantage

    return term(name, values, per(completions))


def vespo_surrogate(
    *,
    exponents: tuple[tuple[float, float], tuple[float, float]] = ((2.0, 3.0), (3.0, 2.0)),
    per: Reduction = token_mean,
    name: str = "policy_loss",
) -> Objective:
    """-sg(φ(w))·A·log π, φ(w) = w^k·e^{λ(1-w)}, w = π(y)/π_old(y) of the whole completion.

    VESPO (2026, https://arxiv.org/abs/2602.10693). Watches `vespo/phi_seq_mean`, the mean of φ over completions.

    Args:
        exponents: (k, λ) where A >= 0, and where A < 0.
    """

    positive, negative = exponents

    @reads("advantages")
    def phi(logps: mx.array, batch: Batch) -> mx.array:
        log_w = token_sum(mx.clip(_log_ratio(logps, batch), -20.0, 20.0), batch)
        log_w = mx.clip(log_w, -18.420680743952367, 20.0)  # log 1e-8
        k, lam = (mx.where(column(batch, "advantages") >= 0, p, n) for p, n in zip(positive, negative, strict=True))
        return by_token(mx.exp(lam + k * log_w - lam * mx.exp(log_w)), batch)

    shares = sequence_mean(completions)
    return reinforce(phi, per=per, name=name) + watch("vespo/phi_seq_mean", phi, shares)


def reinforce(weight: Function | None = None, *, per: Reduction = token_mean, name: str = "policy_loss") -> Objective:
    """-sg(weight)·A·log π (Williams, 1992), `weight` [N] a function of (logps, batch); None is 1."""

    @reads("advantages", *needs_of(weight))
    def values(logps: mx.array, batch: Batch) -> mx.array:
        scale = _advantage(batch) if weight is None else mx.stop_gradient(weight(logps, batch)) * _advantage(batch)
        return -scale * logps

    return term(name, values, per(completions))


def kl(*, per: Reduction = token_mean, importance_corrected: Ratio | None = None, name: str = "kl") -> Objective:
    """k3 estimate of KL(π || π_ref): r - 1 - log r, r = π_ref/π (Schulman, 2020, http://joschu.net/blog/kl-approx.html).

    Args:
        importance_corrected: multiply by this ratio, with its gradient (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556).
    """

    @reads("ref_logps")
    def k3(logps: mx.array, batch: Batch) -> mx.array:
        log_r = column(batch, "ref_logps") - logps
        estimate = safe_expm1(log_r) - log_r
        return estimate if importance_corrected is None else estimate * importance_corrected(logps, batch)

    return term(name, k3, per(completions))


# --- gates --------------------------------------------------------------------------------------


def high_entropy(share: float) -> Quantity | None:
    """[N] bool: the `share` of the batch's completion tokens whose entropy is highest; None for a share of 1, which is no gate.

    Wang et al., 2025, https://arxiv.org/abs/2506.01939. The threshold is the linearly interpolated quantile.

    Raises:
        InputError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"top_entropy must be in (0, 1], got {share}")

    @reads("entropy")
    def gate(logps: mx.array, batch: Batch) -> mx.array:
        values, real = column(batch, "entropy"), completions(batch)
        ascending = mx.sort(mx.where(real, values, mx.inf))
        at = mx.maximum(real.sum() - 1, 0) * (1 - share)
        below = mx.floor(at).astype(mx.int32)
        low, high = ascending[below], ascending[mx.ceil(at).astype(mx.int32)]
        return values >= mx.where(high > low, low + (high - low) * (at - below), low)

    return gate if share < 1 else None


def on_policy(threshold: float | None) -> Quantity | None:
    """[N] bool: false for completions with A < 0 and mean(log π_old - log π) > threshold (nats); None for no threshold, no gate.

    Off-policy sequence masking (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556).
    """

    if threshold is None:
        return None

    @reads("advantages")
    def gate(logps: mx.array, batch: Batch) -> mx.array:
        return (_advantage(batch) >= 0) | (-_mean_log_ratio(logps, batch) <= threshold)

    return gate


def _advantage(batch: Batch) -> mx.array:
    """[N]: each token has its completion's advantage."""
    return by_token(column(batch, "advantages"), batch)
