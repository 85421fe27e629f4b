"""The next step may be begun before the metrics of one are read: nothing that a run leaves, tells or stops at depends on it."""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxlora.adapters.prepare import prepare
from mlxlora.batch import Batch
from mlxlora.config.options import AdapterOptions
from mlxlora.data.batching import MicroBatch, collate
from mlxlora.errors import RunError
from mlxlora.objectives.objective import term, token_mean
from mlxlora.training.loop import Every, LoopOptions, train
from mlxlora.training.progress import Progress
from mlxlora.training.step import Step, make_step
from tests.support.tiny import dense, example, same, shaken, snapshot

TOTAL = 7


def rows(weight: float, longest: int = 40) -> Batch:
    """Two rows whose log-probabilities the objective multiplies by `weight`."""
    batch = collate([example(seed, longest=longest) for seed in range(2)])
    return batch._replace(ref_logps=mx.full(batch.targets.shape, weight))


GOOD, WIDE, BAD = rows(1.0), rows(1.0, longest=80), rows(mx.inf)
pytestmark = pytest.mark.usefixtures("eager")


def fresh() -> Step:
    mx.random.seed(0)
    model = shaken(prepare(dense(), AdapterOptions(num_layers=-1, rank=4, scale=2.0, dropout=0.3))).train()
    objective = term("nll", lambda logps, batch: -logps * batch.ref_logps, token_mean())
    return make_step(model, optim.Adam(1e-2), objective)


def micros(batches: Sequence[Batch]) -> Iterator[tuple[MicroBatch, ...]]:
    for number, batch in enumerate(batches):
        yield (MicroBatch(batch, rows=(f"row {number}",), tokens=batch.tokens.size),)


class Seen:
    """What hooks saw: at every step its number; at every third, and at the end, the weights and the metrics so far as well."""

    def __init__(self, step: Step) -> None:
        self.step, self.steps, self.begun = step, [], []  # type: ignore[var-annotated]
        self.looks: list[tuple[int, dict[str, np.ndarray], dict[str, float]]] = []
        self.optimizer: list[dict[str, np.ndarray]] = []
        whole = step.whole

        def counted(batch: Batch) -> Any:
            self.begun.append(len(self.steps))
            return whole(batch)

        step.whole = counted

    def look(self, progress: Progress, _: Sequence[MicroBatch]) -> None:
        metrics = {name: metric.result for name, metric in progress.window.metrics.items()}
        metrics |= {"steps": progress.window.steps, "skipped": progress.window.skipped, "tokens": progress.window.tokens}
        self.looks.append((progress.step, snapshot(self.step.trained.model.trainable_parameters()), metrics))
        self.optimizer.append(snapshot(self.step.state[1]) | {"key": np.array(progress.key)})

    def hooks(self) -> tuple[Every, ...]:
        watch = Every(1, lambda progress, _: self.steps.append(progress.step), TOTAL, beside=True)
        return watch, Every(3, self.look, TOTAL)


def run(batches: Sequence[Batch], *, ahead: bool, **options: Any) -> tuple[Seen, Progress]:
    seen, progress = Seen(fresh()), Progress()
    try:
        train(seen.step, micros(batches), progress, TOTAL, seen.hooks(), LoopOptions(ahead=ahead, **options))
    finally:
        seen.look(progress, ())
    return seen, progress


def test_hooks_see_the_same() -> None:
    (ahead, progress), (plain, other) = (run([GOOD, WIDE] * 4, ahead=ahead) for ahead in (True, False))
    assert ahead.steps == plain.steps == list(range(1, TOTAL + 1))
    assert [at for at, *_ in ahead.looks] == [3, 6, 7, 7]
    for (at, weights, metrics), (other_at, other_weights, other_metrics) in zip(ahead.looks, plain.looks, strict=True):
        assert at == other_at and same(weights, other_weights) and metrics == other_metrics
    assert all(same(a, b) for a, b in zip(ahead.optimizer, plain.optimizer, strict=True))
    assert (progress.step, progress.tokens) == (other.step, other.tokens)


def test_the_next_step_is_begun_before_the_one_before_is_told() -> None:
    """But not where a hook looks at the model: after steps 3 and 6."""
    assert run([GOOD] * TOTAL, ahead=True)[0].begun == [0, 0, 1, 3, 3, 4, 6]
    assert run([GOOD] * TOTAL, ahead=False)[0].begun == list(range(TOTAL))


def test_plain_hooks_look() -> None:
    seen = Seen(fresh())
    train(
        seen.step,
        micros([GOOD] * 4),
        Progress(),
        4,
        [lambda progress, _: seen.steps.append(progress.step)],
        LoopOptions(ahead=True),
    )
    assert seen.begun == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [range(1, 2), range(3, 4), range(2, 4), (1, 3)])
def test_skipped_steps_are_the_same(bad: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    batches = [BAD if at in bad else GOOD for at in range(TOTAL)]
    seen = []
    for ahead in (True, False):
        told.append([])
        seen.append(run(batches, ahead=ahead, warn=told[-1].append)[0])
    assert told[0] == told[1] and len(told[0]) == len(bad)
    assert all(same(a[1], b[1]) and a[2] == b[2] for a, b in zip(seen[0].looks, seen[1].looks, strict=True))


def test_a_run_that_skips_too_often_stops_with_the_weights_of_before() -> None:
    found = []
    for ahead in (True, False):
        seen, progress = Seen(fresh()), Progress()
        with pytest.raises(RunError, match=r"step 4: .*the 3th in a row; the weights are those of step 1"):
            train(
                seen.step, micros([GOOD, *[BAD] * 3, GOOD, GOOD]), progress, TOTAL, seen.hooks(), LoopOptions(ahead=ahead, skips=3)
            )
        assert progress.step == 4
        found.append(snapshot(seen.step.trained.model.trainable_parameters()))
    assert same(*found)


def test_ctrl_c_leaves_the_state_after_a_whole_step() -> None:
    def interrupted(batches: int) -> Iterator[tuple[MicroBatch, ...]]:
        yield from micros([GOOD] * batches)
        raise KeyboardInterrupt

    found = []
    for ahead in (True, False):
        seen, progress = Seen(fresh()), Progress()
        with pytest.raises(KeyboardInterrupt):
            train(seen.step, interrupted(5), progress, TOTAL, seen.hooks(), LoopOptions(ahead=ahead))
        assert progress.step == 5 and seen.steps == [1, 2, 3, 4, 5]
        found.append(snapshot(seen.step.trained.model.trainable_parameters()))
    assert same(*found)


def test_an_error_of_a_step_tells_of_its_own_rows() -> None:
    """The step before is ended first, whose rows were others."""
    seen, progress = Seen(fresh()), Progress()
    whole = seen.step.whole

    def full(batch: Batch) -> Any:
        if batch.tokens.shape == WIDE.tokens.shape:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return whole(batch)

    seen.step.whole = full
    rows, length = WIDE.tokens.shape
    with pytest.raises(RunError, match=rf"out of memory with {rows} rows of {length} tokens"):
        train(seen.step, micros([GOOD, GOOD, WIDE]), progress, TOTAL, seen.hooks(), LoopOptions(ahead=True))
    assert progress.step == 2 and seen.steps == [1, 2]
