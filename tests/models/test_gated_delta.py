"""The gated delta rule in chunks is mlx-lm's loop over tokens: outputs, last states and all gradients."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.gated_delta import gated_delta_ops

from mlxlora.models.gated_delta import Rule, chunked_delta_rule

Compute = Callable[..., tuple[mx.array, mx.array]]
EXACT = 1e-5
pytestmark = pytest.mark.usefixtures("eager")


def inputs(length: int, *, by_channel: bool = False, weakest: float = 0.5, alike: float = 1.0, rows: int = 2) -> list[mx.array]:
    """Queries, keys, values, logarithms of decays, rates and a state: 2 groups of 2 heads, 8 and 12 wide.

    Args:
        weakest: decays are between this and 1.
        alike: the share of a key that is its own; the rest is common to all tokens.
    """
    rng = np.random.default_rng(length)
    queries, keys = (rng.standard_normal((rows, length, 2, 8)) for _ in range(2))
    keys = alike * keys + (1 - alike) * keys[:, :1]
    units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (queries, keys)]
    decays = np.exp(rng.uniform(np.log(weakest), 0, (rows, length, 4, *([8] if by_channel else []))))
    rates, values, state = (
        rng.uniform(0, 2, (rows, length, 4)),
        rng.standard_normal((rows, length, 4, 12)),
        rng.standard_normal((rows, 4, 12, 8)),
    )
    return [mx.array(x.astype(np.float32)) for x in (*units, values, np.log(decays), rates, state)]


def loop(q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, rate: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    return gated_delta_ops(q, k, v, mx.exp(log_decay), rate, state)


def everything(compute: Compute, arrays: list[mx.array]) -> list[mx.array]:
    """Outputs, last state, and the gradients of a projection of both."""
    out, state = compute(*arrays)
    cotangents = [mx.random.normal(x.shape, key=mx.random.key(7)) for x in (out, state)]
    return [out, state, *mx.vjp(lambda *given: list(compute(*given)), arrays, cotangents)[1]]


def furthest(found: list[mx.array], exact: list[mx.array]) -> float:
    pairs = [(np.array(a).astype(np.float64), np.array(b).astype(np.float64)) for a, b in zip(found, exact, strict=True)]
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)) for a, b in pairs)


@given(
    length=st.integers(1, 70),
    chunk=st.sampled_from((1, 4, 16, 32)),
    span=st.sampled_from((1, 2, 5)),
    by_channel=st.booleans(),
    weakest=st.sampled_from((1e-30, 0.5, 0.999)),
    alike=st.sampled_from((0.02, 1.0)),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_chunks_are_exact(length: int, chunk: int, span: int, by_channel: bool, weakest: float, alike: float) -> None:
    arrays = inputs(length, by_channel=by_channel, weakest=weakest, alike=alike)
    arrays[4] = arrays[4] / 2 if alike < 1 else arrays[4]  # a rate of 2 on like keys is a chaotic recurrence
    found = everything(lambda *a: chunked_delta_rule(Rule(*a), chunk=chunk, span=span), arrays)
    assert furthest(found, everything(loop, arrays)) < EXACT


@pytest.mark.parametrize("by_channel", [False, True])
def test_like_keys_do_not_cancel(by_channel: bool) -> None:
    """64 tokens of one key: powers of L have entries of 10^18, its inverse has none above 1."""
    arrays = inputs(64, by_channel=by_channel, weakest=1.0, alike=0.0)
    arrays[4] = mx.ones_like(arrays[4])
    found = everything(lambda *a: chunked_delta_rule(Rule(*a), chunk=64), arrays)
    assert furthest(found, everything(loop, arrays)) < EXACT


@pytest.mark.parametrize("by_channel", [False, True])
def test_decays_that_underflow(by_channel: bool) -> None:
    """Tokens that forget everything, between tokens that forget nothing."""
    arrays = inputs(60, by_channel=by_channel, weakest=0.9)
    forgets = (mx.arange(60) % 7 == 3).reshape(1, 60, *[1] * (arrays[3].ndim - 2))
    arrays[3] = mx.where(forgets, -1e4, arrays[3])
    found = everything(lambda *a: chunked_delta_rule(Rule(*a), chunk=32, span=1), arrays)
    assert furthest(found, everything(loop, arrays)) < EXACT


@given(length=st.integers(2, 60), chunk=st.sampled_from((4, 16)), span=st.sampled_from((1, 3)), by_channel=st.booleans())
@settings(deadline=None, max_examples=20, derandomize=True)
def test_segments_start_from_nothing(length: int, chunk: int, span: int, by_channel: bool) -> None:
    """Packed rows against each of their sequences alone; the first one continues the given state."""
    arrays = inputs(length, by_channel=by_channel)
    cuts = np.sort(np.random.default_rng(length).integers(0, 4, (2, length)), axis=1)
    segments = mx.array(cuts.astype(np.int32))

    def alone(*a: mx.array) -> tuple[mx.array, mx.array]:
        rows, states = [], []
        for row, ids in enumerate(cuts):
            parts, state = [], a[5][row : row + 1]
            for segment in np.unique(ids):
                first, last = np.flatnonzero(ids == segment)[[0, -1]]
                state = state if first == 0 else mx.zeros_like(state)
                out, state = loop(*(x[row : row + 1, int(first) : int(last) + 1] for x in a[:5]), state=state)
                parts.append(out)
            rows.append(mx.concatenate(parts, axis=1))
            states.append(state)
        return mx.concatenate(rows), mx.concatenate(states)

    found = everything(lambda *a: chunked_delta_rule(Rule(*a, segments=segments), chunk=chunk, span=span), arrays)
    assert furthest(found, everything(alone, arrays)) < EXACT


def test_a_row_may_be_cut_anywhere() -> None:
    """The last state continues the row."""
    arrays = inputs(50)

    def halves(*a: mx.array) -> tuple[mx.array, mx.array]:
        first, state = chunked_delta_rule(Rule(*(x[:, :23] for x in a[:5]), state=a[5]))
        second, state = chunked_delta_rule(Rule(*(x[:, 23:] for x in a[:5]), state=state))
        return mx.concatenate([first, second], axis=1), state

    assert furthest(everything(halves, arrays), everything(lambda *a: chunked_delta_rule(Rule(*a)), arrays)) < EXACT


def test_bfloat16_rounds_inputs_and_outputs_only() -> None:
    arrays = [a.astype(mx.bfloat16) if i in (0, 1, 2, 4) else a for i, a in enumerate(inputs(100))]

    def total(*a: mx.array) -> mx.array:
        return chunked_delta_rule(Rule(*a))[0].astype(mx.float32).sum()

    out, state = chunked_delta_rule(Rule(*arrays))
    exact = chunked_delta_rule(Rule(*[a.astype(mx.float32) for a in arrays]))
    assert out.dtype == mx.bfloat16 and state.dtype == mx.float32
    assert mx.array_equal(out, exact[0].astype(mx.bfloat16)) and mx.array_equal(state, exact[1])
    gradients = mx.grad(total, argnums=(0, 1, 2, 3, 4, 5))(*arrays)
    assert [g.dtype for g in gradients] == [a.dtype for a in arrays]


def test_memory_grows_with_the_rows_alone() -> None:
    """Twice the tokens need at most twice the memory, a part of what the loop keeps."""

    def in_chunks(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        return chunked_delta_rule(Rule(*arrays), chunk=16, span=1)

    peaks = []
    for compute, length in ((loop, 160), (in_chunks, 160), (in_chunks, 320)):
        arrays = inputs(length)
        mx.eval(arrays)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(everything(compute, arrays))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < peaks[0] / 2 and peaks[2] < 2.2 * peaks[1]
