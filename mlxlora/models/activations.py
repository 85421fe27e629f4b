"""Activation functions that keep only their inputs for the backward pass.

MLX differentiates `silu(gate) * x` one operation after the other and keeps each result: the sigmoid, the silu and the product.
A fused kernel computes them again from `gate` and `x` faster than it reads them, so they need not be kept.
"""

from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cache, partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen
from mlx_lm.models import activations

from ..utils.context import assigned
from ..utils.patches import Slot, python_modules, replace_function, set_class, subclass

_OF_MODELS = ("swiglu", "precise_swiglu", "swiglu_oai", "geglu", "gegelu_impl", "xielu")
_OF_NN = ("gelu", "gelu_approx", "relu2", "silu")
_HOOKED: Slot[bool] = Slot("activations", False)
_COMPILED = type(activations.swiglu)
_ON: ContextVar[bool] = ContextVar("activations are recomputed", default=False)
"""Read by functions with mlx-lm's signatures, which have no room for an argument of ours."""


def recomputed_activations() -> AbstractContextManager[None]:
    """Hooked models recompute their activations while the context lasts; elsewhere, as in generation, they do as mlx-lm has it."""
    return assigned(_ON, True)


def hook_activations(model: nn.Module) -> None:
    """Makes the model's layers keep only the inputs of their activations; `utils.patches.restore` undoes it.

    mlx-lm's models call these functions by name: those of mlx-lm as names of their own Python module, those of MLX as names of
    `nn`, for which the module gets a stand-in. It gets none if it has compiled functions of its own, which MLX may compile for all
    shapes, where nothing can be recomputed. A second call changes nothing.
    """
    if _HOOKED.get(model):
        return
    _HOOKED.put(model, True)
    for owner in python_modules(model) - {activations}:  # from which the modules of other models import
        if owner.__name__.startswith("mlx_lm.models."):
            for name in (*([] if _compiles(owner) else ["nn"]), *_OF_MODELS):
                if hasattr(owner, name):
                    replace_function(model, owner, name, _lean(getattr(owner, name)))
    for module in model.modules():
        if type(module) is activations.SwigluOAI:
            set_class(module, subclass(activations.SwigluOAI, {"__call__": _lean_oai}))


def _compiles(owner: ModuleType) -> bool:
    """Whether a Python module has compiled functions besides those that it imports from `activations`."""
    known = vars(activations).values()
    return any(type(value) is _COMPILED and not any(value is other for other in known) for value in vars(owner).values())


def _lean(value: Any) -> Any:
    """What a model's Python module has in place of a function or of `nn`."""
    if isinstance(value, Recomputed | _LeanNN):  # another model of this architecture was first
        return value
    return _LeanNN() if isinstance(value, ModuleType) else Recomputed(value)


@frozen
class Recomputed:
    """A function of arrays to one array, of which the backward pass keeps the arguments and computes the function again.

    Attributes:
        function: what is computed; it may have other arguments by name.
    """

    function: Any

    def __call__(self, *arrays: Any, **options: Any) -> mx.array:
        if not _ON.get() or not all(isinstance(array, mx.array) for array in arrays):
            return self.function(*arrays, **options)

        def compute(*arrays: mx.array) -> mx.array:
            with assigned(_ON, False):  # the parts of a function that is recomputed need not be
                return self.function(*arrays, **options)

        @mx.custom_function
        def forward(*arrays: mx.array) -> mx.array:
            return compute(*arrays)

        @forward.vjp
        def backward(primals: Any, cotangent: mx.array, _: mx.array) -> list[mx.array]:
            primals = [primals] if isinstance(primals, mx.array) else list(primals)
            return mx.vjp(compute, mx.depends(primals, [cotangent]), [cotangent])[1]

        return forward(*arrays)  # type: ignore[return-value]


def _lean_oai(module: Any, x: mx.array, gate: mx.array) -> mx.array:
    """gpt-oss's activation, a module without parameters, recomputed."""
    return Recomputed(partial(activations.SwigluOAI.__call__, module))(x, gate)


class _LeanNN:
    """`mlx.nn`, with activations that are recomputed."""

    def __getattr__(self, name: str) -> Any:
        return _of_nn(name) if name in _OF_NN else getattr(nn, name)


@cache
def _of_nn(name: str) -> Recomputed:
    return Recomputed(getattr(nn, name))
