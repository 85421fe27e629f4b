"""Reading rows and recognising what they are."""

import gzip
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlora.data.formats import (
    Chat,
    Completion,
    Labeled,
    Preference,
    PromptRow,
    Text,
    labeled,
    preference,
    prompt_row,
    supervised,
)
from mlxlora.data.messages import as_messages, as_tools
from mlxlora.data.rows import Row, read_rows, read_splits, split_off
from mlxlora.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared"
USER, ASSISTANT, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "1+1?"), ("assistant", "2"), ("assistant", "3"))
)
SHAREGPT_USER = {"from": "human", "value": "1+1?"}


def row(**fields: Any) -> Row:
    return Row(fields, "a.jsonl", 7)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_skips_blank_lines_and_keeps_line_numbers(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": "\xc3\xa9"}')
    assert [(r.fields["text"], r.line) for r in read_rows(path)] == [("a", 1), ("é", 4)]
    assert read_rows(path)[1].location == f"{path}:4"


def test_json_list_counts_rows_as_lines(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.json", b'[{"text": "a"},\n{"text": "b"}]'))
    assert [(r.fields["text"], r.line) for r in rows] == [("a", 1), ("b", 2)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": NaN}\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"a": 1e999}\n', "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"a": 1\n', "one JSON object per line"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl:1: not UTF-8"),
        ("a.jsonl", b"\n[1, 2]\n", "a.jsonl:2: a row must be a JSON object, got list [1, 2]"),
        ("a.jsonl", b"\n \n", "a.jsonl: no rows"),
        ("a.jsonl", b"", "a.jsonl: no rows"),
        ("a.json", b"", "a.json: no rows"),
        ("a.json", b"[]", "a.json: no rows"),
        ("a.json", b'{"a": 1}', "a.json:1: must be a list of objects, got dict"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "as .jsonl"),
        ("a.json", b"[{}, 3]", "a.json:2: a row must be a JSON object, got int 3"),
        ("a.csv", b"a,b", "a.csv: unknown kind of file"),
    ],
)
def test_broken_files_name_place_value_and_remedy(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as in_loraplus_group:
        read_rows(path)
    assert says in str(in_loraplus_group.value)
    assert "\n" not in str(in_loraplus_group.value)


def test_broken_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    for content in (b"plain text", whole[:-12]):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.jsonl\.gz: cannot be read"):
            read_rows(path)


@given(st.binary(max_size=60))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_rows_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name in ("any.jsonl", "any.json"):
        try:
            rows = read_rows(write(folder / name, content))
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert rows


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", b'{"text": "a"}')
    assert list(read_splits(tmp_path)) == ["train"]
    write(tmp_path / "valid.jsonl", b'{"text": "b"}')
    write(tmp_path / "test.jsonl", b'{"text": "c"}')
    assert {split: rows[0].fields["text"] for split, rows in read_splits(str(tmp_path)).items()} == {
        "train": "a",
        "valid": "b",
        "test": "c",
    }
    assert list(read_splits(tmp_path / "test.jsonl")) == ["train"]


def test_folder_without_training_rows_lists_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no train\.jsonl in this folder; found nothing"):
        read_splits(tmp_path)
    write(tmp_path / "valid.jsonl", b'{"text": "b"}')
    with pytest.raises(InputError, match=r"found valid\.jsonl"):
        read_splits(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/x", "data/train.jsonl", "a/b/c", "/nowhere/x"])
def test_what_cannot_be_a_hub_name_is_a_missing_file(name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_splits(name)


def test_hub_name_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'mlxlora\[datasets\]'"):
        read_splits("org/name")


def fake_datasets(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict]]) -> list[tuple]:
    asked: list[tuple] = []

    def load(*name: str) -> dict[str, list[dict]]:
        asked.append(name)
        if not splits:
            raise ValueError("Dataset doesn't exist\non the hub")
        return splits

    module = ModuleType("datasets")
    module.load_dataset = module.load_from_disk = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize("valid", ["valid", "validation", "dev"])
def test_hub_splits(monkeypatch: pytest.MonkeyPatch, valid: str) -> None:
    asked = fake_datasets(monkeypatch, {"train": [{"text": "a"}], valid: [{"text": "b"}]})
    splits = read_splits("org/name:main")
    assert asked == [("org/name", "main")]
    assert {split: rows[0].fields["text"] for split, rows in splits.items()} == {"train": "a", "valid": "b"}
    assert splits["valid"][0].location == "org/name:main[valid]:1"


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, {})
    with pytest.raises(InputError, match="org/name: cannot be loaded: Dataset doesn't exist on the hub"):
        read_splits("org/name")
    fake_datasets(monkeypatch, {"test": [{}]})
    with pytest.raises(InputError, match="no train split; found test"):
        read_splits("org/name")


def test_folder_that_only_datasets_can_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", b"PAR1")
    asked = fake_datasets(monkeypatch, {"train": [{"text": "a"}]})
    assert read_splits(tmp_path)["train"][0].fields == {"text": "a"}
    assert asked == [(str(tmp_path),)]


@given(st.integers(2, 60), st.floats(0, 1), st.integers(0, 10))
@settings(deadline=None, max_examples=100)
def test_split_off_parts_the_rows(count: int, fraction: float, seed: int) -> None:
    rows = [Row({}, "a.jsonl", line) for line in range(1, count + 1)]
    train, valid = split_off(rows, fraction, seed)
    assert train and valid
    assert sorted(r.line for r in train + valid) == list(range(1, count + 1))
    assert abs(len(valid) - fraction * count) <= 1
    assert split_off(rows, fraction, seed) == (train, valid)
    assert [r.line for r in train] == sorted(r.line for r in train)


def test_split_off_needs_two_rows() -> None:
    with pytest.raises(InputError, match="at least 2 rows"):
        split_off([row()], 0.5, 0)


def test_supervised_formats() -> None:
    assert supervised(row(text="a")) == Text("a", "a.jsonl:7")
    assert supervised(row(messages=[USER, ASSISTANT])) == Chat([USER, ASSISTANT], "a.jsonl:7")
    assert supervised(row(prompt="a", completion="b", system="s")) == Completion("a", "b", "a.jsonl:7", system="s")
    assert supervised(row(prompt=[USER], completion=[ASSISTANT])) == Completion([USER], [ASSISTANT], "a.jsonl:7")
    assert supervised(row(prompt="1+1?", completion=[ASSISTANT])) == Completion([USER], [ASSISTANT], "a.jsonl:7")
    assert supervised(row(text=None, prompt="a", completion="b")) == Completion("a", "b", "a.jsonl:7")


def test_renamed_keys() -> None:
    assert supervised(row(body="a"), {"text": "body"}) == Text("a", "a.jsonl:7")
    assert supervised(row(question="a", answer="b"), {"prompt": "question", "completion": "answer"}) == Completion(
        "a", "b", "a.jsonl:7"
    )
    assert prompt_row(row(problem="a", x=1), {"prompt": "problem"}) == PromptRow("a", {"x": 1}, "a.jsonl:7")
    with pytest.raises(InputError, match="'body'"):
        supervised(row(text="a"), {"text": "body"})


def test_system_field_opens_the_conversation_once() -> None:
    own = {"role": "system", "content": "mine"}
    chat = supervised(row(messages=[USER, ASSISTANT], system="s"))
    assert isinstance(chat, Chat) and chat.messages[0] == {"role": "system", "content": "s"}
    chat = supervised(row(messages=[own, USER, ASSISTANT], system="s"))
    assert isinstance(chat, Chat) and chat.messages == [own, USER, ASSISTANT]


def test_sharegpt_roles_and_tool_calls() -> None:
    turns = [("human", "weather?"), ("function_call", '{"name": "now", "arguments": {}}'), ("observation", "sun"), ("gpt", "Sun.")]
    tools = '[{"name": "now", "parameters": {}}]'
    chat = supervised(row(conversations=[{"from": role, "value": value} for role, value in turns], tools=tools))
    assert isinstance(chat, Chat)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]
    assert chat.messages[1]["content"] is None
    assert chat.tools == [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    assert supervised(row(conversations=[USER, ASSISTANT])) == Chat([USER, ASSISTANT], "a.jsonl:7")
    assert as_messages([{"from": "function_call", "value": "plain"}], "", "")[0] == {"role": "assistant", "content": "plain"}


def test_openai_tool_calls_and_content_parts() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    user, answer = as_messages(
        [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}], "a.jsonl:7", "messages"
    )
    assert user["content"] == "ab"
    assert answer["content"] is None
    assert answer["tool_calls"][0]["function"]["arguments"] == {"zone": "UTC"}
    assert as_tools("[]", "a.jsonl:7") is None


