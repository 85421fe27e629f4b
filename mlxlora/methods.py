"""The training methods: `METHODS` has one row for each.

The command line, `preview`, the model card, the starter and the readers of other libraries' files all use this table. A row
names its parts through the package (`ml.pairs`, `ml.objectives.dpo`), which imports them when they are first used, so that
`mlxlora --help` imports neither mlx nor transformers.
"""

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from attrs import field, frozen

import mlxlora as ml

from .config.method_options import MethodOptions, options_for
from .config.mlx_lm_compat import Commands
from .config.options import (
    AdapterOptions,
    BaseOptions,
    CPOOptions,
    CPORun,
    DataOptions,
    DistillOptions,
    DistillRun,
    DPOOptions,
    DPORun,
    GKDRun,
    GRPOOptions,
    GRPORun,
    KTOOptions,
    KTORun,
    ModelOptions,
    ObjectiveOptions,
    OnlineDPOOptions,
    OnlineDPORun,
    ORPOOptions,
    ORPORun,
    Output,
    PairData,
    RewardOptions,
    RowOptions,
    SamplingOptions,
    SFTOptions,
    SFTRun,
    Training,
)
from .errors import InputError

if TYPE_CHECKING:
    from .data.sources import Source
    from .objectives.objective import Objective
    from .reporting.card import MethodInfo
    from .reporting.preview import Preview
    from .training.results import RunResult

P = ParamSpec("P")
O = TypeVar("O", bound=MethodOptions)  # noqa: E741
AnyGroup = BaseOptions | AdapterOptions | RowOptions | Training | Output | SamplingOptions | RewardOptions | ObjectiveOptions


class _Signature:
    """The signature of a method, read from its options when it is asked for."""

    def __get__(self, method: "Method | None", _: type) -> inspect.Signature:
        if method is None:
            raise AttributeError("__signature__")
        return method.kinds.signature()


@frozen
class Starter:
    """What the bundled starter has for a method.

    Attributes:
        data: folder of its rows.
        options: YAML file with options, without the suffix.
        runs: whether it has everything that a run needs; it has no teacher.
    """

    data: str
    options: str
    runs: bool = True


