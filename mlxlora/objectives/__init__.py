"""Pure losses: log-probabilities and columns of a batch in, a scalar and its metrics out."""

from .grpo import cispo, dapo, dr_grpo, grpo, gspo, rloo
from .kto import kto
from .preference import cpo, dpo, orpo, simpo, xpo
from .supervised import distill, sft

__all__ = ["cispo", "cpo", "dapo", "distill", "dpo", "dr_grpo", "grpo", "gspo", "kto", "orpo", "rloo", "sft", "simpo", "xpo"]
