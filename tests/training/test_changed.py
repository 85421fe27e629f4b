"""A run that is resumed is the run that was stopped: what changed since is named, and refused unless that is wanted."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import orjson
import pytest

from tests.support.tiny import text_rows

FAST = ("--batch-size", 2, "--save-every", 1, "--steps-per-report", 1, "--answers", 0, "--lr-schedule", "constant", "--warmup", 0)


@pytest.fixture
def run(model_folder: Path, tmp_path: Path, mlxlora: Any) -> Callable[..., Any]:
    """`run(*flags)`: a tiny run of two steps whose model and rows are files of this test."""
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "rows").mkdir()
    text_rows(tmp_path / "rows", longest=3, train=6, valid=2)
    command = ("sft", "--model", tmp_path / "model", "--data", tmp_path / "rows", *FAST, "--iters", 2)

    def train(*flags: Any, folder: str = "run") -> Any:
        return mlxlora(*command, "--adapter-path", tmp_path / folder, *flags)

    return train


def other_rows(folder: Path) -> None:
    file = folder / "rows/train.jsonl"
    file.write_text(file.read_text().replace("xyz", "xyw", 1))


def other_valid_rows(folder: Path) -> None:
    file = folder / "rows/valid.jsonl"
    file.write_text(file.read_text().replace("xyz", "xyw", 1))


def other_weights(folder: Path) -> None:
    file = str(folder / "model/model.safetensors")
    weights: Any = mx.load(file)
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"] * 1.01
    mx.save_safetensors(file, weights, {"format": "mlx"})


def other_tokenizer(folder: Path) -> None:
    file = folder / "model/tokenizer_config.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | {"chat_template": "{{ messages }}"}))


CHANGES = {"train rows": other_rows, "valid rows": other_valid_rows, "base weights": other_weights, "tokenizer": other_tokenizer}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_named(name: str, run: Callable[..., Any], tmp_path: Path) -> None:
    assert run().code == 0
    CHANGES[name](tmp_path)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    refused = run("--resume", "--iters", 3)
    assert refused.code == 2 and refused.err.count("\n") == 1, refused
    assert f"--resume: {name} changed since" in refused.err and "--allow-changed" in refused.err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    allowed = run("--resume", "--iters", 3, "--allow-changed")
    assert allowed.code == 0 and f"{name} changed since" in allowed.out, allowed
    assert run("--resume", "--iters", 4).code == 0  # the new checkpoint has the new digests
    assert "allow_changed" not in (tmp_path / "run/config.yaml").read_text()


def test_options_that_change_no_result_may_change(run: Callable[..., Any]) -> None:
    assert run().code == 0
    done = run("--resume", "--iters", 3, "--grad-checkpoint", "--memory-limit", 4, "--micro-batch", 1)
    assert done.code == 0, done.err


def test_a_checkpoint_of_another_run(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run().code == 0 and run("--learning-rate", 0.125, "--iters", 4, folder="other").code == 0
    shutil.copytree(tmp_path / "other/checkpoints/0000004", tmp_path / "run/checkpoints/0000004")
    refused = run("--resume", "--iters", 5)
    assert refused.code == 2 and "0000004 is a checkpoint of another run (learning_rate was 0.125 and is " in refused.err


def test_a_copy_stays_and_is_not_resumed_from(run: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "run/checkpoints"
    assert run().code == 0
    copies = [shutil.copytree(folder / "0000001", folder / name) for name in ("0000001-good", "0000009-good")]
    resumed = run("--resume", "--iters", 4, "--save-total-limit", 1)
    assert resumed.code == 0 and "0000002 after step 2" in resumed.out
    assert run("--overwrite").code == 0
    assert all((copy / "state.json").exists() for copy in copies)


def test_a_checkpoint_of_an_early_version(run: Callable[..., Any], tmp_path: Path) -> None:
    """It does not say what its run was made of."""
    assert run().code == 0
    file = tmp_path / "run/checkpoints/0000002/state.json"
    state = orjson.loads(file.read_bytes())
    digests = state.pop("sha256")
    for name in ("origin", "owed", "rounding"):
        del state[name]
    digests["state.json"] = hashlib.sha256(orjson.dumps(state, option=orjson.OPT_SORT_KEYS)).hexdigest()
    file.write_bytes(orjson.dumps(state | {"sha256": digests}))
    other_rows(tmp_path)
    assert run("--resume", "--iters", 3).code == 0
