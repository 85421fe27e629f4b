"""How recurrent layers compute in training: mlx-lm's loop over tokens, chunks, or MLX's kernel on Metal.

mlx-lm's models call `gated_delta_update` by that name, in their own Python module. In training it is a Python loop over tokens,
which traces, launches and keeps every step. `hook_recurrences` replaces it by `delta_update`, which computes the same in chunks,
and the loops of other recurrences by those of `scans`.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from inspect import signature
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta

from ..errors import one_line
from ..utils.context import assigned
from ..utils.device import backend
from ..utils.patches import Slot, overridden, replace_function, set_class, subclass
from .gated_delta import DELTA_CHUNK, Rule, chunked_delta_rule
from .scans import SCAN_FUNCTIONS, SCAN_METHODS

_NAME = "gated_delta_update"
_PLAIN = gated_delta.gated_delta_update
_SIGNATURE = signature(_PLAIN)
_HOOKED: Slot[int | None] = Slot("recurrences", None)  # how many layers have the gated delta rule
_SCANS: Slot[int] = Slot("scans", 0)

_CHOICE: ContextVar[str] = ContextVar("recurrence", default="auto")
_SEGMENTS: ContextVar[mx.array | None] = ContextVar("segments of a recurrence", default=None)
"""Both are read by functions with mlx-lm's signatures, which have no room for an argument of ours."""


def recurrence_by(choice: str) -> AbstractContextManager[None]:
    """How these layers compute while the context lasts.

    Args:
        choice: "loop", "chunked", "kernel", or "auto": the kernel where it has been verified, else chunks.
    """
    return assigned(_CHOICE, choice)


def hook_recurrences(model: nn.Module) -> int:
    """Makes recurrent layers compute in chunks; a second call changes nothing. `utils.patches.restore` undoes it.

    Returns:
        How many layers have the gated delta rule.
    """
    if (known := _HOOKED.get(model)) is not None:
        return known
    layers = delta_layers(model)
    for layer in layers:
        cls = type(layer)
        replace_function(model, sys.modules[cls.__module__], _NAME, delta_update)
        set_class(layer, subclass(cls, {"__call__": _knowing_segments(cls)}))
    _HOOKED.put(model, len(layers))
    _SCANS.put(model, _hook_scans(model))
    if layers:
        _verify_kernel(model)
    return len(layers)


def delta_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of a model whose class calls mlx-lm's `gated_delta_update`."""
    return [module for module in model.modules() if _calls(type(module), _NAME)]


def _calls(cls: type, name: str) -> bool:
    codes = (getattr(base.__dict__.get("__call__"), "__code__", None) for base in cls.__mro__)
    return any(code is not None and name in code.co_names for code in codes)


def _hook_scans(model: nn.Module) -> int:
    """Replaces loops over tokens of other recurrences; returns how many layers have one."""
    count = 0
    for layer in model.modules():
        cls = type(layer)
        module = cls.__module__.removeprefix("mlx_lm.models.")
        name, ours = SCAN_FUNCTIONS.get(module, ("", None))
        if ours and _calls(cls, name):
            owner = sys.modules[cls.__module__]
            replace_function(model, owner, name, _by_choice(getattr(owner, name), ours))
            count += 1
        name, ours = SCAN_METHODS.get((module, cls.__name__), ("", None))
        if ours:
            set_class(layer, subclass(cls, {name: _by_choice(getattr(cls, name), ours)}))
            count += 1
    return count


