"""From a model and a batch to log-probabilities [N]; nothing of size [N, V] is ever kept."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen
from mlx.utils import tree_flatten, tree_unflatten

from ..batch import Batch
from ..distributed.sharding import Unit, called_by, gathered
from ..utils.device import backend, memory_limit
from .backbone import Split, find_split
from .modes import evaluating, vocabulary
from .row_layouts import read

Head = Callable[..., mx.array]
_PROBE = [[1, 2]]  # tokens

# Bytes of logits-sized temporaries that one chunk of the head may hold, and what a chunk holds for each of its n·V logits:
# about ten float32 arrays on a CPU; on a GPU, whose loss is one fused kernel, the logits and their gradient in the model's
# dtype. Measured on 2 CPU cores and on an H200 (4 x 1024 tokens, V = 151936: 102 ms with chunks of 352, 81 with 2048).
# Not on a Mac.
CHUNK_BYTES = {"cpu": 96 << 20, "gpu": 2 << 30}
LOGIT_BYTES = {"cpu": 40, "gpu": 6}


@frozen(eq=False)
class Scorer:
    """Scores batches with one model: `scorer(batch) -> (logps [N], batch)`, the batch with what the objective needs.

    Attributes:
        model: maps [R, T] token ids to [R, T, V] logits.
        split: the model's backbone and head; None computes the logits of every position.
        trainable: names of the trainable parameters that the head reads.
        temperature: logits are divided by it (what sampling used).
        entropy: also compute `batch.entropy`: None = no, False = as a constant, True = with its gradient.
        chunk: scored tokens that pass through the head at once.
        gathers: parameters of the head that are slices: gathered once for all chunks, of which ranks have different numbers.
    """

    model: nn.Module
    split: Split | None
    trainable: tuple[str, ...] = ()
    temperature: float = 1.0
    entropy: bool | None = None
    chunk: int = 0
    gathers: Unit | None = None

    def __call__(self, batch: Batch, *, gradient: bool = True) -> tuple[mx.array, Batch]:
        inner = partial(_scores, self.logits, self.entropy)
        scores = self._head(inner, gradient)(self.hidden(batch), batch.targets)
        scores = mx.where(batch.sequence < batch.sequences, scores, 0.0)
        return scores[0], batch if self.entropy is None else batch._replace(entropy=scores[1])

    def hidden(self, batch: Batch) -> mx.array:
        """[N, D] at the positions that predict the targets; logits [N, V] if the model has no split."""
        hidden = read(self.forward, self.model, batch)
        return hidden.reshape(-1, hidden.shape[-1])[batch.positions]

    def logits(self, hidden: mx.array) -> mx.array:
        """[n, D] to [n, V], divided by the temperature."""
        logits = self.split.head(hidden) if self.split else hidden
        return logits if self.temperature == 1.0 else logits.astype(mx.float32) / self.temperature

    @property
    def forward(self) -> Callable[..., mx.array]:
        """[R, T] tokens to what is gathered at the scored positions: hidden states, or logits if the model has no split."""
        return self.split.hidden if self.split else self.model

    def _head(self, inner: Head, gradient: bool) -> Head:
        if self.gathers is None:
            return self._divided(inner, gradient)

        def whole(hidden: mx.array, targets: mx.array) -> mx.array:
            with gathered(self.gathers, hidden) as hidden:  # type: ignore[arg-type]
                return self._divided(inner, gradient)(hidden, targets)

        return whole

    def _divided(self, inner: Head, gradient: bool) -> Head:
        if self.split is None:
            return inner
        if not gradient:
            return partial(_chunked, inner, self.chunk)
        if self.trainable:
            return _recomputed(inner, self.model, self.trainable, self.chunk)
        return _rows(inner, self.chunk, kinds=2 if self.entropy else 1)


def scorer(model: nn.Module, *, temperature: float = 1.0, entropy: bool | None = None, chunk: int | None = None) -> Scorer:
    """Splits `model`, checks the split on a tiny input (without dropout) and sizes the head's chunks by a byte budget."""
    with evaluating(model):
        split = find_split(model)
        gathers = called_by(model, lambda: split.head(split.hidden(mx.array(_PROBE))[0])) if split else None
        trainable = _head_parameters(split, gathers) if split else ()
        size = vocabulary(model)
    if split is None:
        return Scorer(model, None, temperature=temperature, entropy=entropy)
    return Scorer(model, split, trainable, temperature, entropy, chunk or affordable_chunk(size), gathers)


