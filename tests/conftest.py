"""What every test may use: a fast BLAS before MLX is imported, few rows in the starter, the command line in this process,
a model on disk, shared data.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import pytest
import typer.main

from mlxlora.utils.blas import load_fast_blas
from tests.support.compiler import precompile_mlx_header
from tests.support.paths import SHARED, Outcome
from tests.support.starter import with_few_rows


def pytest_collection_finish() -> None:
    """What the imports left stays: the collector, which a run calls many times, does not search it again."""
    gc.collect()
    gc.freeze()


os.environ.setdefault("MLXLORA_MEASURE", "off")  # no test depends on a clock; those of choices inject timings


def _commands_built_once() -> None:
    """Typer builds a command anew for every call, and pydantic what reads each of its options."""
    build, built = typer.main.get_command, {}

    def get_command(app: typer.Typer) -> Any:
        key = app.registered_callback, *(command.callback for command in app.registered_commands)
        if key not in built:
            built[key] = build(app)
        return built[key]

    typer.main.get_command = get_command


load_fast_blas()  # before MLX is imported, which then resolves its matrix products
precompile_mlx_header()
_STARTER = TemporaryDirectory(prefix="starter-")
with_few_rows(Path(_STARTER.name))
_commands_built_once()


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

    monkeypatch.setattr("mlxlora.training.answers.TOKENS", 2)

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
