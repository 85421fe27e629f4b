"""Fully sharded parameters: every rank keeps a slice of each parameter and gathers a module's parameters while it runs.

As in ZeRO-3 (Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054) and MLX's `fully_shard`, ranks gather slices in the
forward pass and again in the backward pass, where blocks are recomputed; they sum gradients and keep their slices. By hand,
because MLX's `fully_shard` needs `sum_scatter`, which its ring and MPI backends lack, and first axes that the number of ranks
divides, and it wraps modules, which renames parameters. Here slices are of the flattened, padded parameter; paths stay the same.

Ranks must gather in the same order. So each gathering depends on the module's input, and the module's output depends on it.
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

from ..errors import InputError, SharedError, reason
from ..utils.integers import ceil_div
from ..utils.patches import Slot, set_class, subclass
from .ranks import Ranks

Shape = tuple[int, ...]
_REMEDY = "omit the flag"
Place = tuple[Any, str]
"""A module and the name of its parameter."""


@define(eq=False)
class Shards:
    """What all slices of a model share.

    Attributes:
        ranks: the processes that hold the slices.
        scatters: whether the backend has `sum_scatter`.
        called: within `called_by`, the parameters of the modules called so far.
    """

    ranks: Ranks
    scatters: bool
    called: list[Place] | None = None


@frozen(eq=False)
class Unit:
    """Parameters that are gathered together when their module is called."""

    shards: Shards
    places: tuple[Place, ...]


_SHARDS: Slot[Shards | None] = Slot("shards", None)
_UNIT: Slot[Unit | None] = Slot("unit", None)
_WHOLE: Slot[dict[str, Shape]] = Slot("whole shapes", {})  # of the parameters that a module itself has


def shard(model: nn.Module, ranks: Ranks, look: Callable[[str, mx.array], object] = lambda *_: None) -> Ranks:
    """Replaces each parameter of rank 0, one after the other, by slices, one per rank, and makes modules gather them.

    A block of `model.layers` gathers all of its parameters at once; any other module gathers its own. These modules get
    subclasses of their classes, so calls stay the same, but all ranks have to make them together. `utils.patches.restore` makes
    the parameters whole again; all ranks have to call it.

    Args:
        model: the model of this rank; only `look` reads the parameters of other ranks than 0.
        ranks: the processes that train together.
        look: is called with the name of each parameter, and with what this rank has for it, before it is replaced.

    Returns:
        The ranks, now `sharded`; unchanged if there is only one.

    Raises:
        InputError: quantized weights, parameters outside of modules or in several blocks, or a model that does not call its
            blocks; other ranks than 0 raise SharedError for the last.
    """
    if ranks.size == 1:
        return ranks
    _check(model)
    ranks = evolve(ranks, sharded=True)
    shards, subclasses = Shards(ranks, _scatters(ranks)), {}
    paths: dict[int, list[str]] = {}
    for path, m in model.named_modules():
        paths.setdefault(id(m), []).append(f"{path}." if path else "")
    for module, members in _units(model):
        places = tuple((m, name) for m in members for name in _own(m))
        for m in members:
            _WHOLE.put(m, {name: tuple(m[name].shape) for name in _own(m)})
        for m, name in places:
            for path in paths[id(m)]:
                look(path + name, m[name])
            m[name] = cut(ranks.from_first(m[name]), ranks)
        if places:
            _UNIT.put(module, Unit(shards, places))
            cls = type(module)
            set_class(module, subclasses.setdefault(cls, subclass(cls, _gathering(cls))), undo=_make_whole)
    _SHARDS.put(model, shards)
    _try(model, ranks)
    return ranks


def _try(model: nn.Module, ranks: Ranks) -> None:
    """Calls the model once, which fails if it reads a slice that was not gathered, because its shape is wrong."""
    try:
        with ranks.computing():
            mx.eval(model(mx.array([[1, 2, 3]])))
    except (ValueError, TypeError, IndexError) as error:
        kind = InputError if ranks.leads else SharedError
        problem = f"--fully-shard: this model reads parameters of a block without calling it; {_REMEDY} ({reason(error)})"
        raise kind(problem) from error


def _check(model: nn.Module) -> None:
    if any(hasattr(m, "bits") and "scales" in m for m in model.modules()):
        raise InputError("--fully-shard cannot train quantized weights; use a model that is not quantized")
    found = {f"{path}.{name}" if path else name for path, m in model.named_modules() for name in _own(m)}
    names: list[str] = [name for name, _ in tree_flatten(model.parameters())]  # type: ignore[misc]
    if others := [name for name in names if name not in found]:
        raise InputError(f"--fully-shard: {others[0]} is in a list of arrays, which cannot be gathered; {_REMEDY}")
    seen = Counter(id(m) for _, members in _units(model) for m in members)
    if common := [path for path, m in model.named_modules() if seen[id(m)] > 1 and _own(m)]:
        raise InputError(f"--fully-shard: {common[0]} is in several blocks, which cannot all gather it; {_REMEDY}")


def _units(model: nn.Module) -> list[tuple[Any, list[Any]]]:
    """Modules that gather, each with the modules whose parameters it gathers; each module is in exactly one unit."""
    blocks = list({id(block): block for block in model.layers}.values())  # type: ignore[union-attr]
    inside = {id(m) for block in blocks for m in block.modules()}
    alone = {id(m): m for _, m in model.named_modules() if id(m) not in inside}
    return [*((block, _distinct(block)) for block in blocks), *((m, [m]) for m in alone.values())]


def _distinct(block: Any) -> list[Any]:
    return list({id(m): m for _, m in block.named_modules()}.values())


def _own(module: Any) -> list[str]:
    """Names of the parameters that a module itself has."""
    return [name for name, value in dict.items(module) if isinstance(value, mx.array) and not name.startswith("_")]


def _scatters(ranks: Ranks) -> bool:
    """Whether the backend has `sum_scatter`: NCCL and JACCL do, ring and MPI do not."""
    try:
        mx.eval(mx.distributed.sum_scatter(mx.zeros((ranks.size, 1)), group=ranks.group))
    except RuntimeError:
        return False
    return True


# --- slices -----------------------------------------------------------------------------------


def slice_length(shape: Shape, ranks: Ranks) -> int:
    """The number of elements in a slice.

    >>> slice_length((3, 5), Ranks(size=4))
    4
    """
    return ceil_div(prod(shape), ranks.size)


def cut(whole: mx.array, ranks: Ranks) -> mx.array:
    """This rank's slice, [n, 1, ...]: one axis more than the parameter, which tells slices and parameters apart."""
    size = slice_length(tuple(whole.shape), ranks)
    start, end = size * ranks.rank, min(size * (ranks.rank + 1), whole.size)
    flat = whole.reshape(-1)[start : max(start, end)]
    own = mx.concatenate([flat, mx.zeros(size - flat.size, whole.dtype)])  # a copy: a view would keep the whole parameter in memory
    mx.eval(own)
    return own.reshape(-1, *[1] * whole.ndim)


