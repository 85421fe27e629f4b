"""`mlxlora distill`."""

from mlxlora.config.options import AdapterOptions, DataOptions, DistillOptions, ModelOptions, Output, Training

from .options import flags


@flags()
def distill(
    model: ModelOptions, adapter: AdapterOptions, data: DataOptions, training: Training, output: Output, objective: DistillOptions
) -> None:
    """Knowledge distillation: the distribution of a teacher at every scored token."""
    from mlxlora import methods as recipes

    recipes.distill(model, adapter, data, training, output, objective)