def test_alpaca_is_stanfords_prompt() -> None:
    plain = supervised(row(instruction="Add.", input="", output="2"))
    assert plain == Completion(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:",
        "2",
        "a.jsonl:7",
    )
    extra = supervised(row(instruction="Add.", input="1 1", output="2"))
    assert isinstance(extra, Completion) and "paired with an input" in extra.prompt and "### Input:\n1 1\n\n" in extra.prompt


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
        {"prompt": "1+1?", "chosen": [ASSISTANT], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": "2", "rejected": "3"},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {"chosen": {"messages": [USER, ASSISTANT]}, "rejected": {"messages": [USER, OTHER]}},
        {"prompt": "1+1?", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {"conversations": [SHAREGPT_USER], "chosen": {"from": "gpt", "value": "2"}, "rejected": {"from": "gpt", "value": "3"}},
    ],
)
def test_preference_conversations_are_one_record(fields: dict) -> None:
    assert preference(row(**fields)) == Preference([USER], [ASSISTANT], [OTHER], "a.jsonl:7")


def test_preference_multi_turn_prompt_and_system() -> None:
    history = [USER, ASSISTANT, USER]
    record = preference(row(chosen=[*history, ASSISTANT], rejected=[*history, OTHER], system="s", preference_score=2))
    assert record.prompt == [{"role": "system", "content": "s"}, *history]
    assert (record.chosen, record.rejected, record.system, record.preference_score) == ([ASSISTANT], [OTHER], None, 2.0)


