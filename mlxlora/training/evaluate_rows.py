"""Evaluates a trained model on other rows, by the loss of its run."""

from typing import Any

from attrs import evolve

from ..config.given import Data
from ..data import sources
from ..data.sources import Context, Split
from ..errors import InputError
from ..models.modes import vocabulary
from ..reporting.reporter import ReporterGroup
from .evaluate import make_evaluate, mean_measures
from .inputs import Run
from .prepared import plain_maker, scored_by_reference, scorer_of
from .reference import starts_trained
from .schedule import Schedule, batches_of_split


def evaluate_rows(run: Run, data: Data) -> dict[str, float]:
    """The means of the run's loss and metrics over rows, every row counted once.

    Args:
        run: with the trained model.
        data: rows; of splits, the test split, else validation, else training.

    Raises:
        InputError: no such rows, or a loss that needs a reference that is gone.
    """
    source = _reading(run, data)
    rows = sources.load_rows(source.data, run.options.training.seed)
    part = next(rows[name] for name in ("test", "valid", "train") if rows.get(name))
    split = sources.tokenize(source, {"test": part}, run.tokenizer)["test"]
    splits = {"train": split, "valid": Split(), "test": split}
    sources.check_tokens(source, splits, {"the model": vocabulary(run.model)}, run.tokenizer)
    run = evolve(run, source=source, splits=splits)
    schedule = Schedule(source, splits, run.options.training)
    if "ref_logps" in run.objective.needs and not source.online:
        adapter = run.options.adapter
        if run.reference.load is None and adapter.train_type == "full" and not starts_trained(run.model, adapter):
            raise InputError("evaluate: the loss compares with the weights before training, which are gone; name a reference model")
        schedule = scored_by_reference(run, schedule, ReporterGroup())
    make = plain_maker(source, Context(run.model, run.tokenizer, run.options.training.seed, validation=True, ranks=run.ranks))
    evaluate: Any = mean_measures
    if not source.online:
        evaluate = make_evaluate(run.model, run.objective, scorer_of(run), run.ranks)
    return evaluate(batches_of_split(schedule, make, "test"))


def _reading(run: Run, data: Data) -> Any:
    """The source of the run, for other rows."""
    options = {"data": data, "train_split": None, "valid_split": None, "test_split": None, "valid_fraction": 0.0}
    changes = {"data": evolve(run.source.data, **options), "packing": False}
    return evolve(run.source, **changes)
