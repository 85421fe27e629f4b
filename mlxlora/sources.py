"""Where the batches of a method come from: rows to items, items to pieces."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import evolve, field, frozen

from .batching import Piece, example_piece
from .config import DataOptions
from .data import Counts, Example, supervised_example, tokenize_all
from .errors import InputError
from .rows import Row, read_splits, split_off

Tokenizer = Any


@frozen
class Source:
    """What a method needs to know about its rows.

    Attributes:
        data: which rows, and how they are read.
        prepare: (row, tokenizer) -> an item, or None if truncation leaves nothing to train on.
        piece: items -> a batch.
        length: tokens of an item, so that items of a length go together.
        example: an item as the row that is shown at the start.
    """

    data: DataOptions
    prepare: Callable[[Row, Tokenizer], Any | None]
    piece: Callable[[Sequence[Any]], Piece]
    length: Callable[[Any], int]
    example: Callable[[Any], Example]


@frozen
class Split:
    """The items of a split and how many of its rows were cut or dropped."""

    items: Sequence[Any] = ()
    counts: Counts = field(factory=lambda: Counts(0, 0, 0))


def rows(data: str | DataOptions, **options: Any) -> Source:
    """Supervised rows: messages, prompt and completion, or text.

    Args:
        data: folder, file or hub data set; or all options at once.
        options: fields of `DataOptions`, such as `mask_prompt=True`.
    """
    data = _options(data, options)

    def prepare(row: Row, tokenizer: Tokenizer) -> Example | None:
        return supervised_example(
            row,
            tokenizer,
            mask_prompt=data.mask_prompt,
            use_chat_template=data.use_chat_template,
            max_seq_length=data.max_seq_length,
            keys=keys(data),
        )

    return Source(data, prepare, example_piece, lambda example: len(example.tokens), lambda example: example)


def _options(data: str | DataOptions, options: Mapping[str, Any]) -> DataOptions:
    return evolve(data, **options) if isinstance(data, DataOptions) else DataOptions(data=str(data), **options)


def keys(data: DataOptions) -> dict[str, str]:
    """What the fields of a row are called."""
    return {
        "text": data.text_key,
        "messages": data.messages_key,
        "prompt": data.prompt_key,
        "completion": data.completion_key,
    }


def read(data: DataOptions, seed: int) -> dict[str, list[Row]]:
    """The rows of each split; a validation split is made if asked for and there is none.

    Raises:
        InputError: there are no such rows, or they are broken.
    """
    if data.data is None:
        raise InputError("--data is missing: a folder with train.jsonl, a JSONL file or a hub data set name")
    splits = read_splits(data.data)
    if data.valid_fraction and not splits.get("valid"):
        train, valid = split_off(splits["train"], data.valid_fraction, seed)
        splits = {**splits, "train": train, "valid": valid}
    return splits


def tokenize(source: Source, splits: Mapping[str, list[Row]], tokenizer: Tokenizer) -> dict[str, Split]:
    """Every split as items; an absent split has none."""
    return {
        name: Split(*tokenize_all(splits[name], lambda row: source.prepare(row, tokenizer))) if splits.get(name) else Split()
        for name in ("train", "valid", "test")
    }
