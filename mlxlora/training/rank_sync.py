"""What the ranks of a run agree on before its first step: that they may train together, and from which state."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import mlx.nn as nn
from attrs import asdict
from mlx.utils import tree_flatten, tree_unflatten

from ..adapters.files import CONFIG, check_arrays, check_settings, own_arrays, put_arrays, read_arrays, read_config
from ..adapters.prepare import load_weights
from ..data.tokenize import Example
from ..distributed.ranks import Ranks
from ..distributed.sharded_files import Sliced, stored
from ..errors import InputError, LostError, SharedError
from ..objectives.cross_row import compares_rows
from ..objectives.objective import Objective
from ..utils.rng import random_key, restore_random_key
from .checkpoint import FOLDER, Progress, at_best, initial
from .optimizers import put_state
from .step import Step
from .trainable import stored_state

T = TypeVar("T")


def check_ranks(ranks: Ranks, objective: Objective, examples: Iterable[Example]) -> None:
    """Checks that every rank has the same rows, and that no term looks at several of them at once.

    Raises:
        InputError: such a term.
        SharedError: other rows.
    """
    if ranks.size == 1:
        return
    if names := compares_rows(objective):
        remedy = "use one process, or another loss (for bnpo dapo, which is the same with one batch a step)"
        refused = InputError if ranks.leads else SharedError
        raise refused(f"{', '.join(names)}: this term compares the rows of a batch, which {ranks.size} ranks share; {remedy}")
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes() + b"|" + example.loss_mask.tobytes())
    ranks.check_same("rows", digest.digest())


def broadcast(ranks: Ranks, step: Step, optimizer: Any, progress: Progress) -> None:
    """Every rank gets the weights, the optimiser and the progress of rank 0, which may have read a checkpoint."""
    if ranks.size == 1:
        return
    model, state = step.trained.model, [step.trained.master_weights, optimizer.state]
    if ranks.sharded:  # slices are rank 0's already
        plain = [name for name, array in stored_state(model, optimizer).items() if not isinstance(array, Sliced)]
        state = tree_unflatten([(name, array) for name, array in tree_flatten(optimizer.state) if name in plain])
        put_state(optimizer.state, ranks.from_first(state))
    else:
        model.load_weights(list(ranks.from_first(own_arrays(model)).items()), strict=False)  # what PiSSA started from, too
        put_state(state, ranks.from_first(state))
        step.trained.push()
    for name, value in ranks.told(asdict(progress, filter=lambda a, _: "array" not in a.metadata)).items():
        setattr(progress, name, value)
    progress.key = ranks.from_first(progress.key)
    restore_random_key(ranks.from_first(random_key()))


def restore(ranks: Ranks, model: nn.Module, directory: Path) -> None:
    """Every rank gets what rank 0 saved, in place of what is trained."""
    if ranks.sharded:
        on_rank0(ranks, model, lambda: put_arrays(model, read_arrays(directory, lazy=True)))
        return
    if ranks.leads:
        load_weights(model, directory)
    if ranks.size > 1:
        model.update(ranks.from_first(model.trainable_parameters()))


def on_rank0(ranks: Ranks, model: nn.Module, work: Callable[[], T], optimizer: Any = None) -> T | None:
    """`work` at rank 0, which writes or reads files; where parameters are slices, the others give and take theirs meanwhile.

    Raises:
        LostError: rank 0 failed, at the others; it goes on with its own error.
    """
    if ranks.leads:
        done = False
        try:
            found = work()
            done = True
            return found
        finally:
            if ranks.sharded:
                ranks.told([_END, done])
    if ranks.sharded:
        _serve(ranks, model, optimizer)
    return None


_END = "end"


def _serve(ranks: Ranks, model: nn.Module, optimizer: Any) -> None:
    states = {} if optimizer is None else initial(model, optimizer)
    places = [*stored(model, own_arrays(model)).values(), *states.values()]
    known = {place.key: place for place in places if isinstance(place, Sliced)}
    while (asked := ranks.told(None))[0] != _END:
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
    """Writes the adapters of a run that has nothing left to train again, if they are missing or damaged.

    Args:
        ranks: who have read the last checkpoint.
        model: as it was then.
        directory: of the run.
        best: the validation loss of the adapters; None where they are those of the last step.
        save: writes adapters as they are in the model.
        warn: is told what was wrong.

    Raises:
        InputError: the best ones are in no checkpoint. SharedError at the other ranks.
    """
    problem = ranks.told(_problem(directory) if ranks.leads else "")
    if not problem:
        return
    if best is not None:
        found = ranks.told(str(at_best(directory, best) or "") if ranks.leads else "")
        if not found:
            refused = InputError if ranks.leads else SharedError
            remedy = f"take another from {directory / FOLDER}, or train again with --overwrite"
            raise refused(f"{problem}; the best adapters are in no checkpoint: {remedy}")
        restore(ranks, model, Path(found))
    on_rank0(ranks, model, save)
    warn(f"{problem}; written again from a checkpoint")


def _problem(directory: Path) -> str:
    """What is wrong with the adapters of a folder, or nothing."""
    try:
        check_arrays(directory)
        check_settings(read_config(directory), directory / CONFIG)
    except InputError as error:
        return str(error)
    return ""
