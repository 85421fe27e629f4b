"""One run, the same for every method: rows, adapters, step, hooks, loop, files."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import yaml
from attrs import evolve, field, frozen

from ..adapters.files import CONFIG, WEIGHTS, save
from ..adapters.prepare import load_weights, prepare
from ..config.options import AdapterOptions, Output, Training
from ..data.batching import Make, MicroBatch, Order, grouped, read_positions, spread, stream
from ..data.packing import packed
from ..data.prefetch import prefetched
from ..data.shape_buckets import capped
from ..data.sources import Context, Source, Split
from ..distributed.ranks import Ranks, current_ranks
from ..distributed.sharding import shard
from ..distributed.watchdog import nothing
from ..errors import InputError, LostError, RunError, SharedError
from ..models import attention
from ..models.grad_checkpoint import checkpointed
from ..models.logprobs import Scorer, scorer
from ..models.modes import freeze
from ..models.neftune import noisy
from ..models.row_layouts import know_windows, obstacle, packed_layout, pays
from ..objectives.objective import Objective
from ..reporting.history import METRICS, PAGE, SAMPLES, SETTINGS
from ..reporting.reporter import Reporter, truncate_after
from ..utils.device import limit_memory
from ..utils.files import atomic_file
from .checkpoint import Progress, checkpoints, load_checkpoint, newest, save_checkpoint
from .evaluate import Evaluate, make_evaluate, mean_measures
from .loop import Abandoned, Every, reported, train
from .micro_batch import BatchDivider, cost_of_position
from .optimizers import make_optimizer
from .rank_sync import broadcast, check_ranks, on_rank0, repair, restore
from .reference import referenced, with_reference
from .run_folder import check_no_adapters, check_same, clean
from .step import Step, entropy_of, make_step


@frozen
class Run:
    """All that a run is made of.

    Attributes:
        model: an mlx-lm model.
        tokenizer: its tokenizer.
        objective: what is minimised.
        source: how rows become batches.
        splits: the items of train, valid and test.
        training: options of the optimisation.
        adapter: what is trained.
        output: options of files and reports.
        config: the resolved configuration, saved beside the adapters.
        name: the model's, for messages and the adapter's configuration.
        score: log-probabilities of a batch.
        reporters: who is told what happens.
        reference: loads the reference model, if it is another one.
        reference_cache: file of the reference's log-probabilities; None keeps none.
        share: whether prompts are computed once for all of their completions.
        micro: divides batches that would not fit into memory.
        noise: NEFTune's α, of noise on the embeddings of training tokens.
        ranks: the processes that train together.
        makers: how batches are made, for training and for validation, once that is known.
        extend: (scorer, tokenizer) -> a scorer that adds further columns to a batch, such as the divergence from a teacher.
    """

    model: nn.Module
    tokenizer: Any
    objective: Objective
    source: Source
    splits: Mapping[str, Split]
    training: Training
    adapter: AdapterOptions
    output: Output
    config: Mapping[str, Any] = field(factory=dict)
    name: str = ""
    score: Scorer | None = None
    reporters: tuple[Reporter, ...] = ()
    reference: Callable[[Any], nn.Module] | None = None
    reference_cache: Path | None = None
    share: bool = False
    micro: BatchDivider | None = None
    noise: float = 0.0
    extend: Callable[[Scorer, Any], Scorer] | None = None
    ranks: Ranks = field(factory=current_ranks)
    makers: dict[bool, Make] = field(factory=dict, eq=False, repr=False)

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        return Path(self.output.adapter_path)

    def tell(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Calls one method of every reporter."""
        for reporter in self.reporters:
            getattr(reporter, event)(*args, **kwargs)


# --- the run ----------------------------------------------------------------------------------


def execute(run: Run) -> dict[str, Any]:
    """Trains until the last step and writes everything that a run leaves.

    Returns:
        The results: steps, losses, where the adapters are.

    Raises:
        InputError: options that do not fit the data, the model or the run to be resumed.
        RunError: losses or gradients that are not finite, of five batches in a row; the last good state was saved.
    """
    with attention.using(run.training.attention):
        return _execute(run)


