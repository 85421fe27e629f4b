"""NEFTune: noise on the embeddings of training tokens (Jain et al., 2023, https://arxiv.org/abs/2310.05914)."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRAEmbedding
from mlx_lm.tuner.lora import LoRAEmbedding

from ..errors import InputError
from ..utils.patches import overridden, set_class, subclass
from .modes import evaluating

_KINDS = (nn.Embedding, nn.QuantizedEmbedding, LoRAEmbedding, DoRAEmbedding)
_PROBE = (5, 3, 4)  # tokens that no model uses as positions


def noisy(model: nn.Module, alpha: float) -> nn.Module:
    """Adds U(-1, 1)·α/√(L·D) to the token embeddings in training mode; L is the row's length without padding.

    The embedding gets a subclass of its class, so paths of parameters, the tied head and other models stay as they are;
    `utils.patches.restore` undoes it. The noise comes from MLX's random state, as dropout's masks do, so a resumed run draws the
    same noise. L of a packed row is its whole length.

    Raises:
        InputError: the model has no embedding that reads the tokens.
    """
    module: Any = _token_embedding(model)
    cls = type(module)
    set_class(module, subclass(cls, {"__call__": _with_noise(cls, alpha)}))
    return model


def magnitude(tokens: mx.array, dimensions: int, alpha: float) -> mx.array:
    """[R, T] tokens to [R, 1, 1]: α/√(L·D); L counts the positions up to the last token that is not 0 (0 pads).

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
    """The embedding that reads the tokens, found by running the model once; others read positions or belong to adapters."""
    seen: list[nn.Module] = []
    embeddings = [m for m in model.modules() if isinstance(m, _KINDS)]
    with overridden(embeddings, lambda cls: {"__call__": _recorded(cls, seen)}), evaluating(model):
        model(mx.array([_PROBE]))
    if not seen:
        raise InputError("--neftune-noise-alpha: this model has no token embedding to add noise to")
    return seen[0]


def _recorded(cls: type, seen: list[nn.Module]) -> Any:
    def call(self: Any, tokens: mx.array) -> mx.array:
        if tokens.size == len(_PROBE) and tuple(tokens.reshape(-1).tolist()) == _PROBE:  # type: ignore[arg-type]
            seen.append(self)
        return cls.__call__(self, tokens)

    return call
