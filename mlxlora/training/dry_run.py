"""A rehearsal: everything is loaded and checked and real steps are taken, to tell what the run needs; nothing is written."""

from collections.abc import Sequence
from itertools import islice, pairwise
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx
from attrs import asdict, evolve, frozen
from mlx_lm.utils import get_total_parameters

from ..data.batching import MicroBatch, Order, bucket
from ..distributed.sharding import count, is_sharded
from ..models import attention
from ..reporting.card import changed_options
from ..reporting.text import duration
from ..utils.device import memory_limit, smaller
from .checkpoint import Progress
from .evaluate import Evaluate
from .loop import train
from .run import Run, compiled, maker, order, ready, total_steps
from .step import Step

STEPS = 3  # of each batch; the first compiles
_FORWARD = 1 / 3  # of a step's time: a backward pass costs about two forward passes
_SEEN = 4096  # batches of an epoch, at most, whose mean size is taken


@frozen
class Needs:
    """What a run needs.

    Attributes:
        trainable: parameters that are trained.
        parameters: of the whole model.
        rows: of the training split.
        steps_per_epoch: optimiser steps in a pass over the data.
        steps: of the run.
        longest: shape of the batch of the longest rows, (rows, tokens).
        parts: micro-batches that it was computed in.
        seconds_longest: of a step on such batches.
        seconds: of a step on batches of the mean size.
        seconds_training: of all steps, compilation included.
        seconds_validation: of all validations.
        seconds_reference: of the reference's log-probabilities, if nothing of them is cached.
        peak: bytes that MLX held at most.
        limit: bytes that it may hold.
        completion_length: tokens of a sampled completion, on average; None where nothing is sampled.
    """

    trainable: int
    parameters: int
    rows: int
    steps_per_epoch: int
    steps: int
    longest: tuple[int, int]
    parts: int
    seconds_longest: float
    seconds: float
    seconds_training: float
    seconds_validation: float
    seconds_reference: float
    peak: int
    limit: int
    completion_length: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the longest batch stayed within the limit."""
        return self.peak <= self.limit


def dry_run(run: Run) -> dict[str, Any]:
    """Takes a few real steps on the batch of the longest rows and on one of the mean size; the model is of no use afterwards.

    Returns:
        The fields of `Needs`.

    Raises:
        InputError: whatever a run would be refused for.
        RunError: out of memory, or a loss that is not finite.
    """
    _tell_options(run)
    with attention.using(run.training.attention):
        needs = _dry_run_steps(run)
    run.tell("finish", table(needs, run))
    return asdict(needs)


def _tell_options(run: Run) -> None:
    if run.output.show_config:
        return
    changed = {"model": run.config.get("model"), "data": run.config.get("data"), **changed_options(run.config)}
    width = max(map(len, changed))
    lines = [f"  {name:<{width}}  {value}" for name, value in changed.items()]
    run.tell("note", "\n".join(["options other than the defaults (--show-config: all)", *lines]))


def _dry_run_steps(run: Run) -> Needs:
    valid = list(range(min(run.training.batch_size, len(run.splits["valid"].items)))) if run.output.val_batches else []
    run, optimizer, total = ready(run, _referenced(run, valid))
    step, evaluate = compiled(run, optimizer)
    longest, typical = chosen(order(run, "train"))
    mx.reset_peak_memory()
    slow, first, micros = _timed(run, step, longest)
    parts = len(run.micro(micros)) // len(micros) if run.micro else 1
    usual, second, _ = _timed(run, step, typical)
    return Needs(
        trainable=count(run.model, trainable=True),
        parameters=count(run.model) if is_sharded(run.model) else get_total_parameters(run.model),
        rows=len(run.splits["train"].items),
        steps_per_epoch=total_steps(evolve(run.training, epochs=1.0), len(run.splits["train"].items), run.source.repeats),
        steps=total,
        longest=max((_shape(micro) for micro in micros), key=lambda shape: shape[0] * shape[1]),
        parts=parts,
        seconds_longest=slow,
        seconds=usual,
        seconds_training=usual * total + first + second,
        seconds_validation=_validation(run, evaluate, valid, total),
        seconds_reference=_reference(run, total, usual),
        peak=max(mx.get_peak_memory(), run.micro.peak if run.micro else 0),
        limit=memory_limit(),
        completion_length=micros[0].metrics.get("completions/mean_length"),
    )


def _referenced(run: Run, valid: Sequence[int]) -> dict[str, Sequence[int]] | None:
    """The rows whose reference is needed here; packed rows are other rows, so of those all."""
    if run.source.packing:
        return None
    longest, typical = chosen(order(run, "train"))
    return {"train": sorted({*longest, *typical}), "valid": valid}


def _shape(micro: MicroBatch) -> tuple[int, int]:
    rows, tokens = micro.batch.tokens.shape
    return rows, tokens + (0 if micro.batch.prefix is None else micro.batch.prefix.shape[1])


def _reference(run: Run, total: int, seconds: float) -> float:
    """Seconds of the reference's log-probabilities of the rows that the run uses, from those of a step."""
    if run.source.online or "ref_logps" not in run.objective.needs:
        return 0.0
    steps = min(total, total_steps(evolve(run.training, epochs=1.0), len(run.splits["train"].items)))
    return steps * seconds * _FORWARD


