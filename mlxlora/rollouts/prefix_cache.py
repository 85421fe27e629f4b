"""Rows that continue prompts by a token at a time; a prompt's keys and values are kept once, however many rows read them.

A row attends to its prompt and to its own tokens under one softmax. The prompt's part is one matrix product for all rows
of that prompt; the rows' own keys and values stand in arrays that are allocated ahead and written in place, each row at
its own position, so rows that began at different times are one batch. All shapes stay the same for dozens of steps: a
step can be compiled. For models whose layers keep plain keys and values, in a window or not.
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

Prompt = tuple[int, ...]
Stored = tuple[mx.array, ...]  # [rows, heads, positions, d]; or its quantised weights, scales and biases
KeysValues = tuple[Stored, Stored]

_PREFILL_TOKENS = 2048  # tokens that pass through the model at once
_ALIGN = 32  # positions: matrix products of other lengths leave a GPU's fast kernels
_ROOM = 64  # positions that rows are given at first; then half as many again, so that few shapes occur


class Fixed(NamedTuple):
    """What a step reads and does not change.

    Attributes:
        prompts: a layer each: keys and values [U, heads, K, d] of the prompts, all tokens but the last.
        lengths: [R] int32, of them the row's prompt has.
        grid: the row of each of a prompt's places [U, W], and a row's place in that [R]; None: rows in order, W to a prompt.
    """

    prompts: list[KeysValues]
    lengths: mx.array
    grid: tuple[mx.array, mx.array] | None


def obstacle(model: nn.Module) -> str | None:
    """Why a model's rows cannot be kept so, as far as its caches and its attention tell; None: try."""
    layers = make_prompt_cache(model)
    if strange := {type(layer).__name__ for layer in layers if type(layer) not in (KVCache, RotatingKVCache)}:
        return f"it keeps more than keys and values ({', '.join(sorted(strange))})"
    return None if hook(model) else "it computes attention in its own way"


def read(model: nn.Module, bits: int | None, fixed: Fixed, own: list[KeysValues], last: mx.array, place: mx.array) -> Any:
    """A step: the tokens `last` [R], each the `place`-th [R] after its prompt's cache, to (logits [R, V], `own` with them)."""
    windows = _windows(model)
    cache = [RowCache(*layer, fixed, place, bits) for layer in zip(fixed.prompts, own, windows, strict=True)]
    logits = model(last[:, None], cache=cache)[:, -1]
    return logits, [layer.own for layer in cache]


class RowCache:
    """In place of a layer's cache, for one step."""

    def __init__(
        self, prompt: KeysValues, own: KeysValues, window: int | None, fixed: Fixed, place: mx.array, bits: int | None
    ) -> None:
        self.prompt, self.own, self.window = prompt, own, window
        self.fixed, self.place, self._bits = fixed, place, bits  # mlx-lm takes a cache with `bits` for its own
        self.offset = fixed.lengths + place

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Writes a position [R, heads, 1, d] down, and returns it."""
        at = mx.minimum(self.place, self.own[0][0].shape[2] - 1)[:, None, None, None]  # rows that ended may run over
        self.own = _written(self.own[0], _packed(keys, self._bits), at), _written(self.own[1], _packed(values, self._bits), at)
        return keys, values

    def make_mask(self, n: int, *, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """[R, 1, 1, K + C] bool: what a row sees of its prompt and of its own positions."""
        prompt, own = mx.arange(self.prompt[0][0].shape[2]), mx.arange(self.own[0][0].shape[2])
        length, place, window = self.fixed.lengths[:, None], self.place[:, None], window_size or self.window
        to_prompt, to_own = prompt < length, own <= place
        if window is not None:
            to_prompt, to_own = to_prompt & (prompt > length + place - window), to_own & (own > place - window)
        return mx.concatenate([to_prompt, to_own], axis=-1)[:, None, None]

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """[R, heads, 1, d] to [R, heads, 1, d]."""
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
        """[R, heads, r, n] times what is stored of the row's prompt: one product for all rows of a prompt.

        Returns:
            [a, b, heads, r, m] where R = a · b; not in this order in memory.
        """
        prompts, grid = stored[0].shape[0], self.fixed.grid
        heads, repeats, size = x.shape[1:]
        x = (x if grid is None else x[grid[0].reshape(-1)]).reshape(prompts, -1, heads, repeats, size)
        together = x.transpose(0, 2, 1, 3, 4).reshape(prompts, heads, -1, size)
        out = _product(together, stored, self._bits, transpose=transpose)
        out = out.reshape(prompts, heads, -1, repeats, out.shape[-1]).transpose(0, 2, 1, 3, 4)
        return out if grid is None else out.reshape(-1, *out.shape[2:])[grid[1]][None]


def _softmax(scores: mx.array, sinks: mx.array | None) -> mx.array:
    """[R, heads, r, n]; a sink [heads · r] is a logit that takes its share and gives nothing."""
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
    """Quantised in groups of 64 or 32 of a head's entries, if at all."""
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


# --- which rows there are ---------------------------------------------------------------------------


