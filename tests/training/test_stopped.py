"""A run that a signal, a reward or a validation stopped leaves a checkpoint, from which it ends as if nothing had been."""

import signal
from pathlib import Path
from typing import Any

import pytest

from mlxlora.errors import RunError
from mlxlora.training.hooks import Report, Validation
from mlxlora.training.interrupt import Interruptible
from tests.support.tiny import text_rows
from tests.training.test_resume import records, same_run

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)


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
from pathlib import Path
calls = []
def mine(prompts, completions, **_):
    calls.append(1)
    if len(calls) == AT:
        raise ValueError("no network")
    return [float(len(set(text))) for text in completions]
"""


def test_a_reward_that_raises_saves_first(tmp_path: Path, mlxlora: Any) -> None:
    rewards = tmp_path / "mine.py"
    length = ("--iters", 4, "--batch-size", 2, "--max-completion-length", 6, "--val-batches", 0, "--answers", 0)
    command = ("grpo", *length, "--steps-per-report", 1, "--reward-file", rewards, "--rewards", "mine")

    def run(fails_at: int, folder: str, *more: str) -> Any:
        rewards.write_text(REWARD.replace("AT", str(fails_at)))
        return mlxlora(*command, "--adapter-path", tmp_path / folder, *more)

    assert run(0, "whole").code == 0
    first = run(1, "first")
    assert first.code == 2 and "no network" in first.err and not (tmp_path / "first/checkpoints").exists()
    assert run(0, "first").code == 0  # nothing was there that --overwrite would have to replace
    stopped = run(3, "stopped")
    assert stopped.code == 2 and "no network" in stopped.err and "--resume" in stopped.out, stopped
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["0000002"]
    assert run(0, "stopped", "--resume").code == 0
    same_run(tmp_path / "stopped", tmp_path / "whole")
    same_run(tmp_path / "first", tmp_path / "whole")
