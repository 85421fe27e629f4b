"""One optimiser step: its metrics, the published AdamW, learning-rate schedules and the types of what is trained."""

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from mlxlora.adapters.prepare import prepare
from mlxlora.config.options import AdapterOptions, Training
from mlxlora.data.batching import collate
from mlxlora.errors import InputError
from mlxlora.models.modes import compute_cast
from mlxlora.objectives.supervised import sft
from mlxlora.objectives.terms import entropy
from mlxlora.training.optimizers import learning_rate, make_optimizer
from mlxlora.training.step import _sum_of_squares, make_step
from tests.support.tiny import dense, example, loss_and_gradient, numbers, quantized, shaken

BATCHES = [collate([example(seed), example(seed + 1)]) for seed in (0, 2, 4)]
LORA = AdapterOptions(num_layers=-1, rank=4, scale=2.0)


def adapted(make: Any = dense) -> Any:
    mx.random.seed(0)
    return shaken(prepare(make(), LORA))


@pytest.mark.usefixtures("eager")
def test_metrics_of_a_step() -> None:
    model, objective = adapted(), sft() + 0.0 * entropy()
    metrics = numbers(make_step(model, optim.SGD(0.5), objective)(BATCHES[0]))
    assert set(metrics) == {"loss", "nll", "entropy", "grad_norm", "learning_rate", "skipped"}
    assert metrics["loss"] == metrics["nll"] and metrics["learning_rate"] == 0.5
    assert 0 < metrics["entropy"] < math.log(96)


def test_shapes_are_compiled_once() -> None:
    step = make_step(adapted(), optim.SGD(0.1), sft())
    one, other = BATCHES[0], collate([example(seed) for seed in range(9)])
    for batch in (one, other, one, other):
        step(batch)
    assert step.compilations == 2


