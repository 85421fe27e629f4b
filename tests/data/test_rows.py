"""Files, folders and hub data sets become rows, or an error that names file and line."""

import gzip
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlora.data.rows import Row, read_rows, read_splits, split_off
from mlxlora.errors import InputError


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_skips_blank_lines_and_keeps_line_numbers(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": "\xc3\xa9"}')
    assert [(r.fields["text"], r.line) for r in read_rows(path)] == [("a", 1), ("é", 4)]
    assert read_rows(path)[1].location == f"{path}:4"


def test_json_list_counts_rows_as_lines(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.json", b'[{"text": "a"},\n{"text": "b"}]'))
    assert [(r.fields["text"], r.line) for r in rows] == [("a", 1), ("b", 2)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": NaN}\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"a": 1e999}\n', "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"a": 1\n', "one JSON object per line"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl:1: not UTF-8"),
        ("a.jsonl", b"\n[1, 2]\n", "a.jsonl:2: a row must be a JSON object, got list [1, 2]"),
        ("a.jsonl", b"\n \n", "a.jsonl: no rows"),
        ("a.jsonl", b"", "a.jsonl: no rows"),
        ("a.json", b"", "a.json: no rows"),
        ("a.json", b"[]", "a.json: no rows"),
        ("a.json", b'{"a": 1}', "a.json:1: must be a list of objects, got dict"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "as .jsonl"),
        ("a.json", b"[{}, 3]", "a.json:2: a row must be a JSON object, got int 3"),
        ("a.csv", b"a,b", "a.csv: unknown kind of file"),
    ],
)
def test_broken_files_name_place_value_and_remedy(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as raised:
        read_rows(path)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_broken_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    for content in (b"plain text", whole[:-12]):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.jsonl\.gz: cannot be read"):
            read_rows(path)


@given(st.binary(max_size=60))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_rows_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name in ("any.jsonl", "any.json"):
        try:
            rows = read_rows(write(folder / name, content))
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert rows


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", b'{"text": "a"}')
    assert list(read_splits(tmp_path)) == ["train"]
    write(tmp_path / "valid.jsonl", b'{"text": "b"}')
    write(tmp_path / "test.jsonl", b'{"text": "c"}')
    assert {split: rows[0].fields["text"] for split, rows in read_splits(str(tmp_path)).items()} == {
        "train": "a",
        "valid": "b",
        "test": "c",
    }
    assert list(read_splits(tmp_path / "test.jsonl")) == ["train"]


def test_folder_without_training_rows_lists_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no train\.jsonl in this folder; found nothing"):
        read_splits(tmp_path)
    write(tmp_path / "valid.jsonl", b'{"text": "b"}')
    with pytest.raises(InputError, match=r"found valid\.jsonl"):
        read_splits(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/x", "data/train.jsonl", "a/b/c", "/nowhere/x"])
def test_what_cannot_be_a_hub_name_is_a_missing_file(name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_splits(name)


def test_hub_name_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'mlxlora\[datasets\]'"):
        read_splits("org/name")


def fake_datasets(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict]]) -> list[tuple]:
    asked: list[tuple] = []

    def load(*name: str) -> dict[str, list[dict]]:
        asked.append(name)
        if not splits:
            raise ValueError("Dataset doesn't exist\non the hub")
        return splits

    module = ModuleType("datasets")
    module.load_dataset = module.load_from_disk = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize("valid", ["valid", "validation", "dev"])
def test_hub_splits(monkeypatch: pytest.MonkeyPatch, valid: str) -> None:
    asked = fake_datasets(monkeypatch, {"train": [{"text": "a"}], valid: [{"text": "b"}]})
    splits = read_splits("org/name:main")
    assert asked == [("org/name", "main")]
    assert {split: rows[0].fields["text"] for split, rows in splits.items()} == {"train": "a", "valid": "b"}
    assert splits["valid"][0].location == "org/name:main[valid]:1"


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, {})
    with pytest.raises(InputError, match="org/name: cannot be loaded: Dataset doesn't exist on the hub"):
        read_splits("org/name")
    fake_datasets(monkeypatch, {"test": [{}]})
    with pytest.raises(InputError, match="no train split; found test"):
        read_splits("org/name")


def test_folder_that_only_datasets_can_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", b"PAR1")
    asked = fake_datasets(monkeypatch, {"train": [{"text": "a"}]})
    assert read_splits(tmp_path)["train"][0].fields == {"text": "a"}
    assert asked == [(str(tmp_path),)]


@given(st.integers(2, 60), st.floats(0, 1), st.integers(0, 10))
@settings(deadline=None, max_examples=100)
def test_split_off_parts_the_rows(count: int, fraction: float, seed: int) -> None:
    rows = [Row({}, "a.jsonl", line) for line in range(1, count + 1)]
    train, valid = split_off(rows, fraction, seed)
    assert train and valid
    assert sorted(r.line for r in train + valid) == list(range(1, count + 1))
    assert abs(len(valid) - fraction * count) <= 1
    assert split_off(rows, fraction, seed) == (train, valid)
    assert [r.line for r in train] == sorted(r.line for r in train)


def test_split_off_needs_two_rows() -> None:
    with pytest.raises(InputError, match="at least 2 rows"):
        split_off([Row({}, "a.jsonl", 1)], 0.5, 0)


def test_nulls_that_arrow_adds_to_objects_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that the rewards read stay as they are."""
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC", "city": None}}}
    filled = {
        "messages": [
            {"role": "user", "content": "go", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "chosen": {"messages": [{"from": "gpt", "value": "a", "weight": None}]},
        "tools": [{"name": "now", "parameters": {"properties": {"zone": {"type": "string"}, "city": None}}}],
        "info": {"answer": None},
        "text": None,
    }
    fake_datasets(monkeypatch, {"train": [filled]})
    fields = read_splits("org/name")["train"][0].fields
    assert fields == {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}]},
        ],
        "chosen": {"messages": [{"from": "gpt", "value": "a"}]},
        "tools": [{"name": "now", "parameters": {"properties": {"zone": {"type": "string"}}}}],
        "info": {"answer": None},
        "text": None,
    }


def test_slices_of_a_local_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", b"PAR1")
    asked = fake_datasets(monkeypatch, {})
    sys.modules["datasets"].load_dataset = lambda name, split: asked.append((name, split)) or [{"text": split}]  # type: ignore[attr-defined]
    splits = read_splits(tmp_path, {"train": "train[:3]", "valid": "train[3:]"})
    assert {name: rows[0].fields for name, rows in splits.items()} == {
        "train": {"text": "train[:3]"},
        "valid": {"text": "train[3:]"},
    }
    assert asked == [(str(tmp_path), "train[:3]"), (str(tmp_path), "train[3:]")]


def test_slices_of_jsonl_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", b'{"text": "a"}')
    for data in (file, tmp_path):
        with pytest.raises(InputError, match="--train-split is for hub data sets"):
            read_splits(data, {"train": "train[:1]"})


def test_slices_of_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the datasets package")
    for name, count in (("train", 10), ("test", 5)):
        write(tmp_path / f"{name}.jsonl", b"".join(b'{"text": "%d"}\n' % i for i in range(count)))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    loaded = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(tmp_path / "all")
    loaded["train"].save_to_disk(tmp_path / "one")
    for folder in ("all", "one"):
        splits = read_splits(tmp_path / folder, {"train": "train[2:4]+train[90%:]"})
        assert [row.fields["text"] for row in splits["train"]] == ["2", "3", "9"] and list(splits) == ["train"]
        assert len(read_splits(tmp_path / folder)["train"]) == 10
        with pytest.raises(InputError, match='Unknown split "nope"'):
            read_splits(tmp_path / folder, {"train": "nope[:3]"})


def test_nulls_of_a_parquet_file(tmp_path: Path) -> None:
    """Rows from Parquet are those of the same rows as JSONL."""
    pytest.importorskip("datasets", reason="needs the datasets package")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}]}
        for name, arguments in (("now", {"zone": "UTC"}), ("rain", {"city": "Oslo", "days": 2}))
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert [row.fields for row in read_splits(tmp_path)["train"]] == rows
