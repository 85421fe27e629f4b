"""Law: whatever changes a rounding is a function of configuration, step and checkpoint.

The shapes of what a step gets are recorded: those of a resumed run are those of an uninterrupted one.
"""

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora.data.shape_buckets import Signatures
from mlxlora.errors import InputError
from mlxlora.training import prepared
from mlxlora.training.micro_batch import BatchDivider
from mlxlora.training.progress import Progress, progress_of, state_of
from mlxlora.training.step import Step
from tests.support.tiny import text_rows
from tests.training.test_resume import same_run

STEPS, STOP = 12, 6


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of every batch that a step gets, by step."""
    found: list[Any] = []
    begin = Step.begin

    def seen(self: Step, *batches: Any, **more: Any) -> Any:
        found.append([(batch.tokens.shape, batch.positions.shape) for batch in batches])
        return begin(self, *batches, **more)

    monkeypatch.setattr(Step, "begin", seen)
    return found


@pytest.fixture
def command(model_folder: Path, tmp_path: Path) -> tuple[Any, ...]:
    """`mlxlora sft` on rows of many lengths."""
    (tmp_path / "rows").mkdir()
    data = text_rows(tmp_path / "rows", longest=60, train=24, valid=1)
    how = ("--batch-size", 2, "--steps-per-report", 1, "--val-batches", 0, "--answers", 0, "--save-every", 1, "--lr-schedule")
    return "sft", "--model", model_folder, "--data", data, *how, "constant", "--warmup", 0, "--learning-rate", 1e-2


def in_parts(command: tuple[Any, ...], folder: Path, mlxlora: Any, *more: Any) -> None:
    """A run to the end, and one that ends in the middle and goes on."""
    assert mlxlora(*command, "--iters", STEPS, "--adapter-path", folder / "whole").code == 0
    assert mlxlora(*command, "--iters", STOP, "--adapter-path", folder / "parts").code == 0
    assert mlxlora(*command, "--iters", STEPS, "--adapter-path", folder / "parts", "--resume", *more).code == 0


@pytest.mark.parametrize("rows", ["auto", 1])
def test_the_history_of_shapes(
    rows: Any, command: tuple[Any, ...], shapes: list[Any], tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = partial(Signatures, own=3)
    monkeypatch.setattr(prepared, "Signatures", few)
    monkeypatch.setattr(prepared, "BatchDivider", lambda *given, **more: BatchDivider(*given, **more, shapes=few()))
    in_parts((*command, "--micro-batch", rows), tmp_path, mlxlora)
    assert shapes[:STEPS] == shapes[STEPS:] and len(shapes) == 2 * STEPS
    same_run(tmp_path / "parts", tmp_path / "whole")


def test_the_division(
    command: tuple[Any, ...], shapes: list[Any], tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is divided, because the estimate is high; those after its measurement are not, in either run."""
    monkeypatch.setattr(prepared, "cost_of_position", lambda *_, **__: 1e12)
    in_parts(command, tmp_path, mlxlora)
    assert [len(parts) for parts in shapes[:STEPS]] == [2] + [1] * (STEPS - 1)
    assert shapes[:STEPS] == shapes[STEPS:]
    same_run(tmp_path / "parts", tmp_path / "whole")


def test_another_limit_is_measured_anew() -> None:
    first = BatchDivider(1 << 40, cost=5.0)
    first.held, first.cost, first.largest = 7, 3.0, 100
    first.shapes.restore({"a": [[1, 2, 3]]})
    same, other = BatchDivider(1 << 40, cost=5.0), BatchDivider(1 << 41, cost=5.0)
    for divider in (same, other):
        divider.restore(first.state())
        assert divider.shapes.state() == {"a": [[1, 2, 3]]} and divider.shapes.count == 1
    assert (same.held, same.cost, same.largest) == (7, 3.0, 100)
    assert (other.held, other.cost, other.largest) == (None, 5.0, 0)


@pytest.mark.parametrize("states", [{}, [{}], [3], [{"batches": {}, "measured": {}, "divider": {"shapes": {"a": [[1, 2]]}}}]])
def test_what_no_run_wrote_is_refused(states: Any) -> None:
    key = mx.zeros(2, mx.uint32)
    assert progress_of(state_of(Progress(key=key)), key).rounding == []
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)) as caught:
        progress_of({**state_of(Progress(key=key)), "rounding": states}, key)
    assert caught.type is not InputError
