"""Caches of many rows at once: prompts prefilled once, rows repeated, dropped and added; and which of them a model can use.

Where our own (`decode`) do not fit, mlx-lm's batch caches do the bookkeeping (left padding, per-row positions, windows,
recurrent states), and one method of theirs does three jobs: `filter` with repeated indices gives a prompt's cache to the
samples of its group, with fewer indices it drops finished rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, Self

import mlx.core as mx
import mlx.nn as nn
from attrs import define, field, frozen
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from ..models.modes import evaluating
from . import prefix_cache as decode
from .prefix_cache import Prompt, feed

Cache = list[Any]  # one mlx-lm cache a layer

_GROWTH = 64  # positions that a cache grows by; mlx-lm's 256 is up to twice the memory of a short completion


@frozen
class Route:
    """How a model's rows can be sampled together.

    Attributes:
        mixed: prompts of any lengths in one batch, rows leave and enter; else only rows of equally long prompts, to the end.
        note: for the log.
        shared: in our own caches, which keep a prompt once.
        steps: compiled steps of this model, by how they sample; they last from one call to the next.
    """

    mixed: bool
    note: str
    shared: bool = False
    steps: dict[Any, Any] = field(factory=dict, eq=False, repr=False)


class Rows(Protocol):
    """Caches of R rows. `fixed` and `own` are what `reader` takes; `own` it also gives back."""

    fixed: Any
    own: Any

    def keep(self, rows: Sequence[int]) -> Self:
        """The given rows, in that order."""
        ...

    def join(self, model: nn.Module, prompts: Sequence[Prompt]) -> Self:
        """A row more for each of `prompts`."""
        ...

    def reserve(self, positions: int, limit: int) -> None:
        """Makes room for so many tokens of each row, of at most `limit`."""
        ...


def enter(model: nn.Module, route: Route, prompts: Sequence[Prompt], bits: int | None = None) -> Rows:
    """A row for each of `prompts`, all of whose tokens but the last are read."""
    if route.shared:
        return decode.start(model, prompts, bits)
    return Batched(_repeated(model, prompts) if route.mixed else prefill_equal(model, prompts))


def reader(model: nn.Module, route: Route, bits: int | None = None) -> Callable[..., tuple[mx.array, Any]]:
    """(fixed, own, last [R], place [R]) -> (logits [R, V] after the tokens `last`, own)."""
    if route.shared:
        return partial(decode.read, model, bits)
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

    def join(self, model: nn.Module, prompts: Sequence[Prompt]) -> Self:
        """See `Rows`."""
        join(self.fixed, _repeated(model, prompts))
        return self

    def reserve(self, positions: int, limit: int) -> None:
        """They grow by themselves."""


def _repeated(model: nn.Module, prompts: Sequence[Prompt]) -> Cache:
    slots = {prompt: slot for slot, prompt in enumerate(dict.fromkeys(prompts))}
    return keep_rows(prefill(model, list(slots)), [slots[prompt] for prompt in prompts])


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
        feed(model, prompts, longest, cache)
    for layer in cache:
        layer.finalize()
    return cache


def prefill_equal(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Cache:
    """`prefill` of equally long prompts with the model's own caches."""
    cache = make_prompt_cache(model)
    feed(model, prompts, len(prompts[0]) - 1, cache)
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
    """Tries our caches, then mlx-lm's batch caches, on a tiny input against the model without a cache."""
    obstacle = decode.obstacle(model)
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
    except Exception as error:  # a cache that cannot be batched is no error of ours: whatever it raised
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _reproduces(model: nn.Module, route: Route) -> bool:
    """Two prompts, three rows, a step; one row dropped, one added, another step."""
    short, long, after = (3, 1), (1, 2, 3, 4, 5, 6, 7), [2, 4]
    read = reader(model, route)
    rows = enter(model, route, [long, short, short])
    first, rows.own = read(rows.fixed, rows.own, mx.array([long[-1], short[-1], short[-1]]), mx.array([0, 0, 0]))
    rows = rows.keep([0, 2]).join(model, [long[:4]])
    second, _ = read(rows.fixed, rows.own, mx.array([*after, long[3]]), mx.array([1, 1, 0]))
    expected = [(first[0], long), (first[2], short)]
    expected += [(second[0], (*long, after[0])), (second[1], (*short, after[1])), (second[2], long[:4])]
    return all(_alike(got, model(mx.array([tokens]))[0, -1]) for got, tokens in expected)


def _alike(a: mx.array, b: mx.array) -> bool:
    tolerance = 1e-3 if b.dtype == mx.float32 else 5e-2  # of the largest logit; a wrong position or mask moves it far more
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    scale = float(mx.abs(mx.where(mx.isinf(b), 0, b)).max().item())  # type: ignore[arg-type]
    return bool(mx.allclose(a, b, rtol=0, atol=tolerance * scale).item())
