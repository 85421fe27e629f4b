"""Fuses adapters into the weights of their model: writes a model folder, quantized or not, and GGUF."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.gguf import convert_to_gguf
from mlx_lm.utils import dequantize_model, hf_repo_to_path, save

from ..config.options import ModelOptions
from ..data.stop_tokens import write_stop_tokens
from ..errors import InputError, choose
from ..models.loading import load_with_config, model_options
from ..models.quantize import QUANTIZATIONS, quantization_of, quantize_as, weight_of
from ..reporting.card import CARD, fused_card
from ..utils.files import atomic_file
from ..utils.folders import check_new_file, check_vacant, written_folder
from ..utils.marker import mark, marker_of
from ..utils.paths import check_links, real
from .lora import base_of_adapter
from .prepare import attach

GGUF_TYPES = ("llama", "mistral", "mixtral")  # as in mlx-lm
_Adapters = Sequence[tuple[str, nn.Module]]


@frozen
class QuantizedUpdate:
    """How quantizing W + ΔW changed the update ΔW, over all adapted modules; Q quantizes and dequantizes.

    Attributes:
        kept: ⟨Q(W + ΔW) - Q(W), ΔW⟩ / ‖ΔW‖², the share of the update that is left: 0 if the steps of the quantization round it
            away, 1 if all of it is left. Rounding unrelated to the update does not count.
        noise: ‖Q(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖, the rounding error relative to the update.
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
) -> QuantizedUpdate | None:
    """Writes the model with its adapters as a model folder, `mlxlora fuse` in Python.

    By default, a quantized model is quantized again in the same way.

    Args:
        model: the base, a folder or hub name, or its options.
        adapter_path: folder of the adapters.
        save_path: the folder to write, whole or not at all.
        dequantize: write full-precision weights.
        quantize: quantize the result: 2, 3, 4, 5, 6, 8 (bits), mxfp4, mxfp8 or nvfp4.
        gguf: also write this GGUF file (float16; llama, mistral and mixtral, as in mlx-lm).
        overwrite: replace a folder that `fuse` wrote, and the GGUF file.

    Returns:
        How quantization changed the update of the adapters; None if nothing is quantized.

    Raises:
        InputError: no such model or adapters, options that exclude each other, a folder in use.
    """
    model = model_options(model)
    if dequantize and quantize:
        raise InputError("--dequantize and --quantize exclude each other")
    if quantize:
        choose(QUANTIZATIONS, quantize, "quantize")
    folder = check_vacant(save_path, "--save-path", "fuse", overwrite=overwrite, apart_from=(str(model.model), adapter_path))
    file = check_new_file(gguf, "--gguf", overwrite=overwrite) if gguf else None
    base, tokenizer, config = load_with_config(model)
    if file:
        _check_gguf(config, dequantize, quantize)
    attach(base, adapter_path)
    whole, config, rounding = merged(base, config, dequantize=dequantize, quantize=quantize)
    _write(whole, tokenizer, config, str(model.model), folder)
    if file:
        _write_gguf(whole, config, folder, file)
    return rounding


def merged(
    model: nn.Module, config: Mapping[str, Any], *, dequantize: bool = False, quantize: str | None = None
) -> tuple[nn.Module, dict[str, Any], QuantizedUpdate | None]:
    """Adds the adapters of a model to its weights, in the dtype of the base; see `fuse` for the arguments.

    Returns:
        The model, its configuration, and how quantization changed the update.
    """
    adapters = [(name, m) for name, m in model.named_modules() if hasattr(m, "fuse")]
    keep = not (dequantize or quantize)
    model.update_modules(tree_unflatten([(name, _merge(m, keep)) for name, m in adapters]))
    changed = dict(config)
    if not keep:
        model = dequantize_model(model)
        changed = {name: value for name, value in config.items() if name not in ("quantization", "quantization_config")}
    if quantize:
        model, changed = quantize_as(model, changed, quantize)
    return model, changed, quantized_update(model, adapters)


