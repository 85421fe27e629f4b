"""Did it help? The answers of a model without and with its adapters to the prompts of a split, with rewards and intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import mlx.nn as nn
import numpy as np
from attrs import evolve, frozen

from ..adapters.prepare import attached, base_of, load
from ..config.options import ModelOptions
from ..data import sources
from ..data.dialogue import sampled_turns
from ..data.formats import last_text
from ..data.sources import Context
from ..data.tokenize import Prompt
from ..models.modes import vocabulary
from ..utils.ticks import listening, ticking
from .groups import CompletionGroup
from .rewards import NamedReward
from .source import PromptSource, Roller

BEFORE, AFTER = "base", "adapters"
_Z = 1.96  # half of a 95 % interval in standard errors


@frozen
class AnswerOptions:
    """Which rows are answered, and how many at once.

    Attributes:
        split: of the data.
        limit: at most so many rows; 0 = all.
        batch_size: prompts at once.
        seed: of the split of the rows, and of sampling.
    """

    split: str = "test"
    limit: int = 0
    batch_size: int = 8
    seed: int = 0


@frozen(eq=False)
class Answered:
    """The answers of a split: one for each prompt, by model: `base`, then `adapters` if there are any."""

    rewards: Sequence[str]
    groups: Mapping[str, Sequence[CompletionGroup]]
    preferred: np.ndarray | None = None
    """[prompts], the probability that a judge prefers the answer of the adapters."""

    def values(self, name: str, model: str) -> np.ndarray:
        """[prompts], a reward of a model's answers; NaN where the function gave None."""
        i = self.rewards.index(name)
        return np.array([group.parts[i, 0] for group in self.groups[model]])

    def rows(self) -> list[dict[str, Any]]:
        """An object for each prompt: where it stands, its text, and each model's answer and rewards."""
        shown = []
        for i, first in enumerate(self.groups[BEFORE]):
            row: dict[str, Any] = {"location": first.prompt.location, "prompt": last_text(first.prompt.prompt)}
            for model, groups in self.groups.items():
                rewards = {name: _plain(value) for name, value in zip(self.rewards, groups[i].parts[:, 0], strict=True)}
                row[model] = {"answer": groups[i].texts[0], "rewards": rewards}
            shown.append(row if self.preferred is None else {**row, "judge": float(self.preferred[i])})
        return shown


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean and half of its 95 % interval (normal approximation); NaN counts nowhere.

    >>> interval(np.array([1.0, 1.0, 0.0, 0.0, np.nan]))[0]
    0.5
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return math.nan, math.nan
    spread = float(known.std(ddof=1)) if len(known) > 1 else math.nan
    return float(known.mean()), _Z * spread / math.sqrt(len(known))


def answer_split(
    source: PromptSource,
    model_options: ModelOptions,
    adapter_path: str | None,
    how: AnswerOptions,
    judge: NamedReward | None = None,
) -> Answered:
    """Answers the prompts of a split, greedily unless the source samples, without the adapters and with them.

    Args:
        source: prompts, and rewards for their answers.
        model_options: the model; default: that of the adapters.
        adapter_path: folder of adapters; None: the model alone.
        how: which rows.
        judge: compares the answers without and with the adapters.

    Raises:
        InputError: no such split, model or adapters; a row without a prompt or without a column that a reward reads.
    """
    with listening(lambda _: None):  # answers are counted, not rows
        chosen = {how.split: sources.load_split(source.data, how.split, how.seed)[: how.limit or None]}
        source.check_rows(chosen)
        model, tokenizer = load(base_of(model_options, adapter_path) if adapter_path else model_options)
        splits = sources.tokenize(source, chosen, tokenizer)
    sources.check_tokens(source, splits, {"the model": vocabulary(model)}, tokenizer)
    items = list(splits[how.split].items)
    groups = {BEFORE: _answers(source, model, tokenizer, items, how)}
    if adapter_path:
        with attached(model, adapter_path):
            groups[AFTER] = _answers(source, model, tokenizer, items, how)
    preferred = None if judge is None or not adapter_path else _preferred(judge, groups)
    return Answered([reward.name for reward in source.rollouts.rewards], groups, preferred)


def _answers(
    source: PromptSource, model: nn.Module, tokenizer: Any, items: Sequence[Prompt], how: AnswerOptions
) -> list[CompletionGroup]:
    context = Context(model, tokenizer, how.seed, items=items, validation=True)
    roller = cast(Roller, source.make(context))
    if source.rollouts.sampling.temperature > 0:  # validation is greedy; here the options say
        roller = evolve(roller, how=evolve(roller.how, sampling=source.rollouts.sampling))
    found: list[CompletionGroup] = []
    batches = [items[start : start + how.batch_size] for start in range(0, len(items), how.batch_size)]
    for number, batch in enumerate(ticking(batches, size=len)):
        found += roller.rolled(batch, (number, 0))
    return found


def _preferred(judge: NamedReward, groups: Mapping[str, Sequence[CompletionGroup]]) -> np.ndarray:
    """[prompts], the probability that the judge prefers the answer with the adapters."""
    turns = [
        sampled_turns(group.prompt.prompt, group.texts[0])
        for pair in zip(groups[AFTER], groups[BEFORE], strict=True)
        for group in pair
    ]
    answers = judge.function(prompts=[prompt for prompt, _ in turns], completions=[answer for _, answer in turns])
    return np.array(answers[::2], dtype=np.float64)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
