"""Generates answers from a model and from its adapters to the same prompts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen
from mlx_lm import generate
from mlx_lm.sample_utils import make_sampler

from ..data.prompts import Question
from ..models.modes import evaluating
from .prepare import attached

BASE = "base"


@frozen
class Comparison:
    """Answers to one prompt by name: `base`, then the folder of each adapter."""

    prompt: str
    expected: str
    answers: Mapping[str, str]


@frozen
class Generation:
    """How to generate answers.

    Attributes:
        max_tokens: of an answer.
        temperature: of sampling; 0 = always the most likely token.
        top_p: sample from the most likely tokens that together have this probability.
        seed: of sampling, the same for every answer.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Generation()


def compare(
    model: nn.Module,
    tokenizer: Any,
    adapter_paths: Sequence[str | Path],
    questions: Sequence[Question],
    generation: Generation = GREEDY,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> list[Comparison]:
    """Answers the questions with the base and with each adapter, which it puts on the model and removes again.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        adapter_paths: folders of adapters.
        questions: the prompts.
        generation: how to generate.
        note: receives the name of each model before it answers.

    Raises:
        InputError: adapters that do not fit the model.
    """
    sampler = make_sampler(generation.temperature, generation.top_p)

    def answers(name: str) -> list[str]:
        note(name)
        with evaluating(model):
            return [_answer(question) for question in questions]

    def _answer(question: Question) -> str:
        mx.random.seed(generation.seed)
        return generate(model, tokenizer, question.tokens, max_tokens=generation.max_tokens, sampler=sampler).strip()

    columns = {BASE: answers(BASE)}
    for path in adapter_paths:
        with attached(model, path):
            columns[str(path)] = answers(str(path))
    return [
        Comparison(question.text, question.expected, {name: column[i] for name, column in columns.items()})
        for i, question in enumerate(questions)
    ]
