"""Batches that the policy samples: prompts -> groups of completions -> rewards -> advantages -> batch."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from attrs import evolve, field, frozen

from ..batch import Batch
from ..config.given import Data
from ..config.options import PromptData, RewardOptions
from ..data.batching import Make, MicroBatch, as_padding, collate, singles
from ..data.dialogue import sampled_turns
from ..data.formats import field_names, prompt_record
from ..data.pooled import Pooled
from ..data.rows import Row
from ..data.sources import Context, Encoder, Source, check_examples
from ..data.tokenize import Example, Prompt, prompt_example
from ..objectives.advantages import Advantage, group_relative
from .engine import Completion, Decoding, sample
from .groups import CompletionGroup, NoneWatch, completion_metrics, gathered, reward_metrics, samples, stand_in
from .kv_cache import Route, find_route
from .rewards import NamedReward, call_rewards, check_columns, combine
from .sampling import Sampling

_ROUNDS = 4  # of dynamic sampling; then the batch keeps its silent groups
_ENOUGH = 64  # completions, or a pass over the prompts, after which a reward that is always None is a mistake


@frozen
class Rollouts:
    """How groups of completions are sampled and rewarded.

    Attributes:
        rewards: functions with their weights.
        group_size: G, completions of each prompt.
        sampling: how tokens are drawn.
        advantage: rewards [prompts, G] -> advantages [prompts, G].
        options: of the rewards.
        use_prompt: train on the tokens of the prompt too.
        keep_logps: keep the log-probabilities of sampling as `old_logps`.
        batch: completions generated together; 0 = all.
        route: the result of `find_route(model)`; None calls it.
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


Laid = tuple[Batch, Sequence[Example], tuple[tuple[int, ...], ...]]
"""A batch, its sequences, and the numbers of those that belong together."""


def prompts(data: Data | PromptData, rollouts: Rollouts, *, repeats: int = 1, **options: Any) -> Source:
    """Prompts that the policy answers and reward functions score (GRPO).

    Args:
        data: folder, file, hub data set or rows in memory; or all options at once.
        rollouts: how completions are sampled and rewarded.
        repeats: optimizer steps on each batch of completions.
        options: fields of `PromptData`.
    """
    return PromptSource(**prompt_fields(data, rollouts, **options), online=True, repeats=repeats)


def own_answers(data: Data | PromptData, rollouts: Rollouts, **options: Any) -> Source:
    """Prompts that the policy answers, without rewards: supervised rows with its own completions (GKD).

    Validation computes the objective on the likeliest completions.

    Args:
        data: folder, file, hub data set or rows in memory; or all options at once.
        rollouts: how completions are sampled.
        options: fields of `PromptData`.
    """
    return PromptSource(**prompt_fields(data, evolve(rollouts, rewards=()), **options, token_cache=False), live=True)


