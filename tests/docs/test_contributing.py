"""CONTRIBUTING.md: its method works as it stands, and the README's table is the table of methods."""

import importlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from mlxlora_cli.command import Command
from mlxlora_cli.train import training_command
from typer.testing import CliRunner

import mlxlora.methods
from mlxlora import objectives
from mlxlora.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
METHOD = TEXT.partition("## Add a method")[2].partition("\n## ")[0]
STEPS = [
    (match[0], code.partition("```")[0])
    for text, code in pairwise(METHOD.split("```python\n"))
    if (match := re.search(r"mlxlora/[\w/]+(?=\.py)", text.rpartition("```")[2]))
]
"""The module of each block, which the text before it names first, and its code."""


@pytest.fixture
def slic(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The row that the example makes, with its names where the text says they go."""
    names: dict[str, Any] = {}
    for module, code in STEPS:
        own = {**vars(importlib.import_module(module.replace("/", "."))), **names}
        before = set(own)
        exec(compile(code, "CONTRIBUTING.md", "exec"), own)
        names |= {name: own[name] for name in set(own) - before if not name.startswith("__")}
    monkeypatch.setattr(objectives, "slic", names["slic"], raising=False)
    monkeypatch.setitem(METHODS, "slic", names["SLIC"])
    monkeypatch.setattr(mlxlora.methods, "SLIC", names["SLIC"], raising=False)
    return names["SLIC"]


def test_the_example_is_short():
    assert [module.rpartition("/")[2] for module, _ in STEPS] == ["preference", "objective", "runs", "methods"]
    assert sum(len(code.strip().splitlines()) for _, code in STEPS) <= 25


def test_the_example_is_a_command(slic: Any, tmp_path: Path):
    app = typer.Typer()
    app.command("slic", cls=Command)(training_command(slic))
    app.command("other")(lambda: None)
    shown = CliRunner().invoke(app, ["slic", "--help"]).output
    assert slic.help in " ".join(shown.split()) and "--delta" in shown and "--nll-weight" in shown
    few = ["--iters", "2", "--val-batches", "0", "--answers", "0", "--delta", "2", "--adapter-path", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["slic", *few], catch_exceptions=False)
    assert done.exit_code == 0 and (tmp_path / "run" / "adapters.safetensors").is_file()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "sequence likelihood calibration (SLiC)" in card and "`delta` | `2.0`" in card
    assert "method: slic" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")


def test_the_example_is_previewed(slic: Any):
    from mlxlora import starter
    from mlxlora.config.options import BaseOptions
    from mlxlora.models.loading import load_tokenizer

    found = slic.preview(load_tokenizer(BaseOptions(model=str(starter.model_path()))), data=str(starter.data_path("slic")))
    assert found.splits["train"].items


def test_the_files_of_the_tables_exist():
    paths = re.findall(r"`((?:mlxlora|cli|docs|tests|examples)/[\w./-]*)`", TEXT)
    assert len(paths) > 15 and all((ROOT / path).exists() for path in paths), [p for p in paths if not (ROOT / p).exists()]


def test_the_readme_lists_the_methods():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `mlxlora ([\w-]+)` \|", readme, re.MULTILINE) == list(METHODS)
