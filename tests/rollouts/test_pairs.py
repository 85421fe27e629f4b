"""Online DPO and XPO: who answers, which answers make a pair, and that the objective is DPO's on them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import orjson
import pytest
from mlx_lm.utils import load

from mlxlora.adapters.prepare import disabled, prepare
from mlxlora.config.options import AdapterOptions, PromptData
from mlxlora.data.batching import MicroBatch, pair_batch
from mlxlora.data.pooled import results
from mlxlora.data.rows import Row
from mlxlora.data.sources import Context
from mlxlora.data.tokenize import Example, Pair
from mlxlora.models.logprobs import scorer
from mlxlora.models.modes import evaluating
from mlxlora.objectives.preference import dpo, xpo
from mlxlora.rollouts.kv_cache import find_route
from mlxlora.rollouts.pairs import on_policy_pairs
from mlxlora.rollouts.rewards import NamedReward
from mlxlora.rollouts.sampling import Sampling
from mlxlora.rollouts.source import Rollouts
from mlxlora.training.reference import referenced
from tests.support.tiny import loss_and_gradient, shaken

TEXTS = ("ab", "what is 2 + 3?", "hello, world")


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[nn.Module, Any]:
    """A model with adapters whose update is not 0."""
    model, tokenizer = load(str(model_folder))[:2]
    shaken(prepare(model, AdapterOptions(num_layers=-1, rank=4, scale=2.0))).train()
    return model, tokenizer


def spread(completion_ids: list[list[int]]) -> list[float | None]:
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def roll(
    loaded: Any, reward: Any = spread, *, group: int = 2, explore: bool = False, share: bool = False, **sampling: Any
) -> MicroBatch:
    model, tokenizer = loaded
    how = Rollouts((NamedReward("r", reward),), group, Sampling(max_tokens=8, **sampling), route=find_route(model))
    source = on_policy_pairs(PromptData(), how, explore=explore)
    items = [source.prepare(Row({"prompt": text}, "rows.jsonl", line), tokenizer) for line, text in enumerate(TEXTS, 1)]
    make = source.make(Context(model, tokenizer, 0, False, items, share))
    return referenced(make, partial(disabled, model), source.temperature)(items, 0)


def completions(micro: MicroBatch) -> list[list[int]]:
    """The trained tokens of each sequence."""
    batch = micro.batch
    sequence, targets = np.array(batch.sequence), np.array(batch.targets)
    return [targets[sequence == s].tolist() for s in range(batch.sequences)]


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("share", [False, True])
def test_the_better_answer_is_chosen(loaded: Any, group: int, share: bool) -> None:
    micro = roll(loaded, group=group, share=share)
    rewards = np.array(spread(completions(micro)), float)
    assert (rewards[:3] > rewards[3:]).all() and micro.batch.sequences == 6
    assert micro.groups == ((0, 3), (1, 4), (2, 5)) and (micro.batch.prefix is not None) == share


def test_best_and_worst_of_more(loaded: Any) -> None:
    seen: list[float] = []

    def reward(completion_ids: list[list[int]]) -> Sequence[float | None]:
        seen[:] = [float(x or 0) for x in spread(completion_ids)]
        return list(seen)

    micro = roll(loaded, reward, group=4)
    groups, rewards = np.reshape(seen, (3, 4)), np.array(spread(completions(micro)), float)
    np.testing.assert_array_equal(rewards, [*groups.max(axis=1), *groups.min(axis=1)])


@pytest.mark.parametrize("reward", [lambda completions: [0.5] * len(completions), lambda completions: [None] * len(completions)])
def test_undecided_pairs_teach_nothing(loaded: Any, reward: Any) -> None:
    micro = roll(loaded, reward)
    assert not np.array(micro.batch.lengths).any() and results(micro.metrics)["frac_reward_zero_std"] == 1
    metrics, gradient = loss_and_gradient(loaded[0], dpo(), micro.batch)
    assert metrics["loss"] == pytest.approx(np.log(2)) and not any(mx.any(g != 0).item() for g in gradient.values())


def test_it_is_dpo_on_the_sampled_pairs(loaded: Any) -> None:
    """The same loss as for the same pairs from a file, with the reference of the model without adapters."""
    model, tokenizer = loaded
    micro = roll(loaded)
    prompts = [tokenizer.encode(text) for text in TEXTS] * 2
    examples = [
        Example(np.array([*p, *c], np.int32), np.arange(len(p) + len(c)) >= len(p), None, "rows.jsonl:1")
        for p, c in zip(prompts, completions(micro), strict=True)
    ]
    offline = pair_batch([Pair(c, r) for c, r in zip(examples[:3], examples[3:], strict=True)]).batch
    with evaluating(model), disabled(model):
        offline = offline._replace(ref_logps=scorer(model)(offline)[0])
    (ours, _), (theirs, _) = (loss_and_gradient(model, dpo(), batch) for batch in (micro.batch, offline))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4) and abs(ours["loss"] - np.log(2)) > 1e-3


def test_exploration_samples_from_the_reference(loaded: Any) -> None:
    """Greedy, so that it is known what each of the two says."""
    model, tokenizer = loaded
    micro = roll(loaded, explore=True, top_k=1)
    marks = np.array(micro.batch.from_reference)
    assert (marks[:3] != marks[3:]).all()
    said = completions(micro)
    for place, text in enumerate(TEXTS):
        ours, theirs = (said[place + 3 * int(marks[place] == by)] for by in (True, False))
        assert ours != theirs
        assert ours == greedy(model, tokenizer.encode(text), len(ours))
        with disabled(model):
            assert theirs == greedy(model, tokenizer.encode(text), len(theirs))


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    with evaluating(model):
        found = list(tokens)
        for _ in range(count):
            found.append(int(model(mx.array([found]))[0, -1].argmax().item()))
    return found[len(tokens) :]


def test_exploration_is_the_reference_answers_log_probability(loaded: Any) -> None:
    micro = roll(loaded, explore=True)
    plain, explored = (loss_and_gradient(loaded[0], o, micro.batch)[0] for o in (dpo(), xpo(alpha=0.25)))
    logps = np.array(scorer(loaded[0])(micro.batch)[0])
    sequence = np.array(micro.batch.sequence)
    marked = [logps[sequence == s].sum() for s in range(6) if micro.batch.from_reference[s].item()]  # type: ignore[index]
    assert explored["exploration"] == pytest.approx(sum(marked) / 3, rel=1e-4)
    assert explored["loss"] == pytest.approx(plain["loss"] + 0.25 * explored["exploration"], rel=1e-4)


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def command(model_folder: Path, tmp_path: Path) -> tuple[Any, ...]:
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        (tmp_path / "data" / f"{split}.jsonl").write_bytes(b"\n".join(orjson.dumps({"prompt": "abc" * n}) for n in range(1, 6)))
    (tmp_path / "rewards.py").write_text("def brief(completion_ids):\n    return [sum(ids) % 97 / 97 for ids in completion_ids]\n")
    sizes = ("--batch-size", 2, "--max-completion-length", 6, "--steps-per-report", 1, "--learning-rate", 1e-3, "--num-layers", -1)
    rewards = ("--reward-file", tmp_path / "rewards.py", "--rewards", "brief")
    return "online-dpo", "--model", model_folder, "--data", tmp_path / "data", *sizes, *rewards


def losses(folder: Path) -> list[float]:
    lines = [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.mark.parametrize("options", [(), ("--xpo-alpha", 1e-3), ("--train-type", "full"), ("--loss-type", "ipo")], ids=str)
def test_it_trains(options: tuple, command: tuple, tmp_path: Path, mlxlora: Any) -> None:
    outcome = mlxlora(*command, *options, "--iters", 3, "--adapter-path", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert np.isfinite(losses(tmp_path / "run")).all() and len(losses(tmp_path / "run")) == 3
    if not options:
        assert losses(tmp_path / "run")[0] == pytest.approx(np.log(2), rel=1e-4)


def test_resumed(command: tuple, tmp_path: Path, mlxlora: Any) -> None:
    command += ("--save-every", 2, "--dropout", 0.2, "--xpo-alpha", 1e-3)
    assert mlxlora(*command, "--iters", 4, "--adapter-path", tmp_path / "whole").code == 0
    assert mlxlora(*command, "--iters", 2, "--adapter-path", tmp_path / "stopped").code == 0
    assert mlxlora(*command, "--iters", 4, "--adapter-path", tmp_path / "stopped", "--resume").code == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--use-prompt",), "--use-prompt: both completions of a pair have the same prompt"),
        (("--group-size", 1), "--group-size must be >= 2, got 1"),
        (("--xpo-alpha", 1e-5, "--reference-model-path", "other"), "--xpo-alpha: the reference that answers is the policy"),
        (("--loss-type", "x"), "--loss-type must be one of sigmoid"),
    ],
)
def test_mistakes(options: tuple, message: str, command: tuple, tmp_path: Path, mlxlora: Any) -> None:
    outcome = mlxlora(*command, *options, "--adapter-path", tmp_path / "run")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err
