"""Pair losses and scores: values computed by hand, and what each loss is invariant to."""

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlora.objectives import losses
from mlxlora.objectives.links import js_link, power
from mlxlora.objectives.losses import PairLoss
from mlxlora.objectives.numerics import log1mexp, safe_exp, safe_expm1
from mlxlora.objectives.scores import (
    length_desensitized,
    log_ratio,
    mean_log_ratio,
    per_token,
    sorted_differences,
    sorted_halves,
    sum_logps,
    transformed,
)
from tests.support.random_batches import build, rows

quick = settings(deadline=None, max_examples=50)
scores = st.floats(-30, 30, width=32)


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ls(x: float) -> float:
    return math.log(s(x))


# c = 2, r = -1, so that c - r = 3 and, with beta = 0.5, z = 1.5, βc = 1, βr = -0.5
BY_HAND: dict[str, tuple[PairLoss, float]] = {
    "sigmoid": (losses.sigmoid(beta=0.5), 0.2014132779827524),
    "sigmoid, smoothed": (losses.sigmoid(beta=0.5, label_smoothing=0.1), 0.9 * 0.2014132779827524 + 0.1 * 1.7014132779827524),
    "sigmoid, margin": (losses.sigmoid(beta=0.5, margin=1.5), math.log(2)),
    "hinge, met": (losses.hinge(beta=0.5), 0.0),
    "hinge, margin": (losses.hinge(beta=0.5, margin=2.0), 0.5),
    "ipo": (losses.ipo(beta=0.5), 4.0),
    "dpop": (losses.dpop(beta=0.5), 0.2014132779827524),  # c > 0: no penalty
    "robust": (losses.robust(beta=0.5, label_smoothing=0.1), (0.9 * 0.2014132779827524 - 0.1 * 1.7014132779827524) / 0.8),
    "exo_pair": (
        losses.exo_pair(beta=0.5, label_smoothing=0.1),
        s(1.5) * (ls(1.5) - math.log(0.9)) + s(-1.5) * (ls(-1.5) - math.log(0.1)),
    ),
    "nca_pair": (losses.nca_pair(beta=0.5), -ls(1) - 0.5 * ls(-1) - 0.5 * ls(0.5)),
    "bco_pair": (losses.bco_pair(beta=0.5), 0.31326168751822286 + 0.4740769841801067),
    "sppo_hard": (losses.sppo_hard(beta=0.5), 1.0),
    "apo_zero": (losses.apo_zero(beta=0.5), 1 - 0.7310585786300049 + 0.3775406687981454),
    "apo_down": (losses.apo_down(beta=0.5), 0.7310585786300049 + 1 - 0.8175744761936437),
    "discopop": (losses.discopop(beta=0.5, tau=0.5), 0.2014132779827524 * (1 - s(3)) + math.exp(-1.5) * s(3)),
}


