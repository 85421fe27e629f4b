"""Token ids on disk: a data set is tokenized once, not once a run, and its items are read when a batch needs them.

A file holds the items of one split. Its name is a digest of everything that they depend on: the rows, the tokenizer, the
options, our code and the versions of the packages that it calls. A change of any of these leads to another file name. The rows of
a JSONL file stand there by a digest of its content: a copy at another place has the same items, and no time of a file is trusted.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import date
from functools import partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import orjson
from attrs import frozen

from ..utils.files import atomic_file, cache_folder, least_recent, sweep
from ..utils.safetensors import NumpyArrays, arrays_of, bytes_of_arrays
from ..utils.ticks import ticking
from .file_rows import FileRows, InMemory, OnDisk
from .item_records import Packed, StoredItems, joined_tables, packed_items
from .row import Row
from .template_habits import template_args
from .tokenize import Counts, check_some_left, preference_pair, supervised_example
from .workers import mapped, worker_count

WORTH_KEEPING = 1 << 20  # bytes of rows, which take about half a second to tokenize
PARALLEL = 8 << 20  # bytes of rows from which on worker processes pay: a worker takes about 2 seconds to start
FILES, BYTES = 16, 32 << 30  # the most recently used ones are kept
ROWS_SENT, _MOST_ROWS = 1 << 18, 1024  # bytes of rows that a worker gets at once, and most of them
_DAY = 86400.0  # seconds; no writer takes so long
_MAGIC = b"mlxlora items 1\n"

Made = tuple[Sequence[Any], Counts]


def stored_items(
    rows: Sequence[Row],
    prepare: Callable[..., Any],
    tokenizer: Any,
    note: Callable[[str], Any],
    *,
    keep: bool = True,
) -> Made:
    """The items of rows: from the file of an earlier run, or made now, by several processes if there are many.

    Args:
        rows: the rows of one split.
        prepare: what makes an item of one row; a function for which `is_storable` holds.
        tokenizer: mlx-lm's TokenizerWrapper.
        note: takes one line about where the items came from, or about a damaged file.
        keep: whether to keep the items for the next run.

    Raises:
        InputError: a row is not understood, or no row has a token to train on.
    """
    job = job_of(rows, prepare, tokenizer)
    if keep and job.path and (made := _trusted(job.path, job, note) or _kept(job.path, job, note)):
        return made
    large = job.size >= WORTH_KEEPING
    with TemporaryFile() if large else BytesIO() as file:
        index = job.write(file)
        content = InMemory(file.getvalue()) if isinstance(file, BytesIO) else OnDisk(os.dup(file.fileno()))
    return _made(StoredItems(content, index, job.location), job)


def is_storable(prepare: Callable[..., Any]) -> bool:
    """Whether the items of a maker have records, and are known by what made them: code, options, row and tokenizer."""
    return isinstance(prepare, partial) and not prepare.args and prepare.func in (supervised_example, preference_pair)


# --- what a file is known by ------------------------------------------------------------------


def _rows_identity(rows: Sequence[Row]) -> tuple[int, list[bytes]]:
    """The bytes of all rows, and what tells them from others; no bytes if a row has values that JSON cannot hold."""
    if isinstance(rows, FileRows):
        return rows.size, [rows.digest, rows.chosen]
    try:
        written = [orjson.dumps(row.fields) for row in rows]
    except TypeError:  # a hub data set can hold such values
        return 0, []
    return sum(map(len, written)), written


def tokenizer_identity(tokenizer: Any) -> bytes | None:
    """Everything that decides the tokens of a text or a conversation; None if Python code of the model takes part."""
    inner = tokenizer._tokenizer
    if not type(inner).__module__.startswith(("transformers.", "mlx_lm.")) or not getattr(inner, "is_fast", False):
        return None
    own = tokenizer._chat_template  # a Python template of mlx-lm
    template = inner.chat_template
    settings = {
        "class": type(inner).__qualname__,
        "template": template,
        "variables": template_args(tokenizer),
        "own template": getattr(own, "__module__", None) and f"{own.__module__}.{own.__qualname__}",
        "special": {name: str(token) for name, token in inner.special_tokens_map.items()},
        "ends": sorted(tokenizer.eos_token_ids),
        "behavior": {name: _plainly(value) for name, value in vars(inner).items() if name not in _NO_BEHAVIOR},
        "made with": {name: _plainly(value) for name, value in inner.init_kwargs.items() if name not in _NO_BEHAVIOR},
        "today": date.today().isoformat() if "strftime_now" in str(template) else None,  # the template of Llama 3 shows the date
    }
    return orjson.dumps(settings, option=orjson.OPT_SORT_KEYS) + b"\n" + inner.backend_tokenizer.to_str().encode()


_NO_BEHAVIOR = {
    "_tokenizer",
    "init_kwargs",
    "init_inputs",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "verbose",
}
_NO_BEHAVIOR |= {"chat_template_file", "deprecation_warnings", "files_loaded", "_in_target_context_manager", "_commit_hash"}
_NO_BEHAVIOR |= {"is_local", "local_files_only", "backend"}
"""What says where a tokenizer came from, or what it has told already."""


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _plainly(value: Any) -> str:
    """A setting of a tokenizer as text; equal settings have equal texts, also with sets and objects in them."""
    if isinstance(value, dict):
        return str(sorted((str(name), _plainly(item)) for name, item in value.items()))
    if isinstance(value, list | tuple):
        return str([_plainly(item) for item in value])
    return str(sorted(map(str, value))) if isinstance(value, set | frozenset) else _ADDRESS.sub("", repr(value))


def _maker_identity(prepare: Callable[..., Any]) -> bytes:
    assert isinstance(prepare, partial)
    return orjson.dumps([prepare.func.__qualname__, prepare.keywords], option=orjson.OPT_SORT_KEYS)


def _code_identity() -> bytes:
    """The code that tokenizes: the text of all modules of this folder, and the versions of packages."""
    ours = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    others = [f"{name} {version(name)}".encode() for name in ("transformers", "tokenizers", "mlx-lm", "jinja2")]
    return b"\n".join([*ours, *others])


# --- making items -------------------------------------------------------------------------------


@frozen(eq=False)
class _Encoding:
    """Makes items of a chunk of rows.

    Attributes:
        prepare: what makes an item of one row.
        tokenizer: mlx-lm's TokenizerWrapper.
        identity: of the tokenizer, which a copy in another process must have, too; None: it has no copy, or there are few rows.
    """

    prepare: Callable[..., Any]
    tokenizer: Any
    identity: bytes | None

    def __call__(self, rows: Sequence[Row]) -> Packed:
        made = ((number, self.prepare(row, self.tokenizer)) for number, row in enumerate(rows))
        return packed_items((number, item) for number, item in made if item is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.prepare, self.tokenizer, self.identity)


def _received(prepare: Callable[..., Any], tokenizer: Any, identity: bytes) -> _Encoding:
    if _digest_of(tokenizer) != identity:
        raise ValueError("the tokenizer changed on its way")
    return _Encoding(prepare, tokenizer, identity)


def _digest_of(tokenizer: Any) -> bytes | None:
    known = tokenizer_identity(tokenizer)
    return known and hashlib.sha256(known).digest()


@frozen(eq=False)
class Job:
    """Rows that are to be tokenized.

    Attributes:
        rows: of a split.
        encoding: makes items of them.
        size: bytes of all rows; 0: unknown.
        path: the file of their items; None if there are few rows, or if the tokenizer has no identity.
    """

    rows: Sequence[Row]
    encoding: _Encoding
    size: int
    path: Path | None

    def write(self, file: IO[bytes]) -> NumpyArrays:
        """Writes the records of all items, and returns their index.

        Raises:
            InputError: a row is not understood, or no row has a token to train on.
        """
        indexes, done, first = [], 0, 0
        bounds = self._bounds()
        workers = worker_count() if self.size >= PARALLEL and self.encoding.identity else 1
        with closing(mapped(self.encoding, map(self._chunk, bounds), workers)) as made:
            for (start, stop), part in ticking(zip(bounds, made, strict=True), lambda pair: pair[0][1] - pair[0][0]):
                file.write(part.data)
                part.table["stops"] += done
                part.table["rows"] += first
                indexes.append(part.table)
                done, first = done + len(part.data), first + stop - start
        file.flush()
        index = joined_tables(indexes)
        check_some_left(len(self.rows), len(index["stops"]))
        return index

    def _bounds(self) -> list[tuple[int, int]]:
        """Where each chunk starts and stops: rows of about `ROWS_SENT` bytes together."""
        rows = len(self.rows)
        step = min(max(ROWS_SENT * rows // max(self.size, 1), 1), _MOST_ROWS)
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _chunk(self, bounds: tuple[int, int]) -> Sequence[Row]:
        return self.rows.part(*bounds) if isinstance(self.rows, FileRows) else self.rows[slice(*bounds)]

    def location(self, number: int) -> str:
        """Where a row stands."""
        return self.rows.location(number) if isinstance(self.rows, FileRows) else self.rows[number].location


def job_of(rows: Sequence[Row], prepare: Callable[..., Any], tokenizer: Any) -> Job:
    """What is to be done to rows; see `stored_items`."""
    size, written = _rows_identity(rows)
    reader = _digest_of(tokenizer) if size >= WORTH_KEEPING else None  # a large vocabulary takes a while
    path = None
    if reader is not None:
        digest = hashlib.sha256(b"\n".join([_code_identity(), _maker_identity(prepare), reader, *written])).hexdigest()
        path = cache_folder("tokens") / f"{digest[:32]}.items"
    return Job(rows, _Encoding(prepare, tokenizer, reader), size, path)


def _made(items: StoredItems, job: Job) -> Made:
    """The items with their counts; few ones are kept as objects."""
    rows, few = len(job.rows), isinstance(items.content, InMemory)
    truncated, kept = int(items.table["truncated"].sum()), len(np.unique(items.table["rows"]))
    return list(items) if few else items, Counts(rows, truncated, rows - kept)


# --- the file: records, then their index, then where it begins -----------------------------------


def _kept(path: Path, job: Job, note: Callable[[str], Any]) -> Made | None:
    """Makes the items and writes their file; None if it cannot be written.

    The file appears when it is whole. Another run that makes the same one has a temporary file of its own.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, "*.items", older=_DAY)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            index = job.write(file)
            place = file.tell()
            file.write(bytes_of_arrays(index) + place.to_bytes(8, "little") + _MAGIC)
        least_recent(path.parent, "*.items", FILES, BYTES)
        return _made(_opened(path, job.location), job)
    except OSError as error:
        note(f"tokens: the cache {path} cannot be written ({error})")
        return None


def _trusted(path: Path, job: Job, note: Callable[[str], Any]) -> Made | None:
    """The items of a file; None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        made = _made(_opened(path, job.location), job)
        path.touch()
    except (OSError, KeyError, ValueError) as error:
        note(f"tokens: the cache {path} is damaged ({error}); the rows are tokenized again")
        return None
    note(f"{len(job.rows)} rows were tokenized by an earlier run; their token ids come from {path}")
    return made


def _opened(path: Path, location: Callable[[int], str]) -> StoredItems:
    content = OnDisk.opened(path)
    end = content.status.st_size - 8 - len(_MAGIC)
    footer = content.read(max(end, 0), content.status.st_size)
    place = int.from_bytes(footer[:8], "little")
    if footer[8:] != _MAGIC or place > end:
        raise ValueError("its end is missing")
    index = arrays_of(content.read(place, end))
    if len(index["stops"]) and int(index["stops"][-1]) != place:
        raise ValueError("records are missing")
    return StoredItems(content, index, location, partial(_remove, path))


def _remove(path: Path) -> str:
    path.unlink(missing_ok=True)
    return f"{path} was removed; run again"
