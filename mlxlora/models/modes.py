"""Training and evaluation mode of a model, and the dtype that it computes in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the context lasts.

    Dropout is off, so nothing is drawn from the global random state, and trained parameters are those that a training
    step computes with.
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
    """The trainable parameters that a forward pass uses, given their values; afterwards the model has those of before.

    Quantisation-aware training rounds weights here, frozen ones in the model (see `quantising.rounded`): a gradient at the
    values that this yields is taken as that of the values given.
    """
    before, rounded = model.trainable_parameters(), getattr(model, "_rounded", None)
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


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Nothing is rounded in a `computing` that is entered within."""
    rounded = getattr(model, "_rounded", None)
    model._rounded = None  # type: ignore[assignment]
    try:
        yield
    finally:
        model._rounded = rounded


def compute_cast(model: nn.Module) -> Callable[[Any], Any]:
    """Trainable parameters to the dtype that the frozen weights compute in.

    float32 adapters would promote every activation of a bfloat16 model; so the masters stay float32 and their copies
    are cast. Without frozen floating-point weights nothing is cast.
    """
    trainable = dict(tree_flatten(model.trainable_parameters()))
    parameters: dict[str, Any] = dict(tree_flatten(model.parameters()))
    dtype = usual_dtype({name: value for name, value in parameters.items() if name not in trainable})
    if dtype is None:
        return lambda parameters: parameters
    return lambda parameters: tree_map(lambda p: p.astype(dtype), parameters)


def vocabulary(model: nn.Module) -> int:
    """V, from a forward pass that is never computed."""
    return int(model(mx.zeros((1, 1), mx.int32)).shape[-1])


def usual_dtype(parameters: Any) -> mx.Dtype | None:
    """The floating-point type that most arrays of a tree have; None if there is no such array."""
    flat: list[tuple[str, mx.array]] = tree_flatten(parameters)  # type: ignore[assignment]
    dtypes = [array.dtype for _, array in flat if mx.issubdtype(array.dtype, mx.floating)]
    return max(set(dtypes), key=dtypes.count) if dtypes else None


def freeze(model: nn.Module) -> nn.Module:
    """Makes nothing trainable."""
    if not hasattr(model, "_no_grad"):
        nn.Module.__init__(model)  # mlx-lm's recurrent_gemma forgets to (0.32.2)
    return model.freeze()
