"""Sources of batches: rows to items, items to micro-batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, final

import mlx.nn as nn
import numpy as np
from attrs import evolve, field, frozen

from ..config.given import Data, storable
from ..config.options import DataOptions, PairData, RowOptions
from ..distributed.ranks import ALONE, Ranks
from ..errors import InputError
from .batching import Make, example_batch, pair_batch
from .formats import field_names
from .item_records import StoredItems
from .memory import splits_of
from .rows import Row, SplitRows, split_off
from .shape_buckets import Signatures
from .token_cache import is_storable, stored_items
from .tokenize import Counts, Example, Pair, check_ids, preference_pair, supervised_example, tokenize_all

Tokenizer = Any
Encoder = Callable[[Row, Tokenizer], Any | None]
"""(row, tokenizer) -> item, or None if truncation leaves nothing to train on."""


@frozen
class Context:
    """What a source may use to make batches during a run.

    Attributes:
        model: the current policy.
        tokenizer: its tokenizer.
        seed: seeds the randomness of a batch, together with the number of the batch.
        validation: the batches are for validation or test.
        items: the training items, for sources that need others than those of the batch.
        share: compute a prompt once for all of its completions.
        ranks: the processes that train together.
        reference: a context in which a model computes what the reference does, if the objective needs a reference of what the
            policy samples; None: it needs none.
        warn: prints a warning for the user.
        vocabularies: how many tokens each model has that reads what the policy samples; see `check_examples`.
        shapes: of what a source measures while it makes batches.
    """

    model: nn.Module
    tokenizer: Tokenizer
    seed: int
    validation: bool = False
    items: Sequence[Any] = ()
    share: bool = False
    ranks: Ranks = ALONE
    reference: Callable[[], AbstractContextManager[nn.Module]] | None = None
    warn: Callable[[str], object] = lambda _: None
    vocabularies: Mapping[str, int] = field(factory=dict)
    shapes: Signatures = field(factory=Signatures)


@frozen
class Source(ABC):
    """How a method turns rows into batches: a row becomes an item, items become a micro-batch.

    A new source implements `encoder`, `make`, `examples` and `rebuild`; the other methods have defaults.

    Attributes:
        data: which rows to read, and how.
        online: the policy samples the sequences during the run; validation averages the metrics of the micro-batches.
        temperature: divides the logits, in training as in sampling.
        repeats: optimizer steps on each batch.
        share: compute the prompt of an item once for all of its sequences; None: where that is faster.
        packing: put several examples into one row.
        live: a batch is measured with the current policy, so it is not made ahead of time.

    An online or live source gets the items of the whole batch on every rank and takes its share of them, because all ranks may
    have to measure together. Other sources get the share of their rank.
    """

    data: RowOptions
    online: bool = field(default=False, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    repeats: int = field(default=1, kw_only=True)
    share: bool | None = field(default=False, kw_only=True)
    packing: bool = field(default=False, kw_only=True)
    live: bool = field(default=False, kw_only=True)

    @property
    @abstractmethod
    def encoder(self) -> Encoder:
        """(row, tokenizer) -> item, or None if truncation leaves nothing to train on.

        The token cache keeps the items if this is a `partial` of a function of `data.tokenize` with keyword arguments, because
        these name everything that the items depend on.
        """

    @final
    def prepare(self, row: Row, tokenizer: Tokenizer) -> Any | None:
        """The item of a row; None if truncation leaves nothing to train on.

        Raises:
            InputError: the row is not understood, or the chat template rejects it.
        """
        return self.encoder(row, tokenizer)

    @abstractmethod
    def make(self, context: Context) -> Make:
        """How the items of a batch become its micro-batch."""

    @abstractmethod
    def examples(self, item: Any) -> tuple[Example, ...]:
        """The token sequences of an item; the report of a run shows the first one."""

    @abstractmethod
    def rebuild(self, item: Any, examples: Sequence[Example]) -> Any:
        """The item with other sequences, such as those that know their `ref_logps`."""

    def check_rows(self, rows: Mapping[str, Sequence[Row]]) -> None:  # noqa: B027 most sources need nothing of rows
        """Checks what needs no model, before one is loaded.

        Raises:
            InputError: a row lacks what the source reads later.
        """

    def expected(self, item: Any) -> Sequence[Example]:
        """The sequences that an item is expected to become, to estimate the work."""
        return self.examples(item)

    def arrange(self, items: Sequence[Any]) -> Sequence[Any]:
        """The items of a split, after what depends on several of them."""
        return items

    def length(self, item: Any) -> int:
        """Tokens of the longest sequence of an item; items of similar length share a batch."""
        return max(len(example.tokens) for example in self.examples(item))

    @final
    def lengths(self, items: Sequence[Any]) -> np.ndarray:
        """[items] `length` of each; stored items are not read for that."""
        known = getattr(items, "lengths", None)
        return np.fromiter(map(self.length, items), np.int64, len(items)) if known is None else known


@frozen
class RowSource(Source):
    """Supervised rows; an item is an `Example`."""

    data: DataOptions

    @property
    def encoder(self) -> Encoder:
        """See `Source`."""
        data = self.data
        return partial(
            supervised_example,
            mask_prompt=data.mask_prompt,
            train_on=data.train_on,
            use_chat_template=data.use_chat_template,
            max_seq_length=data.max_seq_length,
            keys=field_names(data),
        )

    def make(self, context: Context) -> Make:
        """See `Source`."""
        return lambda items, _: example_batch(items)

    def examples(self, item: Example) -> tuple[Example, ...]:
        """The item."""
        return (item,)

    def rebuild(self, item: Example, examples: Sequence[Example]) -> Example:
        """See `Source`."""
        return examples[0]


@frozen
class PairSource(Source):
    """Preference rows; an item is a `Pair`.

    Attributes:
        train_prompt: train on the prompt too (ORPO's NLL over prompt and completion).
    """

    data: PairData
    train_prompt: bool = False

    @property
    def encoder(self) -> Encoder:
        """See `Source`."""
        data = self.data
        return partial(
            preference_pair,
            use_chat_template=data.use_chat_template,
            max_seq_length=data.max_seq_length,
            prompt_truncation=data.prompt_truncation,
            train_prompt=self.train_prompt,
            keys=field_names(data),
        )

    def make(self, context: Context) -> Make:
        """See `Source`."""
        return lambda items, _: pair_batch(items, share=context.share)

    def examples(self, item: Pair) -> tuple[Example, ...]:
        """The chosen completion, then the rejected one."""
        return (item.chosen, item.rejected)

    def rebuild(self, item: Pair, examples: Sequence[Example]) -> Pair:
        """See `Source`."""
        return evolve(item, chosen=examples[0], rejected=examples[1])


@frozen
class Split:
    """The items of a split, and how many of its rows were cut or dropped."""

    items: Sequence[Any] = ()
    counts: Counts = field(factory=lambda: Counts(0, 0, 0))


def rows(data: Data | DataOptions, **options: Any) -> Source:
    """Supervised rows: messages, prompt and completion, or text.

    Args:
        data: folder, file, hub data set or rows in memory; or all options at once.
        options: fields of `DataOptions`, such as `mask_prompt=True`.
    """
    data = evolve(data, **options) if isinstance(data, DataOptions) else DataOptions(data=data, **options)
    return RowSource(data, packing=data.packing)


def pairs(data: Data | PairData, *, train_prompt: bool = False, **options: Any) -> Source:
    """Preference rows: two completions of one prompt, the first preferred.

    Args:
        data: folder, file, hub data set or rows in memory; or all options at once.
        train_prompt: train on the prompt too (ORPO's NLL over prompt and completion).
        options: fields of `PairData`, such as `max_seq_length=1024`.
    """
    data = evolve(data, **options) if isinstance(data, PairData) else PairData(data=data, **options)
    return PairSource(data, train_prompt, share=data.share_prompts)


def load_rows(data: RowOptions, seed: int) -> dict[str, SplitRows]:
    """The rows of each split; `valid_fraction` makes a validation split if there is none.

    Raises:
        InputError: the data does not exist or cannot be read.
    """
    if data.data is None:
        raise InputError("--data is missing: a folder with train.jsonl, a JSONL file or a hub data set name")
    asked = {"train": data.train_split, "valid": data.valid_split, "test": data.test_split}
    splits = splits_of(data.data, {split: rows for split, rows in asked.items() if rows})
    if data.valid_fraction and not splits.get("valid"):
        train, valid = split_off(splits["train"], data.valid_fraction, seed)
        splits = {**splits, "train": train, "valid": valid}
    return splits


def load_split(data: RowOptions, split: str, seed: int) -> SplitRows:
    """The rows of one split, see `load_rows`.

    Raises:
        InputError: there is no such split.
    """
    rows = load_rows(data, seed)
    if not rows.get(split):
        raise InputError(f"{storable(data.data)}: no {split} split; found {', '.join(name for name in rows if rows[name])}")
    return rows[split]


def tokenize(
    source: Source,
    splits: Mapping[str, SplitRows],
    tokenizer: Tokenizer,
    note: Callable[[str], Any] = lambda _: None,
    *,
    encoder: Encoder | None = None,
) -> dict[str, Split]:
    """The items of every split, from the token cache if it has them; an absent split has none.

    Args:
        source: encodes and arranges the rows.
        splits: the rows of each split.
        tokenizer: mlx-lm's TokenizerWrapper.
        note: receives a line that says where cached items come from.
        encoder: used in place of the source's.

    Raises:
        InputError: a row is not understood, or no row of a split is left.
    """
    encode, keep = encoder or source.encoder, source.data.token_cache

    def make(rows: SplitRows) -> tuple[Sequence[Any], Counts]:
        if is_storable(encode):
            return stored_items(rows, encode, tokenizer, note, keep=keep)
        return tokenize_all(rows, lambda row: encode(row, tokenizer))

    found = {name: Split(*make(splits[name])) if splits.get(name) else Split() for name in ("train", "valid", "test")}
    return {name: evolve(split, items=source.arrange(split.items)) for name, split in found.items()}


def check_tokens(source: Source, splits: Mapping[str, Split], vocabularies: Mapping[str, int], tokenizer: Tokenizer) -> None:
    """`check_examples` of all rows."""
    smallest = min(vocabularies.values(), default=None)
    for split in splits.values() if smallest else ():
        items = split.items
        if isinstance(items, StoredItems):
            items = [items[i] for i in np.flatnonzero(items.table["largest"] >= smallest)[:1].tolist()]
        check_examples((e for item in items for e in source.examples(item)), vocabularies, tokenizer)


def check_examples(examples: Iterable[Example], vocabularies: Mapping[str, int], tokenizer: Tokenizer) -> None:
    """Checks that every token has an embedding in each model; MLX would read past the end of the matrix.

    Args:
        examples: what the models read.
        vocabularies: how many tokens each of them has, by what messages call it, such as "the teacher".
        tokenizer: of all of them.

    Raises:
        InputError: a token is not in the vocabulary of a model; the message names the row.
    """
    for example in examples if vocabularies else ():
        for whose, size in vocabularies.items():
            check_ids(example.tokens, example.location, size, tokenizer, whose)
