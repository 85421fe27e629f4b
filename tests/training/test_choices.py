"""What a run measures on its machine: told, kept, equal after a resume. Timings are injected."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import orjson
import pytest

from benchmarks.small import build
from mlxlora.models import attention, attention_choice
from mlxlora.models.attention_choice import attention_shapes, attention_table, is_table
from mlxlora.models.attention_shapes import AttentionShape, using
from mlxlora.utils.measured import Measurements, Timing
from tests.support.tiny import text_rows

SHAPE = AttentionShape(4, 2, 16, 16, mx.float32)
pytestmark = pytest.mark.usefixtures("eager")


def timed(monkeypatch: pytest.MonkeyPatch, chunked: float, took: list[Any]) -> None:
    """Fused takes 1 ms, chunks of 64 take `chunked` ms, larger ones twice that."""

    def timing(way: str, shape: AttentionShape, length: int, rows: int) -> Timing:
        took.append((way, length, rows))
        return Timing(1e-3 * {"fused": 1.0, "chunked 64": chunked}.get(way, 2 * chunked), 1000)

    monkeypatch.setattr(attention_choice, "attention_timing", timing)


@pytest.mark.parametrize(("chunked", "way"), [(0.5, "chunked 64"), (2.0, "fused")])
def test_rows_attend_as_measured(chunked: float, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At lengths from 512 on, and beyond in chunks if the longest does. Other shapes and rows use the constants."""
    took: list[Any] = []
    timed(monkeypatch, chunked, took)
    told: list[str] = []
    table = attention_table({SHAPE}, 2048, 8, Measurements(tmp_path / "file.json", {}), told.append)
    assert table == {SHAPE.name: {"512": way, "1024": way, "2048": way}} and is_table(table)
    assert [(length, rows) for _, length, rows in took[::4]] == [(512, 1), (1024, 1), (2048, 1)]
    assert len(told) == 1 and f"rows of 2048: {way} (" in told[0] and "--attention" in told[0]
    with using("auto", table):
        assert all(attention.in_chunks(n, False, shape=SHAPE) == (way != "fused") for n in (400, 1280))
        assert attention.in_chunks(1 << 20, False, shape=SHAPE)
        assert attention.in_chunks(1 << 20, True, shape=SHAPE) == (way != "fused")
        assert not attention.in_chunks(300, False, shape=SHAPE)
        assert attention.in_chunks(2048, False, shape=SHAPE._replace(window=9)) and not attention.in_chunks(640, False)
    with using("chunked", table):
        assert attention.in_chunks(400, False, shape=SHAPE)


def test_a_slow_machine_measures_no_longer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 600.0, [])
    table = attention_table({SHAPE}, 4096, 8, Measurements(tmp_path / "file.json", {}), str)
    assert table == {SHAPE.name: {"512": "fused"}}


def test_shapes_are_read_off_the_model() -> None:
    assert attention_shapes(build("qwen3")) and not attention_shapes(build("mamba2"))
    (packed,) = attention_shapes(build("qwen3"), packed=True)
    assert packed.packed and {packed._replace(packed=False)} == attention_shapes(build("qwen3"))
    assert {shape.window for shape in attention_shapes(build("gemma3_text"))} > {None}


def test_the_two_ways_are_timed() -> None:
    """The real call, at a length that takes no time."""
    for shape in (SHAPE, SHAPE._replace(packed=True, window=8)):
        timings = [way() for way in attention_choice.attention_ways(shape, 64, 2).values()]
        assert all(timing.seconds > 0 and timing.bytes > 0 for timing in timings)


def test_a_run_keeps_its_choice(mlxlora: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once; in the checkpoint; a resumed run does not measure again, whatever the clock says by then."""
    monkeypatch.setenv("MLXLORA_MEASURE", "on")
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    used: list[str] = []
    chunks, took = attention.blockwise, []
    monkeypatch.setattr(attention, "blockwise", lambda *given: used.append(given[5]) or chunks(*given))
    (tmp_path / "rows").mkdir()
    data = text_rows(tmp_path / "rows", longest=500, train=2, valid=1)
    command = ("sft", "--model", model_folder, "--data", data, "--batch-size", 1, "--val-batches", 0, "--answers", 0)
    command += ("--save-every", 1, "--max-seq-length", 512, "--adapter-path", tmp_path / "run", "--num-layers", 1)
    timed(monkeypatch, 0.5, took)
    outcome = mlxlora(*command, "--iters", 1)
    assert outcome.code == 0 and "chunked 64 (0.5 ms, 0 MB; fused 1.0 ms" in outcome.out + outcome.err
    assert took and set(used) == {64}
    state = orjson.loads((tmp_path / "run/checkpoints/0000001/state.json").read_bytes())
    assert [set(rows.values()) for rows in state["rounding"][0]["choices"]["attention"].values()] == [{"chunked 64"}]
    took.clear(), used.clear()
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "another"))
    timed(monkeypatch, 2.0, took)
    assert mlxlora(*command, "--iters", 2, "--resume").code == 0
    assert set(used) == {64} and not took
    again = orjson.loads((tmp_path / "run/checkpoints/0000002/state.json").read_bytes())
    assert again["rounding"][0]["choices"] == state["rounding"][0]["choices"]
