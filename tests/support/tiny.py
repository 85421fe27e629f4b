"""Small random models, tokenizers and batches, and what tests compare about them."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import orjson
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import gemma2, llama, qwen3_moe
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxlora.batch import Batch
from mlxlora.data.tokenize import Example
from mlxlora.models.logprobs import Scorer, scorer
from mlxlora.objectives.objective import Objective
from mlxlora.training.step import columns_of

VOCABULARY = 96
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY}
LLAMA = _SIZES | {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LLAMA |= {"tie_word_embeddings": False}
GEMMA2 = _SIZES | {"model_type": "gemma2", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
GEMMA2 |= {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16.0}
MOE = LLAMA | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
MOE |= {
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
}


def dense(**changes: Any) -> nn.Module:
    """A llama with a head of its own."""
    return _random(llama.Model(llama.ModelArgs.from_dict(LLAMA | changes)))


def tied() -> nn.Module:
    """A llama whose head is its embedding."""
    return dense(tie_word_embeddings=True)


def softcapped() -> nn.Module:
    """A gemma2: tied, and its logits pass through a tanh."""
    return _random(gemma2.Model(gemma2.ModelArgs.from_dict(GEMMA2)))


def experts() -> nn.Module:
    """A qwen3 whose feed-forward layers are mixtures of experts."""
    return _random(qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(MOE)))


def quantized(make: Callable[[], nn.Module] = dense) -> nn.Module:
    """Four bits a weight, the head and the embedding too."""
    model = make()
    nn.quantize(model, group_size=32, bits=4)
    return model


def _random(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make the logits differ: a default model is almost uniform."""
    rng = np.random.default_rng(seed)
    leaves = tree_flatten(model.parameters())
    model.load_weights([(name, _values(rng, leaf)) for name, leaf in leaves])
    mx.eval(model.parameters())
    return model


def _values(rng: np.random.Generator, leaf: mx.array) -> mx.array:
    if leaf.ndim == 1:
        return mx.array(rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32))
    return mx.array((rng.standard_normal(leaf.shape) * 1.5 / np.sqrt(leaf.shape[-1])).astype(np.float32))


def shaken(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Adds noise to what is trainable, so that the update of an adapter is not 0."""
    rng = np.random.default_rng(1)
    model.update(
        tree_map(lambda p: p + scale * mx.array(rng.standard_normal(p.shape).astype(np.float32)), model.trainable_parameters())
    )
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end of sequence."""
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")


def example(seed: int, *, train_prompt: bool = False, reference: bool = False, longest: int = 40) -> Example:
    """A random row: a prompt of a few tokens and a completion."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(6, longest))
    start = int(rng.integers(2, length - 2))
    completion = np.arange(length) >= start
    loss_mask = np.arange(length) > 0 if train_prompt else completion
    prompt = loss_mask & ~completion if train_prompt else None
    tokens = rng.integers(1, VOCABULARY, length).astype(np.int32)
    ref_logps = -rng.exponential(2.0, int(loss_mask.sum())).astype(np.float32) if reference else None
    return Example(tokens, loss_mask, prompt, f"rows.jsonl:{seed + 1}", ref_logps=ref_logps)


def loss_and_gradient(model: nn.Module, objective: Objective, batch: Batch, score: Scorer | None = None) -> tuple[dict, dict]:
    """Metrics as numbers and the gradient by name of the parameter."""
    score = score or scorer(model, columns=columns_of(objective))

    def loss(parameters: Any) -> tuple[mx.array, dict]:
        model.update(parameters)
        return objective(*score(batch))

    before = model.trainable_parameters()
    (_, metrics), gradient = mx.value_and_grad(loss)(before)
    mx.eval(metrics, gradient)
    model.update(before)
    return numbers(metrics), dict(tree_flatten(gradient))


def numbers(metrics: dict[str, mx.array]) -> dict[str, float]:
    """Metrics as Python numbers."""
    return {name: value.item() for name, value in metrics.items()}


def snapshot(tree: Any) -> dict[str, np.ndarray]:
    """Arrays of a tree by name, copied."""
    return {name: np.array(leaf.astype(mx.float32)) for name, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two snapshots hold the same numbers, bit for bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def distance(a: dict[str, mx.array], b: dict[str, mx.array]) -> float:
    """Relative distance of two gradients (or weights) by name: ‖a - b‖ / ‖b‖."""
    assert a.keys() == b.keys()
    square = [(np.square(np.array(a[k]) - np.array(b[k])).sum(), np.square(np.array(b[k])).sum()) for k in b]
    difference, size = map(sum, zip(*square, strict=True))
    return float(np.sqrt(difference / max(size, 1e-30)))


def text_rows(folder: Path, *, longest: int, **counts: int) -> Path:
    """Prompts and completions of up to so many triples of letters, `text_rows(folder, longest=6, train=17, valid=5)`."""
    rng = random.Random(0)
    for split, count in counts.items():
        texts = [{"prompt": "abc" * rng.randint(1, longest), "completion": "xyz" * rng.randint(1, longest)} for _ in range(count)]
        (folder / f"{split}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, texts)))
    return folder
