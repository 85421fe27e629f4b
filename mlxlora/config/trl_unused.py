"""The fields of TRL's configurations, of transformers' TrainingArguments and of PEFT's LoraConfig that become no option."""

from typing import Any

from .mlx_lm_keys import Key


def placed(
    text: str, *names: str, fate: Any = "noted", idle: tuple[Any, ...] = (None, False), switch: bool = False
) -> dict[str, Key]:
    """Keys with one text: what is told of them, or why they have no effect."""
    return {name: Key(text, fate=fate, idle=idle, switch=switch) for name in names}


def _without(text: str, *names: str, switch: bool = False) -> dict[str, Key]:
    """Keys that ask for nothing that mlxlora would do otherwise."""
    return placed(text, *names, fate="ignored", switch=switch)


_PYTHON = "in Python: `objective=ml.objectives."
_FILES = "the files of the run are written in any case"
_RANKS = "ranks need no such setting"

_OF_TRL = {
    **placed("not here: the reference does not move", "ref_model_mixup_alpha", "ref_model_sync_steps", idle=(None, 0.6, 512)),
    **placed("not here: the reference does not move", "sync_ref_model", switch=True),
    **placed("weights stand in `loss_type`, such as 0.8*sigmoid+0.2*bco_pair", "loss_weights"),
    **placed(f"{_PYTHON}dpo(f_divergence=...)`", "f_divergence_type", idle=(None, "reverse_kl")),
    **placed(f"{_PYTHON}dpo(f_alpha=...)`", "f_alpha_divergence_coef", idle=(None, 0.5, 1.0)),
    **placed(f"{_PYTHON}dpo(discopop_tau=...)`", "discopop_tau", idle=(None, 0.05)),
    **placed(f"{_PYTHON}grpo(sapo_temperatures=...)`", "sapo_temperature_neg", "sapo_temperature_pos", idle=(None, 1.05, 1.0)),
    **placed(f"{_PYTHON}grpo(vespo_exponents=...)`", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
        idle=(None, 2.0, 3.0)),
    **placed("not here: `entropy_coef` does not move", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta",
        "entropy_target", idle=(None, 0.0, 1.0, 0.005, 0.2)),
    **placed("not here: `entropy_coef` does not move", "use_adaptive_entropy", switch=True),
    **placed("not here: rewards are added up, then normalized", "multi_objective_aggregation", idle=(None, "sum_then_normalize")),
    **placed("not here: completions come from the policy itself", "off_policy_mask_threshold"),
    **placed("not here: completions call no tools", "max_tool_calling_iterations"),
    **placed("not here: rewards are not clipped; a reward function may do so", "reward_clip_range"),
    **placed("`scale_rewards: batch`", "normalize_advantages", switch=True),
    **placed("`mask_truncated`, or a reward function", "missing_eos_penalty"),
    **placed("`gkd` samples every batch itself, `distill` none", "lmbda", idle=(None, 1.0)),
    **placed("`mlxlora sft` on answers of the teacher", "seq_kd", switch=True),
    **placed("not here: routers get no loss of their own", "router_aux_loss_coef", idle=(None, 0.0, 0, 0.001)),
    **placed("its parts are options of their own", "model_init_kwargs", "teacher_model_init_kwargs", "dataset_kwargs",
        "generation_kwargs"),
    **placed("each batch is sampled for itself; `rollout_batch` bounds its memory", "generation_batch_size",
        "steps_per_generation"),
    **placed("`grad_checkpoint` saves memory", "activation_offloading", switch=True),
    **placed("not here: a folder has the files of one revision", "model_revision", "revision", idle=(None, "main")),
    **placed("several files in a folder, or rows from Python", "datasets", idle=(None, [])),
    **placed("`mlxlora push` afterwards", "log_completions_hub_repo"),
    **_without("dropout is that of the adapters, `dropout`", "disable_dropout", switch=True),
    **_without("log-probabilities are computed in float32", "cast_lm_head_to_fp32", switch=True),
    **_without("validation samples as training does", "num_generations_eval"),
    **_without("validation rows are not packed", "eval_packing"),
    **_without("shapes of batches are chosen by themselves", "padding_free", switch=True),
    **_without("shapes of batches are chosen by themselves", "pad_to_multiple_of", "packing_strategy", "padding_value",
        "pad_token"),
    **_without("the batch size of the reference follows `batch_size`", "precompute_ref_batch_size"),
    **_without("answers of validation rows are shown: `answers`", "generate_during_eval", switch=True),
    **_without("completions of a step are shown in any case", "num_completions_to_print"),
    **_without("completions of a step are shown in any case", "log_unique_prompts", "log_multimodal", switch=True),
    **_without("models are decoders", "is_encoder_decoder"),
    **_without("data sets are read whole", "streaming", switch=True),
    **placed("`valid_fraction`", "test_split_size"),
    **_without("completions are sampled by the policy itself", "vllm_model_impl", "vllm_structured_outputs_regex",
        "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
        "vllm_tensor_parallel_size", "vllm_max_model_length", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap", "cache_implementation",
        "transformers_continuous_batching_config"),
    **_without("completions are sampled by the policy itself", "vllm_enable_sleep_mode", "vllm_importance_sampling_correction",
        "use_transformers_continuous_batching", "use_transformers_paged", "ds3_gather_for_generation", switch=True),
}  # fmt: skip

