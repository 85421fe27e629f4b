"""Atomic checkpoints and exact resume: weights, optimizer, random state, position in the data."""

import hashlib
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import orjson
from mlx.utils import tree_unflatten

from ..adapters.files import CONFIG, WEIGHTS, mismatches, own_arrays, put_arrays, read_arrays, save, save_arrays
from ..adapters.rank_scale import is_uniform
from ..config.options import AdapterOptions
from ..distributed.sharded_files import Sliced, stored
from ..distributed.sharding import is_sharded
from ..errors import InputError, reason
from ..reporting.history import METRICS, read_lines
from ..utils.files import atomic_directory, sweep
from ..utils.rng import restore_random_key
from .optimizers import put_state
from .origin import UNKNOWN_ORIGIN, RunOrigin, origin_of_state
from .progress import Progress, progress_of, state_of
from .trainable import layout, stored_state

FOLDER, OPTIMIZER, STATE, RANDOM = "checkpoints", "optimizer.safetensors", "state.json", "random_state"
OWN = "trained.safetensors"  # the trained arrays, if the form of mlx-lm's file differs from theirs
_CHECKED = (CONFIG, WEIGHTS, OWN, OPTIMIZER)
_ANY = "[0-9]*"
_STEP = re.compile(r"\d{7,}")


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: optim.Optimizer,
    progress: Progress,
    options: AdapterOptions,
    origin: RunOrigin = UNKNOWN_ORIGIN,
    *,
    keep: int = 0,
) -> Path:
    """Writes `checkpoints/<step>`, an adapter directory with the optimizer and the state of the run; then removes old ones.

    Keeps an existing valid checkpoint of this step, unless its hooks have run since.
    """
    path = directory / FOLDER / f"{progress.step:07d}"
    if not path.is_symlink() and _is_good(path) and _read_state(path).get("owed", []) == progress.owed:
        return path
    if path.is_symlink():  # it would lead to another place
        path.unlink()
    with atomic_directory(path) as temporary:
        save(model, temporary, options)
        if not is_uniform(model):
            save_arrays(temporary / OWN, own_arrays(model))
        save_arrays(temporary / OPTIMIZER, {RANDOM: progress.key, **stored_state(model, optimizer)})
        state = {**state_of(progress), "origin": origin.state()}
        digests = {name: _digest(temporary / name) for name in _CHECKED if (temporary / name).exists()}
        state["sha256"] = {STATE: _digest_of(state), **digests}
        (temporary / STATE).write_bytes(orjson.dumps(state, option=orjson.OPT_INDENT_2))
    sweep(path.parent, _ANY)  # damaged checkpoints that were put aside
    # later checkpoints are damaged: the run resumed from an earlier one
    known = [old for old in checkpoints(directory) if old.name <= path.name]
    for old in known[keep:] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return path


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, the newest first; copies under other names, and links, are none."""
    found = (path for path in (directory / FOLDER).glob(_ANY) if _STEP.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), reverse=True)


def load_checkpoint(path: Path, model: nn.Module, optimizer: optim.Optimizer) -> Progress:
    """Restores model, optimizer and random state; the optimizer must not have run yet.

    Later checkpoints that are damaged are put aside, so that they do not count as checkpoints; the next `save_checkpoint` removes
    them.

    Raises:
        InputError: the checkpoint is damaged, or does not fit the model and optimizer.
    """
    state = _read_state(path)
    names, lazy = (WEIGHTS if is_uniform(model) else OWN, OPTIMIZER), is_sharded(model)
    weights, arrays = (read_arrays(path / name, lazy=lazy) for name in names)
    key = arrays.pop(RANDOM)
    state_arrays = initial(model, optimizer)
    if problems := mismatches(weights, stored(model, own_arrays(model))) or mismatches(arrays, state_arrays):
        raise InputError(f"{path} does not fit this run: {problems}")
    put_arrays(model, weights)
    for name, place in state_arrays.items():
        if isinstance(place, Sliced):
            place.take(arrays.pop(name))
    put_state(optimizer.state, tree_unflatten(list(arrays.items())))
    restore_random_key(key)
    _put_aside_later(path)
    return progress_of(state, key)


def _put_aside_later(path: Path) -> None:
    later = [other for other in checkpoints(path.parents[1]) if other.name > path.name] if path.parent.name == FOLDER else []
    for other in (other for other in later if not _is_good(other)):
        with suppress(OSError):  # nothing depends on it
            other.replace(other.with_name(f".{other.name}.damaged.tmp"))


def initial(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    """The arrays of an optimizer that has not run yet, as a file has them."""
    optimizer.init(layout(optimizer, model).pack(model.trainable_parameters()))
    return stored_state(model, optimizer)


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and what is wrong with newer ones."""
    problems: list[str] = []
    for path in checkpoints(directory):
        try:
            _read_state(path)
            return path, problems
        except InputError as error:
            problems.append(str(error))
    return None, problems


def read_origin(path: Path) -> RunOrigin:
    """What the run of a good checkpoint was made of; one of an early version does not say."""
    return origin_of_state(orjson.loads((path / STATE).read_bytes()).get("origin", {}))


def at_best(directory: Path, best: float) -> Path | None:
    """The undamaged checkpoint of the step whose validation loss was the best, if there is one."""
    steps = [row.get("step") for row in read_lines(directory / METRICS) if row.get("split") == "valid" and row.get("loss") == best]
    found = (path for path in checkpoints(directory) if path.name in {f"{step:07d}" for step in steps if step})
    return next(filter(_is_good, found), None)


def _is_good(path: Path) -> bool:
    try:
        return bool(_read_state(path))
    except InputError:
        return False


def _read_state(path: Path) -> dict[str, Any]:
    """The checked state of a checkpoint, without its digests and its origin."""
    try:
        state = orjson.loads((path / STATE).read_bytes())
        digests = state.pop("sha256")
        own = digests.pop(STATE, None)
        damaged = [] if own is None or own == _digest_of(state) else [STATE]
        if not {WEIGHTS, OPTIMIZER} <= digests.keys() <= set(_CHECKED):
            raise ValueError("sha256 must have the digests of the files")
        if links := [name for name in (STATE, *digests) if (path / name).is_symlink()]:
            raise ValueError(f"{links[0]} is a link")
        origin_of_state(state.pop("origin", {}))
        progress_of(state, mx.zeros(2, mx.uint32))
        damaged += [name for name, digest in digests.items() if _digest(path / name) != digest]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: damaged checkpoint ({reason(error)})") from None
    if damaged:
        raise InputError(f"{path}: damaged checkpoint ({', '.join(damaged)} changed since it was written)")
    return state


def _digest_of(state: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(state, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
