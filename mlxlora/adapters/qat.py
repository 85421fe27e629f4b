"""Quantization-aware training: compute with rounded weights, train the exact ones."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear

from ..errors import InputError
from ..models.quantize import QUANTIZATIONS
from .lora import adapters_of, base_of_adapter, unusual, update_of


def rounded(model: nn.Module, name: str) -> Callable[[nn.Module], dict[str, mx.array]]:
    """A function of the model that returns the rounded weights by path, with which it computes as it will when quantized.

    W becomes Q(W); the gradient at Q(W) counts as the gradient at W, the straight-through estimator (Bengio et al., 2013,
    https://arxiv.org/abs/1308.3432). Under an adapter W becomes Q(W + ΔW) - ΔW, so that the model with the update has
    Q(W + ΔW), the result of fusing and quantizing. It rounds the weights that `mlx_lm.convert -q` quantizes.

    Raises:
        InputError: the weights are quantized already, or the adapters are DoRA or a kind of the model's own.
    """
    if any("scales" in module for module in model.modules()):
        after = f"quantize afterwards with `mlxlora fuse --quantize {name}`"
        raise InputError(f"--qat {name}: the model is quantized; omit --quantize or use a model that is not, and {after}")
    if own := unusual(model):
        raise InputError(f"--qat {name}: {own[0]} is an adapter of the model's own kind; name others with --lora-keys")
    if any(isinstance(module, DoRALinear | DoRAEmbedding) for module in model.modules()):
        raise InputError(f"--qat {name} goes with --train-type lora or full; DoRA's magnitudes are not in the weights")
    return partial(_rounded_weights, how=QUANTIZATIONS[name])


def _rounded_weights(model: nn.Module, how: Mapping[str, Any]) -> dict[str, mx.array]:
    return {path: _rounded(module, its) for path, module, its in _to_quantize(model, how)}


def _to_quantize(model: nn.Module, how: Mapping[str, Any]) -> list[tuple[str, nn.Module, dict[str, Any]]]:
    """What `quantize_model` quantizes: path of the weights, module (an adapter in place of its base) and format."""
    adapters, wanted = adapters_of(model), getattr(model, "quant_predicate", None)
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
