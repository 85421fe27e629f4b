"""The methods as users call them: load, prepare, run."""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import mlx.nn as nn
from attrs import evolve

from . import objectives
from .adapters.inject import layers_to_train
from .adapters.prepare import base_of, load
from .config import config_file as settings
from .config.options import (
    AdapterOptions,
    CPOOptions,
    DataOptions,
    DistillOptions,
    DPOOptions,
    GRPOOptions,
    KTOOptions,
    ModelOptions,
    OnlineDPOOptions,
    ORPOOptions,
    Output,
    OwnSampling,
    PairData,
    PairSampling,
    PromptData,
    RewardOptions,
    RowOptions,
    SamplingOptions,
    SFTOptions,
    Training,
)
from .data import formats, sources
from .data.rows import Row
from .data.sources import Source
from .distributed.ranks import current_ranks
from .errors import InputError
from .models.loading import load_tokenizer, load_with_config
from .models.logprobs import scorer
from .models.modes import vocabulary
from .models.teacher import with_teacher
from .objectives.advantages import advantage
from .objectives.divergences import DIVERGENCES
from .objectives.objective import Objective
from .reporting.card import Card
from .reporting.history import Method
from .reporting.preview import Parse, Preview
from .reporting.reporters import reporters
from .rollouts.judges import judge, reward_model
from .rollouts.pairs import on_policy_pairs
from .rollouts.rewards import NamedReward, load_rewards
from .rollouts.sampling import Sampling
from .rollouts.source import Rollouts, own_answers, prompts
from .training.answers import answered
from .training.dry_run import dry_run
from .training.evaluate import make_evaluate
from .training.reference import cache_file
from .training.run import Run, execute, split_batches
from .training.startup import check_options, claimed, introduce
from .training.unpaired import unpaired
from .utils.user_code import load_object


def look(method: str, tokenizer: Any, data: RowOptions, *, nll_on_prompt: bool = False) -> Preview:
    """What a method would train on.

    Args:
        method: any of those that train.
        tokenizer: the model's.
        data: options of the method's rows.
        nll_on_prompt: orpo's option.

    Raises:
        InputError: bad data.
    """
    source, parse = _READ[method](data, nll_on_prompt)
    whole, _ = _READ[method](attrs.evolve(data, max_seq_length=sys.maxsize), nll_on_prompt)
    rows, lengths = sources.load_rows(source.data, 0), []

    def prepare(row: Row, _: Any) -> Any:
        """The item of a row, its whole length put down; only what is too long is read twice."""
        item = whole.prepare(row, tokenizer)
        if item is not None:
            lengths.append(max(map(whole.length, whole.arrange([item]))))
        return source.prepare(row, tokenizer) if item is not None and lengths[-1] > data.max_seq_length else item

    keys = {name.removesuffix("_key"): value for name, value in attrs.asdict(data).items() if name.endswith("_key")}
    splits = sources.tokenize(source, rows, tokenizer, encoder=prepare)
    return Preview(source, rows, splits, tokenizer, lambda row: parse(row, {**formats.KEYS, **keys}), lengths)


def _pairs(data: Any, nll_on_prompt: bool) -> tuple[Source, Parse]:
    return sources.pairs(data, score_prompt=nll_on_prompt), formats.preference_record


def _prompts(data: Any, _: bool) -> tuple[Source, Parse]:
    return prompts(data, Rollouts((), 1, Sampling(1))), formats.prompt_record


def _judged(row: Row, keys: Mapping[str, str]) -> Any:
    return formats.preference_record(row, keys) if {"chosen", "rejected"} <= row.fields.keys() else formats.labeled_record(row, keys).completion


_READ: dict[str, Callable[[Any, bool], tuple[Source, Parse]]] = {
    **dict.fromkeys(("sft", "distill"), lambda data, _: (sources.rows(data), formats.supervised_record)),
    **dict.fromkeys(("dpo", "orpo", "cpo"), _pairs),
    "kto": lambda data, _: (unpaired(data, reference_point=False), _judged),
    **dict.fromkeys(("grpo", "online-dpo", "gkd"), _prompts),
}

Groups = dict[type, Any]


