"""Objectives on sampled completions: a surrogate, a reduction, and what is added to them."""

from collections.abc import Callable
from typing import Any

from attrs import frozen

from ..errors import choose
from .objective import Objective, Reduction, batch_mean, fixed_length, sequence_mean, sequence_sum, token_mean
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


@frozen
class PolicyOptions:
    """Hyper-parameters of GRPO and its relatives; each loss type reads its own.

    Attributes:
        epsilon: ratios below 1 - epsilon get no gradient where A < 0.
        epsilon_high: ratios above 1 + epsilon_high get none where A > 0; None: epsilon.
        delta: upper bound of the ratio where A < 0; None: no bound.
        cap: CISPO's bound of the ratio; None: 1 + epsilon_high.
        max_completion_length: Dr. GRPO's constant length, tokens.
        sapo_temperatures: SAPO's τ where A > 0, and elsewhere.
        vespo_positive: VESPO's (k, λ) where A >= 0.
        vespo_negative: VESPO's (k, λ) where A < 0.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    cap: float | None = None
    max_completion_length: int = 256
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    vespo_negative: tuple[float, float] = (3.0, 2.0)


Surrogate = Callable[[PolicyOptions, Ratio, Reduction], Objective]


def _clipped(o: PolicyOptions, ratio: Ratio, per: Reduction) -> Objective:
    return clipped_surrogate(epsilon=o.epsilon, epsilon_high=o.epsilon_high, delta=o.delta, ratio=ratio, per=per)


def _cispo(o: PolicyOptions, ratio: Ratio, per: Reduction) -> Objective:
    high = o.epsilon if o.epsilon_high is None else o.epsilon_high
    return cispo_surrogate(cap=1 + high if o.cap is None else o.cap, ratio=ratio, per=per)


def _sapo(o: PolicyOptions, ratio: Ratio, per: Reduction) -> Objective:
    positive, negative = o.sapo_temperatures
    return sapo_surrogate(temperature_positive=positive, temperature_negative=negative, ratio=ratio, per=per)


def _vespo(o: PolicyOptions, ratio: Ratio, per: Reduction) -> Objective:
    return vespo_surrogate(positive=o.vespo_positive, negative=o.vespo_negative, per=per)


def _reinforce(o: PolicyOptions, ratio: Ratio, per: Reduction) -> Objective:
    return reinforce(per=per)


def _always(reduction: Reduction) -> Callable[[PolicyOptions], Reduction]:
    return lambda _: reduction


GRPO_LOSSES: dict[str, tuple[Surrogate, Callable[[PolicyOptions], Reduction]]] = {
    "grpo": (_clipped, _always(sequence_mean)),
    "bnpo": (_clipped, _always(batch_mean)),
    "dr_grpo": (_clipped, lambda o: fixed_length(o.max_completion_length)),
    "dapo": (_clipped, _always(token_mean)),
    "cispo": (_cispo, _always(token_mean)),
    "luspo": (_clipped, _always(sequence_sum)),
    "sapo": (_sapo, _always(sequence_mean)),
    "vespo": (_vespo, _always(token_mean)),
    "reinforce": (_reinforce, _always(sequence_sum)),
}

IMPORTANCE_LEVELS: dict[str, Ratio] = {"token": token_ratio, "sequence": sequence_ratio}


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
    """Group-relative policy optimisation on `batch.advantages` (Shao et al., 2024, https://arxiv.org/abs/2402.03300).

    Surrogate + β·KL - entropy_coef·entropy. `batch.old_logps` may be None: the policy itself sampled. Watches `kl`,
    `entropy` and the surrogate's clip ratios.

    Args:
        loss_type: surrogate and reduction, a name of `GRPO_LOSSES`.
        importance_level: one ratio per `token`, or per `sequence` (GSPO).
        beta: weight of the KL to `batch.ref_logps`, which is needed only if this is not 0.
        correct_kl: multiply the KL by the importance ratio.
        top_entropy: only this share of tokens, those of highest entropy, gets the surrogate's gradient.
        off_policy_threshold: drop completions with A < 0 that drifted further than this (nats per token).
        options: fields of `PolicyOptions`.

    Raises:
        InputError: unknown loss type or importance level.
    """
    chosen = PolicyOptions(**options)
    ratio = choose(IMPORTANCE_LEVELS, importance_level, "importance-level")
    surrogate, reduction = choose(GRPO_LOSSES, loss_type, "loss-type")
    per = reduction(chosen)
    objective = surrogate(chosen, ratio, per)
    if top_entropy < 1:
        objective = gated(objective, high_entropy(top_entropy), needs={"entropy"})
    if off_policy_threshold is not None:
        objective = gated(objective, on_policy(off_policy_threshold), needs={"advantages"})
    if beta:
        objective += _penalty(beta, per, ratio if correct_kl else None)
    if entropy_coef:
        objective += -entropy_coef * entropy(name="entropy_bonus")
    return objective + 0.0 * entropy()


def _penalty(beta: float, per: Reduction, correction: Ratio | None) -> Objective:
    """β·KL, reduced like the surrogate, and its token mean as the metric `kl`."""
    return beta * kl(per=per, importance_corrected=correction, name="kl_penalty") + 0.0 * kl(importance_corrected=correction)


def gspo(*, epsilon: float = 3e-4, epsilon_high: float = 4e-4, beta: float = 0.0, **options: Any) -> Objective:
    """One clipped ratio per completion (Zheng et al., 2025, https://arxiv.org/abs/2507.18071)."""
    return grpo(importance_level="sequence", epsilon=epsilon, epsilon_high=epsilon_high, beta=beta, **options)


def dr_grpo(*, beta: float = 0.0, **options: Any) -> Objective:
    """Sums over a constant length; advantages must not be divided by their std (Liu et al., 2025, 2503.20783)."""
    return grpo(loss_type="dr_grpo", beta=beta, **options)


def dapo(*, epsilon_high: float = 0.28, beta: float = 0.0, **options: Any) -> Objective:
    """Token mean over the step, clip-higher, no KL (Yu et al., 2025, https://arxiv.org/abs/2503.14476)."""
    return grpo(loss_type="dapo", epsilon_high=epsilon_high, beta=beta, **options)


def cispo(*, beta: float = 0.0, **options: Any) -> Objective:
    """The clipped ratio is a weight, so that no token loses its gradient (MiniMax, 2025, https://arxiv.org/abs/2506.13585)."""
    return grpo(loss_type="cispo", beta=beta, **options)


def rloo(*, beta: float = 0.05, **options: Any) -> Objective:
    """-A·log π(y), the mean over completions of sums over tokens: REINFORCE (Williams, 1992).

    RLOO with `advantages.leave_one_out` (Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740), REINFORCE with a mean
    baseline with `advantages.batch_centred`. The KL is a term of its own, where the paper subtracts it from the reward.
    """
    return grpo(loss_type="reinforce", beta=beta, **options)