def chosen(rows: Order) -> tuple[list[int], list[int]]:
    """The numbers of the longest rows, a batch of them, and of the batch of an epoch whose size is nearest the mean.

    >>> longest, typical = chosen(Order((5, 6, 900, 8, 9, 7), 2))
    >>> longest, 2 in typical
    ([4, 2], False)
    """
    longest = sorted(range(len(rows.lengths)), key=rows.lengths.__getitem__)[-rows.batch_size :]
    batches = list(islice(rows.batches(), min(rows.per_epoch(), _SEEN)))
    sizes = [len(batch) * bucket(max(rows.lengths[row] for row in batch)) for batch in batches]
    mean = sum(sizes) / len(sizes)
    return longest, min(zip(sizes, batches, strict=True), key=lambda pair: abs(pair[0] - mean))[1]


def _timed(run: Run, step: Step, rows: Sequence[int]) -> tuple[float, float, tuple[MicroBatch, ...]]:
    """Seconds of a step, seconds that the first ones took longer, and the last batches."""
    make, items = maker(run, validation=False), [run.splits["train"].items[row] for row in rows]
    accumulate, repeats = run.training.grad_accumulation_steps, run.source.repeats
    stream = (tuple(make(items, k * accumulate + i) for i in range(accumulate)) for k in range(STEPS))
    ends, last = [perf_counter()], []

    def seen(progress: Progress, micros: Sequence[MicroBatch]) -> None:
        if progress.step % repeats == 0:
            ends.append(perf_counter())
            last[:] = micros

    train(step, stream, Progress(), STEPS * repeats, (seen,), repeats=repeats, micro=run.micro, ranks=run.ranks, skips=1)
    seconds = [b - a for a, b in pairwise(ends)]
    each = median(seconds)
    return each / repeats, sum(max(s - each, 0.0) for s in seconds), tuple(last)


def _validation(run: Run, evaluate: Evaluate, rows: Sequence[int], total: int) -> float:
    """Seconds of all validations of the run."""
    if not rows:
        return 0.0
    make, items = maker(run, validation=True), [run.splits["valid"].items[row] for row in rows]
    evaluate([make(items, 0)])  # compiles
    began = perf_counter()
    evaluate([make(items, 0)])
    seconds = perf_counter() - began
    every, batches = run.output.steps_per_eval, order(run, "valid").per_epoch()
    times = 1 + (-(-total // every) if every else 1)
    return seconds * times * (batches if run.output.val_batches < 0 else min(batches, run.output.val_batches))


def table(needs: Needs, run: Run) -> dict[str, str]:
    """What a person reads of it."""
    rows, tokens = needs.longest
    parts = f", computed in {needs.parts} parts" if needs.parts > 1 else ""
    spent = {"training": needs.seconds_training, "validation": needs.seconds_validation, "reference": needs.seconds_reference}
    told = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent.items() if seconds)
    return {
        "trainable parameters": f"{needs.trainable:,} of {needs.parameters:,} ({needs.trainable / needs.parameters:.2%})",
        "rows": f"{needs.rows:,}",
        "steps": f"{needs.steps:,} ({needs.steps_per_epoch:,} in an epoch)",
        "longest batch": f"{rows:,} rows of {tokens:,} tokens{parts}",
        **_sampled(needs.completion_length),
        "seconds a step": f"{needs.seconds:.3g} on average, {needs.seconds_longest:.3g} on the longest batch",
        "estimated time": f"{duration(sum(spent.values()))} ({told})",
        "peak memory": f"{needs.peak / 1e9:.2f} GB of {needs.limit / 1e9:.2f} GB",
        "fits": "yes" if needs.fits else f"no. Try, in this order: {', '.join(advice(run))}",
        "written": "nothing (--dry-run)",
    }


def _sampled(length: float | None) -> dict[str, str]:
    return {} if length is None else {"completions": f"{length:,.0f} tokens on average; longer ones take more time and memory"}


def advice(run: Run) -> list[str]:
    """What makes the run smaller and is not in use yet, the cheapest first."""
    training, full = run.training, run.adapter.train_type == "full"
    no_use = {
        "--micro-batch 1": training.micro_batch in ("1", "auto"),
        "--grad-checkpoint": training.grad_checkpoint,
        "--quantize 4": full or any(hasattr(m, "bits") for m in run.model.modules()),
        "--train-type lora in place of full": not full,
    }
    more = ["a higher --memory-limit"] if training.memory_limit is not None else []
    return [*smaller(name for name, idle in no_use.items() if idle), *more]
