"""The methods as users call them: load, prepare, run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
from attrs import evolve

from . import objectives, settings, sources
from .adapters import attach, layers_to_train
from .compose import Objective
from .config import (
    AdapterOptions,
    CPOOptions,
    DataOptions,
    DPOOptions,
    GRPOOptions,
    ModelOptions,
    ORPOOptions,
    Output,
    PairData,
    PromptData,
    RewardOptions,
    SamplingOptions,
    SFTOptions,
    Training,
)
from .data import Counts, Example
from .errors import InputError
from .evaluate import make_evaluate
from .logprobs import scorer
from .modes import evaluating
from .online import ADVANTAGES, Rollouts, prompts
from .reference import cache_file
from .report import Terminal
from .rewards import load_rewards
from .rollouts import Sampling
from .runs import Run, claim, execute, reporters, split_pieces
from .sources import Source, Split
from .userfile import load_object

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
        RunError: a loss or gradient that is not finite; the last good state was saved.
    """
    chosen = settings.gather((ModelOptions, DataOptions, AdapterOptions, Training, Output, SFTOptions), groups, options)
    method = chosen[SFTOptions]
    objective = user_objective(method.objective) or objectives.sft(**_named(method))
    return _load_and_run(sources.rows(chosen[DataOptions]), objective, chosen)


def dpo(*groups: Any, **options: Any) -> dict[str, Any]:
    """Direct preference optimisation, `mlxlora dpo` in Python; see `sft` for arguments, results and errors."""
    chosen = settings.gather((ModelOptions, PairData, AdapterOptions, Training, Output, DPOOptions), groups, options)
    m = chosen[DPOOptions]
    objective = user_objective(m.objective) or objectives.dpo(**_named(m, "reference_model_path", "reference_cache"))
    return _load_and_run(sources.pairs(chosen[PairData]), objective, chosen, _reference(chosen[ModelOptions], m))


def cpo(*groups: Any, **options: Any) -> dict[str, Any]:
    """Contrastive preference optimisation, `mlxlora cpo` in Python; see `sft` for arguments, results and errors."""
    chosen = settings.gather((ModelOptions, PairData, AdapterOptions, Training, Output, CPOOptions), groups, options)
    m = chosen[CPOOptions]
    objective = user_objective(m.objective) or objectives.cpo(**_named(m))
    return _load_and_run(sources.pairs(chosen[PairData]), objective, chosen)


def orpo(*groups: Any, **options: Any) -> dict[str, Any]:
    """Odds-ratio preference optimisation, `mlxlora orpo` in Python; see `sft` for arguments, results and errors."""
    chosen = settings.gather((ModelOptions, PairData, AdapterOptions, Training, Output, ORPOOptions), groups, options)
    m = chosen[ORPOOptions]
    objective = user_objective(m.objective) or objectives.orpo(**_named(m))
    return _load_and_run(sources.pairs(chosen[PairData], score_prompt=m.nll_on_prompt), objective, chosen)


def grpo(*groups: Any, **options: Any) -> dict[str, Any]:
    """Group-relative policy optimisation, `mlxlora grpo` in Python; see `sft` for arguments, results and errors.

    Rewards may also be Python functions, through `prompts` and `run`.
    """
    kinds = (ModelOptions, PromptData, AdapterOptions, Training, Output, SamplingOptions, RewardOptions, GRPOOptions)
    chosen = settings.gather(kinds, groups, options)
    m, rollouts = chosen[GRPOOptions], _rollouts(chosen)
    hyperparameters = _named(m, "reference_model_path", "num_iterations", "top_entropy_quantile")
    objective = user_objective(m.objective) or objectives.grpo(
        **hyperparameters,
        top_entropy=m.top_entropy_quantile,
        max_completion_length=chosen[SamplingOptions].max_completion_length,
    )
    source = prompts(chosen[PromptData], rollouts, repeats=m.num_iterations)
    other = m.reference_model_path or (chosen[ModelOptions].model if chosen[AdapterOptions].train_type == "full" else None)
    return _load_and_run(source, objective, chosen, {"reference": _loader(chosen[ModelOptions], other)})


