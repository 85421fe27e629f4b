"""Rendered conversations: cases from the field, what templates accept, and which tokens turns wrote."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from mlxlora import starter
from mlxlora.data.chat_template import assistant_turns, render
from mlxlora.data.conversation import token_ids
from mlxlora.data.messages import as_messages
from mlxlora.data.rows import Row, read_rows
from mlxlora.data.sources import rows
from mlxlora.data.stop_tokens import use_stop_tokens
from mlxlora.data.tokenize import Example, preference_pair, prompt_example, supervised_example
from mlxlora.errors import InputError

from ..support.chat import chat_tokenizer, trained_texts
from ..support.paths import SHARED, Outcome
from ..support.templates import TEMPLATES

FIELD = SHARED / "field"
needs_field = pytest.mark.skipif(not FIELD.is_dir(), reason="needs ../shared/field")
ROLES = ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|observation|>")

CHAT = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]
CALL = {"type": "function", "id": "c1", "function": {"name": "ls", "arguments": '{"path":"/tmp"}'}}
ASKED = [{"role": "user", "content": "List"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]


def tokenizer(template: str) -> TokenizerWrapper:
    tok = chat_tokenizer(template, ROLES)
    use_stop_tokens(tok)
    return tok


def turns(template: str, messages: list[dict], **how: Any) -> list[str]:
    tok = tokenizer(template)
    ids, mask = assistant_turns(tok, messages, "a.jsonl:7", **how)
    return trained_texts(ids, mask, tok)


def text(template: str, messages: list[dict], **how: Any) -> str:
    tok = tokenizer(template)
    return tok.decode(render(tok, messages, "a.jsonl:7", **how))


def field_template(case: str, template: str = "template.jinja") -> TokenizerWrapper:
    return tokenizer((FIELD / case / template).read_text())


def field_turns(case: str, file: str = "train.jsonl") -> list[list[str]]:
    """The trained texts of each row of a case."""
    tok = field_template(case)
    examples = [supervised_example(row, tok, mask_prompt=True) for row in read_rows(FIELD / case / file)]
    return [trained(example, tok) for example in examples]


def trained(example: Example | None, tok: TokenizerWrapper) -> list[str]:
    assert example is not None
    return trained_texts(example.tokens.tolist(), example.loss_mask.tolist(), tok)


@needs_field
def test_repeated_turns_think() -> None:
    running, last = "running<|im_end|>\n", "<think>\n\n</think>\n\nrunning<|im_end|>\n"
    assert field_turns("repeated_turns_think") == [
        [running, running, last],
        ["Well. Go on.<|im_end|>\n", "Go on.<|im_end|>\n", "<think>\n\n</think>\n\nGo on.<|im_end|>\n"],
        [running, "<think>\n\n</think>\n\ndone<|im_end|>\n"],
    ]


@needs_field
def test_qwen35_opening() -> None:
    assert field_turns("qwen35_opening") == [["Welcome!<|im_end|>\n", "How can I help?<|im_end|>\n"]]


@needs_field
def test_glm_stop_token() -> None:
    rows = field_turns("glm_stop_token")
    assert rows[0] == ["zero<|user|>", "Bye<|user|>"]
    assert all(turn.endswith("<|user|>") for row in rows for turn in row)
    tok, row = field_template("glm_stop_token"), read_rows(FIELD / "glm_stop_token/train.jsonl")[0]
    whole = supervised_example(row, tok)
    assert whole is not None and tok.decode(whole.tokens).endswith("\nBye<|user|>") and whole.loss_mask[-1]


@needs_field
def test_eos_in_generation_config() -> None:
    assert field_turns("eos_in_generation_config")[0] == ["zero<|im_end|>"]  # the marks have the content only


@needs_field
def test_roles_dropped() -> None:
    tok, rows = field_template("roles_dropped"), read_rows(FIELD / "roles_dropped/train.jsonl")
    texts = []
    for row in rows:
        example = supervised_example(row, tok, mask_prompt=True)
        assert example is not None
        texts.append(tok.decode(example.tokens))
    assert "<|im_start|>system\nAnswer in French.<|im_end|>" in texts[0]
    assert "<|im_start|>assistant\nHello<|im_end|>" in texts[1]
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>" in texts[2]
    assert "[tool]42" in texts[3] and "[tool]42" in texts[4]
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>" in texts[5]


@needs_field
def test_toolargs_string() -> None:
    assert field_turns("toolargs_string") == [['[call]ls {"path": "/tmp"}[/call]<|im_end|>\n', "One file: a.txt<|im_end|>\n"]]


@needs_field
def test_gemma_system() -> None:
    tok = field_template("gemma_system")
    remedy = r"System role not supported; put the text of the system message at the beginning of the first user message$"
    for file in ("train.jsonl", "pc.jsonl"):
        (row,) = read_rows(FIELD / "gemma_system" / file)
        with pytest.raises(InputError, match=rf"{file}:1: the model's chat template rejects this conversation: {remedy}"):
            supervised_example(row, tok, use_chat_template=True)
    assert field_turns("gemma_system", "empty.jsonl") == [["Hello<|im_end|>\n"]]  # an empty one is left out


@needs_field
def test_message_weight() -> None:
    for row in read_rows(FIELD / "message_weight/train.jsonl"):
        tok = tokenizer(TEMPLATES["chatml"])
        assert trained(supervised_example(row, tok, mask_prompt=True), tok) == ["Lima.<|im_end|>\n"]


@needs_field
def test_prefill_prompt() -> None:
    tok, begun = tokenizer(TEMPLATES["chatml"]), "<|im_start|>assistant\nSure, a fruit is"
    sft, pairs, prompts = (read_rows(FIELD / "prefill_prompt" / f"{name}.jsonl")[0] for name in ("sft", "pairs", "prompts"))
    assert trained(supervised_example(sft, tok, mask_prompt=True), tok) == [" apple.<|im_end|>\n"]
    pair, prompt = preference_pair(pairs, tok), prompt_example(prompts, tok)
    assert pair is not None and prompt is not None
    assert [trained(side, tok) for side in (pair.chosen, pair.rejected)] == [[" apple.<|im_end|>\n"], [" rock.<|im_end|>\n"]]
    assert tok.decode(prompt.tokens).endswith(begun)


def test_ends_of_harmony() -> None:
    final = "<|channel|>final<|message|>2"
    assert turns(TEMPLATES["harmony"], CHAT) == [f"{final}<|end|>", f"{final}<|return|>"]
    thought = [*CHAT[:3], {**CHAT[3], "reasoning_content": "hm"}]
    reasoned = f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{final}<|return|>"
    assert turns(TEMPLATES["harmony"], thought) == [f"{final}<|end|>", reasoned]


def test_names_of_calls_in_the_answers_of_tools_are_not_trained() -> None:
    chat = [*ASKED, {"role": "tool", "content": "a.txt"}, {"role": "assistant", "content": "One."}]
    assert turns(TEMPLATES["harmony"], chat) == [
        ' to=ls<|message|>{"path": "/tmp"}<|call|>',
        "<|channel|>final<|message|>One.<|return|>",
    ]


def test_answers_of_tools_inside_a_turn_are_not_trained() -> None:
    chat = [*ASKED, {"role": "tool", "content": "a.txt"}, {"role": "assistant", "content": "One."}]
    chat = [{**message, "content": message["content"] or ""} for message in chat]
    call = '<|tool_call>call:ls{"path": "/tmp"}<tool_call|><|tool_response>'
    assert turns(TEMPLATES["embedding"], chat) == [call, "One.<turn|>\n"]


def test_the_next_header_ends_a_turn_that_has_no_end() -> None:
    assert turns(TEMPLATES["headers"], CHAT) == ["\n2<|user|>", "\n2<|user|>"]
    assert turns(TEMPLATES["headers"], ASKED)[0].endswith("</tool_call><|observation|>")
    assert text(TEMPLATES["headers"], CHAT[:2]).endswith("<|assistant|>\n2<|user|>")
    assert text(TEMPLATES["headers"], CHAT[:3]).endswith("1+1?")
    assert text(TEMPLATES["headers"], CHAT[:1], generation_prompt=True).endswith("<|assistant|>")


def test_turns_are_chosen() -> None:
    assert turns(TEMPLATES["chatml"], CHAT, trained=[3]) == ["2<|im_end|>\n"]
    assert turns(TEMPLATES["headers"], CHAT, trained=[1]) == ["\n2<|user|>"]
    assert turns(TEMPLATES["chatml"], CHAT, trained=[]) == []


def test_train_on_the_last_turn() -> None:
    tok = tokenizer(TEMPLATES["chatml"])
    chat = [*CHAT, {"role": "user", "content": "?"}, {"role": "assistant", "content": "3", "weight": 0}]
    row = Row({"messages": [{**message, "content": f"{message['content']}{i}"} for i, message in enumerate(chat)]}, "a.jsonl", 7)
    last = supervised_example(row, tok, mask_prompt=True, train_on="last")
    assert trained(last, tok) == ["23<|im_end|>\n"]  # of those that are to be trained
    assert trained(supervised_example(row, tok, mask_prompt=True), tok) == ["21<|im_end|>\n", "23<|im_end|>\n"]
    with pytest.raises(InputError, match=r"--train-on last .*add --mask-prompt"):
        rows("data", train_on="last")


def test_train_on_the_last_turn_of_a_completion() -> None:
    tok = tokenizer(TEMPLATES["chatml"])
    answer = [*CHAT[1:], {"role": "user", "content": "?"}, {"role": "assistant", "content": "3", "weight": 0}]
    row = Row({"prompt": CHAT[:1], "completion": answer}, "a.jsonl", 7)
    assert trained(supervised_example(row, tok, mask_prompt=True), tok) == ["2<|im_end|>\n", "2<|im_end|>\n"]
    assert trained(supervised_example(row, tok, mask_prompt=True, train_on="last"), tok) == ["2<|im_end|>\n"]
    single = Row({"prompt": CHAT[:1], "completion": CHAT[1:2]}, "a.jsonl", 7)
    assert trained(supervised_example(single, tok, mask_prompt=True, train_on="last"), tok) == ["2<|im_end|>\n"]


def test_train_on_is_an_option_of_masked_runs(tmp_path: Path, mlxlora: Callable[..., Outcome]) -> None:
    """Refused before the model or the data are looked for."""
    done = mlxlora("sft", "--model", tmp_path / "none", "--data", tmp_path, "--train-on", "last")
    assert done.code == 2 and done.err.count("\n") == 1 and "add --mask-prompt" in done.err
    (tmp_path / "run.yaml").write_text("train_on: last\nmask_prompt: true\n")
    (tmp_path / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    model = ("--model", starter.model_path(), "--data", tmp_path / "rows.jsonl")
    done = mlxlora("preview", *model, "--config", tmp_path / "run.yaml", "--json")
    assert done.code == 0 and json.loads(done.out)["trained"], done.err


def test_marks_choose_among_the_words_of_a_turn() -> None:
    assert turns(TEMPLATES["marked"], CHAT) == ["2<|im_end|>", "2<|im_end|>"]
    headers = TEMPLATES["marked"].replace("{{ '<|im_start|>' + m.role", "{% generation %}{{ '<|im_start|>' + m.role")
    headers = headers.replace("+ '\\n' }}", "+ '\\n' }}{% endgeneration %}", 1)
    assert headers.count("{% generation %}") == 2
    assert turns(headers, CHAT) == ["2<|im_end|>", "2<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_beginning_of_its_answer(name: str) -> None:
    tok, chat = tokenizer(TEMPLATES[name]), CHAT
    begun = render(tok, [*chat[:3], {"role": "assistant", "content": "The answer is"}], "", continue_final=True)
    whole = render(tok, [*chat[:3], {"role": "assistant", "content": "The answer is 2"}], "")
    assert whole[: len(begun)] == begun
    assert tok.decode(begun).endswith("The answer is")


def test_variables_of_the_template() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>' if enable_thinking }}"
    assert text(template, CHAT[:1], template_args={"enable_thinking": True}) == "1+1?<think>"
    assert text(template, CHAT[:1]) == "1+1?"


def test_dropped_messages_are_refused_by_role() -> None:
    template = (
        "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role + ': ' + (m.content or '') + '\n' }}{% endfor %}"
    )
    chat = [{"role": "critic", "content": "Hm."}, *CHAT]
    for render_it in (text, turns):
        with pytest.raises(InputError, match=r"a\.jsonl:7: .* drops message 1 \(role 'critic'\); rename its role"):
            render_it(template, chat)
    with pytest.raises(InputError, match=r"drops message 1 \(role 'developer'\)"):
        text(template, [{**chat[0], "role": "developer"}, *CHAT])
    assert text(template, [{"role": "critic", "content": " "}, *CHAT[:1]]) == "user: 1+1?\n"


def test_content_beside_calls_is_not_lost() -> None:
    template = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name + '<end>' }}{% else %}"
        "{{ m.content + '<end>' }}{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"drops the content of message 2 \(role 'assistant'\) beside its calls"):
        text(template, [ASKED[0], {**ASKED[1], "content": "I look."}])
    assert text(template, ASKED) == "List<end>ls<end>"
    either = template.replace("if m.tool_calls", "if m.tool_calls and not m.content")
    with pytest.raises(InputError, match=r"drops the calls of message 2 \(role 'assistant'\), which has content too"):
        text(either, [ASKED[0], {**ASKED[1], "content": "I look."}])


def test_arguments_take_the_form_that_the_template_wants() -> None:
    body = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ ARGUMENTS }}{% endfor %}{% endfor %}"
    objects = body.replace("ARGUMENTS", "c.function.arguments | tojson")
    texts = body.replace("ARGUMENTS", "'=' + c.function.arguments")
    printed = body.replace("ARGUMENTS", "c.function.arguments")
    for arguments in ('{"path":"/tmp"}', {"path": "/tmp"}):
        call = {**CALL, "function": {"name": "ls", "arguments": arguments}}
        chat = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
        as_given = arguments if isinstance(arguments, str) else '{"path": "/tmp"}'
        assert text(objects, chat) == 'List{"path": "/tmp"}'
        assert text(texts, chat) == f"List={as_given}"
        assert text(printed, chat) == f"List{as_given}"  # not Python's notation


def test_contents_are_parts_where_the_template_wants_parts() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
        "{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert text(template, CHAT[:1]) == "user:1+1?<|im_end|>"
    assert turns(template, CHAT) == ["2<|im_end|>", "2<|im_end|>"]


def test_escaped_text_belongs_to_the_turn_that_is_written() -> None:
    """Marked-up strings escape what is added to them; such text has no origins of its own."""
    template = (
        "{% for m in messages %}{{ ('[' | escape) + m.role + ']' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    assert turns(template, CHAT) == ["2&lt;|im_end|&gt;", "2&lt;|im_end|&gt;"]


def test_messages_printed_as_a_whole_are_not_dropped() -> None:
    assert text("{{ messages }}", CHAT[:1]) == "[{'role': 'user', 'content': '1+1?'}]"
    assert text("{{ messages[0] }}", CHAT[:1]) == "{'role': 'user', 'content': '1+1?'}"


class Slow(PreTrainedTokenizerFast):
    """A tokenizer without offsets, as those in Python are."""

    @property
    def is_fast(self) -> bool:
        return False


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "marked"])
def test_a_tokenizer_without_offsets_has_the_same_masks(name: str) -> None:
    fast = tokenizer(TEMPLATES[name])
    inner = Slow(tokenizer_object=fast._tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>")
    inner.chat_template = TEMPLATES[name]
    slow = TokenizerWrapper(inner)
    use_stop_tokens(slow)
    assert assistant_turns(slow, CHAT, "") == assistant_turns(fast, CHAT, "")


def test_a_template_in_python() -> None:
    inner = tokenizer(TEMPLATES["chatml"])._tokenizer

    def simple(messages: list[dict], add_generation_prompt: bool = False, **_: Any) -> str:
        return "".join(f"{m['role']}:{m['content']}<eos>" for m in messages) + ("assistant:" if add_generation_prompt else "")

    def rewriting(messages: list[dict], add_generation_prompt: bool = False, **_: Any) -> str:
        return f"{len(messages)}" + simple(messages, add_generation_prompt)

    tok = TokenizerWrapper(inner, chat_template=simple)
    assert trained_texts(*assistant_turns(tok, CHAT, "a.jsonl:7"), tok) == ["2<eos>", "2<eos>"]
    with pytest.raises(InputError, match=r"a\.jsonl:7: cannot tell which tokens message 2 wrote, .*rewrites earlier turns"):
        assistant_turns(TokenizerWrapper(inner, chat_template=rewriting), CHAT, "a.jsonl:7")


def test_messages_of_the_field_keep_arguments_as_they_are() -> None:
    (_, answer) = as_messages(ASKED, "a.jsonl:7", "messages")
    assert answer["tool_calls"][0]["function"]["arguments"] == '{"path":"/tmp"}'


def as_it_is(inner: PreTrainedTokenizerFast) -> None:
    """No change."""


def truncating(inner: PreTrainedTokenizerFast) -> None:
    inner.backend_tokenizer.enable_truncation(5)


def padding(inner: PreTrainedTokenizerFast) -> None:
    inner.backend_tokenizer.enable_padding(length=64)


def splitting(inner: PreTrainedTokenizerFast) -> None:
    inner.split_special_tokens = True


def overriding(inner: PreTrainedTokenizerFast) -> None:
    class Own(type(inner)):
        def encode(self, text: str, **how: Any) -> list[int]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return [1, *super().encode(text, **how)]

    inner.__class__ = Own


@pytest.mark.parametrize("change", [as_it_is, truncating, padding, splitting, overriding])
def test_tokens_are_those_of_the_tokenizers_own_call(change: Callable[[PreTrainedTokenizerFast], None]) -> None:
    """Whatever state a tokenizer is in."""
    inner = deepcopy(tokenizer(TEMPLATES["chatml"])._tokenizer)
    change(inner)
    written = inner.apply_chat_template(CHAT, tokenize=False)
    found = token_ids(inner, written)
    assert found == inner.encode(written, add_special_tokens=False) and len(found) > 30
