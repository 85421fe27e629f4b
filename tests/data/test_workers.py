"""What processes make is what one makes, in the same order, errors included."""

import math
import os
import signal
from collections.abc import Iterator

import pytest

from mlxlora.data import workers
from mlxlora.data.workers import mapped


def test_the_results_are_those_of_one_process() -> None:
    """Also where a worker fails: this process meets the same value again, and raises what it raises."""
    made = mapped(math.sqrt, iter([4.0, 9.0, *map(float, range(40)), -1.0, 4.0]), 2)
    assert [next(made) for _ in range(42)] == [2.0, 3.0, *map(math.sqrt, range(40))]
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        next(made)


def test_what_cannot_be_sent_is_made_here() -> None:
    assert list(mapped(lambda value: value + 1, [1, 2], 2)) == [2, 3]


def test_killed_workers_lose_nothing() -> None:
    """And no worker outlives its caller, whatever ends it."""
    found: list[workers._Worker] = []

    class Seen(workers._Worker):
        def __init__(self, make: bytes) -> None:
            super().__init__(make)
            found.append(self)

    def numbers() -> Iterator[int]:
        for number in range(30):
            if number == 9:
                os.kill(found[0]._child.process.pid, signal.SIGKILL)
            yield number

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_Worker", Seen)
        assert list(mapped(str, numbers(), 2)) == [str(number) for number in range(30)]
        unfinished = mapped(str, iter(range(30)), 1 + 1)
        assert next(unfinished) == "0"
        unfinished.close()
    assert len(found) == 4 and all(worker._child.process.returncode is not None for worker in found)
