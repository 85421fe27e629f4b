"""Files that are whole or not there: everything is written to a temporary name and renamed."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BEFORE = ".before.tmp"  # what a folder is called from the moment when it makes room to the one when it is removed


def cache_folder(name: str) -> Path:
    """Where one kind of result is kept for later runs: in $MLXLORA_CACHE, or ~/.cache/mlxlora."""
    return Path(os.environ.get("MLXLORA_CACHE") or Path.home() / ".cache" / "mlxlora") / name


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; renamed to `path` at the end, removed if anything went wrong."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # several ranks may keep the same result
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; renamed to `path` at the end, removed if anything went wrong.

    What was at `path` is there until then. Between the two renames it has another name; whoever is killed there leaves it to the
    next writer, or to `sweep`, who puts it back.
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
            path.replace(before)  # deleting takes time in which there would be neither
        temporary.replace(path)
        _sync(path.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        put_back(path)
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path, *names: str, older: float = 0.0) -> None:
    """Removes what writers that were killed left half written, and puts back what they were about to replace.

    Args:
        folder: where; folders in it are left alone.
        names: what they were writing, `*.safetensors` for instance.
        older: seconds since it was written to; 0 where nobody else may be writing.
    """
    for path in (path for name in names for path in folder.glob(f".{name}{_BEFORE}")):
        with suppress(OSError):
            put_back(path.with_name(path.name.removeprefix(".").removesuffix(_BEFORE)))
    for path in (path for name in names for path in folder.glob(f".{name}.*tmp")):
        with suppress(OSError):
            if not older or time.time() - path.stat().st_mtime > older:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def put_back(path: Path) -> None:
    """The folder that somebody who was killed then was about to replace, if there is no other."""
    before = path.with_name(f".{path.name}{_BEFORE}")
    if before.exists() and not path.exists():
        before.replace(path)


def _sync(path: Path) -> None:
    """Reaches the disk before what follows does, so that a crash leaves the old file or the new one; a folder: the names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(handle)
