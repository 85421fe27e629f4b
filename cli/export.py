"""`mlxlora export`."""

from mlxlora.config.fields import group, option
from mlxlora.config.options import BaseOptions
from mlxlora.errors import InputError
from mlxlora.utils.output import echo_written

from .flags import flags
from .fuse import HubOptions, ready, upload
from .generate import BASE


@group("Export")
class ExportOptions:
    """What is exported, and where to."""

    adapter_path: str = option("adapters", "Folder of adapters.")
    peft: str | None = option(None, "Folder of peft adapters to write.")
    base_model: str | None = option(None, "Name of the base for transformers, ORG/NAME; default: that of --model.")
    overwrite: bool = option(False, "Replace a folder in --peft.")


@flags(texts={"model": BASE})
def export(model: BaseOptions, exporting: ExportOptions, hub: HubOptions) -> None:
    """Write adapters in the format of the peft library, for transformers, vLLM and others."""
    from mlxlora.adapters.peft import to_peft
    from mlxlora.adapters.prepare import base_of

    if exporting.peft is None:
        raise InputError("--peft is missing: name the folder to write")
    ready(hub)
    modules = to_peft(
        base_of(model, exporting.adapter_path),
        exporting.adapter_path,
        exporting.peft,
        base_model=exporting.base_model,
        overwrite=exporting.overwrite,
    )
    echo_written("peft", exporting.peft, f"{modules} modules")
    upload(exporting.peft, hub)
