"""Quantization-aware training: compute with rounded weights, train the exact ones."""

from collections.abc import Callable
from collections.abc import Mapping
from functools import partial
from mlx_lm.tuner.dora import DoRAEmbedding
from mlx_lm.tuner.dora import DoRALinear
from typing import Any
import mlx.core as mx
import mlx.nn as nn
from ..models.quantize import QUANTIZATIONS
from ..errors import InputError
from .lora import adapted, base_of_adapter, unusual, update_of


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
    return partial(_rounded_weights, how=QUANTIZATIONS[name])


def _rounded_weights(model: nn.Module, how: Mapping[str, Any]) -> dict[str, mx.array]:
    return {path: _rounded(module, its) for path, module, its in _to_quantize(model, how)}


def _to_quantize(model: nn.Module, how: Mapping[str, Any]) -> list[tuple[str, nn.Module, dict[str, Any]]]:
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
