"""Batches made in a thread are those made without one, and the thread ends with the run."""

import subprocess
import sys
import threading
import time
import traceback
from itertools import count, islice

import mlx.core as mx
import pytest

from mlxlora.data.batching import Order, example_batch, stream
from mlxlora.data.prefetch import prefetched
from tests.support.tiny import example


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_nothing_changes():
    examples = [example(seed) for seed in range(24)]
    order = Order(tuple(len(e.tokens) for e in examples), 4, seed=0)

    def micros():
        return islice(stream(examples, order, lambda items, _: example_batch(items)), 9)

    for plain, made in zip(micros(), prefetched(micros()), strict=True):
        assert plain.rows == made.rows
        for a, b in zip(plain.batch, made.batch, strict=True):
            assert (a is None and b is None) or mx.array_equal(a * 1, b * 1)  # arrays of the thread enter computations here
    assert not threads()


def test_no_more_than_asked_for_is_made_ahead():
    made = []
    items = prefetched((made.append(i) or i for i in range(100)), ahead=2)
    assert next(items) == 0
    time.sleep(0.2)
    assert len(made) <= 4  # one taken, two waiting, one in hand
    items.close()
    assert not threads()


def test_an_error_keeps_its_place_and_its_traceback():
    def broken():
        yield 1
        raise ZeroDivisionError("row 2")

    items = prefetched(broken())
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError, match="row 2") as caught:
        next(items)
    assert "broken" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not threads()


def test_the_thread_ends_where_the_items_are_forgotten():
    items = prefetched(count())
    assert next(items) == 0 and len(threads()) == 1
    del items
    assert not threads()


def test_the_program_ends():
    code = "from mlxlora.data.prefetch import prefetched\nkept = prefetched(iter(range(10**9)))\nprint(next(kept))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
