"""The prompt and the expected answer in rows of any training method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxlora.data.dialogue import sampled_turns
from mlxlora.data.prompts import Question, question
from mlxlora.data.rows import Row
from mlxlora.errors import InputError
from tests.support.paths import Outcome
from tests.support.tokens import CHATML, copy_with_token, merging_tokenizer

USER, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
BEGUN = {"role": "assistant", "content": "It is"}
HEADER = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


def asked(fields: dict[str, Any], **how: Any) -> tuple[str, Question]:
    tokenizer = merging_tokenizer(CHATML)
    found = question(Row(fields, "a.jsonl", 7), tokenizer, **how)
    return tokenizer.decode(found.tokens), found


@pytest.mark.parametrize(
    ("fields", "prompt", "expected"),
    [
        ({"messages": [USER, ANSWER]}, HEADER, "2"),
        ({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}, f"{HEADER}2<|im_end|>\n{HEADER}", "2"),
        ({"prompt": [USER], "completion": [ANSWER]}, HEADER, "2"),
        ({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, HEADER, "2"),
        ({"prompt": [USER], "answer": "2"}, HEADER, "2"),
        ({"prompt": [USER, BEGUN], "completion": " 2"}, f"{HEADER}It is", " 2"),
        ({"prompt": [USER, BEGUN], "chosen": " 2", "rejected": " 3"}, f"{HEADER}It is", " 2"),
        ({"prompt": [USER, BEGUN]}, f"{HEADER}It is", ""),
    ],
)
def test_prompt_and_answer(fields: dict[str, Any], prompt: str, expected: str) -> None:
    """A prompt that begins the answer is continued."""
    text, found = asked(fields)
    assert (text, found.expected) == (prompt, expected)


def test_arguments_for_the_template() -> None:
    tokenizer = merging_tokenizer(CHATML + "{% if add_generation_prompt and think is false %}{{ '<none>' }}{% endif %}")
    for arguments, end in (({"think": False}, "<none>"), ({}, "")):
        row = Row({"messages": [USER, ANSWER], "chat_template_kwargs": arguments}, "a.jsonl", 7)
        assert tokenizer.decode(question(row, tokenizer).tokens) == HEADER + end


def test_tokens_that_the_model_has_not() -> None:
    assert asked({"prompt": "1"}, vocabulary=300)[1].tokens
    with pytest.raises(InputError, match=r"a\.jsonl:7: token \d+ \('<\|im_end\|>'\) is not among the model's 258"):
        asked({"prompt": "1<|im_end|>"}, vocabulary=258, use_chat_template=False)


def test_what_rewards_get_of_a_begun_answer() -> None:
    """TRL's arguments: the completion has all of the answer, the prompt nothing of it."""
    assert sampled_turns([USER, BEGUN], " 2") == ([USER], [{"role": "assistant", "content": "It is 2"}])
    assert sampled_turns([USER], "2") == ([USER], [ANSWER])
    assert sampled_turns("1+1?", "2") == ("1+1?", "2")


def test_generate_refuses_tokens_without_embedding(model_folder: Path, tmp_path: Path, mlxlora: Callable[..., Outcome]) -> None:
    """MLX would read past the end of the embedding."""
    folder = copy_with_token(model_folder, tmp_path / "model", "<|tool|>", CHATML)
    done = mlxlora("generate", "--model", folder, "--prompt", "a <|tool|> b", "--max-tokens", 1)
    assert done.code == 2 and "--prompt:1: token 288 ('<|tool|>') is not among the model's 288" in done.err
    assert mlxlora("generate", "--model", folder, "--prompt", "a", "--max-tokens", 1).code == 0
