"""Rows that were tokenised before come from disk, the same bit for bit; what is damaged or different does not."""

import pickle
from datetime import date

import attrs
import numpy as np
import orjson
import pytest
from attrs import evolve

import mlxlora.data.token_cache as tokencache
from mlxlora.data.item_records import StoredItems, hashes_of
from mlxlora.data.sources import load_rows, pairs, rows, tokenize
from mlxlora.errors import RunError
from tests.support.tiny import byte_tokenizer


@pytest.fixture(autouse=True)
def everything_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokencache, "WORTH_KEEPING", 0)


@pytest.fixture
def tokenizer():
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    inner = byte_tokenizer()
    inner.chat_template = template
    return TokenizerWrapper(inner)


@pytest.fixture
def data(tmp_path):
    lines = [{"prompt": f"add {n} and 2.", "completion": "x" * (1 + 7 * n)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    sides = [
        {"prompt": f"add {n}.", "chosen": f"{n} is", "rejected": "no" * (n + 1), "preference_score": n or None} for n in range(12)
    ]
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(map(orjson.dumps, sides)))
    return tmp_path


def made(source, tokenizer):
    notes = []
    return tokenize(source, load_rows(source.data, 0), tokenizer, notes.append), notes


def plain(value):
    """Nested tuples of numbers and strings, types included, that compare."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tolist())
    if attrs.has(type(value)) and not isinstance(value, StoredItems):
        return tuple(plain(getattr(value, field.name)) for field in attrs.fields(type(value)))
    return [plain(v) for v in value] if isinstance(value, list | StoredItems) else (type(value).__name__, value)


def sources(folder):
    yield lambda **o: rows(str(folder / "rows.jsonl"), mask_prompt=True, max_seq_length=60, **o)
    yield lambda **o: pairs(str(folder / "pairs.jsonl"), train_prompt=True, **o)
    yield lambda **o: pairs(str(folder / "pairs.jsonl"), max_seq_length=12, **o)


def test_items_are_the_same(data, tokenizer):
    for source in sources(data):
        direct, none = made(source(token_cache=False), tokenizer)
        first, silent = made(source(), tokenizer)
        again, notes = made(source(), tokenizer)
        assert (none, silent, len(notes)) == ([], [], 1) and "tokenized by an earlier run" in notes[0]
        assert plain(direct["train"]) == plain(first["train"]) == plain(again["train"])
        digests = [hashes_of(run["train"].items) for run in (direct, first, again)]
        assert digests[0] == digests[1] == digests[2] == hashes_of(list(first["train"].items))


def test_a_copy_for_another_process_makes_the_same_items(data, tokenizer):
    source = rows(str(data / "rows.jsonl"), mask_prompt=True)
    some = load_rows(source.data, 0)["train"]
    encoding = tokencache.job_of(some, source.encoder, tokenizer).encoding
    here = encoding(some)
    for stop in (5, 12):
        there = pickle.loads(pickle.dumps(encoding))(pickle.loads(pickle.dumps(some.part(0, stop))))
        assert here.data.startswith(there.data) and here.table["rows"][:stop].tolist() == there.table["rows"].tolist()
    copied = pickle.dumps(evolve(encoding, identity=b"another"))
    with pytest.raises(ValueError, match="changed on its way"):
        pickle.loads(copied)


def test_the_place_of_a_row_is_that_of_now(data, tokenizer):
    made(rows(str(data / "rows.jsonl")), tokenizer)
    (data / "rows.jsonl").rename(data / "moved.jsonl")
    again, notes = made(rows(str(data / "moved.jsonl")), tokenizer)
    assert notes and again["train"].items[0].location.endswith("moved.jsonl:1")


@pytest.mark.parametrize("change", ["row", "option", "template", "tokenizer", "code"])
def test_what_differs_is_not_found(data, tokenizer, change, monkeypatch):
    file, options = data / "rows.jsonl", {}
    made(rows(str(file)), tokenizer)
    match change:
        case "row":
            file.write_bytes(file.read_bytes().replace(b"add 3", b"add 4"))
        case "option":
            options = {"max_seq_length": 40}
        case "template":
            tokenizer._tokenizer.chat_template += " "
        case "tokenizer":
            tokenizer._tokenizer.add_tokens(["add"])
        case "code":
            monkeypatch.setattr(tokencache, "version", lambda _: "0")
    items, notes = made(rows(str(file), **options), tokenizer)
    assert not notes
    assert plain(items["train"]) == plain(made(rows(str(file), token_cache=False, **options), tokenizer)[0]["train"])


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-9] + b"x" + b[-8:], lambda b: b"no" + b]
)
def test_damage_is_noticed_and_repaired(data, tokenizer, damage):
    source = rows(str(data / "rows.jsonl"))
    first = plain(made(source, tokenizer)[0]["train"])  # items are read when they are used
    (file,) = (data / "cache" / "tokens").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again, notes = made(source, tokenizer)
    assert len(notes) == 1 and str(file) in notes[0] and "damaged" in notes[0]
    assert first == plain(again["train"])
    assert "earlier run" in made(source, tokenizer)[1][0]


def test_a_damaged_record_is_noticed_when_it_is_read(data, tokenizer):
    source = rows(str(data / "rows.jsonl"))
    items = made(source, tokenizer)[0]["train"].items
    (file,) = (data / "cache" / "tokens").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:20] + b"?" + whole[21:])
    assert items[1].location.endswith("rows.jsonl:2")
    with pytest.raises(RunError, match=r"rows.jsonl:1: its stored token ids are damaged; .* was removed; run again"):
        items[0]
    assert not file.exists()


def test_a_template_that_tells_the_date_is_of_that_day(tokenizer, monkeypatch):
    class Later(date):
        @classmethod
        def today(cls):
            return cls(2031, 1, 2)

    before = tokencache.tokenizer_identity(tokenizer)
    monkeypatch.setattr(tokencache, "date", Later)
    assert tokencache.tokenizer_identity(tokenizer) == before
    tokenizer._tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
    assert b"2031-01-02" in tokencache.tokenizer_identity(tokenizer)


def test_small_data_and_unknown_code_are_not_kept(data, tokenizer, monkeypatch):
    source = rows(str(data / "rows.jsonl"))
    some = load_rows(source.data, 0)["train"]

    def file():
        return tokencache.job_of(some, source.encoder, tokenizer).path

    assert file() and tokencache.is_storable(source.encoder)
    assert not tokencache.is_storable(lambda row, tokenizer: None)
    monkeypatch.setattr(type(tokenizer._tokenizer), "__module__", "transformers_modules.mine")
    assert file() is None
    monkeypatch.undo()
    assert file() is None  # fewer bytes than are worth it


def test_a_folder_that_cannot_be_written_is_told(data, tokenizer, monkeypatch):
    (data / "file").touch()
    monkeypatch.setenv("MLXLORA_CACHE", str(data / "file"))
    items, notes = made(rows(str(data / "rows.jsonl")), tokenizer)
    assert len(items["train"].items) == 12 and "cannot be written" in notes[0]


def test_the_oldest_files_go(data, tokenizer, monkeypatch):
    monkeypatch.setattr(tokencache, "FILES", 3)
    for length in range(20, 26):
        made(rows(str(data / "rows.jsonl"), max_seq_length=length), tokenizer)
    assert len(list((data / "cache" / "tokens").iterdir())) == 3
