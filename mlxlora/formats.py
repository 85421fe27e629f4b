"""Rows of JSONL, JSON and hub data sets, and the canonical record that each format stands for."""

import gzip
import math
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
from attrs import frozen

from .errors import InputError, listed
from .peers import HUB
from .templates import Message, as_messages, as_tools, common_prefix, short, with_system

KEYS: Mapping[str, str] = {"text": "text", "messages": "messages", "prompt": "prompt", "completion": "completion"}
"""What the fields are called that --text-key and its like rename."""

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz")
_SPLITS = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SAID_TO_BE_ONE = re.compile(rf"{HUB}((?:[\w.-]+/)?[\w.-]+(?::[\w.-]+)?)")


@frozen
class Row:
    """One JSON object and where it came from; lines count from 1."""

    fields: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """ "file:line", the start of every message about the row."""
        return f"{self.file}:{self.line}"


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a .jsonl, .jsonl.gz or .json file (a list of objects, whose lines are their positions).

    Raises:
        InputError: the file is missing, empty, not UTF-8, or holds something other than JSON objects (NaN is not JSON).
    """
    path = Path(path)
    if not path.is_file():
        hub = f"a hub name like org/name or {HUB}name"
        raise InputError(f"{path}: no such file; --data takes a folder with train.jsonl, a file, or {hub}")
    if not path.name.endswith(_SUFFIXES):
        raise InputError(f"{path}: unknown kind of file; use one of {', '.join(_SUFFIXES)}")
    try:
        rows = list(_json_rows(path) if path.suffix == ".json" else _jsonl_rows(path))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise InputError(f"{path}: no rows; write at least one JSON object")
    return rows


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _row(_parse(line, f"{path}:{number}", "write one JSON object per line"), path, number)


def _json_rows(path: Path) -> Iterator[Row]:
    content = path.read_bytes()
    values = _parse(content, f"{path}:1", "write a list of objects, or one object per line as .jsonl") if content.strip() else []
    if not isinstance(values, list):
        raise InputError(f"{path}:1: must be a list of objects, got {short(values)}")
    for number, value in enumerate(values, 1):
        yield _row(value, path, number)


def _row(value: Any, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{path}:{number}: a row must be a JSON object, got {short(value)}")
    return Row(value, str(path), number)


def _parse(content: bytes, where: str, remedy: str) -> Any:
    try:
        return orjson.loads(content.removeprefix(b"\xef\xbb\xbf").strip())
    except orjson.JSONDecodeError as error:
        start = content[:60].decode("utf-8", "replace").strip()
        reason = "not UTF-8" if "UTF-8" in error.msg else f"not JSON ({error.msg}, column {error.colno})"
        raise InputError(f"{where}: {reason}: {start!r}; {remedy}") from None


def read_splits(data: str | Path, asked: Mapping[str, str] | None = None) -> dict[str, list[Row]]:
    """The splits "train", "valid" and "test" that a folder, a file (train only) or a hub data set has.

    A hub name may carry a configuration: `org/name:config`; one without an organisation is `hf://datasets/name`. Hub data sets
    need `datasets`. `asked` says which rows of a hub data set a split is, such as `{"train": "train[:1000]"}`; the others are
    then left out.

    Raises:
        InputError: nothing of that name, no training rows, or broken rows.
    """
    path = Path(data)
    if named := _SAID_TO_BE_ONE.fullmatch(str(data)):
        return _read_with_datasets(named[1], asked)
    if asked and path.exists():
        raise InputError(f"--{next(iter(asked))}-split is for hub data sets, {data} is a local one; leave it out")
    if path.is_file():
        return {"train": read_rows(path)}
    if path.is_dir():
        return _read_folder(path)
    if not _HUB_NAME.fullmatch(str(data)) or str(data).endswith(_SUFFIXES) or str(data).startswith("."):
        return {"train": read_rows(path)}  # which says that there is no such file
    return _read_with_datasets(str(data), asked)


def _read_folder(folder: Path) -> dict[str, list[Row]]:
    files = {split: _split_file(folder, names) for split, names in _SPLITS.items()}
    if files["train"] is not None:
        return {split: read_rows(file) for split, file in files.items() if file is not None}
    found = sorted(entry.name for entry in folder.iterdir())
    if any(name.endswith((".parquet", ".arrow", ".csv")) or name in ("dataset_dict.json", "data") for name in found):
        return _read_with_datasets(str(folder))
    raise InputError(f"{folder}: no train.jsonl in this folder; found {', '.join(found[:10]) or 'nothing'}")


def _split_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in _SUFFIXES)
    return next((file for file in candidates if file.is_file()), None)


def _read_with_datasets(name: str, asked: Mapping[str, str] | None = None) -> dict[str, list[Row]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"{name}: reading this data set needs the datasets package: pip install 'mlxlora[datasets]'") from None
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(name)
        else:
            place = [name] if Path(name).exists() else name.split(":")
            some = {name: datasets.load_dataset(*place, split=rows) for name, rows in (asked or {}).items()}
            splits = some or datasets.load_dataset(*place)
    except Exception as error:  # the hub, the network and any loader: the user can act on each of their messages
        raise InputError(f"{name}: cannot be loaded: {' '.join(str(error).split())}") from error
    found = {split: next((splits[given] for given in names if given in splits), None) for split, names in _SPLITS.items()}
    if found["train"] is None:
        raise InputError(f"{name}: no train split; found {', '.join(sorted(splits))}")
    return {
        split: [Row(dict(fields), f"{name}[{split}]", number) for number, fields in enumerate(rows, 1)]
        for split, rows in found.items()
        if rows is not None
    }


def split_off(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, validation) rows in their order: a random share, the same for the same seed, at least one row on either side.

    Raises:
        InputError: fewer than two rows.

    >>> rows = [Row({}, "a.jsonl", line) for line in range(1, 5)]
    >>> [len(part) for part in split_off(rows, 0.01, seed=0)]
    [3, 1]
    """
    if len(rows) < 2:
        raise InputError(f"--valid-fraction needs at least 2 rows, got {len(rows)}")
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


