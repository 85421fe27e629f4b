"""Rows that Python passes: lists, splits, data sets and frames train as the same rows in a file do."""

import math

import numpy as np
import orjson
import pytest

import mlxlora as ml
from mlxlora.data.memory import memory_splits
from mlxlora.errors import InputError
from mlxlora.training.run_folder import read_settings

ROWS = [{"prompt": f"add {i} and 2.", "completion": str(i + 2)} for i in range(12)]
FAST = {"iters": 3, "batch_size": 2, "num_layers": 1, "quiet": True, "answers": 0, "learning_rate": 1e-2}


class Frame:
    """What pandas' frames have."""

    def __init__(self, rows):
        self.rows, self.columns = rows, list(rows[0])

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, orient="dict"):
        assert orient == "records"
        return self.rows


class Polars(Frame):
    def to_dicts(self):
        return self.rows

    to_dict = None


class Arrow(Frame):
    def to_pylist(self):
        return self.rows

    to_dict = None


class DatasetDict(dict):
    """A dictionary of splits, as `datasets` has it."""


def fields(data):
    return {split: [row.fields for row in rows] for split, rows in memory_splits(data).items()}


@pytest.mark.parametrize("kind", [list, tuple, Frame, Polars, Arrow, lambda rows: {"train": rows}, lambda r: DatasetDict(train=r)])
def test_every_container_of_rows(kind):
    assert fields(kind(ROWS)) == {"train": ROWS}


def test_splits_have_their_usual_names():
    data = {"train": ROWS, "validation": ROWS[:2], "test": Frame(ROWS[2:3])}
    assert fields(data) == {"train": ROWS, "valid": ROWS[:2], "test": ROWS[2:3]}
    assert memory_splits(data)["valid"][1].location == "data['validation'][1]"


def test_values_of_frames_become_values_of_json():
    row = {"prompt": "p", "answer": np.int64(3), "score": np.float32(0.5), "none": math.nan, "many": np.array([1, 2]), 7: ("a",)}
    assert fields([row])["train"] == [{"prompt": "p", "answer": 3, "score": 0.5, "none": None, "many": [1, 2], "7": ["a"]}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"text": "a"}, 3], r"^data\[1\]: a row must be a dictionary, got int 3$"),
        (["a"], r"^data\[0\]: a row must be a dictionary, got str 'a'; write \{'text': \.\.\.\} for plain text$"),
        ([], r"^data has no rows; pass at least one$"),
        (iter(ROWS), r"^data must be rows: .* got list_iterator .*; list\(\.\.\.\) keeps what can be read once only$"),
        (3, r"^data must be rows: a list of dictionaries, .* got int 3$"),
        ({"prompt": ["a"]}, r"^data: a dictionary has rows by split \(train, .*\), got prompt; pass rows as a list"),
        ({"valid": ROWS}, r"^data: no train split; found valid$"),
        ({"train": [3]}, r"^data\['train'\]\[0\]: a row must be"),
    ],
)
def test_what_is_not_rows(data, message):
    with pytest.raises(InputError, match=message):
        memory_splits(data)


def test_training_equals_that_on_a_file(model_folder, tmp_path, mlxlora):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(map(orjson.dumps, ROWS)))
    found = {}
    for name, data in (("file", file), ("list", ROWS), ("frame", Frame(ROWS))):
        ml.sft(model=model_folder, data=data, adapter_path=tmp_path / name, valid_fraction=0.2, **FAST)
        found[name] = (tmp_path / name / "adapters.safetensors").read_bytes()
    assert found["file"] == found["list"] == found["frame"]
    stored = read_settings(tmp_path / "list" / "config.yaml")["data"]
    assert stored.startswith("12 rows (given in Python, ")
    ml.sft(model=model_folder, data=ROWS, adapter_path=tmp_path / "list", valid_fraction=0.2, resume=True, **FAST)
    with pytest.raises(InputError, match=r"--resume: data was '12 rows \(given in Python, .*' and is '11 rows"):
        ml.sft(model=model_folder, data=ROWS[1:], adapter_path=tmp_path / "list", valid_fraction=0.2, resume=True, **FAST)
    done = mlxlora("sft", "--resume", "--adapter-path", tmp_path / "list")
    assert done.code == 2 and "data: 12 rows (given in Python, " in done.err
    assert done.err.endswith("so no file has it; go on in Python, or give --data\n")


def test_messages_name_the_row(model_folder, tmp_path):
    with pytest.raises(InputError, match=r"^data\[12\]: fields not recognized: found promt"):
        ml.sft(model=model_folder, data=[*ROWS, {"promt": "x"}], adapter_path=tmp_path / "a", **FAST)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("make", [ml.rows, lambda data: ml.pairs(data, max_seq_length=9), ml.unpaired])
def test_sources_take_rows(make):
    assert make(ROWS).data.data is ROWS


def test_the_token_cache_works_by_content(tmp_path, monkeypatch):
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlxlora.data import token_cache
    from mlxlora.data.sources import tokenize
    from tests.support.tiny import byte_tokenizer

    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(token_cache, "WORTH_KEEPING", 1)
    tokenizer, notes = TokenizerWrapper(byte_tokenizer()), []
    for data in (ROWS, Frame([dict(row) for row in ROWS]), ROWS[1:]):
        tokenize(ml.rows(data), memory_splits(data), tokenizer, notes.append)
    assert len(notes) == 1 and notes[0].startswith("12 rows were tokenized by an earlier run")