@pytest.mark.usefixtures("eager")
def test_adamw_is_the_published_one() -> None:
    """Loshchilov & Hutter (2019), algorithm 2, in float64: m̂ and v̂ are corrected, the decay is not part of the gradient."""
    rate, decay, b1, b2, epsilon = 1e-2, 0.1, 0.9, 0.999, 1e-8
    model = adapted()
    training = Training(optimizer="adamw", learning_rate=rate, weight_decay=decay)
    step = make_step(model, make_optimizer(training, 3), sft())
    theta = {name: np.array(p, np.float64) for name, p in tree_flatten(model.trainable_parameters())}
    m = {name: np.zeros_like(p) for name, p in theta.items()}
    v = {name: np.zeros_like(p) for name, p in theta.items()}
    for t, batch in enumerate(BATCHES, start=1):
        _, gradient = loss_and_gradient(model, sft(), batch)
        for name, g in gradient.items():
            g = np.array(g, np.float64)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            corrected = m[name] / (1 - b1**t), v[name] / (1 - b2**t)
            theta[name] = theta[name] - rate * decay * theta[name] - rate * corrected[0] / (np.sqrt(corrected[1]) + epsilon)
        step(batch)
    for name, p in tree_flatten(model.trainable_parameters()):
        np.testing.assert_allclose(p, theta[name], rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adafactor", "lion", "muon"])
def test_every_optimizer_lowers_the_loss(name: str) -> None:
    step = make_step(adapted(), make_optimizer(Training(optimizer=name, learning_rate=3e-3), 8), sft(), max_grad_norm=1.0)
    losses = [numbers(step(BATCHES[0]))["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 1e-3


def test_adam_has_no_decay() -> None:
    with pytest.raises(InputError, match=r"--weight-decay 0.1 has no effect on adam; use --optimizer adamw"):
        make_optimizer(Training(optimizer="adam", weight_decay=0.1), 10)


# --- schedules ----------------------------------------------------------------------------------

BY_HAND = {
    "constant": (Training(learning_rate=2.0), 4, [2, 2, 2, 2]),
    "warmup": (Training(learning_rate=2.0, warmup=2), 4, [0, 1, 2, 2]),
    "linear": (Training(learning_rate=2.0, lr_schedule="linear"), 4, [2, 1.5, 1, 0.5]),
    "linear, warmed up": (Training(learning_rate=2.0, lr_schedule="linear", warmup=2), 6, [0, 1, 2, 1.5, 1, 0.5]),
    "cosine": (Training(learning_rate=2.0, lr_schedule="cosine"), 4, [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5]),
    "cosine, warmed up": (Training(learning_rate=2.0, lr_schedule="cosine", warmup=1), 3, [0, 2, 1]),
    "warmup beyond the end": (Training(learning_rate=2.0, lr_schedule="linear", warmup=8), 4, [0, 0.25, 0.5, 0.75]),
}


@pytest.mark.parametrize(("training", "steps", "rates"), BY_HAND.values(), ids=BY_HAND.keys())
def test_schedule_by_hand(training: Training, steps: int, rates: list[float]) -> None:
    rate = learning_rate(training, steps)
    found = [rate(mx.array(t)).item() if callable(rate) else rate for t in range(steps)]
    np.testing.assert_allclose(found, rates, atol=1e-6)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(shape=st.sampled_from(["constant", "linear", "cosine"]), steps=st.integers(1, 60), warmup=st.integers(0, 70))
def test_a_schedule_rises_then_never_rises_again(shape: Any, steps: int, warmup: int) -> None:
    rate = learning_rate(Training(learning_rate=1e-3, lr_schedule=shape, warmup=warmup), steps)
    values = np.array(rate(mx.arange(steps))) if callable(rate) else np.full(steps, rate)
    assert np.all((values >= 0) & (values <= 1e-3 * (1 + 1e-6)))
    assert np.all(np.diff(values[: warmup + 1]) > 0) and np.all(np.diff(values[warmup:]) <= 1e-10)


@pytest.mark.usefixtures("eager")
def test_schedule_of_a_run() -> None:
    training = Training(optimizer="sgd", learning_rate=0.5, lr_schedule="linear", warmup=1)
    step = make_step(adapted(), make_optimizer(training, 3), sft())
    assert [numbers(step(BATCHES[0]))["learning_rate"] for _ in range(3)] == pytest.approx([0, 0.5, 0.25])


# --- types --------------------------------------------------------------------------------------


def bfloat16(make: Any = dense) -> Any:
    model = make()
    model.update(tree_map(lambda p: p.astype(mx.bfloat16) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters()))
    return prepare(model, LORA)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("make", [dense, lambda: quantized(dense)], ids=["dense", "four bits"])
def test_masters_stay_float32_and_the_model_computes_in_its_own_type(make: Any) -> None:
    model = bfloat16(make)
    cast = compute_cast(model)(model.trainable_parameters())
    assert {p.dtype for _, p in tree_flatten(cast)} == {mx.bfloat16}
    step = make_step(model, optim.SGD(1e-6), sft())
    before = dict(tree_flatten(tree_map(lambda p: mx.array(p), model.trainable_parameters())))
    for batch in BATCHES:
        assert math.isfinite(numbers(step(batch))["loss"])
    after = dict(tree_flatten(model.trainable_parameters()))
    assert {p.dtype for p in after.values()} == {mx.float32}
    moved = [name for name in after if name.endswith("lora_b") and mx.any(after[name] != before[name]).item()]
    assert len(moved) == sum(name.endswith("lora_b") for name in after)


@pytest.mark.usefixtures("eager")
def test_small_updates_are_not_lost_to_rounding() -> None:
    model = shaken(bfloat16())
    step = make_step(model, optim.SGD(1e-5), sft())
    before = {n: np.array(p) for n, p in tree_flatten(model.trainable_parameters())}
    step(BATCHES[0])
    moved = {n: np.abs(np.array(p) - before[n]).max() for n, p in tree_flatten(model.trainable_parameters())}
    rounding = {n: np.abs(p).max() * 2**-9 for n, p in before.items()}
    assert all(0 < moved[n] < rounding[n] for n in moved)


def test_nothing_is_cast_where_everything_is_trained() -> None:
    model = prepare(dense(), AdapterOptions(train_type="full", num_layers=-1))
    cast = compute_cast(model)(model.trainable_parameters())
    assert {p.dtype for _, p in tree_flatten(cast)} == {mx.float32}


def test_a_long_gradient_s_norm_is_summed_well() -> None:
    g = np.random.default_rng(0).normal(size=3_000_001).astype(np.float32)
    exact = np.square(g.astype(np.float64)).sum()
    assert _sum_of_squares(mx.array(g)).item() == pytest.approx(exact, rel=1e-5)  # one number after the other: 3e-3
