"""Finds the prompt and the expected answer in a row of any training method."""

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from ..errors import InputError
from .dialogue import unweighted
from .formats import (
    KEYS,
    ChatRecord,
    CompletionRecord,
    PairRecord,
    PromptRecord,
    TextRecord,
    last_text,
    preference_record,
    prompt_record,
    supervised_record,
)
from .rows import Row, read_splits
from .tokenize import check_ids, record_prompt


@frozen
class Question:
    """The tokens and the text of a prompt, and the answer that its row expects, which may be empty."""

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
    vocabulary: int | None = None,
    keys: Mapping[str, str] = KEYS,
) -> list[Question]:
    """The first prompts of a data set: of its test split, else its validation split, else its training split.

    Args:
        data: folder, file or hub data set, with rows of any training method.
        tokenizer: the model's.
        count: how many.
        use_chat_template: wrap plain text in the chat template; None: if the tokenizer has one.
        system: the system message of rows that have none.
        vocabulary: how many tokens the model has; None: do not check.
        keys: names of the fields.

    Raises:
        InputError: the data set has no rows, a row has no prompt, or the model has not all of its tokens.
    """
    splits = read_splits(data)
    rows = next(splits[name] for name in ("test", "valid", "train") if splits.get(name))
    how: dict[str, Any] = {"use_chat_template": use_chat_template, "system": system, "vocabulary": vocabulary, "keys": keys}
    return [question(row, tokenizer, **how) for row in rows[:count]]


def question(
    row: Row,
    tokenizer: Any,
    *,
    use_chat_template: bool | None = None,
    system: str | None = None,
    vocabulary: int | None = None,
    keys: Mapping[str, str] = KEYS,
) -> Question:
    """The prompt of a row of any training method; see `read_questions` for the arguments."""
    record, expected = _prompt_and_answer(row, keys)
    if not record.prompt:
        raise InputError(f"{row.location}: the prompt is empty; write a prompt or remove the row")
    wrapped = tokenizer.has_chat_template if use_chat_template is None else use_chat_template
    if wrapped and not tokenizer.has_chat_template:
        raise InputError("--use-chat-template: this tokenizer has no chat template; leave the flag out")
    prompt = record_prompt(record, tokenizer, use_chat_template=wrapped, system=system)
    if vocabulary is not None:
        check_ids(prompt.tokens, row.location, vocabulary, tokenizer)
    return Question(prompt.tokens.tolist(), last_text(record.prompt), last_text(expected))


def _prompt_and_answer(row: Row, keys: Mapping[str, str]) -> tuple[PromptRecord, Any]:
    if "chosen" in row.fields:
        record: PairRecord | CompletionRecord = preference_record(row, keys)
        return _as_prompt(record), record.chosen
    try:
        supervised = supervised_record(row, keys)
    except InputError:
        prompt = prompt_record(row, keys)
        return prompt, prompt.columns.get("answer", "")
    match supervised:
        case TextRecord():
            raise InputError(f"{row.location}: plain text has no prompt; compare on rows with prompts, or with --prompt")
        case CompletionRecord() as record:
            return _as_prompt(record), record.completion
        case ChatRecord(messages=messages) as chat:
            last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
            prompt = unweighted(messages[:last])
            return PromptRecord(prompt, {}, row.location, None, chat.tools, chat.template_args), messages[last:][:1]


def _as_prompt(record: PairRecord | CompletionRecord) -> PromptRecord:
    return PromptRecord(record.prompt, {}, record.location, record.system, record.tools, record.template_args)
