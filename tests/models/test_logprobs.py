"""The memory-bounded head against log_softmax over all positions: scores, entropies and gradients."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from mlxlora.adapters.prepare import prepare
from mlxlora.batch import Batch
from mlxlora.config.options import AdapterOptions
from mlxlora.data.batching import collate
from mlxlora.models.logprobs import scorer, token_logps
from tests.support.tiny import dense, distance, example, experts, quantized, shaken, softcapped, tied

BATCH = collate([example(seed) for seed in range(5)])
LORA: dict[str, Any] = {"num_layers": -1, "rank": 4, "scale": 2.0}


def lora(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    mx.random.seed(0)
    return shaken(prepare(make(), AdapterOptions(**LORA | options)))


HEADS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # the model, and how many trainable parameters its head reads
    "dense": (lambda: lora(dense), 0),
    "tied": (lambda: lora(tied), 0),
    "four bits": (lambda: lora(lambda: quantized(dense)), 0),
    "tied in four bits": (lambda: lora(lambda: quantized(tied)), 0),
    "soft-capped": (lambda: lora(softcapped), 0),
    "experts": (lambda: lora(experts), 0),
    "adapted": (lambda: lora(dense, lora_keys=("lm_head", "self_attn.q_proj")), 2),
    "adapted, four bits": (lambda: lora(lambda: quantized(dense), lora_keys=("lm_head",)), 2),
    "adapted by dora": (lambda: lora(dense, train_type="dora", lora_keys=("lm_head", "mlp.up_proj")), 3),
    "adapted and tied": (lambda: lora(tied, lora_keys=("model.embed_tokens", "self_attn.q_proj")), 2),
    "trained": (lambda: lora(dense, train_type="full"), 1),
    "trained and tied": (lambda: lora(tied, train_type="full"), 1),
    "trained and soft-capped": (lambda: lora(softcapped, train_type="full"), 1),
}


def plain(model: nn.Module, batch: Batch, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    """[N] log-probabilities and entropies by the definition."""
    logits = model(batch.tokens)
    logits = logits.reshape(-1, logits.shape[-1])[batch.positions].astype(dtype)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    real = batch.sequence < batch.sequences
    chosen = mx.take_along_axis(logps, batch.targets[:, None], axis=-1)[:, 0]
    return mx.where(real, chosen, 0), mx.where(real, -(mx.exp(logps) * logps).sum(axis=-1), 0)


def gradient(model: nn.Module, values: Callable[[], tuple[mx.array, mx.array]], entropy: float = 0.0) -> dict[str, mx.array]:
    """Of a weighted sum of log-probabilities and entropies, whose weights are all different."""

    def total(parameters: Any) -> mx.array:
        model.update(parameters)
        logps, entropies = values()
        weights = mx.arange(logps.shape[0]) % 7 - 2.5
        return (weights * logps).sum() + entropy * (mx.sin(weights) * entropies).sum()

    before = model.trainable_parameters()
    found = mx.grad(total)(before)
    mx.eval(found)
    model.update(before)
    return dict(tree_flatten(found))


@pytest.mark.parametrize("chunk", [7, 32, None])
@pytest.mark.parametrize(("make", "trainable"), HEADS.values(), ids=HEADS.keys())
def test_head_is_log_softmax(make: Callable[[], nn.Module], trainable: int, chunk: int | None) -> None:
    model = make()
    score = scorer(model, columns={"entropy": True}, chunk=chunk)
    assert score.split is not None and len(score.trainable) == trainable

    def bounded() -> tuple[mx.array, mx.array]:
        logps, batch = score(BATCH)
        assert batch.entropy is not None
        return logps, batch.entropy

    for ours, theirs in zip(bounded(), plain(model, BATCH), strict=True):
        assert ours.dtype == mx.float32
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
    for weight in (0.0, 1.0):
        ours, theirs = gradient(model, bounded, weight), gradient(model, lambda: plain(model, BATCH), weight)
        assert distance(ours, theirs) < 2e-5


@pytest.mark.parametrize(("make", "trainable"), HEADS.values(), ids=HEADS.keys())
def test_without_a_gradient(make: Callable[[], nn.Module], trainable: int) -> None:
    model = make()
    score = scorer(model, chunk=32)
    np.testing.assert_allclose(score(BATCH, gradient=False)[0], score(BATCH)[0], rtol=2e-6, atol=2e-6)


def test_a_watched_entropy_has_no_gradient() -> None:
    model = lora(dense)
    score = scorer(model, columns={"entropy": False}, chunk=32)

    def bounded() -> tuple[mx.array, mx.array]:
        logps, batch = score(BATCH)
        assert batch.entropy is not None
        return logps, batch.entropy

    np.testing.assert_allclose(bounded()[1], plain(model, BATCH)[1], rtol=2e-5, atol=2e-5)
    assert distance(gradient(model, bounded, 1.0), gradient(model, lambda: plain(model, BATCH))) < 2e-5


def test_model_without_a_head_of_its_own() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = mx.random.normal((96, 96), key=mx.random.key(0))

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.table[tokens]

    model = Bare()
    assert scorer(model).split is None
    np.testing.assert_allclose(token_logps(model, BATCH), plain(model, BATCH)[0], rtol=1e-5, atol=1e-5)


def test_dropout_does_not_hide_the_head() -> None:
    model = lora(dense, dropout=0.5)
    model.train()
    assert scorer(model).split is not None and model.training


@settings(max_examples=8, deadline=None, derandomize=True)
@given(temperature=st.floats(0.3, 3.0), seed=st.integers(0, 1000))
def test_temperature(temperature: float, seed: int) -> None:
    model, batch = MODEL, collate([example(seed)])
    logits = model(batch.tokens).reshape(-1, 96)[batch.positions] / temperature
    expected = mx.take_along_axis(logits - mx.logsumexp(logits, axis=-1, keepdims=True), batch.targets[:, None], axis=-1)[:, 0]
    ours = scorer(model, temperature=temperature)(batch)[0]
    np.testing.assert_allclose(ours, mx.where(batch.sequence < 1, expected, 0), rtol=1e-5, atol=2e-5)


MODEL = dense()


@pytest.mark.parametrize("make", [dense, tied, softcapped])
def test_bfloat16_loses_no_more_than_plain_bfloat16(make: Callable[[], nn.Module]) -> None:
    exact, rounded = make(), make()
    for model in (exact, rounded):
        model.freeze()
        model.layers[-1].unfreeze()  # type: ignore[union-attr]
        model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
    exact.update(tree_map(lambda p: p.astype(mx.float32), exact.parameters()))
    truth, logps = plain(exact, BATCH)[0], scorer(rounded, chunk=32)(BATCH)[0]
    usual = plain(rounded, BATCH, mx.bfloat16)[0].astype(mx.float32)
    assert logps.dtype == mx.float32
    assert mx.abs(logps - truth).mean().item() <= mx.abs(usual - truth).mean().item()
    score = scorer(rounded, chunk=32)
    ours = gradient(rounded, lambda: (score(BATCH)[0], mx.array(0.0)))
    theirs = gradient(rounded, lambda: plain(rounded, BATCH, mx.bfloat16))
    wanted = gradient(exact, lambda: plain(exact, BATCH))
    errors = [distance({n: g.astype(mx.float32) for n, g in found.items()}, wanted) for found in (ours, theirs)]
    assert errors[0] <= 1.05 * errors[1]


def test_a_probability_of_one_and_logits_of_minus_infinity() -> None:
    class Certain(nn.Module):
        def __call__(self, tokens: mx.array) -> mx.array:
            return mx.where(mx.arange(4)[None, None] == 2, 50.0, mx.array(-mx.inf)) + 0.0 * tokens[..., None]

    batch = BATCH._replace(targets=mx.full(BATCH.targets.shape, 2, mx.int32))
    assert mx.all(token_logps(Certain(), batch) == 0)
