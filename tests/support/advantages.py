"""Advantages of TRL that mlxlora does not have under a name of their own, for the goldens."""

from typing import Any

import numpy as np

from mlxlora.objectives.advantages import EPS, batch_centered, batch_std, centered, group_relative


def batch_scaled(rewards: Any, eps: float = EPS) -> np.ndarray:
    """A = (r − mean_group(r)) / (std_batch(r) + eps), TRL's scale_rewards="batch" (arXiv 2508.08221)."""
    return centered(rewards) / (batch_std(rewards) + eps)


def decoupled(rewards: Any, weights: Any, eps: float = EPS) -> np.ndarray:
    """A = z / (std_batch(z) + eps), z = Σ_k w_k · group_relative(r_k) − its batch mean, GDPO (arXiv 2601.05242).

    rewards [K, prompts, G], one slice for each reward function; weights [K] -> [prompts, G]. TRL's
    multi_objective_aggregation="normalize_then_sum".
    """
    rewards, weights = np.asarray(rewards, np.float64), np.asarray(weights, np.float64)
    summed = sum(w * group_relative(r, eps) for w, r in zip(weights, rewards, strict=True))
    summed = np.where(np.isnan(rewards).all(axis=0), np.nan, summed)
    return batch_centered(summed) / (batch_std(summed) + eps)
