"""The one place where mlx-lm's models compute attention: a batch's layout may compute it in its own way.

mlx-lm's models call `scaled_dot_product_attention` of `mlx_lm.models.base` by that name, in their own module. `hook` puts
`attend` there, which does the same unless the cache that a layer was handed brings its own way.
"""

import sys
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

_NAME = "scaled_dot_product_attention"
_PLAIN = getattr(base, _NAME)


class Attending(Protocol):
    """A cache that computes attention itself."""

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: Any) -> mx.array:
        """[R, heads, T, d] queries, what `update_and_fetch` returned, to [R, heads, T, d]."""
        ...


def hook(model: nn.Module) -> int:
    """Puts `attend` into the Python modules that the model is made of; doing it again changes nothing.

    Returns:
        How many of them call it.
    """
    modules = {sys.modules.get(type(module).__module__) for module in model.modules()}
    callers = [module for module in modules if getattr(module, _NAME, None) in (_PLAIN, attend)]
    for module in callers:
        setattr(module, _NAME, attend)
    return len(callers)


def attend(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None = None
) -> mx.array:
    """mlx-lm's attention, with its signature; a cache with a method `attend` computes it instead."""
    if hasattr(cache, "attend"):
        return cache.attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    return _PLAIN(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
