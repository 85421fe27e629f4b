"""`mlxlora dpo`."""

from mlxlora.config.options import AdapterOptions, DPOOptions, ModelOptions, Output, PairData, Training

from .options import flags


@flags(starter="dpo")
def dpo(
    model: ModelOptions, adapter: AdapterOptions, data: PairData, training: Training, output: Output, objective: DPOOptions
) -> None:
    """Direct preference optimisation: prefer the chosen completion, held to a reference."""
    from mlxlora import methods as recipes

    recipes.dpo(model, adapter, data, training, output, objective)
