"""mlxlora: fine-tune language models on MLX with objectives that add up.

The names below are loaded when they are first used, so that importing the package (and `mlxlora --help`) costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "batch": ("Batch", "chosen", "completions", "everything", "rejected"),
    "config.options": (
        "AdapterOptions",
        "CPOOptions",
        "DataOptions",
        "DPOOptions",
        "GRPOOptions",
        "KTOOptions",
        "ModelOptions",
        "ORPOOptions",
        "ContestSampling",
        "DistillOptions",
        "OnlineDPOOptions",
        "OwnSampling",
        "Output",
        "PairData",
        "PromptData",
        "RewardOptions",
        "RowOptions",
        "SamplingOptions",
        "SFTOptions",
        "Training",
    ),
    "errors": ("InputError", "RunError"),
    "objectives.objective": (
        "Objective",
        "Term",
        "term",
        "watch",
        "token_mean",
        "sequence_mean",
        "sequence_sum",
        "batch_mean",
        "fixed_length",
    ),
    "models.logprobs": ("scorer", "token_logps"),
    "objectives.scores": ("sum_logps", "mean_logps", "log_ratio", "mean_log_ratio", "log_odds"),
    "objectives.losses": ("sigmoid", "hinge", "ipo", "dpop"),
    "objectives.terms": ("nll", "dft", "preference"),
    "objectives.surrogates": ("clipped_surrogate", "kl"),
    "training.step": ("make_step",),
    "adapters.prepare": ("prepare", "disabled", "load"),
    "adapters.files": ("save",),
    "data.sources": ("rows", "pairs"),
    "rollouts.sampling": ("Sampling",),
    "rollouts.engine": ("sample",),
    "rollouts.rewards": ("NamedReward", "load_rewards"),
    "rollouts.source": ("Rollouts", "prompts"),
    "training.unpaired": ("unpaired",),
    "methods": ("run", "evaluate_split", "sft", "dpo", "orpo", "cpo", "kto", "grpo", "online_dpo", "distill", "gkd"),
    "adapters.fuse": ("fuse",),
    "adapters.merge": ("merge",),
    "adapters.peft": ("to_peft", "from_peft"),
    "adapters.hub": ("push",),
    "adapters.compare": ("compare",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = {
    "objectives": "objectives",
    **{name: f"objectives.{name}" for name in ("advantages", "losses", "objective", "scores", "terms")},
}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(
        ".utils.blas", __name__
    ).load_fast_blas()  # as the command line does: only before MLX is imported it has an effect
    return (
        getattr(import_module(f".{_HOME[name]}", __name__), name)
        if name in _HOME
        else import_module(f".{_MODULES[name]}", __name__)
    )


def __dir__() -> list[str]:
    return __all__
