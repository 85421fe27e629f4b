"""Laws of assistant masks, over random conversations and every template at hand.

1. No token whose text comes from a message of another role, or from a header, is trained.
2. Every trained turn has the token at which generation stops there, and all of its content that the template shows.
"""

import re
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxlora.data.chat_template import assistant_turns, render
from mlxlora.data.stop_tokens import use_stop_tokens
from mlxlora.data.template_habits import role_for, template_of
from mlxlora.errors import InputError

from ..support.chat import chat_tokenizer, trained_texts
from ..support.templates import TEMPLATES, TEXT_ONLY, VARIABLE, real_templates

# whose a word is can be read off its letters, so that the oracle needs none of the code that it checks
OTHERS, OURS = "αβγδ", "жзик"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|observation|>")
_HEADER = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<\|turn>|<start_of_turn>|<｜(?:User|Assistant)｜>|<\|START_OF_TURN_TOKEN\|>"
)


def words(letters: str) -> Any:
    """Texts of a speaker: repeated, empty and odd ones too."""
    filler = st.sampled_from(["", " ", "\n", "\n\n", "1. ", "<b>", "é🙂", "user", "assistant\n", "  x"])
    return st.lists(st.sampled_from([*letters, letters[:2]]) | filler, max_size=4).map("".join)


@st.composite
def conversations(draw: Any, calls: bool) -> list[dict]:
    """Questions and answers, with a system message, reasoning, and calls with the answers of tools."""
    messages = [{"role": "system", "content": draw(words(OTHERS)) + OTHERS[0]}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(words(OTHERS)) + OTHERS[0]})
        if calls and draw(st.booleans()):
            function = {"name": "now" + OURS[3], "arguments": {"zone": draw(words(OURS)), "n": draw(st.integers(0, 9))}}
            call = {"type": "function", "id": "call00001", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            answer = draw(words(OTHERS)) + OTHERS[1]
            messages.append({"role": "tool", "name": function["name"], "tool_call_id": "call00001", "content": answer})
        reasoning = {"reasoning_content": draw(words(OURS))} if draw(st.booleans()) else {}
        messages.append({"role": "assistant", "content": draw(words(OURS)) + OURS[0], **reasoning})
    return messages


@cache
def prepared(template: str) -> TokenizerWrapper:
    tokenizer = chat_tokenizer(template, ROLES)
    use_stop_tokens(tokenizer)
    return tokenizer


def check(template: str, messages: list[dict]) -> None:
    tokenizer = prepared(template)
    try:
        ids, mask = assistant_turns(tokenizer, messages, "a.jsonl:1")
    except InputError as error:  # a template may have no such roles
        assume(not re.search("rejects this conversation|drops", str(error)))
        raise
    assert ids == render(tokenizer, messages, "a.jsonl:1")
    texts = trained_texts(ids, mask, tokenizer)
    trained, rest = "".join(texts), tokenizer.decode([token for token, chosen in zip(ids, mask, strict=True) if not chosen])
    assert not set(trained) & set(OTHERS), texts
    assert not any(_HEADER.match(text) for text in texts), texts
    names = re.sub(f"now{OURS[3]}", "", rest)  # templates repeat the names of functions in the answers of tools
    assert not set(names) & set(OURS), (texts, rest)
    check_ends(tokenizer, ids, mask, sum(message["role"] == "assistant" for message in messages))


def check_ends(tokenizer: TokenizerWrapper, ids: list[int], mask: list[bool], turns: int) -> None:
    """Every run of trained tokens ends in a token of its own, apart from white space."""
    named = tokenizer._tokenizer.added_tokens_decoder
    runs = [t for t in range(len(ids)) if mask[t] and (t + 1 == len(ids) or not mask[t + 1])]
    assert len(runs) >= turns - 1  # turns without a header between them are one run
    for end in runs:
        last = next(t for t in range(end, -1, -1) if tokenizer.decode([ids[t]]).strip())
        assert mask[last] and (ids[last] in named or ids[last] in tokenizer.eos_token_ids), tokenizer.decode(ids[: end + 1])


_SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_of_small_templates(name: str) -> None:
    @_SETTINGS
    @given(conversations(calls=name not in TEXT_ONLY))
    def holds(messages: list[dict]) -> None:
        check(TEMPLATES[name], messages)

    holds()


REAL = real_templates()


@pytest.mark.skipif(not REAL, reason=f"needs chat templates: name their folder in {VARIABLE}, or install trl")
@pytest.mark.parametrize("name", sorted(REAL) or ["none"])
def test_masks_of_real_templates(name: str) -> None:
    @settings(_SETTINGS, max_examples=15)
    @given(st.booleans().flatmap(lambda calls: conversations(calls=calls)))
    def holds(messages: list[dict]) -> None:
        check(REAL[name], messages)

    holds()


@pytest.mark.parametrize("name", TEMPLATES)
def test_roles_are_known(name: str) -> None:
    template = template_of(prepared(TEMPLATES[name]))
    assert template is not None
    assert [role_for(template, role) for role in ("user", "assistant", "system")] == ["user", "assistant", "system"]
