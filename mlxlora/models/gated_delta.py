"""The gated delta rule in chunks: as exact as a loop over tokens, with matrix products in place of its steps.

A head has a state S [Dv, Dk]. At token t, with keys k, queries q, values v, decays γ in (0, 1] and rates β:

    S ← S·diag(γ_t);  S ← S + β_t (v_t - S k_t) k_tᵀ;  y_t = S q_t

Within a chunk of C tokens that starts from S, let Γ_ij be the product of the decays of the tokens j < l <= i, and Γ_i that of
all tokens up to i. What tokens write, U [C, Dv], solves a triangular system (the WY form of arXiv:2412.06464):

    (I + L) U = β (V - K_Γ Sᵀ),   L_ij = β_i k_iᵀ diag(Γ_ij) k_j  for j < i,   K_Γ the rows diag(Γ_i) k_i
    Y = Q_Γ Sᵀ + A U,             A_ij = q_iᵀ diag(Γ_ij) k_j      for j <= i
    S' = S·diag(Γ_C) + Uᵀ K_T,                                    K_T the rows diag(Γ_Cj) k_j

Products of decays are sums of logarithms over the tokens between, never differences of longer sums, so decays that underflow
stay exact. Everything is float32. The backward pass keeps the states at the start of spans of chunks and computes the rest again,
a span at a time, so memory grows with T alone.
"""

from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from attrs import frozen

from ..utils.device import backend
from ..utils.integers import ceil_div

DELTA_CHUNK = 64
# Of the arrays of a span, forward and backward. A GPU wants many chunks in one launch, a CPU wants its cache.
SPAN_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30, "metal": 128 << 20}


@frozen(eq=False)
class Rule:
    """What a layer computes with; B rows, T tokens, Hv = r·Hk heads.

    Attributes:
        queries: [B, T, Hk, Dk].
        keys: [B, T, Hk, Dk].
        values: [B, T, Hv, Dv].
        log_decay: [B, T, Hv], or a channel's own [B, T, Hv, Dk]; float32, at most 0.
        rate: [B, T, Hv].
        state: [B, Hv, Dv, Dk] float32.
        segments: [B, T] int32: the state is 0 at the start of each segment but the first; None: it never is.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    log_decay: mx.array
    rate: mx.array
    state: mx.array
    segments: mx.array | None = None


def chunked_delta_rule(rule: Rule, *, chunk: int | None = None, span: int | None = None) -> tuple[mx.array, mx.array]:
    """The outputs [B, T, Hv, Dv] in the dtype of the queries, and the last state [B, Hv, Dv, Dk].

    Args:
        rule: the inputs.
        chunk: tokens, a power of two; None: `DELTA_CHUNK`, or less for short rows.
        span: chunks whose arrays are in memory at once; None: by `SPAN_BYTES`.
    """
    length = rule.queries.shape[1]
    chunk = chunk or min(DELTA_CHUNK, 1 << (length - 1).bit_length())
    span = span or _affordable(rule, chunk)
    size = chunk * ceil_div(ceil_div(length, chunk), ceil_div(ceil_div(length, chunk), span))  # spans of even length
    given = (rule.queries, rule.keys, rule.values, rule.log_decay, rule.rate, rule.state)
    segments = [] if rule.segments is None else _segments(rule.segments, chunk)

    @mx.custom_function
    def forward(*arrays: mx.array) -> list[mx.array]:
        return _forward(arrays, chunk, size)

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        return _backward(tuple(primals), cotangents, outputs[2], chunk, size)

    out, last, _ = forward(*given, *segments)  # type: ignore[misc]
    return out, last


def _segments(segments: mx.array, chunk: int) -> list[mx.array]:
    """[B, T] to [N, B, C] and [N, B, 1]: segments of each chunk's tokens, and of the token before; filler continues the last."""
    rows, length = segments.shape
    count = ceil_div(length, chunk)
    own = mx.pad(segments, [(0, 0), (0, count * chunk - length)], mode="edge").reshape(rows, count, chunk).swapaxes(0, 1)
    before = mx.concatenate([own[:1, :, :1], own[:-1, :, -1:]])
    return [own, before]