@frozen(eq=False, slots=False)
class Method(Generic[P, O]):
    """A training method. Call it to train: `ml.dpo(model="folder", data="rows.jsonl", iters=100)`.

    Attributes:
        options: the class of all its options.
        name: of the command.
        help: of the command, one line.
        title: how the model card names the method.
        example: flags for the last line of the help, after --model and --data.
        source: (options, objective) -> where the batches come from.
        objective: options -> what is minimized, unless --objective names another one.
        record: the function of `data.formats` that reads a row, for `preview`.
        starter: what the bundled starter has.
        extras: options -> further fields of `Run`, such as the reference.
        implied: options -> others that follow from them.
        check: raises InputError if options do not fit together.
        modes: mlx-lm-lora's names of the method.
        columns: of the table while it trains, the most important first; names of `reporting.columns.TABLE_COLUMNS`.
    """

    options: Callable[P, O]
    name: str = field(kw_only=True)
    help: str = field(kw_only=True)
    title: str = field(kw_only=True)
    example: str = field(kw_only=True)
    source: "Callable[[O, Objective], Source]" = field(kw_only=True)
    objective: "Callable[[O], Objective]" = field(kw_only=True)
    record: str = field(kw_only=True)
    starter: Starter = field(kw_only=True)
    extras: Callable[[O], Mapping[str, Any]] = field(default=lambda _: {}, kw_only=True)
    implied: Callable[[O], Mapping[str, Any]] = field(default=lambda _: {}, kw_only=True)
    check: Callable[[O], None] = field(default=lambda _: None, kw_only=True)
    modes: tuple[str, ...] = field(default=(), kw_only=True)
    columns: tuple[str, ...] = field(kw_only=True)

    __signature__ = _Signature()

    @property
    def kinds(self) -> type[MethodOptions]:
        """The class of its options, which knows their groups."""
        return self.options  # type: ignore[return-value]

    @property
    def info(self) -> "MethodInfo":
        """What reports say of it; `mlxlora eval` has its loss if both read the same rows."""
        from .reporting.card import MethodInfo

        kinds = self.kinds.kinds()
        return MethodInfo(self.title, kinds, self.columns, evaluated=DataOptions in kinds)

    @overload
    def __call__(self, *args: P.args, **options: P.kwargs) -> "RunResult": ...
    @overload
    def __call__(self, group: AnyGroup, /, *args: P.args, **options: P.kwargs) -> "RunResult": ...
    @overload
    def __call__(self, *groups: AnyGroup) -> "RunResult": ...
    def __call__(self, *groups: Any, **options: Any) -> "RunResult":
        """Trains with these options.

        Args:
            groups: whole groups of options, such as `Training(iters=100)`.
            options: single options, named as the flags are.

        Returns:
            The results: steps, losses, where the adapters are; and the trained model.

        Raises:
            InputError: bad options or data.
            RunError: losses or gradients that are not finite, of five batches in a row; the last good state was saved.
        """
        from .reporting.history import StoredMethod
        from .training.session import Recipe, train_recipe
        from .training.user_objective import user_objective

        chosen: Any = self.kinds(*groups, **options)
        if others := self.implied(chosen):
            chosen = self.kinds(*chosen.parts().values(), **others)
        self.check(chosen)
        objective = user_objective(chosen.objective) or self.objective(chosen)
        recipe = Recipe(StoredMethod(self.name), self.source(chosen, objective), objective, self.extras(chosen), self.info)
        return train_recipe(recipe, chosen.parts())

    def preview(self, tokenizer: Any, **options: Any) -> "Preview":
        """The rows that the method would train on.

        Args:
            tokenizer: the model's.
            options: those of its data, and others that change what is read.

        Raises:
            InputError: bad data.
        """
        from .data import formats
        from .reporting.preview import read_preview

        chosen: Any = self.kinds(**options)
        source = self.source(chosen, self.objective(chosen))
        return read_preview(source, getattr(formats, self.record), tokenizer)


SFT = Method(
    SFTRun,
    name="sft",
    help="Supervised fine-tuning: learn from completions, conversations or plain text.",
    title="supervised fine-tuning",
    example="--mask-prompt --iters 200",
    source=lambda o, _: ml.rows(o.part(DataOptions)),
    objective=lambda o: _sft(o),
    record="supervised_record",
    columns=("loss", "valid", "lr", "tok/s", "left"),
    starter=Starter("sft", "sft"),
    extras=lambda o: {"noise": o.neftune_noise_alpha},
    modes=("sft",),
)


DPO = Method(
    DPORun,
    name="dpo",
    help="Direct preference optimization: prefer the chosen completion, relative to a reference.",
    title="direct preference optimization (DPO)",
    example="--use-chat-template --beta 0.1 --learning-rate 5e-6",
    source=lambda o, _: ml.pairs(o.part(PairData)),
    objective=lambda o: ml.objectives.dpo(**options_for(ml.objectives.dpo, o.part(DPOOptions))),
    record="preference_record",
    columns=("loss", "valid pairs", "accuracy", "margin", "lr", "tok/s"),
    starter=Starter("pairs", "dpo"),
    extras=lambda o: {"reference": _models().cached_reference(o.part(ModelOptions), o.part(DPOOptions))},
    modes=("dpo",),
)


ORPO = Method(
    ORPORun,
    name="orpo",
    help="Odds-ratio preference optimization: learn the chosen completion, avoid the rejected one; no reference.",
    title="odds-ratio preference optimization (ORPO)",
    example="--use-chat-template --beta 0.1",
    source=lambda o, _: ml.pairs(o.part(PairData), train_prompt=o.nll_on_prompt),
    objective=lambda o: ml.objectives.orpo(**options_for(ml.objectives.orpo, o.part(ORPOOptions))),
    record="preference_record",
    columns=("loss", "valid pairs", "accuracy", "margin", "lr", "tok/s"),
    starter=Starter("pairs", "orpo"),
    modes=("orpo",),
)


