"""Gradient checkpointing: the blocks of a model compute their activations again in the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import define
from mlx.utils import tree_map

from ..utils.patches import Slot, set_class, subclass
from .activations import recomputed_activations
from .row_layouts import PromptCache, TrainingCache


def checkpointed(model: nn.Module) -> nn.Module:
    """Makes every block of `model.layers` recompute itself in the backward pass: only its input is kept.

    Each block gets a subclass of its class, so paths of parameters stay; `utils.patches.restore` undoes it. Trainable
    parameters, a shared prompt's keys and values and the keys of dropout are explicit inputs of the recomputed function: a
    captured array would lose its gradient, and dropout would draw another mask. A block is not recomputed if it receives a
    foreign object, such as a cache that it fills for later blocks.
    """
    subclasses: dict[type, type] = {}
    for layer in model.layers:  # type: ignore[union-attr]
        dropouts = _Dropouts()
        for module in layer.modules():
            if isinstance(module, nn.Dropout) and module._p_1 < 1:
                _KEYED.put(module, (dropouts, dropouts.count))
                dropouts.count += 1
                set_class(module, _KeyedDropout)
        _DROPOUTS.put(layer, dropouts)
        cls = type(layer)
        set_class(layer, subclasses.setdefault(cls, subclass(cls, {"__call__": _recomputing(cls)})))
    return model


@define
class _Dropouts:
    """The dropouts of a block, and their keys [count, 2] while the block runs."""

    count: int = 0
    keys: mx.array | None = None

    def draw(self, training: bool) -> mx.array:
        """Keys from MLX's random state. In evaluation no dropout is active, so nothing is drawn and the state stays."""
        if not (self.count and training):
            return mx.zeros((0, 2), mx.uint32)
        return mx.random.randint(0, 1 << 31, (self.count, 2)).astype(mx.uint32)


_DROPOUTS: Slot[Any] = Slot("dropouts of a block", None)
_KEYED: Slot[Any] = Slot("dropout key", None)  # the block's dropouts, and which of them a module is


class _KeyedDropout(nn.Dropout):
    """Dropout whose mask depends on its key alone."""

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        dropouts, index = _KEYED.get(self)
        mask = mx.random.bernoulli(self._p_1, x.shape, key=dropouts.keys[index])
        return (mask * x) * (1 / self._p_1)


def _recomputing(cls: type) -> Any:
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        dropouts: _Dropouts = _DROPOUTS.get(layer)
        if not _plain([args, kwargs]):
            dropouts.keys = dropouts.draw(layer.training)
            return cls.__call__(layer, *args, **kwargs)
        cache = next((a for a in (*args, *kwargs.values()) if isinstance(a, TrainingCache)), PromptCache())

        def inner(parameters: dict, keys: mx.array, kv: tuple, args: tuple, kwargs: dict) -> Any:
            mine = layer.trainable_parameters()
            layer.update(parameters)
            dropouts.keys = mx.stop_gradient(keys)
            cache.kv = kv
            with recomputed_activations():  # the backward pass comes when no rows are scored any more
                out = cls.__call__(layer, *args, **kwargs)
            layer.update(mine)
            return out, cache.kv

        given = (layer.trainable_parameters(), dropouts.draw(layer.training), cache.kv, args, kwargs)
        out, cache.kv = _recomputed(inner)(*given)  # keys and values are arguments and results, not captured
        return out

    return call


def _recomputed(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, of which the backward pass keeps the inputs only.

    Unlike `mx.checkpoint`, recomputing waits for the cotangents; MLX would start it early, for many blocks at once.
    """

    def call(*given: Any) -> Any:
        result: list[Any] = []

        def on_arrays(*arrays: mx.array) -> list[mx.array]:
            result[:] = [run(*_filled(given, arrays))]
            return _arrays(result[0])

        @mx.custom_function
        def forward(*arrays: mx.array) -> list[mx.array]:
            return on_arrays(*arrays)

        @forward.vjp
        def backward(primals: Any, cotangents: Any, _: Any) -> list[mx.array]:
            cotangents = _arrays(cotangents)
            return mx.vjp(on_arrays, mx.depends(_arrays(primals), cotangents), cotangents)[1]

        out: Any = forward(*_arrays(given))
        return _filled(result[0], out)

    return call


def _arrays(tree: Any) -> list[mx.array]:
    """The arrays of a tree, in order."""
    found: list[mx.array] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, mx.array) else None, tree)
    return found


def _filled(tree: Any, arrays: Sequence[mx.array]) -> Any:
    """The tree with other arrays in their places."""
    following = iter(arrays)
    return tree_map(lambda leaf: next(following) if isinstance(leaf, mx.array) else leaf, tree)


def _plain(value: Any) -> bool:
    """Whether function transformations see all arrays of the value: no foreign object holds one."""
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, mx.array | bool | int | float | str | mx.Dtype | TrainingCache)