def test_identical_sides_keep_a_completion() -> None:
    record = preference(row(chosen=[USER, ASSISTANT], rejected=[USER, ASSISTANT]))
    assert (record.prompt, record.chosen, record.rejected) == ([USER], [ASSISTANT], [ASSISTANT])


def test_preference_strings() -> None:
    assert preference(row(prompt="a", chosen="b", rejected="c", system="s")) == Preference("a", "b", "c", "a.jsonl:7", system="s")
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert preference(row(chosen=start + " yes", rejected=start + " yo")) == Preference(start, " yes", " yo", "a.jsonl:7")
    assert preference(row(instruction="Add.", output="2", chosen="2", rejected="3")).prompt.endswith("### Response:")


def test_labeled() -> None:
    assert labeled(row(messages=[USER, ASSISTANT], label=True)) == Labeled(Completion([USER], [ASSISTANT], "a.jsonl:7"), True)
    assert labeled(row(prompt="a", completion="b", label=False)) == Labeled(Completion("a", "b", "a.jsonl:7"), False)


def test_prompt_rows_keep_columns() -> None:
    assert prompt_row(row(prompt="a", answer="b", level=3)) == PromptRow("a", {"answer": "b", "level": 3}, "a.jsonl:7")
    assert prompt_row(row(question="a", answer="b")) == PromptRow("a", {"answer": "b"}, "a.jsonl:7")
    assert prompt_row(row(prompt="a", question="q", system="s")) == PromptRow("a", {"question": "q"}, "a.jsonl:7", system="s")
    assert prompt_row(row(prompt=[USER], system="s")).prompt == [{"role": "system", "content": "s"}, USER]


