"""Logits to sampled tokens and their log-probabilities, which equal those of the training forward pass."""

import math
from functools import cache

import mlx.core as mx
from attrs import frozen
from attrs import validators as v

from ..config.fields import option
from ..models.normalize import log_softmax, logsumexp

_BLOCK = 512  # about how many tokens of the vocabulary are summed together; see `categorical`
_BELOW_ONE = 1 - 2**-22  # a total times this is less than the total, in float32 too


@frozen
class Sampling:
    """How tokens are drawn: penalty, temperature, top-k, top-p and min-p, in this order."""

    temperature: float = option(1.0, "Logits are divided by it; 0 = always the likeliest token.", v.ge(0))
    top_p: float = option(1.0, "Sample from the fewest tokens with this share of the probability; 1 = all.", v.gt(0), v.le(1))
    top_k: int = option(0, "Sample from the k likeliest tokens; 0 = all.", v.ge(0))
    min_p: float = option(0.0, "Sample from tokens with this share of the likeliest one's probability.", v.ge(0), v.le(1))
    repetition_penalty: float = option(1.0, "Logits of tokens seen in prompt or completion: l/r if l > 0, else l·r.", v.gt(0))
    max_tokens: int = option(512, "Longest completion, tokens.", v.ge(1))
    kv_bits: int | None = option(None, "Bits of the cache's keys and values; default: as the model computes them.", v.in_((4, 8)))


def uniforms(keys: mx.array, positions: int) -> mx.array:
    """[R, 2] keys to [R, positions, 2] uniform numbers in [0, 1); a row depends on its own key alone."""
    return mx.vmap(lambda key: mx.random.uniform(0, _BELOW_ONE, (positions, 2), key=key))(keys)


def draw_tokens(logits: mx.array, sampling: Sampling, noise: mx.array, seen: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """Draws one token for each row.

    Args:
        logits: [R, V].
        sampling: how tokens are drawn.
        noise: [R, 2] uniform numbers in [0, 1), the only randomness.
        seen: [R, V] bool, tokens with the repetition penalty; None if there is no penalty.

    Returns:
        [R] int32 tokens, and their [R] float32 log softmax(logits/temperature) in nats before penalty and truncation, which is
        the policy that training computes. Temperature 0 gives the log-probabilities of temperature 1.
    """
    logits = logits.astype(mx.float32)
    scale = sampling.temperature or 1.0
    policy = logits if scale == 1 else logits / scale
    behavior = policy if seen is None else _penalized(logits, seen, sampling.repetition_penalty) / scale
    if sampling.temperature == 0:
        tokens, total = mx.argmax(behavior, axis=-1).astype(mx.int32), logsumexp(policy)
    else:
        allowed = truncated(behavior, sampling)
        blocks, sums = _blocks(allowed)
        tokens = _drawn(blocks, sums, noise)
        total = logsumexp(sums if allowed is policy else policy)
    return tokens, mx.take_along_axis(policy, tokens[:, None], axis=-1)[:, 0] - total


def categorical(logits: mx.array, noise: mx.array) -> mx.array:
    """Inverse transform sampling: [R, V] logits and [R, 2] uniform numbers to [R] int32 tokens.

    The first number picks a block of the vocabulary, the second a token in it. A running sum over the whole vocabulary would
    lose tokens with a probability below float32's 6e-8. The logits are read once, for the sums of the blocks, which also give
    the normalizer. Gumbel noise would need V numbers for each row.

    >>> categorical(mx.log(mx.array([[0.25, 0.0, 0.75]] * 2)), mx.array([[0.0, 0.2], [0.0, 0.3]])).tolist()
    [0, 2]
    """
    return _drawn(*_blocks(logits), noise)


def _blocks(logits: mx.array) -> tuple[mx.array, mx.array]:
    """[R, V] to blocks [R, n, V/n] and the log of each one's sum [R, n]."""
    rows, vocabulary = logits.shape
    size = block_size(vocabulary)
    if vocabulary % size:
        logits = mx.pad(logits, [(0, 0), (0, -vocabulary % size)], constant_values=-mx.inf)
    blocks = logits.reshape(rows, -1, size)
    return blocks, logsumexp(blocks)


def _drawn(blocks: mx.array, sums: mx.array, noise: mx.array) -> mx.array:
    block = _inverted(mx.softmax(sums, axis=-1), noise[:, 0])
    inside = mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * blocks.shape[-1] + _inverted(mx.softmax(inside, axis=-1), noise[:, 1])).astype(mx.int32)


@cache
def block_size(vocabulary: int) -> int:
    """A divisor near `_BLOCK`, so that nothing is padded; `_BLOCK` where there is none.

    >>> block_size(151936), block_size(49152), block_size(50257), block_size(97)
    (1187, 512, 1733, 97)
    """
    if vocabulary <= _BLOCK:
        return vocabulary
    near = [size for size in range(_BLOCK // 4, _BLOCK * 4) if vocabulary % size == 0]
    return min(near, key=lambda size: max(size / _BLOCK, _BLOCK / size), default=_BLOCK)


def _inverted(masses: mx.array, uniform: mx.array) -> mx.array:
    """[R, n], [R] to [R]: the first entry whose cumulative mass exceeds uniform · total; never one of mass 0."""
    cumulative = mx.where(masses > 0, mx.cumsum(masses, axis=-1), 0.0)
    return mx.argmax(cumulative > (uniform * cumulative.max(axis=-1))[:, None], axis=-1)


def truncated(logits: mx.array, sampling: Sampling) -> mx.array:
    """[R, V] to [R, V]: -inf for the tokens that top-k, top-p and min-p exclude.

    >>> truncated(mx.array([[1.0, 3.0, 2.0]]), Sampling(top_k=2)).tolist()
    [[-inf, 3.0, 2.0]]
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = _at_least(logits, mx.topk(logits, sampling.top_k, axis=-1).min(axis=-1, keepdims=True))
    if sampling.top_p < 1:
        logits = _at_least(logits, _nucleus(logits, sampling.top_p))
    if sampling.min_p > 0:
        logits = _at_least(logits, logits.max(axis=-1, keepdims=True) + math.log(sampling.min_p))
    return logits


def _at_least(logits: mx.array, threshold: mx.array) -> mx.array:
    return mx.where(logits >= threshold, logits, -mx.inf)


def _nucleus(logits: mx.array, top_p: float) -> mx.array:
    """[R, V] to [R, 1]: the logit of the last token that is needed to reach `top_p`."""
    ascending = mx.sort(logits, axis=-1)
    above = sums_after(mx.exp(log_softmax(ascending)))
    return mx.where(above < top_p, ascending, mx.inf).min(axis=-1, keepdims=True)


def sums_after(values: mx.array) -> mx.array:
    """[R, V] to [R, V]: the sum of the entries after each entry, in blocks, so that float32 loses no small entries.

    >>> sums_after(mx.array([[1.0, 2.0, 3.0]])).tolist()
    [[5.0, 3.0, 0.0]]
    """
    rows, size = values.shape
    blocks = mx.pad(values, [(0, 0), (0, -size % _BLOCK)]).reshape(rows, -1, _BLOCK)
    inside = mx.cumsum(blocks, axis=-1, reverse=True, inclusive=False)
    later = mx.cumsum(blocks.sum(axis=-1), axis=-1, reverse=True, inclusive=False)
    return (inside + later[..., None]).reshape(rows, -1)[:, :size]


def _penalized(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """CTRL's penalty (Keskar et al., 2019, https://arxiv.org/abs/1909.05858), sign-aware."""
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
