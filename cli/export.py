"""`mlxlora export`."""

import typer

from mlxlora.config.fields import group, option
from mlxlora.config.options import BaseOptions
from mlxlora.errors import InputError

from .fuse import HubOptions, ready, upload
from .generate import BASE
from .options import flags


@group("Export")
class ExportOptions:
    """What is exported, and where to."""

    adapter_path: str = option("adapters", "Folder of adapters.")
    peft: str | None = option(None, "Folder to write, as the peft library reads it.")
    base_model: str | None = option(None, "How transformers is to find the base, ORG/NAME; default: as in --model.")
    overwrite: bool = option(False, "Replace such a folder.")


@flags(texts={"model": BASE})
def export(model: BaseOptions, exporting: ExportOptions, hub: HubOptions) -> None:
    """Write adapters in the format of the peft library, for transformers, vLLM and others."""
    from mlxlora.adapters.peft import to_peft
    from mlxlora.adapters.prepare import base_of

    if exporting.peft is None:
        raise InputError("--peft is missing: the folder to write")
    ready(hub)
    modules = to_peft(
        base_of(model, exporting.adapter_path),
        exporting.adapter_path,
        exporting.peft,
        base_model=exporting.base_model,
        overwrite=exporting.overwrite,
    )
    typer.echo(f"peft   {exporting.peft} ({modules} modules)")
    upload(exporting.peft, hub)
