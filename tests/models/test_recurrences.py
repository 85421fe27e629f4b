"""Models with layers of the gated delta rule: chunks give the loss and gradients of mlx-lm's loop, in every layout of rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson
import pytest

from benchmarks.small import build, small_config
from mlxlora.data.batching import collate
from mlxlora.models import recurrences
from mlxlora.models.grad_checkpoint import checkpointed
from mlxlora.models.initialize import init_model
from mlxlora.models.modes import freeze
from mlxlora.models.recurrences import DeltaShape, delta_layers, hook_recurrences, kernel_obstacle, recurrence_by, recurrence_told
from mlxlora.models.row_layouts import layout_obstacle, packed_layout, shared_layout
from mlxlora.models.scans import diagonal, in_pieces
from mlxlora.objectives.supervised import sft
from mlxlora.utils.patches import restore
from tests.support.tiny import byte_tokenizer, distance, example, loss_and_gradient, text_rows

NAMES = ("qwen3_5", "qwen3_next", "olmo_hybrid", "kimi_linear", "kimi_k3", "bailing_moe_v3", "qwen3_5_moe")
SCANS = ("mamba", "jamba", "recurrent_gemma", "bailing_moe_linear", "rwkv7")
EXACT = 1e-5
eager = pytest.mark.usefixtures("eager")


@eager
@pytest.mark.parametrize("name", NAMES)
def test_models_compute_the_same(name: str) -> None:
    """Loss and every gradient, kept and recomputed; afterwards the model is what it was."""
    batch, model = collate([example(seed, longest=90) for seed in range(2)]), build(name).train()
    with recurrence_by("loop"):
        exact = loss_and_gradient(model, sft(), batch)
    for change in (lambda m: m, checkpointed):
        found = loss_and_gradient(change(model), sft(), batch)
        assert found[0] == pytest.approx(exact[0], rel=EXACT)
        assert distance(found[1], exact[1]) < EXACT
    assert all(type(layer).__module__ == type(delta_layers(model)[0]).__module__ for layer in delta_layers(model))
    classes = [type(layer) for layer in delta_layers(restore(model))]
    assert classes == [cls for cls in classes if cls.__call__.__module__.startswith("mlx_lm")]


@eager
@pytest.mark.parametrize("name", SCANS)
def test_other_recurrences_compute_the_same(name: str) -> None:
    """In pieces of 32 to 128 tokens; rows of up to 150."""
    batch, model = collate([example(seed, longest=150) for seed in range(2)]), freeze(build(name)).unfreeze().train()
    with recurrence_by("loop"):
        exact = loss_and_gradient(model, sft(), batch)
        assert "one token after the other" in str(recurrence_told(model))
    assert "in pieces of the row" in str(recurrence_told(model))
    for change in (lambda m: m, checkpointed, restore):
        found = loss_and_gradient(change(model), sft(), batch)
        assert found[0] == pytest.approx(exact[0], rel=EXACT)
        assert distance(found[1], exact[1]) < EXACT


@pytest.mark.parametrize(("length", "piece"), [(1, 8), (37, 8), (64, 64), (70, 128)])
def test_a_diagonal_scan_is_the_recurrence(length: int, piece: int) -> None:
    rng = np.random.default_rng(length)
    decays, inputs, state = (mx.array(rng.uniform(0, 1, s).astype(np.float32)) for s in ((2, length, 3), (2, length, 3), (2, 3)))

    def loop(state: mx.array, decays: mx.array, inputs: mx.array) -> list[mx.array]:
        outputs = []
        for t in range(length):
            state = decays[:, t] * state + inputs[:, t]
            outputs.append(state)
        return [mx.stack(outputs, axis=1), state]

    def ours(state: mx.array, decays: mx.array, inputs: mx.array) -> list[mx.array]:
        return list(in_pieces(diagonal, state, [decays, inputs], piece=piece))

    results = []
    for run in (ours, loop):
        cotangents = [mx.random.normal(a.shape, key=mx.random.key(3)) for a in (inputs, state)]
        out, gradients = mx.vjp(run, [state, decays, inputs], cotangents)
        results.append([*out, *gradients])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=EXACT)


@eager
@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_and_shared_prompts(name: str) -> None:
    """olmo_hybrid keeps the last inputs of its convolutions, padding included, so prompts of several lengths are refused."""
    model = build(name).train()
    model(mx.zeros((1, 2), mx.int32))  # kimi_k3 keeps products of weights from its first call
    assert layout_obstacle(model, model, packed_layout) is None
    told = layout_obstacle(model, model, shared_layout)
    assert (told is None) == (name != "olmo_hybrid"), told


@eager
def test_a_step_is_chunked_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = build("qwen3_5").train(), []
    chunked = recurrences.chunked_delta_rule
    monkeypatch.setattr(recurrences, "chunked_delta_rule", lambda rule: taken.append(rule.keys.shape) or chunked(rule))
    tokens = mx.zeros((1, 5), mx.int32)
    assert hook_recurrences(model) == hook_recurrences(model) == 1
    with recurrence_by("loop"):
        model(tokens)
    assert not taken
    model(tokens)
    model(tokens[:, :1])  # one token of a rollout
    assert taken == [(1, 5, 4, 16)]


def test_a_run_is_told_what_it_does() -> None:
    model = build("qwen3_5")
    assert "1 layers of the gated delta rule compute in chunks of 64" in str(recurrence_told(model))
    with recurrence_by("loop"):
        assert "one token after the other" in str(recurrence_told(model))
    assert recurrence_told(build("llama")) is None


# --- MLX's kernel: here its function is a loop, which stands in for Metal's ------------------------------


@eager
def test_the_kernel_is_verified_by_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = DeltaShape(16, 128, 16, 128, mx.float32, False)
    assert kernel_obstacle(shape, 20) is None
    assert "none for 2 and 4 heads" in str(kernel_obstacle(shape._replace(groups=2, heads=4)))  # would be a loop
    assert "channel" in str(kernel_obstacle(shape._replace(by_channel=True)))
    right = mx.fast.gated_delta_update

    def wrong(q: mx.array, *rest: Any) -> Any:
        return right(mx.stop_gradient(q), *rest)

    def fails(*_: Any) -> Any:
        raise ValueError("[gated_delta_update] no such head")

    monkeypatch.setattr(mx.fast, "gated_delta_update", wrong)
    assert "differ" in str(kernel_obstacle(shape, 20))
    monkeypatch.setattr(mx.fast, "gated_delta_update", fails)
    assert "no such head" in str(kernel_obstacle(shape, 20))


@eager
@pytest.mark.parametrize("equal", [True, False])
def test_the_kernel_is_used_where_it_proved_equal(equal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrences, "backend", lambda: "metal")
    monkeypatch.setattr(recurrences, "_kernel", {})
    monkeypatch.setattr(recurrences, "kernel_obstacle", lambda _: None if equal else "its results differ by 1.0e+00")
    batch, model = collate([example(0)]), build("qwen3_5").train()
    with recurrence_by("loop"):
        exact = loss_and_gradient(model, sft(), batch)
    called: list[int] = []
    right = mx.fast.gated_delta_update
    monkeypatch.setattr(mx.fast, "gated_delta_update", lambda *a: called.append(1) or right(*a))
    found = loss_and_gradient(model, sft(), batch)
    assert bool(called) == equal
    assert ("MLX's kernel (" if equal else "not used: its results differ") in str(recurrence_told(model))
    assert found[0] == pytest.approx(exact[0], rel=EXACT) and distance(found[1], exact[1]) < EXACT


# --- whole runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3.5 and a byte-level tokenizer, as files."""
    folder = tmp_path_factory.mktemp("qwen3_5")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    config = small_config("qwen3_5")
    config["vocab_size"] = config["text_config"]["vocab_size"] = 288
    (folder / "config.json").write_bytes(orjson.dumps(config))
    init_model(folder / "config.json", folder / "tokenizer", folder / "model", 0, "float32")
    return folder / "model"


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


