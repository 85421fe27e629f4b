"""Decoding with shared prompts: the keys and values of a prompt are stored once for all rows that continue it.

A row attends to its prompt and to its own tokens under one softmax. The prompt part is one matrix product for all rows of the
prompt. The rows' own keys and values are in preallocated arrays that are written in place, each row at its own position, so
that rows that began at different times form one batch. Shapes stay the same for dozens of steps, so that a step can be
compiled. This works for models whose layers store plain keys and values, with or without a sliding window.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs import define
from mlx.utils import tree_map
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ..errors import InputError
from ..models.attention import hook
from ..utils.integers import round_up

TokenIds = tuple[int, ...]
Stored = tuple[mx.array, ...]  # [rows, heads, positions, d]; or its quantized weights, scales and biases
KeysValues = tuple[Stored, Stored]

_PREFILL_TOKENS = 2048  # tokens that pass through the model together
_ALIGN = 32  # positions are multiples of this, which GPU kernels need to be fast
_ROOM = 64  # first positions of a row; arrays grow by half, so that few shapes occur


class Fixed(NamedTuple):
    """The inputs of a step that it does not change.

    Attributes:
        prompts: for each layer, keys and values [U, heads, K, d] of all tokens but the last of the prompts.
        lengths: [R] int32, number of these tokens in the prompt of each row.
        grid: the rows of each prompt [U, W], and the flat position of each row in them [R]; None: rows are in order, W for each
            prompt.
    """

    prompts: list[KeysValues]
    lengths: mx.array
    grid: tuple[mx.array, mx.array] | None


def cache_obstacle(model: nn.Module) -> str | None:
    """Why the caches or the attention of a model rule this out; None if they do not."""
    layers = make_prompt_cache(model)
    if strange := {type(layer).__name__ for layer in layers if type(layer) not in (KVCache, RotatingKVCache)}:
        return f"it keeps more than keys and values ({', '.join(sorted(strange))})"
    return None if hook(model) else "it computes attention in its own way"


def decode_step(model: nn.Module, bits: int | None, fixed: Fixed, own: list[KeysValues], last: mx.array, place: mx.array) -> Any:
    """One step of all rows.

    Args:
        model: an mlx-lm model.
        bits: of quantized keys and values.
        fixed: the prompts.
        own: for each layer, keys and values [R, heads, C, d] of the rows' own tokens.
        last: [R] the tokens to read.
        place: [R] their positions after the cached part of the prompt.

    Returns:
        Logits [R, V], and `own` with the new tokens.
    """
    windows = _windows(model)
    cache = [StepCache(*layer, fixed, place, bits) for layer in zip(fixed.prompts, own, windows, strict=True)]
    logits = model(last[:, None], cache=cache)[:, -1]
    return logits, [layer.own for layer in cache]


class StepCache:
    """Replaces the cache of a layer for one step."""

    def __init__(
        self, prompt: KeysValues, own: KeysValues, window: int | None, fixed: Fixed, place: mx.array, bits: int | None
    ) -> None:
        self.prompt, self.own, self.window = prompt, own, window
        self.fixed, self.place, self._bits = fixed, place, bits  # not `bits`: mlx-lm would take this for its own quantized cache
        self.offset = fixed.lengths + place

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores a position [R, heads, 1, d], and returns it."""
        at = mx.minimum(self.place, self.own[0][0].shape[2] - 1)[:, None, None, None]  # finished rows may exceed it
        self.own = _written(self.own[0], _packed(keys, self._bits), at), _written(self.own[1], _packed(values, self._bits), at)
        return keys, values

    def make_mask(self, n: int, *, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """[R, 1, 1, K + C] bool: the positions of its prompt and of its own tokens that a row attends to."""
        prompt, own = mx.arange(self.prompt[0][0].shape[2]), mx.arange(self.own[0][0].shape[2])
        length, place, window = self.fixed.lengths[:, None], self.place[:, None], window_size or self.window
        to_prompt, to_own = prompt < length, own <= place
        if window is not None:
            to_prompt, to_own = to_prompt & (prompt > length + place - window), to_own & (own > place - window)
        return mx.concatenate([to_prompt, to_own], axis=-1)[:, None, None]

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Attention of the rows: [R, heads, 1, d] to [R, heads, 1, d]."""
        mask = mask if isinstance(mask, mx.array) else self.make_mask(1)
        rows, heads = keys.shape[:2]
        queries = queries.reshape(rows, heads, -1, queries.shape[-1])
        (prompt_keys, prompt_values), (own_keys, own_values) = self.prompt, self.own
        to_prompt = self._of_prompts(queries, prompt_keys, transpose=True)
        to_own = _product(queries, own_keys, self._bits, transpose=True).reshape(*to_prompt.shape[:-1], -1)
        scores = mx.concatenate([to_prompt, to_own], axis=-1).reshape(*queries.shape[:-1], -1)
        weights = _softmax(mx.where(mask, scores * scale, -mx.inf), sinks).astype(queries.dtype)
        length = to_prompt.shape[-1]
        out = self._of_prompts(weights[..., :length], prompt_values, transpose=False)
        own = _product(weights[..., length:], own_values, self._bits, transpose=False)
        return (out + own.reshape(out.shape)).reshape(rows, -1, 1, own.shape[-1])

    def _of_prompts(self, x: mx.array, stored: Stored, *, transpose: bool) -> mx.array:
        """[R, heads, r, n] times the stored arrays of the row's prompt, in one product for all rows of a prompt.

        Returns:
            [a, b, heads, r, m] with R = a · b; in memory the order differs.
        """
        prompts, grid = stored[0].shape[0], self.fixed.grid
        heads, repeats, size = x.shape[1:]
        x = (x if grid is None else x[grid[0].reshape(-1)]).reshape(prompts, -1, heads, repeats, size)
        together = x.transpose(0, 2, 1, 3, 4).reshape(prompts, heads, -1, size)
        out = _product(together, stored, self._bits, transpose=transpose)
        out = out.reshape(prompts, heads, -1, repeats, out.shape[-1]).transpose(0, 2, 1, 3, 4)
        return out if grid is None else out.reshape(-1, *out.shape[2:])[grid[1]][None]


def _softmax(scores: mx.array, sinks: mx.array | None) -> mx.array:
    """Softmax of [R, heads, r, n]; a sink [heads · r] is one more logit without a value."""
    if sinks is None:
        return mx.softmax(scores, axis=-1, precise=True)
    more = mx.broadcast_to(sinks.reshape(1, *scores.shape[1:3], 1), (*scores.shape[:3], 1))
    return mx.softmax(mx.concatenate([scores, more.astype(scores.dtype)], axis=-1), axis=-1, precise=True)[..., :-1]


def _product(x: mx.array, stored: Stored, bits: int | None, *, transpose: bool) -> mx.array:
    if bits is None:
        return x @ (stored[0].swapaxes(-1, -2) if transpose else stored[0])
    group = stored[0].shape[-1] * 32 // bits // stored[1].shape[-1]
    return mx.quantized_matmul(x, *stored, transpose=transpose, group_size=group, bits=bits)


def _packed(x: mx.array, bits: int | None) -> Stored:
    """Quantized in groups of 64 or 32 entries of a head, if `bits` is set."""
    if bits is None:
        return (x,)
    if x.shape[-1] % 32:
        raise InputError(f"--kv-bits {bits}: this model's heads have {x.shape[-1]} entries, no multiple of 32; leave it out")
    return tuple(mx.quantize(x, group_size=32 if x.shape[-1] % 64 else 64, bits=bits))


def _written(stored: Stored, new: Stored, at: mx.array) -> Stored:
    pairs = zip(stored, new, strict=True)
    return tuple(mx.put_along_axis(array, at, entry, axis=2) for array, entry in pairs)


def _windows(model: nn.Module) -> list[int | None]:
    return [getattr(layer, "max_size", None) for layer in make_prompt_cache(model)]


# --- rows and their prompts ---------------------------------------------------------------------------


@define(eq=False)
class Shared:
    """R rows and their U prompts.

    Attributes:
        texts: token ids of the prompts.
        owner: [R], the number of the prompt of each row.
        fixed: the prompts as `decode_step` reads them.
        own: for each layer, keys and values [R, heads, C, d] of the rows' own tokens.
        bits: of quantized keys and values.
    """

    texts: list[TokenIds]
    owner: np.ndarray
    fixed: Fixed
    own: list[KeysValues]
    bits: int | None

    def keep(self, rows: Sequence[int]) -> Self:
        """The given rows and their prompts."""
        used, owner = np.unique(self.owner[list(rows)], return_inverse=True)
        prompts = self.fixed.prompts if len(used) == len(self.texts) else _taken(self.fixed.prompts, used)
        texts = [self.texts[prompt] for prompt in used]
        return type(self)(texts, owner, _fixed(texts, owner, prompts), _taken(self.own, np.array(rows)), self.bits)

    def join(self, model: nn.Module, prompts: Sequence[TokenIds]) -> Self:
        """These rows and one more for each of `prompts`; only new prompts are computed."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.texts]
        texts = self.texts + new
        stored = _stacked(self.fixed.prompts, prefill_prompts(model, new, self.bits)) if new else self.fixed.prompts
        owner = np.concatenate([self.owner, [texts.index(prompt) for prompt in prompts]]).astype(np.int32)
        own = tree_map(lambda a: mx.concatenate([a, mx.zeros((len(prompts), *a.shape[1:]), a.dtype)]), self.own)
        return type(self)(texts, owner, _fixed(texts, owner, stored), own, self.bits)

    def reserve(self, positions: int, limit: int) -> None:
        """Makes room for `positions` tokens of each row; there will never be more than `limit`."""
        have = self.own[0][0][0].shape[2]
        if positions > have:
            want = min(round_up(max(positions, have + have // 2), _ROOM), round_up(max(limit, positions), _ALIGN))
            self.own = tree_map(lambda a: _lengthened(a, want), self.own)


def start(model: nn.Module, prompts: Sequence[TokenIds], bits: int | None) -> Shared:
    """A row for each of `prompts`; equal prompts are computed once."""
    texts = list(dict.fromkeys(prompts))
    owner = np.array([texts.index(prompt) for prompt in prompts], np.int32)
    stored = prefill_prompts(model, texts, bits)
    own = tree_map(lambda a: mx.zeros((len(prompts), a.shape[1], _ROOM, a.shape[3]), a.dtype), stored)
    return Shared(texts, owner, _fixed(texts, owner, stored), own, bits)


def prefill_prompts(model: nn.Module, prompts: Sequence[TokenIds], bits: int | None) -> list[KeysValues]:
    """For each layer, keys and values [U, heads, K, d] of all tokens but the last of each prompt, right-padded."""
    longest = max(max(map(len, prompts)) - 1, 1)  # prompts of one token still give the shapes
    cache = [_PromptCache(window) for window in _windows(model)]
    feed(model, prompts, longest, cache)
    kept: list[Any] = [layer.keys_and_values() for layer in cache]
    stored = tree_map(lambda array: _packed(_lengthened(array, round_up(longest, _ALIGN)), bits), kept)
    mx.eval(stored)
    return stored


def feed(model: nn.Module, prompts: Sequence[Sequence[int]], longest: int, cache: list[Any]) -> None:
    """Computes the cache of all tokens but the last of each prompt, right-padded to `longest`, in parts and without logits."""
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt) - 1] = prompt[:-1]
    part = max(_ALIGN, _PREFILL_TOKENS // len(prompts))
    for begin in range(0, longest, part):
        model(mx.array(tokens[:, begin : begin + part]), cache=cache)
        mx.eval([layer.state for layer in cache])


class _PromptCache(KVCache):
    """Keeps all positions, also with a sliding window."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window

    def make_mask(self, n: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """The causal mask; prompts are padded on the right."""
        window = window_size or self.window
        if not self.offset:
            return create_attention_mask(mx.zeros((1, n)), None, window, return_array)
        return super().make_mask(n, return_array=return_array, window_size=window)


def _fixed(texts: list[TokenIds], owner: np.ndarray, prompts: list[KeysValues]) -> Fixed:
    lengths = np.array([len(text) - 1 for text in texts], np.int32)
    return Fixed(prompts, mx.array(lengths[owner]), _grid(owner, len(texts)))


def _grid(owner: np.ndarray, prompts: int) -> tuple[mx.array, mx.array] | None:
    """See `Fixed`; unused places hold row 0, and nothing reads them."""
    width = int(np.bincount(owner).max())
    if np.array_equal(owner, np.repeat(np.arange(prompts), width)):
        return None
    places, taken = np.zeros((prompts, width), np.int32), np.zeros(len(owner), np.int32)
    for prompt in range(prompts):
        rows = np.flatnonzero(owner == prompt)
        places[prompt, : len(rows)] = rows
        taken[rows] = prompt * width + np.arange(len(rows))
    return mx.array(places), mx.array(taken)


def _taken(stored: list[KeysValues], rows: np.ndarray) -> list[KeysValues]:
    on_device = mx.array(rows)
    return tree_map(lambda array: array[on_device], stored)


def _stacked(a: list[KeysValues], b: list[KeysValues]) -> list[KeysValues]:
    """The prompts of both, padded to one length."""
    longest = max(a[0][0][0].shape[2], b[0][0][0].shape[2])
    return tree_map(lambda x, y: mx.concatenate([_lengthened(x, longest), _lengthened(y, longest)]), a, b)


def _lengthened(array: mx.array, positions: int) -> mx.array:
    return mx.pad(array, [(0, 0), (0, 0), (0, positions - array.shape[2]), (0, 0)])
