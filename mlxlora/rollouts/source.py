"""Batches that the policy samples itself: prompts -> groups of completions -> rewards -> advantages -> batch."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
from attrs import evolve, field, frozen

from ..batch import Batch
from ..config.options import PromptData, RewardOptions
from ..data.batching import Make, MicroBatch, as_padding, collate, singles
from ..data.formats import KEYS
from ..data.sources import Context, Encoder, Source
from ..data.tokenize import Example, Prompt, prompt_example
from ..objectives.advantages import Advantage, group_relative, no_signal
from . import rewards as scoring
from .engine import Completion, length_stats, sample
from .kv_cache import Route, find_route
from .rewards import NamedReward
from .sampling import Sampling

_ROUNDS = 4  # of dynamic sampling: after that a batch keeps what it has


@frozen
class Rollouts:
    """How groups of completions are sampled and rewarded.

    Attributes:
        rewards: functions with their weights.
        group_size: G, completions of each prompt.
        sampling: how tokens are drawn.
        advantage: rewards [prompts, G] -> advantages [prompts, G].
        options: of rewards.
        use_prompt: score the prompt's tokens too.
        keep_logps: keep the log-probabilities from sampling as `old_logps`.
        batch: completions generated at once; 0 = all.
        route: which caches the model can use; None looks for itself.
    """

    rewards: tuple[NamedReward, ...]
    group_size: int
    sampling: Sampling
    advantage: Advantage = group_relative
    options: RewardOptions = field(factory=RewardOptions)
    use_prompt: bool = False
    keep_logps: bool = False
    batch: int = 0
    route: Route | None = None


@frozen(eq=False)
class Group:
    """A prompt's completions, their texts and what each reward function made of them, [functions, G]."""

    prompt: Prompt
    completions: Sequence[Completion]
    texts: Sequence[str]
    parts: np.ndarray
    rewards: np.ndarray


Laid = tuple[Batch, Sequence[Example], tuple[tuple[int, ...], ...]]
"""A batch, its sequences, and which of them belong together."""


def prompts(data: str | PromptData, rollouts: Rollouts, *, repeats: int = 1, **options: Any) -> Source:
    """Prompts, answered by the policy.

    Args:
        data: folder, file or hub data set; or all options at once.
        rollouts: how completions are sampled and rewarded.
        repeats: optimizer steps on every batch of completions.
        options: fields of `PromptData`.
    """
    return PromptSource(**online_fields(data, rollouts, **options), repeats=repeats)


def online_fields(data: str | PromptData, rollouts: Rollouts, **options: Any) -> dict[str, Any]:
    """The fields of a `PromptSource`, from what its users write."""
    data = PromptData(data=data, **options) if isinstance(data, str) else evolve(data, **options)
    temperature = rollouts.sampling.temperature
    return {"data": data, "rollouts": rollouts, "online": True, "temperature": temperature, "share": data.share_prompts}


@frozen
class PromptSource(Source):
    """Prompts that the policy answers; an item is a `Prompt`.

    Attributes:
        rollouts: how completions are sampled and rewarded.
    """

    data: PromptData
    rollouts: Rollouts

    @property
    def encoder(self) -> Encoder:
        """See `Source`."""
        data = self.data
        return partial(
            prompt_example,
            use_chat_template=data.use_chat_template,
            max_prompt_length=data.max_seq_length,
            system=data.system,
            keys={**KEYS, "prompt": data.prompt_key},
        )

    def make(self, context: Context) -> Make:
        """Samples, rewards and batches; validation takes the likeliest completion of each prompt."""
        how = _greedy(self.rollouts) if context.validation else self.rollouts
        how = evolve(how, route=how.route or find_route(context.model))
        return lambda items, index: _micro(self, context, how, items, index)

    def examples(self, item: Prompt) -> tuple[Example, ...]:
        """The prompt alone."""
        return (sequence(item, None, self.rollouts),)

    def rebuild(self, item: Prompt, examples: Sequence[Example]) -> Prompt:
        """The prompt: its completions are not there yet."""
        return item

    def expected(self, item: Prompt) -> list[Example]:
        """G completions of half the maximal length."""
        length = max(self.rollouts.sampling.max_tokens // 2, 1)
        half = Completion(np.zeros(length, np.int32), np.zeros(0, np.float32), finished=True)
        return [sequence(item, half, self.rollouts)] * self.rollouts.group_size

    def sample(self, context: Context, how: Rollouts, prompts: Sequence[Prompt], key: mx.array) -> list[list[Completion]]:
        """[own prompts][G] completions of this rank's share of the prompts of a batch."""
        return by_policy(context, how, prompts, key)

    def batch(self, context: Context, how: Rollouts, groups: Sequence[Group]) -> Laid:
        """The batch of rewarded groups: every completion with its advantage."""
        return with_advantages(context, how, groups)


def _greedy(how: Rollouts) -> Rollouts:
    """For validation: the likeliest completion of each prompt."""
    return evolve(how, group_size=1, sampling=evolve(how.sampling, temperature=0.0))


def _micro(source: PromptSource, context: Context, how: Rollouts, items: Sequence[Prompt], index: int) -> MicroBatch:
    began = time.perf_counter()
    groups = _rolled(source, context, how, items, (index, 0))
    silent = float(context.ranks.interleaved(np.array([_silent(group) for group in groups], bool)).mean())
    if how.options.dynamic_sampling and not context.validation:
        groups = _with_signal(source, context, how, groups, index)
    rewards, parts, lengths, finished = _pooled(context, how, groups)
    stats = length_stats(lengths.tolist(), finished.astype(bool).tolist(), time.perf_counter() - began)
    rewarded = {"frac_reward_zero_std": silent, **_measures(how, rewards, parts)} if how.rewards else {}
    batch, examples, together = source.batch(context, how, groups or [_stand_in(how, items[0])])
    rows = tuple(group.prompt.location for group in groups)
    micro = MicroBatch(batch, sum(len(e.tokens) for e in examples), rows, rewarded | stats, _samples(how, groups), together)
    return micro if groups else as_padding(micro)


def _stand_in(how: Rollouts, prompt: Prompt) -> Group:
    """Where a rank has no prompt of a batch: completions that nobody rewarded."""
    one = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), finished=True)
    nothing = np.full(how.group_size, np.nan)
    return Group(prompt, [one] * how.group_size, [""] * how.group_size, np.tile(nothing, (len(how.rewards), 1)), nothing)


