"""Log-probabilities of sampled tokens at real vocabularies: against float64, and against those that training computes."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama

from mlxlora.data.batching import collate
from mlxlora.data.tokenize import Example
from mlxlora.models.logprobs import scorer
from mlxlora.rollouts.engine import Decoding, sample
from mlxlora.rollouts.sampling import Sampling, draw_tokens, sums_after, uniforms
from tests.support import tiny

SIZES = [49_152, 50_257, 151_936, 262_144]  # SmolLM2, GPT-2 (its blocks are not of 512), Qwen3, Gemma 3
LAW = 1e-6


def logits(size: int, spread: float, rows: int = 4) -> mx.array:
    return mx.array((spread * np.random.default_rng(size).standard_normal((rows, size))).astype(np.float32))


def exact(z: np.ndarray) -> np.ndarray:
    """[R, V] log-probabilities in float64."""
    wide = z.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.9}, {"repetition_penalty": 1.3}],
    ids=["plain", "temperature", "greedy", "nucleus", "penalty"],
)
def test_sampled_log_probabilities(size: int, spread: float, options: dict[str, float]) -> None:
    """Law: log π of a drawn token differs from float64 by at most 1e-6·max(1, |log π|)."""
    z, sampling = logits(size, spread), Sampling(**options)  # type: ignore[arg-type]
    seen = mx.arange(size)[None] % 7 == mx.arange(4)[:, None] if "repetition_penalty" in options else None
    tokens, logps = draw_tokens(z, sampling, uniforms(mx.random.split(mx.random.key(0), 4), 1)[:, 0], seen)
    scaled = z / sampling.temperature if sampling.temperature else z
    expected = np.take_along_axis(exact(np.array(scaled)), np.array(tokens)[:, None], axis=-1)[:, 0]
    assert (np.abs(np.array(logps) - expected) <= LAW * np.maximum(1, np.abs(expected))).all()


@pytest.mark.parametrize("size", [49_152, 151_936, 262_144])
def test_sampled_and_recomputed_agree(size: int) -> None:
    """Law: training's log π of sampled tokens differs from that of sampling by at most 1e-6·max(1, |log π|)."""
    config = tiny.LLAMA | {"vocab_size": size, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = llama.Model(llama.ModelArgs.from_dict(config | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}))
    prompt = [5, 3, 9]
    ((one, two),) = sample(model, [prompt], Decoding(Sampling(max_tokens=6), {2}, group_size=2), key=mx.random.key(1))
    examples = []
    for completion in (one, two):
        tokens = np.array([*prompt, *completion.tokens], np.int32)
        examples.append(Example(tokens, np.arange(len(tokens)) >= len(prompt), None, "d:1"))
    again = np.array(scorer(model)(collate(examples), gradient=False)[0])
    sampled = np.concatenate([one.logps, two.logps])
    assert (np.abs(again[: len(sampled)] - sampled) <= LAW * np.maximum(1, np.abs(sampled))).all()


@pytest.mark.parametrize("size", [1, 511, 512, 513, *SIZES])
def test_masses_of_a_nucleus(size: int) -> None:
    masses = np.exp(exact(np.array(logits(size, 0.01, rows=2)))).astype(np.float32)
    expected = masses.astype(np.float64)[:, ::-1].cumsum(axis=-1)[:, ::-1] - masses
    assert np.abs(np.array(sums_after(mx.array(masses))) - expected).max() <= LAW
