"""Batches that the policy samples: log-probabilities, advantages, masks, metrics and chance."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load

from mlxlora.adapters.prepare import disabled, prepare
from mlxlora.config.options import AdapterOptions, PromptData, RewardOptions
from mlxlora.data.batching import Make, MicroBatch
from mlxlora.data.pooled import results
from mlxlora.data.rows import Row
from mlxlora.data.sources import Context
from mlxlora.models.logprobs import scorer
from mlxlora.objectives.advantages import SCALES, advantage, centered, group_relative
from mlxlora.objectives.grpo import grpo
from mlxlora.rollouts.kv_cache import Route, find_route
from mlxlora.rollouts.rewards import NamedReward, combine
from mlxlora.rollouts.sampling import Sampling
from mlxlora.rollouts.source import Rollouts, prompts
from mlxlora.training.reference import referenced
from tests.support.advantages import batch_scaled
from tests.support.tiny import byte_tokenizer, loss_and_gradient, shaken

TEXTS = ("ab", "what is 2 + 3?", "hello, world", "z")
LORA = AdapterOptions(num_layers=-1, rank=4, scale=2.0, dropout=0.2)
METRICS = {
    "frac_reward_zero_std",
    "reward",
    "reward_std",
    "group_reward_std",
    "rewards/spread/mean",
    "rewards/spread/std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "rollout_tokens_per_second",
}


def measured(micro: MicroBatch) -> dict[str, float]:
    """The metrics of a micro-batch that have a value."""
    return results(micro.metrics)


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[nn.Module, Any, Route]:
    """A model with LoRA whose update is not 0 and has dropout, its tokenizer, and how it is sampled."""
    model, tokenizer = load(str(model_folder))[:2]
    route = find_route(model)
    shaken(prepare(model, LORA)).train()
    return model, tokenizer, route


@pytest.fixture
def roll(loaded: tuple[nn.Module, Any, Route]) -> Callable[..., MicroBatch]:
    """`roll(reward, index=0, ...)`: the micro-batch of two prompts with four completions each."""

    def run(
        reward: Callable[..., Any] | None = None, *, index: int = 0, texts: Sequence[Any] = TEXTS[:2], **options: Any
    ) -> MicroBatch:
        make, items = source(loaded, reward, texts, **options)
        return make(items, index)

    return run


def source(
    loaded: tuple[nn.Module, Any, Route],
    reward: Callable[..., Any] | None,
    texts: Sequence[Any],
    *,
    seed: int = 0,
    validation: bool = False,
    tokens: int = 12,
    sampling: dict[str, Any] | None = None,
    columns: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Make, list[Any]]:
    """What makes the batches, and the prompts."""
    model, tokenizer, route = loaded
    how = Rollouts((NamedReward("spread", reward or spread),), 4, Sampling(max_tokens=tokens, **sampling or {}), route=route)
    found = prompts(PromptData(), evolve(how, **changes))
    rows = [Row({"prompt": text, **(columns or {})}, "rows.jsonl", line) for line, text in enumerate(texts, 1)]
    items = [found.prepare(row, tokenizer) for row in rows]
    return found.make(Context(model, tokenizer, seed, validation, items)), items


def spread(completion_ids: list[list[int]]) -> list[float | None]:
    """Differs within a group, and for all that is known about the completion only."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def constant(completions: list[str]) -> list[float]:
    return [0.5] * len(completions)


def loss_mask(batch: Any, model: nn.Module, temperature: float) -> np.ndarray:
    model.eval()
    logps = np.array(scorer(model, temperature=temperature)(batch)[0])
    model.train()
    return logps


# --- log-probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kept_log_probabilities_are_those_of_training(roll: Any, loaded: Any, temperature: float) -> None:
    micro = roll(sampling={"temperature": temperature}, keep_logps=True, texts=TEXTS)
    count = int(micro.batch.lengths.sum().item())
    expected = loss_mask(micro.batch, loaded[0], temperature)
    np.testing.assert_allclose(np.array(micro.batch.old_logps)[:count], expected[:count], rtol=1e-5, atol=1e-5)
    with disabled(loaded[0]):
        without = loss_mask(micro.batch, loaded[0], temperature)
    assert np.abs(without - expected)[:count].max() > 0.01, "the adapters were not active"


def test_truncated_sampling_keeps_the_policy_s_log_probabilities(roll: Any, loaded: Any) -> None:
    how = {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3}
    micro = roll(sampling=how, keep_logps=True)
    count = int(micro.batch.lengths.sum().item())
    expected = loss_mask(micro.batch, loaded[0], 0.9)
    np.testing.assert_allclose(np.array(micro.batch.old_logps)[:count], expected[:count], rtol=1e-5, atol=1e-5)


