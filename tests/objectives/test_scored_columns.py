"""WPO's weights and the entropy bonus through a real model, against their formulas in float64 on its logits."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxlora.adapters.prepare import prepare
from mlxlora.batch import Batch, column
from mlxlora.config.options import AdapterOptions
from mlxlora.data.batching import collate
from mlxlora.models.logprobs import scorer
from mlxlora.objectives.grpo import grpo
from mlxlora.objectives.objective import Objective
from mlxlora.objectives.preference import dpo
from mlxlora.objectives.quantity import reads
from mlxlora.objectives.terms import entropy, gated, nll
from mlxlora.training.step import columns_of, make_step
from tests.support.tiny import dense, example

PAIRS, BETA = 2, 0.1


def batch_of() -> Batch:
    """Two pairs; rewards of ±1 as advantages."""
    advantages = mx.array([1.0, -1.0, -1.0, 1.0])
    return collate([example(seed, reference=True) for seed in range(2 * PAIRS)], advantages=advantages)


def distributions(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every trained token: the log-probabilities of the vocabulary [N, V], its own [N], and the sequence it belongs to."""
    logits = np.array(dense()(batch.tokens), np.float64).reshape(batch.tokens.size, -1)[np.array(batch.positions)]
    real = np.array(batch.sequence) < batch.sequences
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    own = log_probs[np.arange(len(real)), np.array(batch.targets)]
    return log_probs[real], own[real], np.array(batch.sequence)[real]


def stepped(objective: Objective, batch: Batch) -> dict[str, float]:
    model = prepare(dense(), AdapterOptions(num_layers=-1, rank=2))  # a fresh adapter changes no logits
    return make_step(model, optim.SGD(0.0), objective).measured(batch)


def test_wpo() -> None:
    """w = Π over both sides of exp(mean_t(log π(y_t) - log Σ_v π(v)²)) (https://arxiv.org/abs/2406.11827, eq. 2)."""
    batch = batch_of()
    log_probs, own, sequence = distributions(batch)
    aligned = own - np.log(np.exp(2 * log_probs).sum(axis=-1))
    ref = np.array(batch.ref_logps, np.float64)[: len(own)]
    sides = [(np.exp(aligned[sequence == s].mean()), (own - ref)[sequence == s].sum()) for s in range(2 * PAIRS)]
    pairs = list(zip(sides[:PAIRS], sides[PAIRS:], strict=True))
    expected = np.mean([w_c * w_r * np.log1p(np.exp(-BETA * (c - r))) for (w_c, c), (w_r, r) in pairs])
    plain = np.mean([np.log1p(np.exp(-BETA * (c - r))) for (_, c), (_, r) in pairs])
    metrics = stepped(dpo(beta=BETA, wpo=True), batch)
    assert metrics["loss"] == metrics["sigmoid"] == pytest.approx(expected, rel=1e-5)
    assert stepped(dpo(beta=BETA), batch)["loss"] == pytest.approx(plain, rel=1e-5) and abs(plain - expected) > 0.1 * plain


GATED = {
    "wpo": (dpo(beta=BETA, wpo=True), "log_sum_sq_probs"),
    "top_entropy": (grpo(beta=0.0, top_entropy=0.5), "entropy"),
}


@pytest.mark.parametrize("name", GATED)
def test_a_gate_is_computed_without_a_gradient(name: str) -> None:
    """The same loss and weights as with one, which nothing uses."""
    objective, column = GATED[name]
    assert columns_of(objective) == {column: False}
    found = []
    for graded in (False, True):
        mx.random.seed(0)
        model = prepare(dense(), AdapterOptions(num_layers=-1, rank=2))
        score = scorer(model, columns={column: graded})
        assert score.kinds == 1 + graded
        step = make_step(model, optim.SGD(1.0), objective, score=score)
        found.append([step.measured(batch_of())[key] for key in ("loss", "grad_norm") * 2])  # of two steps
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0][2] != found[0][0]


def test_a_column_has_a_gradient_if_any_term_has_one_through_it() -> None:
    assert columns_of(grpo(beta=0.0, top_entropy=0.5, entropy_coef=0.1)) == {"entropy": True}
    gate = reads("entropy")(lambda logps, batch: column(batch, "entropy"))
    assert columns_of(gated(entropy(), gate)) == {"entropy": True} and columns_of(gated(nll(), gate)) == {"entropy": False}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_entropy_bonus(loss_type: str) -> None:
    """loss = -mean(A) over tokens or completions - 0.5·H, with ρ = 1; the watched entropy is the same mean."""
    batch = batch_of()
    log_probs, _, sequence = distributions(batch)
    entropy = -(np.exp(log_probs) * log_probs).sum(axis=-1).mean()
    advantages = np.array(batch.advantages)
    surrogate = -advantages.mean() if loss_type == "grpo" else -advantages[sequence].mean()
    metrics = stepped(grpo(loss_type=loss_type, beta=0.0, entropy_coef=0.5), batch)
    assert metrics["entropy"] == metrics["entropy_bonus"] == pytest.approx(entropy, rel=1e-5)
    assert metrics["loss"] == pytest.approx(surrogate - 0.5 * entropy, rel=1e-5)


def test_the_entropy_bonus_has_the_gradient_of_the_entropy() -> None:
    """Only the bonus has a gradient where all advantages are 0: the difference quotient of H along it."""
    batch = batch_of()._replace(advantages=mx.zeros((2 * PAIRS,)))
    model = dense()
    metrics = make_step(model, optim.SGD(1e-4), grpo(beta=0.0, entropy_coef=1.0)).measured(batch)
    moved = make_step(model, optim.SGD(0.0), grpo(beta=0.0, entropy_coef=1.0)).measured(batch)
    risen = moved["entropy"] - metrics["entropy"]
    assert risen == pytest.approx(1e-4 * metrics["grad_norm"] ** 2, rel=2e-2) and risen > 0
