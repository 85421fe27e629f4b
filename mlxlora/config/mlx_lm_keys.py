"""The keys and flags of mlx-lm and mlx-lm-lora, and what mlxlora does with each.

Two tables; tests/config/test_mlx_lm_compat.py checks them against the defaults and flags of these libraries, and `docs/`
shows them. A key is an option under the same or another name, becomes several options, has no meaning here, or is refused
with a remedy.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from attrs import frozen

from ..errors import listed, plain

Options = dict[str, Any]


@frozen
class Key:
    """What mlxlora does with a key of another library, a peer.

    Attributes:
        text: for the table of the documentation.
        option: the option with the same meaning.
        modes: the commands in which it is that option; empty: all that have the option.
        convert: its value -> options; raises ValueError if there are none.
        fate: what happens to a value that becomes no option.
        idle: values without effect, which are ignored.
        switch: the flag takes no value.
        absent: the note in commands that accept the key without having the option.
    """

    text: str = ""
    option: str | None = None
    modes: tuple[str, ...] = ()
    convert: Callable[[Any], Options] | None = None
    fate: Literal["ignored", "noted", "refused"] = "ignored"
    idle: tuple[Any, ...] = (None, False)
    switch: bool = False
    absent: Mapping[str, str] = {}


@frozen
class Peer:
    """Another library.

    Attributes:
        name: of the package.
        keys: its keys and flags.
        signs: keys that no other library has, which show whose file it is.
        defaults: those that differ from mlxlora's.
        alike: beginnings of the differences between mlxlora and other peers that this one does not have.
    """

    name: str
    keys: Mapping[str, Key]
    signs: frozenset[str]
    defaults: Mapping[str, Any]
    alike: tuple[str, ...] = ()


def _same(*names: str) -> dict[str, Key]:
    return {name: Key(option=name) for name in names}


def _ignored(text: str, *names: str, **more: Any) -> dict[str, Key]:
    return {name: Key(text, **more) for name in names}


def _decay(value: Any) -> Options:
    """mlx-lm's schedule: {name, arguments, warmup, warmup_init}.

    >>> _decay({"name": "cosine_decay", "arguments": [1e-5, 1000, 1e-7], "warmup": 100})
    {'lr_schedule': 'cosine', 'learning_rate': 1e-05, 'lr_decay_steps': 1000, 'lr_end': 1e-07, 'warmup': 100}
    """
    if not isinstance(value, Mapping):
        return {"lr_schedule": value}  # one of ours
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or name not in _SCHEDULES:
        raise ValueError(f"lr_schedule {plain(name)} is not offered; there are {', '.join(_SCHEDULES)}, with their arguments")
    if unknown := value.keys() - {"name", "arguments", "warmup", "warmup_init"}:
        raise ValueError(f"lr_schedule has no {listed(sorted(map(str, unknown)))}; it has name, arguments, warmup and warmup_init")
    kind, takes, least = _SCHEDULES[name]
    if not isinstance(arguments, list) or not least <= len(arguments) <= len(takes):
        raise ValueError(f"lr_schedule.arguments of {name} are [{', '.join(takes)}], got {plain(arguments)}")
    every_step = {"lr_decay_steps": 1} if name == "exponential_decay" else {}
    rest = {key: value[key] for key in ("warmup", "warmup_init") if value.get(key) is not None}
    return {"lr_schedule": kind, **dict(zip(takes, arguments, strict=False)), **every_step, **rest}


_SCHEDULES: Mapping[str, tuple[str, tuple[str, ...], int]] = {
    "cosine_decay": ("cosine", ("learning_rate", "lr_decay_steps", "lr_end"), 2),
    "linear_schedule": ("linear", ("learning_rate", "lr_end", "lr_decay_steps"), 3),
    "exponential_decay": ("exponential", ("learning_rate", "lr_decay_rate"), 2),
    "step_decay": ("step", ("learning_rate", "lr_decay_rate", "lr_decay_steps"), 3),
}
"""MLX's schedules: the name in mlxlora, the arguments in order, and how many are required."""

