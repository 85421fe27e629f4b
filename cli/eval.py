"""`mlxlora eval`."""

from collections.abc import Sequence
from typing import Any, Literal

import attrs
from attrs import validators as v

from mlxlora.config.fields import group, option
from mlxlora.config.options import DataOptions, ModelOptions, PromptData, RewardOptions, SamplingOptions
from mlxlora.errors import InputError
from mlxlora.utils.output import echo, echo_written, json_line

from .flags import flags


@group("Evaluation")
class EvalOptions:
    """Which rows are evaluated, and with which adapters."""

    adapter_path: str | None = option(None, "Folder of adapters; default: the model as it is.")
    split: Literal["valid", "test", "train"] = option("test", "Split to evaluate.")
    batch_size: int = option(4, "Rows in a batch.", v.ge(1))
    seed: int = option(0, "Seed of --valid-fraction; default: that of the adapters' run, if its rows are used.", v.ge(0))


@group("Answers")
class AnswerRewards:
    """Rewards of the model's answers, in place of the loss."""

    rewards: Sequence[str] | None = option(
        None, "Answer the prompts and reward the answers, without and with adapters: built-in rewards, or of --reward-file."
    )
    reward_file: str | None = option(None, "Your own reward functions: a Python file.")
    judge_model: str | None = option(None, "A chat model that says whether the answers with adapters are better.")
    num: int = option(0, "Number of rows to answer; 0 = all of the split.", v.ge(0))
    max_tokens: int = option(256, "Longest answer, tokens.", v.ge(1))
    temperature: float = option(0.0, "Temperature of sampling; 0 = always the likeliest token.", v.ge(0))
    system: str | None = option(None, "System message for rows that have none.")
    json: bool = option(False, "Print JSON, one object per prompt with its answers and rewards.")
    output: str | None = option(None, "Keep the answers and their rewards in this JSONL file.")
    overwrite: bool = option(False, "Replace the file in --output.")


_TEXTS = {
    "model": "Model folder or hub name; default: that of the adapters, and without --data and adapters the bundled starter.",
    "data": "Folder with train/valid/test.jsonl, a JSONL or JSON file, or a hub data set name; default: that of the adapters' run.",
    **dict.fromkeys(("shuffle", "packing")),
}


@flags(starter="sft", texts=_TEXTS)
def evaluate(model: ModelOptions, data: DataOptions, evaluation: EvalOptions, answers: AnswerRewards) -> None:
    """Print loss (nats per trained token) and perplexity of a split; with --rewards, rewards of answers to its prompts."""
    if answers.rewards or answers.judge_model:
        _rewarded(model, data, evaluation, answers)
        return
    if answers.output:
        raise InputError(f"--output {answers.output} keeps answers: name --rewards or --judge-model too, or leave it out")
    from mlxlora.distributed.ranks import current_ranks
    from mlxlora.training.session import evaluate_split

    metrics = evaluate_split(
        model_options=model,
        data_options=data,
        adapter_path=evaluation.adapter_path,
        split=evaluation.split,
        batch_size=evaluation.batch_size,
        seed=evaluation.seed,
    )
    shown = {name: value for name, value in metrics.items() if name != "nll" or value != metrics["loss"]}
    for name, value in shown.items() if current_ranks().leads else ():
        echo(f"{name} {value:.6g}")


def _rewarded(model: ModelOptions, data: DataOptions, evaluation: EvalOptions, answers: AnswerRewards) -> None:
    if answers.judge_model and not evaluation.adapter_path:
        raise InputError("--judge-model compares answers without and with adapters: name them with --adapter-path")
    from mlxlora.utils.folders import check_new_file

    file = check_new_file(answers.output, "--output", overwrite=answers.overwrite) if answers.output else None
    source, judge, how = _answering(model, data, evaluation, answers)
    from mlxlora.reporting.card import CUSTOM
    from mlxlora.reporting.reporters import terminal_for
    from mlxlora.reporting.stage import announced
    from mlxlora.rollouts.scored_answers import answer_split
    from mlxlora.utils.files import atomic_file

    with announced(terminal_for(CUSTOM, quiet=answers.json), "answering prompts"):
        found = answer_split(source, model, evaluation.adapter_path, how, judge)
    kept = [json_line(row) for row in found.rows()]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    for line in kept if answers.json else _table(found):
        echo(line)
    if file is not None and not answers.json:
        echo_written("answers", file)


def _answering(model: ModelOptions, data: DataOptions, evaluation: EvalOptions, answers: AnswerRewards) -> tuple[Any, Any, Any]:
    """The source of prompts with their rewards, the judge, and which rows are answered."""
    from mlxlora.rollouts.from_options import judge_of, rollouts_from
    from mlxlora.rollouts.scored_answers import AnswerOptions
    from mlxlora.rollouts.source import PromptSource, prompt_fields

    common: dict[str, Any] = {f.name: getattr(data, f.name) for f in attrs.fields(PromptData) if hasattr(data, f.name)}
    prompts = PromptData(**{**common, "system": answers.system})
    sampling = SamplingOptions(group_size=1, max_completion_length=answers.max_tokens, temperature=answers.temperature or 1.0)
    rollouts = rollouts_from(sampling, RewardOptions(reward_file=answers.reward_file, **_given(answers.rewards)))
    if not answers.rewards:
        rollouts = attrs.evolve(rollouts, rewards=())
    if not answers.temperature:
        rollouts = attrs.evolve(rollouts, sampling=attrs.evolve(rollouts.sampling, temperature=0.0))
    source = PromptSource(**prompt_fields(prompts, rollouts), online=True)
    judge = judge_of(answers.judge_model, model) if answers.judge_model else None
    return source, judge, AnswerOptions(evaluation.split, answers.num, evaluation.batch_size, evaluation.seed)


def _given(rewards: Sequence[str] | None) -> dict[str, Any]:
    return {"rewards": tuple(rewards)} if rewards else {}


def _table(found: Any) -> list[str]:
    """A line for each reward: mean and 95 % interval of each model, and of the differences."""
    from mlxlora.rollouts.scored_answers import AFTER, BEFORE, interval

    def told(values: Any, sign: str = "") -> str:
        mean, half = interval(values)
        return f"{mean:{sign}.3f} ±{half:.3f}"

    models = list(found.groups)
    count = len(found.groups[BEFORE])
    width = max(12, *map(len, found.rewards), 0)
    lines = [f"{count} prompts; mean and 95% interval", f"{'':<{width}}" + "".join(f"  {name:>14}" for name in models)]
    lines[1] += f"  {'difference':>14}" if AFTER in models else ""
    lines = lines if found.rewards else lines[:1]
    for name in found.rewards:
        cells = [told(found.values(name, model)) for model in models]
        if AFTER in models:
            cells.append(told(found.values(name, AFTER) - found.values(name, BEFORE), "+"))
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>14}" for cell in cells))
    if found.preferred is not None:
        lines.append(f"the judge prefers the answers with adapters: {told(found.preferred)}")
    return lines
