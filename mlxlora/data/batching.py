"""Examples to batches: which rows share a batch, in which order and in which shape."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from attrs import frozen

from ..batch import Batch
from ..distributed.ranks import Ranks
from ..utils.integers import ceil_div, round_up
from .pooled import Pooled
from .tokenize import Example, Pair

ALIGN = 32


class MicroBatch(NamedTuple):
    """A batch, and what is known about it outside the compiled step.

    Attributes:
        batch: the arrays.
        tokens: tokens of the sequences, without padding.
        rows: where the rows come from, as `file:line`.
        metrics: what the source measured while it made the batch, such as rewards; over the rows of all ranks.
        samples: text for people to read, such as completions with their rewards.
        groups: sequences that stay together when the micro-batch is divided: a row, a pair, the completions of a prompt.
        is_padding: it stands in for a rank that has no row of a batch, and must not count.
        shapes: the number of batch shapes of the run so far; see `shape_buckets`.
    """

    batch: Batch
    tokens: int
    rows: tuple[str, ...]
    metrics: Mapping[str, Pooled] = {}
    samples: tuple[Mapping[str, Any], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    is_padding: bool = False
    shapes: int = 0


# --- shapes ---------------------------------------------------------------------------------


def bucket(size: int) -> int:
    """The smallest of 4, 5, 6, 7 times a power of two that is >= `size` and >= 32, so that few shapes are compiled.

    These are multiples of 32, from 256 on of 64, from 1024 on of 256, which suit GPU kernels (on CUDA a length that is no
    multiple of 8 takes 2.5 times as long). Padding is at most 25 %, 11 % on average.

    >>> [bucket(n) for n in (1, 33, 300, 1000, 1025, 2048)]
    [32, 64, 320, 1024, 1280, 2048]
    """
    step = max(ALIGN, 1 << max((size - 1).bit_length() - 3, 0))
    return round_up(max(size, 1), step)


def collate(examples: Sequence[Example], *, groups: Sequence[Sequence[int]] = (), **columns: Any) -> Batch:
    """Right-pads S examples into one batch; sequence s is example s.

    Args:
        examples: S examples.
        groups: numbers of the examples that share a prompt, which is then computed once; groups have one size. Empty: whole
            rows.
        columns: further columns of the batch, as arrays.

    Returns:
        A batch whose T, N and K are sizes of `bucket`; padding changes no result.
    """
    prefixes = [examples[group[0]].tokens[: shared_tokens([examples[s] for s in group])] for group in groups]
    if not any(map(len, prefixes)):
        groups, prefixes = (), []
    order = [s for group in groups for s in group] or range(len(examples))
    starts = [len(p) for p, group in zip(prefixes, groups, strict=True) for _ in group] or [0] * len(examples)
    tokens = _padded([examples[s].tokens[start:-1] for s, start in zip(order, starts, strict=True)])  # the last is a target only
    begin = {s: row * tokens.shape[1] - start for row, (s, start) in enumerate(zip(order, starts, strict=True))}
    if groups:
        columns |= {"prefix": mx.array(_padded(prefixes)), "prefix_lengths": mx.array([len(p) for p in prefixes], mx.int32)}
    return laid_out(examples, tokens, begin, **columns)


def laid_out(examples: Sequence[Example], tokens: np.ndarray, begin: Mapping[int, int], **columns: Any) -> Batch:
    """The batch of token rows [R, T]; example s begins at flat position `begin[s]` of R·T, or would if its prompt were there."""
    parts = []
    for s, e in enumerate(examples):
        at = np.flatnonzero(e.loss_mask)
        parts.append((begin[s] + at - 1, e.tokens[at], np.full(len(at), s)))
    positions, targets, sequence = (np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True))
    size = target_size(len(positions), tokens.size)
    filler = size - len(positions)
    return Batch(
        tokens=mx.array(tokens),
        positions=mx.array(np.pad(positions, (0, filler))),
        targets=mx.array(np.pad(targets, (0, filler))),
        sequence=mx.array(np.pad(sequence, (0, filler), constant_values=len(examples))),
        lengths=mx.array(np.array([completion_tokens(e) for e in examples], np.int32)),
        prompt=_prompt(examples, filler),
        ref_logps=_ref_logps(examples, filler),
        **columns,
    )


def target_size(count: int, positions: int) -> int:
    """N of a batch with `count` trained tokens: a size of `bucket`, but not more than its positions."""
    return min(bucket(count), round_up(positions, ALIGN))


def shared_tokens(examples: Sequence[Example]) -> int:
    """Length of the common prefix of the examples, up to the token that predicts the first trained token of any of them."""
    limit = min(int(e.loss_mask.argmax() if e.loss_mask.any() else len(e.tokens)) - 1 for e in examples)
    heads = np.stack([e.tokens[:limit] for e in examples])
    differ = (heads != heads[0]).any(axis=0)
    return int(differ.argmax()) if differ.any() else limit


def read_positions(groups: Iterable[Sequence[Example]]) -> tuple[int, int]:
    """Positions that the model computes, with padding: (every row whole, the prompt of each group computed once)."""
    plain = shared = 0
    for group in groups:
        start = shared_tokens(group)
        plain += sum(bucket(len(e.tokens) - 1) for e in group)
        shared += (bucket(start) if start else 0) + sum(bucket(len(e.tokens) - 1 - start) for e in group)
    return plain, shared


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of one length of `bucket`, padded with 0."""
    padded = np.zeros((len(rows), bucket(max(map(len, rows)))), np.int32)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded


