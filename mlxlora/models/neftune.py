"""NEFTune: noise on the embeddings of training tokens (Jain et al., 2023, https://arxiv.org/abs/2310.05914)."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRAEmbedding
from mlx_lm.tuner.lora import LoRAEmbedding

from ..errors import InputError
from .modes import evaluating

_KINDS = (nn.Embedding, nn.QuantizedEmbedding, LoRAEmbedding, DoRAEmbedding)
_PROBE = (5, 3, 4)  # no model numbers its positions like this


def noisy(model: nn.Module, alpha: float) -> nn.Module:
    """Adds U(-1, 1)·α/√(L·D) to the token embeddings in training mode; L is the row's length without padding.

    The class of the embedding is replaced by a subclass for this instance alone, so paths of parameters, the tied head and
    other models stay as they are. The noise comes from MLX's random state, as dropout's masks do, so a resumed run draws the
    same. A packed row counts as one.

    Raises:
        InputError: the model has no embedding that reads the tokens.
    """
    module: Any = _token_embedding(model)
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"__call__": _with_noise(cls, alpha)})
    return model


def magnitude(tokens: mx.array, dimensions: int, alpha: float) -> mx.array:
    """[R, T] tokens to [R, 1, 1]: α/√(L·D), L the positions up to the last token that is not 0, which pads.

    >>> magnitude(mx.array([[7, 7, 7, 7], [7, 0, 0, 0]]), 4, 2.0).reshape(-1).tolist()
    [0.5, 1.0]
    """
    lengths = mx.where(tokens != 0, mx.arange(1, tokens.shape[-1] + 1), 1).max(axis=-1)
    return (alpha / mx.sqrt(lengths * dimensions))[..., None, None]


def _with_noise(cls: type, alpha: float) -> Any:
    def call(self: Any, tokens: mx.array) -> mx.array:
        embedded = cls.__call__(self, tokens)
        if not self.training:
            return embedded
        noise = mx.random.uniform(-1, 1, embedded.shape) * magnitude(tokens, embedded.shape[-1], alpha)
        return embedded + noise.astype(embedded.dtype)

    return call


def _token_embedding(model: nn.Module) -> nn.Module:
    """The embedding that is given the tokens, found by running the model once; not one of positions or inside an adapter."""
    seen: list[nn.Module] = []
    embeddings: list[Any] = [m for m in model.modules() if isinstance(m, _KINDS)]
    classes = [type(m) for m in embeddings]
    for module, cls in zip(embeddings, classes, strict=True):
        module.__class__ = type(cls.__name__, (cls,), {"__call__": _recorded(cls, seen)})
    try:
        with evaluating(model):
            model(mx.array([_PROBE]))
    finally:
        for module, cls in zip(embeddings, classes, strict=True):
            module.__class__ = cls
    if not seen:
        raise InputError("--neftune-noise-alpha: this model has no token embedding that noise could be added to")
    return seen[0]


def _recorded(cls: type, seen: list[nn.Module]) -> Any:
    def call(self: Any, tokens: mx.array) -> mx.array:
        if tokens.size == len(_PROBE) and tuple(tokens.reshape(-1).tolist()) == _PROBE:  # type: ignore[arg-type]
            seen.append(self)
        return cls.__call__(self, tokens)

    return call
