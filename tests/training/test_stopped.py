"""A run that a signal, a reward or a validation stopped leaves a checkpoint, from which it ends as if nothing had been."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxlora.errors import RunError
from mlxlora.training.hooks import Report, Validation
from mlxlora.training.interrupt import Interruptible
from tests.support.tiny import text_rows
from tests.training.test_resume import records, same_run

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """`nohup pytest` ignores this signal, and what is ignored stays ignored."""
    before = signal.signal(HANGUP, signal.SIG_DFL)
    yield
    signal.signal(HANGUP, before)


@pytest.fixture
def command(model_folder: Path, tmp_path: Path) -> tuple[Any, ...]:
    """`mlxlora sft` of the tiny model: six steps, a validation after every second, a checkpoint at the end."""
    (tmp_path / "rows").mkdir()
    data = text_rows(tmp_path / "rows", longest=3, train=8, valid=2)
    how = ("--batch-size", 2, "--iters", 6, "--steps-per-report", 1, "--steps-per-eval", 2, "--answers", 0, "--dropout", 0.1)
    return "sft", "--model", model_folder, "--data", data, "--learning-rate", 1e-2, *how, "--keep-best"


def after_step(step: int, act: Any, monkeypatch: pytest.MonkeyPatch, hook: Any = Report, name: str = "__call__") -> None:
    """Calls `act` after a hook of this step."""
    call = getattr(hook, name)

    def acting(self: Any, progress: Any, *rest: Any) -> Any:
        found = call(self, progress, *rest)
        if progress.step == step:
            act()
        return found

    monkeypatch.setattr(hook, name, acting)


@pytest.mark.parametrize("number", {signal.SIGTERM, HANGUP})
def test_a_signal_saves_like_ctrl_c(
    number: signal.Signals, command: tuple[Any, ...], tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    before = signal.getsignal(number)
    assert mlxlora(*command, "--adapter-path", whole).code == 0
    with monkeypatch.context() as patch:
        after_step(3, lambda: [signal.raise_signal(number) for _ in range(2)], patch)  # a closing terminal sends two
        outcome = mlxlora(*command, "--adapter-path", stopped)
    assert outcome.code == 130 and "--resume" in outcome.out, outcome
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["0000003"]
    assert signal.getsignal(number) == before
    assert mlxlora(*command, "--adapter-path", stopped, "--resume").code == 0
    same_run(stopped, whole)


def test_signals_between_steps() -> None:
    with pytest.raises(KeyboardInterrupt), Interruptible() as outer, outer:
        signal.raise_signal(signal.SIGTERM)
    with Interruptible():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(HANGUP)
        signal.raise_signal(HANGUP)  # while the checkpoint is written


@pytest.mark.skipif(HANGUP == signal.SIGTERM, reason="no SIGHUP")
def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(HANGUP, signal.SIG_IGN)
    try:
        with Interruptible():
            signal.raise_signal(HANGUP)
    finally:
        signal.signal(HANGUP, before)


@pytest.mark.parametrize("step", [2, 6])
def test_a_validation_that_failed_is_made_again(
    step: int, command: tuple[Any, ...], tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert mlxlora(*command, "--adapter-path", whole).code == 0

    def failed() -> None:
        raise RunError("no memory")

    for more in ((), ("--resume",)):  # and fails again
        with monkeypatch.context() as patch:
            after_step(step, failed, patch, Validation, "_measured")
            assert mlxlora(*command, "--adapter-path", stopped, *more).code == 1
    assert mlxlora(*command, "--adapter-path", stopped, "--resume").code == 0
    assert [row["step"] for row in records(stopped) if row["split"] == "valid"] == [0, 2, 4, 6]
    same_run(stopped, whole)
    assert mlxlora(*command, "--adapter-path", stopped, "--resume").code == 0  # a finished run makes none again
    same_run(stopped, whole)


REWARD = """
import os, re, signal
calls = []
def mine(prompts, completions, **_):
    calls.append(1)
    if len(calls) == AT:
        ACT
    return [float(len(set(text))) for text in completions]
"""
RAISES = 'raise ValueError("no network")'
HOLDS = 're.match(r"(a+)+$", "a" * 60 + "b")'  # for years, without releasing the interpreter


ENDS = "os._exit(3)"
CTRL_C = f"os.kill(os.getppid(), signal.SIGINT); {HOLDS}"


def test_a_reward_that_stops_a_run_saves_first(model_folder: Path, tmp_path: Path, mlxlora: Any, eager: None) -> None:
    rewards, prompts = tmp_path / "mine.py", tmp_path / "train.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{letter}"}}\n' for letter in "abcdef"))
    length = ("--iters", 4, "--batch-size", 2, "--max-completion-length", 6, "--val-batches", 0, "--answers", 0)
    command = ("grpo", "--model", model_folder, "--data", prompts, *length, "--reward-file", rewards, "--rewards", "mine")

    def run(folder: str, at: int = 0, act: str = "pass", *more: object) -> Any:
        """The reward acts when it is called for this time."""
        rewards.write_text(REWARD.replace("AT", str(at)).replace("ACT", act))
        return mlxlora(*command, "--steps-per-report", 1, "--adapter-path", tmp_path / folder, *more)

    assert run("whole").code == 0
    first = run("first", 1, RAISES)
    assert first.code == 2 and "no network" in first.err and not (tmp_path / "first/checkpoints").exists()
    for at, act, code, told, saved in (
        (2, RAISES, 2, "no network", 1),  # nothing was there that --overwrite would have to replace
        (2, HOLDS, 1, "reward mine took longer than --reward-timeout 2 s on ", 2),
        (2, CTRL_C, 130, "", 3),
        (1, ENDS, 1, "mine.py: the process of the reward functions ended with exit code 3", 3),
        (0, "pass", 0, "", 4),
    ):
        stopped = run("first", at, act, "--reward-timeout", 2, *(["--resume"] if saved > 1 else []))
        assert stopped.code == code and told in stopped.err and "Traceback" not in stopped.err, stopped
        assert ("--resume" in stopped.out) == (code in (2, 130))
        assert max((tmp_path / "first/checkpoints").iterdir()).name == f"000000{saved}"
    same_run(tmp_path / "first", tmp_path / "whole")