def sft(*groups: Any, **options: Any) -> dict[str, Any]:
    """Supervised fine-tuning, `mlxlora sft` in Python: `sft(model="folder", data="rows.jsonl", iters=100)`.

    Args:
        groups: whole groups of options, such as `Training(iters=100)`.
        options: single options, named as the flags are.

    Returns:
        The results: steps, losses, where the adapters are.

    Raises:
        InputError: bad options or data.
        RunError: losses or gradients that are not finite, of five batches in a row; the last good state was saved.
    """
    chosen = settings.gather((ModelOptions, DataOptions, AdapterOptions, Training, Output, SFTOptions), groups, options)
    method = chosen[SFTOptions]
    objective = user_objective(method.objective) or objectives.sft(**_named(method, "neftune_noise_alpha"))
    return _load_and_run("sft", sources.rows(chosen[DataOptions]), objective, chosen, {"noise": method.neftune_noise_alpha})


def distill(*groups: Any, **options: Any) -> dict[str, Any]:
    """Knowledge distillation, `mlxlora distill` in Python; see `sft` for arguments, results and errors."""
    chosen = settings.gather((ModelOptions, DataOptions, AdapterOptions, Training, Output, DistillOptions), groups, options)
    if chosen[DataOptions].packing:
        raise InputError("--packing: a teacher reads plain rows; leave it out")
    return _distilled("distill", sources.rows(chosen[DataOptions]), chosen)


def gkd(*groups: Any, **options: Any) -> dict[str, Any]:
    """Distillation on what the policy samples itself, `mlxlora gkd` in Python; see `sft` for arguments, results and errors."""
    kinds = (ModelOptions, PromptData, AdapterOptions, Training, Output, OwnSampling, DistillOptions)
    chosen = settings.gather(kinds, groups, options)
    data = chosen[PromptData]
    source = own_answers(data, _rollouts(chosen[OwnSampling], RewardOptions(), use_prompt=data.use_prompt))
    return _distilled("gkd", source, chosen)


def _distilled(method: str, source: Source, chosen: Groups) -> dict[str, Any]:
    m = chosen[DistillOptions]
    if m.teacher_model is None:
        raise InputError("--teacher-model is missing: a model folder or hub name with the vocabulary of --model")
    teacher, measure = _loader(chosen[ModelOptions], m.teacher_model, "--teacher-model"), DIVERGENCES[m.divergence](m.jsd_beta)
    objective = user_objective(m.objective) or objectives.distill(nll_weight=m.nll_weight)
    extend = {"extend": lambda score, tokenizer: with_teacher(score, teacher(tokenizer), measure)}
    return _load_and_run(method, source, objective, chosen, extend)


def dpo(*groups: Any, **options: Any) -> dict[str, Any]:
    """Direct preference optimisation, `mlxlora dpo` in Python; see `sft` for arguments, results and errors."""
    chosen = settings.gather((ModelOptions, PairData, AdapterOptions, Training, Output, DPOOptions), groups, options)
    m = chosen[DPOOptions]
    objective = user_objective(m.objective) or objectives.dpo(**_named(m, "reference_model_path", "reference_cache"))
    return _load_and_run("dpo", sources.pairs(chosen[PairData]), objective, chosen, _reference(chosen[ModelOptions], m))


def cpo(*groups: Any, **options: Any) -> dict[str, Any]:
    """Contrastive preference optimisation, `mlxlora cpo` in Python; see `sft` for arguments, results and errors."""
    chosen = settings.gather((ModelOptions, PairData, AdapterOptions, Training, Output, CPOOptions), groups, options)
    m = chosen[CPOOptions]
    objective = user_objective(m.objective) or objectives.cpo(**_named(m))
    return _load_and_run("cpo", sources.pairs(chosen[PairData]), objective, chosen)


def orpo(*groups: Any, **options: Any) -> dict[str, Any]:
    """Odds-ratio preference optimisation, `mlxlora orpo` in Python; see `sft` for arguments, results and errors."""
    chosen = settings.gather((ModelOptions, PairData, AdapterOptions, Training, Output, ORPOOptions), groups, options)
    m = chosen[ORPOOptions]
    objective = user_objective(m.objective) or objectives.orpo(**_named(m))
    return _load_and_run("orpo", sources.pairs(chosen[PairData], score_prompt=m.nll_on_prompt), objective, chosen)


