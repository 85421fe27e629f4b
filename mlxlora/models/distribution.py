"""Statistics of the distribution at each position: log-probabilities, and columns of the batch that objectives ask for.

With c = max_v z_v, u_v = z_v - c, log s = log Σ_v exp u_v and log p_v = u_v - log s, which keeps float32's digits:

    log π(y)          log p_y                 d/dz_v = [v = y] - p_v
    entropy           log s - Σ p u           d/dz_v = -p_v (u_v - Σ p u)
    log_sum_sq_probs  log Σ p²                d/dz_v = 2 p_v (p_v / Σ p² - 1)
    correct           1 if y is the likeliest token, else 0; no gradient
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from ..objectives.numerics import row_sums
from ..utils.device import backend

COLUMNS = ("entropy", "log_sum_sq_probs", "correct")
"""Columns of `Batch` that come from the distribution at each target."""


class _Parts(NamedTuple):
    """p [n, V] = weights · scale[:, None], log p = (z - peak[:, None]) - log_sum[:, None]; best [n] are the likeliest tokens."""

    peak: mx.array
    log_sum: mx.array
    weights: mx.array
    scale: mx.array
    best: mx.array


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
    graded = tuple(name for name in names if columns[name])
    outputs: Any = _differentiable(graded)(logits, targets)
    scores = outputs[: 1 + len(graded)]
    if len(graded) == len(names):
        return mx.stack(scores)
    constants = tuple(map(mx.stop_gradient, outputs))
    parts = _Parts(*constants[-5:]) if len(outputs) > 1 else _parts(mx.stop_gradient(logits), targets, constants[0])
    return mx.stack([*scores, *(_constant(name, mx.stop_gradient(logits), targets, parts) for name in names[len(graded) :])])


def gradients_first(columns: Mapping[str, bool]) -> list[str]:
    """Names of the columns in the order of scores: those with a gradient first."""
    return sorted(columns, key=lambda name: not columns[name])


def _constant(name: str, logits: mx.array, targets: mx.array, parts: _Parts) -> mx.array:
    return (parts.best == targets).astype(mx.float32) if name == "correct" else _VALUES[name](logits, parts)[0]


@cache
def _differentiable(names: tuple[str, ...]) -> Callable[..., Any]:
    """(logits, targets) -> log-probabilities, the columns `names`, and what the backward pass needs: of each column, then parts.

    On a GPU log-probabilities alone are one fused kernel, and so is their gradient: there are no parts.
    """

    @mx.custom_function
    def forward(logits: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
        logps, parts = _logps(logits, targets)
        if parts is None and not names:
            return (logps,)
        parts = parts or _parts(logits, targets, logps)
        values = [_VALUES[name](logits, parts) for name in names]
        return logps, *(value for value, _ in values), *(kept for _, kept in values), *parts

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        logits, targets = primals
        if len(outputs) == 1:
            return dlogps(logits, targets, outputs[0], cotangents[0]), mx.zeros_like(targets)
        kept, parts = outputs[1 + len(names) : -5], _Parts(*outputs[-5:])
        total = _dlogps(logits, targets, parts.weights, parts.scale, cotangents[0])
        for name, its, g in zip(names, kept, cotangents[1:], strict=False):
            total = total + _GRADIENTS[name](logits, parts, its, g).astype(logits.dtype)
        return total, mx.zeros_like(targets)

    return forward


def _logps(logits: mx.array, targets: mx.array) -> tuple[mx.array, _Parts | None]:
    """Log-probabilities [n], with the parts if those come first."""
    if backend() != "cpu":
        return -mx.fast.cross_entropy(logits, targets), None
    wide = logits.astype(mx.float32)  # an exponential costs as much as 40 products: one pass for all that follows
    weights, best = mx.softmax(wide, axis=-1), mx.argmax(wide, axis=-1)
    norm = row_sums(weights)  # 1 but for the rounding of the kernel's own sum
    peak, log_sum = _at(wide, best), mx.log(norm / _at(weights, best))
    return (_at(wide, targets) - peak) - log_sum, _Parts(peak, log_sum, weights, 1 / norm, best)


def _parts(logits: mx.array, targets: mx.array, logps: mx.array) -> _Parts:
    best = mx.argmax(logits, axis=-1)
    peak = _at(logits, best).astype(mx.float32)
    log_sum = (_at(logits, targets).astype(mx.float32) - peak) - logps
    return _Parts(peak, log_sum, _probs(logits, peak, log_sum), mx.ones_like(peak), best)


def _at(values: mx.array, tokens: mx.array) -> mx.array:
    """[n, V], [n] to [n]."""
    return mx.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]


@mx.compile
def _probs(logits: mx.array, peak: mx.array, log_sum: mx.array) -> mx.array:
    return mx.exp((logits.astype(mx.float32) - peak[:, None]) - log_sum[:, None])


@mx.compile
def _dlogps(logits: mx.array, targets: mx.array, weights: mx.array, scale: mx.array, g: mx.array) -> mx.array:
    onehot = (mx.arange(logits.shape[-1], dtype=targets.dtype)[None] == targets[:, None]).astype(mx.float32)
    return (g[:, None] * (onehot - weights * scale[:, None])).astype(logits.dtype)


def dlogps(logits: mx.array, targets: mx.array, logps: mx.array, g: mx.array) -> mx.array:
    """g·d log π/dz [n, V] in one kernel that computes the probabilities where it needs them."""
    return _dlogps_again(logits, targets, _at(logits, targets), logps, g)


@mx.compile
def _dlogps_again(logits: mx.array, targets: mx.array, at_target: mx.array, logps: mx.array, g: mx.array) -> mx.array:
    return _dlogps(logits, targets, _probs(logits, at_target, -logps), mx.ones_like(logps), g)


def _entropies(logits: mx.array, parts: _Parts) -> tuple[mx.array, mx.array]:
    mean = row_sums(_weighted(logits, parts.peak, parts.weights)) * parts.scale
    return parts.log_sum - mean, mean


@mx.compile
def _weighted(logits: mx.array, peak: mx.array, weights: mx.array) -> mx.array:
    """weights·u, 0 where the logit is -inf."""
    return mx.where(weights > 0, weights * (logits.astype(mx.float32) - peak[:, None]), 0.0)


def _dentropies(logits: mx.array, parts: _Parts, mean: mx.array, g: mx.array) -> mx.array:
    return _dentropies_at(logits, parts.peak, mean, parts.weights, -g * parts.scale)


@mx.compile
def _dentropies_at(logits: mx.array, peak: mx.array, mean: mx.array, weights: mx.array, factor: mx.array) -> mx.array:
    centered = (logits.astype(mx.float32) - peak[:, None]) - mean[:, None]
    return factor[:, None] * mx.where(weights > 0, weights * centered, 0.0)


def _log_sum_squares(logits: mx.array, parts: _Parts) -> tuple[mx.array, mx.array]:
    squares = row_sums(mx.square(parts.weights))
    return mx.log(squares) + 2 * mx.log(parts.scale), squares


def _dlog_sum_squares(logits: mx.array, parts: _Parts, squares: mx.array, g: mx.array) -> mx.array:
    return _dlog_sum_squares_at(parts.weights, 1 / squares, parts.scale, 2 * g)


@mx.compile
def _dlog_sum_squares_at(weights: mx.array, inverse: mx.array, scale: mx.array, factor: mx.array) -> mx.array:
    return factor[:, None] * (weights * (weights * inverse[:, None] - scale[:, None]))


_VALUES: dict[str, Callable[..., tuple[mx.array, mx.array]]] = {"entropy": _entropies, "log_sum_sq_probs": _log_sum_squares}
_GRADIENTS: dict[str, Callable[..., mx.array]] = {"entropy": _dentropies, "log_sum_sq_probs": _dlog_sum_squares}
