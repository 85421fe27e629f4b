"""Objectives of supervised fine-tuning and distillation."""

from collections.abc import Callable

from ..batch import column
from ..errors import choose
from .objective import Objective, token_mean, watch
from .quantity import reads
from .terms import dft, divergence, entropy, nll

SFT_LOSSES: dict[str, Callable[[], Objective]] = {"nll": nll, "dft": dft}


def sft(*, loss_type: str = "nll") -> Objective:
    """-log π(y_t), the mean over tokens (`nll`, cross entropy), or -sg(π(y_t))·log π(y_t) (`dft`, https://arxiv.org/abs/2508.05629).

    Raises:
        InputError: an unknown name.
    """
    return choose(SFT_LOSSES, loss_type, "loss-type")()


def token_metrics() -> Objective:
    """Metrics of supervised fine-tuning under TRL's names: `entropy` [nats] and `mean_token_accuracy`, means over trained tokens.

    The accuracy is how often the target is the policy's likeliest token.
    """
    correct = reads("correct")(lambda logps, batch: column(batch, "correct"))
    return 0.0 * entropy() + watch("mean_token_accuracy", correct, token_mean())


def distill(*, nll_weight: float = 0.0) -> Objective:
    """D(teacher, π) + nll_weight·NLL, both token means (Hinton et al., 2015, https://arxiv.org/abs/1503.02531)."""
    return divergence() + nll_weight * nll()
