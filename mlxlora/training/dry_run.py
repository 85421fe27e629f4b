"""A dry run: loads and checks everything and takes real steps to report what the run needs; writes nothing."""

from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np
from attrs import asdict, frozen
from mlx_lm.utils import get_total_parameters

from ..data.batching import MicroBatch, Order, bucket
from ..distributed.sharding import count, is_sharded
from ..reporting.card import MethodInfo, changed_options
from ..reporting.reporter import Reporter
from ..reporting.text import duration
from ..utils.device import memory_limit, smaller
from ..utils.integers import ceil_div
from .choices import by_machine
from .evaluate import Evaluate
from .inputs import Run, RunOptions
from .loop import LoopOptions, train
from .prepared import Prepared, compiled, prepare_run
from .progress import Progress
from .schedule import Schedule, total_steps
from .step import Step

STEPS = 3  # on each batch; the first one compiles
_FORWARD = 1 / 3  # of the time of a step: a backward pass costs about two forward passes
_SEEN = 4096  # batches of an epoch, at most, from which the mean size is taken


@frozen
class Needs:
    """What a run needs.

    Attributes:
        trainable: trainable parameters.
        parameters: parameters of the whole model.
        rows: training rows.
        steps_per_epoch: optimizer steps in one pass over the data.
        steps: optimizer steps of the run.
        longest: shape of the batch of the longest rows, (rows, tokens).
        parts: micro-batches that this batch was computed in.
        seconds_longest: seconds of a step on such a batch.
        seconds: seconds of a step on a batch of the mean size.
        seconds_training: seconds of all steps, with compilation.
        seconds_validation: seconds of all validations.
        seconds_reference: seconds for the reference's log-probabilities, if none of them are cached.
        peak: the most bytes that MLX held.
        limit: bytes that MLX may hold.
        completion_length: mean tokens of a sampled completion; None if nothing is sampled.
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


def dry_run(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Takes a few real steps on the batch of the longest rows and on one of the mean size; the model is of no use afterwards.

    Returns:
        The fields of `Needs`.

    Raises:
        InputError: what a run would be refused for.
        RunError: out of memory, or a loss that is not finite.
    """
    options = run.options
    if not options.output.show_config:
        reporter.note(_changed(options.config, options.method))
    with by_machine(run, reporter):
        needs = _measured(run, reporter)
    quantized = any(hasattr(module, "bits") for module in run.model.modules())
    reporter.finish(table(needs, advice(options, quantized=quantized)))
    return asdict(needs)


def _changed(config: Mapping[str, Any], method: MethodInfo) -> str:
    changed = {"model": config.get("model"), "data": config.get("data"), **changed_options(config, method)}
    width = max(map(len, changed))
    lines = [f"  {name:<{width}}  {value}" for name, value in changed.items()]
    return "\n".join(["options other than the defaults (--show-config: all)", *lines])


def _measured(run: Run, reporter: Reporter) -> Needs:
    schedule, output = Schedule(run.source, run.splits, run.options.training), run.options.output
    valid = list(range(min(schedule.training.batch_size, len(schedule.items("valid"))))) if output.val_batches else []
    prepared = prepare_run(run, reporter, _rows_to_score(schedule, valid))
    schedule, divider = prepared.schedule, prepared.rounding.divider
    step, evaluate = compiled(run, prepared)
    longest, typical = representative_batches(schedule.order("train"))
    mx.reset_peak_memory()
    slow, first, micros = _timed(prepared, step, longest)
    parts = len(divider(micros)) // len(micros)
    usual, second, _ = _timed(prepared, step, typical)
    referenced = "ref_logps" in run.objective.needs and not run.source.online
    return Needs(
        trainable=count(run.model, trainable=True),
        parameters=count(run.model) if is_sharded(run.model) else get_total_parameters(run.model),
        rows=len(schedule.items("train")),
        steps_per_epoch=schedule.steps_per_epoch,
        steps=schedule.steps,
        longest=max((_shape(micro) for micro in micros), key=lambda shape: shape[0] * shape[1]),
        parts=parts,
        seconds_longest=slow,
        seconds=usual,
        seconds_training=usual * schedule.steps + first + second,
        seconds_validation=_validation(prepared, evaluate, valid, run.options),
        seconds_reference=_reference(schedule, usual) if referenced else 0.0,
        peak=max(mx.get_peak_memory(), divider.peak),
        limit=memory_limit(),
        completion_length=_completion_length(micros[0]),
    )


def _rows_to_score(schedule: Schedule, valid: Sequence[int]) -> dict[str, Sequence[int]] | None:
    """The rows that need a reference here; None, which is all, if the rows are packed, because packed rows are other rows."""
    if schedule.source.packing:
        return None
    longest, typical = representative_batches(schedule.order("train"))
    return {"train": sorted({*longest, *typical}), "valid": valid}


def _shape(micro: MicroBatch) -> tuple[int, int]:
    rows, tokens = micro.batch.tokens.shape
    return rows, tokens + (0 if micro.batch.prefix is None else micro.batch.prefix.shape[1])