def _affordable(rule: Rule, chunk: int) -> int:
    """Chunks of a span within the budget."""
    rows, _, heads, width = rule.values.shape
    keys = rule.keys.shape[-1]
    vectors = 40 if rule.log_decay.ndim == 4 else 14
    numbers = 10 * chunk * chunk + chunk * (vectors * keys + 8 * width) + 4 * keys * width + 2 * keys * keys
    return max(1, SPAN_BYTES[backend()] // (4 * rows * heads * numbers))


# --- spans, one after the other -----------------------------------------------------------------


def _forward(arrays: tuple[mx.array, ...], chunk: int, size: int) -> list[mx.array]:
    """Outputs, last state, and [spans, B, Hv, Dv, Dk] the states at the starts of spans."""
    queries, *_, state = arrays[:6]
    outputs, states = [], []
    for start in range(0, queries.shape[1], size):
        states.append(state)
        inputs = _span(arrays, start, size, chunk)
        weights = _weights(inputs)
        solved = _solved(inputs, weights)
        carried, state = _carried(solved, weights, _grouped(state, inputs))
        done = weights.queries @ carried.states.swapaxes(-1, -2) + weights.scores @ carried.writes
        state = state.reshape(states[0].shape)
        outputs.append(_tokens(done, arrays[2], min(size, queries.shape[1] - start)).astype(queries.dtype))
        state = mx.depends(state, [outputs[-1]])
    return [_joined(outputs), state, mx.stack(states)]


def _backward(arrays: tuple[mx.array, ...], cotangents: Any, states: mx.array, chunk: int, size: int) -> list[mx.array]:
    """Gradients of all arrays, from the last span to the first."""
    gradient, dstate, _ = cotangents
    length = arrays[2].shape[1]
    parts: list[list[mx.array]] = []
    for number in reversed(range(states.shape[0])):
        start = number * size
        state, dstate = mx.depends([states[number], dstate], parts[-1]) if parts else (states[number], dstate)
        inputs = _span(arrays, start, size, chunk)
        dout = _chunks(gradient[:, start : start + size], arrays[1].shape[2], chunk, size)
        found, dstate = _span_gradients(inputs, _grouped(state, inputs), dout, _grouped(dstate, inputs))
        dstate = dstate.reshape(states.shape[1:])
        kept = min(size, length - start)
        parts.append([_tokens(d, array, kept) for d, array in zip(found, arrays[:5], strict=True)])
    joined = [_joined(list(reversed(array))) for array in zip(*parts, strict=True)]
    return [*joined, dstate.astype(arrays[5].dtype), *(mx.zeros_like(array) for array in arrays[6:])]


def _joined(parts: list[mx.array]) -> mx.array:
    return mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


class _Span(NamedTuple):
    """The inputs of n chunks, float32, with heads in Hk groups of r: an axis of 1 is shared by the group.

    Attributes:
        queries: [n, B, Hk, 1, C, Dk].
        keys: [n, B, Hk, 1, C, Dk].
        values: [n, B, Hk, r, C, Dv].
        log_decay: [n, B, Hk, r, C, 1 or Dk].
        rate: [n, B, Hk, r, C, 1].
        alike: [n, B, 1, 1, C, C] bool, tokens of one segment; None: all are.
        started: [n, B, 1, 1, C, 1] bool, tokens whose segment reaches back before the chunk; None: all do.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    log_decay: mx.array
    rate: mx.array
    alike: mx.array | None
    started: mx.array | None


def _span(arrays: tuple[mx.array, ...], start: int, size: int, chunk: int) -> _Span:
    """The chunks of a span. Filler after the last token neither decays nor writes, so the state passes it."""
    groups = arrays[1].shape[2]
    size = min(size, chunk * ceil_div(arrays[1].shape[1] - start, chunk))
    cut = [_chunks(array[:, start : start + size], groups, chunk, size) for array in arrays[:5]]
    if len(arrays) == 6:
        return _Span(*cut, alike=None, started=None)
    here = slice(start // chunk, start // chunk + size // chunk)
    own, before = (array[here, :, None, None] for array in arrays[6:])
    return _Span(*cut, alike=own[..., :, None] == own[..., None, :], started=(own == before)[..., None])


def _chunks(array: mx.array, groups: int, chunk: int, size: int) -> mx.array:
    """[B, t, H] or [B, t, H, d] to [n, B, Hk, H/Hk, C, 1 or d], float32, filled up with zeros to `size` tokens or whole chunks."""
    rows, length, heads = array.shape[:3]
    size = min(size, chunk * ceil_div(length, chunk))
    if size > length:
        array = mx.pad(array, [(0, 0), (0, size - length), *[(0, 0)] * (array.ndim - 2)])
    split = array.reshape(rows, size // chunk, chunk, groups, heads // groups, -1)
    return split.transpose(1, 0, 3, 4, 2, 5).astype(mx.float32)


def _tokens(array: mx.array, like: mx.array, length: int) -> mx.array:
    """The inverse of `_chunks`: [B, length, ...] with the other axes of `like` and its dtype."""
    rows, heads = like.shape[0], like.shape[2]
    count, chunk, width = array.shape[0], *array.shape[-2:]
    flat = array.transpose(1, 0, 4, 2, 3, 5).reshape(rows, count * chunk, heads, width)[:, :length]
    return flat.reshape(rows, length, *like.shape[2:]).astype(like.dtype)


def _grouped(state: mx.array, inputs: _Span) -> mx.array:
    """[B, Hv, Dv, Dk] to [B, Hk, r, Dv, Dk]."""
    return state.reshape(*inputs.values.shape[1:4], *state.shape[2:])


# --- one span --------------------------------------------------------------------------------------


class _Weights(NamedTuple):
    """What a span's tokens weigh, without the state: all chunks at once.

    Attributes:
        system: [n, B, Hk, r, C, C] k_iᵀ diag(Γ_ij) k_j for j < i; L without β.
        scores: [n, B, Hk, r, C, C] A.
        keys: [n, B, Hk, r, C, Dk] K_Γ.
        queries: [n, B, Hk, r, C, Dk] Q_Γ.
        tail: [n, B, Hk, r, C, Dk] K_T.
        decay: [n, B, Hk, r, 1, 1 or Dk] Γ_C.
    """

    system: mx.array
    scores: mx.array
    keys: mx.array
    queries: mx.array
    tail: mx.array
    decay: mx.array


def _weights(x: _Span) -> _Weights:
    inner = _scalar_products(x) if x.log_decay.shape[-1] == 1 else _channel_products(x)
    through, left = mx.exp(mx.cumsum(x.log_decay, axis=-2)), mx.exp(_after(x.log_decay))
    decay = through[..., -1:, :]
    if x.alike is not None and x.started is not None:
        inner = [mx.where(x.alike, product, 0) for product in inner]
        through = mx.where(x.started, through, 0)
        left = mx.where(x.alike[..., -1, :, None], left, 0)
        decay = mx.where(x.started[..., -1:, :], decay, 0)
    return _Weights(*inner, keys=x.keys * through, queries=x.queries * through, tail=x.keys * left, decay=decay)


def _after(log_decay: mx.array) -> mx.array:
    """Sums over the tokens after each one: [..., C, d]."""
    return mx.cumsum(log_decay, axis=-2, reverse=True, inclusive=False)


def _scalar_products(x: _Span) -> list[mx.array]:
    """System and scores for one decay per head."""
    masks = _masks(x.keys.shape[-2])
    between = mx.where(masks.below, x.log_decay, 0)  # [..., l, j]: l after j
    decays = mx.exp(mx.cumsum(between, axis=-2))
    keys = x.keys.swapaxes(-1, -2)
    return [(x.keys @ keys) * mx.where(masks.below, decays, 0), (x.queries @ keys) * mx.where(masks.reached, decays, 0)]


def _channel_products(x: _Span) -> list[mx.array]:
    """System and scores for one decay per channel: pairs of tokens by the boundary between them, so that no factor exceeds 1."""
    chunk = x.keys.shape[-2]
    both = mx.concatenate([x.queries, x.keys], axis=-2)
    products = mx.zeros((*x.values.shape[:-2], 2 * chunk, chunk))
    for half, mask in zip(_halves(chunk), _masks(chunk).levels, strict=True):
        parts = x.log_decay.reshape(*x.log_decay.shape[:-2], chunk // half, half, -1)
        since = mx.exp(mx.cumsum(parts, axis=-2)).reshape(x.log_decay.shape)
        until = mx.exp(_after(parts)).reshape(x.log_decay.shape)
        rows = both * mx.concatenate([since, since], axis=-2)
        products = products + mx.where(mx.concatenate([mask, mask]), rows @ (x.keys * until).swapaxes(-1, -2), 0)
    own = (x.queries * x.keys).sum(axis=-1)[..., None] * mx.eye(chunk)
    return [products[..., chunk:, :], products[..., :chunk, :] + own]


class _Solved(NamedTuple):
    """The triangular system, up to the state: U = written - erased·Sᵀ.

    Attributes:
        inverse: (I + L)⁻¹, [n, B, Hk, r, C, C].
        written: (I + L)⁻¹ β V, [n, B, Hk, r, C, Dv].
        erased: (I + L)⁻¹ β K_Γ, [n, B, Hk, r, C, Dk].
    """

    inverse: mx.array
    written: mx.array
    erased: mx.array


def _solved(x: _Span, weights: _Weights) -> _Solved:
    inverse = _inverse(x.rate * weights.system)
    return _Solved(inverse, inverse @ (x.rate * x.values), inverse @ (x.rate * weights.keys))


def _inverse(lower: mx.array) -> mx.array:
    """(I + L)⁻¹ of strictly lower triangular L [..., C, C], in blocks of twice the size at each level.

    Each block is a true inverse, so no number is larger than in the result; powers of L would cancel among like keys.
    """
    chunk = lower.shape[-1]
    first, *levels = _masks(chunk).levels or (mx.zeros((1, 1), mx.bool_),)
    inverse = mx.eye(chunk) - mx.where(first, lower, 0)
    for mask in levels:
        inverse = inverse - inverse @ (mx.where(mask, lower, 0) @ inverse)
    return inverse


class _Carried(NamedTuple):
    """What passes from chunk to chunk.

    Attributes:
        states: at the start of each chunk, [n, B, Hk, r, Dv, Dk].
        writes: U, [n, B, Hk, r, C, Dv].
    """

    states: mx.array
    writes: mx.array


def _carried(solved: _Solved, weights: _Weights, state: mx.array) -> tuple[_Carried, mx.array]:
    """What the chunks of a span hand on. Also returns the state after the last chunk."""
    added = solved.written.swapaxes(-1, -2) @ weights.tail
    states, state = _passed(state, weights.decay, _erasing(solved, weights), added)
    return _Carried(states, solved.written - solved.erased @ states.swapaxes(-1, -2)), state


def _erasing(solved: _Solved, weights: _Weights) -> mx.array:
    """P = (erased)ᵀ K_T [n, B, Hk, r, Dk, Dk]: a chunk makes S·diag(Γ_C) - S·P + (written)ᵀ K_T of S."""
    return solved.erased.swapaxes(-1, -2) @ weights.tail


def _passed(state: mx.array, decay: mx.array, erasing: mx.array, added: mx.array) -> tuple[mx.array, mx.array]:
    """S ← S·diag(decay) + added - S·erasing, chunk by chunk: S before each one, and after the last.

    The only loop: one product and one sum a chunk, because every operation of it costs the host time for each chunk. Decays stay
    outside of the product, which a GPU may round.
    """
    states, count = [state[None]], added.shape[0]
    steps = (mx.split(array, count) for array in (decay, erasing, added))
    for gamma, removed, more in zip(*steps, strict=True):
        states.append(states[-1] * gamma + mx.addmm(more, states[-1], removed, alpha=-1))
    return mx.concatenate(states[:-1]), states[-1][0]


def _span_gradients(x: _Span, state: mx.array, dout: mx.array, dstate: mx.array) -> tuple[list[mx.array], mx.array]:
    """Gradients of queries, keys, values, decays and rates, and of the state at the start.

    Args:
        x: the inputs.
        state: at the start of the span, [B, Hk, r, Dv, Dk].
        dout: gradient of the outputs, [n, B, Hk, r, C, Dv].
        dstate: gradient of the state after the span.
    """
    weights = _weights(x)
    solved = _solved(x, weights)
    carried, _ = _carried(solved, weights, state)
    own_writes, own_states = weights.scores.swapaxes(-1, -2) @ dout, dout.swapaxes(-1, -2) @ weights.queries
    added = own_states - own_writes.swapaxes(-1, -2) @ solved.erased
    removed = _erasing(solved, weights).swapaxes(-1, -2)
    reverse, dstate = _passed(dstate, weights.decay[::-1], removed[::-1], added[::-1])
    dafter = reverse[::-1]  # of the states after the chunks
    dwritten = own_writes + weights.tail @ dafter.swapaxes(-1, -2)
    dsolved = solved.inverse.swapaxes(-1, -2) @ dwritten  # of β(V - K_Γ Sᵀ)
    dsystem = -dsolved @ carried.writes.swapaxes(-1, -2)
    residual = x.values - weights.keys @ carried.states.swapaxes(-1, -2)
    drate = (dsolved * residual).sum(axis=-1, keepdims=True) + (dsystem * weights.system).sum(axis=-1, keepdims=True)
    dvalues = x.rate * dsolved
    ddecay = (dafter * carried.states).sum(axis=-2, keepdims=True)
    dweights = _Weights(
        x.rate * dsystem,
        dout @ carried.writes.swapaxes(-1, -2),
        -dvalues @ carried.states,
        dout @ carried.states,
        carried.writes @ dafter,
        ddecay if weights.decay.shape[-1] > 1 else ddecay.sum(axis=-1, keepdims=True),
    )
    given = [x.queries, x.keys, x.log_decay]

    def of(queries: mx.array, keys: mx.array, log_decay: mx.array) -> list[mx.array]:
        return list(_weights(x._replace(queries=queries, keys=keys, log_decay=log_decay)))

    dqueries, dkeys, dlog_decay = mx.vjp(of, given, list(dweights))[1]
    return [dqueries, dkeys, dvalues, dlog_decay, drate], dstate


# --- constants -------------------------------------------------------------------------------------


class _Masks(NamedTuple):
    """[C, C] bool: pairs j < i, pairs j <= i, and the former divided into levels.

    At the level of blocks of `half` tokens, i is in the second and j in the first block of a pair.
    """

    below: mx.array
    reached: mx.array
    levels: tuple[mx.array, ...]


def _halves(chunk: int) -> list[int]:
    return [1 << level for level in range(chunk.bit_length() - 1)]


@cache
def _masks(chunk: int) -> _Masks:
    """Made once, because each of them would be several operations in every span."""
    i, j = np.arange(chunk)[:, None], np.arange(chunk)[None]
    masks: list[Any] = [j < i, j <= i, *((i // half == j // half + 1) & (i // half % 2 == 1) for half in _halves(chunk))]
    below, reached, *apart = map(mx.array, masks)
    return _Masks(below, reached, tuple(apart))