CPO = Method(
    CPORun,
    name="cpo",
    help="Contrastive preference optimization: prefer the chosen completion; no reference.",
    title="contrastive preference optimization (CPO)",
    example="--use-chat-template --loss-type simpo --beta 2 --gamma 1 --alpha 0",
    source=lambda o, _: ml.pairs(o.part(PairData)),
    objective=lambda o: ml.objectives.cpo(**options_for(ml.objectives.cpo, o.part(CPOOptions))),
    record="preference_record",
    columns=("loss", "valid pairs", "accuracy", "margin", "lr", "tok/s"),
    starter=Starter("pairs", "cpo"),
    modes=("cpo",),
)


KTO = Method(
    KTORun,
    name="kto",
    help="Kahneman-Tversky optimization: learn from single good/bad labels, relative to a reference.",
    title="Kahneman-Tversky optimization (KTO)",
    example="--use-chat-template --undesirable-weight 1.5",
    source=lambda o, objective: ml.unpaired(o.part(RowOptions), reference_point="reference_point" in objective.needs),
    objective=lambda o: ml.objectives.kto(**options_for(ml.objectives.kto, o.part(KTOOptions))),
    record="unpaired_record",
    columns=("loss", "valid", "chosen", "rejected", "KL", "lr", "tok/s"),
    starter=Starter("pairs", "kto"),
    extras=lambda o: {"reference": _models().cached_reference(o.part(ModelOptions), o.part(KTOOptions))},
)


GRPO = Method(
    GRPORun,
    name="grpo",
    help="Group-relative policy optimization: sample, reward, reinforce above-average completions.",
    title="group-relative policy optimization (GRPO)",
    example="--use-chat-template --rewards accuracy,think_format --reward-weights 1,0.2",
    source=lambda o, _: _rollouts().rewarded_prompts(o),
    objective=lambda o: ml.objectives.grpo(
        **options_for(ml.objectives.grpo, o.part(GRPOOptions), o.part(SamplingOptions)), top_entropy=o.top_entropy_quantile
    ),
    record="prompt_record",
    columns=("reward", "valid reward", "length", "no signal", "KL", "tok/s"),
    starter=Starter("grpo", "grpo"),
    extras=lambda o: {"reference": _models().live_reference(o.part(ModelOptions), o.reference_model_path)},
    check=lambda o: _check_policy(o),
    modes=("grpo",),
)


ONLINE_DPO = Method(
    OnlineDPORun,
    name="online-dpo",
    help="Online DPO: DPO on pairs that the policy samples and rewards rank; with --xpo-alpha XPO.",
    title="direct preference optimization on its own samples (online DPO)",
    example="--use-chat-template --rewards accuracy --group-size 4",
    source=lambda o, _: _rollouts().ranked_pairs(o),
    objective=lambda o: _online_dpo(o),
    record="prompt_record",
    columns=("reward", "valid reward", "loss", "length", "no signal", "tok/s"),
    starter=Starter("grpo", "online-dpo"),
    extras=lambda o: {"reference": _models().live_reference(o.part(ModelOptions), o.reference_model_path)},
    implied=lambda o: {"val_batches": 0} if o.judge_model else {},  # a judge compares two, validation samples one per prompt
    check=lambda o: _check_pairs(o),
    modes=("online_dpo", "xpo"),
)


DISTILL = Method(
    DistillRun,
    name="distill",
    help="Knowledge distillation: learn a teacher's distribution at every trained token.",
    title="knowledge distillation",
    example="--teacher-model mlx-community/Qwen3-4B-4bit --mask-prompt",
    source=lambda o, _: ml.rows(o.part(DataOptions)),
    objective=lambda o: ml.objectives.distill(**options_for(ml.objectives.distill, o.part(DistillOptions))),
    record="supervised_record",
    columns=("loss", "valid", "lr", "tok/s", "left"),
    starter=Starter("sft", "sft", runs=False),
    extras=lambda o: {"extend": _models().teacher(o.part(ModelOptions), o.part(DistillOptions))},
    check=lambda o: _check_teacher(o.part(DistillOptions), packing=o.packing),
)


