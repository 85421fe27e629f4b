"""Groups of rewarded completions: their metrics over all ranks, and samples for people to read."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from attrs import frozen

from ..data.tokenize import Prompt
from ..distributed.ranks import Ranks
from ..objectives.advantages import no_signal
from .engine import Completion, length_stats
from .rewards import NamedReward


@frozen(eq=False)
class CompletionGroup:
    """The G completions of a prompt.

    Attributes:
        prompt: the prompt.
        completions: as they were sampled.
        texts: what the reward functions read.
        parts: [functions, G] the answers of the reward functions, NaN for None.
        rewards: [G] their weighted sums, NaN where no function gave a number.
    """

    prompt: Prompt
    completions: Sequence[Completion]
    texts: Sequence[str]
    parts: np.ndarray
    rewards: np.ndarray

    @property
    def silent(self) -> bool:
        """Whether the rewards carry no signal, because they are all equal."""
        return bool(no_signal(self.rewards[None])[0])


def stand_in(prompt: Prompt, group_size: int, functions: int) -> CompletionGroup:
    """A group without rewards, for a rank that has no prompt of a batch."""
    one = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), finished=True)
    nothing = np.full(group_size, np.nan)
    return CompletionGroup(prompt, [one] * group_size, [""] * group_size, np.tile(nothing, (functions, 1)), nothing)


@frozen(eq=False)
class Gathered:
    """The groups of all ranks as arrays.

    Attributes:
        rewards: [prompts, G].
        parts: [functions, S].
        lengths: [S], tokens of the completions.
        finished: [S] bool, ended by a stop token.
    """

    rewards: np.ndarray
    parts: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray


def gathered(groups: Sequence[CompletionGroup], ranks: Ranks, group_size: int, functions: int) -> Gathered:
    """The groups of all ranks."""
    own = [
        np.stack([g.rewards, *g.parts, [len(c.tokens) for c in g.completions], [c.finished for c in g.completions]], axis=-1)
        for g in groups
    ]
    columns = np.array(own, np.float64).reshape(-1, group_size, functions + 3)
    rewards, *parts, lengths, finished = np.moveaxis(np.concatenate(ranks.gathered(columns)), -1, 0)
    return Gathered(rewards, np.array(parts).reshape(len(parts), lengths.size), lengths.reshape(-1), finished.reshape(-1) > 0)


def completion_metrics(found: Gathered, seconds: float) -> dict[str, float]:
    """Lengths, share of completions cut at the limit, and speed; see `length_stats`."""
    return length_stats(found.lengths.tolist(), found.finished.tolist(), seconds)


def reward_metrics(found: Gathered, rewards: Sequence[NamedReward]) -> dict[str, float]:
    """Mean and standard deviation of the rewards and of each function, under TRL's names; None counts in neither."""
    metrics = {"reward": _mean(found.rewards), "reward_std": float(np.mean([_std(group) for group in found.rewards]))}
    for reward, values in zip(rewards, found.parts, strict=True):
        metrics[f"rewards/{reward.name}/mean"] = _mean(values)
        metrics[f"rewards/{reward.name}/std"] = _std(values)
    return metrics


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else 0.0


def _std(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.std(ddof=1)) if present.size > 1 else 0.0


def samples(groups: Sequence[CompletionGroup], rewards: Sequence[NamedReward], count: int = 4) -> tuple[Mapping[str, Any], ...]:
    """The first `count` completions of a batch with their rewards."""
    rows = ((g, text, part, reward) for g in groups for text, part, reward in zip(g.texts, g.parts.T, g.rewards, strict=True))
    return tuple(
        {
            "prompt": g.prompt.prompt,
            "completion": text,
            "reward": _number(reward),
            "rewards": {r.name: _number(value) for r, value in zip(rewards, part, strict=True)},
            "where": g.prompt.location,
        }
        for g, text, part, reward in islice(rows, count)
    )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
