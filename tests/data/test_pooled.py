"""Pooled metrics: however values are divided into batches, the result is that of all of them."""

import numpy as np
import pytest
from attrs import asdict

from mlxlora.data.pooled import Pooled, pooled, results

VALUES = np.random.default_rng(0).normal(3.0, 2.0, size=23)
WHOLE = {"mean": np.mean, "min": np.min, "max": np.max, "std": lambda values: np.std(values, ddof=1)}


@pytest.mark.parametrize("statistic", WHOLE)
@pytest.mark.parametrize("cuts", [[1], [5, 5, 9], [0, 22], list(range(1, 23))], ids=str)
def test_parts_of_any_size_give_the_statistic_of_the_whole(statistic, cuts):
    parts = [{"metric": Pooled.of(part, statistic)} for part in np.split(VALUES, cuts)]
    assert pooled(parts)["metric"].result == pytest.approx(WHOLE[statistic](VALUES), rel=1e-12)


@pytest.mark.parametrize("statistic", WHOLE)
def test_values_that_do_not_exist_count_in_nothing(statistic):
    nothing, something = Pooled.of([np.nan, np.nan], statistic), Pooled.of([2.0, np.nan, 4.0], statistic)
    assert nothing.result is None and results({"a": nothing}) == {}
    assert nothing + something == something + nothing == something
    assert something.result == pytest.approx(WHOLE[statistic](np.array([2.0, 4.0])))


def test_a_rate_pools_over_its_seconds():
    """100 tokens in 1 s and 100 tokens in 4 s are 200 tokens in 5 s."""
    assert (Pooled.mean(100.0, 1.0) + Pooled.mean(25.0, 4.0)).result == pytest.approx(40.0)


def test_one_value_has_no_spread():
    assert Pooled.of([5.0], "std").result == 0.0


def test_its_fields_are_all_that_has_to_be_stored():
    metric = Pooled.of(VALUES, "std")
    assert Pooled(**asdict(metric)) == metric


def test_batches_need_not_have_the_same_metrics():
    found = pooled([{"chosen": Pooled.mean(1.0, 2)}, {"rejected": Pooled.mean(-1.0)}, {"chosen": Pooled.mean(4.0)}])
    assert results(found) == {"chosen": 2.0, "rejected": -1.0}