def test_the_reference_is_the_model_without_adapters_and_training_goes_on(loaded: Any) -> None:
    model = loaded[0]
    make, items = source(loaded, None, TEXTS[:2], sampling={"temperature": 0.7})
    make = referenced(make, partial(disabled, model), 0.7)
    assert model.training, "dropout would be off for the rest of the run"
    micro = make(items, 0)
    assert model.training
    with disabled(model):
        expected = loss_mask(micro.batch, model, 0.7)
    np.testing.assert_array_equal(np.array(micro.batch.ref_logps), expected)


# --- advantages and trained tokens -----------------------------------------------------------------------


def test_equal_rewards_have_no_gradient(roll: Any, loaded: Any) -> None:
    micro = roll(constant)
    metrics, gradient = loss_and_gradient(loaded[0], grpo(beta=0.0), micro.batch)
    assert metrics["policy_loss"] == 0 and all(not mx.any(g != 0).item() for g in gradient.values())
    assert measured(micro)["frac_reward_zero_std"] == 1 and measured(micro)["reward"] == 0.5
    _, gradient = loss_and_gradient(loaded[0], grpo(beta=0.0), roll().batch)
    assert any(mx.any(g != 0).item() for g in gradient.values())


@pytest.mark.parametrize("name", SCALES)
def test_scale_rewards(roll: Any, name: str) -> None:
    expected = {"group": group_relative, "batch": batch_scaled, "none": centered}[name]
    micro = roll(advantage=advantage(scale=name))
    rewards = mx.array([spread(ids) for ids in by_group(micro, 2)])
    np.testing.assert_allclose(np.array(micro.batch.advantages), np.array(expected(rewards)).ravel(), atol=1e-5)


def test_mask_truncated(roll: Any) -> None:
    options = {"options": RewardOptions(mask_truncated=True), "keep_logps": True, "tokens": 200}
    plain, masked = roll(tokens=200, keep_logps=True), roll(**options)
    assert 0 < measured(plain)["completions/clipped_ratio"] < 1, "the case needs both kinds"
    lengths, kept = np.array(plain.batch.lengths), np.array(masked.batch.lengths)
    finished = np.isin(kept, lengths[kept > 0]) & (kept > 0)
    assert finished.mean() == 1 - measured(plain)["completions/clipped_ratio"]
    np.testing.assert_array_equal(kept, np.where(finished, lengths, 0))
    sequence, old = np.array(plain.batch.sequence), np.array(plain.batch.old_logps)
    expected = old[np.isin(sequence, np.flatnonzero(finished))]
    np.testing.assert_array_equal(np.array(masked.batch.old_logps)[: kept.sum()], expected)
    np.testing.assert_array_equal(masked.batch.advantages, plain.batch.advantages)


def test_a_batch_of_truncated_completions_weighs_nothing(roll: Any, loaded: Any) -> None:
    micro = roll(options=RewardOptions(mask_truncated=True), tokens=1, keep_logps=True)
    assert measured(micro)["completions/clipped_ratio"] == 1 and not np.array(micro.batch.lengths).any()
    metrics, gradient = loss_and_gradient(loaded[0], grpo(beta=0.0), micro.batch)
    assert metrics["policy_loss"] == 0 and all(not mx.any(g != 0).item() for g in gradient.values())


def test_use_prompt(roll: Any) -> None:
    plain, whole = roll(), roll(use_prompt=True)
    extra = np.array(whole.batch.lengths) - np.array(plain.batch.lengths)
    np.testing.assert_array_equal(extra, np.repeat([len(text) - 1 for text in TEXTS[:2]], 4))
    assert plain.tokens == whole.tokens


@pytest.mark.parametrize("tokens", [1, 2])
def test_shortest_completions(roll: Any, loaded: Any, tokens: int) -> None:
    micro = roll(tokens=tokens, keep_logps=True)
    assert measured(micro)["completions/max_length"] == tokens
    metrics, _ = loss_and_gradient(loaded[0], grpo(beta=0.0), micro.batch)
    assert np.isfinite(metrics["policy_loss"])


# --- rewards ----------------------------------------------------------------------------------------------


