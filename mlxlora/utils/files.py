"""Writes files and folders atomically: to a temporary name, which is renamed at the end."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BEFORE = ".before.tmp"  # suffix of a folder that is being replaced


def cache_folder(name: str) -> Path:
    """The folder of one kind of cached result: in $MLXLORA_CACHE, or ~/.cache/mlxlora."""
    return Path(os.environ.get("MLXLORA_CACHE") or Path.home() / ".cache" / "mlxlora") / name


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file name; renamed to `path` at the end, removed after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # several ranks may write the same result
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary folder; renamed to `path` at the end, removed after an error.

    An existing folder at `path` stays until then. It has another name between two renames; after a kill at that moment, the next
    writer or `sweep` puts it back.
    """
    temporary, before = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}{_BEFORE}")
    put_back(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in (*filter(Path.is_file, temporary.rglob("*")), temporary):
            _sync(file)
        shutil.rmtree(before, ignore_errors=True)
        if path.exists():
            path.replace(before)  # not deleted before: while that runs there would be no folder
        temporary.replace(path)
        _sync(path.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        put_back(path)
        shutil.rmtree(temporary, ignore_errors=True)


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
            if not older or time.time() - path.stat().st_mtime > older:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def put_back(path: Path) -> None:
    """Puts back a folder that a killed writer was about to replace, unless there is a new one."""
    before = path.with_name(f".{path.name}{_BEFORE}")
    if before.exists() and not path.exists():
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
