"""Rows from pandas, polars, pyarrow and datasets themselves; skipped where they are not installed, as stand-ins test the rest."""

import pytest

import mlxlora as ml
from mlxlora.data.memory import memory_splits
from mlxlora.errors import InputError

ROWS = [{"prompt": f"add {i} and 2.", "completion": str(i + 2)} for i in range(8)]
TALKS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": str(i)}]} for i in range(3)]
MAKERS = {
    "pandas": lambda package, rows: package.DataFrame(rows, index=[f"row {i}" for i in range(len(rows))]),
    "polars": lambda package, rows: package.DataFrame(rows),
    "pyarrow": lambda package, rows: package.Table.from_pylist(rows),
    "datasets": lambda package, rows: package.Dataset.from_list(rows),
}


def made(name, rows):
    return MAKERS[name](pytest.importorskip(name), rows)


@pytest.mark.parametrize("name", MAKERS)
def test_rows_are_those_of_a_list(name):
    for rows in (ROWS, TALKS, [{"prompt": "p", "answer": 3, "label": True}]):
        data = {"train": made(name, rows), "valid": made(name, rows[:1])}
        found = memory_splits(data)
        assert [row.fields for row in found["train"]] == rows and [row.fields for row in found["valid"]] == rows[:1]
        assert memory_splits(made(name, rows))["train"][-1].location == f"data[{len(rows) - 1}]"


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_missing_is_empty(name):
    rows = [*ROWS[:2], {"prompt": "p", "completion": None}]
    assert memory_splits(made(name, rows))["train"][2].fields == rows[2]


def test_what_is_read_once_is_one_line():
    datasets, polars = pytest.importorskip("datasets"), pytest.importorskip("polars")
    for data, remedy in (
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), r"list\(\.\.\.\) keeps what can be read once only"),
        (polars.DataFrame(ROWS).lazy(), r"\.collect\(\) makes a frame of it"),
    ):
        with pytest.raises(InputError, match=rf"^data must be rows: [^\n]*; {remedy}$"):
            memory_splits(data)


def test_splits_of_a_dataset_dict():
    datasets = pytest.importorskip("datasets")
    data = datasets.DatasetDict(train=made("datasets", ROWS), validation=made("datasets", ROWS[:2]))
    assert {name: len(rows) for name, rows in memory_splits(data).items()} == {"train": 8, "valid": 2}


def test_a_run_on_a_frame_and_its_history_as_one(model_folder, tmp_path, eager):
    pandas = pytest.importorskip("pandas")
    how = {"iters": 1, "batch_size": 2, "num_layers": 1, "quiet": True, "answers": 0, "model": model_folder}
    run = ml.sft(data=made("pandas", ROWS), adapter_path=tmp_path / "a", **how)
    frame = run.to_frame()
    assert isinstance(frame, pandas.DataFrame) and frame["loss"].tolist() == [row["loss"] for row in run.history]
    assert run.evaluate(made("pandas", ROWS))["loss"] == run.evaluate(ROWS)["loss"]
