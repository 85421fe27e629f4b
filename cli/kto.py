"""`mlxlora kto`."""

from mlxlora.config.options import AdapterOptions, KTOOptions, ModelOptions, Output, RowOptions, Training

from .options import flags


@flags(starter="kto")
def kto(
    model: ModelOptions, adapter: AdapterOptions, data: RowOptions, training: Training, output: Output, objective: KTOOptions
) -> None:
    """Kahneman-Tversky optimisation: completions that are good or bad on their own, held to a reference."""
    from mlxlora import methods as recipes

    recipes.kto(model, adapter, data, training, output, objective)