_OURS: Mapping[str, Mapping[str, Any]] = {
    "adam": {"bias_correction": True},
    "adamw": {"bias_correction": True},
    "adafactor": {"relative_step": False, "scale_parameter": False, "warmup_init": False},
    "sgd": {"dampening": 0, "nesterov": False},
    "muon": {"nesterov": True, "ns_steps": 5},
}
"""Arguments of MLX's optimizers that mlxlora fixes, and their values."""


def optimizer_options(config: Any, optimizer: str) -> Options:
    """The options in the chosen optimizer's part of mlx-lm's `optimizer_config`.

    >>> optimizer_options({"adam": {}, "adamw": {"betas": [0.9, 0.98], "bias_correction": True}}, "adamw")
    {'betas': [0.9, 0.98]}

    Raises:
        ValueError: an argument that mlxlora does not have, or fixes to another value.
    """
    given = (config or {}).get(optimizer) or {} if isinstance(config or {}, Mapping) else None
    if not isinstance(given, Mapping):
        raise ValueError("optimizer_config is a mapping such as {adamw: {weight_decay: 0.01}}")
    fixed = _OURS.get(optimizer, {})
    for name, value in given.items():
        if name in ("betas", "eps", "momentum", "weight_decay") and not (optimizer == "adafactor" and name == "eps"):
            continue
        if name not in fixed or value != fixed[name]:
            always = f"; it is always {str(fixed[name]).lower()} here" if name in fixed else ""
            raise ValueError(f"optimizer_config.{optimizer}.{plain(name)}: {plain(value)} is not offered{always}; remove it")
    return {name: value for name, value in given.items() if name not in fixed}


_FEATURES = {
    "prompt_feature": "prompt_key",
    "text_feature": "text_key",
    "completion_feature": "completion_key",
    "chat_feature": "messages_key",
}
_FIXED_FEATURES = ("system", "chosen", "rejected", "preference_score", "answer", "type")

HUB = "hf://datasets/"
"""The prefix of a hub data set whose name has no organization."""


def _hub_data(value: Any) -> Options:
    """mlx-lm's `hf_dataset`: {path, config, *_split, *_feature}.

    >>> _hub_data({"path": "org/name", "train_split": "train[:1000]", "prompt_feature": "text"})
    {'data': 'org/name', 'train_split': 'train[:1000]', 'prompt_key': 'text'}
    >>> _hub_data({"path": "billsum"})  # alone, such a name is a file's
    {'data': 'hf://datasets/billsum'}
    """
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, Mapping) or not (value.get("path") or value.get("name")):
        raise ValueError("hf_dataset takes one data set, {path: org/name, ...}; join several into one train.jsonl")
    config = value.get("config") or {}
    if not isinstance(config, Mapping):
        raise ValueError("hf_dataset.config is a mapping such as {name: main}")
    known = {"path", "name", "config", "train_split", "valid_split", "test_split", "mask_prompt", *_FEATURES}
    fixed = {f"{name}_feature" for name in _FIXED_FEATURES if value.get(f"{name}_feature") in (None, name)}
    if unknown := [*(value.keys() - known - fixed), *(f"config.{name}" for name in config.keys() - {"name"})]:
        told = plain(min(map(str, unknown)))
        raise ValueError(f"hf_dataset.{told} is not offered; write such rows to train.jsonl and name its folder with data")
    name = str(value.get("path") or value.get("name"))
    path = ("" if "/" in name else HUB) + name + (f":{config['name']}" if config.get("name") else "")
    splits = {key: value[key] for key in ("train_split", "valid_split", "test_split") if value.get(key) is not None}
    return {"data": path, **splits, **{ours: value[key] for key, ours in _FEATURES.items() if value.get(key) is not None}}


def trackers(value: Any) -> Options:
    """The trackers that a list or a text names; `none` is none."""
    names = value.split(",") if isinstance(value, str) else value
    return {"report_to": names} if names and names not in (["none"], ["None"]) else {}


_REWARDS = {
    "r1_int_reward_func": "integer(score=0.5)",
    "r1_accuracy_reward_func": "accuracy_strict(score=2.0)",
    "r1_soft_format_reward_func": "format_soft(score=0.5)",
    "r1_strict_format_reward_func": "format_strict(score=0.5)",
    "r1_count_xml": "tag_count(score=0.125)",
}
"""mlx-lm-lora's built-in rewards, and their names in mlxlora."""


