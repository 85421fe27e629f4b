"""Objectives as a vector space, and reductions computed by hand."""

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.batch import Batch, chosen, chosen_rows, completions, everything, rejected, token_offsets, token_sum
from mlxlora.objectives.objective import (
    NOTHING,
    Objective,
    Reduction,
    batch_mean,
    by_token,
    fixed_length,
    sequence_mean,
    sequence_sum,
    term,
    token_mean,
    watch,
    weighted_sum,
)
from mlxlora.objectives.preference import orpo
from mlxlora.objectives.quantity import reads
from mlxlora.objectives.terms import gated, nll, preference_score
from tests.support.random_batches import build, rows, unwatched

LOGPS = mx.array([-1.0, -2.0, -3.0, -4.0, -50.0])
TWO = Batch(  # lengths 3 and 1, then a token of filler
    tokens=mx.zeros((2, 8), mx.int32),
    positions=mx.array([0, 1, 2, 8, 0]),
    targets=mx.zeros((5,), mx.int32),
    sequence=mx.array([0, 0, 0, 1, 2]),
    lengths=mx.array([3, 1]),
)
PROMPTED = TWO._replace(prompt=mx.array([True, False, False, False, False]), lengths=mx.array([2, 1]))


@pytest.mark.parametrize(
    ("per", "expected"),
    [
        (token_mean, 10 / 4),
        (sequence_mean, (2 + 4) / 2),
        (sequence_sum, 10 / 2),
        (fixed_length(5), 10 / 5 / 2),
        (batch_mean, 10 / 4),
    ],
)
def test_reductions_by_hand(per: Reduction, expected: float) -> None:
    assert nll(per=per)(LOGPS, TWO)[0].item() == pytest.approx(expected)


@pytest.mark.parametrize(("per", "expected"), [(token_mean, 9 / 3), (sequence_mean, (2.5 + 4) / 2)])
def test_prompts_do_not_count(per: Reduction, expected: float) -> None:
    assert nll(per=per)(LOGPS, PROMPTED)[0].item() == pytest.approx(expected)


def test_selections() -> None:
    expected = {completions: [1, 2, 3], everything: [0, 1, 2, 3], chosen: [1, 2], chosen_rows: [0, 1, 2], rejected: [3]}
    for selection, places in expected.items():
        assert np.flatnonzero(selection(PROMPTED)).tolist() == places, selection.__name__


def test_sums_over_sequences_and_back() -> None:
    assert token_sum(LOGPS, TWO).tolist() == [-6, -4]
    assert token_sum(LOGPS, PROMPTED).tolist() == [-5, -4]
    assert by_token(mx.array([7.0, 8.0]), TWO).tolist() == [7, 7, 7, 8, 0]
    assert token_offsets(TWO).tolist()[:4] == [0, 1, 2, 0]
    assert token_offsets(PROMPTED).tolist()[1:4] == [0, 1, 0]


def test_spreading_is_the_transpose_of_summing() -> None:
    spread = mx.grad(lambda x: (by_token(x, TWO) * LOGPS).sum())(mx.array([7.0, 8.0]))
    assert spread.tolist() == token_sum(LOGPS, TWO).tolist()


def test_batch_means_average_over_the_batches_of_a_step() -> None:
    """One batch of 4 tokens and one of 1: a token mean weighs tokens the same, a batch mean batches."""
    one = TWO._replace(sequence=mx.array([0, 2, 2, 2, 2]), lengths=mx.array([1, 0]))
    for per, expected in ((token_mean, (10 + 1) / 5), (batch_mean, (2.5 + 1) / 2)):
        objective = nll(per=per)
        counts = {k: v + objective.counts(one)[k] for k, v in objective.counts(TWO).items()}
        total = objective(LOGPS, TWO, counts)[0] + objective(LOGPS, one, counts)[0]
        assert total.item() == pytest.approx(expected)


def test_a_vector_space() -> None:
    f, g = nll(name="f"), nll(name="g", per=sequence_mean)
    assert (f - 0.5 * g)(LOGPS, TWO)[0].item() == pytest.approx(2.5 - 1.5)
    loss, metrics = (2 * (f + 0.5 * g + NOTHING))(LOGPS, TWO)
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx({"loss": 5 + 3, "f": 2.5, "g": 3.0})
    assert loss.item() == pytest.approx(8)


def test_terms_need_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="got nll twice"):
        nll() + nll()


def test_a_metric_is_reported_and_not_optimized() -> None:
    objective = nll() + watch("shame", reads("entropy")(lambda logps, batch: -1e9 * logps), token_mean())
    loss, metrics = objective(LOGPS, TWO)
    assert loss.item() == metrics["nll"].item() == 2.5
    assert metrics["shame"].item() > 1e9
    assert objective.needs == {"entropy"}
    assert [t.name for _, t in unwatched(objective).terms] == ["nll"]
    assert unwatched(objective).needs == frozenset()


def test_weight_zero_silences_infinity() -> None:
    x = mx.array([1.0, float("inf")])
    weights = mx.array([2.0, 0.0])
    assert weighted_sum(x, weights).item() == 2
    assert mx.grad(weighted_sum)(x, weights).tolist() == [2, 0]


def test_no_tokens_are_no_loss() -> None:
    empty = TWO._replace(sequence=mx.full((5,), 2), lengths=mx.array([0, 0]))
    for per in (token_mean, sequence_mean, sequence_sum, batch_mean):
        assert nll(per=per)(LOGPS, empty)[0].item() == 0


def test_a_gate_scales_values_and_has_no_gradient() -> None:
    gate = gated(nll() + 0.0 * nll(name="watched"), reads("entropy")(lambda logps, batch: 0.5 * logps))
    loss, metrics = gate(LOGPS, TWO)
    assert loss.item() == pytest.approx(-0.5 * (1 + 4 + 9 + 16) / 4)
    assert metrics["watched"].item() == 2.5
    assert gate.needs == {"entropy"}
    gradient = mx.grad(lambda x: gate(x, TWO)[0])(LOGPS)
    np.testing.assert_allclose(gradient, [0.125, 0.25, 0.375, 0.5, 0])


def test_preference_score_weighs_the_odds_ratio() -> None:
    logps, batch = build(rows(0))
    plain = orpo()(logps, batch._replace(preference_score=None))[1]
    ones, halves, none = (orpo()(logps, batch._replace(preference_score=mx.full((3,), w)))[1] for w in (1.0, 0.5, 0.0))
    assert preference_score(batch._replace(preference_score=None)).item() == 1
    assert ones["odds_ratio"].item() == plain["odds_ratio"].item() > 0
    assert halves["odds_ratio"].item() == pytest.approx(plain["odds_ratio"].item() / 2)
    assert none["loss"].item() == plain["nll_loss"].item()


def test_values_of_pairs_and_sequences() -> None:
    objective: Objective = term("sum", token_sum, lambda batch: (mx.array(1.0), mx.array(batch.sequences)))
    assert objective(LOGPS, TWO)[0].item() == -5
