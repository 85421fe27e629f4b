"""`mlxlora orpo`."""

from mlxlora.config.options import AdapterOptions, ModelOptions, ORPOOptions, Output, PairData, Training

from .options import flags


@flags(starter="orpo")
def orpo(
    model: ModelOptions, adapter: AdapterOptions, data: PairData, training: Training, output: Output, objective: ORPOOptions
) -> None:
    """Odds-ratio preference optimisation: learn the chosen completion and shun the rejected, without a reference."""
    from mlxlora import methods as recipes

    recipes.orpo(model, adapter, data, training, output, objective)
