"""Distillation: divergences over the whole vocabulary, their gradients, and runs that approach a teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import orjson
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load

from mlxlora.adapters.prepare import prepare
from mlxlora.batch import Batch
from mlxlora.config.options import AdapterOptions
from mlxlora.data.batching import collate
from mlxlora.errors import InputError
from mlxlora.models.logprobs import scorer
from mlxlora.models.teacher import with_teacher
from mlxlora.objectives.divergences import DIVERGENCES
from mlxlora.objectives.supervised import distill
from tests.support.tiny import dense, distance, example, loss_and_gradient, quantized, snapshot, softcapped, tied

MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dense": (dense, "lora"),
    "tied, in full": (tied, "full"),
    "dense, in full": (dense, "full"),
    "quantized": (lambda: quantized(dense), "lora"),
    "softcapped": (softcapped, "dora"),
}


def other() -> nn.Module:
    """A teacher of another shape."""
    return dense(num_hidden_layers=1, hidden_size=32, head_dim=8, intermediate_size=64)


def trl(teacher: np.ndarray, student: np.ndarray, beta: float) -> np.ndarray:
    """`GKDTrainer.generalized_jsd_loss` of TRL 1.16 with its β: 0 is forward KL, 1 reverse KL, [n, V] logits to [n]."""
    q, p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (student.astype(np.float64), teacher.astype(np.float64)))
    if beta == 0:
        return (np.exp(p) * (p - q)).sum(-1)
    if beta == 1:
        return (np.exp(q) * (q - p)).sum(-1)
    m = np.log((1 - beta) * np.exp(q) + beta * np.exp(p))
    return beta * (np.exp(p) * (p - m)).sum(-1) + (1 - beta) * (np.exp(q) * (q - m)).sum(-1)


KINDS = [("forward_kl", 0.5, 0.0), ("reverse_kl", 0.5, 1.0), ("jsd", 0.5, 0.5), ("jsd", 0.1, 0.1)]


def direct(model: nn.Module, batch: Batch) -> np.ndarray:
    logits = model(batch.tokens).astype(mx.float32)
    return np.array(logits.reshape(-1, logits.shape[-1])[batch.positions])


@pytest.mark.parametrize(("name", "beta", "theirs"), KINDS)
def test_the_column_is_trls(name: str, beta: float, theirs: float) -> None:
    student, teacher = dense(), other()
    batch = collate([example(seed) for seed in range(3)])
    logps, seen = with_teacher(scorer(student), teacher, DIVERGENCES[name](beta))(batch)
    real = np.array(batch.sequence) < 3
    expected = trl(direct(teacher, batch), direct(student, batch), theirs)
    np.testing.assert_allclose(np.array(seen.divergence)[real], expected[real], rtol=1e-4, atol=1e-5)
    assert not np.array(seen.divergence)[~real].any()
    np.testing.assert_allclose(logps, scorer(student)(batch)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "kind"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_are_those_of_the_plain_computation(make: Callable[[], nn.Module], kind: Any, name: str) -> None:
    """Without chunks or a split: every logit of every position, differentiated by MLX."""
    student, teacher = prepare(make(), AdapterOptions(num_layers=-1, train_type=kind)), other()
    batch, measure = collate([example(seed) for seed in range(3)]), DIVERGENCES[name](0.5)
    chunked = with_teacher(scorer(student, chunk=64), teacher, measure)
    plain = with_teacher(scorer(student), teacher, measure)
    object.__setattr__(plain, "split", None)
    (ours, gradient), (theirs, expected) = (loss_and_gradient(student, distill(nll_weight=0.3), batch, s) for s in (chunked, plain))
    assert ours["divergence"] == pytest.approx(theirs["divergence"], rel=1e-4) and ours["divergence"] > 0.01
    assert distance(gradient, expected) < 1e-3


def test_a_student_that_is_its_teacher_learns_nothing() -> None:
    student = prepare(dense(), AdapterOptions(num_layers=-1))
    batch = collate([example(0), example(1)])
    for name in DIVERGENCES:
        metrics, gradient = loss_and_gradient(
            student, distill(), batch, with_teacher(scorer(student), dense(), DIVERGENCES[name](0.5))
        )
        assert abs(metrics["divergence"]) < 1e-5 and all(np.abs(np.array(g)).max() < 1e-4 for g in gradient.values())


def test_the_teacher_stays_and_may_have_padding_in_its_vocabulary() -> None:
    student, teacher = prepare(dense(), AdapterOptions(num_layers=-1)), dense(vocab_size=104)
    before = snapshot(teacher.parameters())
    score = with_teacher(scorer(student), teacher, DIVERGENCES["forward_kl"](0.5))
    batch = collate([example(0), example(1)])
    metrics, _ = loss_and_gradient(student, distill(), batch, score)
    expected = trl(direct(teacher, batch)[:, :96], direct(student, batch), 0.0)[np.array(batch.sequence) < 2].mean()
    assert metrics["divergence"] == pytest.approx(expected, rel=1e-4)
    assert not tree_flatten(teacher.trainable_parameters())
    assert all(np.array_equal(before[name], now) for name, now in snapshot(teacher.parameters()).items())


def test_jsd_needs_a_share() -> None:
    with pytest.raises(InputError, match=r"--jsd-beta must be between 0 and 1, got 1\.0"):
        DIVERGENCES["jsd"](1.0)


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def command(model_folder: Path, tmp_path: Path) -> tuple[Any, ...]:
    """A teacher with another head."""
    (tmp_path / "data").mkdir()
    rows = [{"prompt": "abc" * n, "completion": "xyz" * (n % 3 + 1)} for n in range(1, 7)]
    for split in ("train", "valid"):
        (tmp_path / "data" / f"{split}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    teacher = load(str(model_folder))[0]
    teacher.update({"lm_head": {"weight": teacher["lm_head"].weight[:, ::-1] * 9}})
    (tmp_path / "teacher").mkdir()
    for file in model_folder.iterdir():
        (tmp_path / "teacher" / file.name).write_bytes(file.read_bytes())
    arrays = {name: mx.array(value) for name, value in snapshot(teacher.parameters()).items()}
    mx.save_safetensors(str(tmp_path / "teacher" / "model.safetensors"), arrays, {"format": "mlx"})
    rates = ("--batch-size", 3, "--steps-per-report", 1, "--learning-rate", 1e-2, "--num-layers", -1, "--mask-prompt")
    return "distill", "--model", model_folder, "--data", tmp_path / "data", *rates, "--teacher-model", tmp_path / "teacher"


def records(folder: Path, split: str = "train") -> list[dict]:
    lines = [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return [line for line in lines if line["split"] == split]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_it_approaches_the_teacher(name: str, command: tuple, tmp_path: Path, mlxlora: Any) -> None:
    options = ("--divergence", name, "--iters", 10, "--nll-weight", 0.1, "--grad-checkpoint")
    outcome = mlxlora(*command, *options, "--adapter-path", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    first, *_, last = records(tmp_path / "run", "valid")
    assert last["divergence"] < 0.95 * first["divergence"] and {"nll", "perplexity"} <= last.keys()


@pytest.fixture
def on_policy(command: tuple) -> tuple[Any, ...]:
    plain = tuple(word for word in command[1:] if word != "--mask-prompt")
    return "gkd", *plain, "--max-completion-length", 8, "--val-batches", -1


def test_it_approaches_the_teacher_on_its_own_samples(on_policy: tuple, tmp_path: Path, mlxlora: Any) -> None:
    outcome = mlxlora(*on_policy, "--iters", 10, "--divergence", "reverse_kl", "--adapter-path", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    first, *_, last = records(tmp_path / "run", "valid")
    assert last["divergence"] < 0.95 * first["divergence"]
    train = records(tmp_path / "run")
    assert {"divergence", "completions/mean_length"} <= train[0].keys() and not any("reward" in name for name in train[0])


def test_samples_are_those_of_the_policy_as_it_is(on_policy: tuple, tmp_path: Path, mlxlora: Any) -> None:
    """Resumed after any step, the next batch is sampled as it would have been."""
    command = (*on_policy, "--save-every", 2, "--dropout", 0.2, "--temperature", 0.8)
    assert mlxlora(*command, "--iters", 4, "--adapter-path", tmp_path / "whole").code == 0
    assert mlxlora(*command, "--iters", 2, "--adapter-path", tmp_path / "stopped").code == 0
    assert mlxlora(*command, "--iters", 4, "--adapter-path", tmp_path / "stopped", "--resume").code == 0
    assert [r["loss"] for r in records(tmp_path / "stopped")] == [r["loss"] for r in records(tmp_path / "whole")]


def test_resumed(command: tuple, tmp_path: Path, mlxlora: Any) -> None:
    command += ("--save-every", 2, "--dropout", 0.2, "--grad-accumulation-steps", 2)
    assert mlxlora(*command, "--iters", 4, "--adapter-path", tmp_path / "whole").code == 0
    assert mlxlora(*command, "--iters", 2, "--adapter-path", tmp_path / "stopped").code == 0
    assert mlxlora(*command, "--iters", 4, "--adapter-path", tmp_path / "stopped", "--resume").code == 0
    assert [r["loss"] for r in records(tmp_path / "stopped")] == [r["loss"] for r in records(tmp_path / "whole")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--teacher-model", "./nowhere"), "--teacher-model ./nowhere: no such folder"),
        (("--packing",), "--packing: a teacher reads plain rows"),
        (("--divergence", "x"), "divergence"),
    ],
)
def test_mistakes(options: tuple, message: str, command: tuple, tmp_path: Path, mlxlora: Any) -> None:
    outcome = mlxlora(*command, *options, "--adapter-path", tmp_path / "run")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err


def test_a_teacher_is_needed(command: tuple, mlxlora: Any) -> None:
    outcome = mlxlora(*command[:-2])
    assert outcome.code == 2 and "--teacher-model is missing" in outcome.err
