"""What a run may be told: small frozen groups of options, one per concern.

Every field is a flag of the command line, a key of the YAML file and an argument in Python, with one default and one
validator. This module imports neither mlx nor transformers, so `mlxlora --help` stays instant.
"""

import math
import re
from typing import Any, Literal

import attrs
from attrs import frozen
from attrs import validators as v

from ..errors import InputError, quoted


def option(default: Any, help: str, *checks: Any) -> Any:
    """A field with the help text that the command line shows."""
    return attrs.field(default=default, validator=[_finite, *map(_named, checks)], metadata={"help": help})


def _finite(group: Any, field: Any, value: Any) -> None:
    """No option takes an infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{field.name.replace('_', '-')} must be a finite number, got {quoted(value)}")


def _named(check: Any) -> Any:
    """Makes a validator's error name the flag, the rule and the value: one line for the user."""

    def run(group: Any, field: Any, value: Any) -> None:
        if value is None:
            return
        try:
            check(group, field, value)
        except (ValueError, TypeError):
            flag = "--" + field.name.replace("_", "-")
            raise InputError(f"{flag} must be {_rule(check)}, got {quoted(value)}") from None

    return run


def _rule(check: Any) -> str:
    bound = getattr(check, "bound", None)
    if bound is not None:
        return f"{check.compare_op} {bound}"
    return f"one of {', '.join(map(str, check.options))}" if hasattr(check, "options") else repr(check)


class _NotZero:
    """-1 stands for all, 0 for nothing sensible."""

    bound, compare_op = "1", "-1 or >="

    def __call__(self, group: Any, field: Any, value: int) -> None:
        if value != -1 and value < 1:
            raise ValueError


class _AutoOrCount:
    """A count that may be left to the program."""

    def __repr__(self) -> str:
        return "auto or a number >= 1"

    def __call__(self, group: Any, field: Any, value: str) -> None:
        if value != "auto" and not (str(value).isdecimal() and int(value)):
            raise ValueError


class _EachOf:
    """A list of names out of a few."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __repr__(self) -> str:
        return f"a list of {', '.join(self.names)}"

    def __call__(self, group: Any, field: Any, value: tuple[str, ...]) -> None:
        if not set(value) <= set(self.names):
            raise ValueError


class _Betas:
    """Two decay rates of moments."""

    def __repr__(self) -> str:
        return "two numbers in [0, 1)"

    def __call__(self, group: Any, field: Any, value: Any) -> None:
        if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
            raise ValueError


class _Pattern:
    """Numbers for some modules: `name=number`, where a name ends a module's path or is a regular expression for such an end."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"a list of module=number, such as q_proj=16, each a {'whole ' if self.kind is int else ''}number above 0"

    def __call__(self, group: Any, field: Any, value: tuple[str, ...]) -> None:
        for name, _, number in (entry.rpartition("=") for entry in value):
            if not name or not 0 < self.kind(number) < math.inf:
                raise ValueError
            _compiled(name)


