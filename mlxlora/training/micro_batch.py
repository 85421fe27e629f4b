"""Divides batches that do not fit into memory into micro-batches, which changes no result.

The memory that a batch needs is estimated from the model's layers before the first step, and measured from then on.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs import define, field

from ..batch import Batch
from ..config.options import Training
from ..data.batching import MicroBatch, target_size
from ..data.shape_buckets import Signatures
from ..distributed.sharding import shape_of
from ..errors import InputError
from ..models.modes import usual_dtype
from ..utils.integers import ceil_div

_KEPT = 3.0  # numbers that a block keeps for its backward pass / numbers that enter and leave its matrices


def divide_batch(micro: MicroBatch, parts: int) -> list[MicroBatch]:
    """The micro-batch as up to `parts` smaller ones of whole groups, in order; the counts of their terms add up to its counts."""
    size = ceil_div(len(micro.groups), parts)
    chosen = [range(start, min(start + size, len(micro.groups))) for start in range(0, len(micro.groups), size)]
    if len(chosen) <= 1:
        return [micro]
    share = micro.tokens / len(micro.groups)
    return [
        micro._replace(
            batch=_part(micro, groups), groups=_renumbered(micro, groups), tokens=round(share * len(groups)), samples=(), metrics={}
        )
        for groups in chosen
    ]


def position_count(batch: Batch) -> int:
    """Positions that pass through the model: R·T, and U·K of shared prompts."""
    return batch.tokens.size + (0 if batch.prefix is None else batch.prefix.size)


def _sequences(micro: MicroBatch, groups: Sequence[int]) -> list[int]:
    """The sequences of the groups in ascending order, so that in pairs all chosen sequences stay before all rejected ones."""
    return sorted(s for group in groups for s in micro.groups[group])


def _renumbered(micro: MicroBatch, groups: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    place = {s: i for i, s in enumerate(_sequences(micro, groups))}
    return tuple(tuple(place[s] for s in micro.groups[group]) for group in groups)


def _rows(micro: MicroBatch, groups: Sequence[int]) -> list[int]:
    """The rows of the groups: a packed row is a group, the rows of a shared prompt are neighbors, else a row is a sequence."""
    batch = micro.batch
    if batch.segments is not None:
        return list(groups)
    if batch.prefix is not None:
        each = batch.tokens.shape[0] // batch.prefix.shape[0]
        return [group * each + r for group in groups for r in range(each)]
    return _sequences(micro, groups)


def _part(micro: MicroBatch, groups: Sequence[int]) -> Batch:
    batch, rows, sequences = micro.batch, _rows(micro, groups), _sequences(micro, groups)
    width, total = batch.tokens.shape[1], batch.sequences
    new_row = np.full(batch.tokens.shape[0], -1)
    new_row[rows] = np.arange(len(rows))
    new_sequence = np.full(total + 1, -1)
    new_sequence[sequences] = np.arange(len(sequences))
    positions, sequence = np.array(batch.positions), np.array(batch.sequence)
    kept = np.flatnonzero(new_sequence[sequence] >= 0)
    filler = target_size(len(kept), len(rows) * width) - len(kept)
    columns: dict[str, mx.array | None] = {
        "tokens": batch.tokens[mx.array(rows)],
        "positions": _filled(new_row[positions[kept] // width] * width + positions[kept] % width, filler),
        "sequence": _filled(new_sequence[sequence[kept]], filler, len(sequences)),
    }
    for name in ("targets", "prompt", "ref_logps", "old_logps"):
        columns[name] = _picked(getattr(batch, name), kept, filler)
    for name in ("lengths", "advantages", "label", "reference_point", "from_reference"):
        columns[name] = _picked(getattr(batch, name), sequences)
    columns["preference_score"] = _picked(batch.preference_score, [s for s in sequences if s < total // 2])
    columns["segments"] = _picked(batch.segments, rows)
    if batch.prefix is not None:
        columns["prefix"], columns["prefix_lengths"] = _picked(batch.prefix, groups), _picked(batch.prefix_lengths, groups)
    return batch._replace(**columns)  # type: ignore[arg-type]


def _picked(column: mx.array | None, chosen: Any, filler: int = 0) -> mx.array | None:
    return None if column is None else _filled(np.array(column)[list(chosen)], filler)


def _filled(values: np.ndarray, filler: int, value: int = 0) -> mx.array:
    values = np.concatenate([values, np.full((filler, *values.shape[1:]), value, values.dtype)]) if filler else values
    return mx.array(values.astype(np.int32) if values.dtype == np.int64 else values)


# --- how many -------------------------------------------------------------------------------------


def fixed_size(training: Training, comparing: Collection[str]) -> int:
    """The groups of a micro-batch that `--micro-batch` fixes; 0: as many as fit.

    Args:
        training: the options.
        comparing: names of terms that compare the rows of a batch.

    Raises:
        InputError: batches have more groups, and there are such terms.
    """
    rows = 0 if training.micro_batch == "auto" else int(training.micro_batch)
    check_undivided(comparing, rows, training.batch_size)
    return rows


def check_undivided(comparing: Collection[str], rows: int, groups: int) -> None:
    """Refuses to divide a batch of `groups` into micro-batches of `rows` where terms compare its rows.

    Raises:
        InputError: it would be divided.
    """
    if comparing and 0 < rows < groups:
        remedy = f"use auto, which keeps batches whole here, or at least {groups}"
        raise InputError(f"--micro-batch {rows}: {', '.join(comparing)} compares the {groups} rows of a batch; {remedy}")


@define
class BatchDivider:
    """Divides micro-batches that would exceed the memory limit.

    Attributes:
        limit: bytes that MLX may hold.
        cost: bytes that a step adds for each position; an estimate until a step has been measured.
        held: bytes that MLX holds between steps, measured before the first one; None: not yet.
        rows: groups in a micro-batch; 0 = as many as fit.
        comparing: names of terms that compare the rows of a batch; if there are any, no batch is divided.
        largest: the most positions that stayed within the limit.
        peak: the most bytes held at any time.
        shapes: the shapes of the parts, so that few are compiled.
    """

    limit: int
    cost: float
    rows: int = 0
    comparing: tuple[str, ...] = ()
    largest: int = 0
    peak: int = 0
    shapes: Signatures = field(factory=Signatures)
    held: int | None = None
    _measuring: int = field(default=0, init=False)
    _options: list[float] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._options = [self.limit, self.rows, round(self.cost, 3)]

    def state(self) -> dict[str, Any]:
        """What later divisions depend on, as JSON."""
        known = {"held": self.held, "cost": self.cost, "largest": self.largest, "shapes": self.shapes.state()}
        return {"options": self._options, **known}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint. What was measured counts only with the same limit, size and estimate."""
        self.shapes.restore(state["shapes"])
        if state["options"] == self._options:
            self.held, self.cost, self.largest = state["held"], state["cost"], state["largest"]

    def __call__(self, micros: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches; those that would not fit are divided.

        Raises:
            InputError: `rows` would divide a batch whose rows are compared.
        """
        found = [part for micro in micros for part in self._divided(micro)]
        size = max(position_count(micro.batch) for micro in found)
        self._measuring = size if size > self.largest else 0
        if self._measuring:
            self.peak = max(self.peak, mx.get_peak_memory())
            mx.reset_peak_memory()
        return found

    @property
    def measuring(self) -> bool:
        """Whether this step is being measured: `learn` must be called before the next step begins."""
        return self._measuring > 0

    def learn(self) -> None:
        """After a step: updates the cost from the memory that its largest micro-batch took."""
        peak = mx.get_peak_memory()
        self.peak = max(self.peak, peak)
        if not self._measuring:
            return
        taken = max(peak - mx.get_active_memory(), 0) / self._measuring
        if peak <= 1.1 * self.limit:  # beyond, the scheduler waits for memory, so the peak is not what the step needs
            self.largest, self.cost = self._measuring, min(self.cost, taken)
        else:
            self.cost = max(self.cost, taken)

    def _divided(self, micro: MicroBatch) -> list[MicroBatch]:
        parts = divide_batch(micro, self._parts(micro))
        return parts if len(parts) == 1 else [part._replace(batch=self.shapes.fit(part.batch)) for part in parts]

    def _parts(self, micro: MicroBatch) -> int:
        groups = len(micro.groups)
        if self.comparing:
            check_undivided(self.comparing, self.rows, groups)
            return 1
        if self.rows:
            return ceil_div(groups, self.rows)
        each = position_count(micro.batch) / max(groups, 1)
        if self.held is None:  # once: later it depends on when the process started
            self.held = mx.get_active_memory()
        room = max(self.limit - self.held, 0) / max(self.cost, 1e-9)
        fitting = max(int(max(room, self.largest) // each), 1)
        return ceil_div(groups, fitting)


def cost_of_position(model: nn.Module, *, recomputed: bool) -> float:
    """An upper estimate of the bytes that a training step keeps for each position: what enters and leaves the blocks' matrices.

    Args:
        model: a model with `layers`.
        recomputed: blocks keep only their input; one at a time keeps everything.
    """
    blocks = [sum(map(sum, map(_ends, block.modules()))) for block in model.layers]  # type: ignore[union-attr]
    width = max((_ends(m)[0] for block in model.layers for m in block.modules()), default=0)  # type: ignore[union-attr]
    numbers = max(blocks) + len(blocks) * width if recomputed else sum(blocks)
    dtype = usual_dtype(model.parameters())
    return _KEPT * numbers * (dtype.size if dtype else 4)


def _ends(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a matrix; the experts of a token count as one."""
    weight = module.get("weight") if isinstance(module, nn.Module) else None
    shape = () if weight is None else shape_of(module, "weight")
    if len(shape) < 2:
        return 0, 0
    bits: Any = getattr(module, "bits", 32)
    inner = shape[-1] * 32 // bits
    return int(inner), int(shape[-2])
