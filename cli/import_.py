"""`mlxlora import`."""

from mlxlora.config.fields import group, option
from mlxlora.config.options import BaseOptions, ModelOptions
from mlxlora.errors import InputError
from mlxlora.utils.output import echo_written

from .flags import flags


@group("Import")
class ImportOptions:
    """What is imported, and where to."""

    peft: str | None = option(None, "Folder of peft adapters: LoRA, rank-stabilized LoRA or DoRA.")
    adapter_path: str = option("adapters", "Folder of adapters to write.")
    overwrite: bool = option(False, "Replace a folder in --adapter-path.")


@flags()
def import_adapters(model: BaseOptions, importing: ImportOptions) -> None:
    """Convert adapters of the peft library to an adapter folder, to generate with or to train further."""
    from mlxlora.adapters.peft import from_peft

    if importing.peft is None:
        raise InputError("--peft is missing: name the folder to read")
    base = ModelOptions(model=model.model, trust_remote_code=model.trust_remote_code)
    modules = from_peft(importing.peft, base, importing.adapter_path, overwrite=importing.overwrite)
    echo_written("adapters", importing.adapter_path, f"{modules} modules")