@define(eq=False)
class Shared:
    """R rows and their U prompts.

    Attributes:
        texts: of the prompts.
        owner: [R], the prompt of each row.
        fixed: what `read` needs of them.
        own: a layer each: keys and values [R, heads, C, d] of the rows' own tokens.
        bits: of quantised keys and values.
    """

    texts: list[Prompt]
    owner: np.ndarray
    fixed: Fixed
    own: list[KeysValues]
    bits: int | None

    def keep(self, rows: Sequence[int]) -> Self:
        """The given rows, and the prompts that they need."""
        used, owner = np.unique(self.owner[list(rows)], return_inverse=True)
        prompts = self.fixed.prompts if len(used) == len(self.texts) else _taken(self.fixed.prompts, used)
        texts = [self.texts[prompt] for prompt in used]
        return type(self)(texts, owner, _fixed(texts, owner, prompts), _taken(self.own, np.array(rows)), self.bits)

    def join(self, model: nn.Module, prompts: Sequence[Prompt]) -> Self:
        """One row more for each of `prompts`; those that are not there yet are read."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.texts]
        texts = self.texts + new
        stored = _stacked(self.fixed.prompts, prefill(model, new, self.bits)) if new else self.fixed.prompts
        owner = np.concatenate([self.owner, [texts.index(prompt) for prompt in prompts]]).astype(np.int32)
        own = tree_map(lambda a: mx.concatenate([a, mx.zeros((len(prompts), *a.shape[1:]), a.dtype)]), self.own)
        return type(self)(texts, owner, _fixed(texts, owner, stored), own, self.bits)

    def reserve(self, positions: int, limit: int) -> None:
        """Makes room for so many tokens of each row; `limit`: more are never asked for."""
        have = self.own[0][0][0].shape[2]
        if positions > have:
            want = min(_aligned(max(positions, have + have // 2), _ROOM), _aligned(max(limit, positions)))
            self.own = tree_map(lambda a: _lengthened(a, want), self.own)


def start(model: nn.Module, prompts: Sequence[Prompt], bits: int | None) -> Shared:
    """A row for each of `prompts`; equal ones are read once."""
    texts = list(dict.fromkeys(prompts))
    owner = np.array([texts.index(prompt) for prompt in prompts], np.int32)
    stored = prefill(model, texts, bits)
    own = tree_map(lambda a: mx.zeros((len(prompts), a.shape[1], _ROOM, a.shape[3]), a.dtype), stored)
    return Shared(texts, owner, _fixed(texts, owner, stored), own, bits)


def prefill(model: nn.Module, prompts: Sequence[Prompt], bits: int | None) -> list[KeysValues]:
    """Keys and values [U, heads, K, d] of all tokens but the last of each prompt, right-padded, a layer each."""
    longest = max(max(map(len, prompts)) - 1, 1)  # of nothing, too, the shape has to be known
    cache = [_PromptCache(window) for window in _windows(model)]
    feed(model, prompts, longest, cache)
    kept: list[Any] = [layer.keys_and_values() for layer in cache]
    stored = tree_map(lambda array: _packed(_lengthened(array, _aligned(longest)), bits), kept)
    mx.eval(stored)
    return stored


def feed(model: nn.Module, prompts: Sequence[Sequence[int]], longest: int, cache: list[Any]) -> None:
    """Reads all tokens but the last of each prompt, right-padded to `longest`, in pieces; logits are never computed."""
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt) - 1] = prompt[:-1]
    micro = max(_ALIGN, _PREFILL_TOKENS // len(prompts))
    for begin in range(0, longest, micro):
        model(mx.array(tokens[:, begin : begin + micro]), cache=cache)
        mx.eval([layer.state for layer in cache])


class _PromptCache(KVCache):
    """Keeps everything, whatever the window."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window

    def make_mask(self, n: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """Causal: prompts are padded on the right."""
        window = window_size or self.window
        if not self.offset:
            return create_attention_mask(mx.zeros((1, n)), None, window, return_array)
        return super().make_mask(n, return_array=return_array, window_size=window)


def _fixed(texts: list[Prompt], owner: np.ndarray, prompts: list[KeysValues]) -> Fixed:
    lengths = np.array([len(text) - 1 for text in texts], np.int32)
    return Fixed(prompts, mx.array(lengths[owner]), _grid(owner, len(texts)))


def _grid(owner: np.ndarray, prompts: int) -> tuple[mx.array, mx.array] | None:
    """See `Fixed`; a place that no row has is given to row 0 and read by none."""
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
    """The prompts of both."""
    longest = max(a[0][0][0].shape[2], b[0][0][0].shape[2])
    return tree_map(lambda x, y: mx.concatenate([_lengthened(x, longest), _lengthened(y, longest)]), a, b)


def _lengthened(array: mx.array, positions: int) -> mx.array:
    return mx.pad(array, [(0, 0), (0, 0), (0, positions - array.shape[2]), (0, 0)])


def _aligned(positions: int, to: int = _ALIGN) -> int:
    """
    >>> _aligned(511), _aligned(512)
    (512, 512)
    """
    return -(-positions // to) * to