def _compiled(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(str(error)) from None


class _Start:
    """How adapters start."""

    def __repr__(self) -> str:
        return "default, pissa or pissa_niter_N, such as pissa_niter_8"

    def __call__(self, group: Any, field: Any, value: str) -> None:
        if not re.fullmatch(r"default|pissa(_niter_[1-9]\d*)?", value):
            raise ValueError


_FORMATS = ("4", "6", "8", "mxfp4")


@frozen
class BaseOptions:
    """Model"""

    model: str | None = option(None, "Model folder or hub name.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model or its tokenizer.")


@frozen
class ModelOptions(BaseOptions):
    """Model"""

    quantize: Literal["4", "6", "8", "mxfp4"] | None = option(
        None, "Quantise the weights as they are loaded, to 4, 6 or 8 bits or to mxfp4.", v.in_(_FORMATS)
    )


@frozen
class AdapterOptions:
    """Adapter"""

    train_type: Literal["lora", "dora", "full"] = option(
        "lora", "What is trained: low-rank adapters or the weights themselves.", v.in_(("lora", "dora", "full"))
    )
    num_layers: int | None = option(
        None,
        "Blocks to train, from the last; -1 = all (full: embeddings, norms, head too); default: 16 at most.",
        _NotZero(),
    )
    rank: int = option(8, "Rank of each update.", v.ge(1))
    scale: float = option(20.0, "Multiplier of the update (alpha / rank elsewhere).", v.gt(0))
    rslora: bool = option(False, "Rank-stabilised: multiply by alpha / sqrt(rank), alpha = scale x rank, so by scale x sqrt(rank).")
    rank_pattern: tuple[str, ...] | None = option(
        None, "Other ranks for some modules, q_proj=16,v_proj=4; alpha stays scale x rank, as in PEFT.", _Pattern(int)
    )
    alpha_pattern: tuple[str, ...] | None = option(None, "Other alphas for some modules, q_proj=32.", _Pattern(float))
    init_lora_weights: str = option(
        "default", "How adapters start: default (no update), pissa (principal components of the weights), "
        "pissa_niter_N (these approximately, in N iterations).",
        _Start(),
    )  # fmt: skip
    dropout: float = option(0.0, "Dropout on the input of an update.", v.ge(0), v.lt(1))
    lora_keys: tuple[str, ...] | None = option(
        None,
        "Modules to adapt: paths in a block (self_attn.q_proj), last names (q_proj, embed_tokens, lm_head), all-linear; "
        "default: all-linear.",
    )
    qat: Literal["4", "6", "8", "mxfp4"] | None = option(
        None, "Quantisation-aware: compute with weights rounded to this format, train the exact ones.", v.in_(_FORMATS)
    )
    adapter_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "What adapters and their optimiser are kept in; they compute in the model's type, sums and losses in float32.",
        v.in_(("float32", "bfloat16")),
    )  # fmt: skip
    resume_adapter_file: str | None = option(None, "Start from these weights (adapters.safetensors), optimiser and data anew.")


@frozen
class RowOptions:
    """Data"""

    data: str | None = option(None, "Folder with train/valid/test.jsonl, one JSONL or JSON file, or a hub data set name.")
    max_seq_length: int = option(2048, "Rows are cut to this many tokens, on the right.", v.ge(2))
    use_chat_template: bool = option(False, "Wrap plain-text rows in the model's chat template.")
    train_split: str | None = option(None, "Training rows of a hub data set, such as train[:1000].")
    valid_split: str | None = option(None, "Its validation rows, such as train[-100:].")
    test_split: str | None = option(None, "Its test rows.")
    valid_fraction: float = option(0.0, "Without a validation split, set this share of the training rows aside.", v.ge(0), v.lt(1))
    shuffle: bool = option(True, "Shuffle the rows anew in every epoch.")
    token_cache: bool = option(True, "Keep the token ids of large supervised and preference data for the next run.")
    prompt_key: str = option("prompt", "Name of the field that holds the prompt.")


@frozen
class DataOptions(RowOptions):
    """Data"""

    mask_prompt: bool = option(False, "Score only completions and assistant turns.")
    text_key: str = option("text", "Name of the field that holds plain text.")
    messages_key: str = option("messages", "Name of the field that holds messages.")
    completion_key: str = option("completion", "Name of the field that holds the completion.")
    packing: bool = option(False, "Fill training rows with several examples, none of which sees another; a batch counts such rows.")


@frozen
class GroupOptions(RowOptions):
    """Data"""

    share_prompts: bool | None = option(None, "Compute a prompt once for all of its completions; default: where that is faster.")


@frozen
class PairData(GroupOptions):
    """Data"""

    prompt_truncation: Literal["right", "left"] = option(
        "right", "Of over-long pairs: drop those whose prompt leaves no room (right), or cut the prompt's beginning (left).",
        v.in_(("right", "left")),
    )  # fmt: skip


