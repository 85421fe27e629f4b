"""Weights in fewer bits: quantised as a model is loaded, or rounded in training as they will be quantised afterwards."""

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.utils import quantize_model

from .errors import InputError
from .lora import adapted, base_of_adapter, unusual, update_of

QUANTISATIONS: dict[str, dict[str, Any]] = {
    **{str(bits): {"group_size": 64, "bits": bits} for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
"""Formats by name, as mlx-lm's `quantize_model` takes them."""


def quantise(model: nn.Module, config: Mapping[str, Any], name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a format of `QUANTISATIONS`, as `mlx_lm.convert -q` makes it, and its configuration."""
    with redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
        return quantize_model(model, dict(config), **QUANTISATIONS[name])


def quantise_loaded(model: nn.Module, config: Mapping[str, Any], name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The same for a model as it is loaded, weight after weight, so that it need not fit into memory before.

    Raises:
        InputError: it is quantised already, or has no weights that can be.
    """
    if done := config.get("quantization") or config.get("quantization_config"):
        raise InputError(f"--quantize {name}: the model is quantised already ({_told(done)}); leave --quantize out")
    model, changed = quantise(model, config, name)
    if not any("scales" in module for module in model.modules()):
        size = changed["quantization"]["group_size"]
        raise InputError(f"--quantize {name}: no matrix of the model has rows of a multiple of {size} numbers; leave it out")
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
    return model, changed


def quantisation_of(module: Any) -> dict[str, Any]:
    """How a module is quantised, as `mx.quantize` takes it."""
    mode = getattr(module, "mode", "affine")
    return {"group_size": module.group_size, "bits": module.bits, **({} if mode == "affine" else {"mode": mode})}


def weight_of(module: Any) -> mx.array:
    """The weights of a module, quantised ones read back."""
    if "scales" not in module:
        return module.weight
    return mx.dequantize(module.weight, module.scales, module.get("biases"), **quantisation_of(module))


def _told(quantization: Any) -> str:
    bits = quantization.get("bits") if isinstance(quantization, Mapping) else None
    return f"{bits} bits" if bits else "in its config.json"


# --- in training ------------------------------------------------------------------------------


def rounded(model: nn.Module, name: str) -> Callable[[nn.Module], dict[str, mx.array]]:
    """What gives the weights, by path, with which the model computes as it will once it is quantised.

    W becomes Q(W); a gradient at Q(W) is taken as that at W, the straight-through estimator (Bengio et al., 2013,
    https://arxiv.org/abs/1308.3432). Under an adapter W becomes Q(W + ΔW) - ΔW, so that with the update the model has
    Q(W + ΔW), what fusing and quantising will make of it. What is rounded is what `mlx_lm.convert -q` quantises.

    Raises:
        InputError: weights that are quantised already, or DoRA.
    """
    if any("scales" in module for module in model.modules()):
        after = f"quantise afterwards, `mlxlora fuse --quantize {name}`"
        raise InputError(f"--qat {name}: the model is quantised; leave --quantize out or give one that is not, and {after}")
    if own := unusual(model):
        raise InputError(f"--qat {name}: {own[0]} is an adapter of the model's own kind; name others with --lora-keys")
    if any(isinstance(module, DoRALinear | DoRAEmbedding) for module in model.modules()):
        raise InputError(f"--qat {name} goes with --train-type lora or full; DoRA's magnitudes are not in the weights")
    return partial(_rounded_weights, how=QUANTISATIONS[name])


def _rounded_weights(model: nn.Module, how: Mapping[str, Any]) -> dict[str, mx.array]:
    return {path: _rounded(module, its) for path, module, its in _to_quantise(model, how)}


def _to_quantise(model: nn.Module, how: Mapping[str, Any]) -> list[tuple[str, nn.Module, dict[str, Any]]]:
    """Path of the weights, module (an adapter in place of what it adapts) and format of all that `quantize_model` quantises."""
    adapters, wanted = adapted(model), getattr(model, "quant_predicate", None)
    bases = {id(base_of_adapter(m)): (path, m) for path, m in adapters.items()}
    found = []
    for place, module in model.named_modules():
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % how["group_size"]:
            continue
        path, outer = bases.get(id(module), (place, module))
        answer = wanted(path, module) if wanted else True
        if answer:
            found.append((f"{place}.weight", outer, answer if isinstance(answer, dict) else dict(how)))
    return found


def _rounded(module: Any, how: Mapping[str, Any]) -> mx.array:
    if "lora_a" not in module:
        return _read_back(module.weight, how)
    weight: Any = base_of_adapter(module).weight
    update = update_of(module).astype(weight.dtype)
    return _read_back(weight + update, how) - update


def _read_back(weight: mx.array, how: Mapping[str, Any]) -> mx.array:
    return mx.dequantize(*mx.quantize(weight, **how), **how).astype(weight.dtype)
