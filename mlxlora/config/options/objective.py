"""Options of the objectives: one group a method, with shared bases."""

from collections.abc import Callable
from typing import Any, Literal

from attrs import validators as v

from ..fields import group, option

_FIRST, _LAST = -1, 1


@group("Objective")
class ObjectiveOptions:
    """What every method takes: an objective of the user."""

    objective: str | Callable[..., Any] | None = option(None, "Your own objective: file.py:name.", order=_LAST)


@group("Objective")
class _Reference(ObjectiveOptions):
    """A method with a reference policy."""

    beta: float = option(0.1, "Strength of the pull towards the reference.", v.gt(0))
    reference_model_path: str | None = option(
        None, "Another model as the reference; default: --model before training.", order=_LAST
    )


@group("Objective")
class _CachedReference(_Reference):
    """A method whose reference scores each row once."""

    reference_cache: bool = option(True, "Keep the reference's log-probabilities on disk for later runs.", order=_LAST)


@group("Objective")
class _NoisyLabels(ObjectiveOptions):
    """A method that allows for wrong labels."""

    label_smoothing: float = option(0.0, "Share of labels assumed to be flipped.", v.ge(0), v.lt(0.5))


_DELTA = "dpop's penalty (default 50) or hinge's margin (default 1)."
_WPO = "Weight each pair by how likely the policy itself writes it (WPO)."


@group("Objective")
class SFTOptions(ObjectiveOptions):
    """Supervised fine-tuning."""

    loss_type: Literal["nll", "dft"] = option("nll", "nll: cross entropy; dft: dynamic fine-tuning.", order=_FIRST)
    neftune_noise_alpha: float = option(0.0, "Noise on the embeddings of training tokens (NEFTune), such as 5; 0 = none.", v.ge(0))


@group("Objective")
class DistillOptions(ObjectiveOptions):
    """Knowledge distillation."""

    teacher_model: str | None = option(None, "Teacher: a model folder or hub name with the vocabulary of --model.")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = option(
        "forward_kl", "KL(teacher, student), KL(student, teacher) or generalized Jensen-Shannon, over the whole vocabulary."
    )
    jsd_beta: float = option(0.5, "The teacher's share of jsd's mixture.", v.gt(0), v.lt(1))
    nll_weight: float = option(0.0, "Weight of the cross entropy that is added.", v.ge(0))


@group("Objective")
class DPOOptions(_NoisyLabels, _CachedReference):
    """Direct preference optimization."""

    loss_type: str = option("sigmoid", "Preference loss, or a sum such as 0.8*sigmoid+0.2*bco_pair+1.0*nll.", order=_FIRST)
    delta: float | None = option(None, _DELTA, v.ge(0))
    ld_alpha: float | None = option(
        None, "Weight of tokens past the shorter completion's length (LD-DPO); default: 1.", v.ge(0), v.le(1)
    )
    wpo: bool = option(False, _WPO)


@group("Objective")
class CPOOptions(_NoisyLabels):
    """Contrastive preference optimization."""

    loss_type: Literal["sigmoid", "hinge", "ipo", "dpop", "simpo"] = option("sigmoid", "Preference loss.", order=_FIRST)
    beta: float = option(0.1, "Scale of the margin.", v.gt(0))
    alpha: float = option(1.0, "Weight of the chosen completion's NLL; 0 with simpo is pure SimPO.", v.ge(0))
    gamma: float = option(0.5, "simpo's target margin.", v.ge(0))
    delta: float | None = option(None, _DELTA, v.ge(0))


@group("Objective")
class ORPOOptions(ObjectiveOptions):
    """Odds-ratio preference optimization."""

    beta: float = option(0.1, "Weight of the odds ratio, the paper's lambda.", v.ge(0))
    nll_on_prompt: bool = option(False, "The NLL covers prompts too, as in the authors' code and TRL.")


@group("Objective")
class KTOOptions(_CachedReference):
    """Kahneman-Tversky optimization."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = option(
        "kto", "kto: gain over the policy's divergence; apo_zero_unpaired: over the reference.", order=_FIRST
    )
    desirable_weight: float = option(1.0, "Weight of desirable completions.", v.gt(0))
    undesirable_weight: float = option(1.0, "Weight of undesirable completions.", v.gt(0))


@group("Objective")
class OnlineDPOOptions(_NoisyLabels, _Reference):
    """DPO on pairs that the policy samples."""

    loss_type: str = option("sigmoid", "DPO's preference loss, or a sum such as 0.8*sigmoid+0.2*bco_pair.", order=_FIRST)
    wpo: bool = option(False, _WPO)
    judge_model: str | None = option(None, "A chat model that says which of two completions is better, in place of --rewards.")
    xpo_alpha: float = option(0.0, "Weight of exploration (XPO), such as 1e-5: the reference then answers too; 0 = off.", v.ge(0))


@group("Objective")
class GRPOOptions(_Reference):
    """Group-relative policy optimization."""

    loss_type: str = option("grpo", "grpo, bnpo, dr_grpo, dapo, cispo, luspo, sapo, vespo or reinforce.", order=_FIRST)
    beta: float = option(0.1, "Weight of the KL to the reference; 0 = no reference.", v.ge(0))
    epsilon: float = option(0.2, "Clip range of the importance ratio.", v.ge(0))
    epsilon_high: float | None = option(None, "Upper side of the clip range; default: --epsilon.", v.ge(0))
    delta: float | None = option(None, "Upper bound of the ratio where the advantage is negative; default: none.", v.gt(0))
    importance_level: Literal["token", "sequence"] = option("token", "One ratio per token, or per completion (GSPO).")
    baseline: Literal["group", "leave_one_out", "batch"] = option(
        "group",
        "Advantages are rewards minus the mean of their group, of the other completions of their group (RLOO), or of the batch.",
    )
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "Advantages are divided by the standard deviation of their group, of the batch, or not."
    )
    num_iterations: int = option(1, "Optimizer steps on every batch of completions.", v.ge(1))
    top_entropy_quantile: float = option(1.0, "Share of tokens, those of highest entropy, to train on.", v.gt(0), v.le(1))
    correct_kl: bool = option(False, "Multiply the KL by the importance ratio, as TRL 1.16 does.")
    entropy_coef: float = option(0.0, "Weight of an entropy bonus, such as 0.001; 0 = none.", v.ge(0))
