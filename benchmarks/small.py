"""Small configurations of the architectures of mlx-lm, for tests and benchmarks: two layers or four, random weights."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import mlx.core as mx
import mlx.nn as nn

VOCABULARY = 128

# Values by the name of the field; an architecture reads the names that it has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "hidden_dim", "n_embd", "model_dim", "d_model", "dim_model_base", "moe_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "ff_intermediate_size", "n_inner"), 128),
    **dict.fromkeys(("dense_intermediate_size", "block_dim", "mlp_hidden_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "expert_ffn_hidden_size", "share_expert_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_transformer_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "swa_num_key_value_heads", "num_attention_groups"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "hidden_size_per_head", "kv_channels", "swa_head_dim", "swa_v_head_dim"), 16),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "q_lora_rank", "kv_lora_rank", "query_pre_attn_scalar"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "o_lora_rank"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "num_shared_expert", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "decoder_sparse_step", "moe_layer_freq"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "block_size", "model_max_length"), 512),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 16),
    **dict.fromkeys(("index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_d_state", "mamba_d_head", "mamba_head_dim", "a_low_rank_dim", "v_low_rank_dim"), 16),
    **dict.fromkeys(("gate_low_rank_dim", "decay_low_rank_dim", "time_step_rank"), 16),
    **dict.fromkeys(("linear_num_value_heads", "mamba_num_heads", "mamba_n_heads"), 8),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 4),
    **dict.fromkeys(("linear_conv_kernel_dim", "conv_kernel", "conv1d_width", "mamba_d_conv", "conv_L_cache"), 4),
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "post_norm_eps"), 1e-5),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "swa_rope_theta", "rotary_emb_base"), 10000.0),
    **dict.fromkeys(("logits_scaling", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "scale_emb"), 1.0),
    **dict.fromkeys(("routed_scaling_factor", "scale_depth"), 1.0),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "conv_bias", "use_qkv_bias", "mamba_proj_bias", "use_cla"), False),
    **dict.fromkeys(("tie_word_embeddings", "add_swa_attention_sink_bias", "add_full_attention_sink_bias"), False),
    **dict.fromkeys(("use_conv_bias", "norm_topk_prob", "use_qk_norm", "qk_norm", "post_norm", "mamba_conv_bias"), True),
    **dict.fromkeys(("mla_scale_q_lora", "mla_scale_kv_lora", "use_expert_bias", "use_mixed_mlp_moe"), True),
    "partial_rotary_factor": 0.5,
    "final_logit_softcapping": 30.0,
    "index_topk": 8,
    "full_attention_interval": 2,
    "layer_group_size": 2,
    "mlp_only_layers": [],
    "layer_types": ["sliding_attention", "full_attention"],
}

# What the names above do not cover.
SPECIAL: dict[str, dict[str, Any]] = {}

# A language model inside a multimodal one.
NESTED: dict[str, str] = {}

# Architectures that cannot be built here, and why.
UNBUILT = {"olmo": "cannot be built: mlx-lm's module needs the package ai2-olmo"}

# Modules of mlx_lm.models that are no architecture.
PARTS = frozenset(
    ("activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline", "rope_utils", "ssm", "switch_layers")
)


def architectures() -> list[str]:
    """Names of the modules of mlx_lm.models that hold a model."""
    import mlx_lm.models

    return sorted({module.name for module in iter_modules(mlx_lm.models.__path__)} - PARTS, key=str.lower)


def small_config(name: str) -> dict[str, Any]:
    """What config.json of a small model would hold."""
    if name in NESTED:
        return {"model_type": name, "vocab_size": VOCABULARY, "text_config": small_config(NESTED[name])}
    return {"model_type": name, **SMALL, **SPECIAL.get(name, {})}


def build(name: str, seed: int = 0) -> nn.Module:
    """A small float32 model with random weights, the same for the same seed."""
    mx.random.seed(seed)
    module = import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(small_config(name)))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model