@frozen
class Training:
    """Training"""

    iters: int = option(600, "Optimiser steps.", v.ge(1))
    epochs: float | None = option(None, "Passes over the data, instead of --iters (--num-epochs is the same).", v.gt(0))
    batch_size: int = option(4, "Rows in a batch.", v.ge(1))
    grad_accumulation_steps: int = option(1, "Batches in an optimiser step; exactly one large batch in pieces.", v.ge(1))
    learning_rate: float = option(1e-5, "Peak learning rate.", v.gt(0))
    optimizer: Literal["adam", "adamw", "sgd", "adafactor", "lion", "muon"] = option(
        "adam", "Update rule; Adam and AdamW are the published ones, with bias correction.",
        v.in_(("adam", "adamw", "sgd", "adafactor", "lion", "muon")),
    )  # fmt: skip
    weight_decay: float = option(0.0, "Weight decay, decoupled in adamw and lion; adam has none.", v.ge(0))
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: the learning rate of B (and of DoRA's magnitudes) is this many times that of A.", v.gt(0)
    )
    betas: tuple[float, ...] | None = option(None, "Decay of the moments: adam, adamw (0.9, 0.999), lion (0.9, 0.99).", _Betas())
    eps: float | None = option(None, "Added to the denominator: adam, adamw (1e-8).", v.gt(0))
    momentum: float | None = option(None, "Momentum: sgd (0), muon (0.95).", v.ge(0), v.lt(1))
    lr_schedule: Literal["constant", "linear", "cosine", "exponential", "step"] = option(
        "constant", "How the learning rate falls after the warm-up.", v.in_(("constant", "linear", "cosine", "exponential", "step"))
    )
    lr_decay_steps: int | None = option(None, "Steps over which it falls; default: until the last step.", v.ge(1))
    lr_decay_rate: float = option(0.1, "exponential, step: what those steps leave of it, again and again.", v.gt(0), v.le(1))
    lr_end: float = option(0.0, "The learning rate that it falls to.", v.ge(0))
    warmup: int = option(0, "Steps over which the learning rate rises.", v.ge(0))
    warmup_init: float = option(0.0, "The learning rate that it rises from.", v.ge(0))
    max_grad_norm: float = option(1.0, "Clip the global norm of the gradient to this; 0 = off.", v.ge(0))
    grad_checkpoint: bool = option(False, "Recompute each block in the backward pass: less memory, more time.")
    fully_shard: bool = option(False, "Every process of mlx.launch keeps a slice of parameters and optimiser; --train-type full.")
    micro_batch: str = option(
        "auto", "Rows, pairs or groups of a batch computed at once, a number or auto: as many as fit. The update is the same.",
        _AutoOrCount(),
    )  # fmt: skip
    memory_limit: float | None = option(None, "Memory that MLX may hold, GB; default: 80 % of the device's.", v.gt(0))
    attention: Literal["auto", "fused", "chunked"] = option(
        "auto", "Attention in training: MLX's function, chunks of queries that are recomputed, or what is faster on the device.",
        v.in_(("auto", "fused", "chunked")),
    )  # fmt: skip
    seed: int = option(0, "Seed of data order, adapters, dropout and sampling.", v.ge(0))


@frozen
class Output:
    """Output"""

    adapter_path: str = option("adapters", "Where adapters, metrics, configuration and checkpoints go.")
    overwrite: bool = option(False, "Replace what an earlier run left in --adapter-path.")
    resume: bool = option(False, "Continue the run in --adapter-path from its last checkpoint, exactly.")
    steps_per_report: int = option(10, "Steps between two reports.", v.ge(1))
    steps_per_eval: int = option(200, "Steps between two validations; 0 = only after the last step.", v.ge(0))
    val_batches: int = option(25, "Batches of a validation; -1 = all, 0 = none.", v.ge(-1))
    save_every: int = option(100, "Steps between two checkpoints; 0 = only after the last step.", v.ge(0))
    save_total_limit: int = option(2, "Checkpoints kept, the oldest go first; 0 = all.", v.ge(0))
    keep_best: bool = option(False, "Write the adapters of the best validation loss, not of the last step.")
    patience: int = option(0, "Stop after this many validations without a better loss; 0 = off.", v.ge(0))
    test: bool = option(False, "Evaluate on the test split after training.")
    quiet: bool = option(False, "Print results and warnings only.")
    dry_run: bool = option(False, "Check everything, take real steps on the longest batch, tell what a run needs; write nothing.")
    show_config: bool = option(False, "Print every option of the run before it starts.")
    answers: int = option(1, "Validation prompts answered before training, at validations and after; 0 = none.", v.ge(0))
    plot: bool = option(False, "Draw the metrics as metrics.png (pip install 'mlxlora[plot]').")
    report_to: tuple[str, ...] | None = option(
        None, "Send metrics to wandb, swanlab, trackio or tensorboard (pip install 'mlxlora[wandb]', ...).",
        _EachOf("wandb", "swanlab", "trackio", "tensorboard"),
    )  # fmt: skip


@frozen
class SFTOptions:
    """Objective"""

    loss_type: Literal["nll", "dft"] = option("nll", "nll: cross entropy; dft: dynamic fine-tuning.", v.in_(("nll", "dft")))
    neftune_noise_alpha: float = option(0.0, "Noise on the embeddings of training tokens (NEFTune), such as 5; 0 = none.", v.ge(0))
    objective: str | None = option(None, "Your own objective: file.py:name.")


