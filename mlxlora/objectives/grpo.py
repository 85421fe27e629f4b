"""Objectives on sampled completions: a surrogate of the policy gradient, its mean, and what is added to it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import choose
from .objective import NOTHING, Objective, Reduction, batch_mean, fixed_length, sequence_mean, sequence_sum, token_mean
from .signature import also_takes
from .surrogates import (
    Ratio,
    cispo_surrogate,
    clipped_surrogate,
    high_entropy,
    kl,
    on_policy,
    reinforce,
    sapo_surrogate,
    sequence_ratio,
    token_ratio,
    vespo_surrogate,
)
from .terms import entropy, gated

IMPORTANCE_LEVELS: dict[str, Ratio] = {"token": token_ratio, "sequence": sequence_ratio}

PolicyLoss = tuple[Callable[[Ratio, Reduction], Objective], Reduction]
"""A surrogate, made from a ratio and a mean, and its mean."""


def policy_losses(
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    cap: float | None = None,
    max_completion_length: int = 256,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    vespo_exponents: tuple[tuple[float, float], tuple[float, float]] = ((2.0, 3.0), (3.0, 2.0)),
) -> dict[str, PolicyLoss]:
    """The losses of GRPO and its relatives by name; `surrogates` has the formulas.

    Args:
        epsilon: ratios below 1 - ε get no gradient where A < 0.
        epsilon_high: ratios above 1 + ε_high get none where A > 0; None: ε.
        delta: upper bound of the ratio where A < 0; None: no bound.
        cap: CISPO's bound of the ratio; None: 1 + ε_high.
        max_completion_length: Dr. GRPO's constant length, tokens.
        sapo_temperatures: SAPO's τ where A > 0, and elsewhere.
        vespo_exponents: VESPO's (k, λ) where A >= 0, and where A < 0.
    """
    high = epsilon if epsilon_high is None else epsilon_high

    def clipped(ratio: Ratio, per: Reduction) -> Objective:
        return clipped_surrogate(epsilon=epsilon, epsilon_high=high, delta=delta, ratio=ratio, per=per)

    def cispo(ratio: Ratio, per: Reduction) -> Objective:
        return cispo_surrogate(cap=1 + high if cap is None else cap, ratio=ratio, per=per)

    return {
        "grpo": (clipped, sequence_mean),
        "bnpo": (clipped, batch_mean),
        "dr_grpo": (clipped, fixed_length(max_completion_length)),
        "dapo": (clipped, token_mean),
        "cispo": (cispo, token_mean),
        "luspo": (clipped, sequence_sum),
        "sapo": (lambda ratio, per: sapo_surrogate(temperatures=sapo_temperatures, ratio=ratio, per=per), sequence_mean),
        "vespo": (lambda ratio, per: vespo_surrogate(exponents=vespo_exponents, per=per), token_mean),
        "reinforce": (lambda ratio, per: reinforce(per=per), sequence_sum),
    }


@also_takes(policy_losses)
def grpo(
    *,
    loss_type: str = "grpo",
    importance_level: str = "token",
    beta: float = 0.1,
    correct_kl: bool = False,
    top_entropy: float = 1.0,
    entropy_coef: float = 0.0,
    off_policy_threshold: float | None = None,
    **options: Any,
) -> Objective:
    """-min(ρA, clip(ρ, 1-ε, 1+ε_high)·A) + β·KL - entropy_coef·entropy on `batch.advantages`.

    Group-relative policy optimization (Shao et al., 2024, https://arxiv.org/abs/2402.03300, eq. 3). `batch.old_logps` may be
    None: then the policy itself sampled. Watches `kl`, `entropy` and the surrogate's clip ratios.

    Args:
        loss_type: a name of `policy_losses`.
        importance_level: one ratio for each `token`, or for each `sequence` (GSPO).
        beta: weight of the KL to `batch.ref_logps`, which is needed only if this is not 0.
        correct_kl: multiply the KL by the importance ratio.
        top_entropy: only this share of tokens, those of highest entropy, gets the surrogate's gradient.
        entropy_coef: weight of the entropy bonus.
        off_policy_threshold: drop completions with A < 0 whose policy drifted further than this (nats per token).
        options: of `policy_losses`: epsilon, epsilon_high, delta, ...

    Raises:
        InputError: an unknown name, or a hyper-parameter outside its range.
    """
    ratio = choose(IMPORTANCE_LEVELS, importance_level, "importance-level")
    surrogate, per = choose(policy_losses(**options), loss_type, "loss-type")
    divergence = partial(kl, importance_corrected=ratio if correct_kl else None)
    return (
        gated(surrogate(ratio, per), high_entropy(top_entropy), on_policy(off_policy_threshold))
        + (beta * divergence(per=per, name="kl_penalty") + 0.0 * divergence() if beta else NOTHING)
        - (entropy_coef * entropy(name="entropy_bonus") if entropy_coef else NOTHING)
        + 0.0 * entropy()
    )


@also_takes(grpo, but=("importance_level",))
def gspo(*, epsilon: float = 3e-4, epsilon_high: float = 4e-4, beta: float = 0.0, **options: Any) -> Objective:
    """One clipped ratio per completion (Zheng et al., 2025, https://arxiv.org/abs/2507.18071)."""
    return grpo(importance_level="sequence", epsilon=epsilon, epsilon_high=epsilon_high, beta=beta, **options)


@also_takes(grpo, but=("loss_type",))
def dr_grpo(*, beta: float = 0.0, **options: Any) -> Objective:
    """Sums over a constant length; advantages must not be divided by their std (Liu et al., 2025, 2503.20783)."""
    return grpo(loss_type="dr_grpo", beta=beta, **options)


@also_takes(grpo, but=("loss_type",))
def dapo(*, epsilon_high: float = 0.28, beta: float = 0.0, **options: Any) -> Objective:
    """Token mean over the step, clip-higher, no KL (Yu et al., 2025, https://arxiv.org/abs/2503.14476)."""
    return grpo(loss_type="dapo", epsilon_high=epsilon_high, beta=beta, **options)


@also_takes(grpo, but=("loss_type",))
def cispo(*, beta: float = 0.0, **options: Any) -> Objective:
    """The clipped ratio is a weight, so that no token loses its gradient (MiniMax, 2025, https://arxiv.org/abs/2506.13585)."""
    return grpo(loss_type="cispo", beta=beta, **options)


@also_takes(grpo, but=("loss_type",))
def rloo(*, beta: float = 0.05, **options: Any) -> Objective:
    """-A·log π(y), the mean over completions of sums over tokens: REINFORCE (Williams, 1992).

    RLOO with `advantages.leave_one_out` (Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740), REINFORCE with a mean
    baseline with `advantages.batch_centered`. The KL is a term of its own, where the paper subtracts it from the reward.
    """
    return grpo(loss_type="reinforce", beta=beta, **options)