def _pooled(context: Context, how: Rollouts, groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the groups of all ranks: rewards [prompts, G], parts [functions, S], lengths [S] and which ones are finished [S]."""
    columns = 3 + len(how.rewards)
    own = [
        np.stack([g.rewards, *g.parts, [len(c.tokens) for c in g.completions], [c.finished for c in g.completions]], axis=-1)
        for g in groups
    ]
    everyone = np.concatenate(context.ranks.gathered(np.array(own, np.float64).reshape(-1, how.group_size, columns)))
    rewards, *parts, lengths, finished = np.moveaxis(everyone, -1, 0)
    return rewards, np.array(parts).reshape(len(parts), lengths.size), lengths.reshape(-1), finished.reshape(-1)


def with_advantages(context: Context, how: Rollouts, groups: Sequence[Group]) -> Laid:
    """Every completion with its advantage."""
    flat = [completion for group in groups for completion in group.completions]
    examples = [sequence(group.prompt, c, how) for group in groups for c in group.completions]
    advantages = _advantages(context, how, np.stack([g.rewards for g in groups]))
    numbers = np.arange(len(examples)).reshape(len(groups), -1).tolist() if context.share else ()
    batch = collate(examples, groups=numbers, advantages=mx.array(advantages.reshape(-1).astype(np.float32)))
    if how.keep_logps:
        kept = np.concatenate([c.logps[e.loss_mask[-len(c.logps) :]] for c, e in zip(flat, examples, strict=True)])
        batch = batch._replace(old_logps=mx.array(np.pad(kept, (0, batch.targets.size - kept.size))))
    return batch, examples, tuple(map(tuple, numbers)) if batch.prefix is not None else singles(len(examples))


def _advantages(context: Context, how: Rollouts, rewards: np.ndarray) -> np.ndarray:
    """[own prompts, G]: an advantage may depend on the rewards of the whole batch."""
    parts = context.ranks.gathered(rewards)
    start = sum(map(len, parts[: context.ranks.rank]))
    return how.advantage(np.concatenate(parts))[start : start + len(rewards)]


def _rolled(source: PromptSource, context: Context, how: Rollouts, items: Sequence[Prompt], place: tuple[int, int]) -> list[Group]:
    """Samples and rewards a group for each of this rank's prompts; the same place of the same run gives the same completions."""
    seed = np.random.SeedSequence((context.seed, int(context.validation), *place)).generate_state(1, np.uint64)[0]
    sampled = source.sample(context, how, items, mx.random.key(int(seed)))
    items = context.ranks.share(items)
    if not items:
        return []
    texts = [[_text(context.tokenizer, c) for c in group] for group in sampled]
    parts = _rewarded(how, items, sampled, texts)
    weights = [reward.weight for reward in how.rewards]
    split = np.split(parts, len(items), axis=1)
    return [
        Group(prompt, completions, said, part, scoring.combine(part, weights))
        for prompt, completions, said, part in zip(items, sampled, texts, split, strict=True)
    ]


def by_policy(context: Context, how: Rollouts, items: Sequence[Prompt], key: mx.array) -> list[list[Completion]]:
    """G completions of each of this rank's prompts from the model as it is; each has the key that it would have in one process."""
    keys = mx.random.split(key, len(items) * how.group_size).reshape(len(items), how.group_size, 2)
    own = list(context.ranks.share(range(len(items))))
    return sample(
        context.model,
        [items[i].tokens.tolist() for i in own],
        how.group_size,
        how.sampling,
        context.tokenizer.eos_token_ids,
        key=keys[mx.array(own)].reshape(-1, 2) if own else key,
        batch=how.batch,
        route=how.route,
    )


def _with_signal(source: PromptSource, context: Context, how: Rollouts, groups: list[Group], index: int) -> list[Group]:
    """Replaces groups without signal by groups of other prompts (DAPO, Yu et al., 2025, section 3.2).

    Over several ranks a place of the batch belongs to the rank that found a group for it.
    """
    ranks = context.ranks
    placed = {ranks.rank + i * ranks.size: group for i, group in enumerate(groups)}
    for attempt in range(1, _ROUNDS + 1):
        silent = sorted(ranks.listed([place for place, group in placed.items() if _silent(group)]))
        if not silent:
            break
        rng = np.random.default_rng((context.seed, index, attempt))
        others = [context.items[i] for i in rng.integers(len(context.items), size=len(silent))]
        rolled = _rolled(source, context, how, others, (index, attempt))
        signals = np.flatnonzero(~ranks.interleaved(np.array([_silent(group) for group in rolled], bool))).tolist()
        for place, number in zip(silent, signals, strict=False):
            placed.pop(place, None)
            if number % ranks.size == ranks.rank:
                placed[place] = rolled[number // ranks.size]
    return [placed[place] for place in sorted(placed)]


def _rewarded(
    how: Rollouts, items: Sequence[Prompt], sampled: Sequence[Sequence[Completion]], texts: Sequence[Sequence[str]]
) -> np.ndarray:
    """[functions, S]: what the reward functions make of all completions, in TRL's form."""
    rows = [prompt for prompt in items for _ in range(how.group_size)]
    said = [text for group in texts for text in group]
    turns = [
        text if isinstance(p.prompt, str) else [{"role": "assistant", "content": text}] for p, text in zip(rows, said, strict=True)
    ]
    names = sorted({name for prompt in items for name in prompt.columns})
    return scoring.score(
        how.rewards,
        prompts=[prompt.prompt for prompt in rows],
        completions=turns,
        completion_ids=[c.tokens.tolist() for group in sampled for c in group],
        columns={name: [prompt.columns.get(name) for prompt in rows] for name in names},
        locations=[prompt.location for prompt in rows],
        timeout=how.options.reward_timeout,
    )


def _text(tokenizer: Any, completion: Completion) -> str:
    ids = completion.tokens[:-1] if completion.finished else completion.tokens
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True)


def sequence(prompt: Prompt, completion: Completion | None, how: Rollouts) -> Example:
    """Prompt and completion as a sequence; a masked completion has no scored token."""
    answer = np.zeros(0, np.int32) if completion is None else completion.tokens
    masked = completion is not None and how.options.mask_truncated and not completion.finished
    tokens = np.concatenate([prompt.tokens, answer]).astype(np.int32)
    loss_mask = np.arange(len(tokens)) >= (1 if how.use_prompt else len(prompt.tokens))
    return Example(tokens, loss_mask & (not masked), None, prompt.location)


def _silent(group: Group) -> bool:
    return bool(no_signal(group.rewards[None])[0])


def _measures(how: Rollouts, rewards: np.ndarray, parts: np.ndarray) -> dict[str, float]:
    """TRL's metrics of rewards [prompts, G], parts [functions, S]; a completion that no function rewarded counts in none."""
    measures = {"reward": _mean(rewards), "reward_std": float(np.mean([_std(r) for r in rewards]))}
    for reward, values in zip(how.rewards, parts, strict=True):
        measures[f"rewards/{reward.name}/mean"] = _mean(values)
        measures[f"rewards/{reward.name}/std"] = _std(values)
    return measures


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else 0.0


def _std(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.std(ddof=1)) if present.size > 1 else 0.0


def _samples(how: Rollouts, groups: Sequence[Group], count: int = 4) -> tuple[Mapping[str, Any], ...]:
    """The first completions of the batch with their rewards."""
    rows = ((g, text, part, reward) for g in groups for text, part, reward in zip(g.texts, g.parts.T, g.rewards, strict=True))
    return tuple(
        {
            "prompt": g.prompt.prompt,
            "completion": text,
            "reward": _number(reward),
            "rewards": {r.name: _number(value) for r, value in zip(how.rewards, part, strict=True)},
            "where": g.prompt.location,
        }
        for g, text, part, reward in islice(rows, count)
    )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# --- without rewards ----------------------------------------------------------------------------------


def own_answers(data: str | PromptData, rollouts: Rollouts, **options: Any) -> Source:
    """Prompts that the policy answers, without rewards: supervised rows whose completions are its own (GKD).

    Validation is the objective on the likeliest completions.

    Args:
        data: folder, file or hub data set; or all options at once.
        rollouts: how completions are sampled.
        options: fields of `PromptData`.
    """
    fields = online_fields(data, evolve(rollouts, rewards=()), **options, token_cache=False)
    return PromptSource(**{**fields, "online": False}, live=True)
