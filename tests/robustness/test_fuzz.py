"""A sample of fuzz.py, and that it finds what it looks for."""

import random
import time

import pytest
from hypothesis import strategies as st

from mlxlora.errors import InputError
from tests.robustness import fuzz

CASES = {"rows": 2000, "yaml": 1000, "adapters": 400, "safetensors": 3000, "templates": 300, "rewards": 1500}
CASES |= {"paths": 1500, "links": 800, "models": 800, "numbers": 2000, "text": 300, "runs": 300, "checkpoints": 200}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_a_sample(name, folder):
    tally = fuzz.fuzz(name, CASES[name], 0, folder)
    assert tally.cases == CASES[name] and not tally.examples, tally.examples
    assert tally.accepted > CASES[name] / 50 and (tally.refused > CASES[name] / 50 or name == "text")  # any text prints


def lost(_folder, _case):
    raise KeyError("x")


def endless(_folder, _case):
    while True:
        pass


def half(folder, _case):
    (folder / "x.tmp").touch()
    raise InputError("--data is wrong")


def unclear(folder, _case):
    raise InputError(f"{folder}\nis wrong")


def nowhere(_folder, _case):
    raise InputError("this is wrong")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lost, "KeyError at ?: 'x'"),
        (endless, "hang"),
        (half, "left x.tmp"),
        (unclear, "unclear message of"),
        (nowhere, "message names no file: this is wrong"),
    ],
)
def test_it_finds(call, told, folder, monkeypatch):
    monkeypatch.setattr(fuzz, "LIMIT", 0.2)
    tally = fuzz.Tally()
    target = fuzz.Target(lambda rng: rng.random(), st.just(0), call)
    began = time.monotonic()
    assert (fuzz.attempt(target, folder, 0, tally) or "").startswith(told)
    assert time.monotonic() - began < 5 and tally.examples and not list(folder.iterdir())


def test_the_same_seed_makes_the_same_cases():
    for name, make in fuzz.TARGETS.items():
        first, second = ([make().make(rng) for _ in range(20)] for rng in (random.Random(3), random.Random(3)))
        assert first == second, name
