"""From options to a finished run, the same for every method: claim the folder, load, tokenize, train."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn
from attrs import evolve, frozen

from ..adapters.detach import continued, is_trained
from ..adapters.inject import layers_to_train
from ..adapters.prepare import CHANGED, base_of, load
from ..config.given import is_path
from ..config.method_options import dump, gather
from ..config.options import AdapterOptions, DataOptions, ModelOptions, Output, Training
from ..data import sources
from ..data.memory import stored_rows
from ..data.own_template import fixed_template
from ..data.rows import Row, SplitRows
from ..data.sources import Context, Source
from ..distributed.ranks import current_ranks
from ..distributed.sharding import is_sharded, ranks_of
from ..errors import InputError
from ..models.loading import ORIGIN, model_and_tokenizer, wrapped
from ..models.logprobs import scorer
from ..models.modes import vocabulary
from ..objectives.objective import Objective
from ..objectives.supervised import sft
from ..reporting.callbacks import Callbacks
from ..reporting.card import CUSTOM, Card, MethodInfo, portable
from ..reporting.history import StoredMethod
from ..reporting.reporter import Reporter, ReporterGroup
from ..reporting.reporters import reporters, terminal_for
from ..reporting.stage import announced
from ..utils.stages import shown_by
from .answers import first_questions
from .dry_run import dry_run
from .evaluate import make_evaluate
from .inputs import Run, RunOptions
from .prepared import plain_maker
from .rank_sync import restore_saved
from .results import RunResult, displayed
from .run import execute_run
from .schedule import Schedule, batches_of_split
from .startup import check_options, claimed, introduce

Groups = Mapping[type, Any]
"""The groups of options of a run by type."""


@frozen
class Recipe:
    """What a method trains on, and what it minimizes.

    Attributes:
        method: what the run stores about its method.
        source: turns rows into batches.
        objective: what is minimized.
        extras: further fields of `Run`, such as the reference.
        info: what reports say of the method.
    """

    method: StoredMethod
    source: Source
    objective: Objective
    extras: Mapping[str, Any] = {}
    info: MethodInfo = CUSTOM


def train_recipe(recipe: Recipe, groups: Groups) -> RunResult:
    """Loads the model of `groups` and trains it.

    Returns:
        The results: steps, losses, where the adapters are; and the trained model.

    Raises:
        InputError: bad options or data.
        RunError: losses or gradients that are not finite, of five batches in a row; the last good state was saved.
    """
    with _held(recipe, groups[Output]):
        terminal = _terminal(recipe, groups[Output])
        with current_ranks().together(), shown_by(terminal.stage):
            rows = _read(recipe.source, groups[Training], terminal)
            if isinstance(name := groups[ModelOptions].model, str):
                terminal.note(f"loading {portable(name)}")
            model, tokenizer = model_and_tokenizer(groups[ModelOptions], lazy=groups[Training].fully_shard)
            layers_to_train(model, groups[AdapterOptions])  # fails before the rows are tokenized
        return _run(recipe, model, tokenizer, rows, groups)


def run(
    model: nn.Module,
    tokenizer: Any,
    objective: Objective,
    source: Source,
    training: Training = Training(),
    *,
    adapter: AdapterOptions | Literal["continue", "fresh"] = AdapterOptions(),
    **output: Any,
) -> RunResult:
    """Trains a loaded model; every method ends here.

    Args:
        model: an mlx-lm model; `prepare` makes its adapters.
        tokenizer: its tokenizer.
        objective: what is minimized.
        source: turns rows into batches.
        training: options of the optimization.
        adapter: what is trained; or how adapters of an earlier run on this model go on.
        output: fields of `Output`, such as `adapter_path="adapters"`.

    Returns:
        The results: steps, losses, where the adapters are; and the trained model.

    Raises:
        InputError: bad options or data.
        RunError: losses or gradients that are not finite, of five batches in a row; the last good state was saved.
    """
    files, recipe = Output(**output), Recipe(StoredMethod(None), source, objective)
    with _held(recipe, files):
        with current_ranks().together():
            rows = _read(source, training, _terminal(recipe, files))
        adapter = AdapterOptions(adapter=adapter) if isinstance(adapter, str) else adapter
        groups = {type(group): group for group in (ModelOptions(), source.data, adapter, training, files)}
        return _run(recipe, model, wrapped(tokenizer), rows, groups)


def evaluate_split(
    *, model_options: ModelOptions, data_options: DataOptions, adapter_path: str | None, split: str, batch_size: int, seed: int = 0
) -> dict[str, float]:
    """Loss [nats per trained token] and perplexity of a whole split, every row counted once; the model is that of `base_of`.

    Raises:
        InputError: no such split, model or adapters.
    """
    base = base_of(model_options, adapter_path) if adapter_path else model_options
    source, rows = sources.rows(data_options), sources.load_split(data_options, split, seed)
    model, tokenizer = load(base, adapter_path)
    splits = sources.tokenize(source, {split: rows}, tokenizer)
    sources.check_tokens(source, splits, {"the model": vocabulary(model)}, tokenizer)
    objective = sft()
    ranks, schedule = current_ranks(), Schedule(source, splits, Training(batch_size=batch_size))
    make = plain_maker(source, Context(model, tokenizer, seed, validation=True, ranks=ranks))
    return make_evaluate(model, objective, scorer(model), ranks)(batches_of_split(schedule, make, split))


@contextmanager
def _held(recipe: Recipe, output: Output) -> Iterator[None]:
    """Rank 0 holds the folder of the run while the context lasts; all ranks end if it cannot."""
    ranks = current_ranks()
    with ExitStack() as held:
        with ranks.together():
            if ranks.leads:
                held.enter_context(claimed(output, recipe.method.method, evaluated=recipe.info.evaluated))
        yield


def _terminal(recipe: Recipe, output: Output) -> Reporter:
    """What shows the work before the run has reporters; rank 0 alone does."""
    return terminal_for(recipe.info, quiet=output.quiet) if current_ranks().leads else ReporterGroup()


def _read(source: Source, training: Training, reporter: Reporter) -> dict[str, SplitRows]:
    """The rows of a run; those of a hub data set have bars of their own."""
    with announced(reporter, "reading rows", at_once=False):
        rows = sources.load_rows(source.data, training.seed)
        source.check_rows(rows)
    return rows


_TRAINED = {
    "continue": "an earlier run trained this model: training continues from there (adapter='fresh' starts from the base)",
    "fresh": "an earlier run trained this model: training starts from the base again (adapter='fresh')",
}


def _of_objects(model: nn.Module, rows: Mapping[str, Sequence[Row]], options: ModelOptions, source: Source) -> dict[str, Any]:
    """What the files of a run say of rows and models that Python passed."""
    data = {} if is_path(source.data.data) else {"data": stored_rows(rows)}
    if is_path(options.model):
        return data
    origin = None if CHANGED.get(model) else ORIGIN.get(model)  # adapters of changed weights do not fit the ones it came with
    return {**data, "model": origin and origin.model, "quantize": origin and origin.quantize}


def _run(recipe: Recipe, model: nn.Module, tokenizer: Any, rows: dict[str, SplitRows], groups: Groups) -> RunResult:
    groups = {**groups, AdapterOptions: continued(model, groups[AdapterOptions])}
    training, adapter, output, ranks = groups[Training], groups[AdapterOptions], groups[Output], current_ranks()
    if training.loraplus_lr_ratio is not None and adapter.train_type == "full":
        raise InputError(f"--loraplus-lr-ratio {training.loraplus_lr_ratio} is for adapters; use --train-type lora or dora")
    source, method = recipe.source, evolve(recipe.info, groups=tuple(groups))
    callbacks = Callbacks(output.callbacks if ranks.leads and not output.dry_run else ())
    reporter = ReporterGroup(*(reporters(output, method) if ranks.leads else ()), callbacks)
    with ranks.together():
        check_options(training, adapter, online=source.online, with_teacher="extend" in recipe.extras)
        with announced(reporter, "tokenizing rows", sum(map(len, rows.values()))):
            splits = sources.tokenize(source, rows, tokenizer, reporter.note)
        sources.check_tokens(source, splits, {"the model": vocabulary(model)}, tokenizer)
    if ranks.leads and not output.dry_run:
        rows_of = {name: split.counts.rows for name, split in splits.items()}
        reporter = ReporterGroup(*reporter.members, Card(Path(output.adapter_path), rows_of, method))
    stored = dump(recipe.method, *groups.values())
    stored |= _of_objects(model, rows, groups[ModelOptions], source)
    config = {name: value for name, value in stored.items() if name not in ("resume", "overwrite", "allow_changed")}
    options = RunOptions(training, adapter, output, config, method, fixed_template(groups[ModelOptions]))
    whole = Run(model, tokenizer, recipe.objective, source, splits, options, ranks=ranks, callbacks=callbacks, **recipe.extras)
    if is_trained(model) and not output.resume:
        reporter.note(_TRAINED[adapter.adapter])
    introduce(whole, rows["train"][0], reporter)
    with shown_by(reporter.stage):
        if output.dry_run:
            return RunResult(dry_run(whole, reporter))
        callbacks.results = results = execute_run(whole, reporter, first_questions(whole, rows))
    reporter.finish(displayed(results))
    callbacks.settle(ranks.of_rank0)
    if output.keep_best:
        restore_saved(ranks_of(model) if is_sharded(model) else ranks, model, whole.options.directory)
    model.eval()
    return RunResult(results, whole, partial(_again, recipe, model, tokenizer, rows, groups))


def _again(
    recipe: Recipe, model: nn.Module, tokenizer: Any, rows: dict[str, SplitRows], groups: Groups, **changes: Any
) -> RunResult:
    """Resumes a run with other options."""
    groups = gather(tuple(groups), tuple(groups.values()), {"overwrite": False, **changes, "resume": True})
    with _held(recipe, groups[Output]):
        return _run(recipe, model, tokenizer, rows, groups)
