"""Training and evaluation mode of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the context lasts: dropout is off, so nothing is drawn from the global random state."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
