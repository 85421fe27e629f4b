"""One run, from its inputs to the files that it leaves; the same for every method."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..data.prompts import Question
from ..reporting.callbacks import Callbacks
from ..reporting.history import PAGE
from ..reporting.reporter import Reporter
from ..utils.integers import round_up
from .answers import answered
from .choices import by_machine
from .evaluate import Evaluate
from .hooks import CHECKPOINT, REPORT, VALIDATION, Report, Told, Validation
from .inputs import Run
from .interrupt import Interruptible
from .loop import Every, LoopOptions, check_trained, train
from .origin import RunOrigin
from .overview import overview
from .prepared import Prepared, compiled, prepare_run
from .progress import Progress
from .rank_sync import broadcast, restore_saved
from .run_folder import fixed_options
from .saving import Saver
from .schedule import batches_of_split, batches_of_steps
from .step import Step

REFERENCE_OPTIONS = ("resume_adapter_file",)
"""Options that a resumed run may change unless its objective has a reference, which they change."""


def execute_run(run: Run, reporter: Reporter, questions: Sequence[Question] = ()) -> dict[str, Any]:
    """Trains until the last step and writes everything that a run leaves.

    Args:
        run: its inputs.
        reporter: gets what happens.
        questions: prompts to answer before, during and after training.

    Returns:
        The results: steps, losses, where the adapters are.

    Raises:
        InputError: options that do not fit the data, the model or the run to be resumed.
        RunError: losses or gradients that are not finite, of five batches in a row; the last good state was saved.
    """
    with by_machine(run, reporter) as choices:
        prepared = prepare_run(run, reporter, choices=choices)
        with answered(run, reporter, questions) as asking:  # before a checkpoint is read: "before" is the start of training
            return _execute(run, prepared, asking)


def _execute(run: Run, prepared: Prepared, reporter: Reporter) -> dict[str, Any]:
    fixed = REFERENCE_OPTIONS if "ref_logps" in run.objective.needs else ()
    origin = RunOrigin(fixed_options(run.options.config, fixed), prepared.digests)
    saver = Saver(run.model, prepared.optimizer, run.options, prepared.ranks, origin)
    progress = saver.start(reporter, fixed)
    reporter.start(run.options.config)
    if run.ranks.leads:
        reporter.overview(overview(run, prepared))
    step, evaluate = compiled(run, prepared)
    broadcast(prepared.ranks, step, prepared.optimizer, progress)
    prepared.rounding.restore(progress.rounding)
    if progress.step >= prepared.schedule.steps or progress.stop:  # nothing is left to train
        saver.repair(progress, reporter)
    has_token_metrics = any(term.name == "mean_token_accuracy" for _, term in run.objective.terms)
    report = Report(reporter, prepared.rounding.divider, run.source.online, has_token_metrics)
    validation = _validation(prepared, evaluate, saver, reporter)
    began = time.perf_counter()
    _train(prepared, step, saver, progress, report, validation, run.callbacks)
    if progress.window:
        report(progress)
    return _results(progress, step, run, time.perf_counter() - began) | _test(prepared, evaluate, saver, progress, reporter)


def _validation(prepared: Prepared, evaluate: Evaluate, saver: Saver, reporter: Reporter) -> Validation:
    schedule, output = prepared.schedule, saver.options.output
    batches = partial(batches_of_split, schedule, prepared.valid, "valid", output.val_batches)
    validated = bool(schedule.items("valid") and output.val_batches)
    return Validation(evaluate, batches if validated else None, reporter, output, saver.adapters)


def _train(
    prepared: Prepared,
    step: Step,
    saver: Saver,
    progress: Progress,
    report: Report,
    validation: Validation,
    callbacks: Callbacks,
) -> None:
    schedule, reporter, output = prepared.schedule, report.reporter, saver.options.output
    total, multiple = schedule.steps, schedule.source.repeats
    reporter.progress(progress.step, total)
    if progress.step == 0:
        validation.first(progress)
    told = Told(callbacks, prepared.ranks, saver.directory)
    hooks = (
        Every(1, lambda progress, _: reporter.progress(progress.step, total), total, beside=True),
        Every(output.steps_per_report, report, total, name=REPORT),
        Every(round_up(output.steps_per_eval, multiple), validation, total, name=VALIDATION),
        *told.after_steps(multiple, total),
        Every(round_up(output.save_every, multiple), told.saving(saver.checkpoint), total, name=CHECKPOINT),
        *told.at_the_end(total),
    )
    interrupt = Interruptible(waits=prepared.ranks.size > 1)
    how = LoopOptions(
        repeats=multiple,
        divider=prepared.rounding.divider,
        rounding=prepared.rounding,
        ranks=prepared.ranks,
        ahead=not schedule.is_live,
        warn=partial(reporter.note, warning=True),
        interrupt=interrupt,
    )
    with interrupt, saver.saved_on_exit(progress, reporter):
        told.settle(progress)
        train(step, batches_of_steps(schedule, prepared.train, progress.step), progress, total, hooks, how)
        check_trained(progress)


def _results(progress: Progress, step: Step, run: Run, seconds: float) -> dict[str, Any]:
    results: dict[str, Any] = {"steps": progress.step, "shapes_compiled": step.compilations, "seconds": seconds}
    if progress.stop:
        results["stopped_early"] = progress.stop
    if progress.best is not None:
        name, value = ("reward", -progress.best) if run.source.online else ("loss", progress.best)
        results[f"best_valid_{name}"] = value
    return results


def _test(prepared: Prepared, evaluate: Evaluate, saver: Saver, progress: Progress, reporter: Reporter) -> dict[str, Any]:
    """The results of the test split, if --test asks for them, and where the files of the run are."""
    results: dict[str, Any] = {}
    if saver.options.output.test:
        if saver.options.output.keep_best:
            restore_saved(prepared.ranks, saver.model, saver.directory)
        metrics = evaluate(batches_of_split(prepared.schedule, prepared.valid, "test"))
        reporter.record({"step": progress.step, "split": "test", **metrics})
        results |= {f"test_{name}": metrics[name] for name in ("loss", "perplexity") if name in metrics}
    return results | {"adapters": str(saver.directory), "report": str(saver.directory / PAGE)}
