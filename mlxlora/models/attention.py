"""The one place where mlx-lm's models compute attention: fused, or in chunks of queries that the backward pass computes again.

mlx-lm's models call `scaled_dot_product_attention` of `mlx_lm.models.base` by that name, in their own module. `hook` puts
`attend` there, which does the same unless the cache that a layer was handed brings its own way, or causal rows are faster
in chunks: MLX has a fused backward for mask="causal" on GPUs, and on a CPU keeps all scores [R, heads, T, T].
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import base

from ..utils.device import backend

_NAME = "scaled_dot_product_attention"
_PLAIN = getattr(base, _NAME)
fused = mx.fast.scaled_dot_product_attention

# By device: queries of a chunk, and the positions of a row from which on chunks pay. cpu (2 shared cores, OpenBLAS, 8 heads; CPU
# time and memory against the fused function): a whole SFT step 1.01x to 1.06x and 0.7x at 512, 0.75x to 1.0x and 0.5x at 1024,
# so the bound lies between; attention alone at 2048 0.94x and 0.16x, with a window of 256 0.32x and 0.08x. cuda (one H200): with a
# window of 256 1.2x and 0.8x at 4096, 0.8x and 0.34x at 8192; of 4 packed sequences 1.3x to 1.5x and about 1x at 8192.
# metal is a guess: run benchmarks/attention.py.
CHUNK = {"cpu": 128, "cuda": 512, "metal": 512}
PAYS_FROM = {"cpu": 768, "cuda": 8192, "metal": 1024}
PACKED_PAYS_FROM = PAYS_FROM | {"cuda": 16384}
FUSED_BACKWARD = {"cpu": False, "cuda": True, "metal": True}  # of mask="causal", in mlx 0.32.4

# Rows next to shared prompts: scores that a layer may keep for its backward pass, which else computes them again (cpu: 1.1x a
# DPO step), and scores of a chunk of queries.
KEPT_BYTES = {"cpu": 32 << 20, "cuda": 64 << 20, "metal": 32 << 20}
SCORE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20, "metal": 64 << 20}

Arrays = dict[str, Any]

_choice = "auto"


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


@contextmanager
def using(choice: str) -> Iterator[None]:
    """How rows attend while the block runs: "fused", "chunked", or "auto": what is faster on this device."""
    global _choice
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


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
    """mlx-lm's attention, with its signature; a cache with a method `attend` computes it instead.

    That is given queries [R, heads, T, d] and what `update_and_fetch` returned, and by name scale, mask and sinks.
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
    """Attention of whole rows, the way that `using` chose.

    Args:
        queries: [R, heads, T, d].
        keys: [R, kv heads, T, d].
        values: [R, kv heads, T, d].
        scale: of the scores.
        window: a key is less than this behind its query.
        segments: [R, T] int, queries see keys of their own segment; None: a row is one.
        sinks: [heads] logits of a key without a value.

    Returns:
        [R, heads, T, d].
    """
    length = queries.shape[2]
    window = window if window is not None and window < length else None
    whole = window is None and segments is None
    if in_chunks(length, whole, packed=segments is not None):
        return blockwise(queries, keys, values, scale=scale, window=window, segments=segments, sinks=sinks)
    mask = "causal" if whole else visible(range(length), range(length), window, segments)
    return fused(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def in_chunks(length: int, whole: bool, *, packed: bool = False) -> bool:
    """Whether rows of this length attend in chunks; `whole`: without windows and segments; `packed`: with segments."""
    if _choice != "auto":
        return _choice == "chunked"
    here = backend()
    return length >= (PACKED_PAYS_FROM if packed else PAYS_FROM)[here] and not (whole and FUSED_BACKWARD[here])


def visible(queries: range, keys: range, window: int | None = None, segments: mx.array | None = None) -> mx.array:
    """[R or 1, 1, queries, keys] bool: which keys a query sees, both given by their places in the row."""
    q, k = mx.arange(queries.start, queries.stop)[:, None], mx.arange(keys.start, keys.stop)[None]
    seen = (q >= k)[None, None]
    if window is not None:
        seen = seen & (q < k + window)
    if segments is not None:
        same = segments[:, queries.start : queries.stop, None] == segments[:, None, keys.start : keys.stop]
        seen = seen & same[:, None]
    return seen


# --- in chunks of queries ------------------------------------------------------------------------


def blockwise(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    before: Sequence[mx.array] = (),
    *,
    scale: float,
    window: int | None = None,
    segments: mx.array | None = None,
    lengths: mx.array | None = None,
    sinks: mx.array | None = None,
    chunk: int | None = None,
) -> mx.array:
    """softmax(scale·Q·Kᵀ)·V, a chunk of queries at a time; the backward pass computes the scores again.

    Rows may continue prompts: one softmax then runs over a prompt's keys and the row's own. The scores of all rows of a
    prompt against its keys are one matrix product, so these are neither repeated nor masked by an array of their size.

    Args:
        queries: [R, heads, T, d].
        keys: [R, kv heads, T, d], see `causal`, as for the arguments that it has.
        values: [R, kv heads, T, d].
        before: keys and values of the prompts, [U, kv heads, K, d]; row r continues prompt r div (R/U).
        scale: of the scores.
        window: counts a prompt's tokens, too.
        segments: [R, T].
        lengths: [U] tokens of the prompts; the rest is padding.
        sinks: [heads].
        chunk: queries at a time.

    Returns:
        [R, heads, T, d].
    """
    size = chunk or _chunk(queries, before[0].shape[2] if before else 0)
    arrays = {"keys": [keys, *before[:1]], "values": [values, *before[1:]], "sinks": [] if sinks is None else [sinks]}
    constants = {name: a for name, a in (("segments", segments), ("lengths", lengths)) if a is not None}
    work = partial(_view, window)
    if chunk is None and before and _score_bytes(queries, before[0].shape[2]) <= KEPT_BYTES[backend()]:
        return _forward(queries, partial(work, arrays, constants), scale, size)

    @mx.custom_function
    def forward(queries: mx.array, arrays: Arrays, constants: Arrays) -> mx.array:
        return _forward(queries, partial(work, arrays, constants), scale, size)

    @forward.vjp
    def backward(primals: Any, gradient: mx.array, out: mx.array) -> tuple[mx.array, Arrays, Arrays]:
        queries, arrays, constants = primals
        dqueries, sums = _backward((queries, gradient, out), arrays, partial(work, arrays, constants), scale, size)
        return dqueries, sums, {name: mx.zeros_like(array) for name, array in constants.items()}

    return forward(queries, arrays, constants)  # type: ignore[return-value]


class _View(NamedTuple):
    """What the queries of a chunk read: parts of keys and values with what is seen of each, sinks, and the first of the keys."""

    keys: list[mx.array]
    values: list[mx.array]
    seen: list[mx.array]
    sinks: mx.array | None
    first: int


def _view(window: int | None, arrays: Arrays, constants: Arrays, rows: int, span: range) -> _View:
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
    primals: tuple[mx.array, ...], arrays: Arrays, view: Callable[[int, range], _View], scale: float, size: int
) -> tuple[mx.array, Arrays]:
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
    """The array, once `done` is: the scheduler would hold the scores of many chunks at once."""
    return mx.depends(array, list(done)) if done else array  # type: ignore[return-value]


def _chunk(queries: mx.array, prompt: int) -> int:
    """Queries at a time; next to a prompt, as many as the budget of scores allows."""
    if not prompt:
        return CHUNK[backend()]
    return max(32, SCORE_BYTES[backend()] * queries.shape[2] // _score_bytes(queries, prompt) // 32 * 32)


def _score_bytes(queries: mx.array, prompt: int) -> int:
    rows, heads, length, _ = queries.shape
    return 4 * rows * heads * length * (prompt + length)


def reaches(queries: range, prompt: int, lengths: mx.array, window: int | None) -> mx.array:
    """[R, 1, queries or 1, K] bool: which tokens of its prompt a row's query sees; padding is none of them."""
    length, place = lengths[:, None, None, None], mx.arange(prompt)
    seen = place < length
    return seen if window is None else seen & (length + mx.arange(queries.start, queries.stop)[:, None] < place + window)


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


def _gradients(span: tuple[mx.array, ...], view: _View, scale: float) -> tuple[mx.array, Arrays]:
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
    """[R, heads, c, a] with [U, kv heads, a, b] to [R, heads, c, b]: heads of a group and rows of a prompt are one matrix."""
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