def test_a_reward_that_does_not_apply(roll: Any) -> None:
    micro = roll(lambda completions: [1.0, None, 0.0, None] * 2)
    advantages = np.array(micro.batch.advantages).reshape(2, 4)
    assert (advantages[:, [1, 3]] == 0).all() and (advantages[:, 0] > 0).all() and (advantages[:, 2] < 0).all()
    assert measured(micro)["reward"] == 0.5
    assert [sample["reward"] for sample in micro.samples] == [1.0, None, 0.0, None]


def test_no_reward_applies(roll: Any) -> None:
    micro = roll(lambda completions: [None] * 8)
    assert not np.array(micro.batch.advantages).any()
    assert {name for name, value in measured(micro).items() if "reward" in name} == {"frac_reward_zero_std"}, "None is no number"
    assert measured(micro)["frac_reward_zero_std"] == 1


def test_frac_reward_zero_std(roll: Any) -> None:
    first_only = [0.0, 1.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    micro = roll(lambda completions: first_only)
    assert measured(micro)["frac_reward_zero_std"] == 0.5
    assert measured(micro)["reward_std"] == pytest.approx(np.std(first_only, ddof=1)), "TRL 1.16: of the batch"
    assert measured(micro)["group_reward_std"] == pytest.approx(np.mean([np.std([0, 1, 0, 1], ddof=1), 0]))
    assert measured(micro)["rewards/spread/std"] == pytest.approx(np.std(first_only, ddof=1))


@given(st.lists(st.lists(st.none() | st.floats(-4, 4), min_size=8, max_size=8), min_size=1, max_size=3))
@settings(deadline=None, max_examples=10)
def test_any_rewards(loaded: Any, answers: list[list[float | None]]) -> None:
    rewards = tuple(NamedReward(f"r{k}", lambda completions, said=said: said, k - 0.5) for k, said in enumerate(answers))
    make, items = source(loaded, None, TEXTS[:2], rewards=rewards, tokens=2)
    micro = make(items, 0)
    matrix = np.array(answers, float)
    total = combine(matrix, [r.weight for r in rewards]).reshape(2, 4)
    np.testing.assert_array_equal(np.array(micro.batch.advantages), group_relative(total).ravel().astype(np.float32))
    assert np.isfinite(list(measured(micro).values())).all()
    assert micro.metrics.keys() == METRICS - {"rewards/spread/mean", "rewards/spread/std"} | {
        f"rewards/r{k}/{kind}" for k in range(len(rewards)) for kind in ("mean", "std")
    }


def test_rewards_get_the_columns_and_every_completion(roll: Any) -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, completion_ids: Any, answer: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, columns=columns)
        return spread(completion_ids)

    roll(reward, columns={"answer": "5", "level": 3})
    assert seen["prompts"] == [text for text in TEXTS[:2] for _ in range(4)]
    assert seen["answer"] == ["5"] * 8 and seen["columns"] == {"level": [3] * 8}
    assert len(seen["completions"]) == len(seen["ids"]) == 8 and all(isinstance(text, str) for text in seen["completions"])


