"""Statistics of the distribution over the vocabulary, against float64: of real sizes, forward and gradient.

Law: log π, the entropy and log Σ π² differ from float64 by at most 1e-6·max(1, |value|). The gradient of log π with respect to the
logits, [v = y] - π(v), differs by at most 1e-6; the others, π(v) times a factor, by 1e-6·max(π(v), |gradient|) over all v.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora.batch import Batch
from mlxlora.models import distribution
from mlxlora.models.distribution import COLUMNS, gradients_first, statistics
from mlxlora.models.logprobs import scorer
from mlxlora.models.normalize import log_softmax, logsumexp
from mlxlora.models.teacher import with_teacher
from mlxlora.objectives.divergences import DIVERGENCES
from mlxlora.objectives.numerics import row_sums
from tests.support.warm import python

SIZES = [49_152, 50_257, 151_936, 262_144]  # SmolLM2, GPT-2 (no multiple of a block), Qwen3, Gemma 3
NAMES = ("entropy", "log_sum_sq_probs")
LAW = 1e-6


def logits(size: int, kind: str = "wide", rows: int = 3) -> tuple[mx.array, mx.array]:
    """[n, V] float32 and [n] targets; "flat": nearly uniform, "sure": one token has most of the mass, "far": shifted by 30."""
    rng = np.random.default_rng(size)
    values = {"wide": 3.0, "flat": 0.1, "sure": 2.0, "far": 3.0}[kind] * rng.standard_normal((rows, size))
    targets = rng.integers(0, size, rows)
    if kind == "sure":
        values[np.arange(rows), targets] += 16
    return mx.array((values + 30 * (kind == "far")).astype(np.float32)), mx.array(targets.astype(np.int32))


def exact(z: mx.array, targets: mx.array) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values [n] and gradients [n, V] in float64."""
    wide = np.array(z.astype(mx.float32)).astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    p, rows, y = np.exp(logs), np.arange(len(wide)), np.array(targets)
    entropy, squares = -(p * logs).sum(axis=-1), np.square(p).sum(axis=-1)
    onehot = np.zeros_like(p)
    onehot[rows, y] = 1
    values = {"logps": logs[rows, y], "entropy": entropy, "log_sum_sq_probs": np.log(squares)}
    gradients = {
        "logps": onehot - p,
        "entropy": -p * (logs + entropy[:, None]),
        "log_sum_sq_probs": 2 * (np.square(p) / squares[:, None] - p),
    }
    return values, gradients


def error(found: Any, value: np.ndarray) -> float:
    return float((np.abs(np.array(found) - value) / np.maximum(1, np.abs(value))).max())


def slope_error(found: Any, gradient: np.ndarray) -> float:
    return float(np.abs(np.array(found) - gradient).max() / np.abs(gradient).max())


# --- the law --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wide", "flat", "sure", "far"])
@pytest.mark.parametrize("size", SIZES)
def test_statistics_are_those_of_float64(size: int, kind: str) -> None:
    z, targets = logits(size, kind)
    values, gradients = exact(z, targets)
    columns = dict.fromkeys(NAMES, True)
    found = statistics(z, targets, columns)
    for row, name in enumerate(["logps", *gradients_first(columns)]):
        assert error(found[row], values[name]) < LAW, name
        slope = mx.grad(lambda z, row=row: statistics(z, targets, columns)[row].sum())(z)
        scale = 1 if name == "logps" else max(float(mx.softmax(z, axis=-1).max()), np.abs(gradients[name]).max())
        assert np.abs(np.array(slope) - gradients[name]).max() < LAW * scale, name


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_logits_have_the_values_of_float64(size: int) -> None:
    """Of the rounded logits; a gradient in bfloat16 has its 8 bits."""
    z, targets = logits(size)
    z = z.astype(mx.bfloat16)
    values, gradients = exact(z, targets)
    found = statistics(z, targets, {})
    assert found.dtype == mx.float32 and error(found[0], values["logps"]) < LAW
    slope = mx.grad(lambda z: statistics(z, targets, {})[0].sum())(z)
    assert slope.dtype == mx.bfloat16 and slope_error(slope.astype(mx.float32), gradients["logps"]) < 2**-8


