"""What a model and its adapters make of the same prompts, side by side."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen
from mlx_lm import generate
from mlx_lm.sample_utils import make_sampler

from .adapters import attached
from .data import prompt_example
from .errors import InputError
from .formats import Chat, Row, Text, last_text, preference, prompt_row, read_splits, supervised
from .modes import evaluating

BASE = "base"


@frozen
class Question:
    """A prompt's tokens, its text, and the answer that its row expects; empty where there is none."""

    tokens: list[int]
    text: str
    expected: str


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


def read_questions(
    data: str, tokenizer: Any, count: int, *, use_chat_template: bool | None = None, system: str | None = None
) -> list[Question]:
    """The first prompts of a data set, of its test split, else of its validation split, else of its training split.

    Args:
        data: folder, file or hub data set, of rows of any training method.
        tokenizer: the model's.
        count: how many.
        use_chat_template: whether to wrap plain text in the chat template; None: if the tokenizer has one.
        system: the system message of rows that bring none.

    Raises:
        InputError: there are no such rows, or they have no prompt.
    """
    splits = read_splits(data)
    rows = next(splits[name] for name in ("test", "valid", "train") if splits.get(name))
    return [question(row, tokenizer, use_chat_template=use_chat_template, system=system) for row in rows[:count]]


def question(row: Row, tokenizer: Any, *, use_chat_template: bool | None = None, system: str | None = None) -> Question:
    """The prompt of a row of any training method; see `read_questions` for the arguments."""
    fields, expected = _prompt_of(row)
    wrapped = tokenizer.has_chat_template if use_chat_template is None else use_chat_template
    if wrapped and not tokenizer.has_chat_template:
        raise InputError("--use-chat-template: this tokenizer has no chat template; leave the flag out")
    asked = Row(fields, row.file, row.line)
    example = prompt_example(asked, tokenizer, use_chat_template=wrapped, system=system)
    return Question(example.tokens.tolist() if example else [], last_text(fields["prompt"]), last_text(expected))


def _prompt_of(row: Row) -> tuple[dict[str, Any], Any]:
    """The fields that make up the prompt, and the answer that is expected."""
    if "chosen" in row.fields:
        record: Any = preference(row)
        expected = record.chosen
    else:
        record, expected = _supervised(row)
    fields = {"prompt": record.prompt, "system": record.system, "tools": record.tools}
    return {name: value for name, value in fields.items() if value is not None}, expected


def _supervised(row: Row) -> tuple[Any, Any]:
    try:
        record = supervised(row)
    except InputError:
        record = prompt_row(row)
        return record, record.columns.get("answer", "")
    if isinstance(record, Text):
        raise InputError(f"{row.where}: plain text has no prompt; compare on rows with prompts, or with --prompt")
    if not isinstance(record, Chat):
        return record, record.completion
    messages = record.messages
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    fields = {"prompt": messages[:last], **({"tools": record.tools} if record.tools else {})}
    return prompt_row(Row(fields, row.file, row.line)), messages[last:][:1]
