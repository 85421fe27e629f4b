"""Reads rows from JSONL and JSON files, folders and hub data sets."""

import gzip
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.mlx_lm_keys import HUB
from ..errors import InputError, described, reason
from ..utils.paths import not_special
from ..utils.ticks import ticking
from .file_rows import FileRows, jsonl_rows, rows_of_bytes
from .row import Row as Row
from .row import as_row, parse_json

SplitRows = Sequence[Row]
"""The rows of a split."""

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz")
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
"""The splits, and the names that each may have."""
_SAVED = ("dataset_dict.json", "state.json")  # what Dataset.save_to_disk writes
_OBJECTS = ("tools", "functions", "chat_template_kwargs")  # columns of objects that a chat template reads
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_HUB_ADDRESS = re.compile(rf"{HUB}((?:[\w.-]+/)?[\w.-]+(?::[\w.-]+)?)")


def read_rows(path: str | Path) -> SplitRows:
    """The rows of a .jsonl, .jsonl.gz or .json file. A .json file holds a list of objects; their positions count as lines.

    Rows of JSONL are checked here, and read again when they are used.

    Raises:
        InputError: the file is missing, empty or not UTF-8, or a row is not a JSON object (NaN is not JSON).
    """
    path = Path(path)
    if not path.is_file():
        hub = f"a hub name like org/name or {HUB}name"
        raise InputError(f"{path}: no such file; --data takes a folder with train.jsonl, a file, or {hub}")
    if not path.name.endswith(_SUFFIXES):
        raise InputError(f"{path}: unknown kind of file; use one of {', '.join(_SUFFIXES)}")
    try:
        rows = _read(path)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise InputError(f"{path}: no rows; write at least one JSON object")
    return rows


def _read(path: Path) -> SplitRows:
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            return rows_of_bytes(str(path), file.read())
    return list(_json_rows(path)) if path.suffix == ".json" else jsonl_rows(path)


def _json_rows(path: Path) -> Iterator[Row]:
    content, file = path.read_bytes(), str(path)
    remedy = "write a list of objects, or one object per line as .jsonl"
    values = parse_json(content, file, 1, remedy) if content.strip() else []
    if not isinstance(values, list):
        raise InputError(f"{path}:1: must be a list of objects, got {described(values)}")
    for number, value in enumerate(ticking(values), 1):
        yield as_row(value, file, number)


def read_splits(data: str | Path, asked: Mapping[str, str] | None = None) -> dict[str, SplitRows]:
    """The splits "train", "valid" and "test" of a folder, a file (train only) or a hub data set.

    A hub name may name a configuration: `org/name:config`. A name without an organization is `hf://datasets/name`. Hub data
    sets, and folders of Parquet, Arrow or CSV files, need the `datasets` package. `asked` selects rows of these, such as
    `{"train": "train[:1000]"}`; splits that it does not name are left out.

    Raises:
        InputError: nothing has that name, there are no training rows, or rows are broken.
    """
    path = not_special(Path(data), "--data")
    if named := _HUB_ADDRESS.fullmatch(str(data)):
        return _read_with_datasets(named[1], asked)
    if path.is_file():
        _refuse_slices(asked, path)
        return {"train": read_rows(path)}
    if path.is_dir():
        return _read_folder(path, asked)
    if not _HUB_NAME.fullmatch(str(data)) or str(data).endswith(_SUFFIXES) or str(data).startswith("."):
        return {"train": read_rows(path)}  # raises the error for a missing file
    return _read_with_datasets(str(data), asked)


def _refuse_slices(asked: Mapping[str, str] | None, path: Path) -> None:
    if asked:
        raise InputError(f"--{next(iter(asked))}-split is for hub data sets, {path} is a local one; leave it out")


