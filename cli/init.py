"""`mlxlora init`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mlxlora.utils.environment import set_up_mlx
from mlxlora.utils.output import echo_written


def init(
    config_file: Annotated[Path, typer.Option(help="config.json of any architecture in mlx-lm.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with the tokenizer's files.")],
    output: Annotated[Path, typer.Option(help="Model folder to write; must be empty or absent.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights.", min=0, max=2**63 - 1)] = 0,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")] = "float32",
) -> None:
    """Write a model with random weights, to train from scratch with `mlxlora sft --train-type full`."""
    set_up_mlx()
    from mlxlora.models.initialize import init_model

    parameters = init_model(config_file, tokenizer, output, seed, dtype)
    echo_written("model", output, f"{parameters:,} parameters, {dtype}")
