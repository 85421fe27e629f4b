"""Answers of a model and of its adapters to the same prompts, sampled in batches."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen

from ..adapters.prepare import attached
from ..data.prompts import Question
from .engine import Completion, Decoding, sample
from .sampling import Sampling

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
        batch: prompts that are answered at once.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 16


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
    sampling = Sampling(temperature=generation.temperature, top_p=generation.top_p, max_tokens=generation.max_tokens)
    how = Decoding(sampling, tokenizer.eos_token_ids, batch=generation.batch)
    keys = mx.repeat(mx.random.key(generation.seed)[None], max(len(questions), 1), axis=0)

    def answers(name: str) -> list[str]:
        note(name)
        found = sample(model, [question.tokens for question in questions], how, key=keys)
        return [_said(tokenizer, group[0]) for group in found]

    columns = {BASE: answers(BASE)}
    for path in adapter_paths:
        with attached(model, path):
            columns[str(path)] = answers(str(path))
    return [
        Comparison(question.text, question.expected, {name: column[i] for name, column in columns.items()})
        for i, question in enumerate(questions)
    ]


def _said(tokenizer: Any, completion: Completion) -> str:
    """The text of an answer, as mlx-lm streams it, without the token that ended it."""
    words = tokenizer.detokenizer
    words.reset()
    for token in (completion.tokens[:-1] if completion.finished else completion.tokens).tolist():
        words.add_token(token)
    words.finalize()
    return words.text.strip()
