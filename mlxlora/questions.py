"""What the model answers before and after training: a few prompts of the validation rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlx_lm import generate

from .data import Example
from .modes import evaluating
from .runs import Run

TOKENS = 40  # of an answer


@contextmanager
def answered(run: Run) -> Iterator[None]:
    """Answers before and after what is done within, unless that fails; both are told at the end."""
    prompts = questions(run)
    before = answers(run, prompts)
    yield
    if not prompts:
        return
    texts = (" ".join(run.tokenizer.decode(prompt, skip_special_tokens=True).split()) for prompt in prompts)
    rows = zip(texts, before, answers(run, prompts), strict=True)
    run.tell("answers", [{"prompt": text, "before": a, "after": b} for text, a, b in rows])


def questions(run: Run) -> list[list[int]]:
    """The tokens of the first prompts of the validation rows, else of the training rows; rows that are scored whole have none."""
    if not run.output.answers or not run.ranks.leads or not hasattr(run.tokenizer, "detokenizer"):
        return []
    items = run.splits["valid"].items or run.splits["train"].items
    firsts: list[Example] = [run.source.examples(item)[0] for item in items[: run.output.answers]]
    prompts = [e.tokens[: int(e.scored.argmax()) if e.scored.any() else len(e.tokens)].tolist() for e in firsts]
    return [prompt for prompt in prompts if len(prompt) > 1]


def answers(run: Run, prompts: Sequence[list[int]]) -> list[str]:
    """The likeliest answers; a model that cannot generate is trained all the same."""
    try:
        with evaluating(run.model):
            return [generate(run.model, run.tokenizer, prompt, max_tokens=TOKENS).strip() for prompt in prompts]
    except (TypeError, ValueError, AttributeError) as error:
        run.tell("note", f"--answers: this model does not generate ({error})", warning=True)
        return ["" for _ in prompts]
