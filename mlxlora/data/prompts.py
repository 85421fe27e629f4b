"""The prompt of a row of any training method, and the answer that it expects."""

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from ..errors import InputError
from .formats import KEYS, Chat, Text, last_text, preference, prompt_row, supervised
from .rows import Row, read_splits
from .tokenize import prompt_example


@frozen
class Question:
    """A prompt's tokens, its text, and the answer that its row expects; empty where there is none."""

    tokens: list[int]
    text: str
    expected: str


def read_questions(
    data: str,
    tokenizer: Any,
    count: int,
    *,
    use_chat_template: bool | None = None,
    system: str | None = None,
    keys: Mapping[str, str] = KEYS,
) -> list[Question]:
    """The first prompts of a data set, of its test split, else of its validation split, else of its training split.

    Args:
        data: folder, file or hub data set, of rows of any training method.
        tokenizer: the model's.
        count: how many.
        use_chat_template: whether to wrap plain text in the chat template; None: if the tokenizer has one.
        system: the system message of rows that bring none.
        keys: what fields are called.

    Raises:
        InputError: there are no such rows, or they have no prompt.
    """
    splits = read_splits(data)
    rows = next(splits[name] for name in ("test", "valid", "train") if splits.get(name))
    return [question(row, tokenizer, use_chat_template=use_chat_template, system=system, keys=keys) for row in rows[:count]]


def question(
    row: Row,
    tokenizer: Any,
    *,
    use_chat_template: bool | None = None,
    system: str | None = None,
    keys: Mapping[str, str] = KEYS,
) -> Question:
    """The prompt of a row of any training method; see `read_questions` for the arguments."""
    fields, expected = _prompt_of(row, keys)
    wrapped = tokenizer.has_chat_template if use_chat_template is None else use_chat_template
    if wrapped and not tokenizer.has_chat_template:
        raise InputError("--use-chat-template: this tokenizer has no chat template; leave the flag out")
    example = prompt_example(Row(fields, row.file, row.line), tokenizer, use_chat_template=wrapped, system=system)
    return Question(example.tokens.tolist() if example else [], last_text(fields["prompt"]), last_text(expected))


def _prompt_of(row: Row, keys: Mapping[str, str]) -> tuple[dict[str, Any], Any]:
    """The fields that make up the prompt, and the answer that is expected."""
    if "chosen" in row.fields:
        record: Any = preference(row, keys)
        expected = record.chosen
    else:
        record, expected = _supervised(row, keys)
    fields = {"prompt": record.prompt, "system": record.system, "tools": record.tools}
    return {name: value for name, value in fields.items() if value is not None}, expected


def _supervised(row: Row, keys: Mapping[str, str]) -> tuple[Any, Any]:
    try:
        record = supervised(row, keys)
    except InputError:
        record = prompt_row(row, keys)
        return record, record.columns.get("answer", "")
    if isinstance(record, Text):
        raise InputError(f"{row.location}: plain text has no prompt; compare on rows with prompts, or with --prompt")
    if not isinstance(record, Chat):
        return record, record.completion
    messages = record.messages
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    fields = {"prompt": messages[:last], **({"tools": record.tools} if record.tools else {})}
    return prompt_row(Row(fields, row.file, row.line)), messages[last:][:1]
