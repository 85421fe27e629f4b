"""mlxlora: fine-tune language models on MLX with objectives that add up.

The names below are imported when they are first used, so that `import mlxlora` and `mlxlora --help` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import methods as _methods
    from . import objectives as objectives
    from .adapters.detach import detach as detach
    from .adapters.files import save as save
    from .adapters.fuse import fuse as fuse
    from .adapters.hub import push as push
    from .adapters.merge import merge as merge
    from .adapters.peft import from_peft as from_peft
    from .adapters.peft import to_peft as to_peft
    from .adapters.prepare import disabled as disabled
    from .adapters.prepare import load as load
    from .adapters.prepare import prepare as prepare
    from .batch import Batch as Batch
    from .batch import chosen as chosen
    from .batch import completions as completions
    from .batch import everything as everything
    from .batch import rejected as rejected
    from .config.options import AdapterOptions as AdapterOptions
    from .config.options import CPOOptions as CPOOptions
    from .config.options import DataOptions as DataOptions
    from .config.options import DistillOptions as DistillOptions
    from .config.options import DPOOptions as DPOOptions
    from .config.options import GRPOOptions as GRPOOptions
    from .config.options import KTOOptions as KTOOptions
    from .config.options import ModelOptions as ModelOptions
    from .config.options import OnlineDPOOptions as OnlineDPOOptions
    from .config.options import ORPOOptions as ORPOOptions
    from .config.options import Output as Output
    from .config.options import OwnSampling as OwnSampling
    from .config.options import PairData as PairData
    from .config.options import PairSampling as PairSampling
    from .config.options import PromptData as PromptData
    from .config.options import RewardOptions as RewardOptions
    from .config.options import RowOptions as RowOptions
    from .config.options import SamplingOptions as SamplingOptions
    from .config.options import SFTOptions as SFTOptions
    from .config.options import Training as Training
    from .data.sources import pairs as pairs
    from .data.sources import rows as rows
    from .errors import InputError as InputError
    from .errors import RunError as RunError
    from .methods import METHODS as METHODS
    from .models.logprobs import scorer as scorer
    from .models.logprobs import token_logps as token_logps
    from .objectives import advantages as advantages
    from .objectives import losses as losses
    from .objectives import objective as objective
    from .objectives import scores as scores
    from .objectives import terms as terms
    from .objectives.losses import dpop as dpop
    from .objectives.losses import hinge as hinge
    from .objectives.losses import ipo as ipo
    from .objectives.losses import sigmoid as sigmoid
    from .objectives.objective import Objective as Objective
    from .objectives.objective import Term as Term
    from .objectives.objective import batch_mean as batch_mean
    from .objectives.objective import fixed_length as fixed_length
    from .objectives.objective import sequence_mean as sequence_mean
    from .objectives.objective import sequence_sum as sequence_sum
    from .objectives.objective import term as term
    from .objectives.objective import token_mean as token_mean
    from .objectives.objective import watch as watch
    from .objectives.quantity import reads as reads
    from .objectives.scores import log_odds as log_odds
    from .objectives.scores import log_ratio as log_ratio
    from .objectives.scores import mean_log_ratio as mean_log_ratio
    from .objectives.scores import mean_logps as mean_logps
    from .objectives.scores import sum_logps as sum_logps
    from .objectives.surrogates import clipped_surrogate as clipped_surrogate
    from .objectives.surrogates import kl as kl
    from .objectives.terms import dft as dft
    from .objectives.terms import nll as nll
    from .objectives.terms import preference as preference
    from .reporting.reporter import Reporter as Reporter
    from .rollouts.compare import Generation as Generation
    from .rollouts.compare import compare as compare
    from .rollouts.engine import Decoding as Decoding
    from .rollouts.engine import sample as sample
    from .rollouts.pairs import on_policy_pairs as on_policy_pairs
    from .rollouts.rewards import NamedReward as NamedReward
    from .rollouts.rewards import load_rewards as load_rewards
    from .rollouts.sampling import Sampling as Sampling
    from .rollouts.source import Rollouts as Rollouts
    from .rollouts.source import own_answers as own_answers
    from .rollouts.source import prompts as prompts
    from .training import sweep as _sweep
    from .training.results import RunResult as RunResult
    from .training.session import evaluate_split as evaluate_split
    from .training.session import run as run
    from .training.step import make_step as make_step
    from .training.sweep import SweepResult as SweepResult
    from .training.unpaired import unpaired as unpaired

    sweep = _sweep.sweep_over
    sft = _methods.SFT
    dpo = _methods.DPO
    orpo = _methods.ORPO
    cpo = _methods.CPO
    kto = _methods.KTO
    grpo = _methods.GRPO
    online_dpo = _methods.ONLINE_DPO
    distill = _methods.DISTILL
    gkd = _methods.GKD

_MODULES = {
    "objectives": "objectives",
    **{name: f"objectives.{name}" for name in ("advantages", "losses", "objective", "scores", "terms")},
}
_NAMES = {
    "adapters.detach": ("detach",),
    "adapters.files": ("save",),
    "adapters.fuse": ("fuse",),
    "adapters.hub": ("push",),
    "adapters.merge": ("merge",),
    "adapters.peft": ("from_peft", "to_peft"),
    "adapters.prepare": ("disabled", "load", "prepare"),
    "batch": ("Batch", "chosen", "completions", "everything", "rejected"),
    "config.options": (
        "AdapterOptions",
        "CPOOptions",
        "DataOptions",
        "DistillOptions",
        "DPOOptions",
        "GRPOOptions",
        "KTOOptions",
        "ModelOptions",
        "OnlineDPOOptions",
        "ORPOOptions",
        "Output",
        "OwnSampling",
        "PairData",
        "PairSampling",
        "PromptData",
        "RewardOptions",
        "RowOptions",
        "SamplingOptions",
        "SFTOptions",
        "Training",
    ),
    "data.sources": ("pairs", "rows"),
    "errors": ("InputError", "RunError"),
    "methods": ("METHODS",),
    "models.logprobs": ("scorer", "token_logps"),
    "objectives.losses": ("dpop", "hinge", "ipo", "sigmoid"),
    "objectives.objective": (
        "batch_mean",
        "fixed_length",
        "Objective",
        "sequence_mean",
        "sequence_sum",
        "Term",
        "term",
        "token_mean",
        "watch",
    ),
    "objectives.quantity": ("reads",),
    "objectives.scores": ("log_odds", "log_ratio", "mean_log_ratio", "mean_logps", "sum_logps"),
    "objectives.surrogates": ("clipped_surrogate", "kl"),
    "objectives.terms": ("dft", "nll", "preference"),
    "reporting.reporter": ("Reporter",),
    "rollouts.compare": ("Generation", "compare"),
    "rollouts.engine": ("Decoding", "sample"),
    "rollouts.pairs": ("on_policy_pairs",),
    "rollouts.rewards": ("load_rewards", "NamedReward"),
    "rollouts.sampling": ("Sampling",),
    "rollouts.source": ("own_answers", "prompts", "Rollouts"),
    "training.results": ("RunResult",),
    "training.session": ("evaluate_split", "run"),
    "training.step": ("make_step",),
    "training.sweep": ("SweepResult",),
    "training.unpaired": ("unpaired",),
}
_HOME = {name: (module, name) for module, names in _NAMES.items() for name in names}
_METHODS = ("sft", "dpo", "orpo", "cpo", "kto", "grpo", "online_dpo", "distill", "gkd")
_HOME |= {name: ("methods", name.upper()) for name in _METHODS} | {"sweep": ("training.sweep", "sweep_over")}
"""Where each public name is defined, and under which name. The test of the public names compares this with the imports above."""

__all__ = sorted([*_HOME, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def _imported(name: str) -> Any:
    """The value of a public name."""
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # As the command line does, because it has an effect only before MLX is imported.
    import_module(".utils.environment", __name__).set_up_mlx()
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    module, original = _HOME[name]
    return getattr(import_module(f".{module}", __name__), original)


if not TYPE_CHECKING:  # a type checker takes a module with `__getattr__` to have every name
    __getattr__ = _imported


def __dir__() -> list[str]:
    return __all__
