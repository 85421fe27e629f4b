"""Small configurations of the architectures of mlx-lm, for tests and benchmarks: two layers or four, random weights."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

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
    **dict.fromkeys(
        ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "post_norm_eps"), 1e-5
    ),
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

_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_ROPE_BY_LAYER = {"sliding_attention": dict(_ROPE), "full_attention": dict(_ROPE)}
_LLAMA_4_ROPE = {**_ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512}
_KDA = {"kda_layers": [1], "full_attn_layers": [2], "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4}
_YARN = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 512, "beta_fast": 32, "beta_slow": 1}
_BLOCK_SPARSE = {"blocksparse_block_size": 32, "blocksparse_num_local_blocks": 2, "blocksparse_vert_stride": 2}
_ATTENTION = {"n_heads_in_group": 2}
_NEMOTRON_BLOCK = {"attention": _ATTENTION, "ffn": {"ffn_mult": 2.0}}

# What the names above do not cover.
SPECIAL: dict[str, dict[str, Any]] = {
    "afm7": {"num_layers": 4, "num_kv_reuse_layers": 2},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {"group_norm_size": 2, "num_key_value_heads": 4},
    "bailing_moe_linear": {"group_norm_size": 2, "num_key_value_heads": 4},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "topk_method": "greedy"},
    "deepseek_v41": {"compress_ratios": [0, 0], "o_groups": 2},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 16,
    },
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_parameters": dict(_ROPE)},
    "gpt_neox": {"rotary_pct": 0.5},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan": {"cla_share_factor": 2, "rope_scaling": {"alpha": 1.0, "type": "dynamic", "factor": 1.0}},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
    },
    "kimi_k3_text": {"linear_attn_config": _KDA, "attn_res_block_size": 1},
    "kimi_linear": {"linear_attn_config": _KDA},
    "lfm2": {"block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "block_dim": 64},
    "llama4_inner": {
        "num_hidden_layers": 4,
        "attention_chunk_size": 16,
        "interleave_moe_layer_step": 2,
        "rope_scaling": None,
        "num_experts_per_tok": 1,
    },
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity", "zero_expert_num": 2},
    "longcat_flash_ngram": {"zero_expert_num": 2},
    "mamba2": {"time_step_limit": [0.001, 100.0]},
    "mellum": {"rope_parameters": _ROPE_BY_LAYER},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "minicpm3": {"rope_scaling": {"original_max_position_embeddings": 512}},
    "minimax_m3_text": {"moe_layer_freq": [0, 1]},
    "ministral3": {"rope_parameters": _LLAMA_4_ROPE},
    "mistral4": {"rope_parameters": _LLAMA_4_ROPE},
    "muse_spark_text": {
        "rope_parameters": dict(_ROPE),
        "layer_rope_theta": [10000.0, 0.0],
        "output_multiplier": 1.0,
        "num_shared_experts": 0,
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"block_configs": [_NEMOTRON_BLOCK, _NEMOTRON_BLOCK]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "moe"]},
    "olmo_hybrid": {"linear_allow_neg_eigval": True, "layer_types": ["linear_attention", "full_attention"]},
    "openelm": {"num_query_heads": [4, 4], "num_kv_heads": [2, 2], "ffn_dim_divisor": 16, "ffn_multipliers": [1.0, 2.0]},
    "phi3small": {"vocab_size": 100352, "dense_attention_every_n_layers": 2, "gegelu_limit": 20.0, **_BLOCK_SPARSE},
    "plamo": {"n_shared_head": 2},
    "prism_hadamard_qwen35": {
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": "model.layers.0.mlp.down_proj", "embedding": False, "dtype": "float16", "block": 512}],
    },
    "prism_text": {"hidden_size": 128, "intermediate_size": 512, "num_experts": 0},
    "qwen3_5_text": {"num_experts": 0},
    "recurrent_gemma": {"logits_soft_cap": 30.0, "block_types": ["recurrent", "attention"]},
    "spark2_5": {"rope_parameters": _ROPE_BY_LAYER},
}

# A language model inside a multimodal one.
NESTED: dict[str, str] = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_k3": "kimi_k3_text",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "llama4": "llama4_inner",
    "minimax_m3_vl": "minimax_m3_text",
    "mistral3": "ministral3",
    "muse_spark": "muse_spark_text",
    "pixtral": "llama",
    "prism_hadamard_qwen35": "prism_text",
    "qwen2_vl": "qwen2",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}

# Modules that mlx-lm cannot adapt, and why: here, --lora-keys has to name the others.
UNADAPTED: dict[str, tuple[tuple[str, ...], str]] = {
    "afm7": (("qkv_proj",), "mlx-lm saves adapters of its fused layer and does not load them"),
    "prism_hadamard_qwen35": (("down_proj",), "mlx-lm has no LoRA for its packed layers"),
}

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
        outer = SPECIAL.get(name, {})
        return {"model_type": name, "vocab_size": VOCABULARY, "text_config": small_config(NESTED[name]), **outer}
    return {"model_type": name, **SMALL, **SPECIAL.get(name, {})}


def build(name: str, seed: int = 0) -> nn.Module:
    """A small float32 model with random weights, the same for the same seed.

    Weights that mlx-lm leaves at zero until they are loaded are random too: nothing could be learnt through them.
    """
    mx.random.seed(seed)
    module = import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(small_config(name)))
    model.set_dtype(mx.float32)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    zeros = {k: v for k, v in weights.items() if mx.issubdtype(v.dtype, mx.floating) and not v.any()}
    model.update(tree_unflatten([(name, 0.1 * mx.random.normal(value.shape)) for name, value in zeros.items()]))
    mx.eval(model.parameters())
    return model
