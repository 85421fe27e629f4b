"""Merges adapters into one: the exact weighted sum of their updates.

Σ wᵢ ΔWᵢ = Σ wᵢ sᵢ·Aᵢ Bᵢ = S·[A₁ A₂ …] [w₁s₁/S·B₁; w₂s₂/S·B₂; …], whose rank is the sum of the ranks. (peft calls this `cat`.
The product of averaged A and averaged B is not the average of the updates.)
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from attrs import frozen

from ..errors import InputError
from ..utils.folders import check_vacant, written_folder
from .files import CONFIG, WEIGHTS, check_settings, config_checksum, read_adapter_config, save_arrays, sound_arrays
from .lora import NamedArrays, concatenated, rank_of
from .rank_scale import IN_BLOCK, resized


@frozen
class Summand:
    """One of the adapters: folder, updates by module, configuration, and weight in the sum."""

    folder: str
    updates: Mapping[str, NamedArrays]
    config: Mapping[str, Any]
    weight: float

    @property
    def parameters(self) -> dict[str, Any]:
        """mlx-lm's `lora_parameters`."""
        return self.config["lora_parameters"]


def merge(
    folders: Sequence[str | Path],
    save_path: str | Path,
    *,
    weights: Sequence[float] | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> int:
    """Writes the weighted sum of LoRA adapters of one model as an adapter folder, `mlxlora merge` in Python.

    Args:
        folders: of the adapters.
        save_path: the folder to write, whole or not at all.
        weights: one per adapter; default: all 1, the plain sum.
        model: the common base, if the adapters name it differently.
        overwrite: replace a folder that `merge` wrote.

    Returns:
        The rank of the sum.

    Raises:
        InputError: fewer than two adapters, another number of weights, or adapters that cannot be added.
    """
    target = check_vacant(save_path, "--save-path", "merge", overwrite=overwrite, apart_from=folders)
    weights = [1.0] * len(folders) if weights is None else weights
    if len(folders) < 2 or len(weights) != len(folders):
        raise InputError(f"merge takes two or more adapters and a weight for each, got {len(folders)} and {len(weights)} weights")
    if not all(map(math.isfinite, weights)):
        raise InputError(f"--weights must be finite numbers, got {', '.join(map(str, weights))}")
    summands = [_summand(str(folder), weight) for folder, weight in zip(folders, weights, strict=True)]
    if model is None:
        _check_model(summands)
    _check_shapes(summands)
    scale = summands[0].parameters["scale"]
    sums = {path: _sum(path, summands, scale) for path in dict.fromkeys(path for summand in summands for path in summand.updates)}
    rank = max(map(rank_of, sums.values()))
    arrays = {f"{path}.{name}": array for path, both in sums.items() for name, array in resized(both, rank, 1.0).items()}
    with written_folder(target, "--save-path", "merge") as temporary:
        config = _config(summands, list(sums), rank, model)
        save_arrays(temporary / WEIGHTS, arrays, config_checksum(config), checked=True)
        (temporary / CONFIG).write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
    return rank


def _summand(folder: str, weight: float) -> Summand:
    config = read_adapter_config(folder)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        reason = "DoRA's magnitudes cannot be added" if kind == "dora" else "these are whole weights"
        raise InputError(f"{folder}: merge adds LoRA adapters, but {reason}; fuse one into the model and train on that")
    check_settings(config, Path(folder) / CONFIG)
    updates: dict[str, NamedArrays] = {}
    for name, array in sound_arrays(folder, config).items():
        path, _, last = name.rpartition(".")
        updates.setdefault(path, {})[last] = array
    if wrong := [path for path, both in updates.items() if both.keys() != {"lora_a", "lora_b"}]:
        raise InputError(f"{folder}: {wrong[0]} is not a pair of matrices, lora_a and lora_b")
    return Summand(folder, updates, config, weight)


def _check_model(summands: Sequence[Summand]) -> None:
    names = {summand.config["model"]: summand.folder for summand in summands if summand.config.get("model")}
    if len(names) > 1:
        bases = ", ".join(f"{folder} on {name}" for name, folder in names.items())
        raise InputError(f"merge adds adapters of one model, but they name several: {bases}; if it is one model, use --model NAME")


def _check_shapes(summands: Sequence[Summand]) -> None:
    first = summands[0]
    for summand in summands[1:]:
        for path in first.updates.keys() & summand.updates.keys():
            ours, theirs = (_shape(both) for both in (first.updates[path], summand.updates[path]))
            if ours != theirs:
                raise InputError(f"{summand.folder}: {path} is {theirs}, but {ours} in {first.folder}; merge adapters of one model")


def _shape(both: NamedArrays) -> tuple[int, ...]:
    """The shape of the weights that an update belongs to."""
    a, b = both["lora_a"], both["lora_b"]
    return (a.shape[0], b.shape[1], a.shape[2]) if a.ndim == 3 else (a.shape[0], b.shape[1])


def _sum(path: str, summands: Sequence[Summand], scale: float) -> NamedArrays:
    mine = [summand for summand in summands if path in summand.updates]
    return concatenated(
        [resized(p.updates[path], rank_of(p.updates[path]), p.weight * p.parameters["scale"] / scale) for p in mine]
    )


def _config(summands: Sequence[Summand], paths: Sequence[str], rank: int, model: str | None) -> dict[str, Any]:
    """mlx-lm's configuration of the sum; further modules that it adapts get no update."""
    keys = {match["path"] if (match := IN_BLOCK.fullmatch(path)) else path for path in paths}
    formats = {summand.config.get("quantize") for summand in summands}
    return {
        "model": model or next((name for summand in summands if (name := summand.config.get("model"))), ""),
        "fine_tune_type": "lora",
        "num_layers": max(summand.config["num_layers"] for summand in summands),
        "lora_parameters": {"rank": rank, "dropout": 0.0, "scale": summands[0].parameters["scale"], "keys": sorted(keys)},
        **({"quantize": formats.pop()} if len(formats) == 1 and formats != {None} else {}),
        "merged": {Path(summand.folder).name: summand.weight for summand in summands},
    }
