"""How rows lie in a batch: whole, several packed into one row, or continuing a shared prompt that passes through the model once.

Each layout is a cache that takes the place of mlx-lm's; that of a recurrent layer is in `recurrences`. `batch.prefix` [U, K] are
prompts; row r of `batch.tokens` continues prompt r div (R/U), and gradients flow back into the prompt. Layers that attend through
`attention.hook` need no mask arrays; the others get them.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from ..batch import Batch
from ..errors import one_line
from ..utils.device import backend
from ..utils.patches import Slot
from .activations import hook_activations, recomputed_activations
from .attention import Causal, Prompts, Scoring, blockwise, causal, fused, hook, reaches, visible
from .modes import evaluating
from .recurrences import RecurrentCache, hook_recurrences

Forward = Callable[..., mx.array]

# Sharing a prompt is faster from this ratio of positions computed without and with it. cpu and cuda as measured (numbers in
# benchmarks/README.md): rows after prompts leave the fused attention, which costs more on a GPU. metal is a guess.
SHARING_PAYS_FROM = {"cpu": 1.1, "cuda": 1.8, "metal": 1.8}

_MASK_AXES: Slot[int | None] = Slot("mask axes", None)
_KNOWS_WINDOWS: Slot[bool] = Slot("knows windows", False)


def forward_rows(forward: Forward, model: nn.Module, batch: Batch) -> mx.array:
    """`forward` of every row of the batch, [R, T, ...], in any layout.

    Args:
        forward: tokens [R, T] -> [R, T, ...], with mlx-lm's argument `cache`: the model, or its backbone.
        model: the model, which has one cache for each layer.
        batch: whole rows, packed rows or rows that continue prompts.
    """
    hook(model)
    hook_activations(model)
    hook_recurrences(model)
    with recomputed_activations():
        return _forward_rows(forward, model, batch)


def _forward_rows(forward: Forward, model: nn.Module, batch: Batch) -> mx.array:
    if batch.prefix is None or batch.prefix_lengths is None:
        if batch.segments is None and not _KNOWS_WINDOWS.get(model):
            return forward(batch.tokens)
        return forward(batch.tokens, cache=_whole_rows(model, mask_axes(model), batch.segments))
    axes, repeats = mask_axes(model), batch.tokens.shape[0] // batch.prefix.shape[0]
    lengths, stock = batch.prefix_lengths, make_prompt_cache(model)
    prompts: list[Any] = [RecurrentCache(_no_states(c), lengths) if _recurrent(c) else PromptCache(axes) for c in stock]
    forward(batch.prefix, cache=prompts)  # lazy: only keys, values and states are computed
    rows: list[Any] = [
        RecurrentCache(prompt.kv, repeats=repeats) if _recurrent(c) else ContinuedCache(prompt.kv, lengths, repeats, axes)
        for c, prompt in zip(stock, prompts, strict=True)
    ]
    return forward(batch.tokens, cache=rows)


def _whole_rows(model: nn.Module, axes: int, segments: mx.array | None, cls: type["WholeRowCache"] | None = None) -> list[Any]:
    cls = cls or WholeRowCache
    stock = make_prompt_cache(model)
    return [RecurrentCache(_no_states(c), segments=segments) if _recurrent(c) else cls(axes, segments) for c in stock]


def _recurrent(cache: Any) -> bool:
    return isinstance(cache, ArraysCache)


def _no_states(cache: Any) -> tuple[None, ...]:
    return (None,) * len(cache.cache)


class WholeRowCache:
    """In place of a layer's cache: whole rows, of one segment or several.

    Attributes:
        axes: of mask arrays; 0: the layer passes `Causal` on to `attention.attend`, which needs no array.
        segments: [R, T] int32, tokens see those of their own segment; None: a row is one segment.
        kv: keys and values that other rows will read.
    """

    offset = 0

    def __init__(self, axes: int = 4, segments: mx.array | None = None) -> None:
        self.axes, self.segments = axes, segments
        self.kv: tuple[mx.array, ...] = ()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Returns them unchanged."""
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


