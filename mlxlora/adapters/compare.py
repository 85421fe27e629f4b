"""What a model and its adapters make of the same prompts, side by side."""

from attrs import frozen
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from mlx_lm import generate
from mlx_lm.sample_utils import make_sampler
from pathlib import Path
from typing import Any
import mlx.core as mx
import mlx.nn as nn
from .prepare import attached
from ..models.modes import evaluating
from ..data.prompts import Question

BASE = "base"


@frozen
class Comparison:
    """Answers to one prompt by the name of who gave them: `base`, then the adapters."""

    prompt: str
    expected: str
    answers: Mapping[str, str]


def compare(
    model: nn.Module,
    tokenizer: Any,
    adapter_paths: Sequence[str | Path],
    questions: Sequence[Question],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> list[Comparison]:
    """Generates from the base and from each adapter; the model is loaded once, adapters are put on it and taken off.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        adapter_paths: folders of adapters.
        questions: the prompts.
        max_tokens: of an answer.
        temperature: of sampling; 0 = always the likeliest token.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of sampling, the same for every answer.
        note: is told who answers.

    Raises:
        InputError: adapters that do not fit the model.
    """
    sampler = make_sampler(temperature, top_p)

    def answers(name: str) -> list[str]:
        note(name)
        with evaluating(model):
            return [_answer(question) for question in questions]

    def _answer(question: Question) -> str:
        mx.random.seed(seed)
        return generate(model, tokenizer, question.tokens, max_tokens=max_tokens, sampler=sampler).strip()

    columns = {BASE: answers(BASE)}
    for path in adapter_paths:
        with attached(model, path):
            columns[str(path)] = answers(str(path))
    return [
        Comparison(question.text, question.expected, {name: column[i] for name, column in columns.items()})
        for i, question in enumerate(questions)
    ]
