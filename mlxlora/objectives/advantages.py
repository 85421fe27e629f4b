"""Advantages: how much better a completion is than expected, rewards [prompts, G] -> [prompts, G].

They are computed on the host in float64. r = rewards[prompt, completion]; NaN is no reward: it is left out of every mean and
standard deviation, and its advantage is 0. n counts the rewards that are there. The standard deviation is the unbiased one
(ddof = 1), 0 for a single reward. A reward that equals its baseline, to float32 rounding, has the advantage 0 exactly.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

EPS = 1e-4
Advantage = Callable[[np.ndarray], np.ndarray]
_ROUNDING = float(np.finfo(np.float32).eps)  # relative; an advantage of rounding errors alone would be amplified by Adam


def centered(rewards: Any) -> np.ndarray:
    """A = r − mean_group(r), Dr. GRPO (arXiv 2503.20783).

    >>> centered(np.array([[1.0, 0.0, 0.5, float("nan")]])).tolist()
    [[0.5, -0.5, 0.0, 0.0]]
    """
    return _deviations(rewards, -1)[0]


def group_relative(rewards: Any, eps: float = EPS) -> np.ndarray:
    """A = (r − mean_group(r)) / (std_group(r) + eps), GRPO (arXiv 2402.03300, section 4.1.2).

    >>> group_relative(np.array([[1.0, 0.0, 1.0, 0.0]])).round(2).tolist()
    [[0.87, -0.87, 0.87, -0.87]]
    """
    return centered(rewards) / (group_std(rewards) + eps)


def leave_one_out(rewards: Any) -> np.ndarray:
    """A_i = r_i − mean_{j≠i}(r_j) = n/(n − 1) · (r_i − mean_group(r)), RLOO (arXiv 2402.14740); 0 for a single reward.

    >>> leave_one_out(np.array([[3.0, 1.0, 2.0]])).tolist()
    [[1.5, -1.5, 0.0]]
    """
    deviations, count = _deviations(rewards, -1)
    return deviations * (count / np.maximum(count - 1, 1))


def batch_centered(rewards: Any) -> np.ndarray:
    """A = r − mean_batch(r), REINFORCE with the batch's mean as baseline (Williams 1992): groups of equal rewards count too."""
    return _deviations(rewards, None)[0]


def group_std(rewards: Any) -> np.ndarray:
    """[prompts, 1]: the standard deviation of each group's rewards."""
    return _std(*_deviations(rewards, -1), -1)


def batch_std(rewards: Any) -> np.ndarray:
    """[1, 1]: the standard deviation of all rewards."""
    return _std(*_deviations(rewards, None), None)


BASELINES: dict[str, Advantage] = {"group": centered, "leave_one_out": leave_one_out, "batch": batch_centered}
SCALES: dict[str, Advantage] = {
    "group": lambda rewards: group_std(rewards) + EPS,
    "batch": lambda rewards: batch_std(rewards) + EPS,
    "none": lambda rewards: np.array(1.0),
}


def advantage(baseline: str = "group", scale: str = "group") -> Advantage:
    """A = (r − b) / s: b a name of `BASELINES`, s of `SCALES`.

    group, group is GRPO; group, none Dr. GRPO; leave_one_out, none RLOO; batch, none REINFORCE with a mean baseline; batch, batch
    REINFORCE++ (arXiv 2501.03262).

    >>> advantage("leave_one_out", "none")(np.array([[3.0, 1.0, 2.0]])).tolist()
    [[1.5, -1.5, 0.0]]
    """
    subtract, measure = BASELINES[baseline], SCALES[scale]
    return lambda rewards: subtract(rewards) / measure(rewards)


def no_signal(rewards: Any, tolerance: float = 1e-6) -> np.ndarray:
    """[prompts] bool: all rewards of the group are equal, or there are none, so every group-wise advantage is 0.

    Its mean is the metric `frac_reward_zero_std`.

    >>> no_signal(np.array([[1.0, 1.0], [1.0, 0.0], [float("nan"), 1.0]])).tolist()
    [True, False, True]
    """
    rewards = np.asarray(rewards, np.float64)
    absent = np.isnan(rewards)
    highest = np.where(absent, -np.inf, rewards).max(axis=-1)
    lowest = np.where(absent, np.inf, rewards).min(axis=-1)
    return highest - lowest <= tolerance


def _deviations(rewards: Any, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(r − mean, 0 where there is no reward; n)."""
    rewards = np.asarray(rewards, np.float64)
    present = ~np.isnan(rewards)
    known = np.where(present, rewards, 0.0)
    count = present.sum(axis=axis, keepdims=True)
    deviations = known - known.sum(axis=axis, keepdims=True) / np.maximum(count, 1)
    rounding = _ROUNDING * np.abs(known).max(axis=axis, keepdims=True, initial=0.0)
    return np.where(present & (np.abs(deviations) > rounding), deviations, 0.0), count


def _std(deviations: np.ndarray, count: np.ndarray, axis: int | None) -> np.ndarray:
    return np.sqrt(np.square(deviations).sum(axis=axis, keepdims=True) / np.maximum(count - 1, 1))