@pytest.mark.parametrize(
    ("read", "fields", "says"),
    [
        (supervised, {"b": 1, "a": 2}, "found a, b; accepted are 'messages'"),
        (supervised, {}, "found none"),
        (supervised, {"prompt": "a"}, "found prompt"),
        (supervised, {"prompt": 3, "completion": "b"}, "'prompt' must be a string or a list of messages, got int 3"),
        (supervised, {"prompt": "a", "completion": ""}, "'completion' is empty"),
        (supervised, {"prompt": [USER], "completion": [USER]}, "'completion' has no assistant message; roles found: user"),
        (supervised, {"text": ["a"]}, "'text' must be a string, got list"),
        (supervised, {"text": ""}, "'text' is empty"),
        (supervised, {"messages": []}, "at least one message"),
        (supervised, {"messages": "hello"}, "got str 'hello'"),
        (supervised, {"messages": [{"role": "user"}]}, "content of a message of 'messages' must be a string, got NoneType"),
        (supervised, {"messages": [{"content": "x"}]}, "must have a 'role'"),
        (supervised, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be a string, got list"),
        (supervised, {"messages": [{"role": "assistant", "content": "", "tool_calls": "x"}]}, "'tool_calls' in 'messages'"),
        (supervised, {"messages": [USER], "tools": "{"}, "'tools' is not JSON"),
        (supervised, {"messages": [USER], "tools": {"a": 1}}, "'tools' must be a list"),
        (supervised, {"instruction": "a", "output": ""}, "'output' is empty"),
        (supervised, {"prompt": "a", "completion": "b", "system": 3}, "'system' must be a string, got int 3"),
        (preference, {"prompt": "a", "chosen": "b"}, "found chosen, prompt; accepted are 'prompt' + 'chosen' + 'rejected'"),
        (preference, {"chosen": "b", "rejected": "c"}, "add a 'prompt' field"),
        (preference, {"chosen": [ASSISTANT], "rejected": [OTHER]}, "share no first message"),
        (preference, {"prompt": [USER], "chosen": [USER], "rejected": [OTHER]}, "'chosen' has no assistant message"),
        (preference, {"prompt": "a", "chosen": "b", "rejected": 5}, "'rejected' must be a string or a list of messages, got int 5"),
        (preference, {"prompt": "a", "chosen": "b", "rejected": "c", "preference_score": float("nan")}, "finite number"),
        (preference, {"prompt": "a", "chosen": "b", "rejected": "c", "preference_score": True}, "got bool True"),
        (labeled, {"prompt": "a", "completion": "b", "label": 1}, "'label' must be true or false, got int 1"),
        (labeled, {"prompt": "a", "completion": "b"}, "found completion, prompt"),
        (labeled, {"messages": [USER], "label": True}, "an assistant's answer"),
        (prompt_row, {"answer": "a"}, "found answer"),
        (prompt_row, {"prompt": ""}, "'prompt' is empty"),
        (prompt_row, {"prompt": 1.5}, "got float 1.5"),
    ],
)
def test_errors_name_place_field_and_value(read: Any, fields: dict, says: str) -> None:
    with pytest.raises(InputError) as in_loraplus_group:
        read(Row(fields, "a.jsonl", 7))
    assert str(in_loraplus_group.value).startswith("a.jsonl:7: ")
    assert says in str(in_loraplus_group.value)
    assert "\n" not in str(in_loraplus_group.value)


names = st.sampled_from(
    [
        "text",
        "messages",
        "conversations",
        "prompt",
        "completion",
        "chosen",
        "rejected",
        "system",
        "tools",
        "label",
        "instruction",
        "input",
        "output",
        "role",
        "content",
        "from",
        "value",
        "question",
        "answer",
        "preference_score",
        "tool_calls",
        "name",
        "arguments",
    ]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "[]"])
)
messages = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": scalars})
values = st.recursive(
    scalars | st.lists(messages, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(names, values, max_size=5))
@settings(deadline=None, max_examples=400)
def test_any_row_is_a_record_or_an_input_error(fields: dict) -> None:
    for read in (supervised, preference, labeled, prompt_row):
        try:
            record = read(Row(fields, "a.jsonl", 7))
        except InputError as error:
            assert str(error).startswith("a.jsonl:7: ")
        else:
            assert isinstance(record, (Text, Completion, Chat, Preference, Labeled, PromptRow))


@given(st.dictionaries(names, values, max_size=5))
@settings(deadline=None, max_examples=50)
def test_recognition_leaves_the_row_alone(fields: dict) -> None:
    before = orjson.dumps(fields)
    for read in (supervised, preference, labeled, prompt_row):
        try:
            read(Row(fields, "a.jsonl", 7))
        except InputError:
            continue
    assert orjson.dumps(fields) == before


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_every_row_of_the_real_data_is_read() -> None:
    readers = {"preference": preference, "dpo": preference, "hh": preference, "kto": labeled, "gsm8k": prompt_row}
    files = [
        file for file in sorted((SHARED / "data").iterdir()) if file.suffix in (".json", ".jsonl", ".gz") and file.stem != "svamp"
    ]
    assert files
    for file in files:
        read = next((reader for name, reader in readers.items() if name in file.name), supervised)
        assert all(read(r) for r in read_rows(file))
