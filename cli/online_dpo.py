"""`mlxlora online-dpo`."""

from mlxlora.config.options import (
    AdapterOptions,
    ModelOptions,
    OnlineDPOOptions,
    Output,
    PairSampling,
    PromptData,
    RewardOptions,
    Training,
)

from .options import flags


@flags(starter="online-dpo")
def online_dpo(
    model: ModelOptions,
    adapter: AdapterOptions,
    data: PromptData,
    training: Training,
    output: Output,
    sampling: PairSampling,
    rewards: RewardOptions,
    objective: OnlineDPOOptions,
) -> None:
    """DPO on pairs that the policy samples and rewards choose from; with --xpo-alpha XPO."""
    from mlxlora import methods as recipes

    recipes.online_dpo(model, adapter, data, training, output, sampling, rewards, objective)
