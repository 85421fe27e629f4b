"""What the model answers before, during and after training, for a few prompts of the validation rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
from mlx_lm import generate

from ..data.formats import field_names
from ..data.prompts import Question, question
from ..data.rows import Row
from ..errors import InputError
from ..models.modes import evaluating, vocabulary
from ..reporting.reporter import Reporter, ReporterGroup, Values
from ..reporting.stage import announced
from ..utils.ticks import ticking
from .inputs import Run

TOKENS = 40  # of an answer


class Asking(Reporter):
    """Reports answers as samples, at every validation between the first and the last step."""

    def __init__(self, run: Run, questions: Sequence[Question], reporter: Reporter) -> None:
        self._run, self._questions, self._reporter, self._total = run, questions, reporter, 0

    def progress(self, step: int, total: int) -> None:
        self._total = total

    def record(self, row: Values) -> None:
        if row["split"] == "valid" and 0 < row["step"] < self._total:
            found = answers(self._run.model, self._run.tokenizer, self._questions, self._reporter)
            samples = [
                {"prompt": q.text, "expected": q.expected, "completion": answer}
                for q, answer in zip(self._questions, found, strict=False)  # no answers if the model cannot generate
            ]
            self._reporter.samples(row["step"], samples)


@contextmanager
def answered(run: Run, reporter: Reporter, questions: Sequence[Question]) -> Iterator[Reporter]:
    """A reporter that also answers the questions at validations; at the end, unless the run fails, it reports the answers
    before and after training.

    The samples of a run that samples are its own completions, so its validations answer nothing.
    """
    before = answers(run.model, run.tokenizer, questions, reporter)
    asks = before and not run.source.online
    yield ReporterGroup(reporter, Asking(run, questions, reporter)) if asks else reporter
    if after := answers(run.model, run.tokenizer, questions, reporter) if before else []:
        rows = zip(questions, before, after, strict=True)
        reporter.answers([{"prompt": q.text, "expected": q.expected, "before": a, "after": b} for q, a, b in rows])


def first_questions(run: Run, rows: Mapping[str, Sequence[Row]]) -> list[Question]:
    """The first prompts of the validation rows, else of the training rows; rows of plain text have none."""
    options = run.options
    has_model = run.ranks.leads and not (options.training.fully_shard and run.ranks.size > 1)
    if not options.output.answers or not has_model or not hasattr(run.tokenizer, "detokenizer"):
        return []
    data = run.source.data
    how: dict[str, Any] = {
        "use_chat_template": data.use_chat_template,
        "system": getattr(data, "system", None),
        "vocabulary": vocabulary(run.model),
        "keys": field_names(data),
    }
    found = []
    for row in (rows.get("valid") or rows["train"])[: options.output.answers]:
        try:
            found.append(question(row, run.tokenizer, **how))
        except InputError:
            continue
    return [q for q in found if 0 < len(q.tokens) < data.max_seq_length]


def answers(model: nn.Module, tokenizer: Any, questions: Sequence[Question], reporter: Reporter) -> list[str]:
    """The likeliest answers; none from a model that cannot generate, which can be trained all the same."""
    try:
        with announced(reporter, "answering prompts", len(questions)), evaluating(model):
            return [generate(model, tokenizer, q.tokens, max_tokens=TOKENS).strip() for q in ticking(questions)]
    except (TypeError, ValueError, AttributeError) as error:
        reporter.note(f"--answers: this model does not generate ({error})", warning=True)
        return []
