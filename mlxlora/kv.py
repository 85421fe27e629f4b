"""Caches of many rows at once: prompts prefilled once, rows repeated, dropped and added.

mlx-lm's batch caches do the bookkeeping (left padding, per-row positions, windows, recurrent states), and one method
of theirs does three jobs: `filter` with repeated indices gives a prompt's cache to the samples of its group, with
fewer indices it drops finished rows.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs import frozen
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from .modes import evaluating

Cache = list[Any]  # one mlx-lm cache a layer

_PREFILL_TOKENS = 2048  # tokens that pass through the model at once
_GROWTH = 64  # positions that a cache grows by; mlx-lm's 256 is up to twice the memory of a short completion


@frozen
class Route:
    """How a model's rows can be sampled together.

    Attributes:
        mixed: prompts of any lengths in one batch, rows leave and enter; else only rows of equally long prompts, to the end.
        note: for the log.
    """

    mixed: bool
    note: str


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Cache:
    """The cache of all tokens but the last of each prompt, a row a prompt."""
    rows = [make_prompt_cache(model) for _ in prompts]
    cache = [layer[0].merge(list(layer)) for layer in zip(*rows, strict=True)]
    for layer in cache:
        if isinstance(layer, BatchKVCache):
            layer.step = _GROWTH
    lengths = [len(prompt) - 1 for prompt in prompts]
    longest = max(lengths)
    if longest:
        for layer in cache:
            layer.prepare(lengths=lengths, right_padding=[longest - length for length in lengths])
        _read(model, _padded(prompts, longest), cache)
    for layer in cache:
        layer.finalize()
    return cache


def prefill_equal(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Cache:
    """`prefill` of equally long prompts with the model's own caches."""
    cache = make_prompt_cache(model)
    _read(model, _padded(prompts, len(prompts[0]) - 1), cache)
    return cache


def keep_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """The given rows, in that order; a row may be asked for more than once."""
    for layer in cache:
        layer.filter(mx.array(list(rows)))
    return cache


def join(cache: Cache, more: Cache) -> Cache:
    """The rows of `cache`, then those of `more`."""
    for layer, other in zip(cache, more, strict=True):
        layer.extend(other)
    return cache


def find_route(model: nn.Module) -> Route:
    """Tries the batch caches on a tiny input against the model without a cache."""
    try:
        with evaluating(model):
            worst = None if _reproduces(model) else "its cached logits differ from the uncached ones"
    except Exception as error:  # a cache that cannot be batched is no error of ours: whatever it raised
        worst = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if worst is None:
        return Route(True, "rollouts: prompts of all lengths in one batch, prompt caches shared")
    return Route(False, f"rollouts: equally long prompts together, without shared caches ({worst})")


def _reproduces(model: nn.Module) -> bool:
    """Two prompts, three rows, a step; one row dropped, one added, another step."""
    short, long, after = [3, 1], [1, 2, 3, 4, 5, 6, 7], [2, 4]
    cache = keep_rows(prefill(model, [long, short]), [0, 1, 1])
    first = model(mx.array([long[-1:], short[-1:], short[-1:]]), cache=cache)
    cache = join(keep_rows(cache, [0, 2]), prefill(model, [long[:4]]))
    second = model(mx.array([[after[0]], [after[1]], long[3:4]]), cache=cache)
    expected = [(first[0], long), (first[2], short)]
    expected += [(second[0], [*long, after[0]]), (second[1], [*short, after[1]]), (second[2], long[:4])]
    return all(_alike(got[-1], model(mx.array([tokens]))[0, -1]) for got, tokens in expected)


def _alike(a: mx.array, b: mx.array) -> bool:
    tolerance = 1e-3 if b.dtype == mx.float32 else 5e-2  # of the largest logit; a wrong position or mask moves it far more
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    scale = float(mx.abs(mx.where(mx.isinf(b), 0, b)).max().item())  # type: ignore[arg-type]
    return bool(mx.allclose(a, b, rtol=0, atol=tolerance * scale).item())


def _padded(prompts: Sequence[Sequence[int]], longest: int) -> mx.array:
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt) - 1] = prompt[:-1]
    return mx.array(tokens)


def _read(model: nn.Module, tokens: mx.array, cache: Cache) -> None:
    """Feeds [R, T] tokens to the model in pieces; logits are built lazily and never computed."""
    piece = max(32, _PREFILL_TOKENS // tokens.shape[0])
    for start in range(0, tokens.shape[1], piece):
        model(tokens[:, start : start + piece], cache=cache)
        mx.eval([layer.state for layer in cache])
