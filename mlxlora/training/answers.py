"""What the model answers before, during and after training: a few prompts of the validation rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from attrs import evolve
from mlx_lm import generate

from ..data.formats import KEYS
from ..data.prompts import Question, question
from ..data.rows import Row
from ..errors import InputError
from ..models.modes import evaluating
from ..reporting.reporter import Reporter
from ..reporting.reporter import Row as Record
from .run import Run

TOKENS = 40  # of an answer


class Asking(Reporter):
    """Answers at every validation between the first and the last step, told as samples; what is sampled has samples anyway."""

    def __init__(self, run: Run, asked: Sequence[Question]) -> None:
        self._run, self._asked, self._total = run, asked, 0

    def progress(self, step: int, total: int) -> None:
        self._total = total

    def record(self, row: Record) -> None:
        if row["split"] == "valid" and 0 < row["step"] < self._total:
            told = zip(self._asked, answers(self._run, self._asked), strict=False)  # none where the model does not generate
            self._run.tell("samples", row["step"], [{"prompt": q.text, "expected": q.expected, "completion": a} for q, a in told])


@contextmanager
def answered(run: Run, rows: Mapping[str, Sequence[Row]]) -> Iterator[Run]:
    """The run with answers before and after what is done within, unless that fails, and at its validations.

    The first and the last are told at the end, with the row's own answer.
    """
    asked = questions(run, rows)
    before = answers(run, asked)
    yield run if run.source.online or not before else evolve(run, reporters=(*run.reporters, Asking(run, asked)))
    if after := answers(run, asked) if before else []:
        told = zip(asked, before, after, strict=True)
        run.tell("answers", [{"prompt": q.text, "expected": q.expected, "before": a, "after": b} for q, a, b in told])


def questions(run: Run, rows: Mapping[str, Sequence[Row]]) -> list[Question]:
    """The first prompts of the validation rows, else of the training rows; rows of plain text have none."""
    alone = run.ranks.leads and not (run.training.fully_shard and run.ranks.size > 1)  # has the whole model
    if not run.output.answers or not alone or not hasattr(run.tokenizer, "detokenizer"):
        return []
    data = run.source.data
    how = {
        "use_chat_template": data.use_chat_template,
        "system": getattr(data, "system", None),
        "keys": {name: getattr(data, f"{name}_key", default) for name, default in KEYS.items()},
    }
    found = []
    for row in (rows.get("valid") or rows["train"])[: run.output.answers]:
        try:
            found.append(question(row, run.tokenizer, **how))
        except InputError:
            continue
    return [q for q in found if 0 < len(q.tokens) < data.max_seq_length]


def answers(run: Run, asked: Sequence[Question]) -> list[str]:
    """The likeliest answers; none of a model that cannot generate, which is trained all the same."""
    try:
        with evaluating(run.model):
            return [generate(run.model, run.tokenizer, q.tokens, max_tokens=TOKENS).strip() for q in asked]
    except (TypeError, ValueError, AttributeError) as error:
        run.tell("note", f"--answers: this model does not generate ({error})", warning=True)
        return []