def _reference(schedule: Schedule, seconds: float) -> float:
    """Seconds for the reference's log-probabilities of the rows that the run uses, from the seconds of a step."""
    steps = min(schedule.steps, total_steps(schedule.training, len(schedule.items("train")), epochs=1.0))
    return steps * seconds * _FORWARD


def representative_batches(order: Order) -> tuple[list[int], list[int]]:
    """The numbers of the longest rows, a batch of them, and of the batch of an epoch whose size is nearest the mean.

    >>> longest, typical = representative_batches(Order((5, 6, 900, 8, 9, 7), 2))
    >>> longest, 2 in typical
    ([4, 2], False)
    """
    longest = np.argsort(order.lengths, kind="stable")[-order.batch_size :].tolist()
    batches = list(islice(order.batches(), min(order.per_epoch(), _SEEN)))
    sizes = [len(batch) * bucket(int(max(order.lengths[row] for row in batch))) for batch in batches]
    mean = sum(sizes) / len(sizes)
    return longest, min(zip(sizes, batches, strict=True), key=lambda pair: abs(pair[0] - mean))[1]


def _timed(prepared: Prepared, step: Step, rows: Sequence[int]) -> tuple[float, float, tuple[MicroBatch, ...]]:
    """Seconds of a step, the seconds that the first steps took longer, and the last batches."""
    schedule = prepared.schedule
    items = [schedule.items("train")[row] for row in rows]
    accumulate, repeats = schedule.training.grad_accumulation_steps, schedule.source.repeats
    stream = (tuple(prepared.train(items, k * accumulate + i) for i in range(accumulate)) for k in range(STEPS))
    ends, last = [perf_counter()], []

    def seen(progress: Progress, micros: Sequence[MicroBatch]) -> None:
        if progress.step % repeats == 0:
            ends.append(perf_counter())
            last[:] = micros

    how = LoopOptions(repeats=repeats, divider=prepared.rounding.divider, ranks=prepared.ranks, skips=1)
    train(step, stream, Progress(), STEPS * repeats, (seen,), how)
    seconds = [b - a for a, b in pairwise(ends)]
    each = median(seconds)
    return each / repeats, sum(max(s - each, 0.0) for s in seconds), tuple(last)


def _validation(prepared: Prepared, evaluate: Evaluate, rows: Sequence[int], options: RunOptions) -> float:
    """Seconds of all validations of the run."""
    if not rows:
        return 0.0
    schedule, output = prepared.schedule, options.output
    items = [schedule.items("valid")[row] for row in rows]
    evaluate([prepared.valid(items, 0)])  # compiles
    began = perf_counter()
    evaluate([prepared.valid(items, 0)])
    seconds = perf_counter() - began
    every, batches = output.steps_per_eval, schedule.order("valid").per_epoch()
    times = 1 + (ceil_div(schedule.steps, every) if every else 1)
    return seconds * times * (batches if output.val_batches < 0 else min(batches, output.val_batches))


def table(needs: Needs, advice: Sequence[str]) -> dict[str, str]:
    """The report; `advice` is what makes the run smaller."""
    rows, tokens = needs.longest
    parts = f", computed in {needs.parts} parts" if needs.parts > 1 else ""
    spent = {"training": needs.seconds_training, "validation": needs.seconds_validation, "reference": needs.seconds_reference}
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent.items() if seconds)
    return {
        "trainable parameters": f"{needs.trainable:,} of {needs.parameters:,} ({needs.trainable / needs.parameters:.2%})",
        "rows": f"{needs.rows:,}",
        "steps": f"{needs.steps:,} ({needs.steps_per_epoch:,} in an epoch)",
        "longest batch": f"{rows:,} rows of {tokens:,} tokens{parts}",
        **_sampled(needs.completion_length),
        "seconds a step": f"{needs.seconds:.3g} on average, {needs.seconds_longest:.3g} on the longest batch",
        "estimated time": f"{duration(sum(spent.values()))} ({times})",
        "peak memory": f"{needs.peak / 1e9:.2f} GB of {needs.limit / 1e9:.2f} GB",
        "fits": "yes" if needs.fits else f"no. Try, in this order: {', '.join(advice)}",
        "written": "nothing (--dry-run)",
    }


def _completion_length(micro: MicroBatch) -> float | None:
    """The mean length of the sampled completions of a batch, in tokens; None if nothing is sampled."""
    found = micro.metrics.get("completions/mean_length")
    return None if found is None else found.result


def _sampled(length: float | None) -> dict[str, str]:
    return {} if length is None else {"completions": f"{length:,.0f} tokens on average; longer ones take more time and memory"}


def advice(options: RunOptions, *, quantized: bool) -> list[str]:
    """What makes the run smaller and is not in use yet, the cheapest first."""
    training, full = options.training, options.adapter.train_type == "full"
    no_use = {
        "--micro-batch 1": training.micro_batch in ("1", "auto"),
        "--grad-checkpoint": training.grad_checkpoint,
        "--quantize 4": full or quantized,
        "--train-type lora in place of full": not full,
    }
    more = ["a higher --memory-limit"] if training.memory_limit is not None else []
    return [*smaller(name for name, idle in no_use.items() if idle), *more]
