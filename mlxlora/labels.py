"""Completions that are good or bad on their own (KTO): their rows, and the reference point that they are compared with.

The reference point is the policy's divergence from the reference on completions that do not belong to their prompts. It
changes as the policy does, so it is measured when a batch is made, without a gradient, and becomes a column.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs import evolve, frozen

from .batching import Make, Piece, collate, completion_tokens, singles, spread, token_count
from .config import RowOptions
from .data import Example, preference_pair, supervised_example
from .distributed import Ranks
from .errors import InputError
from .formats import KEYS, Row, labelled
from .logprobs import scorer
from .modes import evaluating
from .signatures import Signatures
from .sources import Context, Source, Tokenizer
from .types import Batch


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


def unpaired(data: str | RowOptions, *, reference_point: bool = True, **options: Any) -> Source:
    """Labelled rows: prompt, completion and whether it is desirable; a preference pair counts as one of each.

    Args:
        data: folder, file or hub data set; or all options at once.
        reference_point: measure `batch.reference_point`, for objectives that need it: a forward pass more for each batch.
        options: fields of `RowOptions`, such as `max_seq_length=1024`.
    """
    data = RowOptions(data=data, **options) if isinstance(data, str) else evolve(data, **options)

    def make(context: Context) -> Make:
        return _measured(context.model, context.ranks) if reference_point else lambda items, _: _piece(items)

    def examples(item: Judged) -> tuple[Example, ...]:
        return (item.example,) if item.mismatched is None else (item.example, item.mismatched)

    def rebuild(item: Judged, found: Sequence[Example]) -> Judged:
        return evolve(item, **dict(zip(("example", "mismatched"), found, strict=False)))

    arrange = partial(with_mismatched, limit=data.max_seq_length) if reference_point else _flat
    return Source(data, partial(judged_row, data=data), make, examples, rebuild, arrange=arrange, live=reference_point)


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
    record = labelled(row, keys)
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
        raise InputError(f"{items[0].example.where}: all rows have one prompt; KTO compares with completions of other prompts")
    return [
        evolve(item, mismatched=_joined(item.example, items[j].example, limit))
        for item, j in zip(items, partner, strict=True)
        if j is not None
    ]


def _flat(rows: Sequence[tuple[Judged, ...]]) -> list[Judged]:
    return [item for row in rows for item in row]


def _prompt(example: Example) -> np.ndarray:
    return example.tokens[: example.scored.argmax()]


def _joined(example: Example, other: Example, limit: int) -> Example:
    prompt = _prompt(example)
    tokens = np.concatenate([prompt, other.tokens[other.scored.argmax() :]])[:limit]
    return Example(tokens, np.arange(len(tokens)) >= len(prompt), None, example.where)


def _piece(items: Sequence[Judged]) -> Piece:
    examples = [item.example for item in items]
    batch = collate(examples, label=mx.array([item.label for item in items]))
    return Piece(batch, token_count(examples), tuple(e.where for e in examples), units=singles(len(examples)))


def _measured(model: nn.Module, ranks: Ranks) -> Make:
    """Pieces with `reference_point`, which all ranks measure together, with the model as it then is."""
    score, state, own, shapes = scorer(model), [model.state], spread(lambda items, _: _piece(items), ranks), Signatures()

    @partial(mx.compile, inputs=state, outputs=state)
    def logps(batch: Batch) -> mx.array:
        return score(batch, gradient=False)[0]

    def divergence(examples: Sequence[Example]) -> float:
        if not examples:
            return 0.0
        with evaluating(model), ranks.computing():
            policy = np.array(logps(shapes.fit(collate(examples))))
        return sum_log_ratio(policy, examples)

    def with_point(items: Sequence[Judged], index: int) -> Piece:
        piece = own(items, index)
        examples = [item.mismatched for item in ranks.share(items) if item.mismatched is not None]
        if ranks.sharded and not examples:
            divergence([item.mismatched for item in items[:1] if item.mismatched is not None])  # helps the others gathering
        total, count = ranks.totals(divergence(examples), len(examples))
        column = mx.full((piece.batch.sequences,), max(total / count, 0.0), mx.float32)
        return piece._replace(batch=piece.batch._replace(reference_point=column))

    return with_point


def sum_log_ratio(logps: np.ndarray, examples: Sequence[Example]) -> float:
    """The sum over the examples of log π(y|x) - log π_ref(y|x); logps [N] or longer, in the order of the examples, nats.

    Raises:
        ValueError: the examples have no `ref_logps`.
    """
    known = [example.ref_logps for example in examples if example.ref_logps is not None]
    if len(known) < len(examples):
        raise ValueError("the reference point needs the reference's log-probabilities, which with_reference(...) adds")
    reference = np.concatenate(known)
    assert len(reference) == sum(map(completion_tokens, examples))
    return float((logps[: len(reference)] - reference).sum())
