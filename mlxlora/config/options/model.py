"""Options of the model and of what is trained in it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from attrs import validators as v

from ..fields import AllOrCount, Pattern, Start, group, option, python_option
from ..given import Model, PathOrName

Quantization = Literal["2", "3", "4", "5", "6", "8", "mxfp4", "mxfp8", "nvfp4"]
"""Bits, or a format; see `mlxlora.models.quantize`."""


@group("Model")
class BaseOptions:
    """Which model."""

    model: Model | None = option(None, "Model folder or hub name.")
    tokenizer: Any = python_option(None, "Tokenizer: one of mlx-lm or transformers, a folder or a hub name; default: the model's.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model or its tokenizer.")
    eos_token: Sequence[str] | None = option(
        None, "Tokens, or their ids, at which generation stops too, such as <|im_end|>; the model's own always count."
    )
    chat_template: PathOrName | None = option(None, "Jinja file of a chat template, in place of the model's.")
    chat_template_args: Mapping[str, Any] | None = option(
        None, 'Variables of the chat template, such as {"enable_thinking": false}; a row may have its own chat_template_kwargs.'
    )


@group("Model")
class ModelOptions(BaseOptions):
    """Which model, and in which format its weights are loaded."""

    quantize: Quantization | None = option(None, "Quantize the weights while loading, to bits or a format.")


@group("Adapter")
class AdapterOptions:
    """What is trained: adapters, or the weights themselves."""

    train_type: Literal["lora", "dora", "full"] = option("lora", "What is trained: low-rank adapters or the weights themselves.")
    num_layers: int | None = option(
        None,
        "Blocks to train, counted from the last; -1 = all (full: embeddings, norms and head too); default: at most 16.",
        AllOrCount(),
    )
    rank: int = option(8, "Rank of each update.", v.ge(1))
    scale: float = option(20.0, "Multiplier of the update (alpha / rank in other libraries).", v.gt(0))
    rslora: bool = option(
        False,
        "Rank-stabilized LoRA: multiply the update by alpha / sqrt(rank) with alpha = scale x rank, so by scale x sqrt(rank).",
    )
    rank_pattern: Sequence[str] | None = option(
        None, "Other ranks for some modules, such as q_proj=16,v_proj=4; alpha stays scale x rank, as in PEFT.", Pattern(int)
    )
    alpha_pattern: Sequence[str] | None = option(None, "Other alphas for some modules, such as q_proj=32.", Pattern(float))
    init_lora_weights: str = option(
        "default",
        "How adapters start: default (no update), pissa (principal components of the weights) or pissa_niter_N (an approximation "
        "of these in N iterations).",
        Start(),
    )
    dropout: float = option(0.0, "Dropout on the input of an update.", v.ge(0), v.lt(1))
    lora_keys: Sequence[str] | None = option(
        None,
        "Modules to adapt: paths in a block (self_attn.q_proj), last names (q_proj, embed_tokens, lm_head) or all-linear; "
        "default: all-linear.",
    )
    qat: Quantization | None = option(
        None, "Quantization-aware training: compute with weights rounded to this format, train the exact ones."
    )
    adapter_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "Type of stored adapters and optimizer state; adapters compute in the model's type, sums and losses in float32.",
    )
    resume_adapter_file: PathOrName | None = option(
        None, "Start from these weights (adapters.safetensors) with a new optimizer and from the first row."
    )
    adapter: Literal["continue", "fresh"] = python_option(
        "continue", "Of a model that an earlier run trained: continue its adapters, or take them off and start from the base."
    )
