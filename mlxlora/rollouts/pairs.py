"""On-policy pairs: the best and the worst of several completions of a prompt, by their rewards (online DPO, XPO)."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from attrs import evolve, frozen

from ..adapters.prepare import disabled
from ..config.given import Data
from ..config.options import PromptData
from ..data.batching import collate
from ..data.sources import Context, Source
from ..data.tokenize import Example, Prompt
from .engine import Completion
from .groups import CompletionGroup
from .source import Laid, PromptSource, Rollouts, by_policy, prompt_fields, sequence, with_advantages


def on_policy_pairs(data: Data | PromptData, rollouts: Rollouts, *, explore: bool = False, **options: Any) -> Source:
    """Prompts that the policy answers several times; the completions with the highest and the lowest reward make a pair.

    If the rewards of a prompt are all equal or all None, its pair has no trained token and so no gradient.

    Args:
        data: folder, file, hub data set or rows in memory; or all options at once.
        rollouts: how completions are sampled and rewarded.
        explore: two completions, the second by the reference, which is the policy as training starts (XPO).
        options: fields of `PromptData`.
    """
    how = evolve(rollouts, group_size=2) if explore else rollouts
    return OnPolicyPairSource(**prompt_fields(data, how, **options), online=True, explore=explore)


@frozen
class OnPolicyPairSource(PromptSource):
    """Prompts whose best and worst completions make a pair; validation rewards the likeliest one, as in `PromptSource`.

    Attributes:
        explore: two completions, the second by the reference.
    """

    explore: bool = False

    def sample(self, context: Context, how: Rollouts, prompts: Sequence[Prompt], key: mx.array) -> list[list[Completion]]:
        """See `PromptSource`."""
        sampler = against_reference if self.explore and not context.validation else by_policy
        return sampler(context, how, prompts, key)

    def batch(self, context: Context, how: Rollouts, groups: Sequence[CompletionGroup]) -> Laid:
        """The pairs of the groups."""
        if context.validation:
            return with_advantages(context, how, groups)
        return best_and_worst(context, how, groups, explore=self.explore)


def against_reference(context: Context, how: Rollouts, items: Sequence[Prompt], key: mx.array) -> list[list[Completion]]:
    """For each prompt one completion of the policy, then one of the reference (the model without adapters if none is given)."""
    one = evolve(how, group_size=1)
    ours, theirs = mx.random.split(key)
    policy = by_policy(context, one, items, ours)
    with context.reference() if context.reference else disabled(context.model) as model:
        reference = by_policy(evolve(context, model=model), one, items, theirs)
    return [[*a, *b] for a, b in zip(policy, reference, strict=True)]


def best_and_worst(context: Context, how: Rollouts, groups: Sequence[CompletionGroup], *, explore: bool) -> Laid:
    """P pairs: the best completions, then the worst; undecided pairs keep their place without trained tokens."""
    places = [_places(group.rewards) for group in groups]
    pairs = [_pair(how, group, place) for group, place in zip(groups, places, strict=True)]
    examples = [example for side in zip(*pairs, strict=True) for example in side]
    by_reference = [number == 1 for side in zip(*places, strict=True) for number in side]
    together = tuple((p, len(groups) + p) for p in range(len(groups)))
    columns = {"from_reference": mx.array(by_reference)} if explore else {}
    return collate(examples, groups=together if context.share else (), **columns), examples, together


def _pair(how: Rollouts, group: CompletionGroup, places: tuple[int, int]) -> tuple[Example, ...]:
    """Both sides; without trained tokens unless one side is better and both have some."""
    sides = [sequence(group.prompt, group.completions[i], how) for i in places]
    best, worst = group.rewards[list(places)]
    decided = bool(best > worst) and all(e.loss_mask.any() for e in sides)
    return tuple(evolve(e, loss_mask=e.loss_mask & decided) for e in sides)


def _places(rewards: np.ndarray) -> tuple[int, int]:
    """Numbers of the best and the worst completion, which differ; completions without a reward count only if at most one has one.

    >>> _places(np.array([0.5, np.nan, 2.0, 1.0])), _places(np.array([1.0, 1.0]))
    ((2, 0), (0, 1))
    """
    present = np.flatnonzero(~np.isnan(rewards))
    order = present[np.argsort(-rewards[present], kind="stable")].tolist()
    return (order[0], order[-1]) if len(order) > 1 else (0, 1)
