"""Which rows go together, in which order, and the arrays that they become."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlora.data.batching import ALIGN, Order, bucket, collate, completion_tokens, example_batch, grouped, pair_batch, stream
from mlxlora.data.tokenize import Example, Pair
from tests.support.tiny import example

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=80).map(tuple)
some = settings(deadline=None, max_examples=40, derandomize=True)


def row(tokens: list[int], loss_mask: list[int], prompt: list[int] | None = None, location: str = "a.jsonl:1") -> Example:
    marks = None if prompt is None else np.array(prompt, bool)
    return Example(np.array(tokens, np.int32), np.array(loss_mask, bool), marks, location)


# --- order --------------------------------------------------------------------------------------


@some
@given(lengths=LENGTHS, size=st.integers(1, 9), seed=st.none() | st.integers(0, 99))
def test_every_row_comes_once_an_epoch(lengths: tuple[int, ...], size: int, seed: int | None) -> None:
    order = Order(lengths, size, seed)
    batches = order.batches()
    for _ in range(3):
        epoch = list(islice(batches, order.per_epoch()))
        assert sorted(i for batch in epoch for i in batch) == list(range(len(lengths)))
        assert sorted(map(len, epoch), reverse=True)[:-1] == [size] * (order.per_epoch() - 1)


@some
@given(lengths=LENGTHS, size=st.integers(1, 9), seed=st.none() | st.integers(0, 99), start=st.integers(0, 60))
def test_it_goes_on_anywhere(lengths: tuple[int, ...], size: int, seed: int | None, start: int) -> None:
    order = Order(lengths, size, seed)
    whole = list(islice(order.batches(), start + 10))
    assert list(islice(Order(lengths, size, seed).batches(start), 10)) == whole[start:]


def test_order_of_the_file() -> None:
    assert list(islice(Order((9, 1, 5, 2, 2), 2).batches(), 4)) == [[0, 1], [2, 3], [4], [0, 1]]


def test_seed_and_epoch_shuffle() -> None:
    def epoch(seed: int, number: int = 0) -> list[list[int]]:
        order = Order(tuple(range(40)), 4, seed)
        return list(islice(order.batches(number * order.per_epoch()), order.per_epoch()))

    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2) and epoch(1) != epoch(1, 1)


def test_rows_of_a_length_go_together() -> None:
    lengths = tuple(int(n) for n in np.random.default_rng(0).integers(10, 1000, 256))

    def padding(batches: list[list[int]]) -> float:
        padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
        return padded / sum(lengths) - 1

    shuffled = list(islice(Order(lengths, 8, 0).batches(), 32))
    assert padding(shuffled) < 0.15 < 0.5 < padding(list(islice(Order(lengths, 8).batches(), 32)))
    longest = [max(lengths[i] for i in b) for b in shuffled]
    assert longest != sorted(longest)


# --- shapes -------------------------------------------------------------------------------------


@some
@given(size=st.integers(1, 200_000))
def test_bucket_is_aligned_holds_and_wastes_little(size: int) -> None:
    found = bucket(size)
    assert found % ALIGN == 0 and found >= size and found <= max(1.25 * size, size + ALIGN - 1)
    assert bucket(found) == found


@some
@given(sizes=st.tuples(st.integers(1, 50_000), st.integers(1, 50_000)))
def test_bucket_is_monotone(sizes: tuple[int, int]) -> None:
    small, large = sorted(sizes)
    assert bucket(small) <= bucket(large)


def test_there_are_few_buckets() -> None:
    assert len({bucket(n) for n in range(1, 8193)}) < 40


# --- batches ------------------------------------------------------------------------------------


def test_collate_by_hand() -> None:
    batch = collate([row([10, 11, 12, 13], [0, 0, 1, 1]), row([20, 21, 22], [0, 1, 1])])
    assert batch.tokens.shape == (2, 32)
    assert batch.tokens[:, :5].tolist() == [[10, 11, 12, 0, 0], [20, 21, 0, 0, 0]]  # the last token is a target only
    assert batch.positions[:4].tolist() == [1, 2, 32, 33]
    assert batch.targets[:4].tolist() == [12, 13, 21, 22]
    assert batch.sequence[:4].tolist() == [0, 0, 1, 1]
    assert batch.positions.shape == (32,) and batch.sequence[4:].tolist() == [2] * 28
    assert batch.lengths.tolist() == [2, 2]
    assert batch.prompt is None and batch.ref_logps is None and batch.advantages is None


def test_collate_marks_trained_prompts() -> None:
    batch = collate([row([1, 2, 3, 4], [0, 1, 1, 1], [0, 1, 0, 0]), row([5, 6, 7], [0, 0, 1])])
    assert batch.prompt is not None
    assert batch.prompt[:4].tolist() == [True, False, False, False] and not batch.prompt[4:].any().item()
    assert batch.lengths.tolist() == [2, 1]


def test_reference_is_carried_only_if_every_row_has_one() -> None:
    rows = [example(seed, reference=True) for seed in range(2)]
    column = collate(rows).ref_logps
    assert column is not None
    whole = np.concatenate([r.ref_logps for r in rows if r.ref_logps is not None])
    np.testing.assert_array_equal(np.array(column)[: len(whole)], whole)
    assert collate([rows[0], example(1)]).ref_logps is None


@some
@given(seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=6), train_prompt=st.booleans())
def test_collate_keeps_every_trained_token_and_its_context(seeds: list[int], train_prompt: bool) -> None:
    rows = [example(seed, train_prompt=train_prompt) for seed in seeds]
    batch = collate(rows)
    positions, targets, sequence = (np.array(a) for a in (batch.positions, batch.targets, batch.sequence))
    tokens, width = np.array(batch.tokens), batch.tokens.shape[1]
    assert width % ALIGN == 0 and len(positions) % ALIGN == 0
    for s, r in enumerate(rows):
        at = np.flatnonzero(sequence == s)
        position = positions[at] - s * width
        np.testing.assert_array_equal(position + 1, np.flatnonzero(r.loss_mask))
        np.testing.assert_array_equal(targets[at], r.tokens[r.loss_mask])
        np.testing.assert_array_equal(tokens[s, : len(r.tokens) - 1], r.tokens[:-1])
        assert batch.lengths[s].item() == completion_tokens(r)
    assert np.all(sequence[sum(int(r.loss_mask.sum()) for r in rows) :] == len(rows))


# --- micro-batches -------------------------------------------------------------------------------


def test_micro_batches_of_examples_and_pairs() -> None:
    a, b, c, d = (row([i, i, i + 1], [0, 1, 1], location=f"a.jsonl:{i}") for i in range(1, 5))
    micro = example_batch([a, b])
    assert micro.tokens == 6 and micro.rows == ("a.jsonl:1", "a.jsonl:2")
    pairs = pair_batch([Pair(a, b), Pair(c, d, preference_score=0.5)])
    assert pairs.batch.tokens[:, 0].tolist() == [1, 3, 2, 4]  # all chosen, then all rejected
    assert pairs.rows == ("a.jsonl:1", "a.jsonl:3") and pairs.tokens == 12
    assert pairs.batch.preference_score is not None and pairs.batch.preference_score.tolist() == [1.0, 0.5]
    assert pair_batch([Pair(a, b)]).batch.preference_score is None


def test_stream_counts_batches_from_its_start() -> None:
    seen = []

    def make(items: list[Example], number: int) -> object:
        seen.append(number)
        return example_batch(items)

    rows = [example(seed) for seed in range(5)]
    micros = list(islice(stream(rows, Order((1,) * 5, 2), make, start=2), 2))  # type: ignore[arg-type]
    assert seen == [2, 3] and [p.rows for p in micros] == [("rows.jsonl:5",), ("rows.jsonl:1", "rows.jsonl:2")]


@pytest.mark.parametrize(("count", "sizes"), [(4, [2, 2]), (5, [2, 2, 1]), (0, [])])
def test_grouped(count: int, sizes: list[int]) -> None:
    micro = example_batch([example(0)])
    assert [len(group) for group in grouped(iter([micro] * count), 2)] == sizes
