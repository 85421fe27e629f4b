"""The keys and flags of mlx-lm and mlx-lm-lora, and what each of them is here.

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
    """What a key of a peer is here.

    Attributes:
        text: for the table of the documentation.
        option: the option that it is.
        modes: the commands in which it is that option; empty: all that have it.
        turned: its value as options; ValueError says why there are none.
        fate: whether a value is passed over, told about or refused where there is no option.
        idle: the values that say nothing.
        switch: the peer's flag takes no value.
        lacking: what is told in the commands that have not the option and take the key all the same.
    """

    text: str = ""
    option: str | None = None
    modes: tuple[str, ...] = ()
    turned: Callable[[Any], Options] | None = None
    fate: Literal["ignored", "told", "refused"] = "ignored"
    idle: tuple[Any, ...] = (None, False)
    switch: bool = False
    lacking: Mapping[str, str] = {}


@frozen
class Peer:
    """Another trainer: its table, the keys that show that a file is its own, and its defaults that are not ours."""

    name: str
    keys: Mapping[str, Key]
    signs: frozenset[str]
    defaults: Mapping[str, Any]


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
"""MLX's schedules: each one's name here, what its arguments are, and how many of them it needs."""

_OURS: Mapping[str, Mapping[str, Any]] = {
    "adam": {"bias_correction": True},
    "adamw": {"bias_correction": True},
    "adafactor": {"relative_step": False, "scale_parameter": False, "warmup_init": False},
    "sgd": {"dampening": 0, "nesterov": False},
    "muon": {"nesterov": True, "ns_steps": 5},
}
"""Arguments of MLX's optimisers that have one value here."""


def optimizer_options(config: Any, optimizer: str) -> Options:
    """mlx-lm's `optimizer_config`, of which the chosen optimiser's part counts.

    >>> optimizer_options({"adam": {}, "adamw": {"betas": [0.9, 0.98], "bias_correction": True}}, "adamw")
    {'betas': [0.9, 0.98]}

    Raises:
        ValueError: an argument that has another value here, or none.
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
"""What precedes the name of a hub data set that has no organisation."""


def _hub_data(value: Any) -> Options:
    """mlx-lm's `hf_dataset`: {path, config, *_split, *_feature}.

    >>> _hub_data({"path": "org/name", "train_split": "train[:1000]", "prompt_feature": "text"})
    {'data': 'org/name', 'train_split': 'train[:1000]', 'prompt_key': 'text'}
    >>> _hub_data({"path": "billsum"})  # alone, such a name is a file's
    {'data': 'hf://datasets/billsum'}
    """
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, Mapping) or not (value.get("path") or value.get("name")):
        raise ValueError("hf_dataset takes one data set here, {path: org/name, ...}; join several into one train.jsonl")
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


def _trackers(value: Any) -> Options:
    names = value.split(",") if isinstance(value, str) else value
    return {"report_to": names} if names and names not in (["none"], ["None"]) else {}


_REWARDS = {
    "r1_int_reward_func": "integer(score=0.5)",
    "r1_accuracy_reward_func": "accuracy_strict(score=2.0)",
    "r1_soft_format_reward_func": "format_soft(score=0.5)",
    "r1_strict_format_reward_func": "format_strict(score=0.5)",
    "r1_count_xml": "tag_count(score=0.125)",
}
"""mlx-lm-lora's built-in rewards under their names here."""


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
    "lora_parameters": Key("`rank`, `scale`, `dropout`, `lora_keys`; as it stands in a file"),
    "lora_layers": Key(option="num_layers"),
    "optimizer_config": Key("`betas`, `eps`, `momentum`, `weight_decay`, of the chosen optimiser; as it stands in a file"),
    "lr_schedule": Key("`lr_schedule`, `learning_rate`, `lr_decay_steps`, `lr_decay_rate`, `lr_end`, `warmup`, `warmup_init`; "
        "as it stands in a file", turned=_decay),
    "hf_dataset": Key("`data`, `train_split`, ..., `prompt_key`, ...; as it stands in a file, one data set", turned=_hub_data),
    "test_batches": Key("the test is of the whole split"),
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
    "report_to": Key("`report_to`; `none` is none", turned=_trackers),
    "project_name": Key("set WANDB_PROJECT or SWANLAB_PROJECT in the environment instead", fate="told"),
}


