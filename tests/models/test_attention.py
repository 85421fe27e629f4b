"""Attention in chunks is attention: outputs and gradients are those of MLX's function, for windows, segments, groups and sinks."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import gemma3_text, gpt_oss, qwen3

from mlxlora import AdapterOptions, prepare
from mlxlora.data.batching import collate
from mlxlora.models import attention
from mlxlora.models.attention import (
    Causal,
    Prompts,
    Scoring,
    attend,
    blockwise,
    causal,
    fused_backward,
    hook,
    in_chunks,
    using,
    visible,
)
from mlxlora.models.grad_checkpoint import checkpointed
from mlxlora.models.logprobs import scorer
from mlxlora.models.row_layouts import mask_axes, use_windows
from mlxlora.objectives.supervised import sft
from tests.support.tiny import LLAMA, VOCABULARY, dense, distance, loss_and_gradient, shaken, softcapped
from tests.support.tiny import example as random_example
from tests.support.warm import python

SMALL = LLAMA | {"max_position_embeddings": 512, "rope_theta": 1e4}
WINDOWED = {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def built(module: Any, **more: Any) -> nn.Module:
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(SMALL | {"model_type": module.__name__.rpartition(".")[2]} | more))
    mx.eval(model.parameters())
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": dense,
    "qwen3": lambda: built(qwen3),
    "gemma2": softcapped,
    "gemma3": lambda: built(gemma3_text, **WINDOWED),
    "sinks": lambda: built(gpt_oss, **EXPERTS, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
}


def arrays(rows: int, heads: int, kv_heads: int, length: int, dtype: mx.Dtype = mx.float32, width: int = 8) -> list[mx.array]:
    """Queries, keys, values, a gradient of the output, and sinks."""
    rng = np.random.default_rng(length)
    shapes = [(rows, n, length, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in (*shapes, (heads,))]


def parts(rows: int, length: int, seed: int = 0) -> mx.array:
    """[R, T] segments of random lengths."""
    return mx.array(np.sort(np.random.default_rng(seed).integers(0, 4, (rows, length)), axis=1).astype(np.int32))


def run(attend: Any, q: mx.array, k: mx.array, v: mx.array, gradient: mx.array, sinks: mx.array | None = None) -> list[mx.array]:
    """The output, and the gradients of queries, keys, values and sinks."""
    given = [q, k, v, *([] if sinks is None else [sinks])]
    outputs, gradients = mx.vjp(attend, given, [gradient])
    return [*outputs, *gradients]


def furthest(found: list[mx.array], exact: list[mx.array]) -> float:
    return max(float(np.abs(np.array(a.astype(mx.float32)) - np.array(b)).max()) for a, b in zip(found, exact, strict=True))


def by_array(length: int, window: int | None, segments: mx.array | None, scale: float = 0.3) -> Any:
    """MLX's function with a mask array."""
    mask = visible(range(length), range(length), window, segments)

    def run(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array | None = None) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)

    return run


def by_chunks(chunk: int, window: int | None, segments: mx.array | None, scale: float = 0.3) -> Any:
    def run(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array | None = None) -> mx.array:
        return blockwise(q, k, v, Scoring(scale, window, segments, sinks), chunk=chunk)

    return run


# --- the kernel -----------------------------------------------------------------------------------


