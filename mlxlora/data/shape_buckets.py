"""A bound on the number of shapes that a run compiles: each new shape is traced, and hundreds of them crash Metal.

`bucket` leaves few lengths, but where rows, trained tokens and shared prompts all vary, their product is large. Once there are
enough shapes, a batch is padded to an earlier shape.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from attrs import define, field

from ..batch import Batch
from .batching import Make, MicroBatch

LIMIT = 64
_OWN = 48  # shapes that batches may add; the rest is for batches larger than all before

Sizes = tuple[int, int, int]
"""T, N and K (0: no shared prompts), which padding may increase."""

_FILLER = {"positions": 0, "targets": 0, "prompt": False, "ref_logps": 0.0, "old_logps": 0.0}
"""[N] columns and their padding; that of `sequence` is S."""
_ROWS = ("tokens", "segments")  # [R, T], padded with 0


@define
class Signatures:
    """The shapes of a run so far.

    Once the bound is reached, shapes depend on earlier batches, so the state is part of a checkpoint.

    Attributes:
        own: shapes that batches may add before padding begins.
        seen: the sizes of each group of shapes that differ by padding alone.
    """

    own: int = _OWN
    seen: dict[str, list[Sizes]] = field(factory=dict)
    _log: list[tuple[str, Sizes]] = field(factory=list, init=False)

    @property
    def count(self) -> int:
        """The shapes so far."""
        return len(self._log)

    def state(self, count: int | None = None) -> dict[str, list[list[int]]]:
        """The first `count` shapes, or all, as JSON."""
        found: dict[str, list[list[int]]] = {}
        for fixed, sizes in self._log[:count]:
            found.setdefault(fixed, []).append(list(sizes))
        return found

    def restore(self, state: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Replaces the shapes by those of `state`."""
        self._log = [(fixed, _sizes(sizes)) for fixed, known in state.items() for sizes in known]
        self.seen = {fixed: list(map(_sizes, known)) for fixed, known in state.items()}

    def fit(self, batch: Batch) -> Batch:
        """The batch, padded to an earlier shape once there are `own` of them; padding changes no result.

        It takes the smallest earlier shape that holds the batch. If there is none, it adds one with the too small sizes doubled,
        so that the number of shapes stays below `LIMIT` for sizes up to 2¹⁶ times the largest of the first `own` ones.
        """
        fixed, sizes = _signature(batch)
        known = self.seen.setdefault(fixed, [])
        if sizes in known:
            return batch
        if self.count < self.own:
            self._add(fixed, sizes)
            return batch
        holding = [other for other in known if all(a >= b for a, b in zip(other, sizes, strict=True))]
        if not holding:
            holding = [_larger(known, sizes)]
            self._add(fixed, holding[0])
        return padded(batch, min(holding, key=lambda other: _work(batch, other)))

    def _add(self, fixed: str, sizes: Sizes) -> None:
        self.seen[fixed].append(sizes)
        self._log.append((fixed, sizes))


def capped(make: Make, signatures: Signatures | None = None) -> Make:
    """`make` with a bounded number of batch shapes, which it adds to `signatures`."""
    known = Signatures() if signatures is None else signatures

    def fitted(items: Sequence[Any], index: int) -> MicroBatch:
        micro = make(items, index)
        return micro._replace(batch=known.fit(micro.batch), shapes=known.count)

    return fitted


def padded(batch: Batch, sizes: Sizes) -> Batch:
    """The same batch with longer rows, more padding among the trained tokens and longer shared prompts."""
    before, (after, loss_mask, prompts) = batch.tokens.shape[1], sizes
    positions = np.array(batch.positions)
    columns = {name: np.array(value) for name in _FILLER if (value := getattr(batch, name)) is not None}
    columns["positions"] = positions // before * after + positions % before
    extra = loss_mask - len(positions)
    filled = {name: np.pad(value, (0, extra), constant_values=_FILLER[name]) for name, value in columns.items()}
    filled["sequence"] = np.pad(np.array(batch.sequence), (0, extra), constant_values=batch.sequences)
    rows = {name: value for name in _ROWS if (value := getattr(batch, name)) is not None}
    filled |= {name: np.pad(np.array(value), ((0, 0), (0, after - before))) for name, value in rows.items()}
    if batch.prefix is not None:
        filled["prefix"] = np.pad(np.array(batch.prefix), ((0, 0), (0, prompts - batch.prefix.shape[1])))
    return batch._replace(**{name: mx.array(value) for name, value in filled.items()})


def _sizes(sizes: Sequence[int]) -> Sizes:
    length, loss_mask, prompt = sizes
    return length, loss_mask, prompt


def _signature(batch: Batch) -> tuple[str, Sizes]:
    """(the part of the shape that padding keeps, as a text, the sizes that it changes)."""
    raised = {*_FILLER, *_ROWS, "sequence", "prefix"}
    columns = [(name, value) for name, value in batch._asdict().items() if value is not None]
    fixed = tuple((name, None if name in raised else value.shape) for name, value in columns)
    rows, length = batch.tokens.shape
    groups, prompt = batch.prefix.shape if batch.prefix is not None else (0, 0)
    return repr((rows, groups, *fixed)), (length, batch.positions.size, prompt)


def _larger(known: Sequence[Sizes], sizes: Sizes) -> Sizes:
    """Sizes that hold all known ones and `sizes`; those that were too small become a power of two."""
    most = [max(column) for column in zip(*known, (0, 0, 0), strict=True)]
    length, loss_mask, prompt = (a if a >= b else 1 << (b - 1).bit_length() for a, b in zip(most, sizes, strict=True))
    return length, loss_mask, prompt


def _work(batch: Batch, sizes: Sizes) -> int:
    """Positions to compute, plus the trained ones once more for the head."""
    length, loss_mask, prompt = sizes
    prompts = batch.prefix.shape[0] * prompt if batch.prefix is not None else 0
    return batch.tokens.shape[0] * length + prompts + loss_mask