def _merge(adapter: Any, keep: bool) -> nn.Module:
    """Base and adapter as one module; `keep` quantizes it as the base was."""
    base = base_of_adapter(adapter)
    dense = adapter.fuse(dequantize=True)
    dense.weight = dense.weight.astype(weight_of(base).dtype)  # mlx-lm's DoRA would leave float32
    if not keep or "scales" not in base:
        return dense
    return dense.to_quantized(**quantization_of(base))


def quantized_update(model: nn.Module, adapters: _Adapters) -> QuantizedUpdate | None:
    """How the quantization of a merged model changed the update of its adapters; None if nothing is quantized."""
    modules = dict(model.named_modules())
    sums = [_rounded(m, modules[name]) for name, m in adapters if "scales" in modules[name]]
    if not sums:
        return None
    along, update, error, weight = (sum(column) for column in zip(*sums, strict=True))
    if not update:
        return None
    return QuantizedUpdate(kept=along / update, noise=(error / update) ** 0.5, size=(update / weight) ** 0.5)


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


def warning(rounding: QuantizedUpdate | None) -> str:
    """A warning on one line if less than half or more than 1.5 times the update is left; else empty.

    An update much smaller than a step can also grow, if weights lie on the edge between two steps.

    >>> warning(QuantizedUpdate(kept=0.123, noise=1.9, size=0.02))
    'quantization rounds the update away: it is 2 % of the weights, less than a step, and 12 % of it is left; use --dequantize'
    >>> warning(QuantizedUpdate(kept=0.98, noise=0.5, size=0.2))
    ''
    """
    if rounding is None or abs(rounding.kept - 1) <= 0.5:
        return ""
    kept = rounding.kept
    left = f"{max(kept, 0) * 100:.0f} % of it is left" if kept < 1 else f"it becomes {kept:.1f} times as large"
    size = f"{rounding.size * 100:.2g} %"
    return f"quantization rounds the update away: it is {size} of the weights, less than a step, and {left}; use --dequantize"


# --- files ------------------------------------------------------------------------------------


def _write(model: nn.Module, tokenizer: Any, config: dict[str, Any], source: str, folder: Path) -> None:
    """Writes a model folder with the tokenizer and the other files of its base."""
    original = Path(source) if Path(source).exists() else hf_repo_to_path(source)
    check_links(original, f"--model {source}")
    with written_folder(folder, "--save-path", "fuse") as temporary:
        save(temporary, str(original), model, tokenizer, dict(config), donate_model=False)
        write_stop_tokens(temporary, tokenizer)
        (temporary / CARD).write_text(fused_card(source, config), encoding="utf-8")


def _check_gguf(config: Mapping[str, Any], dequantize: bool, quantize: str | None) -> None:
    kind = config.get("model_type")
    if kind not in GGUF_TYPES:
        raise InputError(f"--gguf: mlx-lm converts {', '.join(GGUF_TYPES)}, not {kind}; use llama.cpp's converter on --save-path")
    if quantize or ("quantization" in config and not dequantize):
        raise InputError("--gguf needs weights that are not quantized; use --dequantize")


def _write_gguf(model: nn.Module, config: dict[str, Any], folder: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary, redirect_stdout(io.StringIO()):
        written = temporary.with_name(f"{temporary.name}.gguf")  # MLX would append this suffix
        try:
            convert_to_gguf(folder, dict(tree_flatten(model.parameters())), config, str(written))
        except (
            AssertionError,
            KeyError,
            ValueError,
        ) as error:  # an incomplete configuration, an unknown kind of tokenizer
            raise InputError(f"--gguf {file}: mlx-lm cannot convert {folder} ({error!r}); use llama.cpp's converter") from None
        written.replace(temporary)
    inside = real(file)
    if (marker := marker_of(folder)) and inside.is_relative_to(real(folder)):  # it may be replaced with the folder
        mark(folder, marker.command, marker.files | {inside.relative_to(real(folder)).as_posix()})
