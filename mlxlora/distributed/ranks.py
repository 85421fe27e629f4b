"""Several processes that train one model, and what they add up.

Every rank holds the model and takes its share of each batch; counts, gradients and metrics are summed, so that all ranks
make the update that one process would have made. Whatever `mx.distributed` has carries the sums: ring, MPI, NCCL or JACCL.

A rank that fails or is killed ends the others: their connections break, or whoever launched them stops them, or they have
waited for too long. What they have then is the state after the last step that all of them finished.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import orjson
from attrs import define
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ..errors import InputError, LostError, RunError, SharedError
from ..utils.device import out_of_memory
from ..utils.launch import is_launched, launched_rank
from ..utils.rng import random_key, restore_random_key
from .watchdog import _LONGEST, PATIENCE, Watch

Item = TypeVar("Item")
Tree = Any
_BUNCH = 32 * 1024**2  # bytes that are summed at once


@define(eq=False)
class Ranks:
    """The processes of a run, and which one this is. Alone, nothing is computed or copied.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        group: MLX's, None if alone.
        watch: ends this process when the others are gone.
        sharded: every rank has slices of the parameters only (see `sharding`), so it computes nothing without the others.
    """

    rank: int = 0
    size: int = 1
    group: mx.distributed.Group | None = None
    watch: "Watch | None" = None
    sharded: bool = False

    @property
    def leads(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def says(self, error: Exception) -> bool:
        """Whether this rank prints a failure that all meet: the first does; where one is gone, perhaps the first, the second too.

        >>> [Ranks(rank, 3).says(LostError()) for rank in range(3)], Ranks(1, 3).says(SharedError())
        ([True, True, False], False)
        """
        return self.leads or (self.rank == 1 and isinstance(error, LostError))

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's items of a batch: every size-th.

        >>> Ranks(rank=1, size=2).share("abcde")
        'bd'
        """
        return items[self.rank :: self.size]

    # --- numbers and words ------------------------------------------------------------------

    def totals(self, *numbers: float) -> list[float]:
        """The sums over all ranks, in double precision: every rank gets the same ones."""
        if self.size == 1:
            return list(numbers)
        halves = mx.array(np.array(numbers, np.float64).view(np.uint32))
        return np.array(self.stacked(halves)).view(np.float64).sum(axis=0).tolist()

    def gathered(self, rows: np.ndarray) -> list[np.ndarray]:
        """[own rows, ...] to the rows of each rank; all ranks have the same dtype and the same further dimensions."""
        if self.size == 1:
            return [rows]
        flat = np.ascontiguousarray(rows)
        return [np.frombuffer(part, rows.dtype).reshape(-1, *rows.shape[1:]) for part in self._everyone(flat.tobytes())]

    def listed(self, items: Sequence[Any]) -> list[Any]:
        """The items of all ranks, as JSON, those of rank 0 first."""
        return [item for said in self._said(list(items)) for item in said]

    def told(self, value: Any) -> Any:
        """What rank 0 says, as JSON; what the others say is not heard."""
        return self._said(value if self.leads else None)[0]

    def interleaved(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all ranks, where each one has those of its `share`, in the order of the batch."""
        parts = self.gathered(rows)
        whole = np.empty((sum(map(len, parts)), *rows.shape[1:]), rows.dtype)
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    def _said(self, value: Any) -> list[Any]:
        """What each rank says, as JSON."""
        return [value] if self.size == 1 else [orjson.loads(said) for said in self._everyone(orjson.dumps(value))]

    def _everyone(self, data: bytes) -> list[bytes]:
        lengths = np.array(self.stacked(mx.array([len(data)], mx.int32)))[:, 0]
        padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        rows = np.array(self.stacked(mx.array(padded)))
        return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]

    # --- arrays -----------------------------------------------------------------------------

    def stacked(self, own: mx.array) -> mx.array:
        """[n] to [size, n]."""
        return self._awaited(mx.distributed.all_gather(own[None], group=self.group))

    def summed(self, tree: Tree) -> Tree:
        """The sum over all ranks of each array of a tree; rank by rank the arrays have the same shapes and dtypes."""
        if self.size == 1:
            return tree
        named: dict[str, mx.array] = dict(sorted(tree_flatten(tree)))  # type: ignore[arg-type]
        found: list[mx.array] = []
        for bunch in _bunches(list(named.values())):
            total = self._awaited(mx.distributed.all_sum(mx.concatenate([a.reshape(-1) for a in bunch]), group=self.group))
            ends = np.cumsum([a.size for a in bunch]).tolist()
            found += [total[end - a.size : end].reshape(a.shape) for a, end in zip(bunch, ends, strict=True)]
        sums = dict(zip(named, found, strict=True))
        return tree_map_with_path(lambda path, _: sums[path or ""], tree)

    def from_first(self, tree: Tree) -> Tree:
        """The arrays of rank 0."""
        return tree if self.size == 1 else self.summed(tree if self.leads else tree_map(mx.zeros_like, tree))

    def pooled(self, number: mx.array, after: mx.array | None = None) -> mx.array:
        """Within a graph, the sum over all ranks of what each found in its slices; the number itself if there are none.

        `after` is computed before, so that all ranks ask for their sums in one order.
        """
        if not self.sharded:
            return number
        number = number if after is None else mx.depends([number], [after])[0]
        return mx.distributed.all_sum(number, group=self.group)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around an evaluation of what needs the slices of all ranks; no sums are allowed within.

        Raises:
            LostError: another rank is gone.
        """
        with self._waiting() if self.sharded else nullcontext():
            yield

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        with self.watch.waiting() if self.watch else nullcontext():
            try:
                yield
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                raise LostError(f"another rank ended or cannot be reached ({error})") from error

    def _awaited(self, array: mx.array) -> mx.array:
        """One at a time: ranks that have different work to do could otherwise ask for sums in different orders."""
        with self._waiting():
            mx.eval(array)
        return array

    # --- what ranks do together ---------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """What every rank prepares by itself: where one of them fails, all end, and rank 0 says why. No sums are allowed within.

        Raises:
            InputError, RunError: of the first rank that failed, at rank 0; SharedError at the others.
        """
        failed: Exception | None = None
        try:
            yield
        except (InputError, RunError) as error:
            if self.size == 1:
                raise
            failed = error
        texts = self._said(failed and str(failed))
        said = [f"rank {rank}: {text}" if rank else text for rank, text in enumerate(texts) if text]
        if said:
            raise (type(failed) if failed and self.leads else SharedError)(said[0]) from failed

    @contextmanager
    def chance(self) -> Iterator[None]:
        """Random numbers of this rank's own; afterwards all ranks have one state again, whatever each of them drew."""
        if self.size == 1:
            yield
            return
        after, *own = mx.random.split(random_key(), self.size + 1)
        restore_random_key(own[self.rank])
        yield
        restore_random_key(after)

    def check_same(self, what: str, own: bytes) -> None:
        """Checks that every rank has the same: other rows or weights on one machine would train without a word.

        Raises:
            SharedError: a rank differs from rank 0.
        """
        seen = self._everyone(own) if self.size > 1 else []
        if others := [rank for rank, theirs in enumerate(seen) if theirs != seen[0]]:
            ranks = ", ".join(map(str, others))
            raise SharedError(f"rank {ranks} has other {what} than rank 0; give all machines the same files, packages and options")


ALONE = Ranks()
"""One process."""


@cache
def current_ranks() -> Ranks:
    """The ranks that this process was launched with, watched from now on; `ALONE` if nothing launched it.

    Raises:
        RunError: the others cannot be reached.
    """
    if not is_launched():
        return ALONE
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise RunError(f"rank {launched_rank()} cannot reach the others ({error})") from error
    if group.size() == 1:
        if os.environ.get("MLX_RANK", "0") != "0":
            raise RunError(
                "launched as one of several, but this MLX finds no others: is the backend of mlx.launch one that it has?"
            )
        return ALONE
    watch = Watch(group.rank(), float(os.environ.get(PATIENCE) or _LONGEST))
    watch.start()
    return Ranks(group.rank(), group.size(), group, watch)


def _bunches(arrays: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    """Arrays in order, neighbours of one dtype together up to a size."""
    bunch: list[mx.array] = []
    for array in arrays:
        if bunch and (array.dtype != bunch[0].dtype or sum(a.nbytes for a in bunch) + array.nbytes > _BUNCH):
            yield bunch
            bunch = []
        bunch.append(array)
    if bunch:
        yield bunch
