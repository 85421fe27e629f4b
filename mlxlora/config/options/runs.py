"""All options of a run of each method: `MethodOptions`, then the groups in the order of the help."""

from ..method_options import MethodOptions
from .data import DataOptions, PairData, PromptData, RowOptions
from .model import AdapterOptions, ModelOptions
from .objective import (
    CPOOptions,
    DistillOptions,
    DPOOptions,
    GRPOOptions,
    KTOOptions,
    OnlineDPOOptions,
    ORPOOptions,
    SFTOptions,
)
from .output import Output
from .sampling import OwnSampling, PairSampling, RewardOptions, SamplingOptions
from .training import Training


class SFTRun(MethodOptions, ModelOptions, AdapterOptions, DataOptions, Training, Output, SFTOptions):
    """Options of `mlxlora sft`."""


class DPORun(MethodOptions, ModelOptions, AdapterOptions, PairData, Training, Output, DPOOptions):
    """Options of `mlxlora dpo`."""


class ORPORun(MethodOptions, ModelOptions, AdapterOptions, PairData, Training, Output, ORPOOptions):
    """Options of `mlxlora orpo`."""


class CPORun(MethodOptions, ModelOptions, AdapterOptions, PairData, Training, Output, CPOOptions):
    """Options of `mlxlora cpo`."""


class KTORun(MethodOptions, ModelOptions, AdapterOptions, RowOptions, Training, Output, KTOOptions):
    """Options of `mlxlora kto`."""


class GRPORun(
    MethodOptions, ModelOptions, AdapterOptions, PromptData, Training, Output, SamplingOptions, RewardOptions, GRPOOptions
):
    """Options of `mlxlora grpo`."""


class OnlineDPORun(
    MethodOptions, ModelOptions, AdapterOptions, PromptData, Training, Output, PairSampling, RewardOptions, OnlineDPOOptions
):
    """Options of `mlxlora online-dpo`."""


class DistillRun(MethodOptions, ModelOptions, AdapterOptions, DataOptions, Training, Output, DistillOptions):
    """Options of `mlxlora distill`."""


class GKDRun(MethodOptions, ModelOptions, AdapterOptions, PromptData, Training, Output, OwnSampling, DistillOptions):
    """Options of `mlxlora gkd`."""
