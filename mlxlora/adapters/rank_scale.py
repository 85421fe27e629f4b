"""Rank and scale of each adapter, and their conversion to the one rank and one scale that mlx-lm's files have.

An update ΔW = s·A B stays the same with another scale S, s·A B = S·A (s/S·B), and with more ranks whose rows of B are 0.
"""

import math
import re
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen
from mlx.utils import tree_flatten

from ..config.options import AdapterOptions
from .lora import NamedArrays, adapters_of, factors, rank_axes, rank_of

IN_BLOCK = re.compile(r"(?:.*?\.)?(?P<block>\d+)\.(?P<path>.+)")
"""Splits a module's path into the index of its block and its path there, which is its key in mlx-lm's files."""


@frozen
class Size:
    """Rank r and scale s of an update."""

    rank: int
    scale: float


def size_of(path: str, options: AdapterOptions) -> Size:
    """Rank and scale that `options` give a module: s = α/r, or α/√r (rsLoRA, Kalajdzievski, 2023,
    https://arxiv.org/abs/2312.03732).

    As in PEFT, α is the module's alpha pattern or, whatever its rank pattern, the options' scale·rank.

    >>> size_of("layers.0.q_proj", AdapterOptions(rank=8, scale=2.0, rslora=True, rank_pattern=("q_proj=16",)))
    Size(rank=16, scale=4.0)
    """
    rank = int(_of(options.rank_pattern, path) or options.rank)
    alpha = _of(options.alpha_pattern, path)
    if alpha is None and rank == options.rank:
        return Size(rank, options.scale * (math.sqrt(rank) if options.rslora else 1))
    numerator = options.scale * options.rank if alpha is None else float(alpha)
    return Size(rank, numerator / (math.sqrt(rank) if options.rslora else rank))


def unmatched(options: AdapterOptions, paths: list[str]) -> list[str]:
    """The patterns that match none of the modules."""
    entries = [*(options.rank_pattern or ()), *(options.alpha_pattern or ())]
    return [entry for entry in entries if all(_of((entry,), path) is None for path in paths)]


def _of(patterns: Sequence[str] | None, path: str) -> str | None:
    """The number of the first pattern that matches the module's path or an end of it."""
    split = (entry.rpartition("=") for entry in patterns or ())
    return next((number for name, _, number in split if re.fullmatch(rf"(.*\.)?({name})", path)), None)


def uniform(model: nn.Module) -> tuple[NamedArrays, Size | None]:
    """Converts the trainable parameters to one size.

    Returns:
        The arrays, all of the largest rank and its scale; and this size, None if the model has no adapters.
    """
    arrays: NamedArrays = dict(tree_flatten(model.trainable_parameters()))  # type: ignore[arg-type]
    updates = {path: (factors(m), float(m.scale)) for path, m in adapters_of(model).items()}
    sizes = [Size(rank_of(both), scale) for both, scale in updates.values()]
    if not sizes:
        return arrays, None
    largest = max(sizes, key=lambda size: size.rank)
    for path, (both, scale) in updates.items():
        arrays |= {f"{path}.{name}": array for name, array in resized(both, largest.rank, scale / largest.scale).items()}
    return arrays, largest


def is_uniform(model: nn.Module) -> bool:
    """Whether the trainable parameters have one size already."""
    modules = adapters_of(model).values()
    return len({Size(rank_of(m), m.scale) for m in modules}) <= 1 and not any(hasattr(m, "as_lora") for m in modules)


def resized(arrays: NamedArrays, rank: int, factor: float) -> NamedArrays:
    """Raises the rank of an update and multiplies B by a factor; leaves arrays that need no change as they are."""
    changed, extra = dict(arrays), rank - rank_of(arrays)
    if factor != 1:
        changed["lora_b"] = changed["lora_b"] * factor
    if extra:
        changed |= {name: _padded(changed[name], axis, extra) for name, axis in rank_axes(arrays).items()}
    return changed


def native(model: nn.Module, arrays: NamedArrays, scale: float | None) -> NamedArrays:
    """The inverse of `uniform`: converts the arrays of a file to the sizes of the model's adapters.

    Args:
        model: with adapters.
        arrays: of the file.
        scale: of the file; None if it does not say.

    Ranks beyond the model's are dropped if they add nothing to the update, or only its start (PiSSA).
    """
    found = dict(arrays)
    for path, module in adapters_of(model).items():
        names = {name: f"{path}.{name}" for name in ("lora_a", "lora_b")}
        if not arrays.keys() >= set(names.values()):
            continue
        both = {name: arrays[full] for name, full in names.items()}
        cut = _cut(both, rank_of({"lora_a": module.lora_a}), may_add=hasattr(module, "as_lora"))
        cut = cut if scale is None else resized(cut, rank_of(cut), scale / float(module.scale))
        found |= {names[name]: array for name, array in cut.items()}
    return found


def _cut(both: NamedArrays, rank: int, *, may_add: bool) -> NamedArrays:
    axes, rest = rank_axes(both), list(range(rank, rank_of(both)))
    if not rest or (not may_add and mx.take(both["lora_b"], mx.array(rest), axes["lora_b"]).any().item()):
        return both
    return {name: mx.take(array, mx.arange(rank), axes[name]) for name, array in both.items()}


def _padded(array: mx.array, axis: int, extra: int) -> mx.array:
    return mx.pad(array, [(0, extra if i == axis else 0) for i in range(array.ndim)])