_OF_TRANSFORMERS = {
    **placed("`lr_end`, `lr_decay_steps`, `lr_decay_rate`", "lr_scheduler_kwargs"),
    **placed("`betas`, `eps`, `momentum`", "optim_args"),
    **placed("not here: one rule for every parameter", "optim_target_modules"),
    **placed("`label_smoothing` of `dpo`, `cpo` and `online-dpo`", "label_smoothing_factor", idle=(None, 0, 0.0)),
    **placed("`project_name`", "project", idle=(None, "huggingface")),
    **placed("`mlxlora push` afterwards", "hub_token", "hub_revision", "hub_private_repo", "hub_strategy",
        idle=(None, False, "every_save")),
    **placed("`mlxlora push` afterwards", "hub_always_push", switch=True),
    **placed("the validation loss, or the reward of a method that samples", "metric_for_best_model",
        idle=(None, "loss", "eval_loss")),
    **placed("the validation loss, or the reward of a method that samples", "greater_is_better"),
    **placed("`seed` fixes the order of the rows too", "data_seed"),
    **placed("`fully_shard`", "fsdp", "fsdp_config", "deepspeed", "accelerator_config", "parallelism_config",
        idle=(None, False, "")),
    **placed("`grad_checkpoint`", "activation_checkpointing", switch=True),
    **placed("not here: validation begins with the first step", "eval_delay", idle=(None, 0, 0.0)),
    **placed("not here: rows are visited in a shuffled order, or with `shuffle: false` in that of the file",
        "train_sampling_strategy", idle=(None, "random", "sequential")),
    **placed("every row of an epoch is trained once", "dataloader_drop_last", switch=True),
    **placed("a resumed run goes on at its row", "ignore_data_skip", switch=True),
    **_without("a loss is one mean over all trained tokens of a step", "average_tokens_across_devices", switch=True),
    **_without("the types of the model's files are used", "bf16_full_eval", "fp16_full_eval", switch=True),
    **_without("steps are compiled by MLX", "torch_compile", switch=True),
    **_without("steps are compiled by MLX", "torch_compile_backend", "torch_compile_mode"),
    **_without("memory: `micro_batch`, `memory_limit`", "auto_find_batch_size", "skip_memory_metrics", switch=True),
    **_without("memory: `micro_batch`, `memory_limit`", "torch_empty_cache_steps", "eval_accumulation_steps"),
    **_without("no such choice is needed", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs",
        "liger_kernel_config", "label_names", "length_column_name", "include_for_metrics", "debug"),
    **_without("no such choice is needed", "use_cache", "use_cpu", "batch_eval_metrics", "eval_do_concat_batches",
        "eval_use_gather_object", "prediction_loss_only", "full_determinism", switch=True),
    **_without("validation comes before the first step in any case", "eval_on_start", switch=True),
    **_without("the command says it", "do_train", "do_eval", "do_predict", switch=True),
    **_without("reports: `steps_per_report`, `quiet`", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter",
        "include_num_input_tokens_seen", "disable_tqdm", switch=True),
    **_without("reports: `steps_per_report`, `quiet`", "log_level", "log_level_replica"),
    **_without("trackers have their own settings", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    **_without(_FILES, "save_only_model", "save_on_each_node", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint",
        switch=True),
    **_without("batches are made ahead of time", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    **_without("batches are made ahead of time", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order",
        switch=True),
    **_without(_RANKS, "ddp_bucket_cap_mb", "ddp_backend", "ddp_timeout", "local_rank"),
    **_without(_RANKS, "ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph", switch=True),
}  # fmt: skip

_OF_PEFT = {
    **placed("biases are frozen", "bias", idle=(None, "none")),
    **placed("biases are frozen", "lora_bias", switch=True),
    **placed("`num_layers` counts blocks from the last", "layers_to_transform", "layers_pattern"),
    **placed("name the others with `lora_keys`", "exclude_modules"),
    **placed("name modules with `lora_keys`; experts are modules", "target_parameters", "lora_target_parameters"),
    **placed("`lora_keys` with embed_tokens", "trainable_token_indices"),
    **placed("a tied head is `embed_tokens`, whose adapter serves both", "ensure_weight_tying", switch=True),
    **placed("not here: adapters start at no update or from principal components", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", idle=(None, {})),
    **placed("not here: this variant of LoRA", "velora_config", "alora_invocation_tokens", "monteclora_config", "layer_replication",
        "use_bdlora", "arrow_config", "kasa_config", "use_qalora"),
    **_without("`quantize` has MLX's formats", "bnb_4bit_quant_type", "bnb_4bit_quant_storage", "qalora_group_size"),
    **_without("`quantize` has MLX's formats", "use_bnb_nested_quant", switch=True),
    **_without("known from the model", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "megatron_config",
        "megatron_core", "runtime_config"),
    **_without("known from the model", "fan_in_fan_out", "inference_mode", switch=True),
}  # fmt: skip

UNUSED = {**_OF_TRL, **_OF_TRANSFORMERS, **_OF_PEFT}
"""Every such field."""
