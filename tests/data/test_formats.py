"""Each row format becomes its record, and what is no format is an error that names the place."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlora.data.formats import (
    ChatRecord,
    CompletionRecord,
    FramedPrompt,
    LabeledRecord,
    PairRecord,
    PromptRecord,
    TextRecord,
    labeled_record,
    preference_record,
    prompt_record,
    supervised_record,
)
from mlxlora.data.messages import as_messages, as_tools
from mlxlora.data.rows import Row, read_rows
from mlxlora.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared"
USER, ASSISTANT, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "1+1?"), ("assistant", "2"), ("assistant", "3"))
)
OWN = {"role": "system", "content": "a"}
SHAREGPT_USER = {"from": "human", "value": "1+1?"}


def row(**fields: Any) -> Row:
    return Row(fields, "a.jsonl", 7)


def test_supervised_formats() -> None:
    assert supervised_record(row(text="a")) == TextRecord("a", "a.jsonl:7")
    assert supervised_record(row(messages=[USER, ASSISTANT])) == ChatRecord([USER, ASSISTANT], "a.jsonl:7")
    assert supervised_record(row(prompt="a", completion="b", system="s")) == CompletionRecord("a", "b", "a.jsonl:7", system="s")
    assert supervised_record(row(prompt=[USER], completion=[ASSISTANT])) == CompletionRecord([USER], [ASSISTANT], "a.jsonl:7")
    assert supervised_record(row(prompt="1+1?", completion=[ASSISTANT])) == CompletionRecord([USER], [ASSISTANT], "a.jsonl:7")
    assert supervised_record(row(text=None, prompt="a", completion="b")) == CompletionRecord("a", "b", "a.jsonl:7")


def test_renamed_keys() -> None:
    assert supervised_record(row(body="a"), {"text": "body"}) == TextRecord("a", "a.jsonl:7")
    assert supervised_record(row(question="a", answer="b"), {"prompt": "question", "completion": "answer"}) == CompletionRecord(
        "a", "b", "a.jsonl:7"
    )
    assert prompt_record(row(problem="a", x=1), {"prompt": "problem"}) == PromptRecord("a", {"x": 1}, "a.jsonl:7")
    with pytest.raises(InputError, match="'body'"):
        supervised_record(row(text="a"), {"text": "body"})


def test_system_field_opens_the_conversation_once() -> None:
    own = {"role": "system", "content": "mine"}
    chat = supervised_record(row(messages=[USER, ASSISTANT], system="s"))
    assert isinstance(chat, ChatRecord) and chat.messages[0] == {"role": "system", "content": "s"}
    chat = supervised_record(row(messages=[own, USER, ASSISTANT], system="s"))
    assert isinstance(chat, ChatRecord) and chat.messages == [own, USER, ASSISTANT]


def test_sharegpt_roles_and_tool_calls() -> None:
    turns = [("human", "weather?"), ("function_call", '{"name": "now", "arguments": {}}'), ("observation", "sun"), ("gpt", "Sun.")]
    tools = '[{"name": "now", "parameters": {}}]'
    chat = supervised_record(row(conversations=[{"from": role, "value": value} for role, value in turns], tools=tools))
    assert isinstance(chat, ChatRecord)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]
    assert chat.messages[1]["content"] is None
    assert chat.tools == [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    assert supervised_record(row(conversations=[USER, ASSISTANT])) == ChatRecord([USER, ASSISTANT], "a.jsonl:7")
    assert as_messages([{"from": "function_call", "value": "plain"}], "", "")[0] == {"role": "assistant", "content": "plain"}


def test_openai_tool_calls_and_content_parts() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    user, answer = as_messages(
        [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}], "a.jsonl:7", "messages"
    )
    assert user["content"] == "ab"
    assert answer["content"] is None
    assert answer["tool_calls"][0]["function"]["arguments"] == '{"zone": "UTC"}'  # parsed if the template wants objects
    assert as_tools("[]", "a.jsonl:7") is None


def test_openais_former_calls_and_calls_as_text() -> None:
    function = {"name": "now", "arguments": '{"zone": "UTC"}'}
    call = {"type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    former = [
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "now", "content": "12"},
        {"role": "assistant", "content": "noon", "function_call": None},
    ]
    assert as_messages(former, "a.jsonl:7", "messages") == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"name": "now", "role": "tool", "content": "12"},
        {"role": "assistant", "content": "noon"},
    ]
    (message,) = as_messages([{"role": "assistant", "content": "", "tool_calls": orjson.dumps([call]).decode()}], "a.jsonl:7", "m")
    assert message == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert as_tools("null", "a.jsonl:7") is None
    assert (
        as_tools({"name": "now"}, "a.jsonl:7")
        == as_tools('{"name": "now"}', "a.jsonl:7")
        == [{"type": "function", "function": {"name": "now"}}]
    )


def test_pairs_given_to_sft_name_the_methods_for_pairs() -> None:
    with pytest.raises(InputError, match="which `mlxlora dpo`, orpo and cpo train"):
        supervised_record(row(prompt="1+1?", chosen="2", rejected="3"))


def test_parts_of_reasoning_and_names_of_roles() -> None:
    parts = [{"type": "thinking", "thinking": "1 and 1"}, {"type": "text", "text": "2"}, {"type": "text", "text": "!"}]
    (message,) = as_messages([{"role": "assistant", "content": parts}], "a.jsonl:7", "messages")
    assert message == {"reasoning_content": "1 and 1", "role": "assistant", "content": "2!"}
    given = ("human", "User", "prompter", "gpt", "ChatGPT", "model", "System", "observation", "developer", "critic")
    read = [message["role"] for message in as_messages([{"from": role, "value": "x"} for role in given], "a.jsonl:7", "c")]
    assert read == ["user", "user", "user", "assistant", "assistant", "assistant", "system", "tool", "developer", "critic"]


def test_alpaca_is_stanfords_prompt() -> None:
    plain = supervised_record(row(instruction="Add.", input="", output="2"))
    assert plain == CompletionRecord(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:",
        "2",
        "a.jsonl:7",
    )
    extra = supervised_record(row(instruction="Add.", input="1 1", output="2"))
    assert isinstance(plain, CompletionRecord) and isinstance(plain.prompt, FramedPrompt) and plain.prompt.asked == "Add."
    assert isinstance(extra, CompletionRecord) and "paired with an input" in extra.prompt and "### Input:\n1 1\n\n" in extra.prompt


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
    assert preference_record(row(**fields)) == PairRecord([USER], [ASSISTANT], [OTHER], "a.jsonl:7")


def test_preference_multi_turn_prompt_and_system() -> None:
    history = [USER, ASSISTANT, USER]
    record = preference_record(row(chosen=[*history, ASSISTANT], rejected=[*history, OTHER], system="s", preference_score=2))
    assert record.prompt == [{"role": "system", "content": "s"}, *history]
    assert (record.chosen, record.rejected, record.system, record.preference_score) == ([ASSISTANT], [OTHER], None, 2.0)


def test_identical_sides_keep_a_completion() -> None:
    record = preference_record(row(chosen=[USER, ASSISTANT], rejected=[USER, ASSISTANT]))
    assert (record.prompt, record.chosen, record.rejected) == ([USER], [ASSISTANT], [ASSISTANT])


def test_preference_strings() -> None:
    assert preference_record(row(prompt="a", chosen="b", rejected="c", system="s")) == PairRecord(
        "a", "b", "c", "a.jsonl:7", system="s"
    )
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert preference_record(row(chosen=start + " yes", rejected=start + " yo")) == PairRecord(start, " yes", " yo", "a.jsonl:7")
    assert preference_record(row(instruction="Add.", output="2", chosen="2", rejected="3")).prompt.endswith("### Response:")


def test_labeled() -> None:
    assert labeled_record(row(messages=[USER, ASSISTANT], label=True)) == LabeledRecord(
        CompletionRecord([USER], [ASSISTANT], "a.jsonl:7"), True
    )
    assert labeled_record(row(prompt="a", completion="b", label=False)) == LabeledRecord(
        CompletionRecord("a", "b", "a.jsonl:7"), False
    )


def test_prompt_rows_keep_columns() -> None:
    assert prompt_record(row(prompt="a", answer="b", level=3)) == PromptRecord("a", {"answer": "b", "level": 3}, "a.jsonl:7")
    assert prompt_record(row(question="a", answer="b")) == PromptRecord("a", {"answer": "b"}, "a.jsonl:7")
    assert prompt_record(row(prompt="a", question="q", system="s")) == PromptRecord("a", {"question": "q"}, "a.jsonl:7", system="s")
    assert prompt_record(row(prompt=[USER], system="s")).prompt == [{"role": "system", "content": "s"}, USER]


@pytest.mark.parametrize(
    ("read", "fields", "says"),
    [
        (supervised_record, {"b": 1, "a": 2}, "found a, b; accepted are 'messages'"),
        (supervised_record, {}, "found none"),
        (supervised_record, {"prompt": "a"}, "found prompt"),
        (supervised_record, {"prompt": 3, "completion": "b"}, "'prompt' must be a string or a list of messages, got int 3"),
        (supervised_record, {"prompt": "a", "completion": ""}, "'completion' is empty"),
        (supervised_record, {"prompt": [USER], "completion": [USER]}, "'completion' has no assistant message; roles found: user"),
        (supervised_record, {"text": ["a"]}, "'text' must be a string, got list"),
        (supervised_record, {"text": ""}, "'text' is empty"),
        (supervised_record, {"messages": []}, "at least one message"),
        (supervised_record, {"messages": "hello"}, "got str 'hello'"),
        (supervised_record, {"messages": [{"role": "user"}]}, "content of a message of 'messages' must be a string, got NoneType"),
        (supervised_record, {"messages": [{"content": "x"}]}, "must have a 'role'"),
        (supervised_record, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be a string, got list"),
        (supervised_record, {"messages": [{"role": "assistant", "content": "", "tool_calls": "x"}]}, "'tool_calls' in 'messages'"),
        (supervised_record, {"messages": [USER], "tools": "{"}, "'tools' is not JSON"),
        (supervised_record, {"messages": [USER], "tools": {"a": 1}}, "'tools' must be a list"),
        (supervised_record, {"instruction": "a", "output": ""}, "'output' is empty"),
        (supervised_record, {"prompt": "a", "completion": "b", "system": 3}, "'system' must be a string, got int 3"),
        (preference_record, {"prompt": "a", "chosen": "b"}, "found chosen, prompt; accepted are 'prompt' + 'chosen' + 'rejected'"),
        (preference_record, {"chosen": "b", "rejected": "c"}, "add a 'prompt' field"),
        (preference_record, {"chosen": [ASSISTANT], "rejected": [OTHER]}, "share no first message"),
        (preference_record, {"prompt": [USER], "chosen": [USER], "rejected": [OTHER]}, "'chosen' has no assistant message"),
        (
            preference_record,
            {"prompt": "a", "chosen": "b", "rejected": 5},
            "'rejected' must be a string or a list of messages, got int 5",
        ),
        (preference_record, {"prompt": "a", "chosen": "b", "rejected": "c", "preference_score": float("nan")}, "finite number"),
        (preference_record, {"prompt": "a", "chosen": "b", "rejected": "c", "preference_score": True}, "got bool True"),
        (
            preference_record,
            {"prompt": "a", "chosen": "", "rejected": "c"},
            "'chosen' is empty; write a completion or remove the row",
        ),
        (preference_record, {"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty; write a completion"),
        (preference_record, {"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' is empty; write a completion"),
        (preference_record, {"prompt": [USER], "chosen": "", "rejected": [OTHER]}, "message 1 of 'chosen' is an empty answer"),
        (
            preference_record,
            {"instruction": "a", "output": ["b", "c", "d"]},
            "'output' must list two answers, the better one first, got 3",
        ),
        (
            preference_record,
            {"prompt": [USER], "chosen": [SHAREGPT_USER, ASSISTANT], "rejected": [{**USER, "content": "1+1 "}, OTHER]},
            "'rejected' begins with a user message that is not the prompt's",
        ),
        (
            preference_record,
            {"prompt": [OWN, USER], "chosen": [{**OWN, "content": "b"}, USER, ASSISTANT], "rejected": [OTHER]},
            "different system messages",
        ),
        (
            supervised_record,
            {"prompt": [USER], "completion": [{"role": "tool", "content": "3"}, ASSISTANT]},
            "begins with a tool message",
        ),
        (
            supervised_record,
            {"messages": [USER, {"role": "assistant", "content": ""}]},
            "message 2 of 'messages' is an empty answer; write one",
        ),
        (
            supervised_record,
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "message 2 of 'messages' is an empty answer",
        ),
        (supervised_record, {"messages": [{"role": "tool", "content": {"a": 1}}]}, "got dict {'a': 1}; write it as JSON text"),
        (
            supervised_record,
            {"messages": [USER, {**ASSISTANT, "function_call": "x"}]},
            "'function_call' in 'messages' must be a list",
        ),
        (
            supervised_record,
            {"messages": [USER, {**ASSISTANT, "weight": 0.5}]},
            "'weight' of message 2 of 'messages' must be 0 or 1",
        ),
        (supervised_record, {"messages": [USER, {**ASSISTANT, "train": "no"}]}, "false or true, got str 'no'"),
        (
            supervised_record,
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": "x"},
            "'chat_template_kwargs' must be an object",
        ),
        (labeled_record, {"prompt": "a", "completion": "b", "label": 1}, "'label' must be true or false, got int 1"),
        (labeled_record, {"prompt": "a", "completion": "b"}, "found completion, prompt"),
        (labeled_record, {"messages": [USER], "label": True}, "an assistant's answer"),
        (prompt_record, {"answer": "a"}, "found answer"),
        (prompt_record, {"prompt": ""}, "'prompt' is empty"),
        (prompt_record, {"prompt": 1.5}, "got float 1.5"),
    ],
)
def test_errors_name_place_field_and_value(read: Any, fields: dict, says: str) -> None:
    with pytest.raises(InputError) as raised:
        read(Row(fields, "a.jsonl", 7))
    assert str(raised.value).startswith("a.jsonl:7: ")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


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
    for read in (supervised_record, preference_record, labeled_record, prompt_record):
        try:
            record = read(Row(fields, "a.jsonl", 7))
        except InputError as error:
            assert str(error).startswith("a.jsonl:7: ")
        else:
            assert isinstance(record, (TextRecord, CompletionRecord, ChatRecord, PairRecord, LabeledRecord, PromptRecord))


@given(st.dictionaries(names, values, max_size=5))
@settings(deadline=None, max_examples=50)
def test_recognition_leaves_the_row_alone(fields: dict) -> None:
    before = orjson.dumps(fields)
    for read in (supervised_record, preference_record, labeled_record, prompt_record):
        try:
            read(Row(fields, "a.jsonl", 7))
        except InputError:
            continue
    assert orjson.dumps(fields) == before


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_every_row_of_the_real_data_is_read() -> None:
    readers = {
        "preference": preference_record,
        "dpo": preference_record,
        "hh": preference_record,
        "kto": labeled_record,
        "gsm8k": prompt_record,
    }
    files = [
        file for file in sorted((SHARED / "data").iterdir()) if file.suffix in (".json", ".jsonl", ".gz") and file.stem != "svamp"
    ]
    assert files
    for file in files:
        read = next((reader for name, reader in readers.items() if name in file.name), supervised_record)
        assert all(read(r) for r in read_rows(file))


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "12:00"}


@pytest.mark.parametrize(
    ("prompt", "side"),
    [
        ([USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER]),
        ([SYSTEM, USER], [SYSTEM, USER]),
        ([SYSTEM, USER], []),
        ([SYSTEM, USER], [SYSTEM]),
        ([USER], [SYSTEM]),
        ("1+1?", [SYSTEM, USER]),
    ],
)
def test_a_prompt_that_the_sides_repeat_is_there_once(prompt: Any, side: list[dict]) -> None:
    """The system message too, whichever of them brings it."""
    pair = preference_record(row(prompt=prompt, chosen=[*side, ASSISTANT], rejected=[*side, OTHER]))
    assert (pair.prompt, pair.chosen, pair.rejected) == ([SYSTEM, USER], [ASSISTANT], [OTHER])
    record = supervised_record(row(prompt=prompt, completion=[*side, ASSISTANT]))
    assert isinstance(record, CompletionRecord)
    assert (record.prompt, record.completion) == ([SYSTEM, USER], [ASSISTANT])
    labels = labeled_record(row(prompt=prompt, completion=[*side, ASSISTANT], label=True))
    assert (labels.completion.prompt, labels.completion.completion) == ([SYSTEM, USER], [ASSISTANT])


def test_answers_that_begin_alike_keep_their_prompt() -> None:
    """A prompt of its own is where completions start, also if both start with the same words."""
    sides = {"chosen": [OTHER, USER, ASSISTANT], "rejected": [OTHER, USER, OTHER]}
    for prompt in ("1+1?", [USER]):
        record = preference_record(row(prompt=prompt, **sides))
        assert (record.prompt, record.chosen, record.rejected) == ([USER], sides["chosen"], sides["rejected"])


def test_a_tools_answer_may_begin_a_completion() -> None:
    record = supervised_record(row(prompt=[USER, CALL], completion=[RESULT, ASSISTANT]))
    assert isinstance(record, CompletionRecord) and record.completion == [RESULT, ASSISTANT]


def test_weights_have_one_form() -> None:
    for key, value in (("weight", 0), ("weight", 0.0), ("train", False), ("loss", False)):
        chat = supervised_record(row(messages=[USER, {**ASSISTANT, key: value}, USER, OTHER]))
        assert isinstance(chat, ChatRecord) and chat.messages == [USER, {**ASSISTANT, "weight": 0}, USER, OTHER]
    for key, value in (("weight", 1), ("train", True), ("loss", True), ("weight", None)):
        chat = supervised_record(row(messages=[USER, {**ASSISTANT, key: value}]))
        assert isinstance(chat, ChatRecord) and chat.messages == [USER, ASSISTANT]
    begun = [USER, {**ASSISTANT, "weight": 0}, USER]
    assert prompt_record(row(prompt=begun)).prompt == [USER, ASSISTANT, USER]
    assert supervised_record(row(prompt=begun, completion=[OTHER])).prompt == [USER, ASSISTANT, USER]
    assert preference_record(row(chosen=[*begun, ASSISTANT], rejected=[USER, ASSISTANT, USER, OTHER])).prompt == [
        USER,
        ASSISTANT,
        USER,
    ]


def test_untrained_answers_may_be_empty() -> None:
    chat = supervised_record(row(messages=[USER, {"role": "assistant", "content": "", "weight": 0}, USER, OTHER]))
    assert isinstance(chat, ChatRecord)
    assert supervised_record(row(messages=[USER, CALL, RESULT, OTHER])).messages == [USER, CALL, RESULT, OTHER]


def test_template_arguments_and_functions() -> None:
    schema = {"name": "now", "parameters": {}}
    extra = {"functions": [schema], "chat_template_kwargs": {"enable_thinking": False}}
    readers = (
        (supervised_record, {"messages": [USER, ASSISTANT]}),
        (supervised_record, {"prompt": [USER], "completion": [ASSISTANT]}),
        (preference_record, {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}),
        (prompt_record, {"prompt": [USER]}),
    )
    for read, fields in readers:
        record = read(row(**fields, **extra))
        assert record.tools == [{"type": "function", "function": schema}]
        assert record.template_args == {"enable_thinking": False}
        assert read(row(**fields, chat_template_kwargs=None)).template_args is None
    assert prompt_record(row(prompt="a", **extra)).columns == {}


def test_columns_of_published_pairs() -> None:
    """Intel's orca_dpo_pairs, and the lists of reward models, the better answer first."""
    record = preference_record(row(question="q", chosen="a", rejected="b", system="s"))
    assert record == PairRecord("q", "a", "b", "a.jsonl:7", system="s")
    record = preference_record(row(instruction="Add.", input="1 1", output=["2", "3"]))
    assert (record.chosen, record.rejected) == ("2", "3") and record.prompt.endswith("### Input:\n1 1\n\n### Response:")
