"""A metric that can be pooled: over micro-batches, over steps, over batches of a split."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from attrs import frozen
from numpy.typing import ArrayLike

Statistic = Literal["mean", "min", "max", "std"]


@frozen
class Pooled:
    """One statistic of a set of values; `a + b` is the statistic of the values of both.

    Without values it has no result, and a batch without values changes nothing that it is added to.

    Attributes:
        statistic: what is reported of the values.
        count: how many values there are, or the sum of their weights.
        value: their mean, for "min" and "max" the smallest and the largest.
        squares: Σ (x - mean)², which "std" needs.

    >>> (Pooled.of([1, 2]) + Pooled.of([6]) + Pooled.of([])).result
    3.0
    >>> (Pooled.of([4, 2], "min") + Pooled.of([3], "min")).result
    2.0
    >>> (Pooled.of([1, 3], "std") + Pooled.of([5], "std")).result
    2.0
    >>> Pooled.of([float("nan")]).result is None
    True
    """

    statistic: Statistic
    count: float = 0.0
    value: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: ArrayLike, statistic: Statistic = "mean") -> "Pooled":
        """The statistic of an array of any shape; NaN marks values that do not exist, such as rewards that are None."""
        flat = np.asarray(values, np.float64).reshape(-1)
        flat = flat[~np.isnan(flat)]
        if not flat.size:
            return cls(statistic)
        value = float({"min": np.min, "max": np.max}.get(statistic, np.mean)(flat))
        squares = float(np.square(flat - value).sum()) if statistic == "std" else 0.0
        return cls(statistic, float(flat.size), value, squares)

    @classmethod
    def mean(cls, value: float, count: float = 1.0) -> "Pooled":
        """A mean of `count` values that is known already, or a rate: rates per second pool with seconds as their count."""
        return cls("mean", float(count), float(value))

    def __add__(self, other: "Pooled") -> "Pooled":
        if not (self.count and other.count):
            return other if other.count else self
        count = self.count + other.count
        if self.statistic in ("min", "max"):
            return Pooled(self.statistic, count, (min if self.statistic == "min" else max)(self.value, other.value))
        share, apart = other.count / count, other.value - self.value
        squares = self.squares + other.squares + apart * apart * self.count * share
        mean = (self.value * self.count + other.value * other.count) / count
        return Pooled(self.statistic, count, mean, squares if self.statistic == "std" else 0.0)

    @property
    def result(self) -> float | None:
        """The statistic, None without values; "std" divides by n - 1, and is 0 for one value."""
        if not self.count:
            return None
        if self.statistic == "std":
            return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return self.value


def pooled(metrics: Iterable[Mapping[str, Pooled]]) -> dict[str, Pooled]:
    """The metrics of several batches as one; a batch need not have all of them.

    >>> results(pooled([{"a": Pooled.of([1])}, {"a": Pooled.of([3]), "b": Pooled.of([5])}]))
    {'a': 2.0, 'b': 5.0}
    """
    found: dict[str, Pooled] = {}
    for batch in metrics:
        for name, metric in batch.items():
            found[name] = found[name] + metric if name in found else metric
    return found


def results(metrics: Mapping[str, Pooled]) -> dict[str, float]:
    """What there is to report: metrics without values are left out."""
    return {name: metric.result for name, metric in metrics.items() if metric.result is not None}
