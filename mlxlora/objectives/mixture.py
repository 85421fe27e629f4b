"""Weighted sums of losses, as the command line writes them: `0.8*sigmoid+0.2*bco_pair`."""

import math
import re
from collections.abc import Callable, Collection
from functools import reduce

from ..errors import InputError, choose
from .objective import NOTHING, Objective


def mixture(text: str, accepted: Collection[str], loss: Callable[[str], Objective]) -> Objective:
    """The sum that `text` writes.

    Args:
        text: weights and names, "0.8*sigmoid + 0.2*bco_pair + nll".
        accepted: the names.
        loss: name -> objective.

    Raises:
        InputError: see `parse_mixture`.
    """
    return reduce(lambda total, part: total + part[0] * loss(part[1]), parse_mixture(text, accepted), NOTHING)


def parse_mixture(text: str, accepted: Collection[str]) -> list[tuple[float, str]]:
    """Weights and names of a sum of losses.

    >>> parse_mixture("0.8*sigmoid + 0.2*bco_pair + nll", ["sigmoid", "bco_pair", "nll"])
    [(0.8, 'sigmoid'), (0.2, 'bco_pair'), (1.0, 'nll')]

    Raises:
        InputError: an unknown name, a weight that is not a number, or a name that occurs twice.
    """
    parts = [part.strip().rpartition("*") for part in re.split(r"(?<!\de)\+", text)]
    names = [name.strip() for *_, name in parts]
    for name in names:
        choose(dict.fromkeys(accepted), name, "loss-type")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--loss-type names {', '.join(twice)} twice in {text!r}; add up its weights")
    return [(_weight(weight, text) if star else 1.0, name) for (weight, star, _), name in zip(parts, names, strict=True)]


def _weight(number: str, text: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--loss-type wants number*name, got the weight {number.strip()!r} in {text!r}")
    return value