def _named(options: Any, *others: str) -> dict[str, Any]:
    """The options of a method that its objective takes under the same names."""
    return {name: value for name, value in settings.dump(options).items() if name not in ("objective", *others)}


def _rollouts(chosen: Groups) -> Rollouts:
    s, r, method, data = (chosen[kind] for kind in (SamplingOptions, RewardOptions, GRPOOptions, PromptData))
    if data.use_prompt and method.num_iterations > 1:
        raise InputError("--use-prompt needs --num-iterations 1: the prompt's tokens were not sampled, so they have no ratio")
    return Rollouts(
        rewards=load_rewards(r.rewards, r.reward_file, r.reward_weights),
        group_size=s.group_size,
        sampling=Sampling(**_named(s, "group_size", "rollout_batch", "max_completion_length"), max_tokens=s.max_completion_length),
        advantage=ADVANTAGES[r.scale_rewards],
        options=r,
        use_prompt=data.use_prompt,
        keep_logps=method.num_iterations > 1,
        batch=s.rollout_batch,
    )


def _loader(model: ModelOptions, path: str | None) -> Callable[[Any], nn.Module] | None:
    """Loads another model when it is needed; it has to share the policy's tokenizer."""

    def other(tokenizer: Any) -> nn.Module:
        try:
            reference, its_tokenizer = load(evolve(model, model=path))
        except InputError as error:
            raise InputError(str(error).replace("--model", "--reference-model-path", 1)) from None
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"--reference-model-path {path}: its vocabulary is not that of --model {model.model}")
        return reference

    return other if path else None


