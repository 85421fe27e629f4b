"""What the ranks of a run agree on before its first step: that they may train together, and from which state."""

import hashlib
from collections.abc import Iterable
from typing import Any

import mlx.nn as nn
from attrs import asdict

from .adapters import own_arrays
from .chance import random_key, restore_random_key
from .checkpoint import Progress
from .compose import Objective
from .coupling import coupled
from .data import Example
from .distributed import Ranks
from .errors import InputError, SharedError
from .optimisers import put_state
from .step import Step


def check_ranks(ranks: Ranks, objective: Objective, examples: Iterable[Example]) -> None:
    """Checks that every rank has the same rows, and that no term looks at several of them at once.

    Raises:
        InputError: such a term.
        SharedError: other rows.
    """
    if ranks.size == 1:
        return
    if names := coupled(objective):
        remedy = "use one process, or another loss (for bnpo dapo, which is the same with one batch a step)"
        refused = InputError if ranks.leads else SharedError
        raise refused(f"{', '.join(names)}: this term compares the rows of a batch, which {ranks.size} ranks share; {remedy}")
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes() + b"|" + example.scored.tobytes())
    ranks.check_same("rows", digest.digest())


def follow_first(ranks: Ranks, step: Step, optimiser: Any, progress: Progress) -> None:
    """Every rank gets the weights, the optimiser and the progress of rank 0, which may have read a checkpoint."""
    if ranks.size == 1:
        return
    model, state = step.trained.model, [step.trained.masters, optimiser.state]
    model.load_weights(list(ranks.from_first(own_arrays(model)).items()), strict=False)  # what PiSSA started from, too
    put_state(state, ranks.from_first(state))
    step.trained.show()
    for name, value in ranks.told(asdict(progress, filter=lambda a, _: "array" not in a.metadata)).items():
        setattr(progress, name, value)
    progress.key = ranks.from_first(progress.key)
    restore_random_key(ranks.from_first(random_key()))


def share_weights(ranks: Ranks, model: nn.Module) -> None:
    """Every rank gets what rank 0 has in place of what is trained."""
    if ranks.size > 1:
        model.update(ranks.from_first(model.trainable_parameters()))