@eager
def test_sft_learns_the_same_in_chunks(qwen: Path, tmp_path: Path, mlxlora: Callable[..., Any]) -> None:
    data = text_rows(tmp_path, longest=20, train=8)
    curves = {}
    for choice in ("loop", "auto"):
        run = ("sft", "--model", qwen, "--data", data, "--iters", 3, "--steps-per-report", 1, "--learning-rate", 1e-2)
        done = mlxlora(*run, "--adapter-path", tmp_path / choice, "--recurrence", choice)
        assert done.code == 0, done.err
        assert ("in chunks of 64 tokens" if choice == "auto" else "one token after the other") in done.out
        curves[choice] = losses(tmp_path / choice)
    assert len(curves["auto"]) == 3
    np.testing.assert_allclose(curves["auto"], curves["loop"], rtol=EXACT)


@eager
def test_packed_and_shared_runs(qwen: Path, tmp_path: Path, mlxlora: Callable[..., Any]) -> None:
    data, run = text_rows(tmp_path, longest=8, train=8), ("--iters", 1, "--steps-per-report", 1)
    done = mlxlora(
        "sft", "--model", qwen, "--data", data, *run, "--packing", "--batch-size", 1, "--adapter-path", tmp_path / "packed"
    )
    assert done.code == 0 and "8 examples in" in done.out
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    rows = [{"prompt": "abcd" * 8, "chosen": "ab" * n, "rejected": "xy" * n} for n in range(1, 9)]
    (pairs / "train.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    done = mlxlora("dpo", "--model", qwen, "--data", pairs, *run, "--adapter-path", tmp_path / "shared")
    assert done.code == 0 and "each prompt is computed once for all of its completions" in done.out
    questions = tmp_path / "questions"
    questions.mkdir()
    (questions / "train.jsonl").write_bytes(b"\n".join(orjson.dumps({"prompt": "ab" * n, "answer": "ba"}) for n in range(1, 5)))
    how = ("--group-size", 2, "--max-completion-length", 8, "--batch-size", 1, "--rewards", "length(max_length=8)")
    done = mlxlora("grpo", "--model", qwen, "--data", questions, *run, *how, "--adapter-path", tmp_path / "grpo")
    assert done.code == 0, done.err
