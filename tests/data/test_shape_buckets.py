"""However lengths vary, a run compiles a bounded number of shapes, and padding to one changes no result."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlora.data.batching import Order, bucket, collate, example_batch, pair_batch, stream
from mlxlora.data.shape_buckets import LIMIT, Signatures, capped, padded
from mlxlora.data.tokenize import Example, Pair
from mlxlora.objectives.supervised import sft
from mlxlora.training.micro_batch import BatchDivider
from mlxlora.training.reference import log_probabilities
from tests.support.tiny import dense, distance, example, loss_and_gradient

STEPS = 2000


def row(rng):
    length = int(rng.integers(3, 2049))
    start = min(max(1, int(length * rng.uniform(0, 0.98))), length - 1)
    return Example(np.zeros(length, np.int32), np.arange(length) >= start, None, "")


def pair(rng):
    prompt = np.ones(int(rng.integers(1, 1500)), np.int32)

    def side(value):
        tokens = np.concatenate([prompt, np.full(int(rng.integers(2, 500)), value, np.int32)])
        return Example(tokens, np.arange(len(tokens)) >= len(prompt), None, "")

    return Pair(side(2), side(3))


def shapes(batch):
    return tuple(None if value is None else tuple(value.shape) for value in batch)


def longest(item):
    return max(len(e.tokens) for e in ((item,) if isinstance(item, Example) else (item.chosen, item.rejected)))


@pytest.mark.parametrize(
    ("item", "micro"),
    [(row, example_batch), (pair, pair_batch), (pair, lambda pairs: pair_batch(pairs, share=True))],
    ids=["rows", "pairs", "shared prompts"],
)
def test_random_lengths_stay_under_the_cap(item, micro):
    rng = np.random.default_rng(0)
    items = [item(rng) for _ in range(4 * 900 + 1)]  # more than two epochs, with a smaller last batch in each
    order = Order(tuple(map(longest, items)), 4, seed=0)
    seen, work, least = set(), 0, 0
    plain = stream(items, order, lambda rows, _: micro(rows))
    made = stream(items, order, capped(lambda rows, _: micro(rows)))
    for _, before, after in zip(range(STEPS), plain, made, strict=False):
        seen.add(shapes(after.batch))
        work, least = work + after.batch.tokens.size, least + before.batch.tokens.size
    assert len(seen) <= LIMIT
    assert work < 1.1 * least, "the price of the cap"


@pytest.mark.parametrize("rows", [0, 2], ids=["as many as fit", "two"])
@pytest.mark.parametrize(("item", "share"), [(row, False), (pair, False), (pair, True)], ids=["rows", "pairs", "shared prompts"])
def test_parts_of_batches_stay_under_the_cap(item, share, rows):
    rng, seen, plain, whole = np.random.default_rng(0), set(), set(), Signatures()
    bounded, free = (BatchDivider(mx.get_active_memory() + (1 << 22), cost=1e3, rows=rows) for _ in range(2))
    free.shapes.own = STEPS
    for _ in range(400):
        items = [item(rng) for _ in range(4)]
        micro = example_batch(items) if item is row else pair_batch(items, share=share)
        micro = micro._replace(batch=whole.fit(micro.batch))
        for shown, method in ((seen, bounded), (plain, free)):
            shown |= {shapes(part.batch) for part in method([micro])}
    assert len(seen) <= (LIMIT if rows else 2 * LIMIT)  # batches that fit whole have shapes of their own
    assert len(seen) < len(plain)


@pytest.mark.parametrize("together", [1, 2])
def test_the_reference_stays_under_the_cap(together):
    """Its scorer is traced once for each shape."""
    rng, traced = np.random.default_rng(0), []

    def score(batch, gradient):
        traced.append(None)
        return (mx.zeros(batch.targets.shape),)

    examples = [side for _ in range(300) for some in [pair(rng)] for side in (some.chosen, some.rejected)]
    found = log_probabilities(examples, score, 2, together)  # type: ignore[arg-type]
    assert len(traced) <= LIMIT
    assert [len(logps) for logps in found] == [int(e.loss_mask.sum()) for e in examples]


def test_ever_longer_rows_stay_under_the_cap():
    """The worst order: every batch is larger than all before."""
    signatures, seen = Signatures(own=8), set()
    for length in range(40, 4000, 40):
        batch = collate([Example(np.zeros(length, np.int32), np.arange(length) > 0, None, "")])
        seen.add(shapes(signatures.fit(batch)))
    assert len(seen) <= 8 + 8


def test_few_shapes_are_left_alone():
    signatures = Signatures()
    for seed in range(20):
        batch = collate([example(seed)])
        assert signatures.fit(batch) is batch


@given(st.integers(0, 100), st.integers(0, 2), st.booleans(), st.booleans())
@settings(max_examples=12, deadline=None)
def test_padding_changes_no_result(seed, steps, shared, reference):
    examples = [example(seed + i, train_prompt=True, reference=reference) for i in range(3)]
    sides = [
        Example(np.concatenate([examples[0].tokens[:4], e.tokens]), np.pad(e.loss_mask, (4, 0)), None, "") for e in examples[:2]
    ]
    batch = collate(sides, groups=[(0, 1)]) if shared else collate(examples)
    length, prompt = batch.tokens.shape[1], batch.prefix.shape[1] if batch.prefix is not None else 0
    sizes = tuple(bucket(size + 32 * steps) if size else 0 for size in (length, batch.positions.size, prompt))
    model = dense()
    (loss, gradient), (same, its) = (loss_and_gradient(model, sft(), b) for b in (batch, padded(batch, sizes)))
    assert same == pytest.approx(loss, rel=1e-5) and distance(its, gradient) < 1e-5


def test_columns_are_filled():
    batch = padded(collate([example(0, reference=True)], preference_score=mx.array([2.0])), (96, 128, 0))
    assert batch.tokens.shape == (1, 96) and batch.positions.shape == batch.ref_logps.shape == batch.sequence.shape == (128,)
    assert int((batch.sequence == 0).sum()) == int(batch.lengths.sum()) and batch.preference_score.shape == (1,)
