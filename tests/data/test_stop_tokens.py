"""One set of stop tokens: the tokenizer's, the configuration's, the template's and the user's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer as plain_tokenizer

from mlxlora import starter
from mlxlora.config.options import BaseOptions, ModelOptions
from mlxlora.data.stop_tokens import never_stops, stop_tokens, stops_told, template_stops, use_stop_tokens, write_stop_tokens
from mlxlora.data.tokenize import Example
from mlxlora.errors import InputError
from mlxlora.models.loading import load_tokenizer, load_with_config

from ..support.chat import chat_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + c.function.name + '</tool_call>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ROLES = ("<|user|>", "<|assistant|>", "<|tool|>")


@pytest.mark.parametrize(
    ("template", "extra", "stops"),
    [
        (CHATML, (), {"<|im_end|>"}),
        (GLM, ROLES, {"<|user|>", "<|tool|>"}),
        (HARMONY, (), {"<|return|>"}),
        (PHI, ROLES, {"<|end|>"}),
        (None, (), set()),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", (), set()),
        ("{{ 2 ** 3 }}", (), set()),
        ("{% if %}", (), set()),
    ],
)
def test_the_templates_ends(template: str | None, extra: tuple[str, ...], stops: set[str]) -> None:
    tok = chat_tokenizer(template, extra)
    assert {tok.decode([token]) for token in template_stops(tok)} - {"<eos>"} == stops
    assert {tok.decode([token]) for token in stop_tokens(tok)} == stops | {"<eos>"}


def test_configurations_and_extra_tokens_are_added(tmp_path: Path) -> None:
    tok = chat_tokenizer(CHATML)
    end = tok.convert_tokens_to_ids("<|im_end|>")
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert stop_tokens(tok, tmp_path) == {5, end, tok.eos_token_id}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    assert stop_tokens(tok, tmp_path) == {6, 7, end, tok.eos_token_id}
    assert stop_tokens(tok, extra=["<bos>", "9"]) == {tok.bos_token_id, 9, end, tok.eos_token_id}
    with pytest.raises(InputError, match=r"--eos-token <stop>: not a token .*name one token"):
        stop_tokens(tok, extra=["<stop>"])
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json: is not JSON"):
        stop_tokens(tok, tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The starter, whose template's end and generation_config's are other tokens than the tokenizer's eos."""
    folder = tmp_path / "model"
    shutil.copytree(starter.model_path(), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3], "temperature": 0.5}')
    return folder


def test_every_loader_gives_the_same_stops(model: Path) -> None:
    plain = plain_tokenizer(model).eos_token_ids
    loaded = load_tokenizer(BaseOptions(model=str(model))).eos_token_ids
    _, tokenizer, _ = load_with_config(ModelOptions(model=str(model)), lazy=True)
    assert plain < loaded == tokenizer.eos_token_ids
    assert loaded == stop_tokens(plain_tokenizer(model), model)
    more = load_tokenizer(BaseOptions(model=str(model), eos_token=("7",))).eos_token_ids
    assert more == loaded | {7}
    with pytest.raises(InputError, match=r"^--eos-token <stop>: not a token"):
        load_tokenizer(BaseOptions(model=str(model), eos_token=("<stop>",)))


def test_saved_models_stop_at_the_same_tokens(model: Path) -> None:
    tokenizer = load_tokenizer(BaseOptions(model=str(model)))
    write_stop_tokens(model, tokenizer)
    config = json.loads((model / "generation_config.json").read_text())
    assert config == {"eos_token_id": sorted(tokenizer.eos_token_ids), "temperature": 0.5}
    before = (model / "generation_config.json").stat().st_mtime_ns
    write_stop_tokens(model, tokenizer)
    assert (model / "generation_config.json").stat().st_mtime_ns == before


def test_what_is_told() -> None:
    tok = chat_tokenizer(CHATML)
    use_stop_tokens(tok)
    end = tok.convert_tokens_to_ids("<|im_end|>")
    assert f"'<|im_end|>' ({end})" in stops_told(tok) and f"'<eos>' ({tok.eos_token_id})" in stops_told(tok)
    ends, goes_on = (Example(np.array([1, 2, last], np.int32), np.array([False, True, True]), None, "") for last in (end, 3))
    assert never_stops([goes_on], tok)
    assert not never_stops([goes_on, ends], tok)
    assert stops_told(chat_tokenizer(None, eos=None)).startswith("generation stops at no token")
