"""Which way rows attend on this machine: a layer's attention, forward and backward, is timed at the run's own shapes.

The table has a choice for some powers of two. Short rows, for which it cannot matter, and shapes that were not measured use the
constants of `attention`.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from ..batch import Batch
from ..utils.context import assigned
from ..utils.device import backend, memory_limit
from ..utils.measured import Alternatives, Measurement, Measurements, Timing, timing_of
from .attention import CHUNK, causal, hook
from .attention_shapes import MEASURED_FROM, SHAPES, AttentionShape, is_way, rung, using
from .modes import evaluating
from .row_layouts import forward_rows

ENOUGH = 0.1  # seconds of all ways at one length, after which no longer rows are measured: twice as long, they take over a second
_TOKENS = {"cpu": 512, "cuda": 8192, "metal": 4096}  # at most, of the rows that are measured
Tell = Callable[[str], object]


def attention_shapes(model: nn.Module, *, packed: bool = False) -> set[AttentionShape]:
    """The shapes of a model's attention layers, read off a forward pass that is not computed; none if the model refuses it."""
    shapes: set[AttentionShape] = set()
    hook(model)
    try:
        with evaluating(model), assigned(SHAPES, shapes):
            if not packed:
                model(mx.zeros((1, 2), mx.int32))
            if packed or any(isinstance(cache, RotatingKVCache) for cache in make_prompt_cache(model)):
                forward_rows(model, model, _batch())
    except Exception:  # the model's own code may raise anything at a layout that it does not take
        return set()
    return {shape._replace(packed=packed) for shape in shapes}


def _batch() -> Batch:
    none, tokens = mx.zeros((0,), mx.int32), mx.zeros((1, 2), mx.int32)
    return Batch(tokens, none, none, none, none, segments=mx.ones((1, 2), mx.int32))


def attention_table(
    shapes: set[AttentionShape], longest: int, rows: int, known: Measurements, tell: Tell
) -> dict[str, dict[str, str]]:
    """The best way for rows of these shapes up to a length; tells that for the longest of them."""
    table: dict[str, dict[str, str]] = {}
    for shape in sorted(shapes, key=str):
        found = dict(measured_lengths(shape, longest, rows, known))
        if not found:
            continue
        table[shape.name] = {str(length): measurement.best for length, measurement in found.items()}
        length, last = list(found.items())[-1]
        tell(f"{shape.name}, rows of {length}: {last.told()}, measured on this device; --attention overrides it")
    return table


def measured_lengths(
    shape: AttentionShape, longest: int, rows: int, known: Measurements, *, again: bool = False
) -> Iterator[tuple[int, Measurement]]:
    """Powers of two up to the length, and what the ways take; ends where the scores would not fit or the time is enough."""
    length = MEASURED_FROM
    while length <= rung(longest) and 16 * shape.heads * length * length <= memory_limit() // 4:
        count = max(1, min(rows, _TOKENS[backend()] // length))
        found = known.of(f"{shape.name}, {count} x {length}", attention_ways(shape, length, count), again=again)
        if found is None:
            return
        yield length, found
        if found.seconds > ENOUGH:
            return
        length *= 2


def attention_ways(shape: AttentionShape, length: int, rows: int) -> Alternatives:
    """The fused function, and chunks of half, of once and of twice the usual size, timed on random rows."""
    usual = CHUNK[backend()]
    ways = ["fused", *(f"chunked {size}" for size in (usual // 2, usual, 2 * usual) if size < length)]
    return {way: partial(attention_timing, way, shape, length, rows) for way in ways}


def attention_timing(way: str, shape: AttentionShape, length: int, rows: int) -> Timing:
    """What a layer's attention takes, forward and backward, compiled as in a step."""
    widths = (shape.width, shape.width, shape.value_width, shape.value_width)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    sizes = [(rows, number, length, width) for number, width in zip(heads, widths, strict=True)]
    given = [mx.random.normal(size, key=mx.random.key(0)).astype(shape.dtype) for size in sizes]
    segments = mx.broadcast_to(mx.arange(length)[None] * 4 // length, (rows, length)) if shape.packed else None
    sinks = mx.zeros((shape.heads,)) if shape.sinks else None
    mx.eval(given, [array for array in (segments, sinks) if array is not None])

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return causal(q, k, v, scale=shape.width**-0.5, window=shape.window, segments=segments, sinks=sinks)

    @mx.compile
    def both(q: mx.array, k: mx.array, v: mx.array, gradient: mx.array) -> list[mx.array]:
        out, gradients = mx.vjp(attend, [q, k, v], [gradient])
        return [*out, *gradients]

    with using(way):
        return timing_of(lambda: mx.eval(both(*given)))


def is_table(value: object) -> bool:
    """Whether a value from a checkpoint is such a table."""
    rows = value.values() if isinstance(value, Mapping) else [None]
    return all(isinstance(row, Mapping) and row and all(str(k).isdecimal() and is_way(v) for k, v in row.items()) for row in rows)


# --- the table of a machine ---------------------------------------------------------------------------

_LONGEST = 16384


def machine_table(known: Measurements) -> Iterator[str]:
    """Lines on the ways for usual layers, whole rows, windows and packed rows, measured now and kept for runs of these shapes."""
    cpu = backend() == "cpu"
    usual = AttentionShape(8, 4, 64, 64, mx.float32) if cpu else AttentionShape(16, 8, 128, 128, mx.bfloat16)
    for shape in (usual, usual._replace(window=256), usual._replace(packed=True)):
        for length, found in measured_lengths(shape, _LONGEST, _LONGEST, known, again=True):
            yield f"{shape.name}, rows of {length}: {found.told()}"
