"""Random sequences, and batches of them in any layout."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from attrs import frozen

from mlxlora.batch import Batch
from mlxlora.objectives.objective import Objective

TOKEN_COLUMNS = ("ref_logps", "old_logps", "entropy", "log_sum_sq_probs", "divergence")


@frozen(eq=False)
class Row:
    """One sequence: the columns of its trained tokens, and its own."""

    columns: dict[str, np.ndarray]
    prompt: np.ndarray
    advantage: float


def rows(seed: int, pairs: int = 3, *, longest: int = 5, prompts: bool = True) -> list[Row]:
    """2 * pairs sequences; log-probabilities of the three policies differ by up to half a nat."""
    rng = np.random.default_rng(seed)
    return [_row(rng, longest, prompts) for _ in range(2 * pairs)]


def _row(rng: np.random.Generator, longest: int, prompts: bool) -> Row:
    prompt, n = int(rng.integers(0, 3)) if prompts else 0, int(rng.integers(1, longest + 1))
    logps = -rng.exponential(1.5, prompt + n) - 0.05
    columns = {
        "logps": logps,
        "ref_logps": logps + rng.uniform(-0.5, 0.5, prompt + n),
        "old_logps": logps + rng.uniform(-0.5, 0.5, prompt + n),
        "entropy": rng.uniform(0, 3, prompt + n),
        "divergence": rng.uniform(0, 3, prompt + n),
        "log_sum_sq_probs": -rng.exponential(1.0, prompt + n),
    }
    return Row(columns, np.arange(prompt + n) < prompt, float(rng.normal()))


def build(
    rows: Sequence[Row], *, layout: Sequence[int] | None = None, filler: int = 0, dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, Batch]:
    """Log-probabilities [N] and the batch, with the rows' tokens laid out in the order `layout`, then `filler` tokens."""
    order = list(range(len(rows)) if layout is None else layout)
    rng, width = np.random.default_rng(0), 16

    def column(name: str) -> mx.array:
        tail = -rng.uniform(0.1, 3, filler)
        return mx.array(np.concatenate([*(rows[s].columns[name] for s in order), tail]), dtype)

    def flags(parts: list[np.ndarray], tail: int, kind: mx.Dtype) -> mx.array:
        return mx.array(np.concatenate([*parts, np.full(filler, tail)]), kind)

    sizes = [len(rows[s].prompt) for s in order]
    batch = Batch(
        tokens=mx.zeros((len(rows), width), mx.int32),
        positions=flags([place * width + np.arange(n) for place, n in enumerate(sizes)], 0, mx.int32),
        targets=mx.zeros((sum(sizes) + filler,), mx.int32),
        sequence=flags([np.full(n, s) for s, n in zip(order, sizes, strict=True)], len(rows), mx.int32),
        lengths=mx.array([int((~row.prompt).sum()) for row in rows], mx.int32),
        prompt=flags([rows[s].prompt for s in order], False, mx.bool_),
        advantages=mx.array([row.advantage for row in rows], dtype),
        preference_score=mx.array([1 + abs(row.advantage) for row in rows[: len(rows) // 2]], dtype),
        label=mx.array([row.advantage > 0 for row in rows]),
        from_reference=mx.array([row.advantage > 0.5 for row in rows]),
        reference_point=mx.array([abs(row.advantage) / 2 for row in rows], dtype),
        **{name: column(name) for name in TOKEN_COLUMNS},
    )
    return column("logps"), batch


def swapped(rows: Sequence[Row], pairs: Sequence[int]) -> list[Row]:
    """The pairs of `rows` at these places, chosen first."""
    half = len(rows) // 2
    return [rows[p] for p in pairs] + [rows[half + p] for p in pairs]


def unwatched(objective: Objective) -> Objective:
    """The terms that are optimized, without the metrics."""
    return Objective(tuple((c, t) for c, t in objective.terms if c))


def gradient(objective: Objective, logps: mx.array, batch: Batch) -> tuple[float, np.ndarray]:
    """Loss, and its gradient [N]."""
    loss, grad = mx.value_and_grad(lambda logps: objective(logps, batch)[0])(logps)
    return loss.item(), np.array(grad)


def by_row(values: np.ndarray, batch: Batch) -> list[np.ndarray]:
    """[N] to one array per sequence."""
    return [values[np.array(batch.sequence) == s] for s in range(batch.sequences)]
