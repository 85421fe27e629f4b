"""The normalizer of a softmax over the vocabulary, right in float32 on every backend (see `objectives.numerics.row_sums`)."""

import mlx.core as mx

from ..objectives.numerics import BLOCK, in_sequence


def logsumexp(logits: mx.array, *, keepdims: bool = False, blocks: bool | None = None) -> mx.array:
    """log Σ_v exp z_v over the last axis, with its gradient; on a CPU in blocks, as `row_sums` does.

    Args:
        logits: [..., V] float32.
        keepdims: [..., 1] instead of [...].
        blocks: whether to sum in blocks; None: on a CPU.
    """
    blocks = in_sequence() if blocks is None else blocks
    if not blocks or logits.shape[-1] <= BLOCK:
        return mx.logsumexp(logits, axis=-1, keepdims=keepdims)
    whole = logits.shape[-1] // BLOCK * BLOCK
    parts = mx.logsumexp(logits[..., :whole].reshape(*logits.shape[:-1], -1, BLOCK), axis=-1)
    if whole < logits.shape[-1]:
        parts = mx.concatenate([parts, mx.logsumexp(logits[..., whole:], axis=-1, keepdims=True)], axis=-1)
    return logsumexp(parts, keepdims=keepdims, blocks=True)


def log_softmax(logits: mx.array) -> mx.array:
    """[..., V] float32 to log-probabilities [..., V], with their gradient."""
    return logits - logsumexp(logits, keepdims=True)
