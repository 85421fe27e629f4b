"""Labeled completions (KTO) as batches, with the reference point that KTO compares them with."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs import evolve, frozen

from ..batch import Batch
from ..config.given import Data
from ..config.options import RowOptions
from ..data.batching import Make, MicroBatch, collate, completion_tokens, singles, spread, token_count
from ..data.labeled import Judged, flattened, judged_row, with_mismatched
from ..data.shape_buckets import Signatures
from ..data.sources import Context, Encoder, Source
from ..data.tokenize import Example
from ..distributed.ranks import Ranks
from ..models.logprobs import scorer
from ..models.modes import evaluating


def unpaired(data: Data | RowOptions, *, reference_point: bool = True, **options: Any) -> Source:
    """Labeled rows: prompt, completion and whether it is desirable; a preference pair counts as one row of each label.

    Args:
        data: folder, file, hub data set or rows in memory; or all options at once.
        reference_point: measure `batch.reference_point` for objectives that need it, with one more forward pass for each batch.
        options: fields of `RowOptions`, such as `max_seq_length=1024`.
    """
    data = evolve(data, **options) if isinstance(data, RowOptions) else RowOptions(data=data, **options)

    return UnpairedSource(data, live=reference_point)


@frozen
class UnpairedSource(Source):
    """Labeled completions; an item is a `Judged`. `live`: each batch measures `batch.reference_point`."""

    @property
    def encoder(self) -> Encoder:
        """(row, tokenizer) -> the completions of the row, which `arrange` makes items."""
        return partial(judged_row, data=self.data)

    def make(self, context: Context) -> Make:
        """See `Source`."""
        return _measured(context.model, context.ranks, context.shapes) if self.live else lambda items, _: _micro(items)

    def examples(self, item: Judged) -> tuple[Example, ...]:
        """The completion with its prompt, and the mismatched one if it is needed."""
        return (item.example,) if item.mismatched is None else (item.example, item.mismatched)

    def rebuild(self, item: Judged, examples: Sequence[Example]) -> Judged:
        """See `Source`."""
        return evolve(item, **dict(zip(("example", "mismatched"), examples, strict=False)))

    def arrange(self, items: Sequence[tuple[Judged, ...]]) -> Sequence[Judged]:
        """The completions of all rows, each with a mismatched one if the reference point is measured."""
        return with_mismatched(items, self.data.max_seq_length) if self.live else flattened(items)


def _micro(items: Sequence[Judged]) -> MicroBatch:
    examples = [item.example for item in items]
    batch = collate(examples, label=mx.array([item.label for item in items]))
    return MicroBatch(batch, token_count(examples), tuple(e.location for e in examples), groups=singles(len(examples)))


def _measured(model: nn.Module, ranks: Ranks, shapes: Signatures) -> Make:
    """Micro-batches with `reference_point`, which all ranks measure together with the current policy."""
    score, state, own = scorer(model), [model.state], spread(lambda items, _: _micro(items), ranks)

    @partial(mx.compile, inputs=state, outputs=state)
    def logps(batch: Batch) -> mx.array:
        return score(batch, gradient=False)[0]

    def divergence(examples: Sequence[Example]) -> float:
        if not examples:
            return 0.0
        with evaluating(model), ranks.computing():
            policy = np.array(logps(shapes.fit(collate(examples))))
        return sum_log_ratio(policy, examples)

    def with_point(items: Sequence[Judged], index: int) -> MicroBatch:
        micro = own(items, index)
        examples = [item.mismatched for item in ranks.share(items) if item.mismatched is not None]
        if ranks.sharded and not examples:
            divergence(
                [item.mismatched for item in items[:1] if item.mismatched is not None]
            )  # the other ranks need this one to gather slices
        total, count = ranks.totals(divergence(examples), len(examples))
        column = mx.full((micro.batch.sequences,), max(total / count, 0.0), mx.float32)
        return micro._replace(batch=micro.batch._replace(reference_point=column))

    return with_point


def sum_log_ratio(logps: np.ndarray, examples: Sequence[Example]) -> float:
    """Σ over the examples of log π(y|x) - log π_ref(y|x), nats.

    Args:
        logps: [N] or longer, log π of the trained tokens in the order of the examples.
        examples: with `ref_logps`.

    Raises:
        ValueError: an example has no `ref_logps`.
    """
    known = [example.ref_logps for example in examples if example.ref_logps is not None]
    if len(known) < len(examples):
        raise ValueError("the reference point needs the reference's log-probabilities, which with_reference(...) adds")
    reference = np.concatenate(known)
    assert len(reference) == sum(map(completion_tokens, examples))
    return float((logps[: len(reference)] - reference).sum())
