"""Gradient checkpointing: the blocks of a model compute their activations again in the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import define
from mlx.utils import tree_map

from .row_layouts import PromptCache, SharedCache


def checkpointed(model: nn.Module) -> nn.Module:
    """Makes every block of `model.layers` recompute itself: only its input is kept.

    The block's class is replaced by a subclass for these instances alone, so paths of parameters stay and no other
    model is touched. Trainable parameters, a shared prompt's keys and values and the keys of dropout are explicit inputs of
    the recomputed function: a captured array would lose its gradient, and dropout would draw another mask.
    A block that is handed a foreign object, such as a cache that it fills for later blocks, is not recomputed.
    """
    subclasses: dict[type, type] = {}
    for layer in model.layers:  # type: ignore[union-attr]
        cls, keys = type(layer), _Keys()
        active = [m for m in layer.modules() if isinstance(m, nn.Dropout) and m._p_1 < 1]
        for index, dropout in enumerate(active):
            dropout.__class__ = _KeyedDropout
            dropout._keys, dropout._index = keys, index
        layer._keys, layer._dropouts = keys, len(active)
        layer.__class__ = subclasses.setdefault(cls, type(cls.__name__, (cls,), {"__call__": _recomputing(cls)}))
    return model


@define
class _Keys:
    """Keys of a block's dropouts, [dropouts, 2], while the block runs."""

    values: mx.array | None = None


class _KeyedDropout(nn.Dropout):
    """Dropout whose mask depends on its key alone."""

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        keys: Any = self._keys
        mask = mx.random.bernoulli(self._p_1, x.shape, key=keys.values[self._index])
        return (mask * x) * (1 / self._p_1)


def _recomputing(cls: type) -> Any:
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if not _plain([args, kwargs]):
            layer._keys.values = _draw(layer)
            return cls.__call__(layer, *args, **kwargs)
        cache = next((a for a in (*args, *kwargs.values()) if isinstance(a, SharedCache)), PromptCache())

        def inner(parameters: dict, keys: mx.array, kv: tuple, args: tuple, kwargs: dict) -> Any:
            mine = layer.trainable_parameters()
            layer.update(parameters)
            layer._keys.values = mx.stop_gradient(keys)
            cache.kv = kv
            out = cls.__call__(layer, *args, **kwargs)
            layer.update(mine)
            return out, cache.kv

        given = (layer.trainable_parameters(), _draw(layer), cache.kv, args, kwargs)
        out, cache.kv = _recomputed(inner)(*given)  # keys and values go in and out as arguments, not by closure
        return out

    return call


def _recomputed(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, of whose values the backward pass keeps the inputs alone.

    As `mx.checkpoint`, but the recomputation waits for the cotangents: MLX would start it early, for many blocks at once.
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
    """Whether all arrays of the value are seen by a function transformation: no foreign object holds any."""
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, mx.array | bool | int | float | str | mx.Dtype | SharedCache)


def _draw(layer: Any) -> mx.array:
    """[dropouts, 2] keys from the random state; no dropout is active in evaluation, which so leaves the state alone."""
    if not (layer._dropouts and layer.training):
        return mx.zeros((0, 2), mx.uint32)
    return mx.random.randint(0, 1 << 31, (layer._dropouts, 2)).astype(mx.uint32)