@frozen
class DistillOptions:
    """Objective"""

    teacher_model: str | None = option(None, "Teacher: a model folder or hub name with the vocabulary of --model.")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = option(
        "forward_kl", "KL(teacher, student), KL(student, teacher) or generalised Jensen-Shannon, over the whole vocabulary.",
        v.in_(("forward_kl", "reverse_kl", "jsd")),
    )  # fmt: skip
    jsd_beta: float = option(0.5, "The teacher's share of jsd's mixture.", v.gt(0), v.lt(1))
    nll_weight: float = option(0.0, "Weight of the cross entropy that is added.", v.ge(0))
    objective: str | None = option(None, "Your own objective: file.py:name.")


@frozen
class DPOOptions:
    """Objective"""

    loss_type: str = option("sigmoid", "Preference loss, or a sum such as 0.8*sigmoid+0.2*bco_pair+1.0*nll.")
    beta: float = option(0.1, "Strength of the pull towards the reference.", v.gt(0))
    delta: float | None = option(None, "dpop's penalty (default 50) or hinge's margin (default 1).", v.ge(0))
    label_smoothing: float = option(0.0, "Share of labels assumed to be flipped.", v.ge(0), v.lt(0.5))
    ld_alpha: float | None = option(None, "Weight of tokens past the shorter completion (LD-DPO); default: 1.", v.ge(0), v.le(1))
    reference_model_path: str | None = option(None, "Another model as the reference; default: --model before training.")
    reference_cache: bool = option(True, "Keep the reference's log-probabilities on disk for later runs.")
    objective: str | None = option(None, "Your own objective: file.py:name.")


@frozen
class CPOOptions:
    """Objective"""

    loss_type: Literal["sigmoid", "hinge", "ipo", "dpop", "simpo"] = option(
        "sigmoid", "Preference loss.", v.in_(("sigmoid", "hinge", "ipo", "dpop", "simpo"))
    )
    beta: float = option(0.1, "Scale of the margin.", v.gt(0))
    alpha: float = option(1.0, "Weight of the chosen completion's NLL; 0 with simpo is pure SimPO.", v.ge(0))
    gamma: float = option(0.5, "simpo's target margin.", v.ge(0))
    delta: float | None = option(None, "dpop's penalty (default 50) or hinge's margin (default 1).", v.ge(0))
    label_smoothing: float = option(0.0, "Share of labels assumed to be flipped.", v.ge(0), v.lt(0.5))
    objective: str | None = option(None, "Your own objective: file.py:name.")


@frozen
class ORPOOptions:
    """Objective"""

    beta: float = option(0.1, "Weight of the odds ratio, the paper's lambda.", v.ge(0))
    nll_on_prompt: bool = option(False, "The NLL covers prompts too, as in the authors' code and TRL.")
    objective: str | None = option(None, "Your own objective: file.py:name.")


@frozen
class KTOOptions:
    """Objective"""

    loss_type: Literal["kto", "apo_zero_unpaired"] = option(
        "kto", "kto: gain over the policy's divergence; apo_zero_unpaired: over the reference.", v.in_(("kto", "apo_zero_unpaired"))
    )
    beta: float = option(0.1, "Strength of the pull towards the reference.", v.gt(0))
    desirable_weight: float = option(1.0, "Weight of desirable completions.", v.gt(0))
    undesirable_weight: float = option(1.0, "Weight of undesirable completions.", v.gt(0))
    reference_model_path: str | None = option(None, "Another model as the reference; default: --model before training.")
    reference_cache: bool = option(True, "Keep the reference's log-probabilities on disk for later runs.")
    objective: str | None = option(None, "Your own objective: file.py:name.")


@frozen
class PromptData(GroupOptions):
    """Data"""

    system: str | None = option(None, "System message of rows that bring none.")
    use_prompt: bool = option(False, "Also count the prompt's tokens in the loss.")


