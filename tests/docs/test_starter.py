"""The bundled starter is small, loads, is what examples/starter makes, and leaves room to improve."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mlxlora import starter
from mlxlora.config.config_file import Reading, read_config
from mlxlora.config.method_options import fields_of
from mlxlora.methods import METHODS

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "starter"
RUNNABLE = [name for name, row in METHODS.items() if row.starter.runs]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


text = script("text")
make = script("make")
FILES = text.datasets()


def test_assets_are_small():
    assets = [path for path in Path(starter.__file__).parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in assets) < 2_200_000


@pytest.mark.parametrize("name", FILES)
def test_data_is_what_the_script_makes(name: str, tmp_path: Path):
    text.write(tmp_path / "again.jsonl", FILES[name])
    assert (tmp_path / "again.jsonl").read_bytes() == (Path(starter.__file__).parent / "data" / name).read_bytes()


def test_tokenizer_and_chat_template_are_what_the_script_makes(tmp_path: Path):
    make.write_parts(tmp_path, (row["text"] for row in text.pretraining_rows(make.TOKENIZER_ROWS)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_bytes()) == json.loads((starter.model_path() / name).read_bytes())


def test_no_held_out_problem_is_trained_on():
    train, held_out = map(set, text.splits())
    assert not train & held_out
    assert len(held_out) == (len(train) + len(held_out)) // 10


@pytest.mark.parametrize("mode", ["sft", "pairs", "grpo"])
def test_no_question_is_in_two_splits(mode: str):
    def questions(split: str) -> set[str]:
        rows = FILES.get(f"{mode}/{split}.jsonl", [])
        return {row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows}

    assert not questions("train") & (questions("valid") | questions("test"))


@pytest.mark.parametrize("mode", METHODS)
def test_every_method_has_data(mode: str):
    assert {"train.jsonl", "valid.jsonl"} <= {path.name for path in starter.data_path(mode).iterdir()}


@pytest.mark.parametrize("mode", RUNNABLE)
def test_defaults_are_valid_options(mode: str):
    read_config(starter.defaults(mode), Reading(fields_of(*METHODS[mode].kinds.kinds())))


def test_pretraining_text_is_the_chat_template_of_its_conversation():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter.model_path())
    turns = [{"role": "user", "content": "add 1 and 2."}, {"role": "assistant", "content": "3"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == text.CHAT.format(question="add 1 and 2.", reply="3") + "\n"
    marked = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    loss_mask = [i for i, mask in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(loss_mask) == "3<|im_end|>"


def test_it_answers_some_questions_and_not_most():
    accuracy = make.accuracy(starter.model_path(), FILES["grpo/valid.jsonl"][:64])
    assert 0.05 <= accuracy <= 0.60
