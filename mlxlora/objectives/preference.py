"""The published objectives, each written as the sum that its paper writes."""

import math
import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from attrs import frozen

from ..batch import chosen, chosen_rows, column
from ..errors import InputError, choose
from . import losses
from .losses import PairLoss
from .objective import Objective, per_sequence, watch
from .scores import (
    Score,
    above_reference_point,
    jensen_shannon,
    length_desensitized,
    log_odds,
    log_ratio,
    mean_logps,
    per_token,
    power,
    sorted_differences,
    sorted_halves,
    sum_logps,
    transformed,
)
from .terms import (
    confidence,
    exploration,
    gated,
    judgment,
    nll,
    pair_logps,
    preference,
    preference_score,
    rewards,
    watch_labels,
    watch_pairs,
)

# --- preferences --------------------------------------------------------------------------------


@frozen
class PairOptions:
    """Hyper-parameters of a preference loss; each loss reads its own.

    Attributes:
        beta: strength of the preference against the reference.
        label_smoothing: share of labels assumed to be flipped.
        delta: dpop's penalty λ (None: 50), hinge's margin (None: 1).
        gamma: SimPO's reward margin.
        tau: DiscoPOP's temperature.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    delta: float | None = None
    gamma: float = 0.0
    tau: float = 0.05


PairFactory = Callable[[PairOptions], PairLoss]


def _sigmoid(o: PairOptions) -> PairLoss:
    return losses.sigmoid(beta=o.beta, label_smoothing=o.label_smoothing)


def _simpo(o: PairOptions) -> PairLoss:
    return losses.sigmoid(beta=o.beta, label_smoothing=o.label_smoothing, margin=o.gamma)


def _hinge(o: PairOptions) -> PairLoss:
    return losses.hinge(beta=o.beta, margin=1.0 if o.delta is None else o.delta)


def _dpop(o: PairOptions) -> PairLoss:
    return losses.dpop(beta=o.beta, penalty=50.0 if o.delta is None else o.delta)


def _ipo(o: PairOptions) -> PairLoss:
    return losses.ipo(beta=o.beta)


DPO_LOSSES: dict[str, PairFactory] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "dpop": _dpop,
    "robust": lambda o: losses.robust(beta=o.beta, label_smoothing=o.label_smoothing),
    "exo_pair": lambda o: losses.exo_pair(beta=o.beta, label_smoothing=o.label_smoothing),
    "nca_pair": lambda o: losses.nca_pair(beta=o.beta),
    "bco_pair": lambda o: losses.bco_pair(beta=o.beta),
    "sppo_hard": lambda o: losses.sppo_hard(beta=o.beta),
    "apo_zero": lambda o: losses.apo_zero(beta=o.beta),
    "apo_down": lambda o: losses.apo_down(beta=o.beta),
    "aot": _sigmoid,
    "aot_unpaired": _sigmoid,
    "discopop": lambda o: losses.discopop(beta=o.beta, tau=o.tau),
    "sigmoid_norm": _sigmoid,
}

# what DPO's log-ratios go through before the loss; the others take them as they are
DPO_SCORES: dict[str, Callable[[Score], Score]] = {
    "ipo": per_token,
    "sigmoid_norm": per_token,
    "aot": lambda _: sorted_differences,
    "aot_unpaired": sorted_halves,
}

DIVERGENCES: dict[str, Callable[[float], Callable[..., Any]]] = {
    "reverse_kl": lambda _: power(0.0),
    "forward_kl": lambda _: power(-1.0),
    "js": lambda _: jensen_shannon,
    "alpha": lambda alpha: power(alpha - 1),
}


def dpo(
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    delta: float | None = None,
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    wpo: bool = False,
) -> Objective:
    """Direct preference optimisation against `batch.ref_logps` (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290).

    Args:
        loss_type: a name of `DPO_LOSSES`, `nll`, or a sum of them: "0.8*sigmoid+0.2*bco_pair+1.0*nll" is MPO
            (https://arxiv.org/abs/2411.10442), "sigmoid+0.2*nll" RPO (https://arxiv.org/abs/2404.19733).
        delta: dpop's penalty λ (default 50), hinge's margin (default 1).
        ld_alpha: weight of tokens past the pair's shorter completion (LD-DPO).
        f_divergence: a name of `DIVERGENCES`, `f_alpha` the α of `alpha`.
        wpo: weight each pair by the policy's confidence; needs `batch.log_sum_sq_probs`.

    Raises:
        InputError: unknown names, or a hyper-parameter outside its range.
    """
    options = PairOptions(beta=beta, label_smoothing=label_smoothing, delta=delta, tau=discopop_tau)
    link = choose(DIVERGENCES, f_divergence, "f-divergence")(f_alpha)
    cut = _identity if ld_alpha is None else partial(length_desensitized, alpha=ld_alpha)
    weigh = partial(gated, gate=confidence, needs={"log_sum_sq_probs"}) if wpo else _identity

    def one(name: str) -> Objective:
        if name == "nll":
            return nll(of=chosen, name="nll_loss")
        score = cut(DPO_SCORES.get(name, _identity)(transformed(log_ratio, link)))
        return weigh(preference(score, DPO_LOSSES[name](options), name=name))

    first, *others = (weight * one(name) for weight, name in parse_mixture(loss_type, [*DPO_LOSSES, "nll"]))
    return sum(others, start=first) + rewards(cut(log_ratio), beta=beta) + pair_logps(cut(sum_logps))


CPO_LOSSES: dict[str, PairFactory] = {"sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo, "dpop": _dpop, "simpo": _simpo}
CPO_SCORES: dict[str, Score] = {"ipo": mean_logps, "simpo": mean_logps}


def cpo(
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    delta: float | None = None,
    gamma: float = 0.5,
    reward_alpha: float = 0.0,
) -> Objective:
    """Preference without a reference + α·NLL of the chosen (Xu et al., 2024, https://arxiv.org/abs/2401.08417).

    Args:
        loss_type: a name of `CPO_LOSSES`; `ipo` and `simpo` compare means of log-probabilities, the others sums.
        gamma: target reward margin of `simpo`.
        reward_alpha: AlphaPO's reward shape (https://arxiv.org/abs/2501.03884); 0 leaves log-probabilities as they are.

    Raises:
        InputError: unknown names, or a hyper-parameter outside its range.
    """
    options = PairOptions(beta=beta, label_smoothing=label_smoothing, delta=delta, gamma=gamma)
    loss = choose(CPO_LOSSES, loss_type, "loss-type")(options)
    logps = CPO_SCORES.get(loss_type, sum_logps)
    score = transformed(logps, power(-reward_alpha))
    return (
        preference(score, loss, name=loss_type)
        + alpha * nll(of=chosen, name="nll_loss")
        + rewards(score, beta=beta)
        + pair_logps(logps)
    )


def simpo(*, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.0, **options: Any) -> Objective:
    """-log σ(β(mean log π_c - mean log π_r) - γ) (Meng et al., 2024, https://arxiv.org/abs/2405.14734, eq. 6)."""
    return cpo(loss_type="simpo", beta=beta, gamma=gamma, alpha=alpha, **options)


def orpo(*, beta: float = 0.1, nll_on_prompt: bool = False) -> Objective:
    """NLL of the chosen - β·log σ(log-odds of chosen - rejected) (Hong et al., 2024, https://arxiv.org/abs/2403.07691).

    `batch.preference_score`, if there, weights each pair's odds ratio.

    Args:
        beta: the paper's λ.
        nll_on_prompt: the NLL also covers prompts, as in the authors' code; their tokens must be scored.
    """
    odds_ratio = losses.sigmoid(beta=1.0)
    return (
        nll(of=chosen_rows if nll_on_prompt else chosen, name="nll_loss")
        + beta * preference(log_odds, odds_ratio, name="odds_ratio", weight=preference_score)
        + watch_pairs("log_odds_ratio", log_odds, lambda c, r: -odds_ratio(c, r))
        + watch_pairs("log_odds_chosen", log_odds, lambda c, r: c - r)
        + rewards(mean_logps, beta=beta)
        + pair_logps(mean_logps)
    )


def xpo(*, alpha: float = 1e-5, beta: float = 0.1, **options: Any) -> Objective:
    """DPO + α·Σ log π of what the reference sampled, the mean over pairs.

    Exploratory preference optimisation (Xie et al., 2024, https://arxiv.org/abs/2405.21046): of each pair, one
    completion is the policy's and one, marked by `batch.from_reference`, the reference's.

    Args:
        alpha: weight of the exploration bonus.
        options: of `dpo`.
    """
    return dpo(beta=beta, **options) + alpha * exploration()


# --- judged one by one ----------------------------------------------------------------------------

KTO_SCORES: dict[str, Score] = {"kto": above_reference_point, "apo_zero_unpaired": log_ratio}


def kto(*, loss_type: str = "kto", beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """λ_D·(1 - σ(β(l - z))) of desirable, λ_U·(1 - σ(β(z - l))) of undesirable completions, l = log π/π_ref.

    Kahneman-Tversky optimisation (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306), the mean over
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
    objective = judgment(score, losses.one_minus_value(beta=beta), name=loss_type, **weights)
    if "reference_point" in score.needs:
        objective += watch("kl", lambda _, batch: column(batch, "reference_point"), per_sequence, needs={"reference_point"})
    return objective + watch_labels("rewards", log_ratio, scale=beta) + watch_labels("logps", sum_logps)


# --- mixtures -------------------------------------------------------------------------------------


def parse_mixture(text: str, accepted: Collection[str]) -> list[tuple[float, str]]:
    """Weights and names of a sum of losses.

    >>> parse_mixture("0.8*sigmoid + 0.2*bco_pair + nll", ["sigmoid", "bco_pair", "nll"])
    [(0.8, 'sigmoid'), (0.2, 'bco_pair'), (1.0, 'nll')]

    Raises:
        InputError: a part that is no name of `accepted`, a weight that is no number, or a name that comes twice.
    """
    parts = [part.strip().rpartition("*") for part in re.split(r"(?<!\de)\+", text)]
    names = [name.strip() for *_, name in parts]
    for name in names:
        choose(dict.fromkeys(accepted), name, "loss-type")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--loss-type names {', '.join(twice)} twice in {text!r}; add up its weights")
    return [(_weight(weight, text) if star else 1.0, name) for (weight, star, _), name in zip(parts, names, strict=True)]


def _weight(number: str, text: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--loss-type wants number*name, got the weight {number.strip()!r} in {text!r}")
    return value


def _identity(value: Any) -> Any:
    return value
