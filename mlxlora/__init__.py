"""mlxlora: fine-tune language models on MLX with objectives that add up.

The names below are loaded when they are first used, so that importing the package (and `mlxlora --help`) costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "types": ("Batch", "chosen", "completions", "everything", "rejected"),
    "config": (
        *("AdapterOptions", "CPOOptions", "DataOptions", "DPOOptions", "GRPOOptions", "KTOOptions", "ModelOptions", "ORPOOptions"),
        *("ContestSampling", "DistillOptions", "OnlineDPOOptions", "OwnSampling"),
        *("Output", "PairData", "PromptData", "RewardOptions", "RowOptions", "SamplingOptions", "SFTOptions", "Training"),
    ),
    "errors": ("InputError", "RunError"),
    "compose": ("Objective", "Term", "term", "watch", "token_mean", "sequence_mean", "sequence_sum", "batch_mean", "fixed_length"),
    "logprobs": ("scorer", "token_logps"),
    "scores": ("sum_logps", "mean_logps", "log_ratio", "mean_log_ratio", "log_odds"),
    "losses": ("sigmoid", "hinge", "ipo", "dpop"),
    "terms": ("nll", "dft", "preference"),
    "surrogates": ("clipped_surrogate", "kl"),
    "step": ("make_step",),
    "adapters": ("prepare", "disabled", "save"),
    "sources": ("rows", "pairs"),
    "rollouts": ("Sampling", "sample"),
    "rewards": ("NamedReward", "load_rewards"),
    "online": ("Rollouts", "prompts"),
    "labels": ("unpaired",),
    "recipes": ("run", "load", "evaluate_split", "sft", "dpo", "orpo", "cpo", "kto", "grpo", "online_dpo", "distill", "gkd"),
    "fusing": ("fuse",),
    "merging": ("merge",),
    "peft": ("to_peft", "from_peft"),
    "hub": ("push",),
    "comparison": ("compare",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("advantages", "losses", "objectives", "scores", "terms", "compose")

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".blas", __name__).load_fast_blas()  # as the command line does: only before MLX is imported it has an effect
    return getattr(import_module(f".{_HOME[name]}", __name__), name) if name in _HOME else import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return __all__
