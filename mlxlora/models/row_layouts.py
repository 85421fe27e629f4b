"""How rows lie in a batch: whole, several to a row, or continuing a common prompt, which passes through the model once.

Layouts below the objective, each a cache in place of mlx-lm's. `batch.prefix` [U, K] are prompts, and row r of
`batch.tokens` continues prompt r div (R/U); gradients flow back into it. Layers that attend through `attention.hook` need no
mask arrays; the others get them.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ..batch import Batch
from ..utils.device import backend
from .attention import Causal, blockwise, causal, fused, hook, reaches, visible
from .modes import evaluating

Forward = Callable[..., mx.array]

# Positions computed without sharing / with sharing, from which on sharing is faster. cpu (2 cores, OpenBLAS, hidden 256, CPU
# time of a DPO step): 1.05x at 1.11, 1.10x at 1.2, 1.26x at 1.33, 1.64x at 1.75. cuda (an H200, Qwen3-0.6B's shape, 8 pairs;
# rows next to prompts leave the fused attention): 0.57x at 1.6, 0.83x at 1.75, 1.0x at 1.8, at 1.9 0.83x and with checkpointing
# 1.17x; with less memory everywhere. Not measured on a Mac.
PAYS_FROM = {"cpu": 1.1, "cuda": 1.8, "metal": 1.8}


def read(forward: Forward, model: nn.Module, batch: Batch) -> mx.array:
    """`forward` of every row of the batch, [R, T, ...], in any layout.

    Args:
        forward: tokens [R, T] -> [R, T, ...], with mlx-lm's argument `cache`: the model, or its backbone.
        model: the model, which knows how many caches it has.
    """
    hook(model)
    if batch.prefix is None or batch.prefix_lengths is None:
        if batch.segments is None and not getattr(model, "_windowed", False):
            return forward(batch.tokens)
        return forward(batch.tokens, cache=[RowCache(mask_axes(model), batch.segments) for _ in make_prompt_cache(model)])
    axes, repeats = mask_axes(model), batch.tokens.shape[0] // batch.prefix.shape[0]
    prompts: list[Any] = [PromptCache(axes) for _ in make_prompt_cache(model)]
    forward(batch.prefix, cache=prompts)  # lazy: what is not needed for keys and values is never computed
    rows: list[Any] = [ContinuedCache(prompt.kv, batch.prefix_lengths, repeats, axes) for prompt in prompts]
    return forward(batch.tokens, cache=rows)


class RowCache:
    """In place of a layer's cache: whole rows, of one segment or several.

    Attributes:
        axes: of mask arrays; 0: the layer passes `Causal` on to `attention.attend`, which needs none.
        segments: [R, T] int32, tokens see those of their own segment; None: a row is one.
        kv: keys and values that other rows will read.
    """

    offset = 0

    def __init__(self, axes: int = 4, segments: mx.array | None = None) -> None:
        self.axes, self.segments = axes, segments
        self.kv: tuple[mx.array, ...] = ()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As they are."""
        return keys, values

    def make_mask(self, n: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """Causal; rows are padded on the right."""
        if not self.axes:
            return Causal.within(window_size)
        if self.segments is None:
            return create_attention_mask(mx.zeros((1, n)), None, window_size, return_array)
        return _with_axes(visible(range(n), range(n), window_size, self.segments), self.axes)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: Any) -> mx.array:
        """Chunked or fused, within the window that the mask names."""
        if not isinstance(mask, str):
            return fused(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        window = getattr(mask, "window", None)
        return causal(queries, keys, values, scale=scale, window=window, segments=self.segments, sinks=sinks)


class PromptCache(RowCache):
    """Hands out the keys and values of the prompts, [U, heads, K, d]."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keeps them and returns them as they are."""
        self.kv = keys, values
        return keys, values


class ContinuedCache:
    """In place of a layer's cache: rows [R, C] that attend to the keys and values of their prompt, and to themselves."""

    def __init__(self, kv: tuple[mx.array, ...], lengths: mx.array, repeats: int, axes: int = 4) -> None:
        self.kv, self.lengths, self.repeats, self.axes = kv, lengths, repeats, axes
        self.offset = mx.repeat(lengths, repeats)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As they are; next to a mask array the prompt's come first, [R, heads, K + C, d]."""
        if not self.axes:
            return keys, values
        before = (_repeated(array, self.repeats) for array in self.kv)
        joined = [mx.concatenate([a, b], axis=2) for a, b in zip(before, (keys, values), strict=True)]
        return joined[0], joined[1]

    def make_mask(self, n: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """[R, 1, C, K + C] bool; the prompt's padding lies between prompt and row and is never seen."""
        if not self.axes:
            return Causal.within(window_size)
        shape = (self.offset.shape[0], 1, n)
        to_prompt = mx.broadcast_to(reaches(range(n), self.kv[0].shape[2], self.offset, window_size), (*shape, self.kv[0].shape[2]))
        to_itself = mx.broadcast_to(visible(range(n), range(n), window_size), (*shape, n))
        return _with_axes(mx.concatenate([to_prompt, to_itself], axis=-1), self.axes)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: Any) -> mx.array:
        """One softmax over the prompt's keys, which all of its rows read, and the row's own."""
        if not isinstance(mask, Causal):
            return fused(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        return blockwise(queries, keys, values, self.kv, scale=scale, window=mask.window, lengths=self.lengths, sinks=sinks)


SharedCache = RowCache | ContinuedCache


def mask_axes(model: nn.Module) -> int:
    """How many axes the mask arrays of the model's layers have; 0: all of them attend through the hook and need no arrays.

    Found by building, not computing, the model's output on many rows, so that an axis of rows fits no other; once a model.
    """
    if not hasattr(model, "_mask_axes"):
        hook(model)
        with evaluating(model):
            found = (axes for axes in (0, 4, 5) if _accepts(model, axes))
            object.__setattr__(model, "_mask_axes", next(found, 4))
    return model._mask_axes  # type: ignore[return-value]


class _Counting(RowCache):
    """Counts how often a layer attended through it with the mask that it made."""

    attended = 0

    def attend(self, *args: Any, **kwargs: Any) -> mx.array:
        self.attended += isinstance(kwargs["mask"], Causal)
        return super().attend(*args, **kwargs)


def _accepts(model: nn.Module, axes: int) -> bool:
    tokens = mx.zeros((97, 2), mx.int32)
    caches = [_Counting(axes, tokens) for _ in make_prompt_cache(model)]
    try:
        model(tokens, cache=caches)
    except Exception:  # a model's code that cannot stand such a mask: whatever it raised
        return False
    return bool(axes) or all(cache.attended == 1 for cache in caches)


def _with_axes(mask: mx.array, axes: int) -> mx.array:
    """[R, 1, ...] to as many axes: gemma2 splits the heads into two."""
    return mask.reshape(*mask.shape[:2], *[1] * (axes - 4), *mask.shape[2:])


def _repeated(array: mx.array, repeats: int) -> mx.array:
    """[U, ...] to [U * repeats, ...]; the gradient is a sum, in a fixed order."""
    shape = array.shape
    return mx.broadcast_to(array[:, None], (shape[0], repeats, *shape[1:])).reshape(-1, *shape[1:])


# --- whether to -----------------------------------------------------------------------------------


def pays(plain: int, shared: int, on: str | None = None) -> bool:
    """Whether sharing is faster, by the positions that the model computes without it and with it.

    >>> pays(plain=2 * (384 + 64), shared=384 + 2 * 64, on="cpu"), pays(2 * (128 + 128), 128 + 2 * 128, "cuda")
    (True, False)
    """
    return plain >= shared * PAYS_FROM[on or backend()]


Layout = Callable[[list[list[int]]], tuple[Batch, mx.array]]
"""Four whole rows, the first two of one prompt, the others of another, to (a batch, where [R*T] their tokens from `_FROM` are)."""

_ROWS = [[1, 2, 3, 4, 5, 2, 9, 4], [1, 2, 3, 4, 5, 7, 1, 3], [6, 7, 8, 8, 5, 2], [6, 7, 8, 1, 6, 9]]
_FROM = [5, 5, 3, 3]  # tokens of their prompts


def shared_layout(rows: list[list[int]]) -> tuple[Batch, mx.array]:
    """Two prompts of 5 and 3 tokens, two rows of 3 tokens each."""
    own = [row[start:] for row, start in zip(rows, _FROM, strict=True)]
    batch = _batch(mx.array(own), prefix=_right_padded([rows[0][:5], rows[2][:3]], 5), prefix_lengths=mx.array([5, 3]))
    return batch, mx.arange(12)


def packed_layout(rows: list[list[int]]) -> tuple[Batch, mx.array]:
    """Two rows of two segments each, with padding."""
    packs = [rows[0] + rows[2], rows[3] + rows[1]]
    segments = [[1] * 8 + [2] * 6 + [0] * 2, [1] * 6 + [2] * 8 + [0] * 2]
    first = [5, 16 + 6 + 5, 8 + 3, 16 + 3]
    return _batch(_right_padded(packs, 16), segments=mx.array(segments)), mx.concatenate([mx.arange(f, f + 3) for f in first])


def obstacle(forward: Forward, model: nn.Module, layout: Layout = shared_layout) -> str | None:
    """Why rows cannot be laid out so, after trying it on a tiny input; None: values and gradients are those of whole rows."""
    if strange := {type(cache).__name__ for cache in make_prompt_cache(model)} - {KVCache.__name__, RotatingKVCache.__name__}:
        return f"it keeps more than keys and values ({', '.join(sorted(strange))})"
    try:
        with evaluating(model):
            return _difference(forward, model, layout)
    except Exception as error:  # a model's code that cannot stand these caches: whatever it raised
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def know_windows(forward: Forward, model: nn.Module) -> bool:
    """Lets whole rows know the windows of their layers, where the model has windows and computes the same then.

    An array would hide them: the keys of a chunk of queries are then cut to what the window reaches.
    """

    def layout(rows: list[list[int]]) -> tuple[Batch, mx.array]:
        found = [8 * r + start + i for r, start in enumerate(_FROM) for i in range(3)]
        return _batch(_right_padded(rows, 8), segments=mx.ones((4, 8), mx.int32)), mx.array(found)

    windows = any(isinstance(cache, RotatingKVCache) for cache in make_prompt_cache(model))
    object.__setattr__(model, "_windowed", windows and not mask_axes(model) and obstacle(forward, model, layout) is None)
    return model._windowed  # type: ignore[return-value]


def _difference(forward: Forward, model: nn.Module, layout: Layout) -> str | None:
    plain = _batch(_right_padded(_ROWS, 8))
    batch, location = layout(_ROWS)
    first = mx.array(_FROM)[:, None] + mx.arange(3)[None]

    def of_plain() -> mx.array:
        return mx.take_along_axis(forward(plain.tokens), first[..., None], axis=1).flatten(0, 1)

    def of_layout() -> mx.array:
        return read(forward, model, batch).flatten(0, 1)[location]

    expected, found = _probe(model, of_plain), _probe(model, of_layout)
    for name, a, b in zip(("values", "gradients"), found, expected, strict=True):
        tolerance = 1e-3 if all(x.dtype == mx.float32 for x in b) else 5e-2  # a wrong mask or position is far beyond
        if not (distance := _distance(a, b)) < tolerance:
            return f"its {name} differ by {distance:.1e}"
    return None


def _batch(tokens: mx.array, **layout: mx.array) -> Batch:
    none = mx.zeros((0,), mx.int32)
    return Batch(tokens, none, none, none, none, **layout)


def _probe(model: nn.Module, run: Callable[[], mx.array]) -> tuple[list[mx.array], list[mx.array]]:
    """What `run` returns, and the gradient of a random projection of it with respect to the trainable parameters."""
    parameters = model.trainable_parameters()
    if not tree_flatten(parameters):
        return [run()], []

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
