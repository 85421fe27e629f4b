"""`mlxlora merge`."""

from typing import Annotated

import typer

from mlxlora.errors import InputError
from mlxlora.utils.environment import set_up_mlx
from mlxlora.utils.output import echo_written


def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders of LoRA adapters of one model.")],
    save_path: Annotated[str, typer.Option("--save-path", help="Folder of adapters to write.")] = "merged",
    weights: Annotated[str | None, typer.Option("--weights", help="A weight for each, such as 0.5,0.5; default: 1.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Their common model, if they name it differently.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder of adapters in --save-path.")] = False,
) -> None:
    """Merge adapters into the exact weighted sum of their updates; its rank is the sum of their ranks."""
    set_up_mlx()
    from mlxlora.adapters import merge as merging

    rank = merging.merge(adapters, save_path, weights=_numbers(weights), model=model, overwrite=overwrite)
    echo_written("merged", save_path, f"rank {rank}")


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights must be numbers such as 0.5,0.5, got {text!r}") from None
