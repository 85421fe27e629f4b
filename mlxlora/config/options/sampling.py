"""Options of completions that the policy samples, and of their rewards."""

from collections.abc import Callable, Sequence
from typing import Any

from attrs import validators as v

from ..fields import group, option


@group("Sampling")
class SamplingOptions:
    """How completions are sampled."""

    group_size: int = option(4, "Completions of each prompt; a batch has --batch-size prompts.", v.ge(1), v.le(2**16))
    max_completion_length: int = option(512, "Longest completion, tokens.", v.ge(1), v.le(2**20))
    temperature: float = option(1.0, "Temperature of sampling and of the loss: logits are divided by it.", v.ge(1e-6))
    top_p: float = option(1.0, "Sample among the likeliest tokens that together have this probability.", v.gt(0), v.le(1))
    top_k: int = option(0, "Sample among this many likeliest tokens; 0 = all.", v.ge(0))
    min_p: float = option(0.0, "Sample among tokens at least this likely, relative to the likeliest.", v.ge(0), v.le(1))
    repetition_penalty: float = option(1.0, "Penalty on tokens that occurred before: their logits are divided by it.", v.gt(0))
    rollout_batch: int = option(0, "Completions to generate at once; 0 = all of a batch.", v.ge(0))
    kv_bits: int | None = option(
        None,
        "Keep keys and values of rollouts in 4 or 8 bits to save memory. The sampling policy then differs slightly from the "
        "trained one; the importance ratio corrects this only with --num-iterations above 1.",
        v.in_((4, 8)),
    )


@group("Sampling")
class PairSampling(SamplingOptions):
    """How the completions of on-policy pairs are sampled."""

    group_size: int = option(2, "Completions of each prompt; the best and the worst make a pair.", v.ge(2), v.le(2**16))


@group("Sampling")
class OwnSampling(SamplingOptions):
    """How the student's own completions are sampled."""

    group_size: int = option(1, "Completions of each prompt; a batch has --batch-size prompts.", v.ge(1), v.le(2**16))


@group("Rewards")
class RewardOptions:
    """What completions are rewarded for."""

    rewards: Sequence[str | Callable[..., Any]] = option(("accuracy",), "Reward functions: built in, or of --reward-file.")
    reward_file: str | None = option(None, "Your own reward functions: a Python file.")
    reward_weights: Sequence[float] | None = option(None, "Weight of each reward; default: 1.")
    reward_model: str | None = option(None, "Reward by this model, a folder of a sequence classifier, in place of --rewards.")
    reward_timeout: float | None = option(
        None, "Longest time, s, that the rewards of a batch may take; the run is saved and ends.", v.gt(0)
    )
    mask_truncated: bool = option(False, "Give completions that were cut at the length limit no weight.")
    dynamic_sampling: bool = option(False, "Replace groups whose rewards are all equal by other prompts (DAPO).")
