"""Advantages: how much better a completion is than expected, [prompts, G] -> [prompts, G].

r = rewards[prompt, completion], float32; NaN is no reward: it is left out of every mean and std, and its advantage is 0.
n counts the rewards that are there. std is the unbiased one (ddof = 1), 0 for a single reward.
"""

from collections.abc import Callable

import mlx.core as mx

EPS = 1e-4
Advantage = Callable[[mx.array], mx.array]


def centered(rewards: mx.array) -> mx.array:
    """A = r − mean_group(r), Dr. GRPO (arXiv 2503.20783).

    >>> centred(mx.array([[1.0, 0.0, 0.5, float("nan")]])).tolist()
    [[0.5, -0.5, 0.0, 0.0]]
    """
    return _deviations(rewards, -1)[0]


def group_relative(rewards: mx.array, eps: float = EPS) -> mx.array:
    """A = (r − mean_group(r)) / (std_group(r) + eps), GRPO (arXiv 2402.03300, section 4.1.2).

    >>> [round(a, 2) for a in group_relative(mx.array([[1.0, 0.0, 1.0, 0.0]]))[0].tolist()]
    [0.87, -0.87, 0.87, -0.87]
    """
    return centered(rewards) / (group_std(rewards) + eps)


def batch_scaled(rewards: mx.array, eps: float = EPS) -> mx.array:
    """A = (r − mean_group(r)) / (std_batch(r) + eps), TRL's scale_rewards="batch" (arXiv 2508.08221)."""
    return centered(rewards) / (batch_std(rewards) + eps)


def leave_one_out(rewards: mx.array) -> mx.array:
    """A_i = r_i − mean_{j≠i}(r_j) = n/(n − 1) · (r_i − mean_group(r)), RLOO (arXiv 2402.14740); 0 for a single reward.

    >>> leave_one_out(mx.array([[3.0, 1.0, 2.0]])).tolist()
    [[1.5, -1.5, 0.0]]
    """
    deviations, count = _deviations(rewards, -1)
    return deviations * (count / mx.maximum(count - 1, 1))


def batch_centered(rewards: mx.array) -> mx.array:
    """A = r − mean_batch(r), REINFORCE with the batch's mean as baseline (Williams 1992): groups of equal rewards count too."""
    return _deviations(rewards, None)[0]


def decoupled(rewards: mx.array, weights: mx.array, eps: float = EPS) -> mx.array:
    """A = z / (std_batch(z) + eps), z = Σ_k w_k · group_relative(r_k) − its batch mean, GDPO (arXiv 2601.05242).

    rewards [K, prompts, G], one slice per reward function; weights [K] -> [prompts, G]. Every function keeps its own scale
    of good and bad, where adding up rewards first lets the widest one win. TRL's multi_objective_aggregation="normalize_then_sum".
    """
    summed = mx.sum(weights[:, None, None] * group_relative(rewards, eps), axis=0)
    deviations, count = _deviations(mx.where(mx.isnan(rewards).all(axis=0), mx.nan, summed), None)
    return deviations / (_std(deviations, count, None) + eps)


def group_std(rewards: mx.array) -> mx.array:
    """[prompts, 1]: the standard deviation of each group's rewards."""
    return _std(*_deviations(rewards, -1), -1)


def batch_std(rewards: mx.array) -> mx.array:
    """[1, 1]: the standard deviation of all rewards."""
    return _std(*_deviations(rewards, None), None)


BASELINES: dict[str, Advantage] = {"group": centered, "leave_one_out": leave_one_out, "batch": batch_centered}
SCALES: dict[str, Advantage] = {
    "group": lambda rewards: group_std(rewards) + EPS,
    "batch": lambda rewards: batch_std(rewards) + EPS,
    "none": lambda _: mx.array(1.0),
}


def advantage(baseline: str = "group", scale: str = "group") -> Advantage:
    """A = (r − b) / s: b a name of `BASELINES`, s of `SCALES`.

    group, group is GRPO; group, none Dr. GRPO; leave_one_out, none RLOO; batch, none REINFORCE with a mean baseline; batch, batch
    REINFORCE++ (arXiv 2501.03262).

    >>> advantage("leave_one_out", "none")(mx.array([[3.0, 1.0, 2.0]])).tolist()
    [[1.5, -1.5, 0.0]]
    """
    subtract, measure = BASELINES[baseline], SCALES[scale]
    return lambda rewards: subtract(rewards) / measure(rewards)


def no_signal(rewards: mx.array, tolerance: float = 1e-6) -> mx.array:
    """[prompts] bool: all rewards of the group are equal, or there are none, so every group-wise advantage is 0.

    Its mean is the metric `frac_reward_zero_std`.

    >>> no_signal(mx.array([[1.0, 1.0], [1.0, 0.0], [float("nan"), 1.0]])).tolist()
    [True, False, True]
    """
    absent = mx.isnan(rewards)
    highest = mx.where(absent, -mx.inf, rewards).max(axis=-1)
    lowest = mx.where(absent, mx.inf, rewards).min(axis=-1)
    return highest - lowest <= tolerance


def _deviations(rewards: mx.array, axis: int | None) -> tuple[mx.array, mx.array]:
    """(r − mean, 0 where there is no reward; n). The maximum goes first, so that equal rewards give exactly 0."""
    present = mx.logical_not(mx.isnan(rewards))
    count = present.astype(mx.float32).sum(axis=axis, keepdims=True)
    highest = mx.where(present, rewards, -mx.inf).max(axis=axis, keepdims=True)
    below = mx.where(present, rewards - highest, 0.0)
    mean = below.sum(axis=axis, keepdims=True) / mx.maximum(count, 1)
    return mx.where(present, below - mean, 0.0), count


def _std(deviations: mx.array, count: mx.array, axis: int | None) -> mx.array:
    return mx.sqrt(mx.square(deviations).sum(axis=axis, keepdims=True) / mx.maximum(count - 1, 1))
