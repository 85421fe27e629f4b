"""What `mlxlora doctor` says, and where it says what to do."""

import sys
from pathlib import Path

import orjson
import pytest

from mlxlora.models import attention_choice
from mlxlora.utils import doctor
from mlxlora.utils.measured import Timing


def test_it_tells_everything(mlxlora) -> None:
    outcome = mlxlora("doctor", "--json")
    assert outcome.code == 0
    found = {finding["name"]: finding for finding in orjson.loads(outcome.out)}
    assert {"python", "mlx", "mlx-lm", "transformers", "device", "memory", "cache"} <= found.keys()
    assert ("BLAS" in found) == ("compiler" in found) == found["device"]["value"].startswith("cpu")
    assert all(finding["ok"] or finding["remedy"] for finding in found.values())


def test_lines_and_remedies(mlxlora, monkeypatch) -> None:
    findings = [doctor.Finding("device", "cpu"), doctor.Finding("BLAS", "slow", False, "install a fast one")]
    monkeypatch.setattr(doctor, "examine", lambda blas: findings)
    assert mlxlora("doctor").out == "device  cpu\nBLAS    slow\n        -> install a fast one\n"


def test_a_slow_blas_has_a_remedy(monkeypatch) -> None:
    monkeypatch.delenv("MLXLORA_BLAS", raising=False)
    for name in doctor.THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    slow = doctor.matrix_products(None, 7.0)
    assert not slow.ok and "7 GFLOP/s" in slow.value and "scipy-openblas32" in slow.remedy
    assert doctor.matrix_products("libopenblas.so.0", 200.0) == doctor.Finding("BLAS", "libopenblas.so.0: 200 GFLOP/s in float32")
    busy = doctor.matrix_products("libopenblas.so.0", 7.0)
    assert not busy.ok and busy.remedy == "a fast one is loaded: the machine is busy"
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert "OPENBLAS_NUM_THREADS=1 limits it: unset it" in doctor.matrix_products("libopenblas.so.0", 7.0).remedy
    assert "scipy-openblas32" in doctor.matrix_products(None, 7.0).remedy
    monkeypatch.setenv("MLXLORA_BLAS", "off")
    assert doctor.matrix_products(None, 7.0).remedy == "unset MLXLORA_BLAS"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "install" not in doctor.matrix_products(None, 7.0).remedy


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has a compiler")
def test_a_missing_compiler_has_a_remedy() -> None:
    assert "g++" in doctor.compiler(lambda _: None).remedy
    assert doctor.compiler(lambda _: "/usr/bin/g++") == doctor.Finding("compiler", "/usr/bin/g++")


def test_missing_packages_and_little_disk(monkeypatch, tmp_path: Path) -> None:
    assert doctor.versions(["nonesuch"])[1].remedy == "pip install nonesuch"
    assert doctor.extras({"nonesuch": "nothing"})[0].ok
    monkeypatch.setattr(doctor, "LITTLE_DISK", 1e18)
    assert "MLXLORA_CACHE" in doctor.disk(tmp_path / "not" / "there").remedy


def test_hub_variables() -> None:
    assert doctor.hub({"HF_HUB_OFFLINE": "1", "HOME": "/"}) == [doctor.Finding("HF_HUB_OFFLINE", "1")]


def test_memory_is_the_devices_where_it_says() -> None:
    assert doctor.memory({"memory_size": 8e9}).value == "8.0 GB"
    assert float(doctor.memory({}).value.split()[0]) > 0


def test_it_measures_the_machine(mlxlora, monkeypatch, tmp_path) -> None:
    """A line for each length and kind of row; a second time anew. Timings are injected."""
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path))
    for seconds, best in ((1e-3, "fused"), (3e-3, "chunked ")):
        times = {"fused": Timing(seconds, 10)}
        monkeypatch.setattr(attention_choice, "attention_timing", lambda way, *_, times=times: times.get(way, Timing(2e-3, 10)))
        lines = mlxlora("doctor", "--measure").out.splitlines()
        assert len(lines) == len(set(lines)) >= 9 and all(f": {best}" in line for line in lines)
        assert any("window 256" in line for line in lines) and any("packed" in line for line in lines)
