"""A run that was stopped anywhere, and then resumed, leaves the metrics of one that was not."""

import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

import mlxlora as ml
from mlxlora.config.options import Training
from mlxlora.data import sources
from mlxlora.errors import InputError
from mlxlora.objectives.supervised import sft
from mlxlora.training.checkpoint import save_checkpoint
from mlxlora.training.interrupt import Abandoned, Interruptible
from tests.support.tiny import text_rows
from tests.support.warm import ended, python

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
    optimization = ("--optimizer", "adamw", "--learning-rate", 1e-3, "--warmup", 4, "--batch-size", 2)
    return "sft", "--model", model_folder, "--data", rows, "--num-layers", -1, "--val-batches", -1, *optimization


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
        patch.setattr("mlxlora.training.run.batches_of_steps", interrupted)
        assert mlxlora(*command, "--adapter-path", tmp_path / "stopped").code == 130
    assert mlxlora(*command, "--adapter-path", tmp_path / "stopped", "--resume").code == 0
    same_run(tmp_path / "stopped", tmp_path / "whole")


def test_one_ctrl_c_waits_for_the_step_and_two_do_not() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt) as in_loraplus_group, Interruptible() as interrupt, interrupt.held():
        signal.raise_signal(signal.SIGINT)
        done.append("step")
    assert done == ["step"] and in_loraplus_group.type is KeyboardInterrupt
    with pytest.raises(Abandoned), Interruptible() as interrupt, interrupt.held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_saves_nothing(
    command: tuple[Any, ...], tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def abandoned(*_: Any, **__: Any) -> None:
        raise Abandoned

    monkeypatch.setattr("mlxlora.training.run.train", abandoned)
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
    """A run that is killed between the two has nothing left to train; before the first one, nothing to resume from but adapters."""
    command, done = (*command, *SHORT, "--adapter-path", tmp_path), []

    def killed(folder: Path, *arguments: Any, **options: Any) -> Path:
        path, own = save_checkpoint(folder, *arguments, **options), folder / "adapters.safetensors"
        done.append(own.exists() and own.read_bytes() == (path / own.name).read_bytes())
        return path

    monkeypatch.setattr("mlxlora.training.saving.save_checkpoint", killed)
    assert mlxlora(*command).code == 0 and done == [False, True]
    assert (tmp_path / "adapters.safetensors").exists()


def test_changed_option(command: tuple[Any, ...], finished: Path, mlxlora: Any) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    outcome = mlxlora(*command, *SHORT, "--adapter-path", finished, "--resume", "--learning-rate", 2e-3, "--rank", 4)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "learning_rate was 0.001 and is 0.002" in outcome.err and "rank was 8 and is 4" in outcome.err
    assert (finished / "metrics.jsonl").read_bytes() == before


def listing(folder: Path) -> list[Any]:
    return [(file.relative_to(folder), file.stat().st_mtime_ns) for file in sorted(folder.rglob("*"))]


@pytest.mark.parametrize("method", ["cpo", "gkd", "grpo"])
def test_another_method(method: str, finished: Path, mlxlora: Any) -> None:
    """Said before anything that would fail because its options are those of another method."""
    before = listing(finished)
    outcome = mlxlora(method, "--adapter-path", finished, "--resume", "--iters", 9, "--data", finished)
    told = f"--resume: {finished} is a run of sft; continue it with `mlxlora sft --resume --adapter-path {finished}`"
    assert (outcome.code, outcome.err) == (2, f"mlxlora: error: {told}\n") and listing(finished) == before
    with pytest.raises(InputError, match="is a run of sft; continue it with `mlxlora sft --resume"):
        ml.orpo(model="no", data="nothing", adapter_path=str(finished), resume=True)


def test_a_run_of_a_python_script(model_folder: Path, rows: Path, tmp_path: Path, mlxlora: Any) -> None:
    def train(**more: Any) -> Any:
        model, tokenizer = ml.load(str(model_folder))
        training = Training(iters=1, batch_size=2)
        return ml.run(model, tokenizer, sft(), sources.rows(str(rows)), training, adapter_path=str(tmp_path), answers=0, **more)

    assert train()["steps"] == train(resume=True)["steps"] == 1
    refused = mlxlora("sft", "--resume", "--adapter-path", tmp_path)
    assert refused.code == 2 and "is a run of a Python script; run that" in refused.err


def test_a_run_that_does_not_say_what_it_is(command: tuple[Any, ...], finished: Path, mlxlora: Any) -> None:
    """As those of earlier versions; it does afterwards."""
    file = finished / "config.yaml"
    method, rest = file.read_text().split("\n", 1)
    file.write_text(rest)
    assert method == "method: sft" and mlxlora(*command, *SHORT, "--adapter-path", finished, "--resume").code == 0
    assert file.read_text().startswith("method: sft\n")


@pytest.mark.parametrize("there", [(), ("adapters.safetensors",)], ids=["nothing", "adapters of something else"])
def test_no_run_there(there: tuple[str, ...], command: tuple[Any, ...], tmp_path: Path, mlxlora: Any) -> None:
    for name in there:
        (tmp_path / name).write_bytes(b"mine")
    before = listing(tmp_path)
    for flags in (command, ("sft",), ("sft", "--data", tmp_path)):
        outcome = mlxlora(*flags, "--adapter-path", tmp_path, "--resume")
        told = f"--resume: {tmp_path} holds no run (no config.yaml); leave --resume out, or name the folder of a run"
        assert (outcome.code, outcome.out, outcome.err) == (2, "", f"mlxlora: error: {told}\n")
    with pytest.raises(InputError, match="holds no run"):
        ml.sft(model=str(command[2]), data=str(command[4]), adapter_path=str(tmp_path), resume=True)
    assert listing(tmp_path) == before


def test_stopped_before_the_first_checkpoint(command: tuple[Any, ...], finished: Path, tmp_path: Path, mlxlora: Any) -> None:
    (tmp_path / "early").mkdir()
    shutil.copy(finished / "config.yaml", tmp_path / "early")
    outcome = mlxlora(*command, *SHORT, "--adapter-path", tmp_path / "early", "--resume")
    assert outcome.code == 0 and "starting from the beginning" in outcome.out
    same_run(tmp_path / "early", finished)


def test_adapters_without_a_checkpoint_stay(command: tuple[Any, ...], finished: Path, mlxlora: Any) -> None:
    """A run whose checkpoints were removed; it would begin anew, and delete what it had made."""
    shutil.rmtree(finished / "checkpoints")
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    outcome = mlxlora(*command, *SHORT, "--adapter-path", finished, "--resume")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and "but no checkpoint to resume from" in outcome.err
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_the_best_of_a_run_that_had_no_checkpoint_yet_is_no_obstacle(
    command: tuple[Any, ...], tmp_path: Path, mlxlora: Any
) -> None:
    best = (*command, *SHORT[2:], "--save-every", 4, "--keep-best", "--steps-per-eval", 1, "--adapter-path", tmp_path / "run")
    assert mlxlora(*best, "--iters", 3).code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if it had been killed after step 3 of more
    assert mlxlora(*best, "--iters", 5, "--resume").code == 0
    assert records(tmp_path / "run")[-1]["step"] == 5


def test_what_is_stored_starts_another_run(command: tuple[Any, ...], finished: Path, tmp_path: Path, mlxlora: Any) -> None:
    """Also after it was resumed: neither --resume nor --overwrite is an option of what it is."""
    for more in ("--resume", "--overwrite"):
        assert mlxlora(*command, *SHORT, "--adapter-path", finished, more).code == 0
    done = mlxlora("sft", "--config", finished / "config.yaml", "--adapter-path", tmp_path / "other")
    assert done.code == 0, done.err
    same_run(tmp_path / "other", finished)
    assert mlxlora("sft", "--config", finished / "config.yaml", "--adapter-path", tmp_path / "other").code == 2


@pytest.mark.parametrize(
    ("method", "advice"), [("sft", "eval --adapter-path {} --split test"), ("dpo", "dpo --resume --test --adapter-path {}")]
)
def test_a_finished_run_is_tested_without_training(method: str, advice: str, finished: Path, mlxlora: Any) -> None:
    outcome = mlxlora(method, "--model", "m", "--data", "d", "--test", "--adapter-path", finished)
    assert outcome.code == 2 and f"; to test it, `mlxlora {advice.format(finished)}`; to train, " in outcome.err
    assert "to test" not in mlxlora(method, "--model", "m", "--data", "d", "--adapter-path", finished).err


def test_the_advice_scores_the_rows_of_the_run(command: tuple[Any, ...], rows: Path, tmp_path: Path, mlxlora: Any) -> None:
    shutil.copytree(rows, tmp_path / "rows")
    shutil.copy(rows / "valid.jsonl", tmp_path / "rows" / "test.jsonl")
    changes = (
        "--data",
        tmp_path / "rows",
        "--mask-prompt",
        "--quantize",
        4,
        "--iters",
        2,
        "--test",
        "--adapter-path",
        tmp_path / "run",
    )
    assert mlxlora(*command, *changes).code == 0
    wanted = records(tmp_path / "run")[-1]
    loss_mask = mlxlora("eval", "--adapter-path", tmp_path / "run", "--split", "test")
    assert loss_mask.code == 0 and wanted["split"] == "test", loss_mask.err
    assert loss_mask.out.splitlines()[0] == f"loss {wanted['loss']:.6g}"


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
        line = [python(), "-m", "mlxlora_cli", *map(str, arguments)]
        process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not reached(folder, step):
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(how)
        return ended(process, 60)


def reached(folder: Path, step: int) -> bool:
    text = (folder / "metrics.jsonl").read_bytes() if (folder / "metrics.jsonl").exists() else b""
    lines = text[: text.rfind(b"\n") + 1].splitlines()  # the next may be half written
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
