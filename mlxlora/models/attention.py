"""The one place where mlx-lm's models compute attention: fused, or in chunks of queries that the backward pass recomputes.

mlx-lm's models call `scaled_dot_product_attention` of `mlx_lm.models.base` by that name, in their own Python module. `hook`
replaces it by `attend`, which does the same with two exceptions: a cache with a method `attend` computes its own attention, and
causal rows attend in chunks where that is faster. (MLX has a fused backward pass for mask="causal" on GPUs, on Metal for some head
sizes. Without it all scores [R, heads, T, T] are kept; docs/machines.md names the sources.)
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import base

from ..utils.device import backend
from ..utils.patches import python_modules, replace_function
from .attention_shapes import SHAPES, AttentionShape, attention_way, measured_size
from .attention_shapes import using as using

_NAME = "scaled_dot_product_attention"
_PLAIN = getattr(base, _NAME)
fused = mx.fast.scaled_dot_product_attention

# By device, as benchmarks/attention.py measured them (metal is a guess; benchmarks/README.md has the numbers). A run measures its
# own shapes (`attention_choice`) and uses CHUNKS_PAY_FROM only for those that it did not measure.
CHUNK = {"cpu": 128, "cuda": 512, "metal": 512}  # queries: smaller chunks launch more kernels, larger ones hold more scores
CHUNKS_PAY_FROM = {"cpu": 768, "cuda": 8192, "metal": 1024}  # positions of a row: below, recomputing costs more than it saves
PACKED_CHUNKS_PAY_FROM = CHUNKS_PAY_FROM | {"cuda": 16384}

METAL_WIDTHS = frozenset((64, 72, 80, 96, 128, 192, 256))  # of heads that have a fused backward pass there, in mlx 0.32.4

# Rows that continue prompts: a layer keeps scores up to KEPT_BYTES for its backward pass instead of computing them again;
# SCORE_BYTES bounds the scores of one chunk of queries.
KEPT_BYTES = {"cpu": 32 << 20, "cuda": 64 << 20, "metal": 32 << 20}
SCORE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20, "metal": 64 << 20}

_Arrays = dict[str, Any]


class Causal(str):
    """Stands in for a mask array, where only `attend` reads it: causal, and a key is less than `window` behind its query.

    It equals "causal", which is what models that look at their mask expect.
    """

    window: int | None = None

    @classmethod
    def within(cls, window: int | None) -> "Causal":
        """The mask of a window; None reaches back to the start."""
        mask = cls("causal")
        mask.window = window
        return mask


def hook(model: nn.Module) -> int:
    """Makes the model's layers call `attend`; a second call changes nothing. `utils.patches.restore` undoes it.

    Returns:
        How many Python modules of the model call it.
    """
    callers = [module for module in python_modules(model) if getattr(module, _NAME, None) in (_PLAIN, attend)]
    for module in callers:
        replace_function(model, module, _NAME, attend)
    return len(callers)


def attend(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None = None
) -> mx.array:
    """mlx-lm's attention, with its signature; a cache with a method `attend` computes it instead.

    The method gets queries [R, heads, T, d], the two results of `update_and_fetch`, and by name scale, mask and sinks.
    """
    if hasattr(cache, "attend"):
        return cache.attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    if cache is None and isinstance(mask, str) and queries.shape[2] == keys.shape[2]:
        return causal(queries, keys, values, scale=scale, sinks=sinks)
    return _PLAIN(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)


def causal(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    window: int | None = None,
    segments: mx.array | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of whole rows, computed as `using` says.

    Args:
        queries: [R, heads, T, d].
        keys: [R, kv heads, T, d].
        values: [R, kv heads, T, d].
        scale: of the scores.
        window: a query sees this many keys, the last of them its own; None: all.
        segments: [R, T] int, queries see keys of their own segment; None: a row is one segment.
        sinks: [heads] logits of a key without a value.

    Returns:
        [R, heads, T, d].
    """
    (_, heads, length, width), value_width = queries.shape, values.shape[-1]
    packed, sunk = segments is not None, sinks is not None
    shape = AttentionShape(heads, keys.shape[1], width, value_width, queries.dtype, window, packed, sunk)
    if (seen := SHAPES.get()) is not None:
        seen.add(shape)
    window = window if window is not None and window < length else None
    whole = window is None and segments is None
    fusible = whole and fused_backward(width, value_width, sinks=sunk)
    if in_chunks(length, fusible, packed=packed, shape=shape):
        size = measured_size(attention_way(shape, length))
        return blockwise(queries, keys, values, Scoring(scale, window, segments, sinks), None, size)
    mask = "causal" if whole else visible(range(length), range(length), window, segments)
    return fused(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def in_chunks(length: int, fusible: bool, *, packed: bool = False, shape: AttentionShape | None = None) -> bool:
    """Whether rows attend in chunks: as asked for, as measured, or as the constants guess.

    Args:
        length: positions of a row.
        fusible: MLX has a fused backward pass for these rows.
        packed: with segments.
        shape: of the layer.
    """
    choice = attention_way(shape, length)
    if choice != "auto":
        return choice != "fused"
    return length >= (PACKED_CHUNKS_PAY_FROM if packed else CHUNKS_PAY_FROM)[backend()] and not fusible


def fused_backward(width: int, value_width: int, *, sinks: bool = False) -> bool:
    """Whether MLX has a fused backward pass, which keeps no scores, for mask="causal" and heads of these widths.

    Metal has none for a mask array, so windows and packed rows keep all scores there, as on a CPU.
    """
    if backend() == "metal":
        return width == value_width and width in METAL_WIDTHS and not sinks
    return backend() == "cuda"


def visible(queries: range, keys: range, window: int | None = None, segments: mx.array | None = None) -> mx.array:
    """[R or 1, 1, queries, keys] bool: which keys a query sees; both are given by their positions in the row."""
    q, k = mx.arange(queries.start, queries.stop)[:, None], mx.arange(keys.start, keys.stop)[None]
    seen = (q >= k)[None, None]
    if window is not None:
        seen = seen & (q < k + window)
    if segments is not None:
        same = segments[:, queries.start : queries.stop, None] == segments[:, None, keys.start : keys.stop]
        seen = seen & same[:, None]
    return seen


# --- in chunks of queries ------------------------------------------------------------------------


@frozen(eq=False)
class Scoring:
    """How scores become weights; see `causal` for the fields."""

    scale: float
    window: int | None = None
    segments: mx.array | None = None
    sinks: mx.array | None = None


@frozen(eq=False)
class Prompts:
    """Keys and values of prompts that rows continue.

    Attributes:
        keys: [U, kv heads, K, d]; row r continues prompt r div (R/U).
        values: [U, kv heads, K, d].
        lengths: [U] tokens of each prompt; the rest is padding. A window counts them, too.
    """

    keys: mx.array
    values: mx.array
    lengths: mx.array


def blockwise(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scoring: Scoring,
    prompts: Prompts | None = None,
    chunk: int | None = None,
) -> mx.array:
    """softmax(scale·Q·Kᵀ)·V, a chunk of queries at a time; the backward pass computes the scores again.

    Where rows continue prompts, one softmax runs over a prompt's keys and the row's own. The scores of all rows of a prompt
    against its keys are one matrix product, so the keys are not repeated and need no mask array of the scores' size.

    Args:
        queries: [R, heads, T, d].
        keys: [R, kv heads, T, d].
        values: [R, kv heads, T, d].
        scoring: scale, window, segments and sinks.
        prompts: what the rows continue.
        chunk: queries at a time; None: by device and prompt length.

    Returns:
        [R, heads, T, d].
    """
    size = chunk or _chunk(queries, prompts)
    more = ([prompts.keys], [prompts.values]) if prompts else ([], [])
    sinks = [] if scoring.sinks is None else [scoring.sinks]
    arrays: _Arrays = {"keys": [keys, *more[0]], "values": [values, *more[1]], "sinks": sinks}
    named = (("segments", scoring.segments), ("lengths", prompts.lengths if prompts else None))
    constants = {name: array for name, array in named if array is not None}
    scale, view = scoring.scale, partial(_view, scoring.window)
    if chunk is None and prompts and _score_bytes(queries, prompts) <= KEPT_BYTES[backend()]:
        return _forward(queries, partial(view, arrays, constants), scale, size)

    @mx.custom_function
    def forward(queries: mx.array, arrays: _Arrays, constants: _Arrays) -> mx.array:
        return _forward(queries, partial(view, arrays, constants), scale, size)

    @forward.vjp
    def backward(primals: Any, gradient: mx.array, out: mx.array) -> tuple[mx.array, _Arrays, _Arrays]:
        queries, arrays, constants = primals
        dqueries, sums = _backward((queries, gradient, out), arrays, partial(view, arrays, constants), scale, size)
        return dqueries, sums, {name: mx.zeros_like(array) for name, array in constants.items()}

    return forward(queries, arrays, constants)  # type: ignore[return-value]


class _View(NamedTuple):
    """What the queries of a chunk read.

    Attributes:
        keys: of the row, then of its prompt.
        values: of the same.
        seen: which of each part's keys a query sees.
        sinks: [heads].
        first: position of the row's first key that is in `keys`.
    """

    keys: list[mx.array]
    values: list[mx.array]
    seen: list[mx.array]
    sinks: mx.array | None
    first: int


def _view(window: int | None, arrays: _Arrays, constants: _Arrays, rows: int, span: range) -> _View:
    first = 0 if window is None else max(0, span.start - window + 1)
    (own, *keys), (values, *more) = arrays["keys"], arrays["values"]
    seen = [visible(span, range(first, span.stop), window, constants.get("segments"))]
    if keys:
        lengths = mx.repeat(constants["lengths"], rows // keys[0].shape[0])
        seen.append(reaches(span, keys[0].shape[2], lengths, window))
    own, values = own[:, :, first : span.stop], values[:, :, first : span.stop]
    return _View([own, *keys], [values, *more], seen, next(iter(arrays["sinks"]), None), first)


def _spans(length: int, size: int) -> list[range]:
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def _forward(queries: mx.array, view: Callable[[int, range], _View], scale: float, size: int) -> mx.array:
    done: list[mx.array] = []
    for span in _spans(queries.shape[2], size):
        micro = _after(queries[:, :, span.start : span.stop], done[-1:])
        seen = view(queries.shape[0], span)
        done.append(_mixed(_weights(micro * scale, seen), seen.values, micro.dtype))
    return mx.concatenate(done, axis=2)


def _backward(
    primals: tuple[mx.array, ...], arrays: _Arrays, view: Callable[[int, range], _View], scale: float, size: int
) -> tuple[mx.array, _Arrays]:
    """Gradients of the queries, and of `arrays`, summed over the chunks in float32."""
    sums = tree_map(lambda array: mx.zeros(array.shape, mx.float32), arrays)
    done: list[mx.array] = []
    for span in _spans(primals[0].shape[2], size):
        micro, *rest = (array[:, :, span.start : span.stop] for array in primals)
        micro = _after(micro, [*done[-1:], *(array for _, array in tree_flatten(sums))] if done else [])
        seen = view(micro.shape[0], span)
        dqueries, parts = _gradients((micro, *rest), seen, scale)
        done.append(dqueries)
        for name in ("keys", "values"):
            own = sums[name][0]
            own[:, :, seen.first : span.stop] = own[:, :, seen.first : span.stop] + parts[name][0]
            sums[name][1:] = [a + b for a, b in zip(sums[name][1:], parts[name][1:], strict=True)]
        sums["sinks"] = [a + b for a, b in zip(sums["sinks"], parts["sinks"], strict=True)]
    return mx.concatenate(done, axis=2), tree_map(lambda total, array: total.astype(array.dtype), sums, arrays)


def _after(array: mx.array, done: Sequence[Any]) -> mx.array:
    """The array, computed after `done`; otherwise the scheduler holds the scores of many chunks at once."""
    return mx.depends(array, list(done)) if done else array  # type: ignore[return-value]


def _chunk(queries: mx.array, prompts: Prompts | None) -> int:
    """Queries at a time; after a prompt, as many as the budget of scores allows."""
    if prompts is None:
        return CHUNK[backend()]
    return max(32, SCORE_BYTES[backend()] * queries.shape[2] // _score_bytes(queries, prompts) // 32 * 32)


def _score_bytes(queries: mx.array, prompts: Prompts) -> int:
    rows, heads, length, _ = queries.shape
    return 4 * rows * heads * length * (prompts.keys.shape[2] + length)


def reaches(queries: range, prompt: int, lengths: mx.array, window: int | None) -> mx.array:
    """[R, 1, queries or 1, K] bool: which tokens of its prompt a row's query sees, without padding."""
    length, position = lengths[:, None, None, None], mx.arange(prompt)
    seen = position < length
    return seen if window is None else seen & (length + mx.arange(queries.start, queries.stop)[:, None] < position + window)


def _weights(queries: mx.array, view: _View) -> list[mx.array]:
    """The softmax over all keys, in float32: [R, heads, c, keys] for each part, and [R, heads, c, 1] for the sink."""
    lowest = mx.finfo(mx.float32).min
    scores = [_product(queries, keys.swapaxes(-1, -2)).astype(mx.float32) for keys in view.keys]
    scores = [mx.where(seen, score, lowest) for seen, score in zip(view.seen, scores, strict=True)]
    if view.sinks is not None:
        scores.append(mx.broadcast_to(view.sinks.astype(mx.float32)[:, None, None], (*queries.shape[:3], 1)))
    joined = mx.softmax(mx.concatenate(scores, axis=-1) if len(scores) > 1 else scores[0], axis=-1)
    ends = list(accumulate(score.shape[-1] for score in scores))
    return [joined[..., start:stop] for start, stop in zip([0, *ends], ends, strict=False)]


def _mixed(weights: list[mx.array], values: list[mx.array], dtype: mx.Dtype) -> mx.array:
    """[R, heads, c, d]: Σ over the parts."""
    return sum(_product(w.astype(v.dtype), v) for w, v in zip(weights, values, strict=False)).astype(dtype)  # type: ignore


def _gradients(span: tuple[mx.array, ...], view: _View, scale: float) -> tuple[mx.array, _Arrays]:
    """Gradients of the queries, of keys and values of each part, and of the sinks: dS = P∘(dO·Vᵀ - dO·O)."""
    queries, gradient, out = span
    scaled = queries * scale
    weights = _weights(scaled, view)
    towards = (gradient * out).astype(mx.float32).sum(axis=-1, keepdims=True)
    dqueries, dkeys, dvalues = [], [], []
    for w, k, v in zip(weights, view.keys, view.values, strict=False):
        dscores = (w * (_product(gradient, v.swapaxes(-1, -2)) - towards)).astype(k.dtype)
        dqueries.append(_product(dscores, k))
        dkeys.append(_folded(dscores, k).swapaxes(-1, -2) @ _folded(scaled, k))
        dvalues.append(_folded(w.astype(v.dtype), v).swapaxes(-1, -2) @ _folded(gradient, v))
    dsinks = [] if view.sinks is None else [-(weights[-1] * towards).sum(axis=(0, 2, 3))]
    total = (sum(dqueries) * scale).astype(queries.dtype)  # type: ignore[union-attr]
    return total, {"keys": dkeys, "values": dvalues, "sinks": dsinks}


def _product(rows: mx.array, others: mx.array) -> mx.array:
    """[R, heads, c, a] with [U, kv heads, a, b] to [R, heads, c, b]: heads of a group and rows of a prompt form one matrix."""
    count, heads, length, _ = rows.shape
    prompts, groups = others.shape[:2]
    product = _folded(rows, others) @ others
    split = product.reshape(prompts, groups, count // prompts, heads // groups, length, -1)
    return split.swapaxes(1, 2).reshape(count, heads, length, -1)


def _folded(rows: mx.array, others: mx.array) -> mx.array:
    """[R, heads, c, a] to [U, kv heads, R/U · heads/kv heads · c, a]."""
    count, heads, length, width = rows.shape
    prompts, groups = others.shape[:2]
    split = rows.reshape(prompts, count // prompts, groups, heads // groups, length, width)
    return split.swapaxes(1, 2).reshape(prompts, groups, -1, width)
