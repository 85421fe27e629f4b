"""A run that was stopped anywhere, and then resumed, leaves the metrics of one that was not."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from tiny import text_rows

from mlxlora.checkpoint import save_checkpoint
from mlxlora.loop import Abandoned, Interruptible

TIMED = re.compile(r"seconds.*|.*_per_second|peak_memory_gb")
LENGTHS = ("--iters", 24, "--steps-per-report", 2, "--steps-per-eval", 5, "--save-every", 3)
VARIANTS = {
    "plain": (),
    "dropout": ("--dropout", 0.3, "--grad-accumulation-steps", 2),
    "dropout and gradient checkpointing": ("--dropout", 0.3, "--grad-checkpoint"),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 rows to train on, so that batches of two leave one over, and five to validate on."""
    return text_rows(tmp_path_factory.mktemp("rows"), longest=6, train=17, valid=5)


@pytest.fixture
def command(model_folder: Path, rows: Path) -> tuple[Any, ...]:
    """`mlxlora sft` of the tiny model."""
    optimisation = ("--optimizer", "adamw", "--learning-rate", 1e-3, "--warmup", 4, "--batch-size", 2)
    return "sft", "--model", model_folder, "--data", rows, "--num-layers", -1, "--val-batches", -1, *optimisation


@every_variant
def test_killed_at_any_point(command: tuple[Any, ...], variant: tuple[Any, ...], tmp_path: Path, mlxlora: Any) -> None:
    command, rng = (*command, *LENGTHS, *variant), random.Random(str(variant))
    assert mlxlora(*command, "--adapter-path", tmp_path / "whole").code == 0
    stopped = (*command, "--adapter-path", tmp_path / "stopped")
    for point in sorted(rng.sample(range(18), 2)):
        assert stop(signal.SIGKILL, stopped, tmp_path / "stopped", point, rng.uniform(0, 0.05)) == -signal.SIGKILL
        stopped = (*command, "--adapter-path", tmp_path / "stopped", "--resume")
    assert mlxlora(*stopped).code == 0
    same_run(tmp_path / "stopped", tmp_path / "whole")


def test_ctrl_c(command: tuple[Any, ...], tmp_path: Path, mlxlora: Any) -> None:
    command = (*command, *LENGTHS, *VARIANTS["dropout"])
    assert mlxlora(*command, "--adapter-path", tmp_path / "whole").code == 0
    log = tmp_path / "log"
    assert stop(signal.SIGINT, (*command, "--adapter-path", tmp_path / "stopped"), tmp_path / "stopped", 7, 0.01, log) == 130
    assert "--resume" in log.read_text() and "Traceback" not in log.read_text()
    assert mlxlora(*command, "--adapter-path", tmp_path / "stopped", "--resume").code == 0
    same_run(tmp_path / "stopped", tmp_path / "whole")


def test_ctrl_c_before_the_first_step(
    command: tuple[Any, ...], tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*command, *LENGTHS)
    assert mlxlora(*command, "--adapter-path", tmp_path / "whole").code == 0

    def interrupted(*_: Any) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr("mlxlora.runs._pieces", interrupted)
        assert mlxlora(*command, "--adapter-path", tmp_path / "stopped").code == 130
    assert mlxlora(*command, "--adapter-path", tmp_path / "stopped", "--resume").code == 0
    same_run(tmp_path / "stopped", tmp_path / "whole")


