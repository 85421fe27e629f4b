"""Gradient checkpointing: the blocks of a model compute their activations again in the backward pass."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import define


def checkpointed(model: nn.Module) -> nn.Module:
    """Makes every block of `model.layers` recompute itself: only its input is kept.

    The block's class is replaced by a subclass for these instances alone, so paths of parameters stay and no other
    model is touched. Trainable parameters and the keys of dropout are explicit inputs of the recomputed function: a
    captured array would lose its gradient, and dropout would draw another mask.
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
        mask = mx.random.bernoulli(self._p_1, x.shape, key=self._keys.values[self._index])
        return (mask * x) * (1 / self._p_1)


def _recomputing(cls: type) -> Any:
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        def inner(parameters: dict, keys: mx.array, args: tuple, kwargs: dict) -> Any:
            mine = layer.trainable_parameters()
            layer.update(parameters)
            layer._keys.values = mx.stop_gradient(keys)
            out = cls.__call__(layer, *args, **kwargs)
            layer.update(mine)
            return out

        return mx.checkpoint(inner)(layer.trainable_parameters(), _draw(layer._dropouts), args, kwargs)

    return call


def _draw(count: int) -> mx.array:
    """[count, 2] keys from the random state; without a dropout the state stays as it is."""
    if not count:
        return mx.zeros((0, 2), mx.uint32)
    return mx.random.randint(0, 1 << 31, (count, 2)).astype(mx.uint32)
