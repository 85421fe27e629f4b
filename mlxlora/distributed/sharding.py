"""Parameters in slices: every rank keeps one of each parameter, and whole ones only while the module that has them runs.

What MLX's `fully_shard` and ZeRO-3 (Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054) do: slices are gathered in the
forward pass, again in the backward pass where blocks are recomputed, and gradients are summed over the ranks and cut. MLX's own
needs `sum_scatter`, which its ring and MPI lack, first axes that the ranks divide, and wraps modules, which renames parameters;
here a slice is of the flattened parameter, padded, and every path stays.

Ranks must gather in one order, so each gathering depends on what the module reads, and what goes on depends on it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import define, evolve, frozen
from mlx.utils import tree_flatten

from ..errors import InputError, SharedError
from .ranks import Ranks

Shape = tuple[int, ...]
_WITHOUT = "leave the flag out"
Place = tuple[Any, str]
"""A module and the name of its parameter."""


@define(eq=False)
class Shards:
    """What the slices of a model have in common.

    Attributes:
        ranks: who have the others.
        scatters: whether the backend can sum and cut at once.
        called: the parameters of modules that were called, while somebody looks.
    """

    ranks: Ranks
    scatters: bool
    called: list[Place] | None = None


@frozen(eq=False)
class Whole:
    """Shapes of the parameters that a module itself has, as they are whole."""

    shapes: dict[str, Shape]


@frozen(eq=False)
class Unit:
    """Parameters that are gathered together, when their module is called."""

    shards: Shards
    places: tuple[Place, ...]


def shard(model: nn.Module, ranks: Ranks) -> Ranks:
    """Replaces each parameter by this rank's slice of what rank 0 has, one after the other, and makes modules gather them.

    A block of `model.layers` gathers all of its parameters at once, any other module its own. Classes are replaced by
    subclasses for these instances alone, so the model is called as before, but by all ranks together.

    Returns:
        The ranks, who from now on have slices; unchanged if there is only one.

    Raises:
        InputError: quantised weights, parameters that are in no module or in several blocks, or a model that does not call its
            blocks. SharedError of the last at other ranks.
    """
    if ranks.size == 1:
        return ranks
    _check(model)
    ranks = evolve(ranks, sharded=True)
    shards, subclasses = Shards(ranks, _scatters(ranks)), {}
    for module, members in _units(model):
        places = tuple((m, name) for m in members for name in _own(m))
        for m in members:
            m._whole = Whole({name: tuple(m[name].shape) for name in _own(m)})
        for m, name in places:
            m[name] = cut(ranks.from_first(m[name]), ranks)
        if places:
            module._unit = Unit(shards, places)
            cls = type(module)
            module.__class__ = subclasses.setdefault(cls, type(cls.__name__, (cls,), _gathering(cls)))
    model._shards = shards  # type: ignore[assignment]
    _try(model, ranks)
    return ranks


def _try(model: nn.Module, ranks: Ranks) -> None:
    """Calls the model once: a slice that nobody gathered has another shape than what is read there."""
    try:
        with ranks.computing():
            mx.eval(model(mx.array([[1, 2, 3]])))
    except (ValueError, TypeError, IndexError) as error:
        refused = InputError if ranks.leads else SharedError
        reason = " ".join(str(error).split())[:200]
        raise refused(f"--fully-shard: this model reads parameters of a block without calling it; {_WITHOUT} ({reason})") from error


def _check(model: nn.Module) -> None:
    if any(hasattr(m, "bits") and "scales" in m for m in model.modules()):
        raise InputError("--fully-shard cannot train quantised weights; use a model that is not quantised")
    found = {f"{path}.{name}" if path else name for path, m in model.named_modules() for name in _own(m)}
    names: list[str] = [name for name, _ in tree_flatten(model.parameters())]  # type: ignore[misc]
    if others := [name for name in names if name not in found]:
        raise InputError(f"--fully-shard: {others[0]} is in a list of arrays, which cannot be gathered; {_WITHOUT}")
    seen = Counter(id(m) for _, members in _units(model) for m in members)
    if common := [path for path, m in model.named_modules() if seen[id(m)] > 1 and _own(m)]:
        raise InputError(f"--fully-shard: {common[0]} is in several blocks, which cannot all gather it; {_WITHOUT}")


def _units(model: nn.Module) -> list[tuple[Any, list[Any]]]:
    """Modules that gather, each with the modules whose parameters it gathers; every module is in one."""
    blocks = list({id(block): block for block in model.layers}.values())  # type: ignore[union-attr]
    inside = {id(m) for block in blocks for m in block.modules()}
    alone = {id(m): m for _, m in model.named_modules() if id(m) not in inside}
    return [*((block, _distinct(block)) for block in blocks), *((m, [m]) for m in alone.values())]


def _distinct(block: Any) -> list[Any]:
    return list({id(m): m for _, m in block.named_modules()}.values())


def _own(module: Any) -> list[str]:
    """Names of the parameters that a module has itself."""
    return [name for name, value in dict.items(module) if isinstance(value, mx.array) and not name.startswith("_")]


def _scatters(ranks: Ranks) -> bool:
    """Whether the backend has what NCCL and JACCL have, and ring and MPI do not."""
    try:
        mx.eval(mx.distributed.sum_scatter(mx.zeros((ranks.size, 1)), group=ranks.group))
    except RuntimeError:
        return False
    return True


# --- slices -----------------------------------------------------------------------------------


def length(shape: Shape, ranks: Ranks) -> int:
    """Numbers in a slice.

    >>> length((3, 5), Ranks(size=4))
    4
    """
    return -(-prod(shape) // ranks.size)


def cut(whole: mx.array, ranks: Ranks) -> mx.array:
    """This rank's slice, [n, 1, ...]: one axis more than the parameter has, which tells one from the other."""
    size = length(tuple(whole.shape), ranks)
    start, end = size * ranks.rank, min(size * (ranks.rank + 1), whole.size)
    flat = whole.reshape(-1)[start : max(start, end)]
    own = mx.concatenate([flat, mx.zeros(size - flat.size, whole.dtype)])  # a copy: a view would keep all of it
    mx.eval(own)
    return own.reshape(-1, *[1] * whole.ndim)


