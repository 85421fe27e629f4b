"""Numbers that TRL computed (shared/parity/README.md), as batches. Positions are flattened row by row."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.batch import Batch
from mlxlora.objectives.objective import Objective

PATH = Path(__file__).resolve().parents[3] / "shared" / "parity" / "loss_goldens.json"
GOLDENS = json.loads(PATH.read_text()) if PATH.exists() else {}
present = pytest.mark.skipif(not GOLDENS, reason=f"needs {PATH}")
RTOL = 1e-5


def cases(family: str, *, but: dict[str, str] | None = None) -> list:
    """Parameters of a test: the goldens of a family but those listed as different, with their names."""
    return [pytest.param(c, id=c["name"]) for c in GOLDENS.get(family, []) if c["name"] not in (but or {})]


def grid(*arrays: list) -> np.ndarray:
    """Rows of several [B, T] lists under each other; null is NaN."""
    return np.concatenate([np.array(a, dtype=np.float32) for a in arrays])


def flat_batch(completion: np.ndarray, attention: np.ndarray | None = None, **columns: np.ndarray) -> tuple[Batch, np.ndarray]:
    """The batch of the scored positions of [S, T] masks, and where they are: [S, T] bool. Columns are [S, T] or not by token."""
    completion = completion.astype(bool)
    loss_mask = completion if attention is None else attention.astype(bool)
    n = int(loss_mask.sum())
    batch = Batch(
        tokens=mx.zeros(loss_mask.shape, mx.int32),
        positions=mx.array(np.flatnonzero(loss_mask).astype(np.int32)),
        targets=mx.zeros((n,), mx.int32),
        sequence=mx.array(np.nonzero(loss_mask)[0].astype(np.int32)),
        lengths=mx.array(completion.sum(1).astype(np.int32)),
        prompt=None if attention is None else mx.array(~completion[loss_mask]),
        **{name: mx.array(a[loss_mask] if a.shape == loss_mask.shape else a) for name, a in columns.items()},
    )
    return batch, loss_mask


def evaluate(objective: Objective, logps: np.ndarray, batch: Batch, loss_mask: np.ndarray) -> tuple[float, dict, np.ndarray]:
    """Loss, metrics and the gradient as [S, T], 0 at positions that are not scored."""

    def loss(logps: mx.array) -> tuple[mx.array, dict]:
        return objective(logps, batch)

    (value, metrics), gradient = mx.value_and_grad(loss)(mx.array(logps[loss_mask]))
    whole = np.zeros(loss_mask.shape, np.float32)
    whole[loss_mask] = np.array(gradient)
    return value.item(), {k: v.item() for k, v in metrics.items()}, whole


def values(objective: Objective, name: str, logps: np.ndarray, batch: Batch, loss_mask: np.ndarray) -> np.ndarray:
    """The values of one term, before its mean."""
    (found,) = (t for _, t in objective.terms if t.name == name)
    return np.array(found.values(mx.array(logps[loss_mask]), batch))


def close(ours: object, theirs: object, *, operands: float = 0.0) -> None:
    """Equal to 1e-5 relative; what is left of cancelling `operands`, to a millionth of them (some units in the last place)."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=1e-6 * operands + 1e-12)
