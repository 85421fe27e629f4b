"""Checks before the first step that the ranks of a run may train together, and gives them one state."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlx.nn as nn
import orjson
from attrs import fields
from mlx.utils import tree_flatten, tree_unflatten

from ..adapters.files import CONFIG, check_arrays, check_settings, own_arrays, put_arrays, read_adapter_config, read_arrays
from ..adapters.prepare import load_weights
from ..distributed.ranks import Ranks
from ..distributed.sharded_files import Sliced, stored
from ..errors import InputError, LostError, SharedError, plain
from ..utils.rng import random_key, restore_random_key
from .checkpoint import FOLDER, at_best, initial
from .optimizers import put_state
from .progress import Progress, progress_of, state_of
from .step import Step
from .trainable import stored_state

_Result = TypeVar("_Result")


def check_ranks(ranks: Ranks, comparing: Sequence[str], config: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Checks that every rank has the same options, rows, weights and tokenizer, and that no term of the objective compares rows.

    Args:
        ranks: the processes that train together.
        comparing: names of terms that compare rows.
        config: the options of this rank by name.
        digests: of what this rank trains on and with, by name.

    Raises:
        InputError: a term compares rows.
        SharedError: a rank has other options or files.
    """
    if ranks.size == 1:
        return
    if comparing:
        remedy = "use one process, or another loss (for bnpo dapo, which is the same with one batch a step)"
        refused = InputError if ranks.leads else SharedError
        raise refused(f"{', '.join(comparing)}: this term compares the rows of a batch, which {ranks.size} ranks share; {remedy}")
    options = {name: value for name, value in config.items() if name not in _OF_ONE_RANK}
    _check_options(ranks.listed([orjson.loads(orjson.dumps(options, default=str, option=orjson.OPT_NON_STR_KEYS))]))
    for name in sorted({name for known in ranks.listed([sorted(digests)]) for name in known}):
        ranks.check_same(name, digests.get(name, "").encode())


_OF_ONE_RANK = {"model", "data", "adapter_path", "token_cache", "quiet", "show_config", "plot", "report_to", "memory_limit"}
"""Options that need not be the same on every rank: what is in the files of the first two is compared."""


def _check_options(of_ranks: Sequence[Mapping[str, Any]]) -> None:
    first = of_ranks[0]
    for rank, own in enumerate(of_ranks):
        if others := [name for name in sorted(first.keys() | own.keys()) if first.get(name) != own.get(name)]:
            differences = "; ".join(f"{name} is {plain(own.get(name))}, at rank 0 {plain(first.get(name))}" for name in others)
            raise SharedError(f"rank {rank} has other options than rank 0 ({differences}); give every rank the same command")


def broadcast(ranks: Ranks, step: Step, optimizer: Any, progress: Progress) -> None:
    """Every rank gets the weights, the optimizer and the progress of rank 0, which may have read a checkpoint."""
    if ranks.size == 1:
        return
    model, state = step.trained.model, [step.trained.master_weights, optimizer.state]
    if ranks.sharded:  # the slices came from rank 0
        plain = [name for name, array in stored_state(model, optimizer).items() if not isinstance(array, Sliced)]
        state = tree_unflatten([(name, array) for name, array in tree_flatten(optimizer.state) if name in plain])
        put_state(optimizer.state, ranks.from_first(state))
    else:
        model.load_weights(list(ranks.from_first(own_arrays(model)).items()), strict=False)  # with the starting point of PiSSA
        put_state(state, ranks.from_first(state))
        step.trained.push()
    same = progress_of(ranks.of_rank0(state_of(progress)), ranks.from_first(progress.key))
    for attribute in fields(Progress):
        setattr(progress, attribute.name, getattr(same, attribute.name))
    restore_random_key(ranks.from_first(random_key()))


def restore_saved(ranks: Ranks, model: nn.Module, directory: Path) -> None:
    """Every rank gets the trained parameters that rank 0 saved."""
    if ranks.sharded:
        on_rank0(ranks, model, lambda: put_arrays(model, read_arrays(directory, lazy=True)))
        return
    if ranks.leads:
        load_weights(model, directory)
    if ranks.size > 1:
        model.update(ranks.from_first(model.trainable_parameters()))


def on_rank0(ranks: Ranks, model: nn.Module, work: Callable[[], _Result], optimizer: Any = None) -> _Result | None:
    """Runs `work`, which reads or writes files, on rank 0; the other ranks send and receive their slices of parameters.

    Raises:
        LostError: on the other ranks, if rank 0 failed; rank 0 raises its own error.
    """
    if ranks.leads:
        done = False
        try:
            found = work()
            done = True
            return found
        finally:
            if ranks.sharded:
                ranks.of_rank0([_END, done])
    if ranks.sharded:
        _serve(ranks, model, optimizer)
    return None


_END = "end"


def _serve(ranks: Ranks, model: nn.Module, optimizer: Any) -> None:
    states = {} if optimizer is None else initial(model, optimizer)
    places = [*stored(model, own_arrays(model)).values(), *states.values()]
    known = {place.key: place for place in places if isinstance(place, Sliced)}
    while (asked := ranks.of_rank0(None))[0] != _END:
        verb, key = asked
        if verb == "take":
            known[key].take()
        for _ in known[key].parts() if verb == "give" else ():
            pass
    if not asked[1]:
        raise LostError("rank 0 could not read or write its files")


def repair(
    ranks: Ranks, model: nn.Module, directory: Path, best: float | None, save: Callable[[], None], warn: Callable[[str], object]
) -> None:
    """Writes missing or damaged adapters of a finished run again.

    Args:
        ranks: the processes of the run, which have read the last checkpoint.
        model: the model of the last checkpoint.
        directory: the folder of the run.
        best: the validation loss of the best adapters; None if the adapters are those of the last step.
        save: writes the adapters of the model.
        warn: gets a message about what was wrong.

    Raises:
        InputError: no checkpoint has the best adapters. The other ranks raise SharedError.
    """
    problem = ranks.of_rank0(_problem(directory) if ranks.leads else "")
    if not problem:
        return
    if best is not None:
        found = ranks.of_rank0(str(at_best(directory, best) or "") if ranks.leads else "")
        if not found:
            refused = InputError if ranks.leads else SharedError
            remedy = f"take another from {directory / FOLDER}, or train again with --overwrite"
            raise refused(f"{problem}; the best adapters are in no checkpoint: {remedy}")
        restore_saved(ranks, model, Path(found))
    on_rank0(ranks, model, save)
    warn(f"{problem}; written again from a checkpoint")


def _problem(directory: Path) -> str:
    """What is wrong with the adapters of a folder; empty if nothing is."""
    try:
        check_arrays(directory)
        check_settings(read_adapter_config(directory), directory / CONFIG)
    except InputError as error:
        return str(error)
    return ""