def kto(*groups: Any, **options: Any) -> dict[str, Any]:
    """Kahneman-Tversky optimisation, `mlxlora kto` in Python; see `sft` for arguments, results and errors."""
    chosen = settings.gather((ModelOptions, RowOptions, AdapterOptions, Training, Output, KTOOptions), groups, options)
    m = chosen[KTOOptions]
    objective = user_objective(m.objective) or objectives.kto(**_named(m, "reference_model_path", "reference_cache"))
    source = unpaired(chosen[RowOptions], reference_point="reference_point" in objective.needs)
    return _load_and_run("kto", source, objective, chosen, _reference(chosen[ModelOptions], m))


def grpo(*groups: Any, **options: Any) -> dict[str, Any]:
    """Group-relative policy optimisation, `mlxlora grpo` in Python; see `sft` for arguments, results and errors.

    Rewards may also be Python functions, through `prompts` and `run`.
    """
    kinds = (ModelOptions, PromptData, AdapterOptions, Training, Output, SamplingOptions, RewardOptions, GRPOOptions)
    chosen = settings.gather(kinds, groups, options)
    m, sampling, data = chosen[GRPOOptions], chosen[SamplingOptions], chosen[PromptData]
    _check_policy(m, sampling, data)
    others = ("reference_model_path", "num_iterations", "top_entropy_quantile", "baseline", "scale_rewards")
    objective = user_objective(m.objective) or objectives.grpo(
        **_named(m, *others), top_entropy=m.top_entropy_quantile, max_completion_length=sampling.max_completion_length
    )
    rollouts = _rollouts(
        sampling,
        chosen[RewardOptions],
        advantage=advantage(m.baseline, m.scale_rewards),
        use_prompt=data.use_prompt,
        keep_logps=m.num_iterations > 1,
    )
    source = prompts(data, rollouts, repeats=m.num_iterations)
    return _load_and_run("grpo", source, objective, chosen, _online_reference(chosen, m.reference_model_path))


def online_dpo(*groups: Any, **options: Any) -> dict[str, Any]:
    """DPO on pairs that the policy samples, `mlxlora online-dpo` in Python; see `sft` for arguments, results and errors."""
    kinds = (ModelOptions, PromptData, AdapterOptions, Training, Output, PairSampling, RewardOptions, OnlineDPOOptions)
    chosen = settings.gather(kinds, groups, options)
    m, data = chosen[OnlineDPOOptions], chosen[PromptData]
    _check_pairs(m, chosen[AdapterOptions], data)
    _check_judge(m, chosen[PairSampling], chosen[Output])
    named = _named(m, "reference_model_path", "xpo_alpha", "judge_model")
    method = objectives.xpo(alpha=m.xpo_alpha, **named) if m.xpo_alpha else objectives.dpo(**named)
    judges = () if m.judge_model is None else (judge(*_load_other(m.judge_model, chosen[ModelOptions], "--judge-model")),)
    rollouts = _rollouts(chosen[PairSampling], chosen[RewardOptions], judges)
    source = on_policy_pairs(data, rollouts, explore=bool(m.xpo_alpha))
    objective = user_objective(m.objective) or method
    return _load_and_run("online-dpo", source, objective, chosen, _online_reference(chosen, m.reference_model_path))


def _named(options: Any, *others: str) -> dict[str, Any]:
    """The options of a method that its objective takes under the same names."""
    return {name: value for name, value in settings.dump(options).items() if name not in ("objective", *others)}


def _rewards(rewards: RewardOptions) -> tuple[NamedReward, ...]:
    if rewards.reward_model:
        return (reward_model(rewards.reward_model),)
    return load_rewards(rewards.rewards, rewards.reward_file, rewards.reward_weights)


def _load_other(path: str, model: ModelOptions, flag: str, read: Callable[[ModelOptions], Any] | None = None) -> Any:
    """Another model, as it is, whatever --quantize does to --model; what is wrong with it is said of the flag that names it."""
    try:
        return (read or load)(evolve(model, model=path, quantize=None))
    except InputError as error:
        raise InputError(str(error).replace("--model", flag, 1)) from None


