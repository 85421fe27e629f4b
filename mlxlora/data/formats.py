"""Recognizes the format of a row and turns the row into a record of one fixed shape.

docs/data.md lists the formats.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from attrs import evolve, frozen

from ..config.options import RowOptions
from ..errors import InputError, described, listed
from .dialogue import check_answers, dialogue_prompt, divided, unweighted, weighted
from .messages import Message, as_messages, as_tools, with_system
from .rows import Row

_NAMED = ("text", "messages", "prompt", "completion", "answer")
KEYS: Mapping[str, str] = dict(zip(_NAMED, _NAMED, strict=True))
"""The names of the fields that --text-key, --messages-key, --prompt-key, --completion-key and --answer-key rename."""


def field_names(data: RowOptions) -> dict[str, str]:
    """The names of `KEYS` in rows with these options.

    >>> field_names(RowOptions(prompt_key="question"))["prompt"]
    'question'
    """
    return {name: getattr(data, f"{name}_key", default) for name, default in KEYS.items()}


_TEMPLATE_FIELDS = ("tools", "functions", "chat_template_kwargs")  # what a row gives its chat template besides messages


@frozen
class TextRecord:
    """Plain text."""

    text: str
    location: str


@frozen
class CompletionRecord:
    """A prompt and its completion: two strings, or two lists of messages."""

    prompt: str | list[Message]
    completion: str | list[Message]
    location: str
    system: str | None = None
    tools: list[Message] | None = None
    template_args: Mapping[str, Any] | None = None


@frozen
class ChatRecord:
    """A conversation."""

    messages: list[Message]
    location: str
    tools: list[Message] | None = None
    template_args: Mapping[str, Any] | None = None


@frozen
class PairRecord:
    """Two completions of one prompt: three strings, or three lists of messages."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    location: str
    system: str | None = None
    tools: list[Message] | None = None
    preference_score: float | None = None
    template_args: Mapping[str, Any] | None = None


@frozen
class LabeledRecord:
    """A completion with a label of its own: good or bad (KTO)."""

    completion: CompletionRecord
    label: bool


@frozen
class PromptRecord:
    """A prompt that the policy answers, and the columns that the rewards read."""

    prompt: str | list[Message]
    columns: dict[str, Any]
    location: str
    system: str | None = None
    tools: list[Message] | None = None
    template_args: Mapping[str, Any] | None = None


SupervisedRecord = TextRecord | CompletionRecord | ChatRecord
"""The records of SFT rows."""

_Reader = Callable[[Row, Mapping[str, str]], SupervisedRecord | None]


def supervised_record(row: Row, keys: Mapping[str, str] = KEYS) -> SupervisedRecord:
    """The record of an SFT row: messages, ShareGPT, prompt + completion, text or Alpaca.

    >>> supervised_record(Row({"text": "Hi"}, "a.jsonl", 1))
    TextRecord(text='Hi', location='a.jsonl:1')
    """
    names = {**KEYS, **keys}
    readers: tuple[_Reader, ...] = (_chat, _completion, _text, _alpaca)
    record = next((record for read in readers if (record := read(row, names)) is not None), None)
    if record is None:
        if {"chosen", "rejected"} <= row.fields.keys():
            pair = "fields not recognized: 'chosen' and 'rejected' make a preference pair"
            raise InputError(f"{row.location}: {pair}, which `mlxlora dpo`, orpo and cpo train")
        raise _unrecognized(
            row,
            f"'{names['messages']}', 'conversations', '{names['prompt']}' + '{names['completion']}', '{names['text']}', "
            "or 'instruction' + 'output'; --messages-key, --prompt-key, --completion-key and --text-key rename them",
        )
    return record


def is_text(row: Row, keys: Mapping[str, str] = KEYS) -> bool:
    """Whether an SFT row is plain text, which has no parts that a chat template could wrap.

    >>> [is_text(Row(fields, "a.jsonl", 1)) for fields in ({"text": "Hi"}, {"prompt": "Hi", "completion": "you"}, {"mine": 1})]
    [True, False, False]
    """
    try:
        return isinstance(supervised_record(row, keys), TextRecord)
    except InputError:  # rows of a source of the user's own
        return False


def preference_record(row: Row, keys: Mapping[str, str] = KEYS) -> PairRecord:
    """The record of a preference row: chosen and rejected, and their prompt, a field of its own or their common beginning."""
    names = {**KEYS, **keys}
    row = _with_candidates(row)
    if not {"chosen", "rejected"} <= row.fields.keys():
        raise _unrecognized(
            row, f"'{names['prompt']}' + 'chosen' + 'rejected', or 'chosen' + 'rejected' that start with the prompt"
        )
    chosen, rejected = (_answer(row, name) for name in ("chosen", "rejected"))
    prompt, system = _preference_prompt(row, names), _optional_string(row, "system")
    if isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str)):
        start = dialogue_prompt(chosen, rejected, row.location) if prompt is None else 0
        prompt, chosen, rejected = chosen[:start] if prompt is None else prompt, chosen[start:], rejected[start:]
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            if not side:
                raise _empty(row, name)
    else:
        sides = {"chosen": _as_turn(chosen, "assistant"), "rejected": _as_turn(rejected, "assistant")}
        prompt, (chosen, rejected) = divided(_prompt_turns(prompt, sides), sides, row.location)
        prompt, system = with_system(prompt, system), None
    return PairRecord(prompt, chosen, rejected, row.location, system, _tools(row), _score(row), template_args=_arguments(row))


