"""`mlxlora fuse`."""

from mlxlora.config.fields import group, option
from mlxlora.config.options import BaseOptions, Quantization
from mlxlora.utils.output import echo, echo_written, say

from .flags import flags
from .generate import BASE


@group("Fusing")
class FuseOptions:
    """Which adapters are fused, and how the result is stored."""

    adapter_path: str = option("adapters", "Folder of adapters.")
    save_path: str = option("fused", "Model folder to write.")
    dequantize: bool = option(False, "Write full-precision weights; default: quantize a quantized model again.")
    quantize: Quantization | None = option(None, "Quantize the result to this many bits, or to a format.")
    gguf: str | None = option(None, "Also write this GGUF file (llama, mistral, mixtral; float16).")
    overwrite: bool = option(False, "Replace a model folder in --save-path.")


@group("Hub")
class HubOptions:
    """Where the result is uploaded."""

    push_to_hub: str | None = option(None, "Upload the result to this repository, ORG/NAME.")
    public: bool = option(False, "Make a new repository public; default: private.")


@flags(texts={"model": BASE})
def fuse(model: BaseOptions, fusing: FuseOptions, hub: HubOptions) -> None:
    """Add adapters to the weights of their model; writes a model folder."""
    from mlxlora.adapters.fuse import fuse as run
    from mlxlora.adapters.fuse import warning
    from mlxlora.adapters.prepare import base_of

    ready(hub)
    rounding = run(
        base_of(model, fusing.adapter_path),
        fusing.adapter_path,
        fusing.save_path,
        dequantize=fusing.dequantize,
        quantize=fusing.quantize,
        gguf=fusing.gguf,
        overwrite=fusing.overwrite,
    )
    if problem := warning(rounding):
        say(f"warning: {problem}")
    elif rounding:
        echo(f"quantization keeps {min(rounding.kept, 1):.0%} of the adapters' update")
    echo_written("fused", fusing.save_path)
    if fusing.gguf:
        echo_written("gguf", fusing.gguf)
    upload(fusing.save_path, hub)


def ready(hub: HubOptions) -> None:
    """Fails before the work if the upload would fail."""
    if hub.push_to_hub:
        from mlxlora.adapters.hub import connect

        connect(hub.push_to_hub)


def upload(folder: str, hub: HubOptions) -> None:
    """Uploads a folder if --push-to-hub names a repository."""
    if hub.push_to_hub:
        from mlxlora.adapters.hub import push

        echo_written("hub", push(folder, hub.push_to_hub, public=hub.public))