def _check_judge(method: OnlineDPOOptions, sampling: PairSampling, output: Output) -> None:
    if method.judge_model and sampling.group_size != 2:
        raise InputError(f"--judge-model compares two completions: use --group-size 2, got {sampling.group_size}")
    if method.judge_model and output.val_batches:
        raise InputError("--judge-model compares two completions, and validation has one of each prompt: use --val-batches 0")


def _rollouts(sampling: SamplingOptions, rewards: RewardOptions, judges: tuple[NamedReward, ...] = (), **fields: Any) -> Rollouts:
    others = ("group_size", "rollout_batch", "max_completion_length")
    return Rollouts(
        rewards=judges or _rewards(rewards),
        group_size=sampling.group_size,
        sampling=Sampling(**_named(sampling, *others), max_tokens=sampling.max_completion_length),
        options=rewards,
        batch=sampling.rollout_batch,
        **fields,
    )


def _check_policy(method: GRPOOptions, sampling: SamplingOptions, data: PromptData) -> None:
    if data.use_prompt and method.num_iterations > 1:
        raise InputError("--use-prompt needs --num-iterations 1: the prompt's tokens were not sampled, so they have no ratio")
    if method.loss_type == "reinforce" and method.num_iterations > 1:
        raise InputError("--loss-type reinforce needs --num-iterations 1: it has no importance ratio for older completions")
    if sampling.group_size == 1 and method.baseline != "batch":
        raise InputError(f"--group-size must be >= 2, got 1; --baseline batch can do with 1, --baseline {method.baseline} cannot")


def _check_pairs(method: OnlineDPOOptions, adapter: AdapterOptions, data: PromptData) -> None:
    if data.use_prompt:
        raise InputError("--use-prompt: both completions of a pair have the same prompt, whose tokens cancel; leave it out")
    if method.xpo_alpha and (adapter.train_type == "full" or method.reference_model_path):
        raise InputError("--xpo-alpha: the reference that answers is --model without adapters; use --train-type lora or dora alone")


def _online_reference(chosen: Groups, path: str | None) -> dict[str, Any]:
    """The fields of `Run` for a reference whose log-probabilities are computed with each batch.

    It is loaded once the run has begun; whether it may be is known before.
    """
    if path:
        _load_other(path, chosen[ModelOptions], "--reference-model-path", load_tokenizer)
    other = path or (chosen[ModelOptions].model if chosen[AdapterOptions].train_type == "full" else None)
    return {"reference": _loader(chosen[ModelOptions], other) if other else None}


def _loader(model: ModelOptions, path: str, flag: str = "--reference-model-path") -> Callable[[Any], nn.Module]:
    """Loads another model when it is needed; it has to share the policy's tokenizer."""

    def other(tokenizer: Any) -> nn.Module:
        reference, its_tokenizer = _load_other(path, model, flag)
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"{flag} {path}: its vocabulary is not that of --model {model.model}")
        return reference

    return other


def _reference(model: ModelOptions, method: DPOOptions | KTOOptions) -> dict[str, Any]:
    """The fields of `Run` that say what the reference is."""
    path = method.reference_model_path
    cache = cache_file(path or model.model or "", "" if path else model.quantize or "") if method.reference_cache else None
    return {"reference": _loader(model, path) if path else None, "reference_cache": cache}


def run(
    model: nn.Module,
    tokenizer: Any,
    objective: Objective,
    source: Source,
    training: Training = Training(),
    *,
    adapter: AdapterOptions = AdapterOptions(),
    **output: Any,
) -> dict[str, Any]:
    """Trains a loaded model: what every method comes down to.

    Args:
        model: an mlx-lm model; `prepare` makes its adapters.
        tokenizer: its tokenizer.
        objective: what is minimised.
        source: how rows become batches.
        training: options of the optimisation.
        adapter: what is trained.
        output: fields of `Output`, such as `adapter_path="adapters"`.

    Returns:
        The results: steps, losses, where the adapters are.

    Raises:
        InputError: bad options or data.
        RunError: losses or gradients that are not finite, of five batches in a row; the last good state was saved.
    """
    files, ranks = Output(**output), current_ranks()
    with ExitStack() as held:
        with ranks.together():
            if ranks.leads:
                held.enter_context(claimed(files, None))
            rows = sources.load_rows(source.data, training.seed)
        groups = {type(group): group for group in (Method(None), ModelOptions(), source.data, adapter, training, files)}
        return _run(model, tokenizer, objective, source, rows, groups)


