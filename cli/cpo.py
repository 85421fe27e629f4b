"""`mlxlora cpo`."""

from mlxlora.config.options import AdapterOptions, CPOOptions, ModelOptions, Output, PairData, Training

from .options import flags


@flags(starter="cpo")
def cpo(
    model: ModelOptions, adapter: AdapterOptions, data: PairData, training: Training, output: Output, objective: CPOOptions
) -> None:
    """Contrastive preference optimisation: prefer the chosen completion, without a reference."""
    from mlxlora import methods as recipes

    recipes.cpo(model, adapter, data, training, output, objective)