def completion_tokens(example: Example) -> int:
    """Trained tokens that do not belong to the prompt."""
    loss_mask = example.loss_mask if example.prompt is None else example.loss_mask & ~example.prompt
    return int(loss_mask.sum())


def _prompt(examples: Sequence[Example], filler: int) -> mx.array | None:
    if all(e.prompt is None for e in examples):
        return None
    marks = [np.zeros(int(e.loss_mask.sum()), bool) if e.prompt is None else e.prompt[e.loss_mask] for e in examples]
    return mx.array(np.pad(np.concatenate(marks), (0, filler)))


def _ref_logps(examples: Sequence[Example], filler: int) -> mx.array | None:
    if any(e.ref_logps is None for e in examples):
        return None
    return mx.array(np.pad(np.concatenate([e.ref_logps for e in examples]), (0, filler)))  # type: ignore[arg-type]


# --- order ----------------------------------------------------------------------------------


@frozen
class Order:
    """Which rows make batch k: a function of the seed and of k alone, so that a run resumes by counting batches.

    Each epoch has every row once. Shuffled rows are sorted by padded length within windows of 16 batches, so that a batch has
    little padding; then the batches are shuffled. Rows of equal padded length stay in random order: sorting them by exact length
    would save nothing and group similar rows.

    Attributes:
        lengths: tokens of each row.
        batch_size: rows in a batch; the last batch of an epoch may be smaller.
        seed: shuffles; None keeps the order of the file.
    """

    lengths: Sequence[int] | np.ndarray
    batch_size: int
    seed: int | None = None

    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return ceil_div(len(self.lengths), self.batch_size)

    def batches(self, start: int = 0) -> Iterator[list[int]]:
        """Row numbers of batch `start` and of those after it, without end."""
        epoch, skip = divmod(start, self.per_epoch())
        while True:
            rows, order = self._epoch(epoch)
            for batch in order[skip:].tolist():
                yield rows[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows, those of a batch together, and the order of the batches."""
        rows = np.arange(len(self.lengths))
        if self.seed is None:
            return rows, np.arange(self.per_epoch())
        rng = np.random.default_rng((self.seed, epoch))
        rows = rng.permutation(rows)
        padded, window = _buckets(self.lengths)[rows], np.arange(len(rows)) // (16 * self.batch_size)
        rows = rows[np.lexsort((padded, window))]  # stable: rows of one padded length stay in random order
        return rows, rng.permutation(self.per_epoch())


def _buckets(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """`bucket` of each size."""
    sizes = np.maximum(np.asarray(sizes, np.int64), 1)
    step = np.maximum(ALIGN, 1 << np.maximum(np.frexp(sizes - 1)[1].astype(np.int64) - 3, 0))
    return -(-sizes // step) * step


def grouped(micros: Iterator[MicroBatch], size: int) -> Iterator[tuple[MicroBatch, ...]]:
    """`size` micro-batches at a time: those of one optimizer step."""
    while group := tuple(islice(micros, size)):
        yield group


Make = Callable[[Sequence[Any], int], MicroBatch]
"""(items, number of the batch) -> its micro-batch; the number seeds its randomness."""


def stream(items: Sequence[Any], order: Order, make: Make, start: int = 0) -> Iterator[MicroBatch]:
    """The micro-batches of batch `start` and of those after it, without end."""
    for index, rows in enumerate(order.batches(start), start):
        yield make([items[i] for i in rows], index)


def spread(make: Make, ranks: Ranks) -> Make:
    """Makes this rank's share of every batch; with fewer rows than ranks, a row without weight stands in."""
    if ranks.size == 1:
        return make

    def own(items: Sequence[Any], index: int) -> MicroBatch:
        share = ranks.share(items)
        return make(share, index) if share else as_padding(make(items[:1], index))

    return own


def as_padding(micro: MicroBatch) -> MicroBatch:
    """The micro-batch as padding, which does not count."""
    return micro._replace(tokens=0, rows=(), samples=(), is_padding=True)


def example_batch(examples: Sequence[Example]) -> MicroBatch:
    """Supervised rows: one sequence each."""
    return MicroBatch(collate(examples), token_count(examples), tuple(e.location for e in examples), groups=singles(len(examples)))


def singles(sequences: int) -> tuple[tuple[int, ...], ...]:
    """Groups of one sequence each."""
    return tuple((s,) for s in range(sequences))


def pair_batch(pairs: Sequence[Pair], *, share: bool = False) -> MicroBatch:
    """P preference pairs as S = 2P sequences, all chosen, then all rejected; `share` computes the prompt of a pair once."""
    examples = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    scores = [p.preference_score for p in pairs]
    weights = None if all(s is None for s in scores) else mx.array([1.0 if s is None else s for s in scores])
    groups = tuple((p, len(pairs) + p) for p in range(len(pairs)))
    batch = collate(examples, groups=groups if share else (), preference_score=weights)
    return MicroBatch(batch, token_count(examples), tuple(p.chosen.location for p in pairs), groups=groups)


def token_count(examples: Sequence[Example]) -> int:
    """Tokens of the examples, without padding."""
    return sum(len(e.tokens) for e in examples)
