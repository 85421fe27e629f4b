"""Packing is a layout: losses, metrics and gradients are those of plain rows; a model that cannot pack is told so."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models import gpt2, mamba2

from mlxlora import objectives
from mlxlora.data.batching import MicroBatch, bucket, collate
from mlxlora.data.packing import ROW, best_fit, packed_batch, row_length
from mlxlora.data.tokenize import Example
from mlxlora.models import attention
from mlxlora.models.grad_checkpoint import checkpointed
from mlxlora.models.logprobs import scorer
from mlxlora.models.row_layouts import layout_obstacle, mask_axes, packed_layout
from mlxlora.objectives.supervised import sft
from mlxlora.training.micro_batch import divide_batch
from mlxlora.training.step import make_step
from tests.models.test_attention import MODELS, adapted
from tests.models.test_row_layouts import MAMBA
from tests.support.tiny import LLAMA, VOCABULARY, dense, distance, loss_and_gradient, text_rows
from tests.support.tiny import example as random_example
from tests.training.test_resume import same_run, stop


def packs(seed: int = 0, count: int = 9, room: int = 64) -> list[tuple[Example, ...]]:
    examples = [random_example(100 * seed + s, train_prompt=True) for s in range(count)]
    return [tuple(examples[i] for i in row) for row in best_fit([len(e.tokens) - 1 for e in examples], room)]


def both(seed: int = 0) -> tuple[MicroBatch, Any]:
    """Packed, and the same examples as plain rows."""
    rows = packs(seed)
    return packed_batch(rows, 64), collate([example for row in rows for example in row])


# --- the law --------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["fused", "chunked"])
@pytest.mark.parametrize("name", MODELS)
def test_packing_is_exact_for(name: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.CHUNK, "cpu", 20)
    model, (packed, plain) = adapted(MODELS[name]()), both()
    assert layout_obstacle(scorer(model).forward, model, packed_layout) is None
    before = loss_and_gradient(model, sft(), plain)
    with attention.using(choice):
        after = loss_and_gradient(model, sft(), packed.batch)
    assert after[0] == pytest.approx(before[0], rel=1e-5)
    assert distance(after[1], before[1]) < 1e-5


@pytest.mark.parametrize("objective", [sft(), sft(loss_type="dft")], ids=["nll", "dft"])
@given(seed=st.integers(0, 99))
@settings(deadline=None, max_examples=4, derandomize=True)
def test_packing_is_exact_for_any_lengths(objective: Any, seed: int) -> None:
    model, (packed, plain) = adapted(dense()), both(seed)
    (after, gradient), (before, wanted) = (loss_and_gradient(model, objective, b) for b in (packed.batch, plain))
    assert after == pytest.approx(before, rel=1e-5)
    assert distance(gradient, wanted) < 1e-5


@pytest.mark.parametrize("choice", ["fused", "chunked"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_compiled_and_recomputed_steps(name: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.CHUNK, "cpu", 20)
    packed, plain = both()
    models = []
    for batch, way in ((plain, lambda m: m), (packed.batch, lambda m: m), (packed.batch, checkpointed)):
        model = way(adapted(MODELS[name]()))
        with attention.using(choice):
            make_step(model, optim.SGD(learning_rate=0.1), sft())(batch)
        models.append(dict(tree_flatten(model.trainable_parameters())))
    assert distance(models[1], models[0]) < 1e-5 and distance(models[2], models[0]) < 1e-5


def test_micro_batches_of_packed_rows_are_one_step() -> None:
    packed, plain = both()
    models = []
    for batches in ([plain], [part.batch for part in divide_batch(packed, 3)]):
        model = adapted(dense())
        make_step(model, optim.SGD(learning_rate=1.0), sft())(*batches)
        models.append(dict(tree_flatten(model.trainable_parameters())))
    assert len(divide_batch(packed, 3)) == 3 and distance(*models) < 1e-5


def test_a_neighbor_is_never_seen() -> None:
    """Other tokens in one example change no log-probability of another."""
    model, rows = adapted(dense()), packs()
    score = scorer(model)
    changed = random_example(999, train_prompt=True)
    first = packed_batch(rows, 64).batch
    other = packed_batch([(*rows[0][:-1], changed), *rows[1:]], 64 + len(changed.tokens)).batch
    last = len(rows[0]) - 1
    for s in (s for s in range(first.sequences) if s != last):
        a, b = (np.array(score(batch)[0])[np.array(batch.sequence) == s] for batch in (first, other))
        np.testing.assert_allclose(a, b, atol=2e-5)


# --- rows -----------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60), seed=st.none() | st.integers(0, 9))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_every_example_has_its_place(sizes: list[int], seed: int | None) -> None:
    rows = best_fit(sizes, 50, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(0 < sum(sizes[i] for i in row) <= 50 for row in rows)
    assert rows == best_fit(sizes, 50, seed)
    filled = sorted(sum(sizes[i] for i in row) for row in rows)
    assert len(rows) == 1 or filled[0] + filled[1] > 50, "two rows that fit into one"


def test_rows_are_full() -> None:
    sizes = np.exp(np.random.default_rng(0).normal(4.5, 0.6, 2000)).clip(8, 500).astype(int).tolist()
    assert sum(sizes) / (512 * len(best_fit(sizes, 512, 0))) > 0.97


def test_a_row_holds_the_longest_example_and_several_short_ones() -> None:
    short, long = (Example(np.ones(n, np.int32), np.ones(n, bool), None, "x") for n in (10, 400))
    assert row_length(len(short.tokens), 2048) == ROW
    assert row_length(len(short.tokens), 100) == bucket(99)
    assert row_length(len(long.tokens), 2048) == bucket(399)


def test_segments_are_numbered_and_padding_is_none() -> None:
    rows = packs()
    batch = packed_batch(rows, 64).batch
    assert batch.segments is not None and batch.tokens.shape == batch.segments.shape == (len(rows), 64)
    for row, segments in zip(rows, np.array(batch.segments), strict=True):
        assert [int((segments == n).sum()) for n in range(1, len(row) + 1)] == [len(e.tokens) - 1 for e in row]
        assert (segments[sum(len(e.tokens) - 1 for e in row) :] == 0).all()


# --- whether a model can --------------------------------------------------------------------------

LEARNED = {"model_type": "gpt2", "n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": VOCABULARY}
LEARNED |= {"layer_norm_epsilon": 1e-5}


def learned() -> nn.Module:
    mx.random.seed(0)
    return gpt2.Model(gpt2.ModelArgs.from_dict(LEARNED))


def recurrent() -> nn.Module:
    return mamba2.Model(mamba2.ModelArgs.from_dict(LLAMA | {"model_type": "mamba2"} | MAMBA))


@pytest.mark.parametrize(("make", "reason"), [(learned, "its values differ"), (recurrent, "more than keys and values")])
def test_models_that_cannot_pack_are_found(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    assert reason in str(layout_obstacle(model, model, packed_layout))


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_that_ignores_segments_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(MODELS[name]())
    assert mask_axes(model) in (0, 5)
    visible = attention.visible
    for module in ("models.attention", "models.row_layouts"):
        monkeypatch.setattr(f"mlxlora.{module}.visible", lambda q, k, window=None, segments=None: visible(q, k, window))
    monkeypatch.setattr("mlxlora.models.row_layouts.causal", lambda *a, segments, **k: attention.causal(*a, **k))
    assert "differ" in str(layout_obstacle(model, model, packed_layout))


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_rows(tmp_path_factory.mktemp("rows"), longest=12, train=40, valid=5)


@pytest.fixture
def command(model_folder: Path, rows: Path) -> tuple[Any, ...]:
    many = ("--steps-per-report", 1, "--steps-per-eval", 4, "--save-every", 3, "--val-batches", -1, "--num-layers", -1)
    return "sft", "--model", model_folder, "--data", rows, "--batch-size", 2, "--learning-rate", 1e-3, *many


def losses(folder: Path, split: str) -> list[float]:
    lines = map(orjson.loads, (folder / "metrics.jsonl").read_bytes().splitlines())
    return [line["loss"] for line in lines if line["split"] == split]


def test_a_packed_run_counts_rows(command: tuple[Any, ...], tmp_path: Path, mlxlora: Any) -> None:
    outcome = mlxlora(*command, "--packing", "--epochs", 2, "--adapter-path", tmp_path / "packed")
    assert outcome.code == 0, outcome.err
    said = outcome.out + outcome.err
    count = int(said.split("40 examples in ")[1].split()[0])
    assert 0 < count < 40 // 2
    assert len(losses(tmp_path / "packed", "train")) == 2 * -(-count // 2)
    plain = mlxlora(*command, "--iters", 1, "--adapter-path", tmp_path / "plain")
    assert plain.code == 0, plain.err
    np.testing.assert_allclose(losses(tmp_path / "packed", "valid")[0], losses(tmp_path / "plain", "valid")[0], rtol=1e-5)


def test_a_packed_run_resumes(command: tuple[Any, ...], tmp_path: Path, mlxlora: Any) -> None:
    command = (*command, "--packing", "--iters", 14, "--dropout", 0.3)
    assert mlxlora(*command, "--adapter-path", tmp_path / "whole").code == 0
    stopped = (*command, "--adapter-path", tmp_path / "stopped")
    assert stop(signal.SIGKILL, stopped, tmp_path / "stopped", 5, 0.01) == -signal.SIGKILL
    assert mlxlora(*stopped, "--resume").code == 0
    same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_model_that_cannot_trains_on_plain_rows(
    command: tuple[Any, ...], tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxlora.training.prepared.layout_obstacle", lambda *_: "its values differ by 1.0e+00")
    outcome = mlxlora(*command, "--packing", "--iters", 2, "--adapter-path", tmp_path / "told")
    assert outcome.code == 0, outcome.err
    assert "--packing: rows stay plain" in " ".join((outcome.out + outcome.err).split())
    assert mlxlora(*command, "--iters", 2, "--adapter-path", tmp_path / "plain").code == 0
    assert losses(tmp_path / "told", "train") == losses(tmp_path / "plain", "train")


def test_too_few_rows_are_told(command: tuple[Any, ...], tmp_path: Path, mlxlora: Any) -> None:
    outcome = mlxlora(*command, "--packing", "--batch-size", 39, "--iters", 2, "--adapter-path", tmp_path)
    assert outcome.code == 2
    assert "--batch-size 39 is larger than the training set of" in " ".join(outcome.err.split())


def test_objectives_with_a_reference_pack_too(rows: Path, tmp_path: Path, model_folder: Path) -> None:
    from mlx_lm.utils import load

    import mlxlora as ml

    model, tokenizer, *_ = load(str(model_folder))
    objective = objectives.sft() + 0.1 * ml.kl()
    data = ml.rows(str(rows), packing=True)
    training = ml.Training(iters=3, batch_size=2)
    assert ml.run(model, tokenizer, objective, data, training, adapter_path=str(tmp_path), quiet=True)["steps"] == 3
