"""The trainable parameters as the optimizer sees them: one vector for elementwise optimizers, else the parameters themselves.

A model has hundreds of adapters. As one vector they are cast, clipped, updated and checked by a few kernels instead of thousands
of small ones; the parameters in the model are views of the vector.
"""

import re
from collections import defaultdict
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from attrs import define, field, frozen
from mlx.utils import tree_flatten, tree_unflatten

from ..distributed.sharded_files import Sliced
from ..distributed.sharding import is_sharded, nbytes, ranks_of, shape_of, slice_length
from .optimizers import TRAINED_GROUP, group_of, put_state

_Tree = Any  # of arrays

ELEMENTWISE = (optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.Lion, optim.RMSprop, optim.Adagrad, optim.AdaDelta)
_LARGEST = 1 << 30  # bytes of a vector, which needs a copy of the gradient: beyond, it costs too much memory


@frozen
class Vector:
    """Parameters as one vector, or as one vector for each learning rate.

    Attributes:
        places: the vector and the shape of each parameter, by path.
    """

    places: dict[str, tuple[str, tuple[int, ...]]]

    def pack(self, tree: _Tree) -> _Tree:
        """Arrays to {"trained": [n]}."""
        flat, parts = dict(tree_flatten(tree)), defaultdict(list)
        for name, (key, _) in self.places.items():
            parts[key].append(flat[name].reshape(-1))
        return {key: mx.concatenate(arrays) for key, arrays in parts.items()}

    def names(self, key: str) -> list[str]:
        """The paths of the parameters in one array of `pack`."""
        return [name for name, (vector, _) in self.places.items() if vector == key]

    def unpack(self, packed: _Tree) -> _Tree:
        """The inverse."""
        return tree_unflatten(list(zip(self.places, self.views(packed), strict=True)))

    def views(self, packed: _Tree) -> list[mx.array]:
        """The parameters in order, without a copy."""
        found, starts = [], dict.fromkeys(packed, 0)
        for key, shape in self.places.values():
            strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
            found.append(mx.as_strided(packed[key], shape, strides, starts[key]))
            starts[key] += prod(shape)
        return found


@frozen
class Separate:
    """Parameters as they are."""

    def pack(self, tree: _Tree) -> _Tree:
        """The tree itself."""
        return tree

    def names(self, key: str) -> list[str]:
        """The parameter itself."""
        return [key]

    def unpack(self, packed: _Tree) -> _Tree:
        """The tree itself."""
        return packed

    def views(self, packed: _Tree) -> list[mx.array]:
        """Its arrays."""
        return _leaves(packed)


def layout(optimizer: optim.Optimizer, model: nn.Module) -> Vector | Separate:
    """A vector for elementwise optimizers, if all trainable parameters have one dtype and are not large."""
    flat: list[tuple[str, mx.array]] = tree_flatten(model.trainable_parameters())  # type: ignore[assignment]
    small = nbytes(model, trainable=True) <= _LARGEST
    several = isinstance(optimizer, optim.MultiOptimizer)
    kinds = {type(each) for each in (optimizer.optimizers if several else (optimizer,))}  # type: ignore[attr-defined]
    if not kinds <= set(ELEMENTWISE) or len({array.dtype for _, array in flat}) > 1 or not small:
        return Separate()
    return Vector({name: (group_of(name) if several else TRAINED_GROUP, array.shape) for name, array in flat})


@define(eq=False)
class Trained:
    """The trainable parameters of a model as its optimizer sees them.

    Attributes:
        model: its trainable parameters are views of the master weights.
        optimizer: updates the master weights.
        master_weights: containers that stay the same objects, because a compiled step holds them.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    master_weights: _Tree = field(init=False)
    _layout: Vector | Separate = field(init=False)
    _places: list[tuple[Any, Any]] = field(init=False)
    _shown: list[mx.array] = field(init=False)

    def __attrs_post_init__(self) -> None:
        parameters = self.model.trainable_parameters()
        self._layout = layout(self.optimizer, self.model)
        self.master_weights = self._layout.pack(parameters)
        self._places = [_place(self.model, name) for name, _ in tree_flatten(parameters)]
        self._shown = _leaves(parameters)
        self.optimizer.init(self.master_weights)

    def pack(self, tree: _Tree) -> _Tree:
        """Arrays in the layout of the master weights."""
        return self._layout.pack(tree)

    def unpack(self, packed: _Tree) -> _Tree:
        """Arrays in the layout of the model."""
        return self._layout.unpack(packed)

    def push(self) -> None:
        """Puts the master weights into the model."""
        self._shown = self._layout.views(self.master_weights)
        for (container, key), array in zip(self._places, self._shown, strict=True):
            container[key] = array

    def pull(self) -> None:
        """Takes parameters that were put into the model since `push`, such as loaded weights, as master weights."""
        if any(container[key] is not array for (container, key), array in zip(self._places, self._shown, strict=True)):
            put_state(self.master_weights, self.pack(self.model.trainable_parameters()))


_OF_SEVERAL = re.compile(r"states\.\d+\.")
"""Precedes the paths of the states in a MultiOptimizer."""


def stored_state(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    """The optimizer's arrays as a file has them; those of sliced parameters as `Sliced`, which has the whole shape."""
    flat: dict[str, mx.array] = dict(tree_flatten(optimizer.state))  # type: ignore[arg-type]
    if not is_sharded(model):
        return flat
    how, modules = layout(optimizer, model), dict(model.named_modules())
    whole = {
        name: shape_of(modules[name.rpartition(".")[0]], name.rpartition(".")[2])
        for name, _ in tree_flatten(model.trainable_parameters())  # type: ignore[misc]
    }
    found: dict[str, Any] = {}
    for path, array in flat.items():
        key = _OF_SEVERAL.sub("", path.rpartition(".")[0])
        shapes = tuple(whole[name] for name in how.names(key) if name in whole)
        found[path] = _state(model, optimizer, path, array.dtype, shapes) if shapes else array
    return found


def _state(model: nn.Module, optimizer: optim.Optimizer, path: str, dtype: mx.Dtype, shapes: tuple[tuple[int, ...], ...]) -> Sliced:
    ranks, packed = ranks_of(model), isinstance(layout(optimizer, model), Vector)
    container, last = _place(optimizer.state, path)  # type: ignore[arg-type]

    def own() -> list[mx.array]:
        flat, found, start = container[last].reshape(-1), [], 0
        for shape in shapes:
            found.append(flat[start : start + slice_length(shape, ranks)])
            start += found[-1].size
        return found

    def put(found: list[mx.array]) -> None:
        container[last] = mx.concatenate([own.reshape(-1) for own in found]) if packed else found[0]

    shape = (sum(map(prod, shapes)),) if packed else shapes[0]
    return Sliced(f"optimizer {path}", shape, dtype, shapes, ranks, own, put)


def _leaves(tree: _Tree) -> list[mx.array]:
    return [array for _, array in tree_flatten(tree)]  # type: ignore[misc]


def _place(model: Any, name: str) -> tuple[Any, Any]:
    """The container of a parameter and its key there; found once, because walking the model at every step takes milliseconds."""
    *path, last = name.split(".")
    container: Any = model
    for part in path:
        container = container[int(part) if isinstance(container, list | tuple) else part]
    return container, int(last) if isinstance(container, list) else last