@pytest.mark.parametrize(("loss", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_by_hand(loss: PairLoss, expected: float) -> None:
    assert loss(mx.array([2.0]), mx.array([-1.0])).item() == pytest.approx(expected, rel=1e-6)


def test_dpop_penalises_inside() -> None:
    loss = losses.dpop(beta=0.5, penalty=2.0)(mx.array(-1.0), mx.array(-4.0))
    assert loss.item() == pytest.approx(-ls(0.5 * (3 - 2 * 1)), rel=1e-6)


def test_dpop_starts_without_a_penalty() -> None:
    """At the reference c = 0, a kink: the subgradient is 0, so training starts as DPO does."""
    at = mx.array(0.0), mx.array(0.0)
    assert mx.grad(losses.dpop(beta=0.1))(*at).item() == mx.grad(losses.sigmoid(beta=0.1))(*at).item()


OF_THE_DIFFERENCE = ["sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop"]


@pytest.mark.parametrize("name", OF_THE_DIFFERENCE)
@given(c=scores, r=scores, shift=st.floats(-5, 5, width=32))
@quick
def test_only_the_difference_matters(name: str, c: float, r: float, shift: float) -> None:
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    loss = getattr(losses, name)(beta=0.3, **smoothing)
    moved = loss(mx.array(c + shift), mx.array(r + shift)).item()
    np.testing.assert_allclose(moved, loss(mx.array(c), mx.array(r)).item(), rtol=1e-4, atol=1e-4)


@given(c=scores, r=scores, smoothing=st.floats(0, 0.49))
@quick
def test_smoothing_is_a_mixture_of_both_labels(c: float, r: float, smoothing: float) -> None:
    mixed = losses.sigmoid(beta=0.2, label_smoothing=smoothing)(mx.array(c), mx.array(r)).item()
    plain = losses.sigmoid(beta=0.2)
    expected = (1 - smoothing) * plain(mx.array(c), mx.array(r)).item() + smoothing * plain(mx.array(r), mx.array(c)).item()
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)


@given(c=scores, r=scores)
@quick
def test_robust_is_unbiased(c: float, r: float) -> None:
    """Its mean under flipped labels is the loss of clean ones (Chowdhury et al., lemma 3.1)."""
    robust, plain = losses.robust(beta=0.2, label_smoothing=0.2), losses.sigmoid(beta=0.2)
    flipped = 0.8 * robust(mx.array(c), mx.array(r)).item() + 0.2 * robust(mx.array(r), mx.array(c)).item()
    np.testing.assert_allclose(flipped, plain(mx.array(c), mx.array(r)).item(), rtol=1e-4, atol=1e-5)


@given(c=scores, r=scores)
@quick
def test_exo_is_a_divergence(c: float, r: float) -> None:
    assert losses.exo_pair(beta=0.2, label_smoothing=0.1)(mx.array(c), mx.array(r)).item() >= -1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.exo_pair(beta=0.1, label_smoothing=0.0), r"exo_pair needs label_smoothing > 0, got 0.0"),
        (lambda: losses.robust(beta=0.1, label_smoothing=0.5), r"must be in \[0, 0.5\), got 0.5"),
        (lambda: losses.sigmoid(beta=0.1, label_smoothing=-0.1), r"must be in \[0, 0.5\), got -0.1"),
        (lambda: losses.ipo(beta=0.0), "beta must be > 0, got 0.0"),
        (lambda: losses.sppo_hard(beta=-1.0), "beta must be > 0, got -1.0"),
        (lambda: losses.discopop(beta=0.1, tau=2.0), "needs 0 < tau <= 1, got 2.0"),
    ],
)
def test_bad_values_are_named(make: Callable[[], PairLoss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- scores -------------------------------------------------------------------------------------


@given(x=st.floats(-80, -(2.0**-20), width=32))
@quick
def test_log1mexp(x: float) -> None:
    exact = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    np.testing.assert_allclose(log1mexp(mx.array(x)).item(), exact, rtol=1e-5, atol=1e-35)


@given(x=st.floats(-19, 19, width=32))
@quick
def test_safe_exponentials_are_exponentials(x: float) -> None:
    np.testing.assert_allclose(safe_exp(mx.array(x)).item(), math.exp(x), rtol=1e-5)
    np.testing.assert_allclose(safe_expm1(mx.array(x)).item(), math.expm1(x), rtol=1e-5)


@given(x=st.floats(20, 1e5, width=32), function=st.sampled_from([safe_exp, safe_expm1]))
@quick
def test_safe_exponentials_go_on_as_tangents(x: float, function: Callable[[mx.array], mx.array]) -> None:
    np.testing.assert_allclose(function(mx.array(x)).item(), math.exp(20) * (1 + x - 20), rtol=1e-5)
    np.testing.assert_allclose(mx.grad(function)(mx.array(x + 1)).item(), math.exp(20), rtol=1e-5)


def test_divergences_by_hand() -> None:
    at = mx.array([math.log(2.0)])
    assert power(0.0)(at).item() == pytest.approx(math.log(2))  # reverse KL: f'(t) = log t
    assert power(-1.0)(at).item() == pytest.approx(0.5)  # forward KL: 1 - 1/t
    assert power(1.0)(at).item() == pytest.approx(1.0)  # t - 1
    assert power(-0.5)(at).item() == pytest.approx(2 - math.sqrt(2))  # α = ½: (t^-½ - 1)/-½
    assert js_link(at).item() == pytest.approx(math.log(4 / 3))  # log 2t/(1 + t)
    for link in (power(0.0), power(-1.0), power(0.7), js_link):
        assert link(mx.array(0.0)).item() == pytest.approx(0, abs=1e-6)
        assert mx.grad(link)(mx.array(0.0)).item() == pytest.approx(0.5 if link is js_link else 1)


def test_a_mean_is_a_sum_per_token() -> None:
    logps, batch = build(rows(0))
    np.testing.assert_allclose(per_token(log_ratio)(logps, batch), mean_log_ratio(logps, batch), rtol=1e-6)
    assert per_token(log_ratio).needs == log_ratio.needs == {"ref_logps"}


def test_length_desensitized_cuts_at_the_shorter_completion() -> None:
    given_rows = rows(3, pairs=2, longest=6)
    logps, batch = build(given_rows)
    none, all_, half = (length_desensitized(sum_logps, alpha=a)(logps, batch) for a in (0.0, 1.0, 0.5))
    completions = [row.columns["logps"][~row.prompt] for row in given_rows]
    for place in range(4):
        shared = min(len(completions[place]), len(completions[(place + 2) % 4]))
        assert none[place].item() == pytest.approx(completions[place][:shared].sum(), rel=1e-5)
    np.testing.assert_allclose(all_, sum_logps(logps, batch), rtol=1e-6)
    np.testing.assert_allclose(half, (none + all_) / 2, rtol=1e-6)


def test_sorted_scores() -> None:
    logps, batch = build(rows(4))
    c, r = np.split(np.array(log_ratio(logps, batch)), 2)
    np.testing.assert_array_equal(sorted_halves(log_ratio)(logps, batch), np.concatenate([np.sort(c), np.sort(r)]))
    c, r = np.split(np.array(sum_logps(logps, batch)), 2)
    np.testing.assert_array_equal(sorted_differences(logps, batch)[:3], np.sort(c - r))


def test_transforming_by_nothing_changes_nothing() -> None:
    logps, batch = build(rows(5))
    np.testing.assert_array_equal(transformed(log_ratio, power(0.0))(logps, batch), log_ratio(logps, batch))
