"""NEFTune: what the noise is, where it goes, and that everything else stays as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import orjson
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gpt2

from mlxlora.adapters.prepare import prepare
from mlxlora.config.options import AdapterOptions
from mlxlora.errors import InputError
from mlxlora.models.backbone import find_split
from mlxlora.models.logprobs import scorer
from mlxlora.models.modes import evaluating
from mlxlora.models.neftune import magnitude, noisy
from mlxlora.objectives.supervised import sft
from tests.support.tiny import dense, loss_and_gradient, quantized, softcapped, tied

ALPHA = 5.0
TOKENS = mx.array([[3, 9, 2, 7, 1], [4, 8, 0, 0, 0]])
MODELS: dict[str, Callable[[], nn.Module]] = {"dense": dense, "tied": tied, "quantized": quantized, "softcapped": softcapped}
every = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def embedding(model: Any) -> Any:
    return model.model.embed_tokens


@every
def test_noise_is_uniform_and_of_the_papers_size(make: Callable[[], nn.Module]) -> None:
    model = make()
    clean = embedding(model)(TOKENS)
    noise = np.array((embedding(noisy(model, ALPHA).train())(TOKENS) - clean).astype(mx.float32))
    for row, length in zip(noise, (5, 2), strict=True):
        bound = ALPHA / np.sqrt(length * 64)
        assert np.abs(row).max() <= bound * 1.001 and np.abs(row).max() > 0.95 * bound
        np.testing.assert_allclose(row.std(), bound / np.sqrt(3), rtol=0.15)


@every
def test_evaluation_and_the_head_are_clean(make: Callable[[], nn.Module]) -> None:
    model = make()
    logits = model(TOKENS)
    noisy(model, ALPHA).train()
    assert not mx.allclose(model(TOKENS), logits).item()
    with evaluating(model):
        np.testing.assert_array_equal(model(TOKENS), logits)
        assert find_split(model) is not None


def test_other_models_and_names_of_parameters_stay() -> None:
    model, other = dense(), dense()
    names = [name for name, _ in tree_flatten(model.parameters())]
    noisy(model, ALPHA).train()
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert type(embedding(other)) is nn.Embedding and type(embedding(model)).__name__ == "Embedding"


def test_positions_get_none() -> None:
    """GPT-2 embeds tokens and positions."""
    model = gpt2.Model(gpt2.ModelArgs("gpt2", 64, 64, 4, 2, 64, 1e-5, 96))
    noisy(model, ALPHA)
    assert type(model.model.wte) is not nn.Embedding and type(model.model.wpe) is nn.Embedding


def test_adapted_embeddings_get_it_once() -> None:
    model = prepare(dense(), AdapterOptions(lora_keys=("model.embed_tokens", "self_attn.q_proj"), num_layers=-1))
    clean = embedding(model)(TOKENS)
    noise = np.array(embedding(noisy(model, ALPHA).train())(TOKENS) - clean)
    assert 0 < np.abs(noise[0]).max() <= ALPHA / np.sqrt(5 * 64)


def test_a_model_without_embedding_is_refused() -> None:
    class Bare(nn.Module):
        def __call__(self, tokens: mx.array) -> mx.array:
            return tokens[..., None] * mx.ones((4,))

    with pytest.raises(InputError, match="--neftune-noise-alpha: this model has no token embedding"):
        noisy(Bare(), ALPHA)


def test_padding_does_not_change_the_size() -> None:
    longer = mx.pad(TOKENS, [(0, 0), (0, 11)])
    np.testing.assert_array_equal(magnitude(longer, 64, ALPHA), magnitude(TOKENS, 64, ALPHA))


def test_a_key_is_a_loss_and_a_gradient() -> None:
    from mlxlora.data.batching import collate
    from tests.support.tiny import example

    model = prepare(dense(), AdapterOptions(num_layers=-1))
    noisy(model, ALPHA).train()
    batch, score = collate([example(0), example(1)]), scorer(model)

    def at(seed: int) -> float:
        mx.random.seed(seed)
        return loss_and_gradient(model, sft(), batch, score)[0]["nll"]

    assert at(0) == at(0) != at(1)


@pytest.mark.parametrize("extra", [(), ("--grad-checkpoint",)], ids=["plain", "gradient checkpointing"])
def test_resumed(extra: tuple, model_folder: Path, tmp_path: Path, mlxlora: Any) -> None:
    rows = [{"prompt": "abc" * n, "completion": "xyz" * (n % 3 + 1)} for n in range(1, 8)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    command = ("sft", "--model", model_folder, "--data", tmp_path / "rows.jsonl", "--num-layers", -1, "--batch-size", 2, *extra)
    command += ("--steps-per-report", 1, "--save-every", 3, "--learning-rate", 1e-3, "--neftune-noise-alpha")

    def losses(name: str) -> list[float]:
        return [orjson.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_bytes().splitlines()]

    assert mlxlora(*command, 0, "--iters", 8, "--adapter-path", tmp_path / "clean").code == 0
    assert mlxlora(*command, 20, "--iters", 8, "--adapter-path", tmp_path / "whole").code == 0
    assert mlxlora(*command, 20, "--iters", 5, "--adapter-path", tmp_path / "stopped").code == 0
    assert mlxlora(*command, 20, "--iters", 8, "--adapter-path", tmp_path / "stopped", "--resume").code == 0
    assert losses("stopped") == losses("whole") != losses("clean")