@pytest.mark.parametrize("size", SIZES)
def test_the_normalizer_is_that_of_float64(size: int) -> None:
    z, _ = logits(size)
    wide = np.array(z).astype(np.float64)
    value = np.log(np.exp(wide - wide.max()).sum(axis=-1)) + wide.max()
    probs = np.exp(wide - value[:, None])
    assert error(logsumexp(z), value) < LAW
    assert error(log_softmax(z), wide - value[:, None]) < LAW
    assert error(row_sums(mx.exp(z)) / value.max(), np.exp(wide).sum(axis=-1) / value.max()) < LAW
    assert slope_error(mx.grad(lambda z: logsumexp(z).sum())(z), probs) < 5 * LAW  # of the largest probability, itself about 1e-3


def test_plain_sums_break_the_law_on_a_cpu() -> None:
    """Why there are blocks: without them, the same test fails by two orders of magnitude."""
    z, _ = logits(262_144)
    wide = np.array(z).astype(np.float64)
    value = np.log(np.exp(wide).sum(axis=-1))
    assert error(logsumexp(z, blocks=False), value) > 10 * LAW
    assert error(logsumexp(z, blocks=True), value) < LAW


class Wide(nn.Module):
    """A table of hidden states and a head of V tokens."""

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        self.model = nn.Embedding(64, 8)
        self.lm_head = nn.Linear(8, size, bias=False)
        self.lm_head.weight = 1.5 * mx.random.normal((size, 8), key=mx.random.key(seed))
        self.layers: list[nn.Module] = []

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return self.lm_head(self.model(tokens))


def wide_batch(size: int, tokens: int = 12) -> Batch:
    rng = np.random.default_rng(1)
    ids, targets = (mx.array(rng.integers(0, most, tokens).astype(np.int32)) for most in (64, size))
    return Batch(ids[None], mx.arange(tokens), targets, mx.zeros((tokens,), mx.int32), mx.array([tokens]))


@pytest.mark.parametrize("head", ["frozen", "trained", "no gradient", "not split"])
def test_the_scorer_keeps_the_law(head: str) -> None:
    size = 49_152
    model, batch = Wide(size), wide_batch(size)
    if head != "trained":
        model.lm_head.freeze()
    score = scorer(model, columns={"entropy": True, "log_sum_sq_probs": head == "frozen", "correct": False}, chunk=5)
    if head == "not split":
        object.__setattr__(score, "split", None)
    logps, full = score(batch, gradient=head != "no gradient")
    z = model(batch.tokens)[0]
    values, _ = exact(z, batch.targets)
    for found, name in ((logps, "logps"), (full.entropy, "entropy"), (full.log_sum_sq_probs, "log_sum_sq_probs")):
        assert error(found, values[name]) < LAW
    np.testing.assert_array_equal(np.array(full.correct), np.array(mx.argmax(z, axis=-1) == batch.targets))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_teacher_keeps_the_law(name: str) -> None:
    size = 49_152
    student, teacher, batch = Wide(size), Wide(size, seed=1), wide_batch(size)
    student.lm_head.freeze()
    score = with_teacher(scorer(student, columns={"entropy": False}, chunk=64), teacher, DIVERGENCES[name](0.5))
    logps, full = score(batch)

    def logs(model: nn.Module) -> np.ndarray:
        z = np.array(model(batch.tokens)[0]).astype(np.float64)
        return z - np.log(np.exp(z - z.max()).sum(axis=-1, keepdims=True)) - z.max()

    p, q = logs(teacher), logs(student)
    m = np.log(0.5 * np.exp(p) + 0.5 * np.exp(q))
    kl = lambda a, b: (np.exp(a) * (a - b)).sum(axis=-1)  # noqa: E731
    wanted = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": 0.5 * kl(p, m) + 0.5 * kl(q, m)}[name]
    assert error(full.divergence, wanted) < 2 * LAW  # a sum of both signs
    assert error(logps, q[np.arange(12), np.array(batch.targets)]) < LAW
    assert error(full.entropy, -(np.exp(q) * q).sum(axis=-1)) < LAW


# --- columns --------------------------------------------------------------------------------------


def test_columns_are_fields_of_the_batch() -> None:
    assert set(COLUMNS) <= set(Batch._fields)


