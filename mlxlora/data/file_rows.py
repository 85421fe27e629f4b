"""Rows of JSONL that are read when they are used: the file is indexed once, and a row is found by its offset.

A list of a million dictionaries takes several times the size of the file; offsets take 20 bytes a row.
"""

import hashlib
import os
import time
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from attrs import evolve, frozen

from ..utils.files import cache_folder, least_recent
from ..utils.lazy import LazySequence
from ..utils.safetensors import NumpyArrays, read_checked, write_arrays
from ..utils.ticks import ticking
from .row import Row, as_row, parse_json

SMALL = 8 << 20  # bytes of a file that is read at once, and whose index is not kept
INDEXES = 64  # indexes that are kept
_SAMPLES, _SAMPLE = 16, 4096  # parts of a file, and bytes of each, that must be those of its index
_SETTLED = 2_000_000_000  # nanoseconds after which another write changes the time of a file


class Content(Protocol):
    """Bytes that are read from any place."""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`; fewer at the end."""
        ...


@frozen
class InMemory:
    """Bytes in memory."""

    held: bytes

    def read(self, start: int, stop: int) -> bytes:
        """See `Content`."""
        return self.held[start:stop]


class OnDisk:
    """Bytes of a file, open as long as somebody reads it.

    The system keeps pages that were read, as it does of mapped files. Unlike a map, a file that gets shorter ends no process,
    and its pages do not count as memory of this one.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        weakref.finalize(self, os.close, self._handle)

    def read(self, start: int, stop: int) -> bytes:
        """See `Content`."""
        return os.pread(self._handle, stop - start, start)

    @classmethod
    def opened(cls, path: Path) -> "OnDisk":
        """The content of a file.

        Raises:
            OSError: it cannot be read.
        """
        return cls(os.open(path, os.O_RDONLY))

    @property
    def status(self) -> os.stat_result:
        """Of the file that was opened, whatever has its name now."""
        return os.fstat(self._handle)

    def lines(self) -> Iterator[bytes]:
        """All lines from the beginning."""
        with os.fdopen(os.dup(self._handle), "rb") as lines:
            lines.seek(0)
            yield from lines


@frozen(eq=False)
class FileRows(LazySequence[Row]):
    """The rows of a JSONL file.

    Attributes:
        file: its name, for messages.
        content: its bytes.
        starts: [rows] int64, where the line of each row begins.
        stops: [rows] int64, where it ends.
        lines: [rows] int64, its number.
        digest: of the whole content.
        chosen: of the rows that were picked; empty: all.
    """

    file: str
    content: Content
    starts: np.ndarray
    stops: np.ndarray
    lines: np.ndarray
    digest: bytes
    chosen: bytes = b""

    def __len__(self) -> int:
        return len(self.starts)

    def item(self, index: int) -> Row:
        """See `LazySequence`."""
        line = int(self.lines[index])
        written = self.content.read(int(self.starts[index]), int(self.stops[index]))
        return as_row(parse_json(written, self.file, line), self.file, line)

    def location(self, index: int) -> str:
        """ "file:line" of a row, which is not read for that."""
        return f"{self.file}:{self.lines[index]}"

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return int((self.stops - self.starts).sum())

    def picked(self, numbers: Sequence[int] | np.ndarray) -> "FileRows":
        """Some of the rows."""
        at = np.asarray(numbers, np.int64)
        chosen = hashlib.sha256(self.chosen + at.tobytes()).digest()
        return evolve(self, starts=self.starts[at], stops=self.stops[at], lines=self.lines[at], chosen=chosen)

    def part(self, start: int, stop: int) -> "FileRows":
        """Consecutive rows with their bytes in memory, for another process."""
        starts, stops = self.starts[start:stop], self.stops[start:stop]
        first, last = (int(starts[0]), int(stops[-1])) if len(starts) else (0, 0)
        if last - first <= 2 * (stops - starts).sum():
            held, place = self.content.read(first, last), starts - first
        else:  # picked rows that lie far from each other
            held = b"".join(self.content.read(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True))
            place = np.cumsum(stops - starts) - (stops - starts)
        return FileRows(self.file, InMemory(held), place, place + (stops - starts), self.lines[start:stop], self.digest)


def jsonl_rows(path: Path) -> FileRows:
    """The rows of a JSONL file; a large one is indexed once, until it changes.

    Raises:
        InputError: a line is no JSON object.
        OSError: it cannot be read.
    """
    content = OnDisk.opened(path)
    status = content.status
    if status.st_size < SMALL:
        return rows_of_bytes(str(path), content.read(0, status.st_size))
    known = cache_folder("rows") / f"{_identity(path, content)}.safetensors"
    index = _kept(known)
    if index is None:
        index = _index(str(path), content.lines())
        if time.time_ns() - status.st_mtime_ns > _SETTLED and len(index["starts"]):
            _keep(known, index)
    return _rows(str(path), content, index)


def rows_of_bytes(file: str, content: bytes) -> FileRows:
    """The rows of JSONL in memory.

    Raises:
        InputError: a line is no JSON object.
    """
    return _rows(file, InMemory(content), _index(file, BytesIO(content)))


def _rows(file: str, content: Content, index: NumpyArrays) -> FileRows:
    return FileRows(file, content, index["starts"], index["stops"], index["lines"], index["digest"].tobytes())


def _index(file: str, lines: Iterable[bytes]) -> NumpyArrays:
    """Where the rows are, after every line was parsed, and a digest of the content."""
    starts, stops, numbers, place, digest = array("q"), array("q"), array("q"), 0, hashlib.sha256()
    for number, line in enumerate(ticking(lines), 1):
        digest.update(line)
        end = place + len(line)
        if not line.isspace():
            as_row(parse_json(line, file, number), file, number)
            starts.append(place)
            stops.append(end)
            numbers.append(number)
        place = end
    found = {"starts": starts, "stops": stops, "lines": numbers}
    return {name: np.array(values, np.int64) for name, values in found.items()} | {
        "digest": np.frombuffer(digest.digest(), np.uint8)
    }


# --- kept indexes -----------------------------------------------------------------------------


def _identity(path: Path, content: OnDisk) -> str:
    """What changes when a file does: its place, size and times, and samples of its content.

    Hashing all of it would take longer than everything else that a second run does. The time of the last change of the inode
    cannot be set back, so a file that was rewritten with its old time is noticed, too.
    """
    status = content.status
    known = [os.path.realpath(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    digest = hashlib.sha256(repr(known).encode())
    for number in range(_SAMPLES):
        place = (status.st_size - _SAMPLE) * number // (_SAMPLES - 1)
        digest.update(content.read(place, place + _SAMPLE))
    return digest.hexdigest()[:32]


def _kept(file: Path) -> NumpyArrays | None:
    try:
        found = read_checked(file)
        file.touch()
    except (OSError, ValueError):  # none, or a damaged one, which is written again
        return None
    return found if {"starts", "stops", "lines", "digest"} <= found.keys() else None


def _keep(file: Path, index: NumpyArrays) -> None:
    """Writes an index; a folder that cannot be written costs time only, and the token cache tells it."""
    try:
        write_arrays(file, index)
        least_recent(file.parent, "*.safetensors", INDEXES)
    except OSError:
        return