def joined(stacked: mx.array, shapes: Sequence[Shape]) -> list[mx.array]:
    """[ranks, Σ n] of slices that lie side by side to the whole arrays."""
    found, start = [], 0
    for shape in shapes:
        size = -(-prod(shape) // stacked.shape[0])
        found.append(stacked[:, start : start + size].reshape(-1)[: prod(shape)].reshape(shape))
        start += size
    return found


def _side_by_side(wholes: Sequence[mx.array], ranks: Ranks) -> mx.array:
    """The inverse."""
    sizes = [length(tuple(whole.shape), ranks) for whole in wholes]
    padded = [mx.pad(w.reshape(-1), (0, ranks.size * n - w.size)) for w, n in zip(wholes, sizes, strict=True)]
    return mx.concatenate([p.reshape(ranks.size, -1) for p in padded], axis=1)


def shape_of(module: Any, name: str) -> Shape:
    """Shape of a module's parameter as it is whole."""
    whole = getattr(module, "_whole", None)
    return whole.shapes[name] if whole and name in whole.shapes else tuple(module[name].shape)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are slices."""
    return hasattr(model, "_shards")


def count(model: nn.Module, *, trainable: bool = False) -> int:
    """Numbers in the parameters as they are whole."""
    return sum(prod(shape_of(m, name)) for m, name in _places(model, trainable))


def nbytes(model: nn.Module, *, trainable: bool = False) -> int:
    """Bytes of the parameters as they are whole."""
    return sum(prod(shape_of(m, name)) * m[name].dtype.size for m, name in _places(model, trainable))


def _places(model: nn.Module, trainable: bool) -> Iterator[Place]:
    return ((m, name) for m in model.modules() for name in _own(m) if not (trainable and name in m._no_grad))


# --- gathering --------------------------------------------------------------------------------


def _gathering(cls: type) -> dict[str, Any]:
    """The methods of a subclass that gathers."""
    return {name: _with_whole(getattr(cls, name)) for name in ("__call__", "as_linear") if hasattr(cls, name)}


def _with_whole(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        first = next((key for key, value in given.items() if isinstance(value, mx.array)), None)
        with gathered(self._unit, None if first is None else given[first]) as read:
            if first is not None:
                given[first] = read
            return method(self, *(given[i] for i in range(len(args))), **{name: given[name] for name in kwargs})

    return call


@contextmanager
def gathered(unit: Unit, before: mx.array | None) -> Iterator[mx.array]:
    """The parameters of a unit are whole while the context lasts, gathered once what is read `before` is there.

    Yields:
        `before`, once they are. The gradient of parameters is that of their slices, summed over the ranks.
    """
    if unit.shards.called is not None:
        unit.shards.called += unit.places
    sliced = [(m, name) for m, name in unit.places if m[name].ndim > len(shape_of(m, name))]
    slices = [m[name] for m, name in sliced]
    groups: dict[Any, list[Place]] = {}
    for m, name in sliced:
        groups.setdefault((m[name].dtype, name in m._no_grad), []).append((m, name))
    read: mx.array = mx.zeros(()) if before is None else before
    try:
        for (_, frozen_), places in groups.items():
            shapes = [shape_of(m, name) for m, name in places]
            run = _gather(unit.shards, shapes, trained=not frozen_)
            *wholes, read = run(*(m[name] for m, name in places), read)
            for (m, name), whole in zip(places, wholes, strict=True):
                m[name] = whole
        yield read if mx.issubdtype(read.dtype, mx.floating) else mx.stop_gradient(read)
    finally:
        for (m, name), own in zip(sliced, slices, strict=True):
            m[name] = own


def _gather(shards: Shards, shapes: list[Shape], *, trained: bool) -> Callable[..., Any]:
    """(slices..., read) -> (whole arrays..., read); the slices have one dtype."""
    ranks = shards.ranks

    def run(*given: mx.array) -> list[mx.array]:
        *slices, read = given
        (flat,) = mx.depends([mx.concatenate([own.reshape(-1) for own in slices])], [read])
        stacked = mx.distributed.all_gather(flat[None], group=ranks.group)
        return [*joined(stacked, shapes), *mx.depends([read], [stacked])]

    if not trained:
        return lambda *given: run(*map(mx.stop_gradient, given[:-1]), given[-1])
    forward: Any = mx.custom_function(run)

    @forward.vjp
    def backward(primals: Any, cotangents: Any, _: Any) -> list[mx.array]:
        *wholes, read = cotangents
        own = _summed(shards, _side_by_side(wholes, ranks))
        ends = accumulate(length(shape, ranks) for shape in shapes)
        slices = [own[end - p.size : end].reshape(p.shape) for end, p in zip(ends, primals, strict=False)]
        return [*slices, *mx.depends([read], [own])]

    return forward


def _summed(shards: Shards, stacked: mx.array) -> mx.array:
    """[ranks, n] to [n]: this rank's row of the sum over all ranks."""
    ranks = shards.ranks
    if shards.scatters:
        return mx.distributed.sum_scatter(stacked, group=ranks.group).reshape(-1)
    return mx.distributed.all_sum(stacked, group=ranks.group)[ranks.rank]


def called_by(model: nn.Module, run: Callable[[], Any]) -> Unit | None:
    """The parameters of the modules outside of blocks that `run` calls, as one unit; None if there are no slices."""
    if not is_sharded(model):
        return None
    shards: Shards = model._shards  # type: ignore[assignment]
    shards.called = []
    try:
        run()
        return Unit(shards, tuple({(id(m), name): (m, name) for m, name in shards.called}.values()))
    finally:
        shards.called = None
