"""Objectives of preferences, each written as the sum that its paper writes."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..batch import chosen, chosen_rows
from ..errors import choose
from . import losses
from .links import F_DIVERGENCES, Link, power
from .mixture import mixture
from .objective import Objective
from .scores import (
    Score,
    length_desensitized,
    log_odds,
    log_ratio,
    mean_logps,
    per_token,
    sorted_differences,
    sorted_halves,
    sum_logps,
    transformed,
)
from .signature import also_takes
from .terms import (
    confidence,
    exploration,
    gated,
    nll,
    pair_logps,
    preference,
    preference_score,
    rewards,
    watch_pairs,
)

PairTerm = Callable[[], tuple[Score, losses.PairLoss]]
"""A score, and the loss of a pair of them; called only for the loss that was chosen, because making it checks its options."""


def dpo_losses(
    cut: Callable[[Score], Score],
    link: Link,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    delta: float | None = None,
    discopop_tau: float = 0.05,
) -> dict[str, PairTerm]:
    """The losses of DPO's family by name; `losses` has the formulas.

    Args:
        cut: changes the score of every loss (LD-DPO).
        link: changes the log-ratio (f-DPO).
        beta: strength of the preference against the reference.
        label_smoothing: share of labels assumed to be flipped, of the sigmoid losses, robust and exo_pair.
        delta: dpop's penalty λ (None: 50), hinge's margin (None: 1).
        discopop_tau: discopop's temperature.
    """
    ratio = cut(transformed(log_ratio, link))
    sigmoid = partial(losses.sigmoid, beta=beta, label_smoothing=label_smoothing)
    return {
        "sigmoid": lambda: (ratio, sigmoid()),
        "hinge": lambda: (ratio, losses.hinge(beta=beta, margin=1.0 if delta is None else delta)),
        "ipo": lambda: (per_token(ratio), losses.ipo(beta=beta)),
        "dpop": lambda: (ratio, losses.dpop(beta=beta, penalty=50.0 if delta is None else delta)),
        "robust": lambda: (ratio, losses.robust(beta=beta, label_smoothing=label_smoothing)),
        "exo_pair": lambda: (ratio, losses.exo_pair(beta=beta, label_smoothing=label_smoothing)),
        "nca_pair": lambda: (ratio, losses.nca_pair(beta=beta)),
        "bco_pair": lambda: (ratio, losses.bco_pair(beta=beta)),
        "sppo_hard": lambda: (ratio, losses.sppo_hard(beta=beta)),
        "apo_zero": lambda: (ratio, losses.apo_zero(beta=beta)),
        "apo_down": lambda: (ratio, losses.apo_down(beta=beta)),
        "aot": lambda: (cut(sorted_differences), sigmoid()),
        "aot_unpaired": lambda: (sorted_halves(ratio), sigmoid()),
        "discopop": lambda: (ratio, losses.discopop(beta=beta, tau=discopop_tau)),
        "sigmoid_norm": lambda: (per_token(ratio), sigmoid()),
    }


@also_takes(dpo_losses)
def dpo(
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    ld_alpha: float | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    wpo: bool = False,
    **options: Any,
) -> Objective:
    """-log σ(β(l_c - l_r)), l = log π(y)/π_ref(y) against `batch.ref_logps`, the mean over pairs.

    Direct preference optimization (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, eq. 7).

    Args:
        loss_type: a name of `dpo_losses`, `nll` (of the chosen), or a sum: "0.8*sigmoid+0.2*bco_pair+1.0*nll" is MPO
            (https://arxiv.org/abs/2411.10442), "sigmoid+0.2*nll" RPO (https://arxiv.org/abs/2404.19733).
        beta: strength of the preference against the reference.
        ld_alpha: weight of tokens past the pair's shorter completion (LD-DPO); None: 1.
        f_divergence: a name of `F_DIVERGENCES`, `f_alpha` the α of `alpha`.
        wpo: weight each pair by the policy's confidence (WPO); needs `batch.log_sum_sq_probs`.
        options: of `dpo_losses`: label_smoothing, delta, discopop_tau.

    Raises:
        InputError: an unknown name, or a hyper-parameter outside its range.
    """
    cut = partial(length_desensitized, alpha=ld_alpha)
    pairs = dpo_losses(cut, choose(F_DIVERGENCES, f_divergence, "f-divergence")(f_alpha), beta=beta, **options)

    def loss(name: str) -> Objective:
        if name == "nll":
            return nll(of=chosen, name="nll_loss")
        return gated(preference(*pairs[name](), name=name), confidence if wpo else None)

    return mixture(loss_type, [*pairs, "nll"], loss) + rewards(cut(log_ratio), beta=beta) + pair_logps(cut(sum_logps))


@also_takes(dpo)
def xpo(*, alpha: float = 1e-5, beta: float = 0.1, **options: Any) -> Objective:
    """DPO + α·log π(y~) of what the reference sampled, the mean over pairs.

    Exploratory preference optimization (Xie et al., 2024, https://arxiv.org/abs/2405.21046): of each pair, the policy sampled
    one completion and the reference the other, which `batch.from_reference` marks.

    Args:
        alpha: weight of the exploration bonus.
        options: of `dpo`.
    """
    return dpo(beta=beta, **options) + alpha * exploration()


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
    """-log σ(β(log π(y_c) - log π(y_r))) + α·NLL(y_c), a preference without a reference.

    Contrastive preference optimization (Xu et al., 2024, https://arxiv.org/abs/2401.08417).

    Args:
        loss_type: the name of a loss; `ipo` and `simpo` compare means of log-probabilities, the others sums.
        beta: scale of the margin.
        alpha: weight of the NLL.
        label_smoothing: share of labels assumed to be flipped, of sigmoid and simpo.
        delta: dpop's penalty λ (None: 50), hinge's margin (None: 1).
        gamma: target reward margin of `simpo`.
        reward_alpha: AlphaPO's reward shape (https://arxiv.org/abs/2501.03884); 0 leaves log-probabilities as they are.

    Raises:
        InputError: an unknown name, or a hyper-parameter outside its range.
    """
    pairs: dict[str, PairTerm] = {
        "sigmoid": lambda: (sum_logps, losses.sigmoid(beta=beta, label_smoothing=label_smoothing)),
        "hinge": lambda: (sum_logps, losses.hinge(beta=beta, margin=1.0 if delta is None else delta)),
        "ipo": lambda: (mean_logps, losses.ipo(beta=beta)),
        "dpop": lambda: (sum_logps, losses.dpop(beta=beta, penalty=50.0 if delta is None else delta)),
        "simpo": lambda: (mean_logps, losses.sigmoid(beta=beta, label_smoothing=label_smoothing, margin=gamma)),
    }
    logps, loss = choose(pairs, loss_type, "loss-type")()
    score = transformed(logps, power(-reward_alpha))
    return (
        preference(score, loss, name=loss_type)
        + alpha * nll(of=chosen, name="nll_loss")
        + rewards(score, beta=beta)
        + pair_logps(logps)
    )


@also_takes(cpo, but=("loss_type",))
def simpo(*, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.0, **options: Any) -> Objective:
    """-log σ(β(mean log π_c - mean log π_r) - γ) (Meng et al., 2024, https://arxiv.org/abs/2405.14734, eq. 6)."""
    return cpo(loss_type="simpo", beta=beta, gamma=gamma, alpha=alpha, **options)


def orpo(*, beta: float = 0.1, nll_on_prompt: bool = False) -> Objective:
    """NLL(y_c) - β·log σ(o_c - o_r), o = log(p/(1 - p)), p = π(y)^(1/|y|) (Hong et al., 2024, https://arxiv.org/abs/2403.07691).

    `batch.preference_score`, if it is there, weights the odds ratio of each pair.

    Args:
        beta: the paper's λ.
        nll_on_prompt: the NLL also covers prompts, as in the authors' code; the batch must train on their tokens.
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
