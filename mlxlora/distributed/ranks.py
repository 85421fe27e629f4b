"""Data-parallel training: several processes (ranks) train one model.

Every rank holds the model and takes its share of each batch. Ranks sum counts, gradients and metrics, so that all make the
update that one process would make. Works over any `mx.distributed` backend: ring, MPI, NCCL or JACCL.

If a rank fails or is killed, the others end, too: their connections break, their launcher stops them, or they time out. They
then have the state after the last step that all of them finished.
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
from .watchdog import Watch, arriving, timeout

_Item = TypeVar("_Item")
Tree = Any
"""Arrays in nested lists and dictionaries, as `mlx.utils.tree_map` takes them."""
_BUNCH = 32 * 1024**2  # bytes to sum at once


@define(eq=False)
class Ranks:
    """The processes of a run. With one process, no method computes or copies anything.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        group: MLX's group; None with one process.
        watch: ends this process if the others are gone.
        sharded: whether ranks hold slices of the parameters (see `sharding`), so that they can only compute together.
    """

    rank: int = 0
    size: int = 1
    group: mx.distributed.Group | None = None
    watch: Watch | None = None
    sharded: bool = False

    @property
    def leads(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def says(self, error: Exception) -> bool:
        """Whether this rank prints a failure that all ranks have: rank 0 does and, if a rank is lost, rank 1, too.

        >>> [Ranks(rank, 3).says(LostError()) for rank in range(3)], Ranks(1, 3).says(SharedError())
        ([True, True, False], False)
        """
        return self.leads or (self.rank == 1 and isinstance(error, LostError))

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """This rank's items of a batch: every size-th.

        >>> Ranks(rank=1, size=2).share("abcde")
        'bd'
        """
        return items[self.rank :: self.size]

    # --- numbers and JSON -------------------------------------------------------------------

    def totals(self, *numbers: float) -> list[float]:
        """Sums over all ranks in double precision, the same on every rank."""
        if self.size == 1:
            return list(numbers)
        halves = mx.array(np.array(numbers, np.float64).view(np.uint32))
        return np.array(self.stacked(halves)).view(np.float64).sum(axis=0).tolist()

    def gathered(self, rows: np.ndarray) -> list[np.ndarray]:
        """[own rows, ...] to a list of each rank's rows; all ranks have the same dtype and further dimensions."""
        if self.size == 1:
            return [rows]
        flat = np.ascontiguousarray(rows)
        return [np.frombuffer(part, rows.dtype).reshape(-1, *rows.shape[1:]) for part in self._gathered_bytes(flat.tobytes())]

    def listed(self, items: Sequence[Any]) -> list[Any]:
        """The items of all ranks in order of rank; items are JSON values."""
        return [item for values in self._exchanged(list(items)) for item in values]

    def of_rank0(self, value: Any) -> Any:
        """The JSON value of rank 0; ignores the values of other ranks."""
        return self._exchanged(value if self.leads else None)[0]

    def interleaved(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all ranks in the order of the batch; each rank has the rows of its `share`."""
        parts = self.gathered(rows)
        whole = np.empty((sum(map(len, parts)), *rows.shape[1:]), rows.dtype)
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    def _exchanged(self, value: Any) -> list[Any]:
        """The JSON values of all ranks."""
        return [value] if self.size == 1 else [orjson.loads(data) for data in self._gathered_bytes(orjson.dumps(value))]

    def _gathered_bytes(self, data: bytes) -> list[bytes]:
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
        """The sum over all ranks of each array of a tree; all ranks have the same shapes and dtypes."""
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
        """Within a graph, the sum over all ranks of a number computed from slices; the number itself if there are no slices.

        Computes `after` first, so that all ranks communicate in the same order.
        """
        if not self.sharded:
            return number
        number = number if after is None else mx.depends([number], [after])[0]
        return mx.distributed.all_sum(number, group=self.group)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Encloses an evaluation that needs the slices of all ranks; do not communicate within.

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
                raise LostError(f"another rank ended or is unreachable ({error})") from error

    def _awaited(self, array: mx.array) -> mx.array:
        """Evaluates at once: ranks with different work could otherwise communicate in different orders."""
        with self._waiting():
            mx.eval(array)
        return array

    # --- what ranks do together ---------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Encloses work that every rank does by itself: if one fails, all fail, and rank 0 says why. Do not communicate within.

        Raises:
            InputError, RunError: the error of the first rank that failed, on rank 0; SharedError on the others.
        """
        failed: Exception | None = None
        try:
            yield
        except (InputError, RunError) as error:
            if self.size == 1:
                raise
            failed = error
        texts = self._exchanged(failed and str(failed))
        messages = [f"rank {rank}: {text}" if rank else text for rank, text in enumerate(texts) if text]
        if messages:
            raise (type(failed) if failed and self.leads else SharedError)(messages[0]) from failed

    @contextmanager
    def own_rng(self) -> Iterator[None]:
        """Gives each rank its own random numbers within; afterwards all ranks have the same random state again."""
        if self.size == 1:
            yield
            return
        after, *own = mx.random.split(random_key(), self.size + 1)
        restore_random_key(own[self.rank])
        yield
        restore_random_key(after)

    def check_same(self, what: str, own: bytes) -> None:
        """Checks that every rank has the same data: a machine with other rows or weights would train silently.

        Raises:
            SharedError: a rank differs from rank 0.
        """
        seen = self._gathered_bytes(own) if self.size > 1 else []
        if others := [rank for rank, theirs in enumerate(seen) if theirs != seen[0]]:
            ranks = ", ".join(map(str, others))
            raise SharedError(f"rank {ranks} has other {what} than rank 0; use the same files, packages and options everywhere")


ALONE = Ranks()
"""One process."""


@cache
def current_ranks() -> Ranks:
    """Connects to the ranks that this process was launched with and starts to watch them; `ALONE` without a launcher.

    Raises:
        RunError: the other ranks are unreachable.
        InputError: the time to wait for them is no number.
    """
    if not is_launched():
        return ALONE
    limit = timeout()
    try:
        with arriving(launched_rank(), limit):
            group = mx.distributed.init()
    except RuntimeError as error:
        raise RunError(f"rank {launched_rank()} cannot reach the other ranks ({error})") from error
    if group.size() == 1:
        if os.environ.get("MLX_RANK", "0") != "0":
            raise RunError(
                "launched as one of several ranks, but this MLX finds no others; choose a --backend of mlx.launch that it supports"
            )
        return ALONE
    watch = Watch(group.rank(), limit)
    watch.start()
    return Ranks(group.rank(), group.size(), group, watch)


def _bunches(arrays: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    """Arrays in order; groups neighbors of one dtype up to a size."""
    bunch: list[mx.array] = []
    for array in arrays:
        if bunch and (array.dtype != bunch[0].dtype or sum(a.nbytes for a in bunch) + array.nbytes > _BUNCH):
            yield bunch
            bunch = []
        bunch.append(array)
    if bunch:
        yield bunch