@frozen
class SamplingOptions:
    """Sampling"""

    group_size: int = option(4, "Completions of each prompt; a batch has --batch-size prompts.", v.ge(1))
    max_completion_length: int = option(512, "Most tokens of a completion.", v.ge(1))
    temperature: float = option(1.0, "Logits are divided by it, when sampling and in the loss.", v.ge(1e-6))
    top_p: float = option(1.0, "Sample among the likeliest tokens that together have this probability.", v.gt(0), v.le(1))
    top_k: int = option(0, "Sample among this many likeliest tokens; 0 = all.", v.ge(0))
    min_p: float = option(0.0, "Sample among tokens at least this likely, relative to the likeliest.", v.ge(0), v.le(1))
    repetition_penalty: float = option(1.0, "Divides the logits of tokens that were there before.", v.gt(0))
    rollout_batch: int = option(0, "Completions generated at once; 0 = all of a batch.", v.ge(0))
    kv_bits: int | None = option(
        None,
        "Keep keys and values of rollouts in 4 or 8 bits: less memory. The policy that samples then differs a little from the one "
        "that is trained; the ratio corrects it with --num-iterations above 1, nothing does with 1.",
        v.in_((4, 8)),
    )


@frozen
class PairSampling(SamplingOptions):
    """Sampling"""

    group_size: int = option(2, "Completions of each prompt, of which the best and the worst make a pair.", v.ge(2))


@frozen
class RewardOptions:
    """Rewards"""

    rewards: tuple[str, ...] = option(("accuracy",), "Reward functions: built in, or of --reward-file.")
    reward_file: str | None = option(None, "Your own reward functions: a Python file.")
    reward_weights: tuple[float, ...] | None = option(None, "Weight of each reward; default: 1.")
    reward_model: str | None = option(None, "Reward by this model, a folder of a sequence classifier, in place of --rewards.")
    reward_timeout: float | None = option(None, "Most seconds that a reward function may take over a batch.", v.gt(0))
    mask_truncated: bool = option(False, "A completion cut at the length limit weighs nothing.")
    dynamic_sampling: bool = option(False, "Replace groups whose rewards are all equal by other prompts (DAPO).")


@frozen
class GRPOOptions:
    """Objective"""

    loss_type: str = option("grpo", "grpo, bnpo, dr_grpo, dapo, cispo, luspo, sapo, vespo or reinforce.")
    beta: float = option(0.1, "Weight of the KL to the reference; 0 = no reference.", v.ge(0))
    epsilon: float = option(0.2, "Clip range of the importance ratio.", v.ge(0))
    epsilon_high: float | None = option(None, "Its upper side; default: --epsilon.", v.ge(0))
    delta: float | None = option(None, "Upper bound of the ratio where the advantage is negative; default: none.", v.gt(0))
    importance_level: Literal["token", "sequence"] = option(
        "token", "One ratio per token, or per completion (GSPO).", v.in_(("token", "sequence"))
    )
    baseline: Literal["group", "leave_one_out", "batch"] = option(
        "group", "Advantages are rewards minus the mean of their group, of the others of their group (RLOO), or of the batch.",
        v.in_(("group", "leave_one_out", "batch")),
    )  # fmt: skip
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "Advantages are divided by the standard deviation of their group, of the batch, or not.",
        v.in_(("group", "batch", "none")),
    )  # fmt: skip
    num_iterations: int = option(1, "Optimiser steps on every batch of completions.", v.ge(1))
    top_entropy_quantile: float = option(1.0, "Only this share of tokens, of highest entropy, is trained.", v.gt(0), v.le(1))
    correct_kl: bool = option(False, "Multiply the KL by the importance ratio, as TRL 1.16 does.")
    reference_model_path: str | None = option(None, "Another model as the reference; default: --model without adapters.")
    objective: str | None = option(None, "Your own objective: file.py:name.")


@frozen
class OnlineDPOOptions:
    """Objective"""

    loss_type: str = option("sigmoid", "DPO's preference loss, or a sum such as 0.8*sigmoid+0.2*bco_pair.")
    beta: float = option(0.1, "Strength of the pull towards the reference.", v.gt(0))
    label_smoothing: float = option(0.0, "Share of labels assumed to be flipped.", v.ge(0), v.lt(0.5))
    judge_model: str | None = option(None, "A chat model that says which of two completions is better, in place of --rewards.")
    xpo_alpha: float = option(0.0, "Weight of exploration (XPO), such as 1e-5: the reference then answers too; 0 = off.", v.ge(0))
    reference_model_path: str | None = option(None, "Another model as the reference; default: --model without adapters.")
    objective: str | None = option(None, "Your own objective: file.py:name.")


@frozen
class OwnSampling(SamplingOptions):
    """Sampling"""

    group_size: int = option(1, "Completions of each prompt; a batch has --batch-size prompts.", v.ge(1))