@frozen
class Text:
    """Plain text."""

    text: str
    where: str


@frozen
class Completion:
    """What follows a prompt: both strings or both messages."""

    prompt: str | list[Message]
    completion: str | list[Message]
    where: str
    system: str | None = None
    tools: list[Message] | None = None


@frozen
class Chat:
    """A conversation."""

    messages: list[Message]
    where: str
    tools: list[Message] | None = None


@frozen
class Preference:
    """Two completions of one prompt: all strings or all messages."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    where: str
    system: str | None = None
    tools: list[Message] | None = None
    preference_score: float | None = None


@frozen
class Labelled:
    """A completion that is good or bad on its own (KTO)."""

    completion: Completion
    label: bool


@frozen
class PromptRow:
    """What a policy is to answer, and the columns that rewards read."""

    prompt: str | list[Message]
    columns: dict[str, Any]
    where: str
    system: str | None = None
    tools: list[Message] | None = None


def supervised(row: Row, keys: Mapping[str, str] = KEYS) -> Text | Completion | Chat:
    """The record of an SFT row: messages, ShareGPT, prompt + completion, text or Alpaca.

    >>> supervised(Row({"text": "Hi"}, "a.jsonl", 1))
    Text(text='Hi', where='a.jsonl:1')
    """
    names = {**KEYS, **keys}
    readers: tuple[Callable[[Row, Mapping[str, str]], Text | Completion | Chat | None], ...] = (_chat, _completion, _text, _alpaca)
    record = next((record for read in readers if (record := read(row, names)) is not None), None)
    if record is None:
        raise _unrecognised(
            row,
            f"'{names['messages']}', 'conversations', '{names['prompt']}' + '{names['completion']}', '{names['text']}', "
            "or 'instruction' + 'output'; --messages-key, --prompt-key, --completion-key and --text-key rename them",
        )
    return record


def preference(row: Row, keys: Mapping[str, str] = KEYS) -> Preference:
    """The record of a preference row: chosen and rejected, with their prompt in a field of its own or as their shared start."""
    names = {**KEYS, **keys}
    if not _has(row, "chosen", "rejected"):
        raise _unrecognised(
            row, f"'{names['prompt']}' + 'chosen' + 'rejected', or 'chosen' + 'rejected' that start with the prompt"
        )
    chosen, rejected = (_strings_or_messages(row, name) for name in ("chosen", "rejected"))
    prompt, chosen, rejected = _pair(row, _preference_prompt(row, names), chosen, rejected)
    system = _optional_string(row, "system")
    if not isinstance(prompt, str):
        prompt, system = with_system(prompt, system), None
    return Preference(prompt, chosen, rejected, row.where, system, _tools(row), _score(row))


def labelled(row: Row, keys: Mapping[str, str] = KEYS) -> Labelled:
    """The record of an unpaired preference row: prompt + completion, or messages that end with an answer, and a boolean label."""
    names = {**KEYS, **keys}
    record = _chat(row, names) or _completion(row, names)
    if record is None or not _has(row, "label"):
        raise _unrecognised(row, f"'label' with '{names['messages']}' or with '{names['prompt']}' + '{names['completion']}'")
    if not isinstance(row.fields["label"], bool):
        raise InputError(f"{row.where}: 'label' must be true or false, got {short(row.fields['label'])}")
    if isinstance(record, Chat):
        if len(record.messages) < 2 or record.messages[-1]["role"] != "assistant":
            raise InputError(f"{row.where}: labelled messages must be a prompt and an assistant's answer")
        record = Completion(record.messages[:-1], record.messages[-1:], row.where, tools=record.tools)
    return Labelled(record, row.fields["label"])


def prompt_row(row: Row, keys: Mapping[str, str] = KEYS) -> PromptRow:
    """The record of a prompt to sample from: prompt (or GSM8K's question), and every other field as a column.

    >>> prompt_row(Row({"question": "1+1?", "answer": "2"}, "a.jsonl", 1)).columns
    {'answer': '2'}
    """
    names = {**KEYS, **keys}
    field = names["prompt"] if _has(row, names["prompt"]) else "question"
    if not _has(row, field):
        raise _unrecognised(row, f"'{names['prompt']}' or 'question', and any columns that the rewards read")
    prompt, system = _strings_or_messages(row, field), _optional_string(row, "system")
    if not prompt:
        raise InputError(f"{row.where}: '{field}' is empty; write a prompt or remove the row")
    if not isinstance(prompt, str):
        prompt, system = with_system(prompt, system), None
    columns = {name: value for name, value in row.fields.items() if name not in (field, "system", "tools")}
    return PromptRow(prompt, columns, row.where, system, _tools(row))


def _chat(row: Row, names: Mapping[str, str]) -> Chat | None:
    field = next((name for name in (names["messages"], "conversations") if _has(row, name)), None)
    if field is None:
        return None
    messages = as_messages(row.fields[field], row.where, field)
    return Chat(with_system(messages, _optional_string(row, "system")), row.where, _tools(row))


def _completion(row: Row, names: Mapping[str, str]) -> Completion | None:
    if not _has(row, names["prompt"], names["completion"]):
        return None
    prompt, completion = (_strings_or_messages(row, names[name]) for name in ("prompt", "completion"))
    system = _optional_string(row, "system")
    if not completion:
        raise InputError(f"{row.where}: '{names['completion']}' is empty; write a completion or remove the row")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        prompt, completion = with_system(_as_turn(prompt, "user"), system), _as_turn(completion, "assistant")
        _check_answers(row, completion, names["completion"])
        system = None
    return Completion(prompt, completion, row.where, system, _tools(row))


def _text(row: Row, names: Mapping[str, str]) -> Text | None:
    if not _has(row, names["text"]):
        return None
    text = _string(row, names["text"])
    if not text:
        raise InputError(f"{row.where}: '{names['text']}' is empty; write a text or remove the row")
    return Text(text, row.where)


def _alpaca(row: Row, names: Mapping[str, str]) -> Completion | None:
    if not _has(row, "instruction", "output"):
        return None
    completion = _string(row, "output")
    if not completion:
        raise InputError(f"{row.where}: 'output' is empty; write an answer or remove the row")
    return Completion(_alpaca_prompt(row), completion, row.where, _optional_string(row, "system"))


def _alpaca_prompt(row: Row) -> str:
    """The prompt of Stanford Alpaca's train.py; the answer follows it at once."""
    instruction, extra = _string(row, "instruction"), _optional_string(row, "input")
    task = "Below is an instruction that describes a task"
    asked = "Write a response that appropriately completes the request."
    if not extra:
        return f"{task}. {asked}\n\n### Instruction:\n{instruction}\n\n### Response:"
    context = f"{task}, paired with an input that provides further context. {asked}"
    return f"{context}\n\n### Instruction:\n{instruction}\n\n### Input:\n{extra}\n\n### Response:"


def _preference_prompt(row: Row, names: Mapping[str, str]) -> str | list[Message] | None:
    field = next((name for name in (names["prompt"], names["messages"], "conversations") if _has(row, name)), None)
    if field is not None:
        return _strings_or_messages(row, field)
    return _alpaca_prompt(row) if _has(row, "instruction") else None


def _pair(
    row: Row, prompt: str | list[Message] | None, chosen: str | list[Message], rejected: str | list[Message]
) -> tuple[str | list[Message], str | list[Message], str | list[Message]]:
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _split_dialogue(row, chosen, rejected)
        if isinstance(prompt, str):
            return prompt, chosen, rejected
    return _message_pair(row, prompt, _as_turn(chosen, "assistant"), _as_turn(rejected, "assistant"))


def _split_dialogue(row: Row, chosen: str, rejected: str) -> tuple[str, str, str]:
    """HH-RLHF's full dialogues: the prompt runs to the last assistant turn that both have in common."""
    turn = "\n\nAssistant:"
    last = chosen.rfind(turn, 0, common_prefix(chosen, rejected))
    if last < 0:
        raise InputError(
            f"{row.where}: without 'prompt', chosen and rejected must share a start that ends with {turn!r}; add a 'prompt' field"
        )
    start = last + len(turn)
    return chosen[:start], chosen[start:], rejected[start:]


def _message_pair(
    row: Row, prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Full conversations give up their shared start, whether or not a `prompt` field repeats it."""
    shared = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if isinstance(prompt, list):
        shared = len(prompt) if chosen[: len(prompt)] == prompt and len(prompt) <= shared else 0
    if shared:
        prompt = chosen[:shared]
    if prompt is None:
        raise InputError(f"{row.where}: chosen and rejected share no first message; add a 'prompt' field")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        _check_answers(row, side[shared:], name)
    return _as_turn(prompt, "user"), chosen[shared:], rejected[shared:]


def _as_turn(value: str | list[Message], role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _check_answers(row: Row, messages: list[Message], field: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{row.where}: '{field}' has no assistant message; roles found: {listed(m['role'] for m in messages)}")


def _has(row: Row, *names: str) -> bool:
    return all(row.fields.get(name) is not None for name in names)  # data sets fill absent columns with null


def _string(row: Row, name: str) -> str:
    value = row.fields[name]
    if not isinstance(value, str):
        raise InputError(f"{row.where}: '{name}' must be a string, got {short(value)}")
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
        return as_messages(value, row.where, name)
    raise InputError(f"{row.where}: '{name}' must be a string or a list of messages, got {short(value)}")


def _tools(row: Row) -> list[Message] | None:
    return as_tools(row.fields["tools"], row.where) if _has(row, "tools") else None


def _score(row: Row) -> float | None:
    value = row.fields.get("preference_score")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{row.where}: 'preference_score' must be a finite number, got {short(value)}")
    return float(value)


def _unrecognised(row: Row, accepted: str) -> InputError:
    found = listed(sorted(row.fields), 50) or "none"
    return InputError(f"{row.where}: fields not recognised: found {found}; accepted are {accepted}")


def last_text(value: Any) -> str:
    """What to show of a prompt or an answer: the last message of a conversation."""
    if isinstance(value, list):
        return str(value[-1].get("content") or "") if value else ""
    return str(value)
