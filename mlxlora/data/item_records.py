"""Items as records of bytes: what the token cache holds, workers send, and a checkpoint has a digest of.

A record is int32 numbers and bits, each part filled up to 4 bytes: the number of sequences (two for a pair), then of each
sequence its length, its flags, its tokens, a bit a token that is trained, and a bit a token that is trained of the prompt if there
are such; then the score of a pair as float64.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from attrs import frozen

from ..errors import RunError
from ..utils.integers import ceil_div, round_up
from ..utils.lazy import LazySequence
from ..utils.safetensors import NumpyArrays
from .file_rows import Content
from .tokenize import Example, Pair

_PROMPT, _TRUNCATED = 1, 2
_HASH = 16  # bytes


class Packed(NamedTuple):
    """Items as one string of bytes, with what is looked up without reading them.

    Attributes:
        data: the records.
        table: one entry an item. stops: where its record ends; rows: the number of its row; hashes [items, 16]: of the record;
            lengths: tokens of its longest sequence; tokens: of all; largest: its largest token id; truncated.
    """

    data: bytes
    table: NumpyArrays


def record_of(item: Example | Pair) -> bytes:
    """The record of an item."""
    sides = sides_of(item)
    parts = [np.array([len(sides)], np.int32).tobytes()]
    for side in sides:
        flags = _PROMPT * (side.prompt is not None) | _TRUNCATED * side.truncated
        parts += [np.array([len(side.tokens), flags], np.int32).tobytes(), side.tokens.tobytes(), _bits(side.loss_mask)]
        if side.prompt is not None:
            parts.append(_bits(side.prompt))
    if isinstance(item, Pair):
        parts.append(np.array([np.nan if item.preference_score is None else item.preference_score], np.float64).tobytes())
    return b"".join(parts)


def hash_of(record: bytes) -> bytes:
    """What tells records apart."""
    return hashlib.blake2b(record, digest_size=_HASH).digest()


def item_of(record: bytes, location: str) -> Example | Pair:
    """The inverse of `record_of`."""
    numbers = np.frombuffer(record, np.int32, len(record) // 4)
    examples, at = [], 1
    for _ in range(numbers[0]):
        length, flags = numbers[at : at + 2].tolist()
        tokens, at = numbers[at + 2 : at + 2 + length], at + 2 + length
        loss_mask, at = _unpacked(numbers, at, length)
        prompt = None
        if flags & _PROMPT:
            prompt, at = _unpacked(numbers, at, length)
        examples.append(Example(tokens, loss_mask, prompt, location, bool(flags & _TRUNCATED)))
    if len(examples) == 1:
        return examples[0]
    score = float(numbers[at : at + 2].view(np.float64)[0])
    return Pair(examples[0], examples[1], None if np.isnan(score) else score)


def packed_items(items: Iterable[tuple[int, Example | Pair]]) -> Packed:
    """Items, each with the number of its row, as bytes."""
    records, rows, facts = [], [], []
    for row, item in items:
        sides = sides_of(item)
        lengths = [len(side.tokens) for side in sides]
        records.append(record_of(item))
        rows.append(row)
        facts.append((max(lengths), sum(lengths), max(int(side.tokens.max()) for side in sides), item.truncated))
    lengths, tokens, largest, truncated = np.array(facts, np.int32).reshape(-1, 4).T
    table = {
        "stops": np.cumsum(np.array([len(record) for record in records], np.int64)),
        "rows": np.array(rows, np.int64),
        "hashes": np.frombuffer(b"".join(map(hash_of, records)), np.uint8).reshape(-1, _HASH),
        "lengths": lengths,
        "tokens": tokens,
        "largest": largest,
        "truncated": truncated.astype(np.uint8),
    }
    return Packed(b"".join(records), table)


def joined_tables(tables: Sequence[NumpyArrays]) -> NumpyArrays:
    """The table of items in several parts, whose `stops` count from the first part."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


@frozen(eq=False)
class StoredItems(LazySequence[Any]):
    """Items whose records are read when they are used.

    Attributes:
        content: the records.
        table: see `Packed`.
        location: number of a row -> its "file:line".
        damaged: called when a record is not what was written; what to do then.
    """

    content: Content
    table: NumpyArrays
    location: Callable[[int], str]
    damaged: Callable[[], str] = lambda: "run again"

    def __len__(self) -> int:
        return len(self.table["stops"])

    def item(self, index: int) -> Example | Pair:
        """See `LazySequence`."""
        stops = self.table["stops"]
        record = self.content.read(int(stops[index - 1]) if index else 0, int(stops[index]))
        location = self.location(int(self.table["rows"][index]))
        if hash_of(record) != self.table["hashes"][index].tobytes():
            raise RunError(f"{location}: its stored token ids are damaged; {self.damaged()}")
        return item_of(record, location)

    @property
    def lengths(self) -> np.ndarray:
        """[items] tokens of the longest sequence of each."""
        return self.table["lengths"]

    @property
    def tokens(self) -> int:
        """Tokens of all items."""
        return int(self.table["tokens"].sum(dtype=np.int64))


@frozen(eq=False)
class _Replaced(LazySequence[Any]):
    items: StoredItems
    others: Mapping[int, Any]

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> Any:
        return self.others[index] if index in self.others else self.items[index]

    @property
    def lengths(self) -> np.ndarray:
        return self.items.lengths


def replaced(items: Sequence[Any], others: Mapping[int, Any]) -> Sequence[Any]:
    """The items with others of the same lengths at some places."""
    if isinstance(items, StoredItems):
        return _Replaced(items, others)
    return [others.get(number, item) for number, item in enumerate(items)]


def hashes_of(items: Sequence[Any]) -> bytes | None:
    """The hashes of the records of all items; None if they have no records."""
    if isinstance(items, StoredItems):
        return items.table["hashes"].tobytes()
    if not all(isinstance(item, Example | Pair) for item in items):
        return None
    return b"".join(hash_of(record_of(item)) for item in items)


def sides_of(item: Example | Pair) -> tuple[Example, ...]:
    """The sequences of an item."""
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)


def _bits(mask: np.ndarray) -> bytes:
    return np.packbits(mask).tobytes().ljust(round_up(ceil_div(len(mask), 8), 4), b"\0")


def _unpacked(numbers: np.ndarray, at: int, length: int) -> tuple[np.ndarray, int]:
    """The bits from a place on, and the place after them."""
    end = at + ceil_div(length, 32)
    return np.unpackbits(numbers[at:end].view(np.uint8), count=length).view(bool), end