@pytest.mark.parametrize("gradients", [(), ("entropy",), ("log_sum_sq_probs",), NAMES, NAMES[::-1]], ids="+".join)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_any_set_of_columns_with_and_without_gradients(gradients: tuple[str, ...], trained: bool) -> None:
    """Against the definition by MLX's own derivatives, through the whole model."""
    model, batch = Wide(300), wide_batch(300)
    if not trained:
        model.lm_head.freeze()
    columns = {name: name in gradients for name in ("correct", *NAMES)}
    score = scorer(model, columns=columns, chunk=5)

    def plain() -> dict[str, mx.array]:
        logs = log_softmax(model(batch.tokens)[0])
        return {
            "logps": mx.take_along_axis(logs, batch.targets[:, None], axis=-1)[:, 0],
            "entropy": -(mx.exp(logs) * logs).sum(axis=-1),
            "log_sum_sq_probs": mx.logsumexp(2 * logs, axis=-1),
            "correct": (logs.argmax(axis=-1) == batch.targets).astype(mx.float32),
        }

    def ours() -> dict[str, mx.array]:
        logps, full = score(batch)
        return {"logps": logps, **{name: getattr(full, name) for name in columns}}

    def slopes(values: Any, names: tuple[str, ...]) -> dict[str, mx.array]:
        def total(parameters: Any) -> mx.array:
            model.update(parameters)
            found = values()
            return sum((mx.sin(mx.arange(12) + i) * found[name]).sum() for i, name in enumerate(names))  # type: ignore[return-value]

        before = model.trainable_parameters()
        gradient = mx.grad(total)(before)
        mx.eval(gradient)
        model.update(before)
        return dict(tree_flatten(gradient))

    for name, value in plain().items():
        np.testing.assert_allclose(np.array(ours()[name]), np.array(value), rtol=1e-5, atol=1e-5, err_msg=name)
    wanted = slopes(plain, ("logps", *gradients))
    constant = tuple(name for name in columns if name not in gradients)
    found = slopes(ours, ("logps", *gradients, *constant))
    for name, gradient in wanted.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(gradient), rtol=2e-4, atol=1e-5, err_msg=name)


def test_columns_cost_one_pass_through_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model, batch = [], Wide(300), wide_batch(300)
    model.lm_head.freeze()
    whole = distribution.statistics
    monkeypatch.setattr("mlxlora.models.logprobs.statistics", lambda *given: calls.append(1) or whole(*given))
    for columns in ({}, dict.fromkeys(COLUMNS, False)):
        calls.clear()
        scorer(model, columns=columns, chunk=100)(batch, gradient=False)
        assert len(calls) == 1


def test_logits_of_minus_infinity_count_as_nothing() -> None:
    z = mx.array([[0.0, -mx.inf, 0.0, -mx.inf]])
    columns = dict.fromkeys(NAMES, True)
    found = statistics(z, mx.array([0]), columns)
    np.testing.assert_allclose(np.array(found)[:, 0], [-np.log(2), np.log(2), -np.log(2)], rtol=1e-6)
    for row in range(3):
        slope = np.array(mx.grad(lambda z, row=row: statistics(z, mx.array([0]), columns)[row].sum())(z))
        assert np.isfinite(slope).all() and (slope[0, [1, 3]] == 0).all()


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000, 128 * 128 + 1])
def test_sums_of_any_length(size: int) -> None:
    values = np.random.default_rng(size).standard_normal((2, 3, size)).astype(np.float32)
    for blocks in (True, False, None):
        np.testing.assert_allclose(row_sums(mx.array(values), blocks=blocks), values.sum(-1), rtol=1e-4, atol=1e-4)
        found = logsumexp(mx.array(values), blocks=blocks)
        np.testing.assert_allclose(found, np.log(np.exp(values).sum(-1)), rtol=1e-5, atol=1e-5)
        assert logsumexp(mx.array(values), blocks=blocks, keepdims=True).shape == (2, 3, 1)


def test_the_benchmark_writes_its_rows(tmp_path: Path) -> None:
    file, root = tmp_path / "rows.json", Path(__file__).resolve().parents[2]
    command = [python(), "-m", "benchmarks.normalization", "--quick", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    rows = json.loads(file.read_text())
    assert {row["way"] for row in rows} == {"plain", "blocked", "scorer"}
    for row in rows:
        assert row["case"] in done.stdout
        if row["way"] == "scorer":
            assert abs(float(row["bias"])) < 1e-5 and float(row["dlogps"]) < 1e-6


def test_whole_blocks_of_minus_infinity_count_as_nothing() -> None:
    """As truncated sampling makes them."""
    z = mx.where(mx.arange(1000)[None] == 7, 1.5, mx.array(-mx.inf))
    assert logsumexp(z, blocks=True).item() == 1.5
    assert statistics(z, mx.array([7]), dict.fromkeys(COLUMNS, False)).tolist() == [[0.0], [0.0], [0.0], [1.0]]
