"""RLOO and REINFORCE with a baseline: their advantages, and that their expected gradient is the reward's."""

from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlxlora.batch import Batch
from mlxlora.objectives.advantages import BASELINES, SCALES, advantage, centered, group_relative
from mlxlora.objectives.grpo import rloo
from tests.support.advantages import batch_scaled

REWARDS = np.array([1.0, -0.5, 3.0], np.float32)
LOGITS = np.array([0.3, -1.0, 0.8], np.float32)


@given(arrays(np.float32, (3, 4), elements=st.floats(-8, 8, width=32).map(lambda value: round(value, 2))))
@settings(deadline=None, max_examples=30)
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(rewards: np.ndarray) -> None:
    others = [[np.delete(group, i).mean() for i in range(4)] for group in rewards]
    np.testing.assert_allclose(advantage("leave_one_out", "none")(mx.array(rewards)), rewards - others, atol=1e-4)
    np.testing.assert_allclose(advantage("batch", "none")(mx.array(rewards)), rewards - rewards.mean(), atol=1e-4)


def test_every_baseline_goes_with_every_scale() -> None:
    rewards = mx.array([[1.0, 0.0, 2.0], [4.0, 4.0, 1.0]])
    known = {("group", "group"): group_relative, ("group", "batch"): batch_scaled, ("group", "none"): centered}
    for names in product(BASELINES, SCALES):
        found = advantage(*names)(rewards)
        assert found.shape == rewards.shape
        if names in known:
            np.testing.assert_allclose(found, known[names](rewards), rtol=1e-6)


def batch_of(tokens: tuple[int, ...], advantages: mx.array) -> Batch:
    """One-token completions."""
    n = len(tokens)
    numbers = mx.arange(n)
    return Batch(
        mx.zeros((n, 1), mx.int32), numbers, mx.array(tokens), numbers, mx.ones((n,), mx.int32), advantages=advantages.reshape(-1),
        entropy=mx.zeros((n,)),
    )  # fmt: skip


def expected_gradient(baseline: str, prompts: int, group: int) -> np.ndarray:
    """E[∇loss] over all that a policy of three one-token answers may sample, exactly."""
    chances = np.exp(LOGITS) / np.exp(LOGITS).sum()
    total = np.zeros(3)
    for tokens in product(range(3), repeat=prompts * group):
        rewards = mx.array(REWARDS[list(tokens)].reshape(prompts, group))
        batch = batch_of(tokens, mx.array(advantage(baseline, "none")(rewards).astype(np.float32)))

        def loss(logits: mx.array, batch: Batch = batch) -> mx.array:
            return rloo(beta=0.0)((logits - mx.logsumexp(logits))[batch.targets], batch)[0]

        total += chances[list(tokens)].prod() * np.array(mx.grad(loss)(mx.array(LOGITS)))
    return total


@pytest.mark.parametrize(
    ("baseline", "prompts", "group", "factor"),
    [
        ("leave_one_out", 1, 2, 1.0),
        ("leave_one_out", 1, 3, 1.0),
        ("leave_one_out", 2, 2, 1.0),
        ("group", 1, 3, 2 / 3),  # a mean that includes the reward itself takes 1/G of it away
        ("batch", 2, 2, 3 / 4),
        ("batch", 3, 1, 2 / 3),
    ],
)
def test_the_expected_gradient_is_the_rewards(baseline: str, prompts: int, group: int, factor: float) -> None:
    chances = np.exp(LOGITS) / np.exp(LOGITS).sum()
    of_reward = chances * (REWARDS - chances @ REWARDS)  # ∇ Σ π r
    np.testing.assert_allclose(expected_gradient(baseline, prompts, group), -factor * of_reward, atol=1e-5)


REWARD_FILE = "def spread(completion_ids):\n    return [sum(ids) % 97 / 97 for ids in completion_ids]\n"


@pytest.fixture
def command(model_folder: Path, tmp_path: Path) -> tuple[Any, ...]:
    rows = [{"prompt": "abc" * n} for n in range(1, 6)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    (tmp_path / "rewards.py").write_text(REWARD_FILE)
    sizes = ("--iters", 2, "--batch-size", 2, "--group-size", 3, "--max-completion-length", 6, "--steps-per-report", 1)
    rewards = ("--reward-file", tmp_path / "rewards.py", "--rewards", "spread", "--loss-type", "reinforce")
    return "grpo", "--model", model_folder, "--data", tmp_path / "rows.jsonl", "--adapter-path", tmp_path / "run", *sizes, *rewards


@pytest.mark.parametrize(
    "options",
    [("--baseline", "leave_one_out", "--scale-rewards", "none"), ("--baseline", "batch", "--group-size", 1, "--batch-size", 5)],
    ids=str,
)
def test_it_trains(options: tuple, command: tuple, tmp_path: Path, mlxlora: Any) -> None:
    outcome = mlxlora(*command, *options)
    assert outcome.code == 0, outcome.err
    found = [orjson.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    assert all(np.isfinite([r["loss"], r["grad_norm"]]).all() and r["grad_norm"] > 0 for r in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-iterations", 2), "--loss-type reinforce needs --num-iterations 1"),
        (("--group-size", 1), "--group-size must be >= 2, got 1; --baseline batch can do with 1"),
    ],
)
def test_mistakes(options: tuple, message: str, command: tuple, mlxlora: Any) -> None:
    outcome = mlxlora(*command, *options)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err
