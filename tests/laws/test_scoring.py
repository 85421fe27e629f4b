"""Laws of training a model: what may not change a loss, a gradient or an update, for every kind of objective."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from attrs import frozen
from mlx.utils import tree_flatten, tree_map

from mlxlora.adapters.prepare import disabled, prepare
from mlxlora.batch import Batch, column
from mlxlora.config.options import AdapterOptions
from mlxlora.data.batching import collate
from mlxlora.models.grad_checkpoint import checkpointed
from mlxlora.objectives.grpo import grpo
from mlxlora.objectives.objective import Objective, by_token, term, token_mean
from mlxlora.objectives.preference import dpo, orpo
from mlxlora.objectives.quantity import reads
from mlxlora.objectives.supervised import sft
from mlxlora.objectives.terms import entropy
from mlxlora.training.step import make_step
from tests.support.tiny import (
    VOCABULARY,
    dense,
    distance,
    example,
    experts,
    loss_and_gradient,
    numbers,
    quantized,
    same,
    shaken,
    snapshot,
    softcapped,
    tied,
)

RTOL = 1e-5
GRADIENT = 2e-5  # relative distance of gradients in float32


@frozen
class Case:
    """An objective and the kind of rows it is for.

    Attributes:
        objective: what is minimized.
        pairs: rows come in pairs, all chosen before all rejected.
        train_prompt: prompts are trained on too.
    """

    objective: Objective
    pairs: bool = False
    train_prompt: bool = False

    def batch(self, groups: Sequence[int]) -> Batch:
        """The batch of these rows, or of these pairs."""
        seeds = [*groups, *(u + 1000 for u in groups)] if self.pairs else groups
        needs = self.objective.needs
        examples = [example(s, train_prompt=self.train_prompt, reference="ref_logps" in needs) for s in seeds]
        advantages = mx.array([np.random.default_rng(s).normal() for s in seeds]) if "advantages" in needs else None
        return collate(examples, advantages=advantages)


OBJECTIVES = {
    "sft": Case(sft()),
    "sft on everything": Case(sft(), train_prompt=True),
    "dft": Case(sft(loss_type="dft")),
    "sft with an entropy bonus": Case(sft() + -0.1 * entropy()),
    "orpo": Case(orpo(nll_on_prompt=True), pairs=True, train_prompt=True),
    "dpo": Case(dpo(), pairs=True),
    "dpo weighted by confidence": Case(dpo(wpo=True), pairs=True),
    "grpo": Case(grpo(beta=0.1)),
    "grpo with an entropy bonus": Case(grpo(beta=0.1, entropy_coef=0.05)),
}
every_objective = pytest.mark.parametrize("case", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def adapted(make: Callable[[], nn.Module] = dense, **options: Any) -> nn.Module:
    """A model whose adapters have been trained a little."""
    mx.random.seed(0)
    model = prepare(make(), AdapterOptions(num_layers=-1, rank=4, scale=2.0, **options))
    return shaken(model)


# --- what may not matter ------------------------------------------------------------------------


@every_objective
@pytest.mark.parametrize(("columns", "filler"), [(32, 0), (0, 64), (37, 5)])
def test_padding_and_bucket_sizes(case: Case, columns: int, filler: int) -> None:
    model, batch = adapted(), case.batch(range(3))
    same_results(model, case.objective, padded(batch, columns, filler), batch)


@every_objective
def test_row_order(case: Case) -> None:
    same_results(adapted(), case.objective, case.batch([2, 0, 3, 1]), case.batch(range(4)))


@every_objective
def test_compiled_is_eager(case: Case) -> None:
    model, batch = adapted(), case.batch(range(3))
    metrics, gradient = loss_and_gradient(model, case.objective, batch)
    before = dict(tree_flatten(tree_map(lambda p: mx.array(p), model.trainable_parameters())))
    stepped = numbers(make_step(model, optim.SGD(1.0), case.objective)(batch))
    after = dict(tree_flatten(model.trainable_parameters()))
    assert distance({name: before[name] - after[name] for name in before}, gradient) < GRADIENT
    close({name: stepped[name] for name in metrics}, metrics)
    norm = np.sqrt(sum(np.square(np.array(g, np.float64)).sum() for g in gradient.values()))
    assert stepped["grad_norm"] == pytest.approx(norm, rel=RTOL)


@pytest.mark.usefixtures("eager")
@every_objective
@pytest.mark.parametrize("micros", [[[0], [1, 2, 3]], [[3], [1], [0], [2]]], ids=len)
def test_micro_batches_are_one_batch(case: Case, micros: list[list[int]]) -> None:
    def trained(*batches: Batch) -> tuple[dict[str, float], dict[str, mx.array]]:
        model = adapted()
        start = tree_map(lambda p: mx.array(p), model.trainable_parameters())
        step = make_step(model, optim.SGD(0.1), case.objective, max_grad_norm=0.5)
        metrics = numbers(step(*batches))
        return metrics, dict(tree_flatten(tree_map(mx.subtract, model.trainable_parameters(), start)))

    whole, of_whole = trained(case.batch(range(4)))
    split, of_split = trained(*map(case.batch, micros))
    close(split, whole)
    assert distance(of_split, of_whole) < 2 * GRADIENT


def same_results(model: nn.Module, objective: Objective, ours: Batch, theirs: Batch) -> None:
    (a, grad_a), (b, grad_b) = (loss_and_gradient(model, objective, batch) for batch in (ours, theirs))
    close(a, b)
    assert distance(grad_a, grad_b) < GRADIENT


def close(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=RTOL, abs=1e-6), name


def padded(batch: Batch, columns: int, filler: int) -> Batch:
    """More positions, with any tokens in them, and more filler, with any targets."""
    rng, (rows, width) = np.random.default_rng(3), batch.tokens.shape
    junk = mx.array(rng.integers(1, VOCABULARY, (rows, columns)).astype(np.int32))
    at = batch.positions // width * (width + columns) + batch.positions % width

    def longer(values: mx.array | None, more: Any) -> mx.array | None:
        return None if values is None else mx.concatenate([values, mx.array(np.full(filler, more)).astype(values.dtype)])

    return batch._replace(
        tokens=mx.concatenate([batch.tokens, junk], axis=1),
        positions=longer(at, 1),
        targets=longer(batch.targets, 5),
        sequence=longer(batch.sequence, batch.sequences),
        prompt=longer(batch.prompt, False),
        ref_logps=longer(batch.ref_logps, -1.0),
    )


# --- adapters -----------------------------------------------------------------------------------

ADAPTED = {
    "lora": (dense, {}),
    "dora": (dense, {"train_type": "dora"}),
    "lora on four bits": (quantized, {}),
    "dora on four bits": (quantized, {"train_type": "dora"}),
    "lora on experts": (experts, {}),
    "lora on four-bit experts": (lambda: quantized(experts), {}),
    "lora on a tied embedding": (tied, {"lora_keys": ("model.embed_tokens", "self_attn.q_proj")}),
    "dora on an embedding": (softcapped, {"train_type": "dora", "lora_keys": ("model.embed_tokens",)}),
    "lora on the head": (dense, {"lora_keys": ("lm_head", "mlp.up_proj")}),
}


@pytest.mark.parametrize(("make", "options"), ADAPTED.values(), ids=ADAPTED.keys())
def test_disabled_is_the_model_before(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    tokens = mx.array([[1, 7, 3, 9, 2]])
    before = make()(tokens)
    model = adapted(make, **options)
    trained = model(tokens)
    with disabled(model):
        assert mx.array_equal(model(tokens), before)
    assert mx.array_equal(model(tokens), trained)
    assert not mx.allclose(trained, before, atol=1e-3)


def test_adapters_come_back_after_an_error() -> None:
    model = adapted()
    trained = model(mx.array([[1, 2]]))
    with pytest.raises(RuntimeError), disabled(model):
        raise RuntimeError
    assert mx.array_equal(model(mx.array([[1, 2]])), trained)


# --- gradient checkpointing ---------------------------------------------------------------------


@every_objective
def test_checkpointing_is_plain(case: Case) -> None:
    batch = case.batch(range(3))
    metrics, gradient = loss_and_gradient(adapted(), case.objective, batch)
    again, recomputed = loss_and_gradient(checkpointed(adapted()), case.objective, batch)
    close(again, metrics)
    assert distance(recomputed, gradient) < GRADIENT


def test_checkpointing_trains_alike() -> None:
    def trained(model: nn.Module) -> dict[str, mx.array]:
        step = make_step(model, optim.SGD(0.1), sft())
        for seeds in ([0, 1], [2, 3]):
            step(OBJECTIVES["sft"].batch(seeds))
        return dict(tree_flatten(model.trainable_parameters()))

    assert distance(trained(checkpointed(adapted())), trained(adapted())) < GRADIENT


def test_checkpointing_with_dropout_draws_the_same_mask_twice() -> None:
    model, batch = checkpointed(adapted(dropout=0.3)), OBJECTIVES["sft"].batch(range(3))
    model.train()

    def loss(shift: float, direction: dict[str, mx.array]) -> float:
        model.load_weights([(n, p + shift * direction[n]) for n, p in start.items()], strict=False)
        mx.random.seed(7)
        return loss_and_gradient(model, sft(), batch)[0]["loss"]

    start = dict(tree_flatten(tree_map(lambda p: mx.array(p), model.trainable_parameters())))
    mx.random.seed(7)
    metrics, gradient = loss_and_gradient(model, sft(), batch)
    norm = np.sqrt(sum(np.square(np.array(g)).sum() for g in gradient.values()))
    uphill = {name: g / norm for name, g in gradient.items()}
    assert (loss(1e-2, uphill) - loss(-1e-2, uphill)) / 2e-2 == pytest.approx(norm, rel=1e-2)
    assert metrics["loss"] != pytest.approx(_loss_without_dropout(model, start, batch), rel=1e-4)


def _loss_without_dropout(model: nn.Module, start: dict[str, mx.array], batch: Batch) -> float:
    model.load_weights(list(start.items()), strict=False)
    model.eval()
    return loss_and_gradient(model, sft(), batch)[0]["loss"]


def test_checkpointing_leaves_randomness_alone_in_evaluation() -> None:
    model = checkpointed(adapted(dropout=0.3))
    model.eval()
    before = np.array(mx.random.state[0])
    mx.eval(model(mx.array([[1, 2, 3]])))
    assert np.array_equal(np.array(mx.random.state[0]), before)


# --- steps that must not happen, and steps that must stay small ---------------------------------


def weighted() -> Objective:
    """-log π(y), each sequence times its advantage: a batch can make the loss anything."""
    return term(
        "nll", reads("advantages")(lambda logps, batch: -logps * by_token(column(batch, "advantages"), batch)), token_mean()
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("micros", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(poison: float, micros: int) -> None:
    def batches(value: float) -> list[Batch]:
        good = OBJECTIVES["sft"].batch(range(2))
        return [good._replace(advantages=mx.array([1.0, last])) for last in [*[1.0] * (micros - 1), value]]

    model, optimizer, steady = adapted(), optim.AdamW(1e-2, bias_correction=True), adapted()
    step, beside = make_step(model, optimizer, weighted()), make_step(steady, optim.AdamW(1e-2, bias_correction=True), weighted())
    step(*batches(1.0)), beside(*batches(1.0))
    before = snapshot(model.parameters()), snapshot(optimizer.state)
    metrics = numbers(step(*batches(poison)))
    assert not np.isfinite(metrics["grad_norm"] + metrics["loss"])
    assert same(snapshot(model.parameters()), before[0]) and same(snapshot(optimizer.state), before[1])
    step(*batches(1.0)), beside(*batches(1.0))
    assert same(snapshot(model.parameters()), snapshot(steady.parameters()))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("limit", "length"), [(0.0, None), (0.01, 0.01), (1e6, None)])
def test_clipping(limit: float, length: float | None) -> None:
    model, batch = adapted(), OBJECTIVES["sft"].batch(range(3))
    start = dict(tree_flatten(tree_map(lambda p: mx.array(p), model.trainable_parameters())))
    metrics = numbers(make_step(model, optim.SGD(1.0), sft(), max_grad_norm=limit)(batch))
    _, gradient = loss_and_gradient(adapted(), sft(), batch)
    moved = {name: start[name] - p for name, p in tree_flatten(model.trainable_parameters())}
    scale = 1.0 if length is None else length / metrics["grad_norm"]
    assert metrics["grad_norm"] > 0.1  # before clipping
    assert distance(moved, {name: scale * g for name, g in gradient.items()}) < 2e-3
