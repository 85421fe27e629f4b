"""Adapters made part of the weights: a model folder that needs no adapter files, quantised or not, and GGUF."""

from attrs import frozen
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import redirect_stdout
from mlx.utils import tree_flatten
from mlx.utils import tree_unflatten
from mlx_lm.gguf import convert_to_gguf
from mlx_lm.utils import dequantize_model
from mlx_lm.utils import hf_repo_to_path
from mlx_lm.utils import save
from pathlib import Path
from typing import Any
import io
import mlx.core as mx
import mlx.nn as nn
from ..errors import InputError, choose
from ..models.quantize import QUANTIZATIONS, quantization_of, quantized, weight_of
from ..utils.folders import check_vacant
from ..models.loading import load_with_config, model_options
from ..config.options import ModelOptions
from .prepare import attach
from .lora import base_of_adapter
from ..reporting.card import CARD, fused_card
from ..utils.files import atomic_directory, atomic_file

GGUF_TYPES = ("llama", "mistral", "mixtral")  # as mlx-lm's
Adapted = Sequence[tuple[str, nn.Module]]


@frozen
class Rounding:
    """What quantising the sum W + ΔW did to the update ΔW, over all adapted modules; Q is quantised and read back.

    Attributes:
        kept: ⟨Q(W + ΔW) - Q(W), ΔW⟩ / ‖ΔW‖², the share of the update that is left: 0 where it vanished in the steps of the
            quantisation, 1 where it is there in full. Rounding that has nothing to do with the update does not count.
        noise: ‖Q(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖, all that rounding changed.
        size: ‖ΔW‖ / ‖W‖.
    """

    kept: float
    noise: float
    size: float


def fuse(
    model: str | ModelOptions,
    adapter_path: str,
    save_path: str | Path,
    *,
    dequantize: bool = False,
    quantize: str | None = None,
    gguf: str | Path | None = None,
    overwrite: bool = False,
) -> Rounding | None:
    """Writes the model with its adapters as a model folder of its own, `mlxlora fuse` in Python.

    A quantised model is quantised again as it was, unless it is told otherwise.

    Args:
        model: the base, a folder or hub name, or its options.
        adapter_path: folder of the adapters.
        save_path: the folder to write; it appears whole or not at all.
        dequantize: write full-precision weights.
        quantize: quantise the result: 2, 3, 4, 5, 6, 8 (bits), mxfp4, mxfp8 or nvfp4.
        gguf: also write this GGUF file (float16; llama, mistral and mixtral, as mlx-lm has it).
        overwrite: replace a model folder.

    Returns:
        What quantisation did to the adapters; None if it did nothing.

    Raises:
        InputError: no such model or adapters, options that exclude each other, a folder in use.
    """
    model = model_options(model)
    if dequantize and quantize:
        raise InputError("--dequantize and --quantize exclude each other")
    if quantize:
        choose(QUANTIZATIONS, quantize, "quantize")
    folder = check_vacant(
        save_path, "--save-path", overwrite=overwrite, marker="config.json", apart_from=(model.model, adapter_path)
    )
    base, tokenizer, config = load_with_config(model)
    if gguf:
        _check_gguf(config, dequantize, quantize)
    attach(base, adapter_path)
    whole, config, rounding = merged(base, config, dequantize=dequantize, quantize=quantize)
    _write(whole, tokenizer, config, str(model.model), folder)
    if gguf:
        _write_gguf(whole, config, folder, Path(gguf))
    return rounding


def merged(
    model: nn.Module, config: Mapping[str, Any], *, dequantize: bool = False, quantize: str | None = None
) -> tuple[nn.Module, dict[str, Any], Rounding | None]:
    """The model with its adapters added to its weights, and its configuration.

    Each module is merged in the type of its base's weights; see `fuse` for the arguments.
    """
    adapted = [(name, m) for name, m in model.named_modules() if hasattr(m, "fuse")]
    keep = not (dequantize or quantize)
    model.update_modules(tree_unflatten([(name, _merge(m, keep)) for name, m in adapted]))
    changed = dict(config)
    if not keep:
        model = dequantize_model(model)
        changed = {name: value for name, value in config.items() if name not in ("quantization", "quantization_config")}
    if quantize:
        model, changed = quantized(model, changed, quantize)
    return model, changed, rounding(model, adapted)


