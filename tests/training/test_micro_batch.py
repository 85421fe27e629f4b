"""Dividing a batch: the pieces are the batch, and as many as fit are taken."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlxlora.adapters.prepare import prepare
from mlxlora.config.options import AdapterOptions
from mlxlora.data.batching import example_batch, pair_batch
from mlxlora.data.tokenize import Example, Pair
from mlxlora.objectives.objective import Objective
from mlxlora.objectives.preference import dpo
from mlxlora.objectives.supervised import sft
from mlxlora.training.micro_batch import BatchDivider, cost_of_position, divide_batch, position_count
from mlxlora.training.step import make_step
from mlxlora.utils.device import limit_memory, memory_limit, out_of_memory
from tests.support.tiny import dense


def example(rng: np.random.Generator, prompt: np.ndarray, ref: bool = False) -> Example:
    own = rng.integers(1, 90, rng.integers(1, 9))
    tokens = np.concatenate([prompt, own]).astype(np.int32)
    loss_mask = np.arange(len(tokens)) >= len(prompt)
    logps = -rng.random(int(loss_mask.sum())).astype(np.float32) if ref else None
    return Example(tokens, loss_mask, None, "rows:1", ref_logps=logps)


def rows(count: int, seed: int):
    rng = np.random.default_rng(seed)
    return example_batch([example(rng, rng.integers(1, 90, rng.integers(1, 40))) for _ in range(count)])


def pairs(count: int, seed: int, *, share: bool):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 90, rng.integers(2, 40)) for _ in range(count)]
    return pair_batch(
        [Pair(example(rng, p, True), example(rng, p, True), float(i + 1)) for i, p in enumerate(prompts)], share=share
    )


PIECES = {
    "rows": (rows, sft()),
    "pairs": (lambda n, seed: pairs(n, seed, share=False), dpo()),
    "shared pairs": (lambda n, seed: pairs(n, seed, share=True), dpo()),
}


def update(objective: Objective, batches) -> tuple[dict[str, float], list[np.ndarray]]:
    mx.random.seed(1)
    model = prepare(dense(), AdapterOptions(num_layers=-1, rank=2))
    metrics = make_step(model, optim.SGD(1.0), objective).measured(*batches)
    return metrics, [np.array(v) for _, v in sorted(tree_flatten(model.trainable_parameters()))]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("parts", [2, 3, 9])
def test_pieces_give_the_update_of_the_batch(kind: str, parts: int) -> None:
    make, objective = PIECES[kind]
    micro = make(5, 0)
    some = divide_batch(micro, parts)
    assert len(some) == min({2: 2, 3: 3, 9: 5}[parts], 5)
    (whole, weights), (found, moved) = update(objective, [micro.batch]), update(objective, [p.batch for p in some])
    assert found == pytest.approx(whole, rel=1e-5, abs=1e-6)
    for a, b in zip(moved, weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(kind=st.sampled_from(list(PIECES)), count=st.integers(1, 7), parts=st.integers(1, 8), seed=st.integers(0, 99))
def test_no_scored_token_is_lost(kind: str, count: int, parts: int, seed: int) -> None:
    micro = PIECES[kind][0](count, seed)

    def tokens(batch):
        return sorted(np.array(batch.targets)[np.array(batch.sequence) < batch.sequences].tolist())

    some = divide_batch(micro, parts)
    assert sorted(t for p in some for t in tokens(p.batch)) == tokens(micro.batch)
    assert sum(p.batch.sequences for p in some) == micro.batch.sequences
    again = [q for p in some for q in divide_batch(p, 2)]  # pieces of pieces are pieces
    assert sorted(t for p in again for t in tokens(p.batch)) == tokens(micro.batch)


def test_as_many_as_fit() -> None:
    micro = rows(8, 3)
    each = position_count(micro.batch) / 8
    held = mx.get_active_memory()
    assert len(BatchDivider(held + int(100 * 8 * each), cost=50.0)([micro])) == 1
    assert len(BatchDivider(held + int(100 * 2.5 * each), cost=100.0)([micro])) == 4
    assert len(BatchDivider(held, cost=100.0)([micro])) == 8  # nothing fits: one at a time
    assert len(BatchDivider(0, cost=1.0, rows=3)([micro])) == 3
    assert len(BatchDivider(held, cost=100.0, largest=position_count(micro.batch))([micro])) == 1  # it has passed before


def test_what_was_measured_replaces_the_estimate() -> None:
    micro = rows(8, 3)
    divider = BatchDivider(mx.get_active_memory() + (1 << 30), cost=(1 << 30) / position_count(micro.batch) * 2)
    assert len(found := divider([micro])) == 2
    kept = mx.zeros((1 << 20,))
    mx.eval(kept)
    divider.learn()
    assert divider.largest == max(position_count(p.batch) for p in found) and divider.peak >= kept.nbytes
    assert len(divider([micro])) == 1  # the step was far cheaper than estimated


def test_an_estimate_is_of_the_right_size() -> None:
    model = prepare(dense(), AdapterOptions(num_layers=-1, rank=2))
    plain, recomputed = cost_of_position(model, recomputed=False), cost_of_position(model, recomputed=True)
    assert 0 < recomputed < plain


def test_the_limit_is_set() -> None:
    before = memory_limit()
    try:
        assert limit_memory(1.5) == memory_limit() == 1_500_000_000
        assert 0 < limit_memory() < 1 << 50
    finally:
        mx.set_memory_limit(before)


def test_errors_of_the_allocator_are_told_from_others() -> None:
    assert out_of_memory(RuntimeError("cudaMallocAsync(&buf, size) failed: out of memory"))
    assert not out_of_memory(ValueError("out of memory")) and not out_of_memory(RuntimeError("[matmul] shapes"))
