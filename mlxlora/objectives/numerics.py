"""Exponentials and logarithms that stay finite where float32 would not, and sums that keep its digits."""

import mlx.core as mx


def log1mexp(x: mx.array) -> mx.array:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Mächler, 2012), finite with its gradient at x = 0.

    >>> round(log1mexp(mx.array(-1e-6)).item(), 3), log1mexp(mx.array(-100.0)).item()
    (-13.816, -0.0)
    """
    x = mx.minimum(x, -1e-7)
    near = x > -0.6931472  # -ln 2
    at_near, at_far = mx.where(near, x, -1.0), mx.where(near, -1.0, x)  # so that no branch has an infinite gradient
    return mx.where(near, mx.log(-mx.expm1(at_near)), mx.log1p(-mx.exp(at_far)))


_STEEPEST, _SLOPE = 20.0, 485165195.40979  # e^20: its square is finite too, and so are norms of gradients


def safe_exp(x: mx.array) -> mx.array:
    """e^x, continued by its tangent above 20: finite, with a gradient that still points the right way."""
    return mx.exp(mx.minimum(x, _STEEPEST)) * (1 + mx.maximum(x - _STEEPEST, 0))


def safe_expm1(x: mx.array) -> mx.array:
    """e^x - 1, continued by its tangent above 20.

    >>> safe_expm1(mx.array(1e-6)).item() < 1.1e-6, safe_expm1(mx.array(1e6)).item() < 1e15
    (True, True)
    """
    return mx.expm1(mx.minimum(x, _STEEPEST)) + _SLOPE * mx.maximum(x - _STEEPEST, 0)


BLOCK = 64  # numbers in a block: a float32 sum of them is exact to 1e-7, and such blocks cost no more than larger ones


def row_sums(values: mx.array, *, blocks: bool | None = None) -> mx.array:
    """[..., V] to [...]: the sum over the last axis, in blocks where the backend adds one number after the other.

    MLX's CPU kernels add a row to a few float32 lanes in sequence (mlx/backend/cpu/reduce.h, softmax.cpp and logsumexp.cpp of
    0.32), which is wrong by 1e-4 for real vocabularies. Metal and CUDA reduce a row as a tree (mlx/backend/metal/kernels/
    reduction, mlx/backend/cuda/reduce), so their sum needs no blocks; benchmarks/normalization.py measures both.

    Args:
        values: float32.
        blocks: whether to sum in blocks; None: on a CPU.

    >>> abs(row_sums(mx.full((1, 300_000), 0.1), blocks=True).item() - 30_000) < 0.05
    True
    """
    blocks = in_sequence() if blocks is None else blocks
    if not blocks or values.shape[-1] <= BLOCK:
        return values.sum(axis=-1)
    whole = values.shape[-1] // BLOCK * BLOCK
    total = _total(values[..., :whole].reshape(*values.shape[:-1], -1, BLOCK).sum(axis=-1))
    return total if whole == values.shape[-1] else total + values[..., whole:].sum(axis=-1)


def _total(sums: mx.array) -> mx.array:
    """Of a row's blocks: in float64 where the device has it."""
    return sums.astype(mx.float64).sum(axis=-1).astype(sums.dtype) if in_sequence() else sums.sum(axis=-1)


def in_sequence() -> bool:
    """Whether the default device adds the numbers of a row one after the other: a CPU."""
    return mx.default_device() == mx.Device(mx.cpu)