def _merge(adapter: Any, keep: bool) -> nn.Module:
    """Base and adapter as one module; `keep` quantises it as the base was."""
    base = base_of_adapter(adapter)
    dense = adapter.fuse(dequantize=True)
    dense.weight = dense.weight.astype(weight_of(base).dtype)  # mlx-lm's DoRA would leave float32
    if not keep or "scales" not in base:
        return dense
    return dense.to_quantized(**quantization_of(base))


def rounding(model: nn.Module, adapted: Adapted) -> Rounding | None:
    """What the quantisation of a merged model did to the adapters that it was merged from; None where nothing is quantised."""
    modules = dict(model.named_modules())
    sums = [_rounded(m, modules[name]) for name, m in adapted if "scales" in modules[name]]
    if not sums:
        return None
    along, update, error, weight = (sum(column) for column in zip(*sums, strict=True))
    if not update:
        return None
    return Rounding(kept=along / update, noise=(error / update) ** 0.5, size=(update / weight) ** 0.5)


def _rounded(adapter: Any, quantized: Any) -> tuple[float, ...]:
    """⟨Q(W + ΔW) - Q(W), ΔW⟩, ‖ΔW‖², ‖Q(W + ΔW) - (W + ΔW)‖², ‖W‖² of one module."""
    how = quantization_of(quantized)
    base = weight_of(base_of_adapter(adapter))
    before = mx.dequantize(*mx.quantize(base, **how), **how).astype(mx.float32)
    weight, wanted = base.astype(mx.float32), adapter.fuse(dequantize=True).weight.astype(mx.float32)
    update, after = wanted - weight, weight_of(quantized).astype(mx.float32)
    sums = (((after - before) * update).sum(), update.square().sum(), (after - wanted).square().sum(), weight.square().sum())
    mx.eval(sums)
    return tuple(float(value) for value in sums)


def warning(rounding: Rounding | None) -> str:
    """What a user has to know of a `Rounding`, in one line; empty where the update is left to within half of it.

    An update far below a step may also come out larger, where weights lay on the edge between two steps.

    >>> warning(Rounding(kept=0.123, noise=1.9, size=0.02))
    'update lost in rounding: it is 2 % of the weights, less than a step, and 12 % of it is left; use --dequantize'
    >>> warning(Rounding(kept=0.98, noise=0.5, size=0.2))
    ''
    """
    if rounding is None or abs(rounding.kept - 1) <= 0.5:
        return ""
    kept = rounding.kept
    left = f"{max(kept, 0) * 100:.0f} % of it is left" if kept < 1 else f"it comes out {kept:.1f} times as large"
    return (
        f"update lost in rounding: it is {rounding.size * 100:.2g} % of the weights, less than a step, and {left}; use --dequantize"
    )


# --- files ------------------------------------------------------------------------------------


def _write(model: nn.Module, tokenizer: Any, config: dict[str, Any], source: str, folder: Path) -> None:
    """A model folder with the tokenizer and the other files of its base."""
    original = Path(source) if Path(source).exists() else hf_repo_to_path(source)
    with atomic_directory(folder) as temporary:
        save(temporary, str(original), model, tokenizer, dict(config), donate_model=False)
        (temporary / CARD).write_text(fused_card(source, config), encoding="utf-8")


def _check_gguf(config: Mapping[str, Any], dequantize: bool, quantize: str | None) -> None:
    kind = config.get("model_type")
    if kind not in GGUF_TYPES:
        raise InputError(f"--gguf: mlx-lm converts {', '.join(GGUF_TYPES)}, not {kind}; use llama.cpp's converter on --save-path")
    if quantize or ("quantization" in config and not dequantize):
        raise InputError("--gguf needs weights that are not quantised; use --dequantize")


def _write_gguf(model: nn.Module, config: dict[str, Any], folder: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary, redirect_stdout(io.StringIO()):
        written = temporary.with_name(f"{temporary.name}.gguf")  # MLX would append the suffix
        try:
            convert_to_gguf(folder, dict(tree_flatten(model.parameters())), config, str(written))
        except (AssertionError, KeyError, ValueError) as error:  # an incomplete configuration, another kind of tokenizer
            raise InputError(f"--gguf {file}: mlx-lm cannot convert {folder} ({error!r}); use llama.cpp's converter") from None
        written.replace(temporary)
