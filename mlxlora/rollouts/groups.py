"""Groups of rewarded completions: their metrics over all ranks, and samples for people to read."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from attrs import define, field, frozen

from ..data.pooled import Pooled
from ..data.tokenize import Prompt
from ..distributed.ranks import Ranks
from ..objectives.advantages import no_signal
from .engine import Completion
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


def completion_metrics(found: Gathered, seconds: float) -> dict[str, Pooled]:
    """Lengths in tokens, share of completions cut at the limit, and tokens per second, under TRL's names."""
    return {
        "completions/mean_length": Pooled.of(found.lengths),
        "completions/min_length": Pooled.of(found.lengths, "min"),
        "completions/max_length": Pooled.of(found.lengths, "max"),
        "completions/clipped_ratio": Pooled.of(~found.finished),
        "rollout_tokens_per_second": Pooled.mean(found.lengths.sum() / max(seconds, 1e-9), seconds),
    }


def reward_metrics(found: Gathered, rewards: Sequence[NamedReward]) -> dict[str, Pooled]:
    """Mean and standard deviation of the rewards and of each function, under TRL's names; None counts nowhere.

    `reward_std` is that of all rewards, as in TRL 1.16; `group_reward_std` is the mean of those of the groups, by which the
    advantages are divided.
    """
    stds = [Pooled.of(group, "std").result for group in found.rewards]
    metrics = {
        "reward": Pooled.of(found.rewards),
        "reward_std": Pooled.of(found.rewards, "std"),
        "group_reward_std": Pooled.of([np.nan if std is None else std for std in stds]),
    }
    for reward, values in zip(rewards, found.parts, strict=True):
        metrics[f"rewards/{reward.name}/mean"] = Pooled.of(values)
        metrics[f"rewards/{reward.name}/std"] = Pooled.of(values, "std")
    return metrics


@define
class NoneWatch:
    """Warns of reward functions that have returned None alone, once for each.

    Attributes:
        enough: completions that a function must have seen.
        seen: completions so far.
        quiet: functions that gave a number, or that were told of.
    """

    enough: int
    seen: int = 0
    quiet: set[str] = field(factory=set)

    def look(self, found: Gathered, rewards: Sequence[NamedReward], warn: Callable[[str], object]) -> None:
        """Counts a batch of completions."""
        self.seen += found.lengths.size
        for reward, values in zip(rewards, found.parts, strict=True):
            if not np.isnan(values).all():
                self.quiet.add(reward.name)
            elif self.seen >= self.enough and reward.name not in self.quiet:
                self.quiet.add(reward.name)
                warn(f"reward {reward.name} returned None for all of the first {self.seen} completions; check its columns and rows")


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