def _execute(run: Run) -> dict[str, Any]:
    run, optimizer, total = ready(run)
    progress = on_rank0(run.ranks, run.model, lambda: _start(run, optimizer), optimizer) or Progress()
    run.tell("start", run.config)
    step, evaluate = compiled(run, optimizer)
    broadcast(run.ranks, step, optimizer, progress)
    if progress.step >= total or progress.stop:  # nothing is left to train
        best, warn = progress.best if run.output.keep_best else None, partial(run.tell, "note", warning=True)
        repair(run.ranks, run.model, run.directory, best, partial(_save, run), warn)
    began = time.perf_counter()
    _train(run, step, evaluate, optimizer, progress, total)
    return _finish(run, step, evaluate, progress, time.perf_counter() - began)


def ready(run: Run, only: Mapping[str, Sequence[int]] | None = None) -> tuple[Run, Any, int]:
    """The run with its reference, adapters, scorer and layout; its optimiser; and its number of steps.

    Args:
        run: as its options make it.
        only: rows of each split that get a reference; None: all that will be used.
    """
    _check_splits(run)
    examples = (example for split in run.splits.values() for item in split.items for example in run.source.examples(item))
    check_ranks(run.ranks, run.objective, examples)
    if run.training.fully_shard:
        run = evolve(run, ranks=shard(run.model, run.ranks), reference_cache=None)  # a cache is checked by one rank alone
    limit, saved = limit_memory(run.training.memory_limit), _saved_by_sharing(run)
    if "ref_logps" in run.objective.needs and not run.source.online:
        run = _with_reference(run, only, shared=saved is not None)
    mx.random.seed(run.training.seed)
    prepare(run.model, run.adapter)
    if run.adapter.resume_adapter_file:
        load_weights(run.model, run.adapter.resume_adapter_file)
    if _recomputes(run):
        checkpointed(run.model)
    if run.noise:
        noisy(run.model, run.noise)
    run.model.train()
    with run.ranks.computing():
        score = run.score or scorer(run.model, temperature=run.source.temperature, entropy=entropy_of(run.objective))
        score = run.extend(score, run.tokenizer) if run.extend else score
        know_windows(score.forward, run.model)
        run = _packed(evolve(run, score=score, share=_shares(run, score, saved), micro=_micro(run, limit), makers={}), score)
    if score.split is None:
        run.tell("note", "this model cannot be split into backbone and head: the logits of all tokens are computed", warning=True)
    total = total_steps(run.training, len(run.splits["train"].items), run.source.repeats)
    return run, make_optimizer(run.training, total), total


def compiled(run: Run, optimizer: Any) -> tuple[Step, Evaluate]:
    """The step and the validation of a run that is ready."""
    clip, ranks = run.training.max_grad_norm, run.ranks
    step = make_step(run.model, optimizer, run.objective, score=run.score, max_grad_norm=clip, ranks=ranks)
    assert run.score is not None
    measures = partial(mean_measures, ranks=ranks)
    return step, measures if run.source.online else make_evaluate(run.model, run.objective, run.score, ranks)


def _recomputes(run: Run) -> bool:
    """Where ranks have slices, what a block gathered must not be kept for its backward pass."""
    return run.training.grad_checkpoint or run.ranks.sharded


def _micro(run: Run, limit: int) -> BatchDivider:
    training = run.training
    cost = cost_of_position(run.model, recomputed=_recomputes(run))
    return BatchDivider(limit, cost, 0 if training.micro_batch == "auto" else int(training.micro_batch))


def _saved_by_sharing(run: Run) -> float | None:
    """The share of the work that is left if prompts are computed once; None: not wanted, or the rows say that it does not pay."""
    if run.source.share is False or run.ranks.sharded:  # ranks with and without a common prompt would gather unequally often
        return None
    plain, shared = read_positions(map(run.source.expected, run.splits["train"].items))
    wanted = plain != shared and bool(run.source.share or pays(plain, shared))
    return shared / plain if wanted else None


def _shares(run: Run, score: Scorer, left: float | None) -> bool:
    """Whether to compute prompts once: where it leaves a share of the work, and the model reproduces whole rows."""
    if left is None:
        return False
    if problem := obstacle(score.forward, run.model):
        told = f"each prompt is computed once per completion: this model cannot share it ({problem})"
        run.tell("note", told, warning=bool(run.source.share))
        return False
    run.tell("note", f"each prompt is computed once for all of its completions: {left:.0%} of the work")
    return True


