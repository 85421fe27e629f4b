"""The keys and flags of TRL's trainers and of PEFT's LoRA, and what mlxlora does with each; see `mlx_lm_keys`."""

from collections.abc import Mapping
from typing import Any

from ..errors import InputError, plain
from .mlx_lm_keys import Key, Options, Peer, trackers
from .trl_unused import UNUSED, placed

_ROWS = ("sft", "dpo", "orpo", "cpo", "kto", "distill")
"""Commands whose batches count what TRL counts."""


def _renamed(**names: str) -> dict[str, Key]:
    return {theirs: Key(option=ours) for theirs, ours in names.items()}


def _same(*names: str) -> dict[str, Key]:
    return {name: Key(option=name) for name in names}


def _switches(**names: str) -> dict[str, Key]:
    return {theirs: Key(option=ours, switch=True) for theirs, ours in names.items()}


def _truth(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise ValueError(f"expected True or False, got {plain(value)}")
    return str(value).lower() == "true"


def _schedule(value: Any) -> Options:
    """TRL's names of schedules.

    >>> _schedule("constant_with_warmup")
    {'lr_schedule': 'constant'}
    """
    name = {"constant_with_warmup": "constant"}.get(str(value), value)
    if name not in ("constant", "linear", "cosine"):
        raise ValueError(f"lr_scheduler_type {plain(value)} is not offered; there are constant, linear, cosine")
    return {"lr_schedule": name}


def _optimizer(value: Any) -> Options:
    """transformers' names of optimizers.

    >>> _optimizer("adamw_torch_fused")
    {'optimizer': 'adamw'}
    """
    known = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "lion_32bit": "lion"}
    name = known.get(str(value), value)
    if name not in ("adamw", "sgd", "adafactor", "lion"):
        raise ValueError(f"optim {plain(value)} is not offered; there are adamw_torch, sgd, adafactor, lion_32bit")
    return {"optimizer": name}


def _steps(value: Any) -> Options:
    return {} if str(value) == "-1" else {"iters": value}


def _dora(value: Any) -> Options:
    return {"train_type": "dora"} if _truth(value) else {}


def _form(form: str) -> Any:
    return lambda value: {"quantize": form} if _truth(value) else {}


def _evaluations(value: Any) -> Options:
    return {"steps_per_eval": value} if value else {}


