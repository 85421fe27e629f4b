"""Recurrences that mlx-lm trains one token after the other, in pieces that the backward pass computes again.

A loop over the tokens of a row keeps every state, and the gradient of each token's slice has the size of the row, so time grows
with the square of the row. Here a row is cut into pieces: only the states between them are kept, and a piece is a scan of log₂ C
steps (diagonal decays), a few matrix products (one decay a head) or mlx-lm's own loop (RWKV-7).
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..utils.device import backend

Piece = Callable[..., tuple[mx.array, mx.array]]
"""(state, *constants, *slices [B, c, ...]) to the outputs [B, c, ...] and the state after them."""

PIECE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20, "metal": 128 << 20}  # of the arrays of one piece
_LIVE = 16  # arrays of a piece's size, forward and backward


def in_pieces(
    run: Piece, state: mx.array, rows: Sequence[mx.array], constants: Sequence[mx.array] = (), piece: int = 64
) -> tuple[mx.array, mx.array]:
    """A recurrence over whole rows: outputs [B, T, ...] and the last state.

    Args:
        run: computes a piece; a pure function of its arguments.
        state: before the first token.
        rows: [B, T, ...], what tokens bring.
        constants: the same for all tokens.
        piece: tokens.
    """
    fixed, starts = len(constants), range(0, rows[0].shape[1], piece)

    def cut(given: Sequence[mx.array], start: int, state: mx.array) -> list[mx.array]:
        return [state, *given[:fixed], *(row[:, start : start + piece] for row in given[fixed:])]

    @mx.custom_function
    def forward(state: mx.array, *given: mx.array) -> list[mx.array]:
        outputs, states = [], []
        for start in starts:
            states.append(state)
            out, state = run(*cut(given, start, state))
            state = mx.depends(state, [out])  # one piece after the other
            outputs.append(out)
        return [mx.concatenate(outputs, axis=1), state, mx.stack(states)]

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        _, *given = primals
        dout, dstate, _ = cotangents
        sums, parts = [mx.zeros_like(c) for c in given[:fixed]], []
        for number in reversed(range(len(starts))):
            start = starts[number]
            before = outputs[2][number]
            before, dstate = mx.depends([before, dstate], parts[-1]) if parts else (before, dstate)
            towards = [dout[:, start : start + piece], dstate]
            dstate, *found = mx.vjp(lambda *a: list(run(*a)), cut(given, start, before), towards)[1]
            sums = [a + b for a, b in zip(sums, found[:fixed], strict=True)]
            parts.append(found[fixed:])
        joined = [mx.concatenate(list(reversed(row)), axis=1) for row in zip(*parts, strict=True)]
        return [dstate, *sums, *joined]

    out, last, _ = forward(state, *constants, *rows)  # type: ignore[misc]
    return out, last


def _affordable(numbers: int) -> int:
    """Tokens of a piece whose arrays have this many numbers a token: a power of two from 8 to 128."""
    tokens = max(1, PIECE_BYTES[backend()] // (4 * _LIVE * numbers))
    return min(128, max(8, 1 << (tokens.bit_length() - 1)))


# --- pieces ---------------------------------------------------------------------------------------


def diagonal(state: mx.array, decays: mx.array, inputs: mx.array) -> tuple[mx.array, mx.array]:
    """h_t = a_t ∘ h_{t-1} + x_t, [B, c, ...], by doubling: after n steps, h_t holds the last 2ⁿ inputs. Products only of a <= 1."""
    hidden = mx.concatenate([inputs[:, :1] + decays[:, :1] * state[:, None], inputs[:, 1:]], axis=1)
    step = 1
    while step < inputs.shape[1]:
        hidden, decays = hidden + decays * _shifted(hidden, step), decays * _shifted(decays, step)
        step *= 2
    return hidden, hidden[:, -1]


def _shifted(array: mx.array, by: int) -> mx.array:
    return mx.pad(array[:, :-by], [(0, 0), (by, 0), *[(0, 0)] * (array.ndim - 2)])


def selective(state: mx.array, a: mx.array, x: mx.array, delta: mx.array, b: mx.array, c: mx.array) -> tuple[mx.array, mx.array]:
    """Mamba's: h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t b_tᵀ, y_t = h_t c_t, in float32; state [B, D, N]."""
    wide = [array.astype(mx.float32) for array in (x, delta, b, c)]
    x, delta, b, c = wide
    hidden, last = diagonal(state, mx.exp(delta[..., None] * a), (delta * x)[..., None] * b[..., None, :])
    return (hidden @ c[..., None]).squeeze(-1), last