def labeled_record(row: Row, keys: Mapping[str, str] = KEYS) -> LabeledRecord:
    """The record of an unpaired preference row: prompt + completion, or messages that end with an answer, and a boolean label."""
    names = {**KEYS, **keys}
    record = _chat(row, names) or _completion(row, names)
    if record is None or not _has(row, "label"):
        raise _unrecognized(row, f"'label' with '{names['messages']}' or with '{names['prompt']}' + '{names['completion']}'")
    if not isinstance(row.fields["label"], bool):
        raise InputError(f"{row.location}: 'label' must be true or false, got {described(row.fields['label'])}")
    if isinstance(record, ChatRecord):
        if len(record.messages) < 2 or record.messages[-1]["role"] != "assistant":
            raise InputError(f"{row.location}: labeled messages must be a prompt and an assistant's answer; add the answer")
        prompt, completion = unweighted(record.messages[:-1]), record.messages[-1:]
        record = CompletionRecord(prompt, completion, row.location, None, record.tools, record.template_args)
    return LabeledRecord(record, row.fields["label"])


def unpaired_record(row: Row, keys: Mapping[str, str] = KEYS) -> PairRecord | CompletionRecord:
    """The record of a row of KTO, without its label: a labeled completion, or a pair, which counts as one row of each label."""
    if {"chosen", "rejected"} <= row.fields.keys():
        return preference_record(row, keys)
    return labeled_record(row, keys).completion


def prompt_record(row: Row, keys: Mapping[str, str] = KEYS) -> PromptRecord:
    """The record of a prompt to sample from: prompt (or question, as in GSM8K), and every other field as a column.

    >>> prompt_record(Row({"question": "1+1?", "answer": "2"}, "a.jsonl", 1)).columns
    {'answer': '2'}
    """
    names = {**KEYS, **keys}
    field = names["prompt"] if _has(row, names["prompt"]) else "question"
    if not _has(row, field):
        raise _unrecognized(row, f"'{names['prompt']}' or 'question', and any columns that the rewards read")
    prompt, system = _strings_or_messages(row, field), _optional_string(row, "system")
    if not prompt:
        raise InputError(f"{row.location}: '{field}' is empty; write a prompt or remove the row")
    if not isinstance(prompt, str):
        prompt, system = with_system(unweighted(prompt), system), None
    columns = {name: value for name, value in row.fields.items() if name not in (field, "system", *_TEMPLATE_FIELDS)}
    if names["answer"] != "answer" and names["answer"] in columns:
        columns["answer"] = columns[names["answer"]]
    return PromptRecord(prompt, columns, row.location, system, _tools(row), _arguments(row))


def _chat(row: Row, names: Mapping[str, str]) -> ChatRecord | None:
    field = next((name for name in (names["messages"], "conversations") if _has(row, name)), None)
    if field is None:
        return None
    messages = weighted(as_messages(row.fields[field], row.location, field), row.location, field)
    check_answers(messages, row.location, field)
    return ChatRecord(with_system(messages, _optional_string(row, "system")), row.location, _tools(row), _arguments(row))


def _completion(row: Row, names: Mapping[str, str]) -> CompletionRecord | None:
    field = names["completion"]
    if not _has(row, names["prompt"], field):
        return None
    prompt, completion = _strings_or_messages(row, names["prompt"]), _strings_or_messages(row, field)
    system = _optional_string(row, "system")
    if not completion:
        raise _empty(row, field)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        turns, sides = _as_turn(prompt, "user"), {field: _as_turn(completion, "assistant")}
        prompt, (completion,) = divided(turns, sides, row.location)
        prompt, system = with_system(prompt, system), None
    return CompletionRecord(prompt, completion, row.location, system, _tools(row), _arguments(row))


def _text(row: Row, names: Mapping[str, str]) -> TextRecord | None:
    if not _has(row, names["text"]):
        return None
    text = _string(row, names["text"])
    if not text:
        raise InputError(f"{row.location}: '{names['text']}' is empty; write a text or remove the row")
    return TextRecord(text, row.location)


def _alpaca(row: Row, names: Mapping[str, str]) -> CompletionRecord | None:
    if not _has(row, "instruction", "output"):
        return None
    completion = _string(row, "output")
    if not completion:
        raise InputError(f"{row.location}: 'output' is empty; write an answer or remove the row")
    return CompletionRecord(_alpaca_prompt(row), completion, row.location, _optional_string(row, "system"))


