"""What an objective computes from log-probabilities, and which columns of the batch it reads."""

from collections.abc import Callable, Iterable

import mlx.core as mx
from attrs import field, frozen

from ..batch import Batch

Function = Callable[[mx.array, Batch], mx.array]


@frozen(slots=False)
class Quantity:
    """A function of log-probabilities and a batch, with the columns of the batch that it reads.

    Scores of completions, importance ratios, gates and the values of terms are quantities.

    Attributes:
        function: (logps [N], batch) -> [N] per token, [S] per sequence or [P] per pair.
        needs: columns that have to be in the batch; whoever builds batches adds them.
        constants: those of `needs` that it reads without a gradient.
    """

    function: Function
    needs: frozenset[str] = field(default=frozenset(), converter=frozenset)
    constants: frozenset[str] = field(default=frozenset(), converter=frozenset)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.function.__doc__)

    def __call__(self, logps: mx.array, batch: Batch) -> mx.array:
        return self.function(logps, batch)

    @property
    def differentiates(self) -> frozenset[str]:
        """The columns that it may have a gradient through."""
        return self.needs - self.constants


def reads(*columns: str) -> Callable[[Function], Quantity]:
    """Declares which columns of the batch a function reads; columns of a quantity are added to those it has.

    >>> @reads("entropy")
    ... def uncertain(logps, batch):
    ...     return batch.entropy > 1
    >>> sorted(reads("advantages")(uncertain).needs)
    ['advantages', 'entropy']
    """
    return lambda function: Quantity(function, {*columns, *needs_of(function)})


def needs_of(function: Function | None) -> Iterable[str]:
    """The columns that a function declares; none for a plain function, or for None."""
    return function.needs if isinstance(function, Quantity) else ()


def quantity(function: Function) -> Quantity:
    """A plain function as a quantity that needs no columns; a quantity stays as it is."""
    return function if isinstance(function, Quantity) else Quantity(function)
