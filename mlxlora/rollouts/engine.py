"""Completions sampled from the policy, G for each prompt, many rows in a batch.

The model reads each prompt once for its group. Finished rows leave the batch and waiting ones enter. The host looks at the
tokens of every few steps while the device computes the next ones. Each row has its own random key, so its completion does not
depend on the other rows, except for the rounding of sums in batches of another size.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs import define, evolve, frozen

from ..errors import InputError, RunError
from ..models.modes import evaluating, vocabulary
from ..utils.device import backend
from .kv_cache import Route, Rows, enter, find_route, reader
from .sampling import Sampling, draw_tokens, uniforms

__all__ = ["Completion", "Decoding", "Route", "Sampling", "find_route", "sample"]

_LOOK_EVERY = 8  # steps between looks at the sampled tokens
_AHEAD = 2  # steps that the device computes meanwhile
_DEAD_SHARE = 0.25  # of finished rows, from which on it pays to copy the others
_DEAD_SHARE_COMPILED = 0.5  # the same where the step is traced again, too
_MOST_SHAPES = 64  # of a compiled step, which keeps them all; then it is compiled again


@frozen(eq=False)
class Completion:
    """One sampled completion.

    Attributes:
        tokens: [n] int32, n >= 1, with the stop token if it was sampled.
        logps: [n] float32, log softmax(logits/temperature), nats; with `kv_bits` those of the policy with the quantized cache.
        finished: a stop token ended it, not the limit.
    """

    tokens: np.ndarray
    logps: np.ndarray
    finished: bool


@frozen
class Decoding:
    """How completions are generated.

    Attributes:
        sampling: how tokens are drawn.
        stop: tokens that end a completion.
        group_size: G, completions of each prompt.
        batch: rows generated together; 0 = all.
        route: the result of `find_route(model)`; None calls it.
    """

    sampling: Sampling
    stop: Collection[int]
    group_size: int = 1
    batch: int = 0
    route: Route | None = None


def sample(model: nn.Module, prompts: Sequence[Sequence[int]], how: Decoding, *, key: mx.array) -> list[list[Completion]]:
    """Samples G completions of every prompt, in evaluation mode; the global random state is not used.

    Args:
        model: maps [R, T] token ids to [R, T, V] logits and takes mlx-lm's caches.
        prompts: token ids, at least one each.
        how: sampling, stop tokens and G.
        key: all randomness; the same key gives the same completions. Or [prompts·G, 2], a key for each completion.

    Returns:
        [prompts][G] completions.

    Raises:
        InputError: a prompt without tokens, or G < 1.
        RunError: the model's log-probabilities are not finite.

    >>> sample(model, [[1, 2, 3]], Decoding(Sampling(max_tokens=8), stop={2}), key=mx.random.key(0))  # doctest: +SKIP
    """
    _check(prompts, how)
    if not prompts:
        return []
    how = evolve(how, route=how.route or find_route(model))
    with evaluating(model):
        run = _start(model, prompts, how, key)
        _generate(run, how.batch or len(run.done))
    flat = [_completion(run, row) for row in range(len(run.done))]
    return [flat[start : start + how.group_size] for start in range(0, len(flat), how.group_size)]


# --- what has been sampled so far -----------------------------------------------------------


@frozen(eq=False)
class _Run:
    """The constants of one call, and the tokens of its rows so far; row r is completion r mod G of prompt r // G."""

    model: nn.Module
    prompts: Sequence[tuple[int, ...]]  # [rows]
    sampling: Sampling
    stop: Sequence[int]
    route: Route
    keys: mx.array  # [rows, 2]
    tokens: np.ndarray  # [rows, max_tokens]; tokens after a stop token have no meaning
    logps: np.ndarray
    done: np.ndarray  # [rows] bool: a stop token was seen
    vocabulary: int  # V where the repetition penalty needs it, else 0
    advance: Callable[..., Any]  # see `_advance`
    dead_share: float


