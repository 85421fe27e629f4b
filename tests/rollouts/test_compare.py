"""Answers side by side: those of each model on its own, from one model that is loaded once."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import generate

from mlxlora import starter
from mlxlora.adapters.files import save
from mlxlora.adapters.prepare import attached, load, prepare
from mlxlora.config.options import AdapterOptions, ModelOptions
from mlxlora.data.prompts import question, read_questions
from mlxlora.data.rows import Row
from mlxlora.errors import InputError
from mlxlora.rollouts.compare import Generation, compare
from tests.support.tiny import dense, experts, quantized, same, shaken, snapshot

TOKENS = mx.array([[5, 3, 9, 1, 7, 2]])
KINDS = {
    "lora": (dense, {}),
    "lora on four bits": (quantized, {}),
    "lora on experts": (experts, {}),
    "dora": (dense, {"train_type": "dora"}),
    "full": (dense, {"train_type": "full"}),
}


def options(**changes: Any) -> AdapterOptions:
    return AdapterOptions(**{"num_layers": -1, "rank": 4, "scale": 3.0} | changes)


def adapters(model: Any, folder: Path, **changes: Any) -> Path:
    save(shaken(prepare(model, options(**changes))), folder, options(**changes))
    return folder


@pytest.mark.parametrize(("make", "changes"), KINDS.values(), ids=KINDS.keys())
def test_nothing_is_left_on_the_model(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    folder, model = adapters(make(), tmp_path, **changes), make()
    weights, logits = snapshot(model.parameters()), model(TOKENS)
    modules = [name for name, _ in model.named_modules()]
    with attached(model, folder):
        assert not mx.allclose(model(TOKENS), logits, atol=1e-3)
    assert same(snapshot(model.parameters()), weights) and mx.array_equal(model(TOKENS), logits)
    assert [name for name, _ in model.named_modules()] == modules


def test_a_failure_leaves_nothing_either(tmp_path: Path) -> None:
    folder, model = adapters(dense(hidden_size=32), tmp_path), dense()
    weights = snapshot(model.parameters())
    with pytest.raises(InputError), attached(model, folder):
        pass
    assert same(snapshot(model.parameters()), weights)


def test_the_answers_of_each(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(ModelOptions(model=str(model_folder)))
    folders = [
        adapters(load(ModelOptions(model=str(model_folder)))[0], tmp_path / kind, train_type=kind) for kind in ("lora", "dora")
    ]
    questions = [question(Row({"prompt": text}, "x", 1), tokenizer) for text in ("one", "two")]
    found = compare(model, tokenizer, folders, questions, Generation(max_tokens=5))
    for row, asked in zip(found, questions, strict=True):
        assert row.prompt == asked.text and list(row.answers) == ["base", *map(str, folders)]
        for path, answer in zip((None, *folders), row.answers.values(), strict=True):
            alone, words = load(ModelOptions(model=str(model_folder)), str(path) if path else None)
            assert answer == generate(alone.eval(), words, asked.tokens, max_tokens=5).strip()
    sampled = [compare(model, tokenizer, folders[:1], questions, Generation(5, 1.0, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


ROWS: dict[str, Any] = {
    "completion": ({"prompt": "ask", "completion": "say"}, "ask", "say"),
    "alpaca": ({"instruction": "ask", "output": "say"}, None, "say"),
    "pair": ({"prompt": "ask", "chosen": "say", "rejected": "no"}, "ask", "say"),
    "prompt": ({"prompt": "ask", "answer": "say"}, "ask", "say"),
    "gsm8k": ({"question": "ask", "answer": "say"}, "ask", "say"),
}


@pytest.mark.parametrize(("fields", "prompt", "expected"), ROWS.values(), ids=ROWS.keys())
def test_rows_of_every_method(fields: dict[str, Any], prompt: str | None, expected: str, model_folder: Path) -> None:
    _, tokenizer = load(ModelOptions(model=str(model_folder)))
    found = question(Row(fields, "rows.jsonl", 3), tokenizer)
    assert found.expected == expected and tokenizer.decode(found.tokens) == found.text
    assert prompt in (None, found.text)


def test_conversations() -> None:
    _, tokenizer = load(ModelOptions(model=str(starter.model_path())))
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    found = question(Row({"messages": turns}, "rows.jsonl", 1), tokenizer)
    wanted = tokenizer.apply_chat_template(turns[:3], add_generation_prompt=True)
    assert (found.text, found.expected, found.tokens) == ("c", "d", list(wanted))


def test_mistakes(mlxlora: Any, model_folder: Path, tmp_path: Path) -> None:
    _, tokenizer = load(ModelOptions(model=str(model_folder)))
    with pytest.raises(InputError, match=r"rows\.jsonl:3: plain text has no prompt"):
        question(Row({"text": "words"}, "rows.jsonl", 3), tokenizer)
    with pytest.raises(InputError, match="this tokenizer has no chat template"):
        question(Row({"prompt": "words"}, "rows.jsonl", 3), tokenizer, use_chat_template=True)
    assert "use either --prompt or --data" in mlxlora("compare", "--adapter-path", "x").err
    assert "--adapter-path is missing" in mlxlora("compare", "--prompt", "x").err
    assert "no adapters there" in mlxlora("compare", "--prompt", "x", "--adapter-path", tmp_path).err


def test_command(mlxlora: Any, model_folder: Path, tmp_path: Path) -> None:
    one = adapters(load(ModelOptions(model=str(model_folder)))[0], tmp_path / "one")
    config = json.loads((one / "adapter_config.json").read_text()) | {"model": str(model_folder)}
    (one / "adapter_config.json").write_text(json.dumps(config))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"[bold]{i}", "completion": "\x1b[31m"}) + "\n" for i in range(4)))
    named = ("--adapter-path", one, "--adapter-path", one, "--data", rows, "--num", 2, "--max-tokens", 3)
    table = mlxlora("compare", *named)
    assert table.code == 0 and "[bold]1" in table.out and "[bold]2" not in table.out and "\x1b" not in table.out
    printed = [json.loads(line) for line in mlxlora("compare", *named, "--json").out.splitlines()]
    assert [row["prompt"] for row in printed] == ["[bold]0", "[bold]1"]
    assert printed[0]["answers"].keys() == {"base", str(one)}


@pytest.mark.parametrize("command", ["compare", "fuse", "export", "eval", "generate", "preview", "gkd", "sft"])
def test_the_help_says_which_model_is_the_default(command: str, mlxlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    told = mlxlora(command, "--help").out
    assert ("bundled starter is trained" in told) == (command == "sft")
    assert ("adapters were trained on" in told) == (command in ("compare", "fuse", "export", "generate"))


def test_questions_come_from_the_test_split() -> None:
    _, tokenizer = load(ModelOptions(model=str(starter.model_path())))
    found = read_questions(str(starter.data_path("sft")), tokenizer, 3)
    first = json.loads((starter.data_path("sft") / "test.jsonl").read_text().splitlines()[0])
    assert len(found) == 3 and found[0].expected == first["messages"][-1]["content"]