def linear_attention(state: mx.array, log_decay: mx.array, q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    """h_t = exp(g) h_{t-1} + k_t v_tᵀ, y_t = q_t h_t with one g a head; q, k, v [B, c, H, d], state [B, H, K, V], float32."""
    q, k, v = (array.swapaxes(1, 2).astype(mx.float32) for array in (q, k, v))
    count = mx.arange(q.shape[2]).astype(mx.float32)
    g = log_decay.astype(mx.float32)[:, None, None]
    apart = count[:, None] - count[None]
    weights = mx.where(apart >= 0, mx.exp(g * mx.maximum(apart, 0)), 0)
    out = ((q @ k.swapaxes(-1, -2)) * weights) @ v + mx.exp(g * (count[:, None] + 1)) * (q @ state)
    left = k * mx.exp(g * (q.shape[2] - 1 - count[:, None]))
    return out.swapaxes(1, 2), mx.exp(g * q.shape[2]) * state + left.swapaxes(-1, -2) @ v


# --- in place of mlx-lm's ---------------------------------------------------------------------------


def _rnn_scan(x: mx.array, a: mx.array, h0: mx.array | None) -> tuple[mx.array, mx.array]:
    """recurrent_gemma's `rnn_scan`."""
    state = mx.zeros((x.shape[0], x.shape[2]), x.dtype) if h0 is None else h0
    return in_pieces(diagonal, state, [a, x], piece=_affordable(x.shape[0] * x.shape[2]))


def _recurrent_gla(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, scale: float, h: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """bailing_moe_linear's `recurrent_gla`, [B, H, T, d]."""
    rows, heads, _, width = q.shape
    state = mx.zeros((rows, heads, width, v.shape[-1])) if h is None else h
    given = [array.swapaxes(1, 2) for array in (q * scale, k, v)]
    out, last = in_pieces(linear_attention, state.astype(mx.float32), given, [g])
    return out.swapaxes(1, 2).astype(q.dtype), last.astype(q.dtype if h is None else h.dtype)


def _mamba_sequence(layer: Any, x: mx.array, conv: mx.array | None, state: mx.array | None) -> Any:
    """mamba's `_process_sequence`: its convolution, and `ssm_step` of all tokens at once."""
    x, z = layer.in_proj(x).split(indices_or_sections=2, axis=-1)
    taps = layer.conv_kernel_size
    past = mx.zeros((x.shape[0], taps - 1, x.shape[2]), x.dtype) if conv is None else conv
    full = mx.concatenate([past, x], axis=1)
    x = nn.silu(layer.conv1d(full))
    delta, b, c = mx.split(layer.x_proj(x), [layer.time_step_rank, layer.time_step_rank + layer.ssm_state_size], axis=-1)
    if layer.use_bcdt_rms:
        delta, b, c = (mx.fast.rms_norm(array, None, layer.args.mixer_rms_eps) for array in (delta, b, c))
    y, last = _selective(layer, (x, nn.softplus(layer.dt_proj(delta)), b, c), -mx.exp(layer.A_log), state)
    return layer.out_proj(nn.silu(z) * y), (full[:, -(taps - 1) :, :], last)


def _jamba_step(layer: Any, x: mx.array, a: mx.array, state: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """jamba's `ssm_step`, which takes whole rows."""
    delta, b, c = mx.split(layer.x_proj(x), [layer.time_step_rank, layer.time_step_rank + layer.ssm_state_size], axis=-1)
    delta, b, c = layer.dt_layernorm(delta), layer.b_layernorm(b), layer.c_layernorm(c)
    return _selective(layer, (x, nn.softplus(layer.dt_proj(delta)), b, c), a, state)


def _selective(layer: Any, rows: tuple[mx.array, ...], a: mx.array, state: mx.array | None) -> tuple[mx.array, mx.array]:
    x, b = rows[0], rows[2]
    shape = (x.shape[0], x.shape[2], b.shape[2])
    first = mx.zeros(shape) if state is None else state.astype(mx.float32)
    piece = _affordable(shape[0] * shape[1] * shape[2])
    y, last = in_pieces(selective, first, rows, [a.astype(mx.float32)], piece)
    return y.astype(x.dtype) + layer.D * x, last.astype(x.dtype if state is None else state.dtype)


def _wkv7(layer: Any, *given: Any) -> tuple[mx.array, mx.array]:
    """rwkv7's `_wkv7`: its loop, in pieces (its Metal kernel has no gradient, and is used where none is needed)."""
    if backend() == "metal" and not layer.training:
        return super(type(layer), layer)._wkv7(*given)  # type: ignore[misc]
    *rows, state = given
    step = import_module(type(layer).__module__)._wkv7_step_ops
    shape = (rows[0].shape[0], layer.num_heads, layer.head_dim, layer.head_dim)

    def run(state: mx.array, *slices: mx.array) -> tuple[mx.array, mx.array]:
        outputs = []
        for t in range(slices[0].shape[1]):
            y, state = step(*(array[:, t] for array in slices), state)
            outputs.append(y)
        return mx.stack(outputs, axis=1), state

    out, last = in_pieces(run, mx.zeros(shape, rows[0].dtype) if state is None else state, rows, piece=32)
    return out.astype(rows[0].dtype), last


SCAN_FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "recurrent_gemma": ("rnn_scan", _rnn_scan),
    "bailing_moe_linear": ("recurrent_gla", _recurrent_gla),
}
"""By Python module of mlx_lm.models: the function that is replaced, and by what."""
SCAN_METHODS: dict[tuple[str, str], tuple[str, Callable[..., Any]]] = {
    ("mamba", "MambaBlock"): ("_process_sequence", _mamba_sequence),
    ("jamba", "JambaMambaMixer"): ("ssm_step", _jamba_step),
    ("rwkv7", "Rwkv7TimeMixing"): ("_wkv7", _wkv7),
}
"""By Python module and class: the method that is replaced, and by what."""
