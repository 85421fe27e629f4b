"""Completions that are labeled good or bad one by one (KTO), and the mismatched completions of KTO's reference point.

The reference point is the divergence of the policy from the reference on completions of other prompts. `training.unpaired`
measures it when it makes a batch.
"""

from collections.abc import Sequence

import numpy as np
from attrs import evolve, frozen

from ..config.options import RowOptions
from ..errors import InputError
from .formats import field_names, labeled_record
from .rows import Row
from .sources import Tokenizer
from .tokenize import Example, preference_pair, record_example


@frozen(eq=False)
class Judged:
    """A completion, whether it is desirable, and its prompt with the completion of another one."""

    example: Example
    label: bool
    mismatched: Example | None = None

    @property
    def truncated(self) -> bool:
        """Whether tokens were cut off."""
        return self.example.truncated


def judged_row(row: Row, tokenizer: Tokenizer, *, data: RowOptions) -> tuple[Judged, ...] | None:
    """The labeled completions of a row, two if it is a pair; None if truncation leaves no trained token.

    Raises:
        InputError: the row is not understood, or the chat template rejects it.
    """
    keys = field_names(data)
    how = {"use_chat_template": data.use_chat_template, "max_seq_length": data.max_seq_length}
    if {"chosen", "rejected"} <= row.fields.keys():
        pair = preference_pair(row, tokenizer, keys=keys, **how)
        return None if pair is None else (Judged(pair.chosen, True), Judged(pair.rejected, False))
    record = labeled_record(row, keys)
    example = record_example(record.completion, tokenizer, mask_prompt=True, **how)
    return None if example is None else (Judged(example, record.label),)


def with_mismatched(rows: Sequence[tuple[Judged, ...]], limit: int) -> list[Judged]:
    """Every completion, and its prompt with the completion of the nearest earlier row that has another prompt (cyclically).

    Raises:
        InputError: all prompts are the same.
    """
    items = flattened(rows)
    prompts = [_prompt(item.example).tobytes() for item in items]
    partner: list[int | None] = [None] * len(items)
    for i in (*range(len(items)), *range(len(items))):  # twice around: the first ones look at the last ones
        partner[i] = i - 1 if prompts[i - 1] != prompts[i] else partner[i - 1]
    if items and None in partner:
        location = items[0].example.location
        raise InputError(f"{location}: all rows have one prompt; KTO compares with completions of other prompts, so add such rows")
    return [
        evolve(item, mismatched=_joined(item.example, items[j].example, limit))
        for item, j in zip(items, partner, strict=True)
        if j is not None
    ]


def flattened(rows: Sequence[tuple[Judged, ...]]) -> list[Judged]:
    """The completions of all rows."""
    return [item for row in rows for item in row]


def _prompt(example: Example) -> np.ndarray:
    return example.tokens[: example.loss_mask.argmax()]


def _joined(example: Example, other: Example, limit: int) -> Example:
    prompt, start = _prompt(example), other.loss_mask.argmax()
    tokens = np.concatenate([prompt, other.tokens[start:]])[:limit]
    loss_mask = np.concatenate([np.zeros(len(prompt), bool), other.loss_mask[start:]])[:limit]
    return Example(tokens, loss_mask, None, example.location)