def _start(model: nn.Module, prompts: Sequence[Sequence[int]], how: Decoding, key: mx.array) -> _Run:
    sampling, route = how.sampling, how.route
    assert route is not None
    if sampling.kv_bits and not route.shared:
        raise InputError(f"--kv-bits {sampling.kv_bits}: this model's cache cannot be quantized; leave it out ({route.note})")
    rows = [tuple(prompt) for prompt in prompts for _ in range(how.group_size)]
    tokens = np.full((len(rows), sampling.max_tokens), -1, np.int32)
    logps, done = np.zeros(tokens.shape, np.float32), np.zeros(len(rows), bool)
    size = vocabulary(model) if sampling.repetition_penalty != 1 else 0
    keys = key if key.ndim == 2 else mx.random.split(key, len(rows))
    compiled = route.shared and _compiles()
    return _Run(
        *(model, rows, sampling, sorted(how.stop), route, keys, tokens, logps, done, size),
        (_compiled if compiled else _plain)(model, route, sampling),
        _DEAD_SHARE_COMPILED if compiled else _DEAD_SHARE,
    )


def _plain(model: nn.Module, route: Route, sampling: Sampling) -> Callable[..., Any]:
    return _advance(reader(model, route, sampling.kv_bits), sampling)


def _compiled(model: nn.Module, route: Route, sampling: Sampling) -> Callable[..., Any]:
    """The step, traced once for each shape; the weights are inputs, so it uses the current ones."""
    step, shapes = route.steps.get(sampling, (None, []))
    if step is None or len(shapes) > _MOST_SHAPES:
        advance, shapes = _plain(model, route, sampling), []

        def traced(*state: Any) -> Any:
            shapes.append(None)  # runs only when a new shape is traced
            return advance(*state)

        step = mx.compile(traced, inputs=[model.state])
        route.steps[sampling] = step, shapes
    return step


def _compiles() -> bool:
    """A GPU waits for Python between the hundreds of small kernels of a step; a CPU does not, and would compile for seconds."""
    return backend() != "cpu"


def _advance(read: Callable[..., Any], sampling: Sampling) -> Callable[..., Any]:
    """A step: the state of the rows -> (tokens [R], logps [R], and the next state)."""

    def advance(
        fixed: Any, own: Any, last: mx.array, place: mx.array, noise: mx.array, seen: mx.array | None
    ) -> tuple[mx.array, mx.array, Any, mx.array, mx.array | None]:
        logits, own = read(fixed, own, last, place)
        here = mx.minimum(place, noise.shape[1] - 1)[:, None, None]
        tokens, logps = draw_tokens(logits, sampling, mx.take_along_axis(noise, here, axis=1)[:, 0], seen)
        if seen is not None:
            seen = mx.put_along_axis(seen, tokens[:, None], mx.array(True), axis=-1)
        return tokens, logps, own, place + 1, seen

    return advance


@define(eq=False)
class _Active:
    """The R rows that are generated together."""

    rows: np.ndarray  # [R] their numbers in the run
    positions: np.ndarray  # [R] tokens that were dispatched so far
    cache: Rows
    last: mx.array  # [R] int32, what the model reads next
    place: mx.array  # [R] int32, `positions` on the device
    noise: mx.array  # [R, max_tokens, 2]
    seen: mx.array | None  # [R, V] bool, for the repetition penalty


@frozen(eq=False)
class _Sampled:
    """The result of a step, which the device may still compute."""

    rows: np.ndarray
    positions: np.ndarray
    tokens: mx.array
    logps: mx.array


def _completion(run: _Run, row: int) -> Completion:
    tokens = run.tokens[row]
    stops = np.flatnonzero(np.isin(tokens, run.stop))
    length = int(stops[0]) + 1 if stops.size else len(tokens)
    logps = run.logps[row, :length].copy()
    if not np.isfinite(logps).all():
        raise RunError(f"sampling: log-probability {logps[~np.isfinite(logps)][0]} from the model; its weights or inputs overflow")
    return Completion(tokens[:length].copy(), logps, bool(stops.size))


def _check(prompts: Sequence[Sequence[int]], how: Decoding) -> None:
    if how.group_size < 1 or how.batch < 0:
        raise InputError(f"--group-size must be >= 1 and --rollout-batch >= 0, got {how.group_size} and {how.batch}")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {index + 1} of {len(prompts)} has no tokens: nothing to continue")


# --- the loop -------------------------------------------------------------------------------


