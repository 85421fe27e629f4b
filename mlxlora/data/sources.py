"""Where the batches of a method come from: rows to items, items to pieces."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.nn as nn
from attrs import evolve, field, frozen

from ..config.options import DataOptions, PairData, RowOptions
from ..distributed.ranks import ALONE, Ranks
from ..errors import InputError
from .batching import Make, MicroBatch, example_batch, pair_batch
from .formats import KEYS
from .rows import Row, read_splits, split_off
from .token_cache import remembered
from .tokenize import Counts, Example, Pair, preference_pair, supervised_example, tokenize_all

Tokenizer = Any


@frozen
class Context:
    """What a source may use to make batches during a run.

    Attributes:
        model: the policy, as it is when a batch is made.
        tokenizer: its tokenizer.
        seed: of whatever is random in a batch, with the batch's number.
        validation: whether the batches are for validation or test.
        items: the training items, where a source needs more than it was given.
        share: compute a prompt once for all of its completions.
        ranks: who trains together.
    """

    model: nn.Module
    tokenizer: Tokenizer
    seed: int
    validation: bool = False
    items: Sequence[Any] = ()
    share: bool = False
    ranks: Ranks = ALONE


@frozen
class Source:
    """What a method needs to know about its rows.

    Attributes:
        data: which rows, and how they are read.
        prepare: (row, tokenizer) -> an item, or None if truncation leaves nothing to train on.
        make: context -> (items -> their piece).
        examples: the token sequences of an item; the first one is shown at the start.
        rebuild: the item with other sequences, which have more columns.
        online: the policy samples the sequences during the run; validation is then the mean of what pieces measured.
        temperature: logits are divided by it before they are scored, as they were when the sequences were sampled.
        repeats: optimiser steps on every batch.
        share: whether the sequences of an item share their prompt's computation; None: where that is faster.
        expected: the sequences that an item is expected to become, to estimate that; None: its examples.
        arrange: what is made of all items of a split together; None: nothing.
        packing: several examples are to share a row.
        live: batches are measured with the policy as it is when they are made, so none is made in advance.

    What is online or live may have to be measured by all ranks together: its `make` gets the items of the whole batch, on every
    rank, and takes its share of them. Others get their share.
    """

    data: RowOptions
    prepare: Callable[[Row, Tokenizer], Any | None]
    make: Callable[[Context], Make]
    examples: Callable[[Any], tuple[Example, ...]]
    rebuild: Callable[[Any, Sequence[Example]], Any]
    online: bool = False
    temperature: float = 1.0
    repeats: int = 1
    share: bool | None = False
    expected: Callable[[Any], Sequence[Example]] | None = None
    arrange: Callable[[Sequence[Any]], Sequence[Any]] | None = None
    packing: bool = False
    live: bool = False

    def length(self, item: Any) -> int:
        """Tokens of an item's longest sequence, so that items of a length go together."""
        return max(len(example.tokens) for example in self.examples(item))


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
    data = DataOptions(data=data, **options) if isinstance(data, str) else evolve(data, **options)
    keys = {"text": data.text_key, "messages": data.messages_key, "prompt": data.prompt_key, "completion": data.completion_key}

    prepare = partial(
        supervised_example,
        mask_prompt=data.mask_prompt,
        use_chat_template=data.use_chat_template,
        max_seq_length=data.max_seq_length,
        keys=keys,
    )
    return Source(
        data,
        prepare,
        always(example_batch),
        lambda example: (example,),
        lambda _, examples: examples[0],
        packing=data.packing,
    )


def pairs(data: str | PairData, *, score_prompt: bool = False, **options: Any) -> Source:
    """Preference rows: two completions of one prompt, the first preferred.

    Args:
        data: folder, file or hub data set; or all options at once.
        score_prompt: score the prompt too (ORPO's NLL over prompt and completion).
        options: fields of `PairData`, such as `max_seq_length=1024`.
    """
    data = PairData(data=data, **options) if isinstance(data, str) else evolve(data, **options)

    prepare = partial(
        preference_pair,
        use_chat_template=data.use_chat_template,
        max_seq_length=data.max_seq_length,
        prompt_truncation=data.prompt_truncation,
        score_prompt=score_prompt,
        keys={**KEYS, "prompt": data.prompt_key},
    )

    def rebuild(pair: Pair, examples: Sequence[Example]) -> Pair:
        return evolve(pair, chosen=examples[0], rejected=examples[1])

    def make(context: Context) -> Make:
        return lambda items, _: pair_batch(items, share=context.share)

    return Source(data, prepare, make, lambda pair: (pair.chosen, pair.rejected), rebuild, share=data.share_prompts)


def always(micro: Callable[[Sequence[Any]], MicroBatch]) -> Callable[[Context], Make]:
    """Batches that depend on their items alone."""
    return lambda _: lambda items, __: micro(items)


def read(data: RowOptions, seed: int) -> dict[str, list[Row]]:
    """The rows of each split; a validation split is made if asked for and there is none.

    Raises:
        InputError: there are no such rows, or they are broken.
    """
    if data.data is None:
        raise InputError("--data is missing: a folder with train.jsonl, a JSONL file or a hub data set name")
    asked = {"train": data.train_split, "valid": data.valid_split, "test": data.test_split}
    splits = read_splits(data.data, {split: rows for split, rows in asked.items() if rows})
    if data.valid_fraction and not splits.get("valid"):
        train, valid = split_off(splits["train"], data.valid_fraction, seed)
        splits = {**splits, "train": train, "valid": valid}
    return splits


def tokenize(
    source: Source, splits: Mapping[str, list[Row]], tokenizer: Tokenizer, note: Callable[[str], Any] = lambda _: None
) -> dict[str, Split]:
    """Every split as items, from disk if they are kept there; an absent split has none. `note` is told where they are from."""

    def make(rows: Sequence[Row]) -> tuple[list[Any], Counts]:
        return tokenize_all(rows, lambda row: source.prepare(row, tokenizer))

    if source.data.token_cache and not source.online:
        make = partial(remembered, make=make, prepare=source.prepare, tokenizer=tokenizer, note=note)
    found = {name: Split(*make(splits[name])) if splits.get(name) else Split() for name in ("train", "valid", "test")}
    return {name: _arranged(source, split) for name, split in found.items()}


def check_tokens(source: Source, splits: Mapping[str, Split], vocabulary: int, tokenizer: Tokenizer) -> None:
    """Checks that the model has all tokens of the rows: MLX would read past the end of its embedding.

    Raises:
        InputError: it has not; the row is named.
    """
    for example in (e for split in splits.values() for item in split.items for e in source.examples(item)):
        if len(example.tokens) and (largest := int(example.tokens.max())) >= vocabulary:
            raise InputError(
                f"{example.location}: token {largest} ({tokenizer.decode([largest])!r}) is not among the model's {vocabulary}: "
                "the tokenizer has more than the weights; take the one that belongs to them"
            )


def _arranged(source: Source, split: Split) -> Split:
    return split if source.arrange is None else evolve(split, items=source.arrange(split.items))
