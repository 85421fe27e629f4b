"""What the tests of ranks share: runs in the process of the tests, and a teacher."""

import shutil

import mlx.core as mx
import pytest

from mlxlora.starter import model_path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The starter's model with other weights: a teacher that agrees with the student has gradients of rounding errors alone."""
    folder = shutil.copytree(model_path(), tmp_path_factory.mktemp("teacher") / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    noise = {name: mx.random.normal(w.shape, key=mx.random.key(i)) for i, (name, w) in enumerate(sorted(weights.items()))}
    moved = {name: (w + 0.3 * mx.std(w.astype(mx.float32)) * noise[name]).astype(w.dtype) for name, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), moved, {"format": "mlx"})
    return folder


@pytest.fixture
def alone(mlxlora, tmp_path, monkeypatch):
    """Runs command lines in this process, one after the other."""
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))

    def run(*runs):
        for arguments in runs:
            outcome = mlxlora(*arguments)
            assert outcome.code == 0, outcome.err

    return run