def affordable_chunk(vocabulary: int) -> int:
    """Scored tokens that pass through the head at once: what the bytes allow, and a 16th of the memory limit."""
    device = "cpu" if backend() == "cpu" else "gpu"
    budget = min(CHUNK_BYTES[device], memory_limit() // 16)
    return max(32, budget // (LOGIT_BYTES[device] * vocabulary) // 32 * 32)


def token_logps(model: nn.Module, batch: Batch) -> mx.array:
    """log π(y_t | x, y_<t) of every scored token, in nats; 0 where `batch.sequence` marks filler.

    Returns:
        [N] float32.
    """
    return scorer(model)(batch)[0]


# --- log-probabilities from logits ---------------------------------------------------------


def _scores(head: Head, entropy: bool | None, hidden: mx.array, targets: mx.array) -> mx.array:
    """[n, D], [n] to [1, n] log-probabilities, or [2, n] with entropies."""
    logits = head(hidden)
    if entropy:
        return mx.stack(_logps_and_entropies(logits, targets)[:2])  # type: ignore[index]
    logps, lse, probs = _logps(logits, targets)  # type: ignore[misc]
    return logps[None] if entropy is None else mx.stack([logps, mx.stop_gradient(_entropies(logits, lse, probs))])


@mx.custom_function
def _logps(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """[n, V], [n] to log-probabilities [n], logsumexps [n] and probabilities [n, V], float32; only the first have a gradient."""
    at_target = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0].astype(mx.float32)
    wide = logits.astype(mx.float32)
    if backend() == "cpu":  # an exponential costs as much as 40 products there: one for all that follows
        probs = mx.softmax(wide, axis=-1)
        lse = wide.max(axis=-1) - mx.log(probs.max(axis=-1))
        return at_target - lse, lse, probs
    logps = -mx.fast.cross_entropy(logits, targets)
    lse = at_target - logps
    return logps, lse, mx.exp(wide - lse[:, None])


@_logps.vjp
def _logps_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    logits, targets = primals
    if backend() == "cpu":
        return _dlogps(logits, targets, outputs[2], cotangents[0]), mx.zeros_like(targets)
    return _dlogps_again(logits, targets, outputs[1], cotangents[0]), mx.zeros_like(targets)


@mx.compile
def _dlogps(logits: mx.array, targets: mx.array, probs: mx.array, g: mx.array) -> mx.array:
    """d log p/d z = onehot - softmax."""
    onehot = (mx.arange(logits.shape[-1], dtype=targets.dtype)[None] == targets[:, None]).astype(mx.float32)
    return (g[:, None] * (onehot - probs)).astype(logits.dtype)


@mx.compile
def _dlogps_again(logits: mx.array, targets: mx.array, lse: mx.array, g: mx.array) -> mx.array:
    """The same in one kernel that computes the probabilities where it needs them."""
    return _dlogps(logits, targets, mx.exp(logits.astype(mx.float32) - lse[:, None]), g)


@mx.custom_function
def _logps_and_entropies(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """As `_logps`, with entropies [n] in nats in the second place, which have a gradient too."""
    logps, lse, probs = _logps(logits, targets)  # type: ignore[misc]
    return logps, _entropies(logits, lse, probs), lse, probs


@_logps_and_entropies.vjp
def _both_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    """d H/d z = -p (log p + H)."""
    (logits, targets), (_, entropies, lse, probs) = primals, outputs
    surprise = logits.astype(mx.float32) - lse[:, None] + entropies[:, None]
    more = cotangents[1][:, None] * mx.where(probs > 0, probs * surprise, 0.0)
    return _dlogps(logits, targets, probs, cotangents[0]) - more.astype(logits.dtype), mx.zeros_like(targets)


@mx.compile
def _entropies(logits: mx.array, lse: mx.array, probs: mx.array) -> mx.array:
    """[n, V] to [n]: lse - Σ p z, in nats."""
    return lse - mx.where(probs > 0, probs * logits.astype(mx.float32), 0.0).sum(axis=-1)


# --- the head in chunks, one after the other ------------------------------------------------


def _chunks(hidden: mx.array, targets: mx.array, chunk: int, work: Callable[..., list[mx.array]]) -> list[list[mx.array]]:
    """`work` on each chunk. `mx.depends` chains them: the scheduler would hold ten at once."""
    done: list[list[mx.array]] = []
    chunk = _evenly(hidden.shape[0], chunk)
    for start in range(0, hidden.shape[0], chunk):
        micro = hidden[start : start + chunk]
        if done:
            micro = mx.depends(micro, done[-1])
        done.append(work(micro, targets[start : start + chunk], start))
    return done


def _evenly(tokens: int, chunk: int) -> int:
    """A chunk's size, at most `chunk`, that leaves no small rest.

    >>> _evenly(4096, 2304), _evenly(100, 64), _evenly(40, 64)
    (2048, 64, 64)
    """
    parts = -(-tokens // chunk)
    return min(chunk, -(-tokens // max(parts, 1) // 32) * 32) if parts > 1 else chunk


def _chunked(inner: Head, chunk: int, hidden: mx.array, targets: mx.array) -> mx.array:
    """Without a gradient: nothing is kept but the scores."""
    done = _chunks(hidden, targets, chunk, lambda h, y, _: [inner(h, y)])
    return mx.concatenate([scores for (scores,) in done], axis=1)


def _rows(inner: Head, chunk: int, kinds: int) -> Head:
    """Keeps J = ∂score/∂h, [kinds, N, D], built in the forward pass; the backward pass is g·J, without recomputing.

    `kinds` is the number of scores that have a gradient: log-probabilities, and entropies.
    """

    def with_rows(hidden: mx.array, targets: mx.array, _: int) -> list[mx.array]:
        def rows(kind: int) -> tuple[mx.array, mx.array]:
            outputs, gradients = mx.vjp(lambda h: inner(h, targets), [hidden], [_only(kind, inner, hidden, targets)])
            return outputs[0], gradients[0]

        scores, first = rows(0)
        return [scores, mx.stack([first, *(rows(kind)[1] for kind in range(1, kinds))])]

    @mx.custom_function
    def forward(hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        done = _chunks(hidden, targets, chunk, with_rows)
        return mx.concatenate([d[0] for d in done], axis=1), mx.concatenate([d[1] for d in done], axis=1)

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        hidden, targets = primals
        gradient = (cotangents[0][:kinds, :, None] * outputs[1]).sum(axis=0)
        return gradient.astype(hidden.dtype), mx.zeros_like(targets)

    return lambda hidden, targets: forward(hidden, targets)[0]  # type: ignore[index]


def _only(kind: int, inner: Head, hidden: mx.array, targets: mx.array) -> mx.array:
    """A cotangent that is 1 for one kind of score; the shape comes from the lazy scores, which are never computed."""
    kinds, tokens = inner(hidden, targets).shape
    return mx.broadcast_to((mx.arange(kinds) == kind).astype(mx.float32)[:, None], (kinds, tokens))


def _recomputed(inner: Head, model: nn.Module, names: tuple[str, ...], chunk: int) -> Head:
    """A head with trainable parameters: they are inputs, and the backward pass computes each chunk again."""

    def run(hidden: mx.array, targets: mx.array, *values: mx.array) -> mx.array:
        before = _parameters(model, names)
        model.update(tree_unflatten(list(zip(names, values, strict=True))))
        scores = inner(hidden, targets)
        model.update(tree_unflatten(list(zip(names, before, strict=True))))
        return scores

    @mx.custom_function
    def forward(hidden: mx.array, targets: mx.array, *values: mx.array) -> mx.array:
        done = _chunks(hidden, targets, chunk, lambda h, y, _: [run(h, y, *values)])
        return mx.concatenate([scores for (scores,) in done], axis=1)

    @forward.vjp
    def backward(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        hidden, targets, *values = primals
        sums = [mx.zeros_like(value) for value in values]

        def micro(h: mx.array, y: mx.array, start: int) -> list[mx.array]:
            g = cotangent[:, start : start + y.shape[0]]
            _, (dh, *dvalues) = mx.vjp(lambda h, *v: run(h, y, *v), [h, *values], [g])
            sums[:] = [a + b for a, b in zip(sums, dvalues, strict=True)]
            return [dh, *sums]

        done = _chunks(hidden, targets, chunk, micro)
        return mx.concatenate([d[0] for d in done]), mx.zeros_like(targets), *done[-1][1:]

    return lambda hidden, targets: forward(hidden, targets, *_parameters(model, names))  # type: ignore[return-value]


def _parameters(model: nn.Module, names: tuple[str, ...]) -> list[mx.array]:
    flat = dict(tree_flatten(model.trainable_parameters()))
    return [flat[name] for name in names]


def _head_parameters(split: Split, gathers: Unit | None) -> tuple[str, ...]:
    """Trainable parameters that the head reads: those outside the backbone, and tied ones.

    A module is tied if the head has a gradient with respect to one of its parameters; all of them then belong to it
    (the gradient of a fresh adapter's first factor is 0).
    """
    trainable = dict(tree_flatten(split.model.trainable_parameters()))
    if not trainable:
        return ()
    outside = {name for name in trainable if not name.startswith(split.path + ".")}
    candidates = [name for name in trainable if "layers." not in name]
    modules = {name.rpartition(".")[0] for name in (_moved_by(split, gathers, candidates) if candidates else ())}
    return tuple(name for name in trainable if name in outside or name.rpartition(".")[0] in modules)


def _moved_by(split: Split, gathers: Unit | None, names: list[str]) -> list[str]:
    hidden = mx.random.normal(split.hidden(mx.array(_PROBE))[0].shape, key=mx.random.key(0))

    def total(values: dict[str, mx.array]) -> mx.array:
        split.model.update(tree_unflatten(list(values.items())))
        return split.head(hidden).astype(mx.float32).sum()

    with gathered(gathers, hidden) if gathers else nullcontext():
        candidates = dict(zip(names, _parameters(split.model, tuple(names)), strict=True))
        gradients = mx.grad(total)(candidates)
        split.model.update(tree_unflatten(list(candidates.items())))
    return [name for name, g in gradients.items() if mx.any(g != 0).item()]
