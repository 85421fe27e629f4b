"""Prompt sharing is a layout: losses, metrics and gradients are those of whole rows, for every objective on pairs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import orjson
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text, gpt_oss, mamba2, mixtral, phi3, qwen3

from mlxlora import AdapterOptions, prepare
from mlxlora.data.batching import bucket, collate, pair_batch, read_positions, shared_tokens
from mlxlora.data.tokenize import Example, Pair
from mlxlora.models import attention
from mlxlora.models.grad_checkpoint import checkpointed
from mlxlora.models.logprobs import scorer
from mlxlora.models.row_layouts import SHARING_PAYS_FROM, ContinuedCache, layout_obstacle, pays
from mlxlora.objectives.grpo import grpo
from mlxlora.objectives.objective import Objective
from mlxlora.objectives.preference import dpo, orpo
from mlxlora.training.step import columns_of, make_step
from tests.laws.test_objectives import OBJECTIVES
from tests.support.tiny import LLAMA, VOCABULARY, dense, distance, experts, loss_and_gradient, quantized, shaken, softcapped, tied

SMALL = LLAMA | {"max_position_embeddings": 512, "rope_theta": 1e4}
WINDOWED = {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16.0}
MANY = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _of(module: Any, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        mx.random.seed(0)
        name = module.__name__.rpartition(".")[2]
        model = module.Model(module.ModelArgs.from_dict(SMALL | {"model_type": name} | more))
        mx.eval(model.parameters())
        return model

    return make


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": dense,
    "tied": tied,
    "quantized": lambda: quantized(dense),
    "qwen3": _of(qwen3),
    "softcapped": softcapped,
    "experts": experts,
    "mixtral": _of(mixtral, **MANY),
    "phi3": _of(phi3),
    "windows": _of(gemma3_text, **WINDOWED),
    "sinks": _of(gpt_oss, **MANY, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
}
SHORT = ("--iters", 3, "--steps-per-report", 1, "--num-layers", -1)
ON_PAIRS = {name: o for name, o in OBJECTIVES.items() if name.startswith(("dpo", "cpo", "simpo", "alphapo", "orpo"))}
MAMBA = {"num_heads": 4, "head_dim": 16, "state_size": 16, "conv_kernel": 4, "n_groups": 1, "expand": 1, "chunk_size": 8}
MAMBA |= {"use_bias": False, "use_conv_bias": True, "residual_in_fp32": False, "rms_norm": True, "time_step_rank": 4}
MAMBA |= {
    "hidden_size": 64,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "layer_norm_epsilon": 1e-5,
    "time_step_limit": (0.0, 9.0),
}


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """LoRA on every layer, its update not 0; the same at every call."""
    mx.random.seed(0)
    return shaken(prepare(model, AdapterOptions(**({"num_layers": -1, "rank": 4, "scale": 2.0} | options))))


def pair(seed: int, *, prompt: int, longest: int = 12) -> Pair:
    """A random pair with reference log-probabilities; the completions may begin alike."""
    rng = np.random.default_rng(seed)
    start, same = rng.integers(1, VOCABULARY, prompt), rng.integers(1, VOCABULARY, int(rng.integers(0, 3)))
    return Pair(
        *(_example(rng, start, np.concatenate([same, rng.integers(1, VOCABULARY, rng.integers(1, longest))])) for _ in "cr")
    )


def _example(rng: np.random.Generator, prompt: np.ndarray, completion: np.ndarray) -> Example:
    tokens = np.concatenate([prompt, completion]).astype(np.int32)
    loss_mask = np.arange(len(tokens)) >= len(prompt)
    return Example(tokens, loss_mask, None, "rows.jsonl:1", ref_logps=-rng.exponential(3, len(completion)).astype(np.float32))


def pairs(seed: int = 0, count: int = 3) -> list[Pair]:
    """Prompts of very different lengths, one of a single token, some in other buckets."""
    return [pair(seed + i, prompt=prompt) for i, prompt in enumerate((20, 1, 37, 5, 2)[:count])]


def with_squares(items: Sequence[Pair], *, share: bool) -> Any:
    """A batch of pairs with every column that an objective may read."""
    batch = pair_batch(items, share=share).batch
    return batch._replace(log_sum_sq_probs=-mx.abs(batch.ref_logps))


def assert_same(model: nn.Module, objective: Objective, shared: Any, plain: Any, tolerance: float = 1e-5) -> None:
    """Every metric and the gradient."""
    score = scorer(model, columns=columns_of(objective))
    (metrics, gradient), (expected, wanted) = (loss_and_gradient(model, objective, b, score) for b in (shared, plain))
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    assert distance(gradient, wanted) < tolerance


# --- the law ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [pytest.param(o, id=name) for name, o in ON_PAIRS.items()])
def test_sharing_changes_no_objective(objective: Objective) -> None:
    assert_same(adapted(dense()), objective, with_squares(pairs(), share=True), with_squares(pairs(), share=False))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sharing_is_exact_for(name: str) -> None:
    model = adapted(ARCHITECTURES[name]())
    assert layout_obstacle(scorer(model).forward, model) is None
    shared, plain = (with_squares(pairs(), share=share) for share in (True, False))
    assert_same(model, dpo(), shared, plain, 5e-5 if name == "quantized" else 1e-5)


@pytest.mark.parametrize("name", ["llama", "windows", "experts"])
def test_sharing_is_exact_with_recomputed_blocks(name: str) -> None:
    plain = with_squares(pairs(), share=False)
    model = adapted(ARCHITECTURES[name]())
    before = loss_and_gradient(model, dpo(), plain)
    checkpointed(model)
    assert layout_obstacle(scorer(model).forward, model) is None
    after = loss_and_gradient(model, dpo(), with_squares(pairs(), share=True))
    assert after[0] == pytest.approx(before[0], rel=1e-5)
    assert distance(after[1], before[1]) < 1e-5


@pytest.mark.parametrize("kept", [1 << 30, 0], ids=["kept scores", "recomputed scores"])
@pytest.mark.parametrize("way", [lambda model: model, checkpointed], ids=["kept blocks", "recomputed blocks"])
def test_compiled_steps_are_exact(way: Any, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.KEPT_BYTES, "cpu", kept)
    monkeypatch.setitem(attention.SCORE_BYTES, "cpu", 0)
    models = []
    for share in (False, True):
        model = adapted(ARCHITECTURES["windows"]())
        model = way(model) if share else model
        make_step(model, optim.SGD(learning_rate=0.1), dpo())(with_squares(pairs(), share=share))
        models.append(dict(tree_flatten(model.trainable_parameters())))
    assert distance(*reversed(models)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "windows", "sinks"])
def test_prompts_are_neither_repeated_nor_masked_by_arrays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a mask array or a repeated prompt")

    model = adapted(ARCHITECTURES[name]())
    for function in ("_with_axes", "_repeated"):
        monkeypatch.setattr(f"mlxlora.models.row_layouts.{function}", never)
    scorer(model)(with_squares(pairs(), share=True))


@given(seed=st.integers(0, 999), count=st.integers(1, 5))
@settings(deadline=None, max_examples=6, derandomize=True)
def test_sharing_is_exact_for_any_lengths(seed: int, count: int) -> None:
    items = pairs(seed, count)
    assert_same(adapted(dense()), dpo(), with_squares(items, share=True), with_squares(items, share=False))


def test_all_weights_get_the_gradient_of_whole_rows() -> None:
    model = prepare(dense(), AdapterOptions(train_type="full", num_layers=-1))
    assert_same(model, orpo(), with_squares(pairs(), share=True), with_squares(pairs(), share=False))


def test_groups_of_completions_share_a_prompt() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCABULARY, n) for n in (17, 6)]
    examples = [_example(rng, p, rng.integers(1, VOCABULARY, rng.integers(2, 9))) for p in prompts for _ in range(4)]
    examples[5] = evolve(
        examples[5], loss_mask=np.zeros(len(examples[5].tokens), bool), ref_logps=np.zeros(0, np.float32)
    )  # masked
    advantages = mx.array(rng.standard_normal(8).astype(np.float32))
    shared = collate(examples, groups=[range(4), range(4, 8)], advantages=advantages)
    assert shared.prefix is not None and shared.prefix.shape[0] == 2
    assert_same(adapted(dense()), grpo(beta=0.1), shared, collate(examples, advantages=advantages))


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_pieces_of_shared_prompts_are_one_step(cut: int) -> None:
    items, models = pairs(count=5), []
    for batches in ([pair_batch(items)], [pair_batch(items[:cut], share=True), pair_batch(items[cut:], share=True)]):
        model = adapted(dense())
        make_step(model, optim.SGD(learning_rate=1.0), dpo())(*(micro.batch for micro in batches))
        models.append(dict(tree_flatten(model.trainable_parameters())))
    assert distance(*models) < 1e-6


def test_a_compiled_step_is_taken_for_each_shape_once() -> None:
    model = adapted(dense())
    step = make_step(model, optim.SGD(learning_rate=0.1), dpo())
    for seed in range(4):
        step(pair_batch([pair(seed, prompt=20 + seed)], share=True).batch)
    assert step.compilations == 1


def test_evaluation_reads_the_layout_too() -> None:
    model, items = adapted(dense()), pairs()
    score = scorer(model)
    logps = [np.array(score(pair_batch(items, share=share).batch, gradient=False)[0]) for share in (True, False)]
    np.testing.assert_allclose(*logps, atol=1e-4)


# --- the layout ---------------------------------------------------------------------------------


def test_shapes_are_on_the_ladder() -> None:
    batch = pair_batch(pairs(), share=True).batch
    assert batch.prefix is not None and batch.prefix_lengths is not None
    assert batch.prefix.shape == (3, bucket(37)) and batch.tokens.shape == (6, 32)
    assert (np.array(batch.prefix_lengths) <= [19, 0, 36]).all()


def test_the_token_that_predicts_the_first_scored_one_stays_in_the_row() -> None:
    rng = np.random.default_rng(0)
    a, b = (_example(rng, np.array([5, 6, 7]), np.array(tail)) for tail in ([8, 1], [8, 2]))
    assert shared_tokens([a, b]) == 2
    assert shared_tokens([a, _example(rng, np.array([5, 9, 7]), np.array([1]))]) == 1


def test_scored_prompts_are_not_shared() -> None:
    rng = np.random.default_rng(0)
    e = _example(rng, np.array([5, 6, 7]), np.array([8]))
    loss_mask = [evolve(e, loss_mask=np.arange(4) > 0)] * 2
    assert shared_tokens(loss_mask) == 0
    assert collate(loss_mask, groups=[(0, 1)]).prefix is None
    assert read_positions([loss_mask]) == (64, 64)


def test_the_estimate_counts_padding() -> None:
    short, long = pair(0, prompt=20), pair(0, prompt=200)
    assert read_positions([(short.chosen, short.rejected)]) == (64, 96)
    assert read_positions([(long.chosen, long.rejected)]) == (2 * bucket(200), bucket(199) + 64)


def test_a_window_reaches_back_into_the_prompt() -> None:
    cache = ContinuedCache((mx.zeros((1, 1, 4, 1)),) * 2, mx.array([3]), 1)
    mask = np.array(cache.make_mask(3, window_size=3))[0, 0].astype(int)
    np.testing.assert_array_equal(mask, [[0, 1, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]])


# --- whether to ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [_of(mamba2, **MAMBA)], ids=["mamba2"])
def test_models_that_cannot_share_are_found(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert layout_obstacle(model, model)
    assert model.training


def test_a_wrong_position_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(dense())
    monkeypatch.setattr(ContinuedCache, "offset", property(lambda _: 0, lambda *_: None), raising=False)
    assert layout_obstacle(model, model)


def test_it_pays_by_the_share_of_tokens_saved() -> None:
    for device, ratio in SHARING_PAYS_FROM.items():
        assert pays(int(1000 * ratio) + 1, 1000, device)
        assert not pays(int(1000 * ratio) - 10, 1000, device)
    assert not pays(100, 100)


def rows(folder: Path, prompt: str) -> Path:
    folder.mkdir()
    answers = [{"prompt": prompt + str(i), "chosen": " yes" * (i + 1), "rejected": " no"} for i in range(4)]
    (folder / "train.jsonl").write_bytes(b"\n".join(map(orjson.dumps, answers)))
    return folder


@pytest.mark.parametrize(
    ("prompt", "flags", "said"),
    [
        ("a long question " * 4, (), "once for all of its completions"),
        ("a", (), ""),
        ("a long question " * 4, ("--no-share-prompts",), ""),
        ("a", ("--share-prompts",), "once for all of its completions"),
    ],
    ids=["auto", "too short", "off", "on"],
)
def test_command_line(prompt: str, flags: tuple[str, ...], said: str, tmp_path: Path, model_folder: Path, mlxlora: Any) -> None:
    data = rows(tmp_path / "data", prompt)
    losses = {}
    for name, more in (("given", flags), ("plain", ("--no-share-prompts",))):
        arguments = ("--model", model_folder, "--data", data, *SHORT, "--adapter-path", tmp_path / name)
        outcome = mlxlora("cpo", *arguments, *more)
        assert outcome.code == 0, outcome.err
        lines = (tmp_path / name / "metrics.jsonl").read_bytes().splitlines()
        losses[name] = [orjson.loads(line)["loss"] for line in lines]
        assert ("once for all" in outcome.out + outcome.err) == (name == "given" and bool(said))
    np.testing.assert_allclose(losses["given"], losses["plain"], rtol=1e-4)


def test_the_fallback_is_told(tmp_path: Path, model_folder: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxlora.training.prepared.layout_obstacle", lambda *_: "its values differ by 1.0e+00")
    data = rows(tmp_path / "data", "a long question " * 4)
    outcome = mlxlora("cpo", "--model", model_folder, "--data", data, *SHORT, "--adapter-path", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "this model cannot share it (its values differ" in outcome.out + outcome.err
