"""Measured choices: the rule, and answers that are kept on disk."""

from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from mlxlora.utils import measured
from mlxlora.utils.measured import Measurement, Timing, measurements


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The alternatives that were timed; the folder of answers is empty."""
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path))
    yield []


def ways(asked: list[str], **timings: float):
    """Alternatives with injected times."""

    def timed(name: str, seconds: float) -> Timing:
        asked.append(name)
        if seconds < 0:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return Timing(seconds, 10)

    return {name: lambda name=name, seconds=seconds: timed(name, seconds) for name, seconds in timings.items()}


@pytest.mark.parametrize(
    ("fused", "chunked", "best"),
    [
        ((1.0, 100), (1.2, 1), "fused"),  # 5 % of time is worth any memory
        ((1.0, 100), (1.04, 1), "chunked"),  # less is not
        ((1.04, 1), (1.0, 100), "fused"),
        ((1.0, 10), (0.9, 20), "chunked"),
        ((1.0, 10), (0.99, 10), "chunked"),  # alike in memory
    ],
)
def test_the_rule(fused: tuple[float, int], chunked: tuple[float, int], best: str) -> None:
    assert Measurement({"fused": Timing(*fused), "chunked": Timing(*chunked)}).best == best


def test_an_answer_is_measured_once(asked: list[str]) -> None:
    found = measurements().of("key", ways(asked, a=2.0, b=1.0))
    assert found is not None and found.best == "b" and asked == ["a", "b"]
    assert measurements().of("key", ways(asked, a=1.0, b=2.0)) == found and asked == ["a", "b"]
    assert measurements().of("other", ways(asked, a=1.0, b=2.0)).best == "a"  # type: ignore[union-attr]
    assert len(measurements().known) == 2
    assert measurements().of("key", ways(asked, a=1.0, b=2.0), again=True).best == "a"  # type: ignore[union-attr]
    assert measurements().known["key"].best == "a"


def test_what_runs_out_of_memory_is_no_alternative(asked: list[str]) -> None:
    assert measurements().of("key", ways(asked, a=-1.0, b=1.0)).best == "b"  # type: ignore[union-attr]
    assert measurements().of("none", ways(asked, a=-1.0, b=-1.0)) is None
    assert "none" not in measurements().known


def test_damaged_and_foreign_files_are_ignored(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measurements().of("key", ways(asked, a=2.0))
    path = measurements().path
    good = path.read_bytes()
    content = orjson.loads(good)
    damaged = [b"", b"[]", good[:-9], orjson.dumps({**content, "machine": {"device": "another"}})]
    damaged += [orjson.dumps({**content, "measured": {"key": value}}) for value in ({}, {"a": [0, 1]}, {"a": 1}, {"a": ["x", 1]})]
    for bad in damaged:
        path.write_bytes(bad)
        assert not measurements().known
    path.write_bytes(good)
    assert measurements().known
    monkeypatch.setattr(measured, "package_version", lambda name: "another")
    assert measurements().path != path and not measurements().known


def test_a_folder_that_cannot_be_written_keeps_nothing(asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "measured").write_text("a file")
    assert measurements().of("key", ways(asked, a=2.0)).best == "a"  # type: ignore[union-attr]
    assert not measurements().known
