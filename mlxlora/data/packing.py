"""Several examples in one row: little padding, and one shape for all batches.

The objective does not see packing: each example stays a sequence, and attention masks the other examples of its row. Rotary
positions are relative, so they need no reset. Examples are assigned to rows once; the rows are then shuffled and resumed like
other items.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np
from attrs import evolve, frozen

from ..utils.lazy import LazySequence
from .batching import Make, MicroBatch, bucket, example_batch, laid_out, token_count
from .sources import Context, Encoder, Source, Split
from .tokenize import Example

ROW = 256  # minimal positions of a row, so that several short examples fit
WINDOW = 1024  # examples that are assigned to rows together

Pack = tuple[Example, ...]


def best_fit(sizes: Sequence[int], room: int, seed: int | None = None) -> list[list[int]]:
    """Best-fit decreasing: the items, the longest first, each go to the row of `room` positions where they leave least room.

    `seed` shuffles the items (None keeps their order). Each window of `WINDOW` items is packed separately, so that rows with
    long and with short items stay mixed.

    Returns:
        The item numbers of each row.

    >>> best_fit([5, 3, 6, 2], 8)
    [[2, 3], [0, 1]]
    """
    order = list(range(len(sizes))) if seed is None else np.random.default_rng(seed).permutation(len(sizes)).tolist()
    windows = [order[start : start + WINDOW] for start in range(0, len(order), WINDOW)]
    return [row for window in windows for row in _filled(sorted(window, key=lambda i: -sizes[i]), sizes, room)]


def _filled(order: Sequence[int], sizes: Sequence[int], room: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), in order
    for item in order:
        place = bisect_left(free, (sizes[item], 0))
        left, row = free.pop(place) if place < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        insort(free, (left - sizes[item], row))
    return rows


@frozen(eq=False)
class Packs(LazySequence[Pack]):
    """Rows of several examples, which are read when a row is used.

    Attributes:
        examples: all of them.
        rows: the numbers of the examples of each row.
        sizes: [examples] tokens of each.
    """

    examples: Sequence[Example]
    rows: Sequence[Sequence[int]]
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, index: int) -> Pack:
        """See `LazySequence`."""
        return tuple(self.examples[i] for i in self.rows[index])

    @property
    def lengths(self) -> np.ndarray:
        """[rows] tokens of the longest example of each."""
        return np.array([max(self.sizes[i] for i in row) for row in self.rows], np.int64)


def row_length(longest: int, longest_allowed: int) -> int:
    """Positions of a row: those of the longest example, and at least `ROW` if examples may be that long."""
    return max(bucket(longest - 1), min(ROW, bucket(longest_allowed - 1)))


def packed_batch(packs: Sequence[Pack], length: int) -> MicroBatch:
    """Rows of `length` positions; sequence s is example s of all packs."""
    examples = [example for pack in packs for example in pack]
    tokens, segments = np.zeros((2, len(packs), length), np.int32)
    begin: dict[int, int] = {}
    groups: list[tuple[int, ...]] = []
    for row, pack in enumerate(packs):
        place = 0
        groups.append(tuple(range(len(begin), len(begin) + len(pack))))
        for number, example in enumerate(pack, 1):
            end = place + len(example.tokens) - 1  # the last is a target only
            tokens[row, place:end], segments[row, place:end] = example.tokens[:-1], number
            begin[len(begin)] = row * length + place
            place = end
    batch = laid_out(examples, tokens, begin, segments=mx.array(segments))
    return MicroBatch(batch, token_count(examples), tuple(e.location for e in examples), groups=tuple(groups))


def packed(source: Source, splits: Mapping[str, Split], seed: int) -> tuple[Source, dict[str, Split]]:
    """The source and the splits with packed training examples; examples of the other splits keep rows of their own."""
    examples: Sequence[Example] = splits["train"].items
    length = row_length(int(source.lengths(examples).max()), source.data.max_seq_length)
    sizes = {name: source.lengths(split.items) for name, split in splits.items()}
    rows = best_fit((sizes["train"] - 1).tolist(), length, seed if source.data.shuffle else None)
    items = {name: Packs(split.items, [[i] for i in range(len(split.items))], sizes[name]) for name, split in splits.items()}
    items["train"] = Packs(examples, rows, sizes["train"])

    made = PackedSource(
        source.data, source, length, temperature=source.temperature, repeats=source.repeats, packing=True, live=source.live
    )
    return made, {name: evolve(split, items=items[name]) for name, split in splits.items()}


@frozen
class PackedSource(Source):
    """Rows of several examples; an item is a `Pack`.

    Attributes:
        plain: the source of the examples.
        row: positions of a training row.
    """

    plain: Source
    row: int

    @property
    def encoder(self) -> Encoder:
        """That of `plain`."""
        return self.plain.encoder

    def make(self, context: Context) -> Make:
        """Packed rows in training, an example a row in validation."""
        if context.validation:
            return lambda packs, _: example_batch([example for pack in packs for example in pack])
        return lambda packs, _: packed_batch(packs, self.row)

    def examples(self, item: Pack) -> tuple[Example, ...]:
        """Those of the row."""
        return item

    def rebuild(self, item: Pack, examples: Sequence[Example]) -> Pack:
        """See `Source`."""
        return tuple(examples)
