"""Training and evaluation mode of a model, and the dtype that it computes in."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..utils.patches import Slot

Rounding = Callable[[nn.Module], dict[str, mx.array]]
"""A model to the rounded weights, by path, that it computes with."""

_ROUNDING: Slot[Rounding | None] = Slot("rounding", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the context lasts.

    Dropout is off, so nothing is drawn from the global random state. Trained parameters have the values that a training step
    computes with.
    """
    training = model.training
    model.eval()
    try:
        with computing(model, compute_cast(model)(model.trainable_parameters())) as parameters:
            model.update(parameters)
            yield
    finally:
        model.train(training)


@contextmanager
def computing(model: nn.Module, parameters: Any) -> Iterator[Any]:
    """Yields the trainable parameters that a forward pass uses for the given values; afterwards the model has its old ones.

    Quantization-aware training (`round_weights`) rounds weights here, frozen ones too: a gradient at the yielded values counts
    as one at the given values.
    """
    before, rounded = model.trainable_parameters(), _ROUNDING.get(model)
    if rounded is None:
        try:
            yield parameters
        finally:
            model.update(before)
        return
    model.update(parameters)
    weights, all_before = rounded(model), dict(tree_flatten(model.parameters()))
    model.update(tree_unflatten(list(weights.items())))
    try:
        yield model.trainable_parameters()
    finally:
        model.update(tree_unflatten([(path, all_before[path]) for path in weights]))
        model.update(before)


def round_weights(model: nn.Module, rounding: Rounding) -> None:
    """Makes every forward pass within `computing` use rounded weights (quantization-aware training)."""
    _ROUNDING.put(model, rounding)


def exact(model: nn.Module) -> AbstractContextManager[None]:
    """While the context lasts, `computing` rounds nothing."""
    return _ROUNDING.holding(model, None)


def compute_cast(model: nn.Module) -> Callable[[Any], Any]:
    """Trainable parameters to the dtype that the frozen weights compute in.

    float32 adapters would promote every activation of a bfloat16 model, so the master weights stay float32 and copies of them
    are cast. A model without frozen floating-point weights needs no cast.
    """
    trainable = dict(tree_flatten(model.trainable_parameters()))
    parameters: dict[str, Any] = dict(tree_flatten(model.parameters()))
    dtype = usual_dtype({name: value for name, value in parameters.items() if name not in trainable})
    if dtype is None:
        return lambda parameters: parameters
    return lambda parameters: tree_map(lambda p: p.astype(dtype), parameters)


def vocabulary(model: nn.Module) -> int:
    """V, from the shape of a lazy forward pass."""
    return int(model(mx.zeros((1, 1), mx.int32)).shape[-1])


def usual_dtype(parameters: Any) -> mx.Dtype | None:
    """The most frequent floating-point type in a tree; None if the tree has no such array."""
    flat: list[tuple[str, mx.array]] = tree_flatten(parameters)  # type: ignore[assignment]
    dtypes = [array.dtype for _, array in flat if mx.issubdtype(array.dtype, mx.floating)]
    return max(set(dtypes), key=dtypes.count) if dtypes else None


def freeze(model: nn.Module) -> nn.Module:
    """Makes nothing trainable."""
    if not hasattr(model, "_no_grad"):
        nn.Module.__init__(model)  # mlx-lm's recurrent_gemma forgets it (0.32.2)
    return model.freeze()
