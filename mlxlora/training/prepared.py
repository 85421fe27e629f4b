"""From the inputs of a run to a model that is ready for its first step: reference, adapters, scorer, batches, optimizer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from attrs import evolve, frozen
from mlx.utils import tree_flatten

from ..adapters.detach import Earlier, continue_from, taken_off
from ..adapters.files import put_arrays, read_arrays
from ..adapters.prepare import CHANGED, load_weights, prepare
from ..config.options import AdapterOptions
from ..data.batching import Make, read_positions, spread
from ..data.item_records import replaced
from ..data.packing import packed
from ..data.shape_buckets import Signatures, capped
from ..data.sources import Context, Source, Split, check_tokens
from ..data.tokenize import Example
from ..distributed.ranks import Ranks
from ..distributed.sharding import shard
from ..errors import InputError
from ..models.grad_checkpoint import checkpointed
from ..models.logprobs import Scorer, scorer
from ..models.modes import evaluating, freeze, vocabulary
from ..models.neftune import noisy
from ..models.recurrences import recurrence_told
from ..models.row_layouts import layout_obstacle, packed_layout, pays, use_windows
from ..objectives.cross_row import compares_rows
from ..reporting.reporter import Reporter
from ..reporting.stage import announced
from ..utils.device import limit_memory
from .choices import Choices
from .evaluate import Evaluate, make_evaluate, mean_measures
from .inputs import Run, RunOptions
from .micro_batch import BatchDivider, cost_of_position, fixed_size
from .optimizers import make_optimizer
from .origin import BASE_WEIGHTS, base_digest, digests_of, samples_of, weight_samples, weight_shapes
from .rank_sync import check_ranks, on_rank0
from .reference import (
    CONTINUED,
    START,
    Policy,
    cache_of_start,
    policy_at_start,
    referenced,
    starts_trained,
    stored_start,
    with_reference,
)
from .rounding import RunRounding
from .schedule import Schedule
from .step import Step, columns_of, make_step


@frozen(eq=False)
class Prepared:
    """A run that is ready for its first step.

    Attributes:
        schedule: which rows make which batch; its rows have the reference's log-probabilities if the objective needs them.
        score: log-probabilities of a batch.
        rounding: the shapes of training batches, and the divider of those that do not fit into memory.
        optimizer: on its learning-rate schedule.
        train: makes training batches.
        valid: makes batches of validation and test.
        ranks: the processes that train together, each with slices of the parameters if they are sharded.
        digests: of the rows, the base weights and the tokenizer.
    """

    schedule: Schedule
    score: Scorer
    rounding: RunRounding
    optimizer: optim.Optimizer
    train: Make
    valid: Make
    ranks: Ranks
    digests: Mapping[str, str]


def prepare_run(
    run: Run, reporter: Reporter, only: Mapping[str, Sequence[int]] | None = None, choices: Choices | None = None
) -> Prepared:
    """Makes the model of a run trainable, and everything else that its first step needs.

    Args:
        run: its inputs.
        reporter: gets notes.
        only: rows of each split that get a reference; None: all that the run uses.
        choices: what was measured on this machine, for the checkpoint.

    Raises:
        InputError: options that do not fit the data or the model.
    """
    training, ranks = run.options.training, run.ranks
    earlier = taken_off(run.model, _starting(run.options))
    schedule = Schedule(run.source, run.splits, training)
    _check_splits(schedule, run.options)
    comparing = compares_rows(run.objective)
    digests, samples = _made_of(run, comparing)
    rows = fixed_size(training, comparing)
    if training.fully_shard:
        ranks, samples = _sharded(run, samples)
    limit, saved = limit_memory(training.memory_limit), _saved_by_sharing(schedule, ranks)
    _make_trainable(run, ranks, earlier)
    digests[BASE_WEIGHTS] = base_digest(samples, run.model)
    policy, reference_size = _reference_policy(run)
    if policy and not run.source.online:
        together = _sequences_of_item(schedule) if saved is not None else 1
        schedule = _with_reference(run, schedule, _RowScoring(policy, ranks, reporter, together), only or {})
    with ranks.computing():
        score = scorer_of(run)
        share = _shares(run, score, saved, reporter)
        if run.source.packing:
            schedule = _packed(schedule, run.model, score, reporter)
        check_tokens(run.source, run.splits, score.others, run.tokenizer)
        cost = cost_of_position(run.model, recomputed=_recomputes(training.grad_checkpoint, ranks))
    if told := recurrence_told(run.model):
        reporter.note(told)
    if score.split is None:
        reporter.note("this model cannot be split into backbone and head: the logits of all tokens are computed", warning=True)
    live = policy if run.source.online else None
    context = Context(
        run.model,
        run.tokenizer,
        training.seed,
        items=schedule.items("train"),
        share=share,
        ranks=ranks,
        reference=live,
        warn=partial(reporter.note, warning=True),
        vocabularies=score.others | reference_size,
    )
    rounding = RunRounding(Signatures(), context.shapes, BatchDivider(limit, cost, rows, tuple(comparing)), ranks, choices or {})
    train = plain_maker(schedule.source, context, rounding.batches)
    valid = plain_maker(schedule.source, evolve(context, validation=True, shapes=Signatures()))
    if live:  # validation measures rewards, which need no reference
        train = referenced(train, live, run.source.temperature)
    paths = [path for path, _ in tree_flatten(run.model.trainable_parameters())]  # type: ignore[misc]
    optimizer = make_optimizer(training, schedule.steps, paths)
    return Prepared(schedule, score, rounding, optimizer, train, valid, ranks, digests)


def _made_of(run: Run, comparing: Sequence[str]) -> tuple[dict[str, str], dict[str, bytes]]:
    """Digests of what a run is made of, which ranks compare, and samples of the weights; shapes of those that will be sharded."""
    later = run.options.training.fully_shard and run.ranks.size > 1
    samples = weight_shapes(run.model) if later else weight_samples(run.model)
    digests = digests_of(run.splits, run.tokenizer)
    check_ranks(run.ranks, comparing, run.options.config, digests | {BASE_WEIGHTS: base_digest(samples, nn.Module())})
    return digests, samples


def _sharded(run: Run, samples: dict[str, bytes]) -> tuple[Ranks, dict[str, bytes]]:
    """The ranks with slices, and samples of the weights: each rank takes them before it gets rank 0's slice of a parameter."""
    found = dict(samples)
    ranks = shard(run.model, run.ranks, lambda name, array: found.update(samples_of({name: array})))
    ranks.check_same(BASE_WEIGHTS, base_digest(found, nn.Module()).encode())
    return ranks, found