@given(
    length=st.integers(1, 80),
    chunk=st.sampled_from((7, 16, 32, 100)),
    window=st.sampled_from((None, 1, 9, 200)),
    packed=st.booleans(),
    groups=st.sampled_from((1, 2, 4)),
    sunk=st.booleans(),
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_chunks_are_exact(length: int, chunk: int, window: int | None, packed: bool, groups: int, sunk: bool) -> None:
    *given, sinks = arrays(2, 4, 4 // groups, length)
    given += [sinks] if sunk else []
    segments = parts(2, length) if packed else None
    assert furthest(run(by_chunks(chunk, window, segments), *given), run(by_array(length, window, segments), *given)) < 1e-5


@pytest.mark.parametrize("window", [None, 9])
def test_compiled_is_eager(window: int | None) -> None:
    given, segments = arrays(2, 4, 2, 50), parts(2, 50)
    whole = lambda *a: run(by_chunks(16, window, segments), *a)  # noqa: E731
    assert furthest(mx.compile(whole)(*given), whole(*given)) < 1e-5


@pytest.mark.parametrize("window", [None, 40])
def test_bfloat16_is_as_exact_as_the_function(window: int | None) -> None:
    given = arrays(2, 4, 2, 200, mx.bfloat16)[:4]
    exact = run(by_array(200, window, None), *(array.astype(mx.float32) for array in given))
    errors = [furthest(run(way, *given), exact) for way in (by_chunks(64, window, None), by_array(200, window, None))]
    assert errors[0] <= 1.05 * errors[1]


@given(
    prompts=st.integers(1, 3),
    rows=st.integers(1, 3),
    prompt=st.integers(1, 20),
    length=st.integers(1, 20),
    window=st.sampled_from((None, 1, 6, 90)),
    chunk=st.sampled_from((None, 5, 64)),
    sunk=st.booleans(),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_rows_after_a_prompt_are_exact(
    prompts: int, rows: int, prompt: int, length: int, window: int | None, chunk: int | None, sunk: bool
) -> None:
    """Against whole rows, without padding between prompt and row, one at a time."""
    rng, each = np.random.default_rng(0), prompts * rows
    lengths = rng.integers(0, prompt + 1, prompts)
    before = [array[:prompts] for array in arrays(prompts, 4, 2, prompt)[1:3]]
    *given, sinks = arrays(each, 4, 2, length)
    q, k, v, g = given
    sink = sinks if sunk else None

    def one(q: mx.array, k: mx.array, v: mx.array, pk: mx.array, pv: mx.array, sinks: mx.array | None = None) -> mx.array:
        prompts = Prompts(pk, pv, mx.array(lengths.astype(np.int32)))
        return blockwise(q, k, v, Scoring(0.3, window, None, sinks), prompts, chunk)

    def whole(q: mx.array, k: mx.array, v: mx.array, pk: mx.array, pv: mx.array, sinks: mx.array | None = None) -> mx.array:
        done = []
        for r in range(each):
            u, n = r // rows, int(lengths[r // rows])
            keys = mx.concatenate([pk[u : u + 1, :, :n], k[r : r + 1]], axis=2)
            values = mx.concatenate([pv[u : u + 1, :, :n], v[r : r + 1]], axis=2)
            mask = visible(range(n, n + length), range(n + length), window)
            done.append(mx.fast.scaled_dot_product_attention(q[r : r + 1], keys, values, scale=0.3, mask=mask, sinks=sinks))
        return mx.concatenate(done)

    arguments = [q, k, v, *before, *([] if sink is None else [sink])]
    found, exact = ([*out, *gradients] for out, gradients in (mx.vjp(f, arguments, [g]) for f in (one, whole)))
    assert furthest(found, exact) < 1e-5


def test_nothing_of_the_scores_size_is_kept() -> None:
    """The backward pass of 1024 positions holds less than their scores, which the function keeps."""
    given = arrays(1, 4, 2, 1024, width=16)[:4]
    scores, peaks = 4 * 4 * 1024 * 1024, []
    for way in (by_chunks(64, None, None), by_array(1024, None, None)):
        mx.eval(run(way, *given))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(run(way, *given))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < scores < peaks[1]


# --- which way ------------------------------------------------------------------------------------


def test_the_choice_lasts_as_long_as_its_block() -> None:
    with using("chunked"):
        assert in_chunks(64, True)
        with pytest.raises(ZeroDivisionError), using("fused"):
            assert not in_chunks(10_000, False)
            raise ZeroDivisionError
        assert in_chunks(64, True)
    assert not in_chunks(64, True)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "metal"])
def test_auto_takes_the_fused_backward_where_there_is_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "backend", lambda: backend)
    assert in_chunks(8192, fused_backward(128, 128)) == (backend == "cpu")
    assert in_chunks(8192, False) and not in_chunks(32, False)