def test_conversational_prompts_get_conversational_completions(loaded: Any) -> None:
    words = byte_tokenizer()
    words.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    tokenizer, seen = TokenizerWrapper(words), []
    messages = [{"role": "user", "content": "2 + 3?"}]

    def reward(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    make, items = source((loaded[0], tokenizer, loaded[2]), reward, [messages])
    assert tokenizer.decode(items[0].tokens.tolist()) == "[user]2 + 3?[a]"
    micro = make(items, 0)
    assert all(prompt == messages for prompt, _ in seen)
    assert all(len(turns) == 1 and turns[0]["role"] == "assistant" and isinstance(turns[0]["content"], str) for _, turns in seen)
    assert micro.samples[0]["prompt"] == messages and micro.samples[0]["completion"] == seen[0][1][0]["content"]


# --- dynamic sampling ---------------------------------------------------------------------------------------


def test_dynamic_sampling_replaces_silent_groups(loaded: Any) -> None:
    def reward(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
        return [0.0 if prompt == "z" else value for prompt, value in zip(prompts, spread(completion_ids), strict=True)]

    make, items = source(loaded, reward, TEXTS, options=RewardOptions(dynamic_sampling=True), tokens=6)
    micro = make([items[0], items[3]], 0)
    assert measured(micro)["frac_reward_zero_std"] == 0.5, "before the replacement"
    assert micro.rows[0] == "rows.jsonl:1" and micro.rows[1] != "rows.jsonl:4"
    assert np.array(micro.batch.advantages).reshape(2, 4).any(axis=1).all()
    again = make([items[0], items[3]], 0)
    assert again.rows == micro.rows and mx.array_equal(again.batch.tokens, micro.batch.tokens)


def test_dynamic_sampling_ends(loaded: Any) -> None:
    calls: list[int] = []

    def reward(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        return [1.0] * len(completions)

    make, items = source(loaded, reward, TEXTS, options=RewardOptions(dynamic_sampling=True), tokens=2)
    micro = make(items[:2], 0)
    assert 1 < len(calls) <= 6 and micro.rows == ("rows.jsonl:1", "rows.jsonl:2")
    assert not np.array(micro.batch.advantages).any()
    calls.clear()
    make, items = source(loaded, reward, TEXTS, options=RewardOptions(dynamic_sampling=True), tokens=2, validation=True)
    make(items[:2], 0)
    assert calls == [2], "a validation is of the rows that it is given"


# --- chance, metrics and samples -----------------------------------------------------------------------------


def test_same_seed_same_completions(roll: Any) -> None:
    first = tokens_of(roll(index=3))
    assert tokens_of(roll(index=3)) == first
    assert tokens_of(roll(index=4)) != first and tokens_of(roll(index=3, seed=1)) != first
    mx.random.seed(99)
    before = np.array(mx.random.state[0])
    assert tokens_of(roll(index=3)) == first
    np.testing.assert_array_equal(np.array(mx.random.state[0]), before, "the run's random state belongs to dropout")


def test_completions_of_a_group_differ(roll: Any) -> None:
    assert all(len({tuple(ids) for ids in group}) == 4 for group in by_group(roll(), 2))


def test_no_two_batches_share_their_chance(roll: Any) -> None:
    """At a temperature where all tokens are alike, the tokens show the random numbers."""
    seen = [
        tuple(map(tuple, tokens_of(roll(index=i, seed=s, sampling={"temperature": 100.0})))) for i in range(3) for s in range(3)
    ]
    assert len(set(seen)) == len(seen)


def test_rollout_batch_changes_nothing(roll: Any) -> None:
    """At a temperature where the last bits of a logit, which depend on the batch, do not decide a draw."""
    warm = {"temperature": 100.0}
    assert tokens_of(roll(batch=3, sampling=warm)) == tokens_of(roll(sampling=warm))


def test_validation_is_greedy_and_has_one_completion(roll: Any, loaded: Any) -> None:
    micro = roll(validation=True)
    assert micro.batch.sequences == 2 and tokens_of(roll(validation=True, seed=5, index=7)) == tokens_of(micro)
    model, tokenizer, _ = loaded
    model.eval()
    ids = tokenizer.encode(TEXTS[0])
    logits = model(mx.array([ids]))[0, -1]
    model.train()
    assert by_group(micro, 2)[0][0][0] == logits.argmax().item()


def test_metrics(roll: Any) -> None:
    micro = roll(tokens=200)
    assert micro.metrics.keys() == METRICS
    lengths = np.array(micro.batch.lengths)
    assert measured(micro)["completions/mean_length"] == lengths.mean()
    assert measured(micro)["completions/min_length"] == lengths.min() < measured(micro)["completions/max_length"] == lengths.max()
    rewards = np.array([spread(ids) for ids in by_group(micro, 2)])
    assert measured(micro)["reward"] == measured(micro)["rewards/spread/mean"] == pytest.approx(rewards.mean())
    assert measured(micro)["reward_std"] == pytest.approx(rewards.std(ddof=1))
    assert measured(micro)["group_reward_std"] == pytest.approx(rewards.std(axis=1, ddof=1).mean())


def test_samples(roll: Any, loaded: Any) -> None:
    micro = roll(tokens=200)
    assert [sample["prompt"] for sample in micro.samples] == ["ab"] * 4
    assert {sample["where"] for sample in micro.samples} == {"rows.jsonl:1"}
    for sample, ids in zip(micro.samples, by_group(micro, 2)[0], strict=True):
        assert sample["completion"] == loaded[1].decode([i for i in ids if i not in loaded[1].eos_token_ids])
        assert sample["reward"] == sample["rewards"]["spread"] == spread([ids])[0]


def tokens_of(micro: MicroBatch) -> list[list[int]]:
    """The trained tokens of every sequence."""
    ends = np.cumsum(np.array(micro.batch.lengths))
    return [part.tolist() for part in np.split(np.array(micro.batch.targets)[: ends[-1]], ends[:-1])]


def by_group(micro: MicroBatch, groups: int) -> list[list[list[int]]]:
    found = tokens_of(micro)
    size = len(found) // groups
    return [found[i : i + size] for i in range(0, len(found), size)]
