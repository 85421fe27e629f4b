"""Sources that sample, from the options of a run."""

from collections.abc import Sequence
from typing import Any

import attrs

from ..config.options import GKDRun, GRPORun, ModelOptions, OnlineDPORun, PromptData, RewardOptions, SamplingOptions
from ..data.sources import Source
from ..objectives.advantages import advantage
from ..training.other_models import load_other
from .judges import judge, reward_model
from .pairs import on_policy_pairs
from .rewards import NamedReward, load_rewards
from .sampling import Sampling
from .source import Rollouts, own_answers, prompts


def rollouts_from(
    sampling: SamplingOptions, rewards: RewardOptions = RewardOptions(), judges: Sequence[NamedReward] = (), **fields: Any
) -> Rollouts:
    """Rollouts with the given options.

    Args:
        sampling: how completions are drawn, and how many.
        rewards: which functions reward them.
        judges: rewards that take the place of those of `rewards`.
        fields: further fields of `Rollouts`, such as `advantage`.

    Raises:
        InputError: a reward that does not exist.
    """
    named = {field.name: getattr(sampling, field.name) for field in attrs.fields(Sampling) if hasattr(sampling, field.name)}
    return Rollouts(
        rewards=tuple(judges) or rewards_from(rewards),
        group_size=sampling.group_size,
        sampling=Sampling(**named, max_tokens=sampling.max_completion_length),
        options=rewards,
        batch=sampling.rollout_batch,
        **fields,
    )


def rewards_from(options: RewardOptions) -> tuple[NamedReward, ...]:
    """The reward model, or the reward functions with their weights.

    Raises:
        InputError: a reward that does not exist.
    """
    if options.reward_model:
        return (reward_model(options.reward_model),)
    return load_rewards(options.rewards, options.reward_file, options.reward_weights)


def rewarded_prompts(options: GRPORun) -> Source:
    """Prompts whose completions get advantages from their rewards (GRPO)."""
    rollouts = rollouts_from(
        options.part(SamplingOptions),
        options.part(RewardOptions),
        advantage=advantage(options.baseline, options.scale_rewards),
        use_prompt=options.use_prompt,
        keep_logps=options.num_iterations > 1,
    )
    return prompts(options.part(PromptData), rollouts, repeats=options.num_iterations)


def ranked_pairs(options: OnlineDPORun) -> Source:
    """Prompts whose best and worst completions make a pair (online DPO, XPO)."""
    judges: tuple[NamedReward, ...] = ()
    if options.judge_model is not None:
        judges = (judge_of(options.judge_model, options.part(ModelOptions)),)
    rollouts = rollouts_from(options.part(SamplingOptions), options.part(RewardOptions), judges)
    return on_policy_pairs(options.part(PromptData), rollouts, explore=bool(options.xpo_alpha))


def judge_of(model: str, options: ModelOptions) -> NamedReward:
    """The judge that --judge-model names.

    Raises:
        InputError: no such model, or it cannot judge.
    """
    return judge(*load_other(model, options, "--judge-model"))


def answers_of_student(options: GKDRun) -> Source:
    """Prompts that the student answers, for a teacher to score (GKD)."""
    rollouts = rollouts_from(options.part(SamplingOptions), use_prompt=options.use_prompt)
    return own_answers(options.part(PromptData), rollouts)
