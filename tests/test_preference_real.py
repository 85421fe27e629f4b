"""Real preferences (HH-RLHF, harmless) on a real, tiny model: what is learned holds for pairs that were not seen."""

import gzip
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import SHARED

STORIES, PAIRS = SHARED / "models" / "stories260K", SHARED / "data" / "hh_harmless_test.jsonl.gz"
HELD_OUT = 800
CHANCE = 0.5 + 2.5 * 0.5 / HELD_OUT**0.5  # guessing is right more often in one of 160 runs
LAST = "\n\nHuman:"
pytestmark = pytest.mark.skipif(not (STORIES.is_dir() and PAIRS.is_file()), reason=f"needs {STORIES} and {PAIRS}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last exchange of every dialogue, as strings without a prompt of their own."""
    folder = tmp_path_factory.mktemp("hh")
    rows = [row for line in gzip.open(PAIRS) if (row := last_exchange(orjson.loads(line)))]
    random.Random(0).shuffle(rows)
    for name, part in (("train", rows[HELD_OUT:]), ("valid", rows[:HELD_OUT])):
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, part)))
    return folder


def last_exchange(row: dict[str, str]) -> dict[str, str] | None:
    """None if the two sides do not answer the same short question."""
    sides = {name: row[name][row[name].rfind(LAST) :] for name in ("chosen", "rejected")}
    questions = {text.partition("\n\nAssistant:")[0] for text in sides.values()}
    return sides if len(questions) == 1 and len(min(questions)) <= 120 and sides["chosen"] != sides["rejected"] else None


@pytest.fixture
def train(data: Path, tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`train("dpo", ...)`: the lines of metrics.jsonl by split."""
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))

    def run(method: str, *flags: Any) -> dict[str, list[dict[str, Any]]]:
        model = ("--model", STORIES, "--data", data, "--max-seq-length", 64, "--num-layers", -1, "--rank", 16, "--scale", 2)
        training = ("--batch-size", 16, "--optimizer", "adamw", "--lr-schedule", "cosine", "--adapter-path", tmp_path / "run")
        outcome = mlxlora(method, *model, *training, *flags)
        assert outcome.code == 0, outcome.err
        lines = [orjson.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
        return {split: [line for line in lines if line["split"] == split] for split in ("train", "valid")}

    return run


def test_dpo_generalises(train: Any, tmp_path: Path) -> None:
    flags = ("--iters", 60, "--learning-rate", 1e-3, "--val-batches", -1, "--steps-per-eval", 0)
    before, after = train("dpo", *flags)["valid"]
    print(f"\nreward accuracy on {HELD_OUT} held-out pairs: {after['rewards/accuracies']:.3f}, margin {after['rewards/margins']:.3f}")
    assert before["loss"] == pytest.approx(0.6931472, rel=1e-5) and abs(before["rewards/margins"]) < 1e-4
    assert after["rewards/accuracies"] > CHANCE
    assert after["rewards/margins"] > 0
    assert "\n\nAssistant" not in generated(tmp_path / "run")


@pytest.mark.parametrize(("method", "flags"), [("orpo", ("--beta", 1)), ("cpo", ())])
def test_margins_grow(method: str, flags: tuple[Any, ...], train: Any, tmp_path: Path) -> None:
    """Of the batches that are seen; the answers become likelier too."""
    more = ("--iters", 24, "--steps-per-report", 6, "--learning-rate", 5e-3, "--val-batches", 0)
    steps = train(method, *more, *flags)["train"]
    first, last = steps[0], steps[-1]
    print(f"\n{method}: margin {first['rewards/margins']:.4f} to {last['rewards/margins']:.4f}, nll {last['nll_loss']:.3f}")
    assert last["rewards/margins"] > first["rewards/margins"] and last["nll_loss"] < first["nll_loss"]
    assert generated(tmp_path / "run")


def generated(adapters: Path) -> str:
    """What mlx-lm's own command says with the adapters."""
    program, environment = Path(sys.executable).parent / "mlx_lm.generate", os.environ | {"HF_HUB_OFFLINE": "1"}
    arguments = ("--model", STORIES, "--adapter-path", adapters, "--prompt", "Hello", "--max-tokens", "12", "--verbose", "F")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