def _packed(run: Run, score: Scorer) -> Run:
    """With several examples to a row, if asked for and the model then computes what it does for plain rows."""
    if not run.source.packing:
        return run
    if problem := obstacle(score.forward, run.model, packed_layout):
        run.tell("note", f"--packing: rows stay plain, for this model cannot tell packed examples apart ({problem})", warning=True)
        return run
    examples = run.splits["train"].items
    source, splits = packed(run.source, run.splits, run.training.seed)
    run = evolve(run, source=source, splits=splits)
    run.tell("note", f"--packing: {len(examples)} examples in {len(splits['train'].items)} rows")
    _check_batch_size(run)
    return run


def _check_batch_size(run: Run) -> None:
    rows, size = len(run.splits["train"].items), run.training.batch_size
    if size > rows:
        raise InputError(f"--batch-size {size} is larger than the training set of {rows} rows; use --batch-size {rows} or less")


def _check_splits(run: Run) -> None:
    _check_batch_size(run)
    for flag, wanted in (("--keep-best", run.output.keep_best), ("--patience", run.output.patience)):
        if wanted and not (run.splits["valid"].items and run.output.val_batches):
            raise InputError(f"{flag} needs validation: add valid.jsonl or --valid-fraction, and --val-batches other than 0")
    if run.output.test and not run.splits["test"].items:
        raise InputError("--test needs a test split: add test.jsonl to the data folder")


