"""`mlxlora grpo`."""

from mlxlora.config.options import (
    AdapterOptions,
    GRPOOptions,
    ModelOptions,
    Output,
    PromptData,
    RewardOptions,
    SamplingOptions,
    Training,
)

from .options import flags


@flags(starter="grpo")
def grpo(
    model: ModelOptions,
    adapter: AdapterOptions,
    data: PromptData,
    training: Training,
    output: Output,
    sampling: SamplingOptions,
    rewards: RewardOptions,
    objective: GRPOOptions,
) -> None:
    """Group-relative policy optimisation: sample, reward, and prefer what did better than its group."""
    from mlxlora import methods as recipes

    recipes.grpo(model, adapter, data, training, output, sampling, rewards, objective)
