"""Writes files and folders atomically: to a temporary name, which is renamed at the end."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError, plain

_BEFORE = ".before.tmp"  # suffix of a folder that is being replaced


def cache_folder(name: str) -> Path:
    """The folder of one kind of cached result: in $MLXLORA_CACHE, or ~/.cache/mlxlora."""
    return Path(os.environ.get("MLXLORA_CACHE") or Path.home() / ".cache" / "mlxlora") / name


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file name; renamed to `path` at the end, removed after an error.

    Raises:
        InputError: at `path` is something else than a file, such as a folder or a device, which must not be replaced.
    """
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # several ranks may write the same result
    remove(temporary)  # of a killed process with this id, or a link that somebody planted
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: Path, flag: str = "") -> None:
    """Checks that a file may appear at a path, in place of a file or a link if there is one.

    Raises:
        InputError: there is something else.
    """
    named = f"{flag} " if flag else ""
    place = os.path.realpath(path.parent)
    if place == "/dev" or place.startswith(_OF_THE_SYSTEM):  # also a link there: /dev/stdout leads to a file or a terminal
        raise InputError(f"{named}{plain(str(path))} is a device, which a file cannot replace; name a file")
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing there, or the writer reports it
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "device")
        raise InputError(f"{named}{plain(str(path))} is a {kind}, which a file cannot replace; name a file")


_OF_THE_SYSTEM = ("/dev/fd", "/proc", "/sys")
_KINDS = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary folder; renamed to `path` at the end, removed after an error.

    An existing folder at `path` stays until then. It has another name between two renames; after a kill at that moment, the next
    writer or `sweep` puts it back.
    """
    path = Path(os.path.realpath(path))  # a link to a folder stays a link
    temporary, before = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}{_BEFORE}")
    put_back(path)
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in (*filter(Path.is_file, temporary.rglob("*")), temporary):
            _sync(file)
        remove(before)
        if path.exists():
            path.replace(before)  # not deleted before: while that runs there would be no folder
        temporary.replace(path)
        _sync(path.parent)
        remove(before)
    finally:
        put_back(path)
        remove(temporary)


def remove(path: Path) -> None:
    """Removes a file, a link (not what it leads to) or a folder, if it is there and can be removed."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sweep(folder: Path, *names: str, older: float = 0.0) -> None:
    """Removes temporary files of killed writers, and puts back folders that they were about to replace.

    Args:
        folder: the folder to clean; not its subfolders.
        names: patterns of the files that were written, such as `*.safetensors`.
        older: remove only what was not written to for this many seconds; 0: everything, if no one else may be writing.
    """
    for path in (path for name in names for path in folder.glob(f".{name}{_BEFORE}")):
        with suppress(OSError):
            put_back(path.with_name(path.name.removeprefix(".").removesuffix(_BEFORE)))
    for path in (path for name in names for path in folder.glob(f".{name}.*tmp")):
        with suppress(OSError):
            if not older or time.time() - path.lstat().st_mtime > older:
                remove(path)


def least_recent(folder: Path, name: str, files: int, size: int | None = None) -> None:
    """Removes the files that were used least recently, so that others find room.

    Args:
        folder: where they are.
        name: their pattern.
        files: how many stay.
        size: how many bytes stay, but at least the last file; None: any number.
    """
    kept = held = 0
    for file in sorted(folder.glob(name), key=lambda file: -file.stat().st_mtime):
        kept, held = kept + 1, held + file.stat().st_size
        if kept > files or (size is not None and held > size and kept > 1):
            file.unlink(missing_ok=True)


def put_back(path: Path) -> None:
    """Puts back a folder that a killed writer was about to replace, unless there is a new one."""
    before = path.with_name(f".{path.name}{_BEFORE}")
    if before.is_dir() and not before.is_symlink() and not os.path.lexists(path):
        before.replace(path)


def _sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk, so that a crash leaves the old file or the new one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot sync folders
            raise
    finally:
        os.close(handle)