class PromptCache(WholeRowCache):
    """Hands out the keys and values of the prompts, [U, heads, K, d]."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keeps them and returns them unchanged."""
        self.kv = keys, values
        return keys, values


class ContinuedCache:
    """In place of a layer's cache: rows [R, C] that attend to the keys and values of their prompt, and to themselves."""

    def __init__(self, kv: tuple[mx.array, ...], lengths: mx.array, repeats: int, axes: int = 4) -> None:
        self.kv, self.lengths, self.repeats, self.axes = kv, lengths, repeats, axes
        self.offset = mx.repeat(lengths, repeats)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Returns them unchanged; where the layer needs a mask array, after the prompt's: [R, heads, K + C, d]."""
        if not self.axes:
            return keys, values
        before = (_repeated(array, self.repeats) for array in self.kv)
        joined = [mx.concatenate([a, b], axis=2) for a, b in zip(before, (keys, values), strict=True)]
        return joined[0], joined[1]

    def make_mask(self, n: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """[R, 1, C, K + C] bool; no query sees the padding between prompt and row."""
        if not self.axes:
            return Causal.within(window_size)
        shape = (self.offset.shape[0], 1, n)
        to_prompt = mx.broadcast_to(reaches(range(n), self.kv[0].shape[2], self.offset, window_size), (*shape, self.kv[0].shape[2]))
        to_itself = mx.broadcast_to(visible(range(n), range(n), window_size), (*shape, n))
        return _with_axes(mx.concatenate([to_prompt, to_itself], axis=-1), self.axes)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: Any) -> mx.array:
        """One softmax over the keys of the prompt, which all of its rows read, and of the row."""
        if not isinstance(mask, Causal):
            return fused(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        scoring, prompts = Scoring(scale, mask.window, None, sinks), Prompts(self.kv[0], self.kv[1], self.lengths)
        return blockwise(queries, keys, values, scoring, prompts)


TrainingCache = WholeRowCache | ContinuedCache | RecurrentCache


def mask_axes(model: nn.Module) -> int:
    """How many axes the mask arrays of the model's layers have; 0: all layers attend through the hook and need no arrays.

    Found once per model, by building (not computing) its output on many rows, so that no other axis has the size of the rows.
    """
    known = _MASK_AXES.get(model)
    if known is None:
        hook(model)
        with evaluating(model):
            known = next((axes for axes in (0, 4, 5) if _accepts(model, axes)), 4)
        _MASK_AXES.put(model, known)
    return known


class _Counting(WholeRowCache):
    """Counts how often a layer attends through it with the mask that it made."""

    attended = 0

    def attend(self, *args: Any, **kwargs: Any) -> mx.array:
        self.attended += isinstance(kwargs["mask"], Causal)
        return super().attend(*args, **kwargs)


def _accepts(model: nn.Module, axes: int) -> bool:
    tokens = mx.zeros((97, 2), mx.int32)
    caches = _whole_rows(model, axes, tokens, _Counting)
    try:
        model(tokens, cache=caches)
    except Exception:  # the model's own code may raise anything at a wrong mask
        return False
    return bool(axes) or all(cache.attended == 1 for cache in caches if isinstance(cache, _Counting))


def _with_axes(mask: mx.array, axes: int) -> mx.array:
    """[R, 1, ...] to this number of axes: gemma2 splits the heads into two."""
    return mask.reshape(*mask.shape[:2], *[1] * (axes - 4), *mask.shape[2:])


def _repeated(array: mx.array, repeats: int) -> mx.array:
    """[U, ...] to [U * repeats, ...]; the gradient is a sum, in a fixed order."""
    shape = array.shape
    return mx.broadcast_to(array[:, None], (shape[0], repeats, *shape[1:])).reshape(-1, *shape[1:])


# --- whether to -----------------------------------------------------------------------------------


def pays(plain: int, shared: int, on: str | None = None) -> bool:
    """Whether sharing prompts is faster, by the positions that the model computes without (`plain`) and with it (`shared`).

    >>> pays(plain=2 * (384 + 64), shared=384 + 2 * 64, on="cpu"), pays(2 * (128 + 128), 128 + 2 * 128, "cuda")
    (True, False)
    """
    return plain >= shared * SHARING_PAYS_FROM[on or backend()]


ProbeLayout = Callable[[list[list[int]]], tuple[Batch, mx.array]]
"""Lays out four rows, two of one prompt and two of another: the batch, and the places in it [R*T] of the tokens from `_FROM` on."""

_ROWS = [[1, 2, 3, 4, 5, 2, 9, 4], [1, 2, 3, 4, 5, 7, 1, 3], [6, 7, 8, 8, 5, 2], [6, 7, 8, 1, 6, 9]]
_FROM = [5, 5, 3, 3]  # lengths of their prompts


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


def layout_obstacle(forward: Forward, model: nn.Module, layout: ProbeLayout = shared_layout) -> str | None:
    """Why the model cannot take this layout, after a try on a tiny input; None: values and gradients equal those of whole rows."""
    known = {KVCache.__name__, RotatingKVCache.__name__}
    if hook_recurrences(model):
        known.add(ArraysCache.__name__)
    if strange := {type(cache).__name__ for cache in make_prompt_cache(model)} - known:
        return f"it keeps more than keys and values ({', '.join(sorted(strange))})"
    try:
        with evaluating(model):
            return _difference(forward, model, layout)
    except Exception as error:  # the model's own code may raise anything when it meets these caches
        return one_line(error, 120)


def use_windows(forward: Forward, model: nn.Module) -> bool:
    """Tells the layers of whole rows their windows, if the model has windows and computes the same with them.

    A mask array hides a window; a layer that knows it reads only the keys that the window reaches.

    Returns:
        Whether they are used from now on.
    """

    def layout(rows: list[list[int]]) -> tuple[Batch, mx.array]:
        found = [8 * r + start + i for r, start in enumerate(_FROM) for i in range(3)]
        return _batch(_right_padded(rows, 8), segments=mx.ones((4, 8), mx.int32)), mx.array(found)

    windows = any(isinstance(cache, RotatingKVCache) for cache in make_prompt_cache(model))
    used = windows and not mask_axes(model) and layout_obstacle(forward, model, layout) is None
    _KNOWS_WINDOWS.put(model, used)
    return used


def _difference(forward: Forward, model: nn.Module, layout: ProbeLayout) -> str | None:
    plain = _batch(_right_padded(_ROWS, 8))
    batch, location = layout(_ROWS)
    first = mx.array(_FROM)[:, None] + mx.arange(3)[None]

    def of_plain() -> mx.array:
        return mx.take_along_axis(forward(plain.tokens), first[..., None], axis=1).flatten(0, 1)

    def of_layout() -> mx.array:
        return forward_rows(forward, model, batch).flatten(0, 1)[location]

    expected, found = _probe(model, of_plain), _probe(model, of_layout)
    for name, a, b in zip(("values", "gradients"), found, expected, strict=True):
        tolerance = 1e-3 if all(x.dtype == mx.float32 for x in b) else 5e-2  # a wrong mask or position differs far more
        if not (distance := _distance(a, b)) < tolerance:
            return f"its {name} differ by {distance:.1e}"
    return None


def _batch(tokens: mx.array, **layout: mx.array) -> Batch:
    none = mx.zeros((0,), mx.int32)
    return Batch(tokens, none, none, none, none, **layout)


def _probe(model: nn.Module, run: Callable[[], mx.array]) -> tuple[list[mx.array], list[mx.array]]:
    """The result of `run`, and the gradient of a random projection of it with respect to the trainable parameters."""
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
