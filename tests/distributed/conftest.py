"""Runs in the process of the tests, to compare with those of ranks."""

import pytest


@pytest.fixture
def alone(mlxlora, tmp_path, monkeypatch):
    """Runs command lines in this process, one after the other."""
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))

    def run(*runs):
        for arguments in runs:
            outcome = mlxlora(*arguments)
            assert outcome.code == 0, outcome.err

    return run