def _by_choice(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` unless --recurrence loop asks for the original; a function that was replaced before stays."""
    if hasattr(original, "original"):
        return original

    def call(*args: Any, **kwargs: Any) -> Any:
        return (original if _CHOICE.get() == "loop" else ours)(*args, **kwargs)

    call.original = original  # type: ignore[attr-defined]
    return call


def recurrence_told(model: nn.Module) -> str | None:
    """One line on what a run does with recurrent layers; None if the model has none that mlx-lm computes token by token."""
    count, choice = hook_recurrences(model), _CHOICE.get()
    scans = _SCANS.get(model)
    if not (count or scans):
        return None
    layers = f"{count} layers of the gated delta rule" if count else f"{scans} recurrent layers"
    if choice == "loop":
        return f"--recurrence loop: {layers} compute one token after the other, which takes long and keeps every step"
    if not count:
        return f"{layers} compute in pieces of the row (--recurrence loop: one token after the other)"
    problems = [problem for problem in _kernel.values() if problem]
    if choice == "kernel" or (choice == "auto" and _kernel and not problems):
        return f"{layers} compute with MLX's kernel (--recurrence chunked: in chunks)"
    why = f"; MLX's kernel is not used: {problems[0]}" if problems and choice == "auto" else ""
    return f"{layers} compute in chunks of {DELTA_CHUNK} tokens, exactly (--recurrence loop: one token after the other){why}"


def delta_update(*args: Any, **kwargs: Any) -> tuple[mx.array, mx.array]:
    """mlx-lm's `gated_delta_update`, with its arguments; padding in `mask` leaves the state as it is."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    x, segments = bound.arguments, _SEGMENTS.get()
    keys, values = x["k"], x["v"]
    if keys.shape[1] == 1 or (_CHOICE.get() == "loop" and segments is None):
        return _PLAIN(*args, **kwargs)
    rate, log_decay, mask = mx.sigmoid(x["b"]), _log_decay(x["a"], x["A_log"], x["dt_bias"], x["lower_bound"]), x["mask"]
    rate = 2 * rate if x["allow_neg_eigval"] else rate
    if mask is not None:
        rate = mx.where(mask[..., None], rate, 0)
        log_decay = mx.where(mask.reshape(*mask.shape, *[1] * (log_decay.ndim - 2)), log_decay, 0)
    state = mx.zeros((values.shape[0], *values.shape[2:], keys.shape[-1])) if x["state"] is None else x["state"]
    return _rule_by_choice(Rule(x["q"], keys, values, log_decay, rate, state, segments))


def _log_decay(a: mx.array, a_log: mx.array, bias: mx.array, lower_bound: float | None) -> mx.array:
    """The logarithm of what mlx-lm's `compute_g` and `compute_lower_bound_g` return, which may underflow."""
    speed = mx.exp(a_log.astype(mx.float32))
    if lower_bound is None:
        return -speed * nn.softplus(a + bias)
    return lower_bound * mx.sigmoid(speed * (a.astype(mx.float32) + bias))


# --- MLX's kernel ----------------------------------------------------------------------------------


class DeltaShape(NamedTuple):
    """What decides whether the kernel computes a layer."""

    groups: int
    width: int
    heads: int
    columns: int
    dtype: mx.Dtype
    by_channel: bool


KERNEL_HEADS = frozenset((keys, 128, heads, 128) for keys, heads in ((16, 16), (16, 32), (16, 48), (16, 64), (24, 24), (32, 32)))
"""What MLX 0.32.4 has Metal kernels for; for other shapes its function is a loop over tokens there, too."""

_kernel: dict[DeltaShape, str | None] = {}
"""By shape of a layer: why MLX's kernel does not compute it; None: it computes the same as chunks. Empty where none was tried."""
_SHAPES: ContextVar[set[DeltaShape] | None] = ContextVar("shapes of recurrences", default=None)


def _rule_by_choice(rule: Rule) -> tuple[mx.array, mx.array]:
    choice, shapes = _CHOICE.get(), _SHAPES.get()
    if shapes is not None:
        shapes.add(_shape(rule))
    plain = rule.segments is None and rule.log_decay.ndim == 3
    if plain and (choice == "kernel" or (choice == "auto" and _kernel.get(_shape(rule), "not tried") is None)):
        return _by_kernel(rule)
    return chunked_delta_rule(rule)


def _by_kernel(rule: Rule) -> tuple[mx.array, mx.array]:
    decay = mx.exp(rule.log_decay)
    out, state = mx.fast.gated_delta_update(rule.queries, rule.keys, rule.values, decay, rule.rate, rule.state)
    return out.astype(rule.queries.dtype), state


def _shape(rule: Rule) -> DeltaShape:
    (groups, width), (heads, columns) = rule.keys.shape[2:], rule.values.shape[2:]
    return DeltaShape(groups, width, heads, columns, rule.queries.dtype, rule.log_decay.ndim == 4)


def _verify_kernel(model: nn.Module) -> None:
    """Tries the kernel once for each shape of the model's layers, where it exists; called before anything is traced."""
    if backend() != "metal":
        return
    shapes: set[DeltaShape] = set()
    with assigned(_SHAPES, shapes), recurrence_by("chunked"):
        model(mx.zeros((1, 2), mx.int32))  # lazy: only shapes are read
    for shape in shapes - _kernel.keys():
        _kernel[shape] = kernel_obstacle(shape)


def kernel_obstacle(shape: DeltaShape, length: int = 100) -> str | None:
    """Why the kernel does not compute layers of this shape: it fails, or values or gradients differ from those of chunks."""
    if shape.by_channel:
        return "it has no decays by channel"
    if shape[:4] not in KERNEL_HEADS:
        return f"it has none for {shape.groups} and {shape.heads} heads of {shape.width} and {shape.columns}"
    try:
        found, exact = (_probed(compute, shape, length) for compute in (_by_kernel, chunked_delta_rule))
        worst = max(map(_relative, found, exact))
    except Exception as error:  # what MLX raises for a shape that it does not support
        return one_line(error, 120)
    return None if worst < (1e-3 if shape.dtype == mx.float32 else 5e-2) else f"its results differ by {worst:.1e}"


def _probed(compute: Callable[[Rule], tuple[mx.array, mx.array]], shape: DeltaShape, length: int) -> list[mx.array]:
    """A projection of outputs and last state of random inputs, and its gradients."""
    rows, (groups, width, heads, columns) = 2, shape[:4]
    keys = [mx.random.key(seed) for seed in range(7)]
    queries, others = (mx.random.normal((rows, length, groups, width), key=key) for key in keys[:2])
    units = [array / mx.linalg.norm(array, axis=-1, keepdims=True) for array in (queries, others)]
    values = mx.random.normal((rows, length, heads, columns), key=keys[2])
    given = [array.astype(shape.dtype) for array in (*units, values)]
    given.append(-mx.exp(mx.random.uniform(-7, 3.5, (rows, length, heads), key=keys[3])))  # decays of 0.999 to 4e-15
    given.append(mx.random.uniform(0, 1, (rows, length, heads), key=keys[4]).astype(shape.dtype))
    given.append(mx.random.normal((rows, heads, columns, width), key=keys[5]))

    def total(*arrays: mx.array) -> mx.array:
        out, state = compute(Rule(*arrays))
        return (out.astype(mx.float32) * mx.random.normal(out.shape, key=keys[6])).sum() + state.sum()

    value, gradients = mx.value_and_grad(total, argnums=tuple(range(6)))(*given)
    return [value, *gradients]


def _relative(a: mx.array, b: mx.array) -> float:
    a, b = a.astype(mx.float32).flatten(), b.astype(mx.float32).flatten()
    return (mx.linalg.norm(a - b) / mx.maximum(mx.linalg.norm(b), 1e-12)).item()  # type: ignore[return-value]


# --- packed rows -----------------------------------------------------------------------------------


class RecurrentCache:
    """In place of mlx-lm's cache of a recurrent layer: whole rows, packed rows, prompts, or rows that continue prompts.

    Attributes:
        kv: the layer's states, which rows read: [U, ...] after prompts; None: a row starts from nothing.
        lengths: [U] tokens of prompts, whose padding changes no state; None: no states are kept.
        segments: [R, T] int32, the sequences of packed rows; None: a row is one.
        repeats: rows that continue each prompt.
    """

    left_padding = None

    def __init__(
        self,
        states: tuple[mx.array | None, ...],
        lengths: mx.array | None = None,
        segments: mx.array | None = None,
        repeats: int = 1,
    ) -> None:
        self.kv, self.lengths, self.segments, self.repeats = states, lengths, segments, repeats

    def __getitem__(self, index: int) -> mx.array | None:
        state = self.kv[index]
        if state is None or self.repeats == 1:
            return state
        rows, *shape = state.shape
        return mx.broadcast_to(state[:, None], (rows, self.repeats, *shape)).reshape(-1, *shape)

    def __setitem__(self, index: int, state: mx.array) -> None:
        if self.lengths is not None:
            self.kv = (*self.kv[:index], state, *self.kv[index + 1 :])

    def make_mask(self, length: int) -> mx.array | None:
        """[U, K] bool, the tokens of prompts; None where padding is at the end and nothing follows."""
        return None if self.lengths is None else mx.arange(length) < self.lengths[:, None]

    def advance(self, length: int) -> None:
        """Nothing to count."""


def _knowing_segments(cls: type) -> Any:
    """The call of a layer whose recurrence and convolutions know the segments that its cache holds."""

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        caches = [a for a in (*args, *kwargs.values()) if isinstance(a, RecurrentCache)]
        segments = caches[0].segments if caches else None
        if segments is None:
            return cls.__call__(layer, *args, **kwargs)
        with assigned(_SEGMENTS, segments), overridden(_depthwise(layer), lambda _: {"__call__": _convolved}):
            return cls.__call__(layer, *args, **kwargs)

    return call


def _depthwise(layer: nn.Module) -> list[nn.Module]:
    return [m for m in layer.modules() if isinstance(m, nn.Conv1d) and m.weight.shape[-1] == 1]


def _convolved(conv: Any, x: mx.array) -> mx.array:
    """A causal convolution of each channel, of the token's own segment; x [B, taps - 1 + T, D] has the past in front."""
    segments: mx.array = _SEGMENTS.get()  # type: ignore[assignment]
    length, taps = segments.shape[1], conv.weight.shape[1]
    out = mx.zeros((), x.dtype)
    for lag in range(taps):
        before = mx.pad(segments, [(0, 0), (lag, 0)], constant_values=-1)[:, :length]
        start = taps - 1 - lag
        out = out + mx.where((before == segments)[..., None], x[:, start : start + length], 0) * conv.weight[:, start, 0]
    return out + conv.bias if "bias" in conv else out
