"""Layers whose weights a model reads itself instead of calling the layer: an adapter around them has no effect, or no weight.

mlx-lm's own choice of layers, all linear ones of the blocks, includes them, and its forward pass then fails. Examples are
gemma3n's `prediction_coefs`, kimi_k3's `mlp_res_proj`, and the embedding of minicpm where it is the output layer too.
"""

import inspect
import re
from collections.abc import Iterator
from functools import cache
from types import FunctionType

import mlx.nn as nn

_BEFORE_TRAINING = ("__init__", "sanitize", "shard")
_READ = re.compile(r"\bself\.(\w+)\.weight\b")
_AS_OUTPUT = re.compile(r"@ self\.((?:\w+\.)*\w+)\.weight\.T\b")


def read_directly(model: nn.Module) -> dict[int, str]:
    """The layers whose weights the model's own code reads: the `id` of each, or of its adapter, with its path.

    Weights of embeddings count where they are multiplied with the last hidden states: in a model without an output layer.
    """
    return {id(layer): path for path, layer in _read(model)}


def _read(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    tied = not any(path.rpartition(".")[2] == "lm_head" for path, _ in model.named_modules())
    for path, module in model.named_modules():
        own = [name for name in _names(type(module)) if _is_layer(module.get(name))]
        output = [name for name in (_outputs(type(module)) if tied else ()) if _found(module, name) is not None]
        for name in (*own, *output):
            yield f"{path}.{name}" if path else name, _found(module, name)  # type: ignore[misc]


def _is_layer(module: object) -> bool:
    """Whether a module is a linear layer, or an adapter of one."""
    return isinstance(module, nn.Linear | nn.QuantizedLinear) or (isinstance(module, nn.Module) and "linear" in module)


def _found(module: nn.Module, path: str) -> nn.Module | None:
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _names(cls: type) -> tuple[str, ...]:
    """The children of a class whose weights its forward pass reads."""
    return tuple(dict.fromkeys(_READ.findall(_source(cls))))


def _outputs(cls: type) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_AS_OUTPUT.findall(_source(cls))))


@cache
def _source(cls: type) -> str:
    """The text of the methods that a forward pass may call; empty of MLX's own classes, and where the text is not to be had."""
    classes = [c for c in cls.__mro__ if c is not object and not c.__module__.startswith("mlx.")]
    methods = [value for c in classes for name, value in vars(c).items() if name not in _BEFORE_TRAINING]
    return "\n".join(_text(method) for method in methods if isinstance(method, FunctionType))


def _text(function: FunctionType) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