def _generate(run: _Run, size: int) -> None:
    waiting, pending = deque(range(len(run.done))), deque[_Sampled]()
    active: _Active | None = None
    limit = run.sampling.max_tokens
    while (active := _turnover(run, active, waiting, size)) is not None:
        furthest = active.positions[active.positions < limit].max()
        active.cache.reserve(min(int(furthest) + _LOOK_EVERY, limit), limit)
        for _ in range(_LOOK_EVERY):
            if (active.positions < limit).any():
                pending.append(_step(run, active))
        _look(run, pending, _AHEAD)
    _look(run, pending, 0)


def _step(run: _Run, active: _Active) -> _Sampled:
    cache = active.cache
    own, cache.own = cache.own, None
    tokens, logps, cache.own, place, active.seen = run.advance(
        cache.fixed, own, active.last, active.place, active.noise, active.seen
    )
    del own  # its last reference, so that the next step writes in place
    mx.async_eval(tokens, logps)
    sampled = _Sampled(active.rows, active.positions, tokens, logps)
    active.last, active.place, active.positions = tokens, place, active.positions + 1
    return sampled


def _look(run: _Run, pending: deque[_Sampled], ahead: int) -> None:
    """Copies the sampled tokens to the host, except those of the last `ahead` steps."""
    while len(pending) > ahead:
        step = pending.popleft()
        inside = step.positions < run.sampling.max_tokens
        rows, positions, tokens = step.rows[inside], step.positions[inside], np.array(step.tokens)[inside]
        run.tokens[rows, positions] = tokens
        run.logps[rows, positions] = np.array(step.logps)[inside]
        run.done[rows] |= np.isin(tokens, run.stop)


def _turnover(run: _Run, active: _Active | None, waiting: deque[int], size: int) -> _Active | None:
    """Finished rows leave if that pays for the copy, and waiting ones take their places; None when all rows are done."""
    if active is not None:
        alive = np.flatnonzero(~run.done[active.rows] & (active.positions < run.sampling.max_tokens))
        dead = len(active.rows) - alive.size
        if alive.size and (not run.route.mixed or dead < _DEAD_SHARE * len(active.rows)):
            return active
        active = _kept(active, alive) if alive.size else None
    entering = _entering(run, active, waiting, size)
    return _admitted(run, active, entering) if entering else active


def _entering(run: _Run, active: _Active | None, waiting: deque[int], size: int) -> list[int]:
    """Takes the next rows from the queue, as many as there is room for; only equally long ones if the route needs that."""
    room = size - (0 if active is None else len(active.rows))
    entering: list[int] = []
    while waiting and len(entering) < room:
        if entering and not run.route.mixed and len(run.prompts[waiting[0]]) != len(run.prompts[entering[0]]):
            break
        entering.append(waiting.popleft())
    return entering


def _admitted(run: _Run, active: _Active | None, rows: list[int]) -> _Active:
    """`active` with these rows."""
    prompts = [run.prompts[row] for row in rows]
    bits = run.sampling.kv_bits
    cache = active.cache.join(run.model, prompts) if active else enter(run.model, run.route, prompts, bits)
    last = mx.array([prompt[-1] for prompt in prompts], mx.int32)
    nothing = np.zeros(len(rows), np.int32)
    noise = uniforms(run.keys[mx.array(rows)], run.sampling.max_tokens)
    fresh = _Active(np.array(rows), nothing, cache, last, mx.array(nothing), noise, _seen(prompts, run.vocabulary))
    return fresh if active is None else _joined(active, fresh)


def _seen(prompts: list[tuple[int, ...]], vocabulary: int) -> mx.array | None:
    if not vocabulary:
        return None
    seen = np.zeros((len(prompts), vocabulary), bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = True
    return mx.array(seen)


def _kept(active: _Active, rows: np.ndarray) -> _Active:
    at = mx.array(rows)
    seen = None if active.seen is None else active.seen[at]
    arrays = active.last[at], active.place[at], active.noise[at]
    return _Active(active.rows[rows], active.positions[rows], active.cache.keep(rows.tolist()), *arrays, seen)


def _joined(active: _Active, fresh: _Active) -> _Active:
    seen = None if active.seen is None or fresh.seen is None else mx.concatenate([active.seen, fresh.seen])
    return _Active(
        np.concatenate([active.rows, fresh.rows]),
        np.concatenate([active.positions, fresh.positions]),
        fresh.cache,
        mx.concatenate([active.last, fresh.last]),
        mx.concatenate([active.place, fresh.place]),
        mx.concatenate([active.noise, fresh.noise]),
        seen,
    )
