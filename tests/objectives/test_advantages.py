"""Advantages against hand-computed values, laws, and TRL's own numbers."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mlxlora.objectives import advantages as adv
from mlxlora.rollouts.rewards import combine
from tests.support.advantages import batch_scaled, decoupled

GOLDENS = Path(__file__).resolve().parents[3] / "shared" / "parity" / "loss_goldens.json"
GROUP_WISE = (adv.centered, adv.group_relative, batch_scaled, adv.leave_one_out)
ALL = (*GROUP_WISE, adv.batch_centered)
NAN = float("nan")

# scale_rewards in TRL -> ours
SCALED = {"group": adv.group_relative, "batch": batch_scaled, "none": adv.centered}


def cases():
    return json.loads(GOLDENS.read_text())["grpo_advantages"] if GOLDENS.exists() else []


def ours(case) -> np.ndarray:
    """Advantages of a configuration of TRL (mask_truncated_completions changes the mask, not the advantage)."""
    rewards = np.array(case["rewards"], dtype=np.float64).T
    weights = case["config"].get("reward_weights", [1.0] * len(rewards))
    group = (-1, case["num_generations"])
    if "multi_objective_aggregation" in case["config"]:
        slices = mx.array(rewards.astype(np.float32)).reshape(len(rewards), *group)
        return np.array(decoupled(slices, mx.array(weights))).ravel()
    total = mx.array(combine(rewards, weights).astype(np.float32)).reshape(group)
    return np.array(SCALED[case["config"].get("scale_rewards", "group")](total)).ravel()


@pytest.mark.skipif(not GOLDENS.exists(), reason="TRL's goldens (shared/parity) are not here")
def test_the_goldens_are_all_there():
    assert len(cases()) == 15


@pytest.mark.parametrize("case", cases(), ids=lambda case: case["name"])
def test_trl(case):
    np.testing.assert_allclose(ours(case), case["advantages"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case["name"])
def test_trl_fraction_without_signal(case):
    if case["config"].get("scale_rewards") == "batch":
        pytest.skip("TRL's fraction is of the batch's std there; ours is of groups whatever they are divided by")
    rewards = np.array(case["rewards"], dtype=np.float64).T
    total = combine(rewards, case["config"].get("reward_weights", [1.0] * len(rewards)))
    flat = adv.no_signal(mx.array(total.astype(np.float32)).reshape(-1, case["num_generations"]))
    assert flat.mean().item() == case["metrics"]["frac_reward_zero_std"]


def test_by_hand():
    rewards = mx.array([[3.0, 1.0, 2.0], [5.0, 5.0, NAN]])
    assert adv.centered(rewards).tolist() == [[1, -1, 0], [0, 0, 0]]
    np.testing.assert_allclose(adv.group_relative(rewards, eps=1.0), [[0.5, -0.5, 0], [0, 0, 0]])
    assert adv.leave_one_out(rewards).tolist() == [[1.5, -1.5, 0], [0, 0, 0]]
    np.testing.assert_allclose(adv.batch_centered(rewards), [[-0.2, -2.2, -1.2], [1.8, 1.8, 0]], rtol=1e-6)
    deviation = np.std([3, 1, 2, 5, 5], ddof=1)
    np.testing.assert_allclose(batch_scaled(rewards, eps=0.0), [[1 / deviation, -1 / deviation, 0], [0, 0, 0]], rtol=1e-6)


def test_decoupled_gives_every_function_its_scale():
    a, b = [[0.0, 1.0, 0.0, 1.0], [1.0, 0.5, 0.0, 0.0]], [[0.3, 0.2, 0.1, 0.9], [0.4, 0.1, 0.2, 0.3]]
    weights = mx.array([1.0, 0.5])
    once = decoupled(mx.array([a, b]), weights, eps=0.0)
    np.testing.assert_allclose(decoupled(mx.array([a, (100 * np.array(b)).tolist()]), weights, eps=0.0), once, rtol=1e-4)
    np.testing.assert_allclose(np.std(np.array(once), ddof=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("advantage", ALL)
def test_no_reward_at_all_and_one_reward_alone(advantage):
    assert advantage(mx.array([[NAN, NAN], [NAN, NAN]])).tolist() == [[0, 0], [0, 0]]
    assert advantage(mx.array([[NAN, 7.0]])).tolist() == [[0, 0]]


@pytest.mark.parametrize("advantage", ALL)
def test_equal_rewards_give_exactly_zero(advantage):
    for value in (0.1, 1e6 + 0.3, -1 / 3):
        assert not advantage(mx.full((3, 7), value)).any()


@pytest.mark.parametrize("kind", [np.float64, np.float32])
@pytest.mark.parametrize(
    "middle", [[0.1, 0.2, 0.3], [0.7, 0.7 + 1e-3, 0.7 + 2e-3], [1e6, 1e6 + 1, 1e6 + 2], [-1 / 3, 0.0, 1 / 3]], ids=str
)
def test_a_reward_that_equals_the_mean_has_no_advantage(middle, kind):
    """Not even of rounding size, which Adam would amplify where every other advantage is 0."""
    for advantage in ALL:
        low, zero, high = advantage(np.array([middle], kind))[0]
        assert zero == 0 and low < 0 < high


rewards = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
    elements=st.one_of(st.floats(-8, 8, width=32).map(lambda value: round(value, 2)), st.just(NAN)),
)


@settings(deadline=None, max_examples=60)
@given(rewards)
def test_laws(values):
    absent, flat = np.isnan(values), np.array(adv.no_signal(mx.array(values)))
    for advantage in ALL:
        result = np.array(advantage(mx.array(values)))
        assert np.isfinite(result).all() and not result[absent].any()
    for advantage in GROUP_WISE:
        result = np.array(advantage(mx.array(values)))
        np.testing.assert_allclose(result.sum(axis=-1), 0, atol=1e-3)
        assert not result[flat].any()
    shifted = adv.group_relative(mx.array(values + np.float32(16)))
    np.testing.assert_allclose(shifted, adv.group_relative(mx.array(values)), atol=2e-2)
