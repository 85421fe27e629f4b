"""Training and evaluation mode of a model, and the dtype that it computes in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the context lasts.

    Dropout is off, so nothing is drawn from the global random state, and trained parameters are those that a training
    step computes with.
    """
    training, masters = model.training, model.trainable_parameters()
    model.eval()
    model.update(compute_cast(model)(masters))
    try:
        yield
    finally:
        model.train(training)
        model.update(masters)


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


def usual_dtype(parameters: Any) -> mx.Dtype | None:
    """The floating-point type that most arrays of a tree have; None if there is no such array."""
    flat: list[tuple[str, mx.array]] = tree_flatten(parameters)  # type: ignore[assignment]
    dtypes = [array.dtype for _, array in flat if mx.issubdtype(array.dtype, mx.floating)]
    return max(set(dtypes), key=dtypes.count) if dtypes else None