_TRL = {
    **UNUSED,
    **_renamed(model_name_or_path="model", dataset_name="data", output_dir="adapter_path", num_train_epochs="epochs"),
    **_renamed(gradient_accumulation_steps="grad_accumulation_steps", lr="learning_rate", warmup_steps="warmup"),
    **_renamed(logging_steps="steps_per_report", save_steps="save_every", adam_epsilon="eps", max_length="max_seq_length"),
    **_renamed(dataset_text_field="text_key", dataset_train_split="train_split", dataset_test_split="valid_split"),
    **_renamed(chat_template_path="chat_template", chat_template_kwargs="chat_template_args"),
    **_renamed(num_generations="group_size", importance_sampling_level="importance_level", reward_funcs="rewards"),
    **_renamed(reward_model_name_or_path="reward_model", lora_r="rank", r="rank", lora_dropout="dropout"),
    **_renamed(lora_target_modules="lora_keys", target_modules="lora_keys", max_new_tokens="max_completion_length"),
    **_renamed(cpo_alpha="alpha", simpo_gamma="gamma", reward_model_path="reward_model"),
    **_renamed(teacher_model_name_or_path="teacher_model"),
    "report_to": Key("`report_to`; `none` switches it off", convert=trackers),
    **placed("the run has the name of its folder", "run_name"),
    **_same("learning_rate", "weight_decay", "max_grad_norm", "seed", "save_total_limit", "neftune_noise_alpha", "loss_type"),
    **_same("beta", "label_smoothing", "ld_alpha", "desirable_weight", "undesirable_weight", "temperature", "top_p", "top_k"),
    **_same("min_p", "repetition_penalty", "num_iterations", "epsilon", "epsilon_high", "delta", "reward_weights"),
    **_same("max_completion_length", "top_entropy_quantile", "init_lora_weights", "entropy_coef", "eos_token"),
    **_switches(use_bias_correction_kl="correct_kl", shuffle_dataset="shuffle"),
    **_switches(gradient_checkpointing="grad_checkpoint", load_best_model_at_end="keep_best", packing="packing"),
    **_switches(completion_only_loss="mask_prompt", assistant_only_loss="mask_prompt", use_weighting="wpo"),
    **_switches(mask_truncated_completions="mask_truncated", use_rslora="rslora", trust_remote_code="trust_remote_code"),
    "per_device_train_batch_size": Key("in `grpo`, `online-dpo` and `gkd` it counts completions there; `batch_size` counts prompts",
        option="batch_size", modes=_ROWS),
    "max_steps": Key("-1 is no limit", option="iters", convert=_steps),
    "lr_scheduler_type": Key("`lr_schedule`: constant, linear, cosine", convert=_schedule),
    "optim": Key("`optimizer`: adamw, sgd, adafactor, lion", convert=_optimizer),
    "eval_steps": Key("steps", option="steps_per_eval", convert=_evaluations),
    "scale_rewards": Key("`group` for True, `none` for False", option="scale_rewards"),
    "lora_alpha": Key("`scale` is lora_alpha / lora_r; a conversion"),
    "use_dora": Key("`train_type: dora`", convert=_dora, switch=True),
    "load_in_4bit": Key("`quantize: 4`", convert=_form("4"), switch=True),
    "load_in_8bit": Key("`quantize: 8`", convert=_form("8"), switch=True),
    **_same("rank_pattern", "alpha_pattern"),
    **placed("`betas: [beta1, beta2]`", "adam_beta1", "adam_beta2"),
    **placed("`warmup` counts steps: warmup_ratio x iters", "warmup_ratio", idle=(None, 0, 0.0)),
    **placed("`mlxlora push` afterwards", "push_to_hub", switch=True),
    **placed("`mlxlora push` afterwards", "hub_model_id"),
    **placed("`resume` continues the run in `adapter_path`", "resume_from_checkpoint"),
    **placed("a part of the data's name: `data: org/name:config`", "dataset_config"),
    **placed("`max_seq_length` covers prompt and completion", "max_prompt_length"),
    **placed("`prompt_truncation: right` or `left`", "truncation_mode"),
    **placed("what is not adapted is frozen", "modules_to_save", "lora_modules_to_save", fate="refused"),
    **placed("`loraplus_lr_ratio`", "lora_plus_ratio"),
    **placed("adapters are the default; `train_type: full` for weights", "use_peft", fate="ignored", switch=True),
    **placed("a text generator", "task_type", "lora_task_type", fate="ignored"),
    **placed("the reference scores rows once, before training", "precompute_ref_log_probs", fate="ignored", switch=True),
    **placed("the types of the model's files are used", "bf16", "fp16", "tf32", fate="ignored", switch=True),
    **placed("the types of the model's files are used", "dtype", "torch_dtype", fate="ignored"),
    **placed("`attention`", "attn_implementation", fate="ignored"),
    **placed("completions are sampled by the policy itself", "use_vllm", fate="ignored", switch=True),
    **placed("completions are sampled by the policy itself", "vllm_mode", "vllm_gpu_memory_utilization", fate="ignored"),
    **placed("the loss is memory-bounded by itself", "use_liger_kernel", fate="ignored", switch=True),
    **placed("validation has the batch size of training", "per_device_eval_batch_size", fate="ignored"),
    **placed("`steps_per_eval`, `save_every`, `steps_per_report`", "eval_strategy", "save_strategy", fate="ignored"),
    **placed("`steps_per_report`", "logging_strategy", fate="ignored"),
    **placed("batches are made ahead of time", "dataset_num_proc", "dataloader_num_workers", fate="ignored"),
    **placed("columns that rewards read are kept", "remove_unused_columns", fate="ignored"),
    **placed("completions of a step are shown in any case", "log_completions", fate="ignored", switch=True),
}  # fmt: skip

TRL = Peer(
    "TRL",
    _TRL,
    frozenset(
        {
            "model_name_or_path",
            "dataset_name",
            "output_dir",
            "num_train_epochs",
            "per_device_train_batch_size",
            "lora_r",
            "lora_alpha",
        }
        | {"lora_target_modules", "target_modules", "lr_scheduler_type", "logging_steps", "num_generations", "max_steps", "optim"}
        | {"completion_only_loss", "assistant_only_loss", "gradient_checkpointing", "reward_funcs", "eval_strategy"}
    ),
    {"epochs": 3, "learning_rate": "2e-5 in SFT, 1e-6 in DPO and GRPO", "lr_schedule": "linear", "batch_size": 8, "rank": 16}
    | {"optimizer": "adamw", "scale": 2, "steps_per_report": 10},
    alike=("Adam has", "gradients are", "iters are", "a loss is", "CPO adds"),
)


def settled_alpha(values: Mapping[str, Any], keys: Mapping[str, Any], rank: int) -> Options:
    """The scale of PEFT's `lora_alpha`, which is alpha / rank; TRL's own `alpha` of CPO is another loss.

    >>> settled_alpha({}, {"lora_alpha": "32"}, 16)
    {'scale': 2.0}

    Raises:
        InputError: `lora_alpha` is no number, or `alpha` is not 0.
    """
    theirs = "alpha" in keys and "cpo_alpha" not in keys
    if theirs and values.get("alpha"):
        raise InputError(
            f"alpha: {plain(values['alpha'])} is AlphaPO's in TRL, which is not offered; the weight of the NLL is cpo_alpha"
        )
    values = {name: value for name, value in values.items() if not (theirs and name == "alpha")}
    if keys.get("lora_alpha") is None or "scale" in values:
        return values
    try:
        return {**values, "scale": float(keys["lora_alpha"]) / rank}
    except (TypeError, ValueError):
        raise InputError(f"lora_alpha must be a number, got {plain(keys['lora_alpha'])}") from None
