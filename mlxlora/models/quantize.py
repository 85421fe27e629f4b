"""Quantized weights: formats, quantizing a model while it is loaded, and reading weights back."""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from ..errors import InputError

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    **{str(bits): {"group_size": 64, "bits": bits} for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
"""Formats by name, as mlx-lm's `quantize_model` takes them."""


def quantize_as(model: nn.Module, config: Mapping[str, Any], name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a format of `QUANTIZATIONS`, as `mlx_lm.convert -q` makes it, and its configuration."""
    with redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
        return quantize_model(model, dict(config), **QUANTIZATIONS[name])


def quantize_loaded(model: nn.Module, config: Mapping[str, Any], name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Quantizes a model while it is loaded, weight by weight, so that its full weights need not fit into memory.

    Raises:
        InputError: the model is quantized already, or has no weights that can be quantized.
    """
    if done := config.get("quantization") or config.get("quantization_config"):
        raise InputError(f"--quantize {name}: the model is quantized already ({_told(done)}); leave --quantize out")
    model, changed = quantize_as(model, config, name)
    if not any("scales" in module for module in model.modules()):
        size = changed["quantization"]["group_size"]
        raise InputError(f"--quantize {name}: no matrix of the model has rows of a multiple of {size} numbers; leave it out")
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
    return model, changed


def quantization_of(module: Any) -> dict[str, Any]:
    """How a module is quantized, as arguments of `mx.quantize`."""
    mode = getattr(module, "mode", "affine")
    return {"group_size": module.group_size, "bits": module.bits, **({} if mode == "affine" else {"mode": mode})}


def weight_of(module: Any) -> mx.array:
    """The weights of a module, dequantized if necessary."""
    if "scales" not in module:
        return module.weight
    return mx.dequantize(module.weight, module.scales, module.get("biases"), **quantization_of(module))


def _told(quantization: Any) -> str:
    bits = quantization.get("bits") if isinstance(quantization, Mapping) else None
    return f"{bits} bits" if bits else "in its config.json"