def compiled(run: Run, prepared: Prepared) -> tuple[Step, Evaluate]:
    """The step and the validation of a run; from here on the optimizer has a state."""
    score, ranks, clip = prepared.score, prepared.ranks, run.options.training.max_grad_norm
    step = make_step(run.model, prepared.optimizer, run.objective, score=score, max_grad_norm=clip, ranks=ranks)
    return step, mean_measures if run.source.online else make_evaluate(run.model, run.objective, score, ranks)


def plain_maker(source: Source, context: Context, shapes: Signatures | None = None) -> Make:
    """How the items of a batch become this rank's micro-batch; its shape is added to `shapes`."""
    make, live = source.make(context), source.online or source.live
    return capped(make if live else spread(make, context.ranks), shapes)


# --- model ------------------------------------------------------------------------------------


def _starting(options: RunOptions) -> AdapterOptions:
    """How adapters start; those of a resumed run come from its checkpoint."""
    return evolve(options.adapter, adapter="fresh") if options.output.resume else options.adapter


def _make_trainable(run: Run, ranks: Ranks, earlier: Earlier | None) -> None:
    options = run.options
    weights = options.adapter.train_type == "full" and CHANGED.get(run.model)  # go on where an earlier run left them
    mx.random.seed(options.training.seed)
    prepare(run.model, options.adapter)
    if options.adapter.resume_adapter_file:
        load_weights(run.model, str(options.adapter.resume_adapter_file))
    if earlier:
        continue_from(run.model, earlier)
    if earlier or weights or _put_start(run, ranks):
        CONTINUED.put(run.model, True)
    if _recomputes(options.training.grad_checkpoint, ranks):
        checkpointed(run.model)
    if run.noise:
        noisy(run.model, run.noise)
    run.model.train()