def prompt_fields(data: Data | PromptData, rollouts: Rollouts, **options: Any) -> dict[str, Any]:
    """The fields of a `PromptSource` that follow from its data and rollouts; see `prompts` for the arguments."""
    data = evolve(data, **options) if isinstance(data, PromptData) else PromptData(data=data, **options)
    return {"data": data, "rollouts": rollouts, "temperature": rollouts.sampling.temperature, "share": data.share_prompts}


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
            keys=field_names(data),
        )

    def check_rows(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """The first row of each split must have the columns that the rewards name."""
        for first in (split[0] for split in rows.values() if split):
            record = prompt_record(first, field_names(self.data))
            check_columns(self.rollouts.rewards, record.columns, record.location)

    def make(self, context: Context) -> Make:
        """Samples, rewards and batches; validation takes the likeliest completion of each prompt."""
        how = self.rollouts
        if context.validation:
            how = evolve(how, group_size=1, sampling=evolve(how.sampling, temperature=0.0))
        how = evolve(how, route=how.route or find_route(context.model))
        return Roller(self, context, how, NoneWatch(min(_ENOUGH, how.group_size * len(context.items) or _ENOUGH)))

    def examples(self, item: Prompt) -> tuple[Example, ...]:
        """The prompt alone."""
        return (sequence(item, None, self.rollouts),)

    def rebuild(self, item: Prompt, examples: Sequence[Example]) -> Prompt:
        """The prompt; its completions do not exist yet."""
        return item

    def expected(self, item: Prompt) -> list[Example]:
        """G completions of half the maximal length."""
        length = max(self.rollouts.sampling.max_tokens // 2, 1)
        half = Completion(np.zeros(length, np.int32), np.zeros(0, np.float32), finished=True)
        return [sequence(item, half, self.rollouts)] * self.rollouts.group_size

    def sample(self, context: Context, how: Rollouts, prompts: Sequence[Prompt], key: mx.array) -> list[list[Completion]]:
        """[own prompts][G] completions of this rank's share of the prompts of a batch."""
        return by_policy(context, how, prompts, key)

    def batch(self, context: Context, how: Rollouts, groups: Sequence[CompletionGroup]) -> Laid:
        """The batch of rewarded groups: each completion with its advantage."""
        return with_advantages(context, how, groups)


def sequence(prompt: Prompt, completion: Completion | None, how: Rollouts) -> Example:
    """Prompt and completion as a sequence; a completion that `mask_truncated` drops has no trained token."""
    answer = np.zeros(0, np.int32) if completion is None else completion.tokens
    masked = completion is not None and how.options.mask_truncated and not completion.finished
    tokens = np.concatenate([prompt.tokens, answer]).astype(np.int32)
    loss_mask = np.arange(len(tokens)) >= (1 if how.use_prompt else len(prompt.tokens))
    return Example(tokens, loss_mask & (not masked), None, prompt.location)


def by_policy(context: Context, how: Rollouts, prompts: Sequence[Prompt], key: mx.array) -> list[list[Completion]]:
    """[own prompts][G] completions of the current policy; each has the key that it would have in one process."""
    keys = mx.random.split(key, len(prompts) * how.group_size).reshape(len(prompts), how.group_size, 2)
    own = list(context.ranks.share(range(len(prompts))))
    decoding = Decoding(how.sampling, context.tokenizer.eos_token_ids, how.group_size, how.batch, how.route)
    tokens = [prompts[i].tokens.tolist() for i in own]
    return sample(context.model, tokens, decoding, key=keys[mx.array(own)].reshape(-1, 2) if own else key)


def with_advantages(context: Context, how: Rollouts, groups: Sequence[CompletionGroup]) -> Laid:
    """Each completion with its advantage."""
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
    """[own prompts, G]; an advantage may depend on the rewards of the whole batch."""
    parts = context.ranks.gathered(rewards)
    start = sum(map(len, parts[: context.ranks.rank]))
    return how.advantage(np.concatenate(parts))[start : start + len(rewards)]


@frozen(eq=False)
class Roller:
    """Makes the micro-batches of a `PromptSource`: `roller(prompts of a batch, its number)`."""

    source: PromptSource
    context: Context
    how: Rollouts
    none: NoneWatch

    def __call__(self, items: Sequence[Prompt], index: int) -> MicroBatch:
        """Samples and rewards a batch."""
        began, context, how = time.perf_counter(), self.context, self.how
        groups = self.rolled(items, (index, 0))
        silent = context.ranks.interleaved(np.array([group.silent for group in groups], bool))
        if how.options.dynamic_sampling and not context.validation:
            groups = self._with_signal(groups, index)
        found = gathered(groups, context.ranks, how.group_size, len(how.rewards))
        if not context.validation:
            self.none.look(found, how.rewards, context.warn)
        rewarded = {"frac_reward_zero_std": Pooled.of(silent), **reward_metrics(found, how.rewards)} if how.rewards else {}
        metrics = rewarded | completion_metrics(found, time.perf_counter() - began)
        known = groups or [stand_in(items[0], how.group_size, len(how.rewards))]
        batch, examples, together = self.source.batch(context, how, known)
        check_examples(examples, context.vocabularies, context.tokenizer)
        rows = tuple(group.prompt.location for group in groups)
        tokens = sum(len(e.tokens) for e in examples)
        micro = MicroBatch(batch, tokens, rows, metrics, samples(groups, how.rewards), together)
        return micro if groups else as_padding(micro)

    def rolled(self, items: Sequence[Prompt], place: tuple[int, int]) -> list[CompletionGroup]:
        """A group for each of this rank's prompts; the same place of the same run gives the same completions."""
        context, how = self.context, self.how
        seed = np.random.SeedSequence((context.seed, int(context.validation), *place)).generate_state(1, np.uint64)[0]
        sampled = self.source.sample(context, how, items, mx.random.key(int(seed)))
        items = context.ranks.share(items)
        if not items:
            return []
        texts = [[_text(context.tokenizer, c) for c in group] for group in sampled]
        weights = [reward.weight for reward in how.rewards]
        parts = np.split(_rewarded(how, items, sampled, texts), len(items), axis=1)
        return [
            CompletionGroup(prompt, completions, said, part, combine(part, weights))
            for prompt, completions, said, part in zip(items, sampled, texts, parts, strict=True)
        ]

    def _with_signal(self, groups: list[CompletionGroup], index: int) -> list[CompletionGroup]:
        """Replaces silent groups by groups of other prompts (DAPO, Yu et al., 2025, section 3.2).

        With several ranks, a place of the batch belongs to the rank that found a group for it.
        """
        context, ranks = self.context, self.context.ranks
        placed = {ranks.rank + i * ranks.size: group for i, group in enumerate(groups)}
        for attempt in range(1, _ROUNDS + 1):
            silent = sorted(ranks.listed([place for place, group in placed.items() if group.silent]))
            if not silent:
                break
            rng = np.random.default_rng((context.seed, index, attempt))
            others = [context.items[i] for i in rng.integers(len(context.items), size=len(silent))]
            rolled = self.rolled(others, (index, attempt))
            signals = np.flatnonzero(~ranks.interleaved(np.array([group.silent for group in rolled], bool))).tolist()
            for place, number in zip(silent, signals, strict=False):
                placed.pop(place, None)
                if number % ranks.size == ranks.rank:
                    placed[place] = rolled[number // ranks.size]
        return [placed[place] for place in sorted(placed)]


def _rewarded(
    how: Rollouts, items: Sequence[Prompt], sampled: Sequence[Sequence[Completion]], texts: Sequence[Sequence[str]]
) -> np.ndarray:
    """[functions, S]: the answers of the reward functions, which get TRL's arguments."""
    rows = [prompt for prompt in items for _ in range(how.group_size)]
    said = [text for group in texts for text in group]
    turns = [sampled_turns(prompt.prompt, text) for prompt, text in zip(rows, said, strict=True)]
    names = sorted({name for prompt in items for name in prompt.columns})
    return call_rewards(
        how.rewards,
        prompts=[prompt for prompt, _ in turns],
        completions=[completion for _, completion in turns],
        completion_ids=[c.tokens.tolist() for group in sampled for c in group],
        columns={name: [prompt.columns.get(name) for prompt in rows] for name in names},
        locations=[prompt.location for prompt in rows],
        timeout=how.options.reward_timeout,
    )


def _text(tokenizer: Any, completion: Completion) -> str:
    ids = completion.tokens[:-1] if completion.finished else completion.tokens
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True)