GKD = Method(
    GKDRun,
    name="gkd",
    help="On-policy distillation (GKD): learn a teacher's distribution on the student's own samples.",
    title="knowledge distillation on its own samples (GKD)",
    example="--teacher-model mlx-community/Qwen3-4B-4bit --divergence reverse_kl",
    source=lambda o, _: _rollouts().answers_of_student(o),
    objective=lambda o: ml.objectives.distill(**options_for(ml.objectives.distill, o.part(DistillOptions))),
    record="prompt_record",
    columns=("loss", "valid", "length", "lr", "tok/s", "left"),
    starter=Starter("grpo", "grpo", runs=False),
    extras=lambda o: {"extend": _models().teacher(o.part(ModelOptions), o.part(DistillOptions))},
    check=lambda o: _check_teacher(o.part(DistillOptions), packing=False),
)

METHODS: dict[str, Method[Any, Any]] = {row.name: row for row in (SFT, DPO, ORPO, CPO, KTO, GRPO, ONLINE_DPO, DISTILL, GKD)}


def commands() -> Commands:
    """The names of the methods, and mlx-lm-lora's names of them."""
    return Commands(tuple(METHODS), {mode: row.name for row in METHODS.values() for mode in row.modes})


def method_info(config: Mapping[str, Any]) -> "MethodInfo":
    """What reports say of the method that a run stored in its configuration."""
    from .reporting.card import CUSTOM
    from .reporting.history import method_of

    method = METHODS.get(method_of(config))
    return method.info if method else CUSTOM


# --- imported when used -------------------------------------------------------------------------


def _rollouts() -> ModuleType:
    from .rollouts import from_options

    return from_options


def _models() -> ModuleType:
    from .training import other_models

    return other_models


def _sft(o: SFTRun) -> "Objective":
    loss = ml.objectives.sft(**options_for(ml.objectives.sft, o.part(SFTOptions)))
    return loss + ml.objectives.supervised.token_metrics()


def _online_dpo(o: OnlineDPORun) -> "Objective":
    options = options_for(ml.objectives.dpo, o.part(OnlineDPOOptions))
    return ml.objectives.xpo(alpha=o.xpo_alpha, **options) if o.xpo_alpha else ml.objectives.dpo(**options)


# --- options that do not fit together -----------------------------------------------------------


def _check_teacher(method: DistillOptions, *, packing: bool) -> None:
    if packing:
        raise InputError("--packing: a teacher reads plain rows; leave it out")
    if method.teacher_model is None:
        raise InputError("--teacher-model is missing: a model folder or hub name with the vocabulary of --model")


def _check_policy(o: GRPORun) -> None:
    if o.use_prompt and o.num_iterations > 1:
        raise InputError("--use-prompt needs --num-iterations 1: the prompt's tokens were not sampled, so they have no ratio")
    if o.loss_type == "reinforce" and o.num_iterations > 1:
        raise InputError("--loss-type reinforce needs --num-iterations 1: it has no importance ratio for older completions")
    if o.group_size == 1 and o.baseline != "batch":
        raise InputError(f"--group-size must be >= 2, got 1; --baseline batch can do with 1, --baseline {o.baseline} cannot")


def _check_pairs(o: OnlineDPORun) -> None:
    if o.use_prompt:
        raise InputError("--use-prompt: both completions of a pair have the same prompt, whose tokens cancel; leave it out")
    if o.xpo_alpha and o.reference_model_path:
        raise InputError("--xpo-alpha: the reference that answers is the policy before training; leave out --reference-model-path")
    if o.judge_model and o.group_size != 2:
        raise InputError(f"--judge-model compares two completions: use --group-size 2, got {o.group_size}")
