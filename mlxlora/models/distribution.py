"""Statistics of the distribution at each position: log-probabilities, and columns of the batch that objectives ask for.

With c = max_v z_v, log s = log Σ_v exp(z_v - c) and log p_v = (z_v - c) - log s, which keeps float32's digits:

    log π(y)          log p_y                 d/dz_v = [v = y] - p_v
    entropy           H = -Σ p log p          d/dz_v = -p_v (z_v - Σ p z)
    log_sum_sq_probs  q = log Σ p²            d/dz_v = 2 (p_v² / Σ p² - p_v)
    correct           1 if y is the likeliest token, else 0; no gradient
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import mlx.core as mx

from ..objectives.numerics import row_sums
from ..utils.device import backend

COLUMNS = ("entropy", "log_sum_sq_probs", "correct")
"""Columns of `Batch` that come from the distribution at each target."""

_Parts = tuple[mx.array, mx.array, mx.array, mx.array]
"""(c [n], log s [n], weights [n, V], norm [n]), with p = weights / norm; c need not be the maximum."""


def statistics(logits: mx.array, targets: mx.array, columns: Mapping[str, bool]) -> mx.array:
    """Scores of each target, float32.

    Args:
        logits: [n, V].
        targets: [n].
        columns: names in `COLUMNS`; True: with a gradient.

    Returns:
        [1 + columns, n]: log-probabilities, then the columns in the order of `gradients_first`.
    """
    names = gradients_first(columns)
    with_gradient = tuple(name for name in names if columns[name])
    outputs: Any = _differentiable(with_gradient)(logits, targets)
    scores, parts = outputs[: len(with_gradient) + 1], outputs[len(with_gradient) + 1 :]
    rest = [mx.stop_gradient(_value(name, logits, targets, parts)) for name in names[len(with_gradient) :]]
    return mx.stack([*scores, *rest])


def gradients_first(columns: Mapping[str, bool]) -> list[str]:
    """Names of the columns in the order of scores: those with a gradient first."""
    return sorted(columns, key=lambda name: not columns[name])


def _value(name: str, logits: mx.array, targets: mx.array, parts: _Parts) -> mx.array:
    if name == "correct":
        return (mx.argmax(logits, axis=-1) == targets).astype(mx.float32)
    return _VALUES[name](logits, *parts)


@cache
def _differentiable(names: tuple[str, ...]) -> Callable[..., Any]:
    """(logits, targets) -> (log-probabilities, the columns `names`, parts); all but the parts have a gradient."""

    @mx.custom_function
    def forward(logits: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
        logps, *parts = _logps(logits, targets)
        return logps, *(_VALUES[name](logits, *parts) for name in names), *parts

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        (logits, targets), (_, *values) = primals, outputs
        parts = values[len(names) :]
        if not names and backend() != "cpu":
            return dlogps(logits, targets, parts[0], parts[1], cotangents[0]), mx.zeros_like(targets)
        total = _dlogps(logits, targets, parts[2], parts[3], cotangents[0])
        for name, value, g in zip(names, values, cotangents[1:], strict=False):
            total = total + _GRADIENTS[name](logits, *parts, value, g).astype(logits.dtype)
        return total, mx.zeros_like(targets)

    return forward


def _logps(logits: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
    """Log-probabilities [n] and parts."""
    at_target = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0].astype(mx.float32)
    wide = logits.astype(mx.float32)
    if backend() == "cpu":  # an exponential costs as much as 40 products there: one pass for all that follows
        weights, peak = mx.softmax(wide, axis=-1), wide.max(axis=-1)
        norm = row_sums(weights)  # 1 but for the rounding of the kernel's own sum
        log_sum = mx.log(norm / weights.max(axis=-1))
        return (at_target - peak) - log_sum, peak, log_sum, weights, norm
    logps = -mx.fast.cross_entropy(logits, targets)
    weights = mx.exp((wide - at_target[:, None]) + logps[:, None])
    return logps, at_target, -logps, weights, mx.ones_like(logps)


@mx.compile
def _dlogps(logits: mx.array, targets: mx.array, weights: mx.array, norm: mx.array, g: mx.array) -> mx.array:
    onehot = (mx.arange(logits.shape[-1], dtype=targets.dtype)[None] == targets[:, None]).astype(mx.float32)
    return (g[:, None] * (onehot - weights / norm[:, None])).astype(logits.dtype)


@mx.compile
def dlogps(logits: mx.array, targets: mx.array, c: mx.array, log_sum: mx.array, g: mx.array) -> mx.array:
    """g·d log π/dz [n, V] in one kernel that computes the probabilities where it needs them."""
    return _dlogps(logits, targets, mx.exp(_log_probs(logits, c, log_sum)), mx.ones_like(c), g)


def _log_probs(logits: mx.array, c: mx.array, log_sum: mx.array) -> mx.array:
    return (logits.astype(mx.float32) - c[:, None]) - log_sum[:, None]


def _entropies(logits: mx.array, c: mx.array, log_sum: mx.array, weights: mx.array, norm: mx.array) -> mx.array:
    return row_sums(_surprise(logits, c, log_sum, weights)) / norm


@mx.compile
def _surprise(logits: mx.array, c: mx.array, log_sum: mx.array, weights: mx.array) -> mx.array:
    return mx.where(weights > 0, -weights * _log_probs(logits, c, log_sum), 0.0)


def _dentropies(
    logits: mx.array, c: mx.array, log_sum: mx.array, weights: mx.array, norm: mx.array, entropies: mx.array, g: mx.array
) -> mx.array:
    mean = row_sums(_weighted(logits, c, weights)) / norm  # not log s - H, which has fewer digits
    return _dentropies_at(logits, c, weights, mean, g / norm)


@mx.compile
def _weighted(logits: mx.array, c: mx.array, weights: mx.array) -> mx.array:
    return mx.where(weights > 0, weights * (logits.astype(mx.float32) - c[:, None]), 0.0)


@mx.compile
def _dentropies_at(logits: mx.array, c: mx.array, weights: mx.array, mean: mx.array, g: mx.array) -> mx.array:
    centered = (logits.astype(mx.float32) - c[:, None]) - mean[:, None]
    return -g[:, None] * mx.where(weights > 0, weights * centered, 0.0)


def _log_sum_squares(logits: mx.array, c: mx.array, log_sum: mx.array, weights: mx.array, norm: mx.array) -> mx.array:
    return mx.log(row_sums(mx.square(weights))) - 2 * mx.log(norm)


def _dlog_sum_squares(
    logits: mx.array, c: mx.array, log_sum: mx.array, weights: mx.array, norm: mx.array, logs: mx.array, g: mx.array
) -> mx.array:
    squares = row_sums(mx.square(weights))  # not from its logarithm, which has fewer digits
    return _dlog_sum_squares_at(weights, norm, squares, g)


@mx.compile
def _dlog_sum_squares_at(weights: mx.array, norm: mx.array, squares: mx.array, g: mx.array) -> mx.array:
    return 2 * g[:, None] * (weights * (weights / squares[:, None] - 1 / norm[:, None]))


_VALUES: dict[str, Callable[..., mx.array]] = {"entropy": _entropies, "log_sum_sq_probs": _log_sum_squares}
_GRADIENTS: dict[str, Callable[..., mx.array]] = {"entropy": _dentropies, "log_sum_sq_probs": _dlog_sum_squares}
