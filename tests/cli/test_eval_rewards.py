"""`mlxlora eval --rewards`: answers of a split without and with adapters, their rewards, and what they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxlora.adapters.files import save
from mlxlora.adapters.prepare import load, prepare
from mlxlora.config.options import AdapterOptions, ModelOptions
from mlxlora.rollouts.scored_answers import interval
from tests.support.tiny import shaken

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def adapters(model_folder: Path, tmp_path: Path) -> Path:
    model, _ = load(ModelOptions(model=str(model_folder)))
    options = AdapterOptions(num_layers=-1, rank=4, scale=3.0)
    save(shaken(prepare(model, options)), tmp_path / "run", options, str(model_folder))
    return tmp_path / "run"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    text = "".join(json.dumps({"prompt": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(5))
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def test_rewards_without_and_with_adapters(adapters: Path, rows: Path, tmp_path: Path, mlxlora: Any) -> None:
    (tmp_path / "mine.py").write_text("def short(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    how = ("--adapter-path", adapters, "--data", rows, "--rewards", "short", "--reward-file", tmp_path / "mine.py")
    how = (*how, "--num", 4, "--max-tokens", 6)
    done = mlxlora("eval", *how, "--batch-size", 3, "--output", tmp_path / "kept" / "answers.jsonl")
    assert done.code == 0, done.err
    head, names, line, kept = done.out.splitlines()[-4:]
    assert kept == f"answers  {tmp_path / 'kept' / 'answers.jsonl'}"
    assert head == "4 prompts; mean and 95% interval" and names.split() == ["base", "adapters", "difference"]
    printed = mlxlora("eval", *how, "--json").out
    found = [json.loads(row) for row in printed.splitlines()]
    assert (tmp_path / "kept" / "answers.jsonl").read_text() == printed
    again = mlxlora("eval", *how, "--output", tmp_path / "kept" / "answers.jsonl")
    assert again.code == 2 and "answers.jsonl exists; replace it with --overwrite" in again.err
    assert [row["prompt"] for row in found] == [f"{i} + 1?" for i in range(4)]
    values = {name: np.array([row[name]["rewards"]["short"] for row in found]) for name in ("base", "adapters")}
    assert all(row["base"]["rewards"]["short"] == len(row["base"]["answer"]) for row in found)
    assert line.split()[0] == "short" and float(line.split()[1]) == pytest.approx(values["base"].mean(), abs=1e-3)
    difference, half = interval(values["adapters"] - values["base"])
    assert f"{difference:+.3f} ±{half:.3f}" in line


def test_the_model_alone(model_folder: Path, rows: Path, mlxlora: Any) -> None:
    done = mlxlora("eval", "--model", model_folder, "--data", rows, "--rewards", "accuracy", "--max-tokens", 4)
    assert done.code == 0 and "difference" not in done.out and done.out.splitlines()[-1].startswith("accuracy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rewards", "accuracy", "--split", "valid"), "no valid split; found train, test"),
        (("--judge-model", "./nowhere"), "--judge-model compares answers without and with adapters"),
        (("--rewards", "nonesuch"), "nonesuch"),
        (("--output", "answers.jsonl"), "--output answers.jsonl keeps answers: name --rewards or --judge-model too"),
    ],
)
def test_mistakes(options: tuple[str, ...], message: str, model_folder: Path, rows: Path, mlxlora: Any) -> None:
    done = mlxlora("eval", "--model", model_folder, "--data", rows, *options)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_interval() -> None:
    mean, half = interval(np.array([0.0, 1.0] * 50))
    assert mean == 0.5 and half == pytest.approx(1.96 * 0.5025 / 10, rel=1e-3)
    assert all(np.isnan(interval(np.array([np.nan]))))