def evaluate_split(
    *, model_options: ModelOptions, data_options: DataOptions, adapter_path: str | None, split: str, batch_size: int, seed: int = 0
) -> dict[str, float]:
    """Loss [nats per scored token] and perplexity of a whole split, every row counted once; the model is that of `base_of`.

    Raises:
        InputError: no such split, model or adapters.
    """
    base = base_of(model_options, adapter_path) if adapter_path else model_options
    source, rows = sources.rows(data_options), sources.load_rows(data_options, seed)
    if not rows.get(split):
        raise InputError(f"{data_options.data}: no {split} split; found {', '.join(k for k in rows if rows[k])}")
    model, tokenizer = load(base, adapter_path)
    splits = sources.tokenize(source, {split: rows[split]}, tokenizer)
    sources.check_tokens(source, splits, vocabulary(model), tokenizer)
    objective = objectives.sft()
    whole = Run(model, tokenizer, objective, source, splits, Training(batch_size=batch_size), AdapterOptions(), Output())
    return make_evaluate(model, objective, scorer(model), whole.ranks)(split_batches(whole, split))


def user_objective(reference: str | None) -> Objective | None:
    """The objective that --objective file.py:name names; a function without arguments may return it.

    Raises:
        InputError: there is none.
    """
    if reference is None:
        return None
    found = load_object(reference, "--objective")
    found = found() if callable(found) and not isinstance(found, Objective) else found
    if not isinstance(found, Objective):
        raise InputError(f"--objective {reference}: expected an Objective, got {type(found).__name__}")
    return found


# --- what every method does --------------------------------------------------------------------


def _load_and_run(
    method: str, source: Source, objective: Objective, groups: Groups, fields: dict[str, Any] | None = None
) -> dict[str, Any]:
    ranks = current_ranks()
    with ExitStack() as held:
        with ranks.together():
            if ranks.leads:
                held.enter_context(claimed(groups[Output], method))
            rows = sources.load_rows(source.data, groups[Training].seed)
            model, tokenizer, _ = load_with_config(groups[ModelOptions], lazy=groups[Training].fully_shard)
            layers_to_train(model, groups[AdapterOptions])  # before the rows are tokenised
        return _run(model, tokenizer, objective, source, rows, {Method: Method(method), **groups}, **fields or {})


def _run(
    model: nn.Module, tokenizer: Any, objective: Objective, source: Source, rows: dict[str, list], groups: Groups, **fields: Any
) -> dict[str, Any]:
    adapter, ratio = groups[AdapterOptions], groups[Training].loraplus_lr_ratio
    if ratio is not None and adapter.train_type == "full":
        raise InputError(f"--loraplus-lr-ratio {ratio} is for adapters; use --train-type lora or dora")
    ranks = current_ranks()
    told = reporters(groups[Output]) if ranks.leads else ()
    with ranks.together():
        check_options(groups[Training], adapter, online=source.online, with_teacher="extend" in fields)
        splits = sources.tokenize(source, rows, tokenizer, lambda text: [reporter.note(text) for reporter in told])
        sources.check_tokens(source, splits, vocabulary(model), tokenizer)
    if ranks.leads and not groups[Output].dry_run:
        told = (*told, Card(Path(groups[Output].adapter_path), {name: split.counts.rows for name, split in splits.items()}))
    whole = Run(
        model=model,
        tokenizer=tokenizer,
        objective=objective,
        source=source,
        splits=splits,
        training=groups[Training],
        adapter=adapter,
        output=groups[Output],
        config={name: value for name, value in settings.dump(*groups.values()).items() if name not in ("resume", "overwrite")},
        name=groups[ModelOptions].model or "",
        reporters=told,
        ranks=ranks,
        **fields,
    )
    introduce(whole)
    if whole.output.dry_run:
        return dry_run(whole)
    with answered(whole, rows) as asked:
        results = execute(asked)
    whole.tell("finish", results)
    return results