def _read_folder(folder: Path, asked: Mapping[str, str] | None) -> dict[str, SplitRows]:
    files = {split: _split_file(folder, names) for split, names in SPLIT_NAMES.items()}
    if files["train"] is not None:
        _refuse_slices(asked, folder)
        return {split: read_rows(file) for split, file in files.items() if file is not None}
    found = sorted(entry.name for entry in folder.iterdir())
    if any(name.endswith((".parquet", ".arrow", ".csv")) or name in (*_SAVED, "data") for name in found):
        return _read_with_datasets(str(folder), asked)
    raise InputError(f"{folder}: no train.jsonl in this folder; found {', '.join(found[:10]) or 'nothing'}")


def _split_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in _SUFFIXES)
    return next((file for file in candidates if file.is_file()), None)


def _read_with_datasets(name: str, asked: Mapping[str, str] | None = None) -> dict[str, SplitRows]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"{name}: reading this data set needs the datasets package: pip install 'mlxlora[datasets]'") from None
    try:
        splits = _load_splits(datasets, name, asked or {})
    except Exception as error:  # the hub, the network or any loader; the user can act on the message
        raise InputError(f"{name}: cannot be loaded: {reason(error, 1000)}") from error
    found = {split: next((splits[given] for given in names if given in splits), None) for split, names in SPLIT_NAMES.items()}
    if found["train"] is None:
        raise InputError(f"{name}: no train split; found {', '.join(sorted(splits))}")
    return {
        split: [Row(without_filler(fields), f"{name}[{split}]", number) for number, fields in enumerate(rows, 1)]
        for split, rows in found.items()
        if rows is not None
    }


def _load_splits(datasets: Any, name: str, asked: Mapping[str, str]) -> Mapping[str, Any]:
    if any((Path(name) / file).is_file() for file in _SAVED):
        saved = datasets.load_from_disk(name)
        splits = saved if isinstance(saved, dict) else {"train": saved}
        return {split: _sliced(datasets, splits, rows) for split, rows in asked.items()} or splits
    place = [name] if Path(name).exists() else name.split(":")
    return {split: datasets.load_dataset(*place, split=rows) for split, rows in asked.items()} or datasets.load_dataset(*place)


def _sliced(datasets: Any, splits: Mapping[str, Any], rows: str) -> Any:
    """The rows that a text such as "train[:10%]+test[5:]" names."""
    parts = datasets.ReadInstruction.from_spec(rows).to_absolute({name: len(split) for name, split in splits.items()})
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def without_filler(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the nulls that Arrow adds: it gives all objects of a column the same keys.

    >>> without_filler({"tools": [{"a": {"x": 1, "y": None}}], "messages": [{"role": "user", "name": None}], "info": {"z": None}})
    {'tools': [{'a': {'x': 1}}], 'messages': [{'role': 'user'}], 'info': {'z': None}}
    """
    return {name: _pruned(value) if name in _OBJECTS or _has_messages(value) else value for name, value in fields.items()}


def _has_messages(value: Any) -> bool:
    """Whether a value is a message or a list of messages, as it is or under `messages`."""
    if isinstance(value, dict):
        return "role" in value or "from" in value or _has_messages(value.get("messages"))
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and _has_messages(value[0])


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def split_off(rows: SplitRows, fraction: float, seed: int) -> tuple[SplitRows, SplitRows]:
    """(training, validation) rows in file order: validation is a random share that the seed fixes, at least one row each.

    Raises:
        InputError: fewer than two rows.

    >>> rows = [Row({}, "a.jsonl", line) for line in range(1, 5)]
    >>> [len(part) for part in split_off(rows, 0.01, seed=0)]
    [3, 1]
    """
    if len(rows) < 2:
        raise InputError(f"--valid-fraction needs at least 2 rows, got {len(rows)}; add rows or leave it out")
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    return picked_rows(rows, [i for i in range(len(rows)) if i not in held_out]), picked_rows(rows, sorted(held_out))


def picked_rows(rows: SplitRows, numbers: Sequence[int]) -> SplitRows:
    """Some of the rows, which need not be read for that."""
    return rows.picked(numbers) if isinstance(rows, FileRows) else [rows[i] for i in numbers]
