"""`mlxlora gkd`."""

from mlxlora.config.options import AdapterOptions, DistillOptions, ModelOptions, Output, OwnSampling, PromptData, Training

from .options import flags


@flags()
def gkd(
    model: ModelOptions,
    adapter: AdapterOptions,
    data: PromptData,
    training: Training,
    output: Output,
    sampling: OwnSampling,
    objective: DistillOptions,
) -> None:
    """On-policy distillation: the distribution of a teacher at every token that the student samples itself."""
    from mlxlora import methods as recipes

    recipes.gkd(model, adapter, data, training, output, sampling, objective)
