"""What decides the shapes and the division of batches, and with them the rounding of sums: all of it is in a checkpoint.

A step adds the same numbers in an order that depends on the shape of its arrays. That a resumed run equals an uninterrupted one bit
for bit, the shapes have to be a function of configuration, step and checkpoint; what a run has seen and measured is in `state`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import define, field

from ..data.batching import MicroBatch
from ..data.shape_buckets import Signatures
from ..distributed.ranks import ALONE, Ranks
from ..models.attention_choice import is_table
from .micro_batch import BatchDivider

State = Mapping[str, Any]


@define(eq=False)
class RunRounding:
    """The histories of one rank, and what it knows about those of the others.

    Attributes:
        batches: the shapes of training batches; a thread makes batches ahead, so only those up to the last step count.
        measured: the shapes that a source measures while it makes a batch.
        divider: divides batches.
        ranks: all of them are in the checkpoint, which rank 0 writes.
        choices: what was measured on the machine where the run began; see `choices`.
    """

    batches: Signatures
    measured: Signatures
    divider: BatchDivider
    ranks: Ranks = ALONE
    choices: Mapping[str, Any] = field(factory=dict)
    _told: State | None = field(default=None, init=False)
    _all: list[State] = field(factory=list, init=False)

    def after(self, micros: Sequence[MicroBatch]) -> list[State]:
        """The state of each rank after the step of these micro-batches; all ranks call it."""
        own = {
            "batches": self.batches.state(max((micro.shapes for micro in micros), default=0)),
            "measured": self.measured.state(),
            "divider": self.divider.state(),
            "choices": self.choices,
        }
        changed = own != self._told
        if self.ranks.totals(changed)[0]:
            self._told, self._all = own, self.ranks.listed([own])
        return self._all

    def restore(self, states: Sequence[State]) -> None:
        """Takes the state of this rank, before the first batch is made; a run on more ranks than before has none for some."""
        if self.ranks.rank < len(states):
            own = states[self.ranks.rank]
            self.batches.restore(own["batches"])
            self.measured.restore(own["measured"])
            self.divider.restore(own["divider"])
        self._all = list(states)


def check_states(states: Any) -> None:
    """Checks that a value from a checkpoint can be restored.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: no run wrote it.
    """
    if not isinstance(states, list):
        raise ValueError("rounding must be a list")
    for state in states:
        divider = state["divider"]
        for shapes in (state["batches"], state["measured"], divider["shapes"]):
            if not all(len(sizes) == 3 and all(map(_is_size, sizes)) for known in shapes.values() for sizes in known):
                raise ValueError("shapes must be three sizes")
        held, cost, largest, options = (divider[name] for name in ("held", "cost", "largest", "options"))
        if not (held is None or _is_size(held)) or not _is_size(largest) or type(cost) not in (int, float):
            raise ValueError("held, cost and largest must be numbers")
        if not isinstance(options, list):
            raise ValueError("the options of the divider must be a list")
        check_choices(state.get("choices", {}))


def check_choices(choices: Any) -> None:
    """Checks that a value from a checkpoint is what was measured for a run.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(choices, dict) or not is_table(choices.get("attention", {})):
        raise ValueError("choices must be tables")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53
