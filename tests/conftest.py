"""What every test may use: a fast BLAS before MLX is imported, the command line in this process, a model on disk, shared data."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from mlxlora.utils.blas import load_fast_blas
from tests.support.compiler import precompile_mlx_header
from tests.support.paths import SHARED, Outcome

os.environ.setdefault("MLXLORA_MEASURE", "off")  # no test depends on a clock; those of choices inject timings
load_fast_blas()  # before MLX is imported, which then resolves its matrix products
precompile_mlx_header()


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Path of something that is not part of the repository; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs {path}")
        return path

    return find


@pytest.fixture
def eager() -> Iterator[None]:
    """Without mx.compile, which on a CPU calls the C++ compiler for every new kernel."""
    import mlx.core as mx

    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def mlxlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`mlxlora("sft", "--iters", 3)`: the whole command line, without the price of a new process and of long answers."""
    from mlxlora_cli import main

    monkeypatch.setattr("mlxlora.training.answers.TOKENS", 4)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mlxlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return Outcome(int(stopped.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two blocks and a byte-level tokenizer, as files."""
    from mlxlora.models.initialize import init_model
    from tests.support.tiny import LLAMA, byte_tokenizer

    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_bytes(orjson.dumps(LLAMA | {"vocab_size": 288}))
    init_model(folder / "config.json", folder / "tokenizer", folder / "model", 0, "float32")
    return folder / "model"