def _put_start(run: Run, ranks: Ranks) -> bool:
    """Gives the model of a resumed run the parameters that its reference has; False: these are no others than those of the base."""
    path = run.options.directory / START
    if not ranks.of_rank0(run.options.output.resume and path.is_file()):
        return False
    on_rank0(ranks, run.model, lambda: put_arrays(run.model, read_arrays(path, lazy=ranks.sharded)))
    if ranks.size > 1 and not ranks.sharded:
        run.model.update(ranks.from_first(run.model.trainable_parameters()))
    return True


def _recomputes(asked: bool, ranks: Ranks) -> bool:
    """Whether blocks are computed again in the backward pass; sharded ranks must not keep the slices that a block gathered."""
    return asked or ranks.sharded


def scorer_of(run: Run) -> Scorer:
    """Log-probabilities of a batch, with the columns that the objective reads."""
    score = scorer(run.model, temperature=run.source.temperature, columns=columns_of(run.objective))
    score = run.extend(score, run.tokenizer) if run.extend else score
    use_windows(score.forward, run.model)
    return score


# --- batches ----------------------------------------------------------------------------------

_ENOUGH = 10_000  # rows that tell whether sharing prompts pays


def _saved_by_sharing(schedule: Schedule, ranks: Ranks) -> float | None:
    """The share of the work that is left if prompts are computed once; None: not wanted, or the rows say that it does not pay."""
    source = schedule.source
    if source.share is False or ranks.sharded:  # ranks with and without a common prompt would gather unequally often
        return None
    items = schedule.items("train")
    some = range(0, len(items), max(len(items) // _ENOUGH, 1))  # of many rows
    plain, shared = read_positions(source.expected(items[row]) for row in some)
    wanted = plain != shared and bool(source.share or pays(plain, shared))
    return shared / plain if wanted else None


def _shares(run: Run, score: Scorer, left: float | None, reporter: Reporter) -> bool:
    """Whether to compute each prompt once: if that leaves `left` of the work, and the model then computes the same."""
    if left is None:
        return False
    if problem := layout_obstacle(score.forward, run.model):
        text = f"each prompt is computed once per completion: this model cannot share it ({problem})"
        reporter.note(text, warning=bool(run.source.share))
        return False
    reporter.note(f"each prompt is computed once for all of its completions: {left:.0%} of the work")
    return True


def _packed(schedule: Schedule, model: nn.Module, score: Scorer, reporter: Reporter) -> Schedule:
    """The schedule with several examples to a row, if the model then computes the same as for plain rows."""
    if problem := layout_obstacle(score.forward, model, packed_layout):
        reporter.note(f"--packing: rows stay plain, for this model cannot tell packed examples apart ({problem})", warning=True)
        return schedule
    examples = schedule.items("train")
    schedule = Schedule(*packed(schedule.source, schedule.splits, schedule.training.seed), schedule.training)
    reporter.note(f"--packing: {len(examples)} examples in {len(schedule.items('train'))} rows")
    schedule.check()
    return schedule


def _check_splits(schedule: Schedule, options: RunOptions) -> None:
    schedule.check()
    output = options.output
    for flag, wanted in (("--keep-best", output.keep_best), ("--patience", output.patience)):
        if wanted and not (schedule.items("valid") and output.val_batches):
            raise InputError(f"{flag} needs validation: add valid.jsonl or --valid-fraction, and --val-batches other than 0")
    if output.test and not schedule.items("test"):
        raise InputError("--test needs a test split: add test.jsonl to the data folder")


def scored_by_reference(run: Run, schedule: Schedule, reporter: Reporter) -> Schedule:
    """The schedule of a trained model with the reference's log-probabilities of its test split."""
    policy, _ = _reference_policy(run)
    if policy is None:
        return schedule
    if run.reference.load is None and starts_trained(run.model, run.options.adapter):
        policy = stored_start(run.model, run.options.directory / START)
    rows = list(range(len(schedule.items("test"))))
    run = evolve(run, reference=evolve(run.reference, cache=None))
    return _with_reference(run, schedule, _RowScoring(policy, run.ranks, reporter, 1), {"test": rows})


# --- reference --------------------------------------------------------------------------------


def _reference_policy(run: Run) -> tuple[Policy | None, dict[str, int]]:
    """The reference, and how many tokens it has if it is another model; None if the objective needs none.

    Raises:
        InputError: the rows have a token that another model does not have.
    """
    if "ref_logps" not in run.objective.needs:
        return None, {}
    if run.reference.load is None:
        return policy_at_start(run.model, run.options.adapter), {}
    model = freeze(run.reference.load(run.tokenizer)).eval()  # frozen: no gradient is looked for
    size = {"the reference": vocabulary(model)}
    check_tokens(run.source, run.splits, size, run.tokenizer)
    return partial(nullcontext, model), size


def _sequences_of_item(schedule: Schedule) -> int:
    return len(schedule.source.examples(schedule.items("train")[0]))


@frozen(eq=False)
class _RowScoring:
    """How the reference scores the rows of a run.

    Attributes:
        policy: the reference.
        ranks: score the rows together.
        reporter: gets notes.
        together: this many sequences share a prompt, which is computed once if the reference then computes the same.
    """

    policy: Policy
    ranks: Ranks
    reporter: Reporter
    together: int


def _with_reference(run: Run, schedule: Schedule, how: _RowScoring, only: Mapping[str, Sequence[int]]) -> Schedule:
    """The schedule with rows that have the reference's log-probabilities."""
    options, cache = run.options, None if how.ranks.sharded else run.reference.cache  # rank 0 alone checks a cache
    if cache and run.reference.load is None:
        cache = cache_of_start(cache, run.model, options.adapter)
    with how.policy() as model, evaluating(model):
        with how.ranks.computing():
            score = scorer(model)
        score_rows = partial(
            with_reference,
            score=score,
            batch_size=2 * schedule.training.batch_size,
            together=1 if how.together == 1 or layout_obstacle(score.forward, model) else how.together,
            cache=cache,
            note=how.reporter.note,
            ranks=how.ranks,
        )
        rows = only or _rows_used(schedule, options)
        sequences = sum(map(len, rows.values())) * _sequences_of_item(schedule)
        with announced(how.reporter, "scoring with the reference", sequences):
            splits = {name: _scored(run.source, split, rows.get(name, ()), score_rows) for name, split in schedule.splits.items()}
    return evolve(schedule, splits=splits)


def _rows_used(schedule: Schedule, options: RunOptions) -> dict[str, list[int]]:
    """The rows of each split that the run uses."""
    train = -1 if schedule.source.packing else schedule.batches  # a batch of packed rows has more examples
    limits = {"train": train, "valid": options.output.val_batches, "test": -1 if options.output.test else 0}
    return {name: schedule.rows_used(name, limit) for name, limit in limits.items()}


def _scored(source: Source, split: Split, used: Sequence[int], score_rows: Callable[[Sequence[Example]], list[Example]]) -> Split:
    if not used:
        return split
    examples = [source.examples(split.items[row]) for row in used]
    scored = iter(score_rows([e for group in examples for e in group]))
    rebuilt = {
        row: source.rebuild(split.items[row], tuple(islice(scored, len(group)))) for row, group in zip(used, examples, strict=True)
    }
    return evolve(split, items=replaced(split.items, rebuilt))
