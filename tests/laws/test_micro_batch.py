"""Law of micro-batches: an update does not depend on how its batch is divided, or the batch is not divided."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora.adapters.prepare import prepare
from mlxlora.batch import Batch
from mlxlora.config.options import AdapterOptions, Training
from mlxlora.data.batching import MicroBatch, collate
from mlxlora.errors import InputError
from mlxlora.models.logprobs import Scorer, scorer
from mlxlora.models.teacher import with_teacher
from mlxlora.objectives.cross_row import compares_rows
from mlxlora.objectives.divergences import forward_kl
from mlxlora.objectives.objective import Objective
from mlxlora.training.micro_batch import BatchDivider, fixed_size
from mlxlora.training.step import columns_of, make_step
from tests.laws.test_objectives import OBJECTIVES, OF_THE_WHOLE_BATCH
from tests.support.paths import Outcome
from tests.support.tiny import dense, example, shaken

PAIRS = 3


@pytest.fixture(scope="module")
def micro() -> MicroBatch:
    """Three pairs with every column that a source adds."""
    rng = np.random.default_rng(0)
    examples = [example(seed, train_prompt=True, reference=True, longest=12) for seed in range(2 * PAIRS)]
    batch = collate(
        examples,
        advantages=mx.array(rng.normal(size=2 * PAIRS).astype(np.float32)),
        preference_score=mx.array(rng.uniform(0.5, 1, PAIRS).astype(np.float32)),
        label=mx.array(np.arange(2 * PAIRS) % 3 > 0),
        reference_point=mx.array(rng.uniform(0, 1, 2 * PAIRS).astype(np.float32)),
        from_reference=mx.array(np.arange(2 * PAIRS) % 2 == 0),
    )
    assert batch.ref_logps is not None
    batch = batch._replace(old_logps=batch.ref_logps + 0.1 * mx.random.normal(batch.ref_logps.shape, key=mx.random.key(0)))
    pairs = tuple((pair, PAIRS + pair) for pair in range(PAIRS))
    return MicroBatch(batch, 0, tuple(map(str, range(PAIRS))), groups=pairs)


def update(objective: Objective, batches: list[Batch]) -> tuple[dict[str, float], np.ndarray]:
    """Metrics, and all that a step of plain gradient descent moves the parameters by."""
    mx.random.seed(1)  # of the adapters
    model = shaken(prepare(dense(), AdapterOptions(num_layers=-1, rank=2)))
    before = dict(tree_flatten(model.trainable_parameters()))
    metrics = make_step(model, optim.SGD(1.0), objective, score=score_of(model, objective)).measured(*batches)
    moved = [np.array(p - before[name]).ravel() for name, p in sorted(tree_flatten(model.trainable_parameters()))]
    return metrics, np.concatenate(moved)


def score_of(model: object, objective: Objective) -> Scorer:
    score = scorer(model, columns=columns_of(objective))  # type: ignore[arg-type]
    return with_teacher(score, dense(), forward_kl) if "divergence" in objective.needs else score  # type: ignore[return-value]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_of_one_give_the_update_of_the_batch_or_are_refused(name: str, micro: MicroBatch) -> None:
    objective = OBJECTIVES[name]
    comparing = tuple(compares_rows(objective))
    assert bool(comparing) == (name in OF_THE_WHOLE_BATCH)
    divider = BatchDivider(0, cost=1e9, comparing=comparing)  # nothing fits
    if comparing:
        assert divider([micro]) == [micro]
        with pytest.raises(InputError, match=f"--micro-batch 1: .*{comparing[0]}.* compares the 3 rows of a batch"):
            BatchDivider(0, cost=1e9, rows=1, comparing=comparing)([micro])
        with pytest.raises(InputError, match=r"--micro-batch 1: .*; use auto, which keeps batches whole here, or at least 4"):
            fixed_size(Training(micro_batch="1"), comparing)
        assert fixed_size(Training(), comparing) == 0 and fixed_size(Training(micro_batch="4"), comparing) == 4
        return
    parts = divider([micro])
    assert len(parts) == PAIRS and fixed_size(Training(micro_batch="1"), comparing) == 1
    (whole, moved), (found, other) = update(objective, [micro.batch]), update(objective, [part.batch for part in parts])
    assert found == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert np.linalg.norm(other - moved) < 1e-4 * np.linalg.norm(moved) and moved.any()


def test_the_command_line_refuses_in_one_line(mlxlora: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = mlxlora("dpo", "--loss-type", "aot", "--micro-batch", 1, "--iters", 1, "--adapter-path", tmp_path / "run")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "--micro-batch 1: aot compares the 16 rows of a batch; use auto" in outcome.err
