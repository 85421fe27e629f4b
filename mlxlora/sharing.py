"""Rows that continue a common prompt: the prompt passes through the model once, and gradients flow back into it.

A layout below the objective: `batch.prefix` [U, K] are the prompts and row r of `batch.tokens` continues prompt
r div (R/U), so repeating a prompt's keys and values is a broadcast and its gradient a sum, without an index. The rows'
attention reads a mask array, which leaves fused kernels on some devices; so whether it pays is estimated.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask, create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from .modes import evaluating
from .types import Batch

Forward = Callable[..., mx.array]

# Positions computed without sharing / with sharing, from which on sharing is faster. cpu (2 cores, OpenBLAS, hidden 256, CPU
# time of a DPO step): 1.05x at 1.11, 1.10x at 1.2, 1.26x at 1.33, 1.64x at 1.75. cuda (an H200, Qwen3-0.6B's shape, 8 pairs;
# the mask leaves the fused attention): 0.4x at 1.33, 0.8x at 1.75, 1.1x at 1.8. Not measured on a Mac.
PAYS_FROM = {"cpu": 1.1, "cuda": 1.8, "metal": 1.8}


def read(forward: Forward, model: nn.Module, batch: Batch) -> mx.array:
    """`forward` of every row of the batch, [R, T, ...], in either layout.

    Args:
        forward: tokens [R, T] -> [R, T, ...], with mlx-lm's argument `cache`: the model, or its backbone.
        model: the model, which knows how many caches it has.
    """
    if batch.prefix is None or batch.prefix_lengths is None:
        return forward(batch.tokens)
    prompts: list[Any] = [PromptCache() for _ in make_prompt_cache(model)]
    forward(batch.prefix, cache=prompts)  # lazy: what is not needed for keys and values is never computed
    repeats = batch.tokens.shape[0] // batch.prefix.shape[0]
    rows: list[Any] = [ContinuedCache(prompt.kv, batch.prefix_lengths, repeats) for prompt in prompts]
    return forward(batch.tokens, cache=rows)


class PromptCache:
    """In place of a layer's cache: hands out the keys and values of the prompts, [U, heads, K, d]."""

    offset = 0

    def __init__(self) -> None:
        self.kv: tuple[mx.array, ...] = ()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keeps them and returns them as they are."""
        self.kv = keys, values
        return keys, values

    def make_mask(self, n: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """Causal; prompts are padded on the right."""
        return create_attention_mask(mx.zeros((1, n)), None, window_size, return_array)


class ContinuedCache:
    """In place of a layer's cache: rows [R, C] that attend to the keys and values of their prompt, and to themselves."""

    def __init__(self, kv: tuple[mx.array, ...], lengths: mx.array, repeats: int) -> None:
        self.kv, self.repeats = kv, repeats
        self.offset = mx.repeat(lengths, repeats)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """[R, heads, K + C, d]."""
        before = (_repeated(array, self.repeats) for array in self.kv)
        joined = [mx.concatenate([a, b], axis=2) for a, b in zip(before, (keys, values), strict=True)]
        return joined[0], joined[1]

    def make_mask(self, n: int, *, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """[R, 1, C, K + C] bool; the prompt's padding lies between prompt and row and is never seen."""
        length = self.offset[:, None, None, None]
        place = mx.arange(self.kv[0].shape[2])[None, None, None]
        to_prompt = mx.broadcast_to(place < length, (length.shape[0], 1, n, place.shape[-1]))
        if window_size is not None:
            to_prompt = to_prompt & (length + mx.arange(n)[None, None, :, None] < place + window_size)
        to_itself = mx.broadcast_to(create_causal_mask(n, window_size=window_size), (length.shape[0], 1, n, n))
        return mx.concatenate([to_prompt, to_itself], axis=-1)


SharedCache = PromptCache | ContinuedCache


def _repeated(array: mx.array, repeats: int) -> mx.array:
    """[U, ...] to [U * repeats, ...]; the gradient is a sum, in a fixed order."""
    shape = array.shape
    return mx.broadcast_to(array[:, None], (shape[0], repeats, *shape[1:])).reshape(-1, *shape[1:])


# --- whether to -----------------------------------------------------------------------------------


def pays(plain: int, shared: int, device: str | None = None) -> bool:
    """Whether sharing is faster, by the positions that the model computes without it and with it.

    >>> pays(plain=2 * (384 + 64), shared=384 + 2 * 64, device="cpu"), pays(2 * (128 + 128), 128 + 2 * 128, "cuda")
    (True, False)
    """
    return plain >= shared * PAYS_FROM[device or _device()]


def _device() -> str:
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def obstacle(forward: Forward, model: nn.Module) -> str | None:
    """Why prompts cannot be shared, after trying it on a tiny input; None: values and gradients are those of whole rows."""
    if strange := {type(cache).__name__ for cache in make_prompt_cache(model)} - {KVCache.__name__, RotatingKVCache.__name__}:
        return f"it keeps more than keys and values ({', '.join(sorted(strange))})"
    try:
        with evaluating(model):
            return _difference(forward, model)
    except Exception as error:  # a model's code that cannot stand these caches: whatever it raised
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _difference(forward: Forward, model: nn.Module) -> str | None:
    """Two prompts of 5 and 3 tokens, two rows of 3 tokens each, against four whole rows."""
    prompts, own = [[1, 2, 3, 4, 5], [6, 7, 8]], [[2, 9, 4], [7, 1, 3], [8, 5, 2], [1, 6, 9]]
    whole = [prompts[r // 2] + row for r, row in enumerate(own)]
    none = mx.zeros((0,), mx.int32)
    shared = Batch(mx.array(own), none, none, none, none, prefix=_right_padded(prompts, 5), prefix_lengths=mx.array([5, 3]))
    plain = Batch(_right_padded(whole, 8), none, none, none, none)
    first = mx.array([5, 5, 3, 3])[:, None] + mx.arange(3)[None]

    def of_plain() -> mx.array:
        return mx.take_along_axis(read(forward, model, plain), first[..., None], axis=1)

    expected, found = _probe(model, of_plain), _probe(model, lambda: read(forward, model, shared))
    for name, a, b in zip(("values", "gradients"), found, expected, strict=True):
        tolerance = 1e-3 if all(x.dtype == mx.float32 for x in b) else 5e-2  # a wrong mask or position is far beyond
        if not (distance := _distance(a, b)) < tolerance:
            return f"its {name} differ by {distance:.1e}"
    return None


def _probe(model: nn.Module, run: Callable[[], mx.array]) -> tuple[list[mx.array], list[mx.array]]:
    """What `run` returns, and the gradient of a random projection of it with respect to the trainable parameters."""
    parameters = model.trainable_parameters()

    def project(values: Any) -> tuple[mx.array, mx.array]:
        model.update(values)
        out = run()
        return (out * mx.random.normal(out.shape, key=mx.random.key(0)).astype(out.dtype)).astype(mx.float32).sum(), out

    (_, out), gradient = mx.value_and_grad(project)(parameters)
    model.update(parameters)
    return [out], list(dict(tree_flatten(gradient)).values())


def _distance(a: list[mx.array], b: list[mx.array]) -> float:
    """‖a - b‖ / ‖b‖, 0 for nothing."""
    pairs = [(x.astype(mx.float32), y.astype(mx.float32)) for x, y in zip(a, b, strict=True)]
    difference = sum((mx.square(x - y).sum() for x, y in pairs), mx.array(0.0))
    size = sum((mx.square(y).sum() for _, y in pairs), mx.array(0.0))
    return mx.sqrt(difference / mx.maximum(size, 1e-30)).item()  # type: ignore[return-value]


def _right_padded(rows: list[list[int]], width: int) -> mx.array:
    return mx.array([row + [0] * (width - len(row)) for row in rows])