def unsliced(stacked: mx.array, shapes: Sequence[Shape]) -> list[mx.array]:
    """[ranks, Σ n], concatenated slices of several parameters, to the whole parameters."""
    found, start = [], 0
    for shape in shapes:
        size = ceil_div(prod(shape), stacked.shape[0])
        found.append(stacked[:, start : start + size].reshape(-1)[: prod(shape)].reshape(shape))
        start += size
    return found


def _side_by_side(wholes: Sequence[mx.array], ranks: Ranks) -> mx.array:
    """Whole parameters to [ranks, Σ n], the inverse of `unsliced`."""
    sizes = [slice_length(tuple(whole.shape), ranks) for whole in wholes]
    padded = [mx.pad(w.reshape(-1), (0, ranks.size * n - w.size)) for w, n in zip(wholes, sizes, strict=True)]
    return mx.concatenate([p.reshape(ranks.size, -1) for p in padded], axis=1)


def shape_of(module: Any, name: str) -> Shape:
    """Shape of the whole parameter of a module."""
    whole = _WHOLE.get(module)
    return whole[name] if name in whole else tuple(module[name].shape)


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of a model are slices."""
    return _SHARDS.get(model) is not None


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks that hold the slices of a model.

    Raises:
        ValueError: the model has no slices.
    """
    shards = _SHARDS.get(model)
    if shards is None:
        raise ValueError("this model has whole parameters")
    return shards.ranks


def count(model: nn.Module, *, trainable: bool = False) -> int:
    """The number of elements of the whole parameters."""
    return sum(prod(shape_of(m, name)) for m, name in _places(model, trainable))


def nbytes(model: nn.Module, *, trainable: bool = False) -> int:
    """Bytes of the whole parameters."""
    return sum(prod(shape_of(m, name)) * m[name].dtype.size for m, name in _places(model, trainable))


def _places(model: nn.Module, trainable: bool) -> Iterator[Place]:
    return ((m, name) for m in model.modules() for name in _own(m) if not (trainable and name in m._no_grad))


# --- gathering --------------------------------------------------------------------------------


def _gathering(cls: type) -> dict[str, Any]:
    """The methods of a subclass that gathers its parameters."""
    return {name: _with_whole(getattr(cls, name)) for name in ("__call__", "as_linear") if hasattr(cls, name)}


def _with_whole(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        unit = _UNIT.get(self)
        assert unit is not None
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        first = next((key for key, value in given.items() if isinstance(value, mx.array)), None)
        with whole_parameters(unit, None if first is None else given[first]) as read:
            if first is not None:
                given[first] = read
            return method(self, *(given[i] for i in range(len(args))), **{name: given[name] for name in kwargs})

    return call


def _make_whole(module: Any) -> None:
    """Makes the parameters of a unit whole again."""
    unit = _UNIT.get(module)
    assert unit is not None
    for m, name in unit.places:
        (m[name],) = unsliced(unit.shards.ranks.stacked(m[name].reshape(-1)), [shape_of(m, name)])


@contextmanager
def whole_parameters(unit: Unit, before: mx.array | None) -> Iterator[mx.array]:
    """Gathers the parameters of a unit while the context lasts.

    Args:
        unit: what to gather.
        before: an array to compute before the parameters are gathered; None: no order.

    Yields:
        `before`, available after the parameters. The gradient of a parameter is that of its slices, summed over the ranks.
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
    """A function (slices..., read) -> (whole parameters..., read); the slices have one dtype."""
    ranks = shards.ranks

    def run(*given: mx.array) -> list[mx.array]:
        *slices, read = given
        (flat,) = mx.depends([mx.concatenate([own.reshape(-1) for own in slices])], [read])
        stacked = mx.distributed.all_gather(flat[None], group=ranks.group)
        return [*unsliced(stacked, shapes), *mx.depends([read], [stacked])]

    if not trained:
        return lambda *given: run(*map(mx.stop_gradient, given[:-1]), given[-1])
    forward: Any = mx.custom_function(run)

    @forward.vjp
    def backward(primals: Any, cotangents: Any, _: Any) -> list[mx.array]:
        *wholes, read = cotangents
        own = _summed(shards, _side_by_side(wholes, ranks))
        ends = accumulate(slice_length(shape, ranks) for shape in shapes)
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
    shards = _SHARDS.get(model)
    if shards is None:
        return None
    shards.called = []
    try:
        run()
        return Unit(shards, tuple({(id(m), name): (m, name) for m, name in shards.called}.values()))
    finally:
        shards.called = None
