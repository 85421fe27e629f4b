"""Objectives of supervised fine-tuning and distillation."""

from collections.abc import Callable

from ..errors import choose
from .objective import Objective
from .terms import dft, divergence, nll

# --- supervised ---------------------------------------------------------------------------------

SFT_LOSSES: dict[str, Callable[[], Objective]] = {"nll": nll, "dft": dft}


def sft(*, loss_type: str = "nll") -> Objective:
    """Supervised fine-tuning: `nll` (cross entropy) or `dft` (https://arxiv.org/abs/2508.05629)."""
    return choose(SFT_LOSSES, loss_type, "loss-type")()


def distill(*, nll_weight: float = 0.0) -> Objective:
    """Divergence from a teacher + nll_weight·NLL, both token means (Hinton et al., 2015, https://arxiv.org/abs/1503.02531)."""
    return divergence() + nll_weight * nll()
