"""Real text and a real (tiny) model: the loss falls, and mlx-lm's own commands take what a run leaves."""

import json
import os
import subprocess
from itertools import islice
from pathlib import Path

import pytest

from tests.support.warm import search_path

SHARED = Path(__file__).resolve().parents[3] / "shared"
STORIES = SHARED / "models" / "stories260K"
DATA = SHARED / "data"

pytestmark = pytest.mark.skipif(not STORIES.is_dir() or not DATA.is_dir(), reason=f"real models and data are not in {SHARED}")


def command(name, *arguments):
    """Output of a console script of this environment, offline; it has to succeed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PATH": search_path()}
    done = subprocess.run(["env", name, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def take(source, count):
    with (DATA / source).open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


def short(rows, count):
    """GSM8K's short rows, to be quick."""
    return list(islice((row for row in rows if len(row["question"] + row["answer"]) < 300), count))


def write(folder, **splits):
    folder.mkdir()
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def train(data, out, *more):
    options = ("--iters", 30, "--batch-size", 4, "--num-layers", -1, "--learning-rate", 5e-3, "--scale", 4, "--max-seq-length", 128)
    command("mlxlora", "sft", "--model", STORIES, "--data", data, "--adapter-path", out, "--save-every", 0, *options, *more)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {split: [r["loss"] for r in records if r["split"] == split] for split in ("train", "valid")}


@pytest.fixture(scope="module")
def wikisql(tmp_path_factory):
    """Tables, questions and SQL as plain text, and the adapters that learned them."""
    folder = tmp_path_factory.mktemp("wikisql")
    splits = {split: take(f"wikisql_{split}.jsonl", count) for split, count in (("train", 200), ("valid", 16), ("test", 16))}
    data = write(folder / "data", **splits)
    return data, folder / "adapters", train(data, folder / "adapters")


def test_text(wikisql):
    *_, losses = wikisql
    before, *_, after = losses["valid"]
    assert after < 0.6 * before
    assert losses["train"] == sorted(losses["train"], reverse=True)


def test_prompt_and_completion(tmp_path):
    rows = [
        {"prompt": f"Q: {row['question']}\nA: ", "completion": row["answer"]} for row in short(take("gsm8k_train.jsonl", 2000), 144)
    ]
    data = write(tmp_path / "data", train=rows[:128], valid=rows[128:])
    before, *_, after = train(data, tmp_path / "adapters", "--mask-prompt", "--max-seq-length", 256)["valid"]
    assert after < 0.75 * before


def test_renamed_fields(tmp_path):
    """GSM8K as it was published."""
    data = write(tmp_path / "data", train=short(take("gsm8k_train.jsonl", 400), 8))
    keys = ("--prompt-key", "question", "--completion-key", "answer")
    first, *_ = train(data, tmp_path / "adapters", "--mask-prompt", *keys, "--max-seq-length", 256, "--iters", 2)["train"]
    assert 3 < first < 12


def test_mlx_lm_tests_what_we_trained(wikisql):
    """mlx-lm's loss is the mean of its batches' means, and counts a padding token per row: near ours, not equal."""
    data, adapters, losses = wikisql
    options = ("--test", "--test-batches", -1, "--batch-size", 1, "--max-seq-length", 128)
    printed = command("mlx_lm.lora", "--model", STORIES, "--data", data, "--adapter-path", adapters, *options)
    theirs = float(printed.split("Test loss ")[1].split(",")[0])
    printed = command("mlxlora", "eval", "--model", STORIES, "--data", data, "--adapter-path", adapters, "--max-seq-length", 128)
    ours = float(printed.split("loss ")[1].split()[0])
    assert ours == pytest.approx(theirs, rel=0.05)
    assert ours < 0.6 * losses["valid"][0]


def test_generation_with_adapters(wikisql):
    _, adapters, _ = wikisql
    prompt = "table: 1-1000181-1\ncolumns: State, Notes\nQ: Tell me what the notes are\nA: "
    options = ("--prompt", prompt, "--max-tokens", 24, "--temp", 0)
    arguments = ("--model", STORIES, "--adapter-path", adapters)
    theirs = command("mlx_lm.generate", *arguments, *options, "--verbose", False, "--ignore-chat-template")
    ours = command("mlxlora", "generate", *arguments, *options[:4])
    untrained = command("mlxlora", "generate", "--model", STORIES, *options[:4])
    assert ours.strip() == theirs.strip() and ours != untrained


def test_fused_model(wikisql, tmp_path):
    """The adapters become weights of a model folder, which scores as the adapters do."""
    data, adapters, _ = wikisql
    command("mlx_lm.fuse", "--model", STORIES, "--adapter-path", adapters, "--save-path", tmp_path / "fused")
    score = ("--data", data, "--max-seq-length", 128)
    fused = command("mlxlora", "eval", "--model", tmp_path / "fused", *score)
    apart = command("mlxlora", "eval", "--model", STORIES, "--adapter-path", adapters, *score)
    assert float(fused.split("loss ")[1].split()[0]) == pytest.approx(float(apart.split("loss ")[1].split()[0]), rel=1e-4)