@pytest.mark.parametrize(("width", "sunk", "chunked"), [(128, False, False), (112, False, True), (128, True, True)])
def test_metal_chunks_heads_without_a_fused_backward(
    width: int, sunk: bool, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a causal row keeps [R, heads, T, T] scores there."""
    taken: list[str] = []
    monkeypatch.setattr(attention, "backend", lambda: "metal")
    monkeypatch.setattr(attention, "fused", lambda *_, **__: taken.append("fused"))
    monkeypatch.setattr(attention, "blockwise", lambda *_: taken.append("chunks"))
    q = mx.zeros((1, 2, 1024, width))
    causal(q, q, q, scale=1.0, sinks=mx.zeros(2) if sunk else None)
    assert taken == ["chunks" if chunked else "fused"]


def test_a_window_as_long_as_the_row_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    monkeypatch.setattr(attention, "fused", lambda *_, mask, **__: masks.append(mask))
    for window in (16, 15):
        causal(*arrays(1, 2, 2, 16)[:3], scale=1.0, window=window)
    assert masks[0] == "causal" and masks[1].shape == (1, 1, 16, 16)


def test_a_mask_that_is_no_array_still_says_causal() -> None:
    mask = Causal.within(7)
    assert mask == "causal" and isinstance(mask, str) and mask.window == 7


def test_only_rows_without_a_cache_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(attention, "causal", lambda *_, **__: taken.append("causal"))
    q, k, v = arrays(1, 2, 2, 8)[:3]
    attend(q, k, v, None, 1.0, "causal")
    assert attend(q, k, v, object(), 1.0, "causal").shape == attend(q, k, v, None, 1.0, None).shape == q.shape
    assert taken == ["causal"]


def test_the_benchmark_writes_its_rows(tmp_path: Path) -> None:
    file, root = tmp_path / "rows.json", Path(__file__).resolve().parents[2]
    command = [python(), "-m", "benchmarks.attention", "--quick", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    for row in json.loads(file.read_text()):
        assert row["case"] in done.stdout
        assert min(row["ours"], row["peer"], row["speed_ratio"], row["memory_ratio"]) > 0
        assert float(row["error"]) < 1e-5


# --- models ---------------------------------------------------------------------------------------


def adapted(model: nn.Module) -> nn.Module:
    mx.random.seed(0)
    return shaken(prepare(model, AdapterOptions(num_layers=-1, rank=4, scale=2.0)))


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same(name: str, checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.CHUNK, "cpu", 12)
    batch = collate([random_example(seed) for seed in range(4)])
    model = adapted(MODELS[name]())
    with using("fused"):
        before = loss_and_gradient(model, sft(), batch)
    assert use_windows(scorer(model).forward, model) == (name in ("gemma3", "sinks"))
    if checkpoint:
        checkpointed(model)
    with using("chunked"):
        after = loss_and_gradient(model, sft(), batch)
    assert after[0] == pytest.approx(before[0], rel=1e-5)
    assert distance(after[1], before[1]) < 1e-5


def test_models_are_asked_which_masks_they_take() -> None:
    assert {name: mask_axes(make()) for name, make in MODELS.items()} == {
        "llama": 0, "qwen3": 0, "gemma2": 5, "gemma3": 0, "sinks": 0,
    }  # fmt: skip


def test_asking_leaves_the_random_state_alone() -> None:
    model = prepare(dense(), AdapterOptions(num_layers=-1, dropout=0.5)).train()
    mx.random.seed(3)
    before = np.array(mx.random.state[0])
    assert mask_axes(model) == 0 and model.training
    np.testing.assert_array_equal(np.array(mx.random.state[0]), before)


def test_the_hook_is_put_in_once() -> None:
    model = dense()
    assert hook(model) == hook(model) == 1
    logits = model(mx.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, VOCABULARY)