def test_one_ctrl_c_waits_for_the_step_and_two_do_not() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt) as raised, Interruptible() as interrupt, interrupt.held():
        signal.raise_signal(signal.SIGINT)
        done.append("step")
    assert done == ["step"] and raised.type is KeyboardInterrupt
    with pytest.raises(Abandoned), Interruptible() as interrupt, interrupt.held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_saves_nothing(
    command: tuple[Any, ...], tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def abandoned(*_: Any, **__: Any) -> None:
        raise Abandoned

    monkeypatch.setattr("mlxlora.runs.train", abandoned)
    assert mlxlora(*command, *LENGTHS, "--adapter-path", tmp_path).code == 130
    assert not (tmp_path / "checkpoints").exists()


def truncated(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flipped(checkpoint: Path) -> None:
    file = checkpoint / "adapters.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def without_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_bytes(b'{"step": ')


@pytest.mark.parametrize("damage", [truncated, flipped, without_state])
def test_damaged_checkpoint(damage: Any, command: tuple[Any, ...], finished: Path, tmp_path: Path, mlxlora: Any) -> None:
    shutil.copytree(finished, tmp_path / "damaged")
    damage(tmp_path / "damaged" / "checkpoints" / "0000006")
    outcome = mlxlora(*command, *SHORT, "--adapter-path", tmp_path / "damaged", "--resume")
    assert outcome.code == 0, outcome.err
    assert "0000006: damaged checkpoint" in outcome.out and "0000003 after step 3" in outcome.out
    same_run(tmp_path / "damaged", finished)


def test_no_checkpoint_is_good(command: tuple[Any, ...], finished: Path, mlxlora: Any) -> None:
    for checkpoint in (finished / "checkpoints").iterdir():
        truncated(checkpoint)
    before = sorted(path.name for path in finished.rglob("*"))
    outcome = mlxlora(*command, *SHORT, "--adapter-path", finished, "--resume")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert all(f"{step}: damaged checkpoint (optimizer.safetensors" in outcome.err for step in ("0000003", "0000006"))
    assert sorted(path.name for path in finished.rglob("*")) == before


def test_the_adapters_are_there_before_the_last_checkpoint(
    command: tuple[Any, ...], tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed between the two has nothing left to train and would not save them any more."""
    command, done = (*command, *SHORT, "--adapter-path", tmp_path), []

    def killed(folder: Path, *arguments: Any, **options: Any) -> Path:
        path = save_checkpoint(folder, *arguments, **options)
        done.append((folder / "adapters.safetensors").read_bytes() == (path / "adapters.safetensors").read_bytes())
        return path

    monkeypatch.setattr("mlxlora.runs.save_checkpoint", killed)
    assert mlxlora(*command).code == 0 and done == [True, True]


def test_changed_option(command: tuple[Any, ...], finished: Path, mlxlora: Any) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    outcome = mlxlora(*command, *SHORT, "--adapter-path", finished, "--resume", "--learning-rate", 2e-3, "--rank", 4)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "learning_rate was 0.001 and is 0.002" in outcome.err and "rank was 8 and is 4" in outcome.err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_goes_on(command: tuple[Any, ...], tmp_path: Path, mlxlora: Any) -> None:
    command = (*command, *SHORT, "--val-batches", 0, "--lora-keys", "self_attn.q_proj", "--lora-keys", "mlp.up_proj")
    assert mlxlora(*command, "--iters", 9, "--adapter-path", tmp_path / "whole").code == 0
    assert mlxlora(*command, "--adapter-path", tmp_path / "longer").code == 0
    assert mlxlora(*command, "--adapter-path", tmp_path / "longer", "--resume").code == 0
    assert records(tmp_path / "longer")[-1]["step"] == 6
    assert mlxlora(*command, "--adapter-path", tmp_path / "longer", "--resume", "--iters", 9).code == 0
    same_run(tmp_path / "longer", tmp_path / "whole")


SHORT = ("--iters", 6, "--save-every", 3, "--steps-per-report", 1, "--dropout", 0.1)


@pytest.fixture
def finished(command: tuple[Any, ...], tmp_path: Path, mlxlora: Any) -> Path:
    """A run of six steps with checkpoints after the third and the last."""
    assert mlxlora(*command, *SHORT, "--adapter-path", tmp_path / "finished").code == 0
    return tmp_path / "finished"


def stop(how: signal.Signals, arguments: tuple[Any, ...], folder: Path, step: int, delay: float, log: Path | None = None) -> int:
    """Exit code of a process that is sent a signal `delay` seconds after it reported `step`."""
    with (log or folder.with_name("ignored")).open("wb") as output:
        line = [sys.executable, "-m", "mlxlora_cli", *map(str, arguments)]
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not reached(folder, step):
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(how)
        return process.wait(60)


def reached(folder: Path, step: int) -> bool:
    lines = (folder / "metrics.jsonl").read_bytes().splitlines() if (folder / "metrics.jsonl").exists() else []
    return bool(lines) and orjson.loads(lines[-1])["step"] >= step


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock and the machine."""
    lines = map(orjson.loads, (folder / "metrics.jsonl").read_bytes().splitlines())
    return [{name: value for name, value in line.items() if not TIMED.fullmatch(name)} for line in lines]


def same_run(ours: Path, theirs: Path) -> None:
    """The same metrics, and the same adapters bit for bit."""
    assert records(ours) == records(theirs)
    a, b = ((folder / "adapters.safetensors").read_bytes() for folder in (ours, theirs))
    np.testing.assert_array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))