def _reference(model: ModelOptions, method: DPOOptions) -> dict[str, Any]:
    """The fields of `Run` that say what the reference is."""
    path = method.reference_model_path
    cache = cache_file(path or model.model or "", "") if method.reference_cache else None
    return {"reference": _loader(model, path), "reference_cache": cache}


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
        RunError: a loss or gradient that is not finite; the last good state was saved.
    """
    files = Output(**output)
    claim(files)
    rows = sources.read(source.data, training.seed)
    groups = {type(group): group for group in (ModelOptions(), source.data, adapter, training, files)}
    return _run(model, tokenizer, objective, source, rows, groups)


def evaluate_split(
    *, model_options: ModelOptions, data_options: DataOptions, adapter_path: str | None, split: str, batch_size: int
) -> dict[str, float]:
    """Loss [nats per scored token] and perplexity of a whole split, every row counted once.

    Raises:
        InputError: no such split, model or adapters.
    """
    source, rows = sources.rows(data_options), sources.read(data_options, 0)
    if not rows.get(split):
        raise InputError(f"{data_options.data}: no {split} split; found {', '.join(k for k in rows if rows[k])}")
    model, tokenizer = load(model_options, adapter_path)
    splits = sources.tokenize(source, {split: rows[split]}, tokenizer)
    objective = objectives.sft()
    whole = Run(model, tokenizer, objective, source, splits, Training(batch_size=batch_size), AdapterOptions(), Output())
    return make_evaluate(model, objective, scorer(model))(split_pieces(whole, split))


def load(options: ModelOptions, adapter_path: str | None = None) -> tuple[nn.Module, Any]:
    """The model and tokenizer of a folder or hub name, through mlx-lm.

    Raises:
        InputError: there is no such model, it is damaged, or the adapters do not fit.
    """
    from mlx_lm.utils import load as load_model

    if options.model is None:
        raise InputError("--model is missing: a model folder or a hub name such as mlx-community/Qwen3-0.6B-4bit")
    _check_folder(options.model)
    trust = options.trust_remote_code
    try:
        model, tokenizer, *_ = load_model(options.model, tokenizer_config={"trust_remote_code": trust}, trust_remote_code=trust)
    except Exception as error:  # the hub, the network, any file of the model: the user can act on each of their messages
        raise InputError(f"--model {options.model}: cannot be loaded: {' '.join(str(error).split())}") from error
    return attach(model, adapter_path) if adapter_path else model, tokenizer


def _check_folder(model: str) -> None:
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"--model {model}: no config.json in this folder")
    if not path.exists() and (path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1):
        raise InputError(f"--model {model}: no such folder, and not a hub name such as org/name")


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


def _load_and_run(source: Source, objective: Objective, groups: Groups, reference: dict[str, Any] | None = None) -> dict[str, Any]:
    claim(groups[Output])
    rows = sources.read(source.data, groups[Training].seed)
    model, tokenizer = load(groups[ModelOptions])
    layers_to_train(model, groups[AdapterOptions])  # before the rows are tokenised
    return _run(model, tokenizer, objective, source, rows, groups, **reference or {})


def _run(
    model: nn.Module, tokenizer: Any, objective: Objective, source: Source, rows: dict[str, list], groups: Groups, **reference: Any
) -> dict[str, Any]:
    whole = Run(
        model=model,
        tokenizer=tokenizer,
        objective=objective,
        source=source,
        splits=sources.tokenize(source, rows, tokenizer),
        training=groups[Training],
        adapter=groups[AdapterOptions],
        output=groups[Output],
        config=settings.dump(*groups.values()),
        name=groups[ModelOptions].model or "",
        reporters=reporters(groups[Output]),
        **reference,
    )
    _introduce(whole)
    question, before = _sample(whole)
    results = execute(whole)
    if question:
        results = {"question": question, "answer before": before, "answer after": _sample(whole)[1], **results}
    whole.tell("finish", results)
    return results


def _introduce(run: Run) -> None:
    """What will be trained on: counts, what was cut, the first example with its scored part marked."""
    for name, split in run.splits.items():
        _count(run, name, split)
    if not run.splits["valid"].items:
        run.tell("note", "no validation split: --valid-fraction 0.1 would make one")
    if run.tokenizer.has_chat_template and not run.source.data.use_chat_template and _plain(run):
        run.tell("note", "rows are plain text; the model has a chat template: --use-chat-template would wrap them")
    first = run.source.examples(run.splits["train"].items[0])[0]
    for reporter in run.reporters:
        if isinstance(reporter, Terminal):
            reporter.example(first.tokens.tolist(), first.scored.tolist(), run.tokenizer.decode)


def _count(run: Run, name: str, split: Split) -> None:
    counts: Counts = split.counts
    if not counts.rows:
        return
    run.tell("note", f"{name}: {counts.rows} rows")
    limit = f"--max-seq-length {run.source.data.max_seq_length}"
    if counts.truncated:
        run.tell("note", f"{name}: {counts.truncated} rows were cut to {limit}", warning=True)
    if counts.dropped:
        run.tell("note", f"{name}: {counts.dropped} rows dropped: too long for {limit}", warning=True)


def _plain(run: Run) -> bool:
    """Whether the first row, which stands for all, was not rendered by the template."""
    first = run.source.examples(run.splits["train"].items[0])[0]
    return "<|" not in run.tokenizer.decode(first.tokens.tolist()[:8])


def _sample(run: Run) -> tuple[str, str]:
    """A question of the validation rows and the model's greedy answer, for the starter; else nothing."""
    from mlx_lm import generate

    items = run.splits["valid"].items or run.splits["train"].items
    first: Example = run.source.examples(items[0])[0]
    start = int(first.scored.argmax()) if first.scored.any() else len(first.tokens)
    if start < 2 or not _is_starter(run.name):
        return "", ""
    prompt = first.tokens[:start].tolist()
    with evaluating(run.model):
        answer = generate(run.model, run.tokenizer, prompt, max_tokens=40)
    return " ".join(run.tokenizer.decode(prompt, skip_special_tokens=True).split()), answer.strip()


def _is_starter(name: str) -> bool:
    from . import starter

    return Path(name) == Path(starter.model_path())
