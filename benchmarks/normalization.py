"""How exact are sums over the vocabulary? Errors against float64 of log-probabilities, entropies and their gradients.

    python -m benchmarks.normalization [--device gpu] [--quick] [--json FILE]

Random logits N(0, 3²) of real vocabulary sizes, in float32 and bfloat16 (float64's value is that of the rounded logits). "Plain" is
one reduction over the row (`mx.logsumexp`), "blocked" sums blocks of 128 (`models/normalize.py`), and "scorer" is what training
uses on this backend (`models/distribution.py`). The bias is the mean signed error of log π; errors are the largest, of log π
and entropies in nats, of gradients relative to the largest number of the gradient. `--device gpu` runs on Metal or CUDA.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mlxlora.utils.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.common import flags, parsed, tell  # noqa: E402
from mlxlora.models.distribution import statistics  # noqa: E402
from mlxlora.models.normalize import logsumexp  # noqa: E402
from mlxlora.objectives.numerics import row_sums  # noqa: E402

SIZES = (49_152, 151_936, 262_144)
ROWS = 16
COLUMNS = {
    "case": "case",
    "way": "way",
    "bias": "bias of log π",
    "logps": "log π",
    "entropy": "entropy",
    "dlogps": "gradient of log π",
    "dentropy": "gradient of entropy",
}

Values = Callable[[mx.array, mx.array], mx.array]


def plain(logits: mx.array, targets: mx.array, blocks: bool = False) -> mx.array:
    """[2, n] log-probabilities and entropies, by the definition."""
    wide = logits.astype(mx.float32)
    logs = wide - logsumexp(wide, keepdims=True, blocks=blocks)
    logps = mx.take_along_axis(logs, targets[:, None], axis=-1)[:, 0]
    return mx.stack([logps, row_sums(-mx.exp(logs) * logs, blocks=blocks)])


def scored(logits: mx.array, targets: mx.array, columns: Mapping[str, bool] | None = None) -> mx.array:
    """The same as training computes it."""
    return statistics(logits, targets, columns or {"entropy": True})


WAYS: dict[str, Values] = {"plain": plain, "blocked": partial(plain, blocks=True), "scorer": scored}


def exact(logits: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    """Log-probabilities, entropies and the gradients of their sums, in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    probs, rows = np.exp(logs), np.arange(len(targets))
    entropies = -(probs * logs).sum(axis=-1)
    onehot = np.zeros_like(probs)
    onehot[rows, targets] = 1
    return [logs[rows, targets], entropies, onehot - probs, -probs * (logs + entropies[:, None])]


def errors(way: Values, logits: mx.array, targets: mx.array, truth: list[np.ndarray]) -> dict[str, float]:
    """Of one way, against float64; the logits are float32 or bfloat16."""
    values = [np.array(row).astype(np.float64) for row in way(logits, targets)]
    wide = logits.astype(mx.float32)  # a gradient in bfloat16 is rounded to its 8 bits, however it was computed
    for row in range(2):
        values.append(np.array(mx.grad(lambda z, row=row: way(z, targets)[row].sum())(wide)).astype(np.float64))
    worst = [float(np.abs(found - right).max()) for found, right in zip(values, truth, strict=True)]
    return {
        "bias": float((values[0] - truth[0]).mean()),
        "logps": worst[0],
        "entropy": worst[1],
        "dlogps": worst[2] / float(np.abs(truth[2]).max()),
        "dentropy": worst[3] / float(np.abs(truth[3]).max()),
    }


def table(sizes: tuple[int, ...], rows: int) -> list[dict[str, Any]]:
    """A row for each size, dtype and way."""
    found, rng = [], np.random.default_rng(0)
    for size in sizes:
        numbers = (3 * rng.standard_normal((rows, size))).astype(np.float32)
        targets = rng.integers(0, size, rows).astype(np.int32)
        for dtype in (mx.float32, mx.bfloat16):
            logits = mx.array(numbers).astype(dtype)
            truth = exact(np.array(logits.astype(mx.float32)).astype(np.float64), targets)
            for name, way in WAYS.items():
                measured = errors(way, logits, mx.array(targets), truth)
                case = f"V={size} {str(dtype).rpartition('.')[2]}"
                found.append({"case": case, "way": name, **{key: float(f"{value:.1e}") for key, value in measured.items()}})
    return found


def main() -> None:
    options = parsed(flags(__doc__, repetitions=1))
    tell(table((4_096,) if options.quick else SIZES, 4 if options.quick else ROWS), COLUMNS, options)


if __name__ == "__main__":
    main()
