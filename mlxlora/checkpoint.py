"""Atomic checkpoints and exact resume: weights, optimiser, random state, position in the data."""

import hashlib
import shutil
from math import nan
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import orjson
from attrs import asdict, define, field
from mlx.utils import tree_unflatten

from .adapters import CONFIG, WEIGHTS, mismatches, own_arrays, put_arrays, read_arrays, save, save_arrays
from .chance import random_key, restore_random_key
from .config import AdapterOptions
from .errors import InputError
from .files import atomic_directory
from .optimisers import put_state
from .ranks import is_uniform
from .sharding import Sliced, is_sharded, stored
from .vector import layout, stored_state

FOLDER, OPTIMISER, STATE, RANDOM = "checkpoints", "optimizer.safetensors", "state.json", "random_state"
OWN = "trained.safetensors"  # the arrays as they are trained, where mlx-lm's file has them in another form
_CHECKED = (CONFIG, WEIGHTS, OWN, OPTIMISER)


@define
class Progress:
    """Where a run is; all of it is saved, so that a resumed run reports what an uninterrupted one would.

    Attributes:
        step: optimiser steps done.
        tokens: tokens that the model read so far.
        window: sums of the metrics since the last report, with their number of steps.
        best: lowest validation loss so far.
        waited: validations since then.
        skipped: steps in a row, up to the last one, that were not finite and changed nothing.
        stop: why the run ends early, or empty.
        key: the random state after the last step.
    """

    step: int = 0
    tokens: int = 0
    window: dict[str, float] = field(factory=dict)
    best: float | None = None
    waited: int = 0
    skipped: int = 0
    stop: str = ""
    key: mx.array = field(factory=lambda: random_key(), metadata={"array": True})


def save_checkpoint(
    directory: Path, model: nn.Module, optimiser: optim.Optimizer, progress: Progress, options: AdapterOptions, *, keep: int = 0
) -> Path:
    """Writes `checkpoints/<step>`, an adapter directory with the optimiser and the run's state; then drops old ones."""
    path = directory / FOLDER / f"{progress.step:07d}"
    with atomic_directory(path) as temporary:
        save(model, temporary, options)
        if not is_uniform(model):
            save_arrays(temporary / OWN, own_arrays(model))
        save_arrays(temporary / OPTIMISER, {RANDOM: progress.key, **stored_state(model, optimiser)})
        state = asdict(progress, filter=lambda a, _: "array" not in a.metadata)
        digests = {name: _digest(temporary / name) for name in _CHECKED if (temporary / name).exists()}
        state["sha256"] = {STATE: _digest_of(state), **digests}
        (temporary / STATE).write_bytes(orjson.dumps(state, option=orjson.OPT_INDENT_2))
    known = [old for old in checkpoints(directory) if old.name <= path.name]  # later ones are damaged, for the run began before
    for old in known[keep:] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return path


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run, the newest first."""
    return sorted((p for p in (directory / FOLDER).glob("[0-9]*") if p.is_dir()), reverse=True)


def load_checkpoint(path: Path, model: nn.Module, optimiser: optim.Optimizer) -> Progress:
    """Puts model, optimiser and random state back to where they were; the optimiser must not have run yet.

    Raises:
        InputError: the checkpoint is damaged, or does not fit the model and optimiser.
    """
    state = _read_state(path)
    names, lazy = (WEIGHTS if is_uniform(model) else OWN, OPTIMISER), is_sharded(model)
    weights, arrays = (read_arrays(path / name, lazy=lazy) for name in names)
    key = arrays.pop(RANDOM)
    state_arrays = initial(model, optimiser)
    if problems := mismatches(weights, stored(model, own_arrays(model))) or mismatches(arrays, state_arrays):
        raise InputError(f"{path} does not fit this run: {problems}")
    put_arrays(model, weights)
    for name, place in state_arrays.items():
        if isinstance(place, Sliced):
            place.take(arrays.pop(name))
    put_state(optimiser.state, tree_unflatten(list(arrays.items())))
    restore_random_key(key)
    return Progress(key=key, **state)


def initial(model: nn.Module, optimiser: optim.Optimizer) -> dict[str, Any]:
    """The arrays of an optimiser that has not run yet, as a file has them."""
    optimiser.init(layout(optimiser, model).pack(model.trainable_parameters()))
    return stored_state(model, optimiser)


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint and what is wrong with those that are newer."""
    problems: list[str] = []
    for path in checkpoints(directory):
        try:
            _read_state(path)
            return path, problems
        except InputError as error:
            problems.append(str(error))
    return None, problems


def _read_state(path: Path) -> dict[str, Any]:
    """The checked state of a checkpoint, without its digests."""
    try:
        state = orjson.loads((path / STATE).read_bytes())
        digests = state.pop("sha256")
        damaged = [STATE] if digests.pop(STATE, None) not in (None, _digest_of(state)) else []  # None: it has no digest of itself
        state["window"] = {name: nan if value is None else value for name, value in state["window"].items()}  # JSON has no NaN
        damaged += [name for name, digest in digests.items() if _digest(path / name) != digest]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: damaged checkpoint ({' '.join(str(error).split())})") from None
    if damaged:
        raise InputError(f"{path}: damaged checkpoint ({', '.join(damaged)} changed since it was written)")
    return state


def _digest_of(state: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(state, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
