"""From a model and a batch to log-probabilities [N]; nothing of size [N, V] is ever kept."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import field, frozen
from mlx.utils import tree_flatten, tree_unflatten

from ..batch import Batch
from ..distributed.sharding import Unit, called_by, whole_parameters
from ..utils.device import backend, memory_limit
from ..utils.integers import ceil_div, round_up
from .backbone import ModelSplit, find_split
from .distribution import gradients_first, statistics
from .modes import evaluating, vocabulary
from .row_layouts import forward_rows

Head = Callable[..., mx.array]
_PROBE = [[1, 2]]  # tokens

# Bytes of logits-sized temporaries that one chunk of the head may hold, and bytes that a chunk holds for each of its n·V logits:
# about ten float32 arrays on a CPU; on a GPU, whose loss is one fused kernel, the logits and their gradient in the model's
# dtype. Larger chunks launch fewer kernels: benchmarks/logprobs.py compares sizes. Metal has CUDA's values, not measured.
CHUNK_BYTES = {"cpu": 96 << 20, "gpu": 1 << 30}
LOGIT_BYTES = {"cpu": 40, "gpu": 6}


@frozen(eq=False)
class Scorer:
    """Scores batches with one model: `scorer(batch) -> (logps [N], batch)`, the batch with the columns that the objective needs.

    Attributes:
        model: maps [R, T] token ids to [R, T, V] logits.
        split: the model's backbone and head; None computes the logits of every position.
        trainable: names of the trainable parameters that the head reads.
        temperature: logits are divided by it (what sampling used).
        columns: columns of the batch to compute, of `distribution.COLUMNS`; True: with a gradient, False: as a constant.
        chunk: trained tokens that pass through the head at once.
        gathers: parameters of the head that are slices: gathered once for all chunks, whose number differs between ranks.
        vocabulary: V.
    """

    model: nn.Module
    split: ModelSplit | None
    trainable: tuple[str, ...] = ()
    temperature: float = 1.0
    columns: Mapping[str, bool] = field(factory=dict)
    chunk: int = 0
    gathers: Unit | None = None
    vocabulary: int = 0

    def __call__(self, batch: Batch, *, gradient: bool = True) -> tuple[mx.array, Batch]:
        inner = partial(_scores, self.logits, self.columns)
        return self._filled(batch, self._head(inner, gradient)(self.hidden(batch), batch.targets), ())

    def _filled(self, batch: Batch, scores: mx.array, more: tuple[str, ...]) -> tuple[mx.array, Batch]:
        """Log-probabilities, and the batch with the other scores: `more`, then the columns."""
        logps, *values = mx.where(batch.sequence < batch.sequences, scores, 0.0)
        return logps, batch._replace(**dict(zip((*more, *gradients_first(self.columns)), values, strict=True)))

    @property
    def others(self) -> dict[str, int]:
        """How many tokens other models have that read the batches, by what messages call them."""
        return {}

    @property
    def kinds(self) -> int:
        """How many scores have a gradient."""
        return 1 + sum(self.columns.values())

    def hidden(self, batch: Batch) -> mx.array:
        """[N, D] at the positions that predict the targets; logits [N, V] if the model has no split."""
        hidden = forward_rows(self.forward, self.model, batch)
        return hidden.reshape(-1, hidden.shape[-1])[batch.positions]

    def logits(self, hidden: mx.array) -> mx.array:
        """[n, D] to [n, V], divided by the temperature."""
        logits = self.split.head(hidden) if self.split else hidden
        return logits if self.temperature == 1.0 else logits.astype(mx.float32) / self.temperature

    @property
    def forward(self) -> Callable[..., mx.array]:
        """[R, T] tokens to hidden states [R, T, D], or to logits if the model has no split."""
        return self.split.hidden if self.split else self.model

    def _head(self, inner: Head, gradient: bool) -> Head:
        if self.gathers is None:
            return self._divided(inner, gradient)

        def whole(hidden: mx.array, targets: mx.array) -> mx.array:
            with whole_parameters(self.gathers, hidden) as hidden:  # type: ignore[arg-type]
                return self._divided(inner, gradient)(hidden, targets)

        return whole

    def _divided(self, inner: Head, gradient: bool) -> Head:
        if self.split is None:
            return inner
        if not gradient:
            return partial(_chunked, inner, self.chunk)
        if self.trainable:
            return _recomputed(inner, self.model, self.trainable, self.chunk)
        return _rows(inner, self.chunk, self.kinds)


def scorer(
    model: nn.Module, *, temperature: float = 1.0, columns: Mapping[str, bool] | None = None, chunk: int | None = None
) -> Scorer:
    """Splits `model`, checks the split on a tiny input (without dropout) and sizes the head's chunks by a byte budget.

    Args:
        model: maps [R, T] token ids to [R, T, V] logits.
        temperature: logits are divided by it.
        columns: of the batch, see `Scorer`.
        chunk: trained tokens that pass through the head at once; None: by the budget.
    """
    columns = dict(columns or {})
    with evaluating(model):
        split = find_split(model)
        gathers = called_by(model, lambda: split.head(split.hidden(mx.array(_PROBE))[0])) if split else None
        trainable = _head_parameters(split, gathers) if split else ()
        size = vocabulary(model)
    if split is None:
        return Scorer(model, None, temperature=temperature, columns=columns, vocabulary=size)
    return Scorer(model, split, trainable, temperature, columns, chunk or affordable_chunk(size), gathers, size)


def affordable_chunk(vocabulary: int) -> int:
    """Trained tokens that pass through the head at once, within the byte budget and a 16th of the memory limit."""
    device = "cpu" if backend() == "cpu" else "gpu"
    budget = min(CHUNK_BYTES[device], memory_limit() // 16)
    return max(32, budget // (LOGIT_BYTES[device] * vocabulary) // 32 * 32)


def token_logps(model: nn.Module, batch: Batch) -> mx.array:
    """log π(y_t | x, y_<t) of every trained token, in nats; 0 where `batch.sequence` marks filler.

    Returns:
        [N] float32.
    """
    return scorer(model)(batch)[0]


def _scores(head: Head, columns: Mapping[str, bool], hidden: mx.array, targets: mx.array) -> mx.array:
    """[n, D], [n] to [1 + columns, n]."""
    return statistics(head(hidden), targets, columns)


# --- the head in chunks, one after the other ------------------------------------------------


def _chunks(hidden: mx.array, targets: mx.array, chunk: int, work: Callable[..., list[mx.array]]) -> list[list[mx.array]]:
    """`work` on each chunk, one after the other: without `mx.depends` the scheduler holds ten at once."""
    done: list[list[mx.array]] = []
    chunk = _evenly(hidden.shape[0], chunk)
    for start in range(0, hidden.shape[0], chunk):
        micro = hidden[start : start + chunk]
        if done:
            micro = mx.depends(micro, done[-1])
        done.append(work(micro, targets[start : start + chunk], start))
    return done


def _evenly(tokens: int, chunk: int) -> int:
    """A chunk size of at most `chunk` that leaves no small remainder.

    >>> _evenly(4096, 2304), _evenly(100, 64), _evenly(40, 64)
    (2048, 64, 64)
    """
    parts = ceil_div(tokens, chunk)
    return min(chunk, round_up(ceil_div(tokens, parts), 32)) if parts > 1 else chunk


def _chunked(inner: Head, chunk: int, hidden: mx.array, targets: mx.array) -> mx.array:
    """Without a gradient: only the scores are kept."""
    done = _chunks(hidden, targets, chunk, lambda h, y, _: [inner(h, y)])
    return mx.concatenate([scores for (scores,) in done], axis=1)


def _rows(inner: Head, chunk: int, kinds: int) -> Head:
    """Keeps J = ∂score/∂h, [kinds, N, D], built in the forward pass; the backward pass is g·J, without recomputing.

    `kinds` is the number of scores with a gradient; they come first.
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
    """A cotangent that is 1 for one kind of score; its shape comes from scores that stay lazy."""
    kinds, tokens = inner(hidden, targets).shape
    return mx.broadcast_to((mx.arange(kinds) == kind).astype(mx.float32)[:, None], (kinds, tokens))


def _recomputed(inner: Head, model: nn.Module, names: tuple[str, ...], chunk: int) -> Head:
    """A head with trainable parameters, which are inputs; the backward pass computes each chunk again."""

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


def _head_parameters(split: ModelSplit, gathers: Unit | None) -> tuple[str, ...]:
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


def _moved_by(split: ModelSplit, gathers: Unit | None, names: list[str]) -> list[str]:
    hidden = mx.random.normal(split.hidden(mx.array(_PROBE))[0].shape, key=mx.random.key(0))

    def total(values: dict[str, mx.array]) -> mx.array:
        split.model.update(tree_unflatten(list(values.items())))
        return split.head(hidden).astype(mx.float32).sum()

    with whole_parameters(gathers, hidden) if gathers else nullcontext():
        candidates = dict(zip(names, _parameters(split.model, tuple(names)), strict=True))
        gradients = mx.grad(total)(candidates)
        split.model.update(tree_unflatten(list(candidates.items())))
    return [name for name, g in gradients.items() if mx.any(g != 0).item()]