class FramedPrompt(str):
    """A prompt that a format frames for models without a chat template; `asked` is what a user's turn has of it."""

    asked: str

    def __new__(cls, text: str, asked: str) -> "FramedPrompt":
        made = super().__new__(cls, text)
        made.asked = asked
        return made


def _alpaca_prompt(row: Row) -> FramedPrompt:
    """The prompt of Stanford Alpaca's train.py; the answer follows it directly."""
    instruction, extra = _string(row, "instruction"), _optional_string(row, "input")
    task = "Below is an instruction that describes a task"
    asked = "Write a response that appropriately completes the request."
    if not extra:
        return FramedPrompt(f"{task}. {asked}\n\n### Instruction:\n{instruction}\n\n### Response:", instruction)
    context = f"{task}, paired with an input that provides further context. {asked}"
    framed = f"{context}\n\n### Instruction:\n{instruction}\n\n### Input:\n{extra}\n\n### Response:"
    return FramedPrompt(framed, f"{instruction}\n\n{extra}")


def _with_candidates(row: Row) -> Row:
    """The row with `output`, a list of a better and a worse answer, as `chosen` and `rejected`."""
    outputs = row.fields.get("output")
    if not isinstance(outputs, list) or {"chosen", "rejected"} & row.fields.keys():
        return row
    if len(outputs) != 2:
        raise InputError(f"{row.location}: 'output' must list two answers, the better one first, got {len(outputs)}")
    rest = {name: value for name, value in row.fields.items() if name != "output"}
    return evolve(row, fields=rest | dict(zip(("chosen", "rejected"), outputs, strict=True)))


def _preference_prompt(row: Row, names: Mapping[str, str]) -> str | list[Message] | None:
    fields = (names["prompt"], names["messages"], "conversations")
    field = next((name for name in fields if _has(row, name)), None)
    if field is not None:
        return _strings_or_messages(row, field)
    if _has(row, "instruction"):
        return _alpaca_prompt(row)
    return _string(row, "question") if _has(row, "question") else None  # as in Intel's orca_dpo_pairs


def _prompt_turns(prompt: str | list[Message] | None, sides: Mapping[str, list[Message]]) -> list[Message] | None:
    """The prompt's messages; None for a string that conversations repeat, which may be its last message only."""
    if not isinstance(prompt, str):
        return prompt
    whole = all(side[0]["role"] in ("system", "user") for side in sides.values())
    return None if whole else _as_turn(prompt, "user")


def _as_turn(value: str | list[Message], role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _answer(row: Row, name: str) -> str | list[Message]:
    if row.fields[name] is None:
        raise _empty(row, name)
    return _strings_or_messages(row, name)


def _empty(row: Row, name: str) -> InputError:
    return InputError(f"{row.location}: '{name}' is empty; write a completion or remove the row")


def _has(row: Row, *names: str) -> bool:
    return all(row.fields.get(name) is not None for name in names)  # data sets fill absent columns with null


def _string(row: Row, name: str) -> str:
    value = row.fields[name]
    if not isinstance(value, str):
        raise InputError(f"{row.location}: '{name}' must be a string, got {described(value)}")
    return value


def _optional_string(row: Row, name: str) -> str | None:
    return _string(row, name) if _has(row, name) else None


def _strings_or_messages(row: Row, name: str) -> str | list[Message]:
    value = row.fields[name]
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    if isinstance(value, str):
        return value
    if isinstance(value, (list, dict)):
        return weighted(as_messages(value, row.location, name), row.location, name)
    raise InputError(f"{row.location}: '{name}' must be a string or a list of messages, got {described(value)}")


def _tools(row: Row) -> list[Message] | None:
    field = next((name for name in ("tools", "functions") if _has(row, name)), None)  # functions: OpenAI's former name
    return None if field is None else as_tools(row.fields[field], row.location)


def _arguments(row: Row) -> Mapping[str, Any] | None:
    value = row.fields.get("chat_template_kwargs")
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{row.location}: 'chat_template_kwargs' must be an object, got {described(value)}")
    return value or None


def _score(row: Row) -> float | None:
    value = row.fields.get("preference_score")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{row.location}: 'preference_score' must be a finite number, got {described(value)}")
    return float(value)


def _unrecognized(row: Row, accepted: str) -> InputError:
    names = sorted(row.fields)
    found = listed([f"{name} (empty)" if row.fields[name] is None else name for name in names], 50) or "none"
    return InputError(f"{row.location}: fields not recognized: found {found}; accepted are {accepted}")


def last_text(value: Any) -> str:
    """The text of a prompt or an answer for display: the last message of a conversation."""
    if isinstance(value, list):
        return str(value[-1].get("content") or "") if value else ""
    return str(value)