def _loaded_in(form: str) -> Key:
    return Key(f"`quantize: {form}`", turned=lambda v: {"quantize": form} if v else {}, switch=True)


_LORA_MODE = "belongs to a `train_mode` that is not offered"

_MLX_LM_LORA = {
    **_SHARED,
    **_same("train_type", "epochs", "group_size", "epsilon", "epsilon_high", "max_completion_length"),
    **_same("temperature", "top_p", "top_k", "min_p"),
    "use_prompt": Key(option="use_prompt", switch=True),
    "reference_model_path": Key("a note in `cpo` and `orpo`, which have no reference", option="reference_model_path",
        lacking=dict.fromkeys(("cpo", "orpo"), "this method has no reference")),
    "train_mode": Key("the command: `sft`, `dpo`, `orpo`, `cpo`, `grpo`, `online-dpo` (also for `xpo`); others are not offered"),
    "gradient_accumulation_steps": Key(option="grad_accumulation_steps"),
    "micro_batch_size": Key("memory is bounded without it: `micro_batch`"),
    "sft_loss_type": Key("`nll`, `dft`; `chunked_nll` is `nll`, which is always in chunks where that saves memory",
        option="loss_type", modes=("sft",), turned=lambda v: {"loss_type": "nll" if v == "chunked_nll" else v}),
    "dpo_cpo_loss_type": Key(option="loss_type", modes=("dpo", "cpo", "online-dpo")),
    "grpo_loss_type": Key(option="loss_type", modes=("grpo",)),
    "importance_sampling_level": Key(option="importance_level"),
    "beta": Key(option="beta"),
    "delta": Key("in `dpo` and `cpo` with `dpop`, as there; elsewhere it is passed over", option="delta", modes=("dpo", "cpo")),
    "alpha": Key("with `xpo`; in `cpo` it is the weight of the NLL of the chosen", option="xpo_alpha"),
    "reward_functions": Key("the names of the built-in ones are translated", option="rewards", turned=_reward_names),
    "reward_functions_file": Key(option="reward_file"),
    **_same("reward_weights"),
    "list_reward_functions": Key("as a flag it lists them, and nothing runs", switch=True),
    "reward_scaling": Key("does nothing there either"),
    **{f"load_in_{name}": _loaded_in(form) for name, form in (("4bits", "4"), ("6bits", "6"), ("8bits", "8"), ("mxfp4", "mxfp4"))},
    "fuse": Key("run `mlxlora fuse` afterwards", fate="told", switch=True),
    "lm_studio_name": Key("run `mlxlora fuse --save-path` into LM Studio's folder of models", fate="told"),
    "efficient_long_context": Key("memory is bounded without it: `micro_batch`, `memory_limit`, `grad_checkpoint`", switch=True),
    "recurrence_chunk_size": Key("memory is bounded without it"),
    "wandb": Key("`report_to: [wandb]`; the project is WANDB_PROJECT in the environment",
        turned=lambda v: {"report_to": ["wandb"]} if v else {}),
    "wand": Key("does nothing there either; `report_to: [wandb]`"),
    "judge": Key("a model, not `human`", option="judge_model", modes=("online-dpo",), turned=_judge),
    "judge_config": Key("the judge has a fixed prompt; remove it", modes=("online-dpo",), fate="refused", idle=(None, {})),
    "qat_enable": Key("`qat: 8`, or as `qat_bits` says: what `mlx_lm.convert -q` quantises is rounded, and as it quantises",
        turned=lambda v: {"qat": "8"} if v else {}, switch=True),
    "qat_bits": Key("`qat` with `qat_enable`: 4, 6 or 8", turned=lambda v: {"qat": str(v)}),
    "qat_group_size": Key("it is 64 here, as in `mlx_lm.convert -q`", fate="told", idle=(None, 64)),
    "qat_mode": Key("it is `affine` here", fate="told", idle=(None, "affine")),
    **_ignored("weights are rounded in every step", "qat_start_step", "qat_interval", fate="told", idle=(None, 1)),
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
PEERS = (MLX_LM_LORA, MLX_LM)