def _reward_names(value: Any) -> Options:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    return {"rewards": [_REWARDS.get(name, name) for name in _texts(names, "reward_functions")]} if names else {}


def _texts(value: Any, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} takes names, got {plain(value)}")
    return value


def _judge(value: Any) -> Options:
    if value == "human":
        raise ValueError("judge: human is not offered; name a model, or rewards")
    return {"judge_model": value}


_SHARED = {
    **_same("model", "data", "seed", "num_layers", "batch_size", "iters", "val_batches", "learning_rate", "steps_per_report"),
    **_same("steps_per_eval", "resume_adapter_file", "adapter_path", "save_every", "max_seq_length", "optimizer"),
    **{name: Key(option=name, switch=True) for name in ("mask_prompt", "test", "grad_checkpoint", "use_chat_template")},
    "train": Key("the command says it; to test alone: `mlxlora eval`", switch=True),
    "config": Key("`-c`, `--config`"),
    "lora_parameters": Key("`rank`, `scale`, `dropout`, `lora_keys`; unchanged in a file"),
    "lora_layers": Key(option="num_layers"),
    "optimizer_config": Key("`betas`, `eps`, `momentum`, `weight_decay`, of the chosen optimizer; unchanged in a file"),
    "lr_schedule": Key("`lr_schedule`, `learning_rate`, `lr_decay_steps`, `lr_decay_rate`, `lr_end`, `warmup`, `warmup_init`; "
        "unchanged in a file", convert=_decay),
    "hf_dataset": Key("`data`, `train_split`, ..., `prompt_key`, ...; unchanged in a file, one data set", convert=_hub_data),
    "test_batches": Key("the test always covers the whole split"),
    **{name: Key(option=ours) for name, ours in _FEATURES.items()},
    **{
        f"{name}_feature": Key(f"call the field `{name}` in the rows", fate="refused", idle=(None, name))
        for name in _FIXED_FEATURES
    },
}  # fmt: skip

_MLX_LM = {
    **_SHARED,
    "fine_tune_type": Key(option="train_type"),
    "training_mode": Key("the command says it", fate="refused", idle=(None, "normal")),
    "grad_accumulation_steps": Key(option="grad_accumulation_steps"),
    "trust_remote_code": Key(option="trust_remote_code", switch=True),
    "clear_cache_threshold": Key("memory is bounded by `memory_limit`"),
    "report_to": Key("`report_to`; `none` switches it off", convert=trackers),
    "project_name": Key(option="project_name"),
}


def _loaded_in(form: str) -> Key:
    return Key(f"`quantize: {form}`", convert=lambda v: {"quantize": form} if v else {}, switch=True)


_LORA_MODE = "belongs to a `train_mode` that is not offered"