def total_steps(training: Training, rows: int, repeats: int = 1) -> int:
    """Optimiser steps of a run, `repeats` on every batch; the last one may have fewer batches.

    >>> total_steps(Training(epochs=2, batch_size=4, grad_accumulation_steps=2), rows=10)
    3
    """
    steps = -(-_batches(training, rows) // training.grad_accumulation_steps)
    return steps if training.epochs is None else steps * repeats


def _batches(training: Training, rows: int) -> int:
    if training.epochs is None:
        return training.iters * training.grad_accumulation_steps
    return max(1, math.ceil(training.epochs * -(-rows // training.batch_size)))


def _start(run: Run, optimizer: Any) -> Progress:
    """A new run's progress, or that of the newest good checkpoint."""
    path, problems = newest(run.directory) if run.output.resume else (None, [])
    if problems and path is None:
        raise InputError(f"--resume: {'; '.join(problems)}; no earlier one is good: start again with --overwrite")
    for problem in problems:
        run.tell("note", f"{problem}; an earlier one is used", warning=True)
    if run.output.resume:
        check_same(run.directory, run.config)
    if path is None:
        if run.output.resume:
            check_no_adapters(run.directory, WEIGHTS, run.output.save_every if run.output.keep_best else 0)
            run.tell("note", f"no checkpoint in {run.directory}: starting from the beginning", warning=True)
        clean(run.directory, WEIGHTS, CONFIG)
        progress = Progress()
    else:
        progress = load_checkpoint(path, run.model, optimizer)
        for name in (METRICS, SAMPLES):
            truncate_after(run.directory / name, progress.step or -1)  # step 0 is validated again
        run.tell("note", f"resuming {path} after step {progress.step}")
    run.directory.mkdir(parents=True, exist_ok=True)
    with atomic_file(run.directory / SETTINGS) as file:
        file.write_text(yaml.safe_dump(dict(run.config), sort_keys=False))
    return progress


def _train(run: Run, step: Step, evaluate: Evaluate, optimizer: Any, progress: Progress, total: int) -> None:
    run.tell("progress", progress.step, total)
    if progress.step == 0:
        _validate(run, evaluate, progress, first=True)

    def write() -> None:
        keep = 0 if progress.skipped else run.output.save_total_limit  # no good one makes room for one that nothing proved
        stays, begun = run.output.keep_best and progress.best is not None, bool(checkpoints(run.directory))
        if begun and not stays:  # before the checkpoint: after the last one nothing is saved any more
            _save(run)
        save_checkpoint(run.directory, run.model, optimizer, progress, run.adapter, keep=keep)
        if not (begun or stays):  # after the first one: adapters alone are nothing to go on from
            _save(run)

    def checkpoint(*_: Any) -> None:
        on_rank0(run.ranks, run.model, write, optimizer)

    def rescue() -> None:
        checkpoint()
        run.tell("finish", {"stopped": f"after step {progress.step}", "to go on": "the same command with --resume"})

    def left() -> None:
        run.tell("finish", {"stopped": f"after step {progress.step}", **_last_checkpoint(run)})

    if run.ranks.watch:
        run.ranks.watch.rescue = left if run.ranks.sharded else rescue
    multiple = run.source.repeats
    hooks = (
        Every(1, lambda progress, _: run.tell("progress", progress.step, total), total, beside=True),
        Every(run.output.steps_per_report, partial(_report, run), total),
        Every(_up(run.output.steps_per_eval, multiple), lambda progress, _: _validate(run, evaluate, progress), total),
        Every(_up(run.output.save_every, multiple), checkpoint, total),
    )
    try:
        how: dict[str, Any] = {"repeats": multiple, "micro": run.micro, "ranks": run.ranks, "ahead": not _live(run)}
        train(
            step, _batches_of_steps(run, progress.step), progress, total, hooks, **how, warn=partial(run.tell, "note", warning=True)
        )
    except Abandoned:
        raise
    except KeyboardInterrupt:
        rescue()
        raise
    except RunError as error:
        if run.ranks.sharded and (isinstance(error, LostError) or not isinstance(error, SharedError)):
            left()  # no other rank helps saving
            raise
        checkpoint()
        run.tell("finish", {"stopped": f"after step {progress.step}", "last good state": str(run.directory)})
        raise
    finally:
        if run.ranks.watch:
            run.ranks.watch.rescue = nothing


def _last_checkpoint(run: Run) -> dict[str, str]:
    path, _ = newest(run.directory)
    return {} if path is None else {"last checkpoint": str(path), "to go on": "the same command with --resume"}


def _save(run: Run) -> None:
    save(run.model, run.directory, run.adapter, run.name, run.config.get("quantize"))


def _batches_of_steps(run: Run, done: int) -> Iterator[tuple[MicroBatch, ...]]:
    """The batches of each optimiser step after `done`."""
    items, accumulate = run.splits["train"].items, run.training.grad_accumulation_steps
    used = done // run.source.repeats * accumulate
    micros = stream(items, order(run, "train"), maker(run, validation=False), used)
    steps = grouped(islice(micros, max(_batches(run.training, len(items)) - used, 0)), accumulate)
    return steps if _live(run) else prefetched(steps)


def _live(run: Run) -> bool:
    """Whether batches are sampled or measured, which needs the policy as it will be by then."""
    return run.source.online or run.source.live


def maker(run: Run, *, validation: bool) -> Make:
    """How items become batches, the same for the whole run: it may have looked at the model and compiled something."""
    if validation not in run.makers:
        run.makers[validation] = _maker(run, validation)
    return run.makers[validation]


def _maker(run: Run, validation: bool) -> Make:
    """What is sampled during the run gets its reference's log-probabilities with each batch."""
    context = Context(run.model, run.tokenizer, run.training.seed, validation, run.splits["train"].items, run.share, run.ranks)
    make = run.source.make(context)
    make = capped(make if run.source.online or run.source.live else spread(make, run.ranks))
    if validation or not run.source.online or "ref_logps" not in run.objective.needs:
        return make
    if run.reference is None and run.adapter.train_type == "full":
        raise InputError("the objective needs a reference, which full training changes as it goes; use --train-type lora or dora")
    return referenced(make, run.reference(run.tokenizer) if run.reference else run.model, run.source.temperature)


def _up(steps: int, multiple: int) -> int:
    return -(-steps // multiple) * multiple


def order(run: Run, split: str) -> Order:
    """Training rows are shuffled, the others stay in the order of the file."""
    seed = run.training.seed if split == "train" and run.source.data.shuffle else None
    return Order(tuple(map(run.source.length, run.splits[split].items)), run.training.batch_size, seed)


def _with_reference(run: Run, only: Mapping[str, Sequence[int]] | None, *, shared: bool) -> Run:
    """The rows that the run will use, with the reference's log-probabilities.

    The reference is the model before it is touched, so it needs no memory of its own.
    """
    model = run.reference(run.tokenizer) if run.reference else run.model
    freeze(model).eval()  # frozen: what looks for gradients finds none
    with run.ranks.computing():
        score, limits = scorer(model), {"train": _batches(run.training, len(run.splits["train"].items))}
    if run.source.packing:
        limits["train"] = -1  # a batch of packed rows has more examples
    limits |= {"valid": run.output.val_batches, "test": -1 if run.output.test else 0}
    together = 1
    if shared and not obstacle(score.forward, model):
        together = len(run.source.examples(run.splits["train"].items[0]))
    rows = only or {name: _rows_used(run, name, limits[name]) for name in run.splits}
    splits = {name: _scored(run, name, rows.get(name, ()), score, together) for name in run.splits}
    return evolve(run, splits=splits)


def _rows_used(run: Run, name: str, limit: int) -> list[int]:
    """The rows of the first `limit` batches of a split; -1 = of all."""
    if not run.splits[name].items or not limit:
        return []
    rows = order(run, name)
    return sorted({row for batch in islice(rows.batches(), rows.per_epoch() if limit < 0 else limit) for row in batch})


def _scored(run: Run, name: str, used: Sequence[int], score: Scorer, together: int) -> Split:
    split = run.splits[name]
    if not used:
        return split
    examples = [run.source.examples(split.items[row]) for row in used]
    flat = with_reference(
        [e for group in examples for e in group],
        score,
        batch_size=2 * run.training.batch_size,
        together=together,
        cache=run.reference_cache,
        note=lambda text: run.tell("note", text),
        ranks=run.ranks,
    )
    loss_mask, items = iter(flat), list(split.items)
    for row, group in zip(used, examples, strict=True):
        items[row] = run.source.rebuild(items[row], tuple(islice(loss_mask, len(group))))
    return evolve(split, items=items)


# --- hooks ------------------------------------------------------------------------------------


def _report(run: Run, progress: Progress, micros: Sequence[MicroBatch] = ()) -> None:
    """The means since the last report, and what the last batches have for a person to read."""
    seen = reported(progress)
    alone = seen.pop("training_tokens_per_second")
    run.tell(
        "record",
        {
            "step": progress.step,
            "split": "train",
            **{name: seen.pop(name) for name in ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second")},
            "peak_memory_gb": max(mx.get_peak_memory(), run.micro.peak if run.micro else 0) / 1e9,
            **({"training_tokens_per_second": alone} if run.source.online else {}),
            **seen,
        },
    )
    run.tell("samples", progress.step, [sample for micro in micros for sample in micro.samples])


def _validate(run: Run, evaluate: Evaluate, progress: Progress, *, first: bool = False) -> None:
    """Pooled means of the validation split; keeps the best and counts how long ago it was."""
    if not (run.splits["valid"].items and run.output.val_batches):
        return
    metrics = evaluate(split_batches(run, "valid", run.output.val_batches))
    run.tell("record", {"step": progress.step, "split": "valid", **metrics})
    if first:
        return
    if math.isfinite(metrics["loss"]) and (progress.best is None or metrics["loss"] < progress.best):
        progress.best, progress.waited = metrics["loss"], 0
        if run.output.keep_best:
            on_rank0(run.ranks, run.model, partial(_save, run))
    else:
        progress.waited += 1
    if run.output.patience and progress.waited >= run.output.patience:
        progress.stop = f"no better validation loss in {progress.waited} validations"


def split_batches(run: Run, split: str, limit: int = -1) -> Iterator[MicroBatch]:
    """The batches of a split other than train, once and in order; at most `limit` of them (-1 = all)."""
    rows = order(run, split)
    count = rows.per_epoch() if limit < 0 else min(limit, rows.per_epoch())
    return islice(stream(run.splits[split].items, rows, maker(run, validation=True)), count)


def _finish(run: Run, step: Step, evaluate: Evaluate, progress: Progress, seconds: float) -> dict[str, Any]:
    if progress.window:
        _report(run, progress)
    results: dict[str, Any] = {"steps": progress.step, "shapes compiled": step.compilations, "seconds": round(seconds, 1)}
    if progress.stop:
        results["stopped early"] = progress.stop
    if progress.best is not None:
        name, value = ("reward", -progress.best) if run.source.online else ("loss", progress.best)
        results[f"best valid {name}"] = round(value, 4)
    if run.output.test:
        if run.output.keep_best:
            restore(run.ranks, run.model, run.directory)
        metrics = evaluate(split_batches(run, "test"))
        run.tell("record", {"step": progress.step, "split": "test", **metrics})
        results |= {f"test {name}": round(metrics[name], 4) for name in ("loss", "perplexity") if name in metrics}
    results["adapters"] = str(run.directory)
    results["report"] = str(run.directory / PAGE)
    return results
