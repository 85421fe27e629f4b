"""Caches of many rows: prompts are computed once, rows are repeated, dropped and added; and which caches a model can use.

Where our own caches (`prefix_cache`) do not fit, mlx-lm's batch caches handle left padding, positions per row, windows and
recurrent states. Their `filter` with repeated indices copies the cache of a prompt to the rows of its group, and with fewer
indices it drops finished rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, Self

import mlx.core as mx
import mlx.nn as nn
from attrs import define, field, frozen
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from ..models.closeness import close_logits
from ..models.modes import evaluating
from . import prefix_cache
from .prefix_cache import TokenIds, feed

Cache = list[Any]  # one mlx-lm cache a layer

_GROWTH = 64  # positions that a cache grows by; mlx-lm's 256 can double the memory of short completions


@frozen
class Route:
    """How the rows of a model can be sampled together.

    Attributes:
        mixed: prompts of any length in one batch, rows leave and enter; else only rows of equally long prompts, until all end.
        note: describes the route in the log.
        shared: our own caches, which keep each prompt once.
        steps: compiled steps of this model by `Sampling`, kept between calls.
    """

    mixed: bool
    note: str
    shared: bool = False
    steps: dict[Any, Any] = field(factory=dict, eq=False, repr=False)


class Rows(Protocol):
    """Caches of R rows; `reader` takes `fixed` and `own`, and returns the next `own`."""

    fixed: Any
    own: Any

    def keep(self, rows: Sequence[int]) -> Self:
        """The given rows, in that order."""
        ...

    def join(self, model: nn.Module, prompts: Sequence[TokenIds]) -> Self:
        """These rows and one more for each of `prompts`."""
        ...

    def reserve(self, positions: int, limit: int) -> None:
        """Makes room for `positions` tokens of each row; there will never be more than `limit`."""
        ...


def enter(model: nn.Module, route: Route, prompts: Sequence[TokenIds], bits: int | None = None) -> Rows:
    """A row for each of `prompts`, with all tokens but the last in its cache."""
    if route.shared:
        return prefix_cache.start(model, prompts, bits)
    return Batched(_repeated(model, prompts) if route.mixed else prefill_equal(model, prompts))


def reader(model: nn.Module, route: Route, bits: int | None = None) -> Callable[..., tuple[mx.array, Any]]:
    """(fixed, own, last [R], place [R]) -> (logits [R, V] after the tokens `last`, own)."""
    if route.shared:
        return partial(prefix_cache.decode_step, model, bits)
    return lambda cache, own, last, place: (model(last[:, None], cache=cache)[:, -1], own)


@define(eq=False)
class Batched:
    """Rows in mlx-lm's batch caches, which change in place."""

    fixed: Cache
    own: None = None

    def keep(self, rows: Sequence[int]) -> Self:
        """See `Rows`."""
        keep_rows(self.fixed, rows)
        return self

    def join(self, model: nn.Module, prompts: Sequence[TokenIds]) -> Self:
        """See `Rows`."""
        join(self.fixed, _repeated(model, prompts))
        return self

    def reserve(self, positions: int, limit: int) -> None:
        """mlx-lm's caches grow by themselves."""


def _repeated(model: nn.Module, prompts: Sequence[TokenIds]) -> Cache:
    slots = {prompt: slot for slot, prompt in enumerate(dict.fromkeys(prompts))}
    return keep_rows(prefill_batch(model, list(slots)), [slots[prompt] for prompt in prompts])


def prefill_batch(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Cache:
    """mlx-lm's batch cache of all tokens but the last of each prompt, one row for each prompt."""
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
        feed(model, prompts, longest, cache)
    for layer in cache:
        layer.finalize()
    return cache


def prefill_equal(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Cache:
    """The same for equally long prompts, in the caches that the model makes."""
    cache = make_prompt_cache(model)
    feed(model, prompts, len(prompts[0]) - 1, cache)
    return cache


def keep_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """The given rows, in that order; a row may occur more than once."""
    for layer in cache:
        layer.filter(mx.array(list(rows)))
    return cache


def join(cache: Cache, more: Cache) -> Cache:
    """The rows of `cache`, then those of `more`."""
    for layer, other in zip(cache, more, strict=True):
        layer.extend(other)
    return cache


def find_route(model: nn.Module) -> Route:
    """The best route whose logits agree with those of the model without a cache on a tiny input."""
    obstacle = prefix_cache.cache_obstacle(model)
    ours = Route(True, "rollouts: prompts of all lengths in one batch, each prompt's keys and values kept once", shared=True)
    if obstacle is None and (obstacle := _trouble(model, ours)) is None:
        return ours
    mixed = Route(True, f"rollouts: prompts of all lengths in one batch, prompt caches copied to rows ({obstacle})")
    if (worst := _trouble(model, mixed)) is None:
        return mixed
    return Route(False, f"rollouts: equally long prompts together, without shared caches ({worst})")


def _trouble(model: nn.Module, route: Route) -> str | None:
    try:
        with evaluating(model):
            return None if _reproduces(model, route) else "its cached logits differ from the uncached ones"
    except Exception as error:  # a cache that cannot be batched may raise anything
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _reproduces(model: nn.Module, route: Route) -> bool:
    """Steps three rows of two prompts, drops a row, adds one, and steps again."""
    short, long, after = (3, 1), (1, 2, 3, 4, 5, 6, 7), [2, 4]
    read = reader(model, route)
    rows = enter(model, route, [long, short, short])
    first, rows.own = read(rows.fixed, rows.own, mx.array([long[-1], short[-1], short[-1]]), mx.array([0, 0, 0]))
    rows = rows.keep([0, 2]).join(model, [long[:4]])
    second, _ = read(rows.fixed, rows.own, mx.array([*after, long[3]]), mx.array([1, 1, 0]))
    expected = [(first[0], long), (first[2], short)]
    expected += [(second[0], (*long, after[0])), (second[1], (*short, after[1])), (second[2], long[:4])]
    wanted = ((got, model(mx.array([tokens]))[0, -1]) for got, tokens in expected)
    return all(close_logits(got, want, full=1e-3, half=5e-2) for got, want in wanted)  # wrong positions or masks differ far more