_MLX_LM_LORA = {
    **_SHARED,
    **_same("train_type", "epochs", "group_size", "epsilon", "epsilon_high", "max_completion_length"),
    **_same("temperature", "top_p", "top_k", "min_p"),
    "use_prompt": Key(option="use_prompt", switch=True),
    "reference_model_path": Key("a note in `cpo` and `orpo`, which have no reference", option="reference_model_path",
        absent=dict.fromkeys(("cpo", "orpo"), "this method has no reference")),
    "train_mode": Key("the command: `sft`, `dpo`, `orpo`, `cpo`, `grpo`, `online-dpo` (also for `xpo`); others are not offered"),
    "gradient_accumulation_steps": Key(option="grad_accumulation_steps"),
    "micro_batch_size": Key("`micro_batch` bounds memory"),
    "sft_loss_type": Key("`nll`, `dft`; `chunked_nll` becomes `nll`, which is computed in chunks where that saves memory",
        option="loss_type", modes=("sft",), convert=lambda v: {"loss_type": "nll" if v == "chunked_nll" else v}),
    "dpo_cpo_loss_type": Key(option="loss_type", modes=("dpo", "cpo", "online-dpo")),
    "grpo_loss_type": Key(option="loss_type", modes=("grpo",)),
    "importance_sampling_level": Key(option="importance_level"),
    "beta": Key(option="beta"),
    "delta": Key("in `dpo` and `cpo` with `dpop`; elsewhere it has no effect, as in mlx-lm-lora",
        option="delta", modes=("dpo", "cpo")),
    "alpha": Key("with `xpo`; in `cpo` it is the weight of the chosen completion's NLL", option="xpo_alpha"),
    "reward_functions": Key("names of built-in functions are translated", option="rewards", convert=_reward_names),
    "reward_functions_file": Key(option="reward_file"),
    **_same("reward_weights"),
    "list_reward_functions": Key("as a flag: list the functions and exit", switch=True),
    "reward_scaling": Key("no effect in mlx-lm-lora either"),
    **{f"load_in_{name}": _loaded_in(form) for name, form in (("4bits", "4"), ("6bits", "6"), ("8bits", "8"), ("mxfp4", "mxfp4"))},
    "fuse": Key("run `mlxlora fuse` afterwards", fate="noted", switch=True),
    "lm_studio_name": Key("run `mlxlora fuse --save-path` into LM Studio's folder of models", fate="noted"),
    "efficient_long_context": Key("`micro_batch`, `memory_limit` and `grad_checkpoint` bound memory", switch=True),
    "recurrence_chunk_size": Key("not offered; gated-delta layers keep the states of all tokens in the backward pass"),
    "wandb": Key("`report_to: [wandb]`; the project is WANDB_PROJECT in the environment",
        convert=lambda v: {"report_to": ["wandb"]} if v else {}),
    "wand": Key("no effect in mlx-lm-lora either; `report_to: [wandb]`"),
    "judge": Key("a model, not `human`", option="judge_model", modes=("online-dpo",), convert=_judge),
    "judge_config": Key("the judge has a fixed prompt; remove it", modes=("online-dpo",), fate="refused", idle=(None, {})),
    "qat_enable": Key("`qat: 8`, or the bits of `qat_bits`: rounds weights as `mlx_lm.convert -q` quantizes them",
        convert=lambda v: {"qat": "8"} if v else {}, switch=True),
    "qat_bits": Key("`qat` with `qat_enable`: 4, 6 or 8", convert=lambda v: {"qat": str(v)}),
    "qat_group_size": Key("always 64, as in `mlx_lm.convert -q`", fate="noted", idle=(None, 64)),
    "qat_mode": Key("always `affine`", fate="noted", idle=(None, "affine")),
    **_ignored("weights are rounded in every step", "qat_start_step", "qat_interval", fate="noted", idle=(None, 1)),
    **_ignored(_LORA_MODE, "dsla_loss", "latent_weight", "latent_margin", "latent_gamma", "latent_variant", "latent_pooling"),
    **_ignored(_LORA_MODE, "latent_layer", "lambda_mse_target", "tau_mse_target", "lambda_mse", "clip_epsilon_logits"),
    **_ignored(_LORA_MODE, "klpo_route", "klpo_kl_estimator", "klpo_mc_samples", "klpo_top_k", "klpo_tail_floor"),
}  # fmt: skip

MLX_LM = Peer(
    "mlx-lm",
    _MLX_LM,
    frozenset(
        {"train", "fine_tune_type", "training_mode", "optimizer_config", "hf_dataset", "test_batches", "clear_cache_threshold"}
    ),
    {"iters": 1000, "weight_decay": 0.01},
)
MLX_LM_LORA = Peer(
    "mlx-lm-lora",
    _MLX_LM_LORA,
    frozenset(_MLX_LM_LORA.keys() - _MLX_LM.keys())
    - {
        "train_type",
        "epochs",
        "reference_model_path",
        "group_size",
        "epsilon",
        "epsilon_high",
        "max_completion_length",
        "temperature",
    }
    - {"top_p", "top_k", "min_p", "use_prompt", "beta", "delta", "alpha", "reward_weights"},
    {"iters": 100, "num_layers": -1, "batch_size": 1, "scale": 10.0, "weight_decay": 0.01, "epsilon": 1e-4},
)
