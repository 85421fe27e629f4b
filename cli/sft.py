"""`mlxlora sft`."""

from mlxlora.config.options import AdapterOptions, DataOptions, ModelOptions, Output, SFTOptions, Training

from .options import flags


@flags(starter="sft")
def sft(
    model: ModelOptions, adapter: AdapterOptions, data: DataOptions, training: Training, output: Output, objective: SFTOptions
) -> None:
    """Supervised fine-tuning: raise the likelihood of completions, conversations or plain text."""
    from mlxlora import methods as recipes

    recipes.sft(model, adapter, data, training, output, objective)
