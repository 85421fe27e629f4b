"""`mlxlora import`."""

import typer

from mlxlora.config.fields import group, option
from mlxlora.config.options import BaseOptions, ModelOptions
from mlxlora.errors import InputError

from .options import flags


@group("Import")
class ImportOptions:
    """What is imported, and where to."""

    peft: str | None = option(None, "Folder of the peft library: LoRA, rank-stabilised LoRA or DoRA.")
    adapter_path: str = option("adapters", "Folder of adapters to write.")
    overwrite: bool = option(False, "Replace such a folder.")


@flags()
def import_adapters(model: BaseOptions, importing: ImportOptions) -> None:
    """Write adapters of the peft library as an adapter folder, to generate with or to train on."""
    from mlxlora.adapters.peft import from_peft

    if importing.peft is None:
        raise InputError("--peft is missing: the folder to read")
    base = ModelOptions(model=model.model, trust_remote_code=model.trust_remote_code)
    modules = from_peft(importing.peft, base, importing.adapter_path, overwrite=importing.overwrite)
    typer.echo(f"adapters  {importing.adapter_path} ({modules} modules)")
