"""`mlxlora chat`: the model without and with its adapters, each in a conversation of its own."""

import io
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import generate

from mlxlora import starter
from mlxlora.adapters.files import save
from mlxlora.adapters.prepare import load, prepare
from mlxlora.config.options import AdapterOptions, ModelOptions
from tests.support.tiny import shaken

MODEL = str(starter.model_path())


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    model, _ = load(ModelOptions(model=MODEL))
    options = AdapterOptions(num_layers=-1, rank=4, scale=3.0)
    save(shaken(prepare(model, options)), tmp_path / "run", options, MODEL)
    return tmp_path / "run"


def test_both_answer_every_message(adapters: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("add 5 and 3.\n\nr\nadd 5 and 3.\nh\nq\nnever read\n"))
    done = mlxlora("chat", "--adapter-path", adapters, "--max-tokens", 8)
    assert done.code == 0, done.err
    told, *lines = done.out.splitlines()
    assert told == lines[-1] == "q: quit, r: forget the conversation, h: help"
    assert [line.split(":")[0] for line in lines[:-1]] == ["base", "adapters"] * 2 and lines[:2] == lines[2:4]
    for line, path in zip(lines, (None, str(adapters)), strict=False):
        model, tokenizer = load(ModelOptions(model=MODEL), path)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "add 5 and 3."}], add_generation_prompt=True)
        assert line.split(": ", 1)[1] == generate(model, tokenizer, prompt, max_tokens=8)


def test_a_conversation_goes_on(adapters: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(text: str, *options: Any) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return mlxlora("chat", "--adapter-path", adapters, "--max-tokens", 8, *options).out.splitlines()[1:]

    assert len(said("add 5 and 3.\nadd 5 and 3.\n", "--only-adapters")) == 2
    assert said("add 5 and 3.\n")[1] == said("add 5 and 3.\n", "--only-adapters")[0]


def test_mistakes(mlxlora: Any, model_folder: Path, tmp_path: Path) -> None:
    done = mlxlora("chat", "--adapter-path", tmp_path)
    assert done.code == 2 and "no adapters there" in done.err
    done = mlxlora("chat", "--model", model_folder, "--adapter-path", tmp_path)
    assert done.code == 2 and "has no chat template" in done.err
