"""The notebook runs as it is, here for a few steps, and its cells are clean."""

import json
from pathlib import Path

import pytest

import mlxlora as ml

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_runs(tmp_path, monkeypatch, capsys, eager):
    """Every cell in order; the cells that train run twice, as people do."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in CODE:
        short = cell.replace("ITERS = 20", "ITERS = 2")
        for _ in range(2 if "runs/" in cell and "grpo" not in cell else 1):
            exec(compile(short, "notebook", "exec"), names)
    assert isinstance(names["run"], ml.RunResult) and len(names["losses"]) == names["ITERS"]
    assert names["rewarded"].history[-1]["rewards/brief/mean"] < 0
    assert len(names["sweep"]) == 4 and names["base"] is names["model"]
    assert "validation: [(0, " in capsys.readouterr().out
    pages = sorted(path.parent.name for path in tmp_path.rglob("report.html"))
    assert {"sft", "focal", "grpo", "sweep"} <= set(pages)


def test_it_holds_no_output():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])


def test_a_kernel_runs_it(tmp_path):
    """IPython itself: pictures that change while a run trains, and the page of the run that ends a cell."""
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace("ITERS = 20", "import mlx.core\nmlx.core.disable_compile()\nITERS = 2")
    client.NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    trained = [output for output in outputs[1] if output.output_type in ("display_data", "execute_result")]
    assert "step 2 of 2" in trained[0].data["text/html"] and trained[0].data["text/html"].count("<progress") == 1
    assert trained[-1].data["text/html"].startswith("<iframe srcdoc=") and len(trained) == 2
