"""Rank and multiplier of each adapter: as options ask for them, and as one rank and one multiplier, all that mlx-lm's files have.

An update ΔW = s·A B is the same with another multiplier S, s·A B = S·A (s/S·B), and with more ranks whose part of B is 0.
"""

from attrs import frozen
from mlx.utils import tree_flatten
import math
import mlx.core as mx
import mlx.nn as nn
import re
from ..config.options import AdapterOptions
from .lora import adapted, factors, rank_axes, rank_of

Arrays = dict[str, mx.array]
IN_BLOCK = re.compile(r"(?:.*?\.)?(?P<block>\d+)\.(?P<path>.+)")
"""Of a module's path: its block, and its path there, which is its key in mlx-lm's files."""


@frozen
class Size:
    """Rank r and multiplier s of an update."""

    rank: int
    scale: float


def size_of(path: str, options: AdapterOptions) -> Size:
    """What `options` ask for in a module: s = α/r, or α/√r (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732).

    α = scale·rank of the options, whatever rank the module has, or the module's own: as in PEFT.

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
    """The patterns that name none of the modules."""
    entries = [*(options.rank_pattern or ()), *(options.alpha_pattern or ())]
    return [entry for entry in entries if all(_of((entry,), path) is None for path in paths)]


def _of(patterns: tuple[str, ...] | None, path: str) -> str | None:
    """The number of the first pattern that is the module's path or an end of it."""
    split = (entry.rpartition("=") for entry in patterns or ())
    return next((number for name, _, number in split if re.fullmatch(rf"(.*\.)?({name})", path)), None)


def uniform(model: nn.Module) -> tuple[Arrays, Size | None]:
    """The trainable parameters as arrays of one size, those of the largest rank, and that size; None without such updates."""
    arrays: Arrays = dict(tree_flatten(model.trainable_parameters()))  # type: ignore[arg-type]
    updates = {path: (factors(m), float(m.scale)) for path, m in adapted(model).items()}
    sizes = [Size(rank_of(both), scale) for both, scale in updates.values()]
    if not sizes:
        return arrays, None
    largest = max(sizes, key=lambda size: size.rank)
    for path, (both, scale) in updates.items():
        arrays |= {f"{path}.{name}": array for name, array in resized(both, largest.rank, scale / largest.scale).items()}
    return arrays, largest


def is_uniform(model: nn.Module) -> bool:
    """Whether `uniform` leaves the trainable parameters as they are."""
    modules = adapted(model).values()
    return len({Size(rank_of(m), m.scale) for m in modules}) <= 1 and not any(hasattr(m, "as_lora") for m in modules)


def resized(arrays: Arrays, rank: int, factor: float) -> Arrays:
    """An update with more ranks, B times a factor; unchanged arrays where that changes nothing."""
    changed, extra = dict(arrays), rank - rank_of(arrays)
    if factor != 1:
        changed["lora_b"] = changed["lora_b"] * factor
    if extra:
        changed |= {name: _padded(changed[name], axis, extra) for name, axis in rank_axes(arrays).items()}
    return changed


def native(model: nn.Module, arrays: Arrays, scale: float | None) -> Arrays:
    """The inverse of `uniform`: a file's arrays in the sizes of the model; `scale` is the file's, if it says.

    Ranks that a file has beyond the model's are left out where they add nothing to the update, or only what it starts from.
    """
    found = dict(arrays)
    for path, module in adapted(model).items():
        names = {name: f"{path}.{name}" for name in ("lora_a", "lora_b")}
        if not arrays.keys() >= set(names.values()):
            continue
        both = {name: arrays[full] for name, full in names.items()}
        cut = _cut(both, rank_of({"lora_a": module.lora_a}), may_add=hasattr(module, "as_lora"))
        cut = cut if scale is None else resized(cut, rank_of(cut), scale / float(module.scale))
        found |= {names[name]: array for name, array in cut.items()}
    return found


def _cut(both: Arrays, rank: int, *, may_add: bool) -> Arrays:
    axes, rest = rank_axes(both), list(range(rank, rank_of(both)))
    if not rest or (not may_add and mx.take(both["lora_b"], mx.array(rest), axes["lora_b"]).any().item()):
        return both
    return {name: mx.take(array, mx.arange(rank), axes[name]) for name, array in both.items()}


def _padded(array: mx.array, axis: int, extra: int) -> mx.array:
    return mx.pad(array, [(0, extra if i == axis else 0) for i in range(array.ndim)])
