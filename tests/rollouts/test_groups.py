"""Metrics of groups: they pool over micro-batches as if these were one batch, and None counts nowhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlora.data.pooled import pooled, results
from mlxlora.data.tokenize import Prompt
from mlxlora.distributed.ranks import ALONE
from mlxlora.rollouts.engine import Completion
from mlxlora.rollouts.groups import CompletionGroup, Gathered, NoneWatch, completion_metrics, gathered, reward_metrics
from mlxlora.rollouts.rewards import NamedReward, call_rewards, combine, load_rewards

NONE = Path(__file__).parents[3] / "shared" / "field" / "grpo_none_rewards"


def found(rewards: Any, parts: Any = (), lengths: Any = None, finished: Any = None) -> Gathered:
    rewards = np.array(rewards, float)
    lengths = np.ones(rewards.size) if lengths is None else np.array(lengths, float)
    return Gathered(rewards, np.array(parts, float), lengths, lengths > 0 if finished is None else np.array(finished))


def named(*names: str) -> tuple[NamedReward, ...]:
    return tuple(NamedReward(name, lambda **_: []) for name in names)


def test_lengths_and_speed() -> None:
    whole = found([[0, 0], [0, 0]], lengths=[9, 3, 3, 3], finished=[False, True, True, True])
    assert results(completion_metrics(whole, seconds=2.0)) == {
        "completions/mean_length": 4.5,
        "completions/min_length": 3.0,
        "completions/max_length": 9.0,
        "completions/clipped_ratio": 0.25,
        "rollout_tokens_per_second": 9.0,
    }


def test_micro_batches_of_a_step_are_one_batch() -> None:
    """Min, max and standard deviation of all completions, not means of those of the micro-batches."""
    first, second = (found([[0, 1]], lengths=[2, 9]), found([[1, 5]], lengths=[4, 5]))
    seen = results(
        pooled(
            [
                completion_metrics(first, 1.0) | reward_metrics(first, ()),
                completion_metrics(second, 1.0) | reward_metrics(second, ()),
            ]
        )
    )
    assert (seen["completions/min_length"], seen["completions/max_length"], seen["completions/mean_length"]) == (2, 9, 5)
    assert seen["reward_std"] == pytest.approx(np.std([0, 1, 1, 5], ddof=1))
    assert seen["group_reward_std"] == pytest.approx(np.mean([np.std([0, 1], ddof=1), np.std([1, 5], ddof=1)]))
    assert seen["rollout_tokens_per_second"] == 10


@given(
    values=st.lists(st.lists(st.none() | st.floats(-9, 9), min_size=4, max_size=4), min_size=1, max_size=6),
    cut=st.integers(1, 5),
)
@settings(deadline=None)
def test_a_reward_counts_where_it_is(values: list[list[float | None]], cut: int) -> None:
    rewards, names = np.array(values, float), named("r")
    parts = [p for p in (rewards[:cut], rewards[cut:]) if len(p)]
    seen = results(pooled(reward_metrics(found(p, [p.reshape(-1)]), names) for p in parts))
    present = rewards[~np.isnan(rewards)]
    if not present.size:
        assert seen == {}
        return
    assert seen["reward"] == seen["rewards/r/mean"] == pytest.approx(present.mean(), abs=1e-9)
    deviation = present.std(ddof=1) if present.size > 1 else 0.0
    assert seen["reward_std"] == seen["rewards/r/std"] == pytest.approx(deviation, abs=1e-7)


def test_rewards_for_other_rows(tmp_path: Path) -> None:
    """Functions for some kinds of rows: the mean is over these rows, whatever batch they come in."""
    file = tmp_path / "rewards.py"
    file.write_text(
        "def math_only(prompts, completions, kind, **_):\n    return [1.0 if k == 'math' else None for k in kind]\n\n"
        "def code_only(prompts, completions, kind, **_):\n    return [0.5 if k == 'code' else None for k in kind]\n\n"
        "def never(prompts, completions, **_):\n    return [None] * len(completions)\n"
    )
    if NONE.exists():
        file.write_text(next(NONE.glob("*.py")).read_text())
    rewards = load_rewards(["math_only,code_only,never"], str(file))
    batches = []
    for kind in ("code", "math", "code", "math"):  # one prompt a batch
        columns = {"kind": [kind] * 2}
        answers = call_rewards(
            rewards, prompts=["p"] * 2, completions=["c"] * 2, completion_ids=[[1]] * 2, columns=columns, locations=["d:1"] * 2
        )
        total = combine(answers, [r.weight for r in rewards])
        batches.append(reward_metrics(Gathered(total[None], answers, np.ones(2), np.ones(2) > 0), rewards))
    seen = results(pooled(batches))
    assert seen["rewards/math_only/mean"] == 1 and seen["rewards/code_only/mean"] == 0.5 and seen["reward"] == 0.75
    assert not any("never" in name for name in seen)


def test_a_reward_that_is_always_none_is_told_once() -> None:
    told: list[str] = []
    watch, names = NoneWatch(enough=6), named("never", "late", "some")
    none = np.nan
    for late in (none, none, none, 1.0, none):
        watch.look(found([[0, 0]], [[none, none], [late, none], [1, none]]), names, told.append)
    assert told == [
        "reward never returned None for all of the first 6 completions; check its columns and rows",
        "reward late returned None for all of the first 6 completions; check its columns and rows",
    ]


def test_gathered_groups_keep_their_order() -> None:
    def group(base: float) -> CompletionGroup:
        made = [Completion(np.zeros(int(base) + n + 1, np.int32), np.zeros(1, np.float32), finished=n == 0) for n in range(2)]
        return CompletionGroup(
            Prompt(np.zeros(1, np.int32), {}, "d:1", "p"), made, ["", ""], np.array([[base, base + 1]]), np.array([base, base + 2])
        )

    whole = gathered([group(0), group(3)], ALONE, 2, 1)
    assert whole.rewards.tolist() == [[0, 2], [3, 5]] and whole.parts.tolist() == [[0, 1, 3, 4]]
    assert whole.lengths.tolist() == [1, 2, 4, 5] and whole.finished.tolist() == [True, False, True, False]
