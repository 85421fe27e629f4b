"""Completions that are good or bad on their own (KTO): their rows, and the reference point that they are compared with.

The reference point is the policy's divergence from the reference on completions that do not belong to their prompts. It
changes as the policy does, so it is measured when a batch is made, without a gradient, and becomes a column.
"""

from collections.abc import Sequence

import numpy as np
from attrs import evolve, frozen

from ..config.options import RowOptions
from ..errors import InputError
from .formats import KEYS, labeled
from .rows import Row
from .sources import Tokenizer
from .tokenize import Example, preference_pair, supervised_example


@frozen(eq=False)
class Judged:
    """A completion, whether it is desirable, and its prompt with the completion of another one."""

    example: Example
    label: bool
    mismatched: Example | None = None

    @property
    def truncated(self) -> bool:
        """Whether tokens were cut."""
        return self.example.truncated


def judged_row(row: Row, tokenizer: Tokenizer, *, data: RowOptions) -> tuple[Judged, ...] | None:
    """What a row says is good or bad; None if truncation leaves nothing to train on.

    Raises:
        InputError: the row is not understood, or the chat template rejects it.
    """
    keys = {**KEYS, "prompt": data.prompt_key}
    how = {"use_chat_template": data.use_chat_template, "max_seq_length": data.max_seq_length}
    if {"chosen", "rejected"} <= row.fields.keys():
        pair = preference_pair(row, tokenizer, keys=keys, **how)
        return None if pair is None else (Judged(pair.chosen, True), Judged(pair.rejected, False))
    record = labeled(row, keys)
    completion = record.completion
    fields = {name: getattr(completion, name) for name in ("prompt", "completion", "system", "tools")}
    plain = Row({name: value for name, value in fields.items() if value is not None}, row.file, row.line)
    example = supervised_example(plain, tokenizer, mask_prompt=True, **how)
    return None if example is None else (Judged(example, record.label),)


def with_mismatched(rows: Sequence[tuple[Judged, ...]], limit: int) -> list[Judged]:
    """Every completion, with its prompt followed by the completion of the nearest earlier row of another prompt (cyclically).

    Raises:
        InputError: all prompts are the same.
    """
    items = _flat(rows)
    prompts = [_prompt(item.example).tobytes() for item in items]
    partner: list[int | None] = [None] * len(items)
    for i in (*range(len(items)), *range(len(items))):  # twice around: the first ones look at the last ones
        partner[i] = i - 1 if prompts[i - 1] != prompts[i] else partner[i - 1]
    if items and None in partner:
        raise InputError(f"{items[0].example.location}: all rows have one prompt; KTO compares with completions of other prompts")
    return [
        evolve(item, mismatched=_joined(item.example, items[j].example, limit))
        for item, j in zip(items, partner, strict=True)
        if j is not None
    ]


def _flat(rows: Sequence[tuple[Judged, ...]]) -> list[Judged]:
    return [item for row in rows for item in row]


def _prompt(example: Example) -> np.ndarray:
    return example.tokens[: example.loss_mask.argmax()]


def _joined(example: Example, other: Example, limit: int) -> Example:
    prompt = _prompt(example)
    tokens = np.concatenate([prompt, other.tokens[other.loss_mask.argmax() :]])[:limit]
    return Example(tokens, np.arange(len(tokens)) >= len(prompt), None, example.location)
