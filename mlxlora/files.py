"""Files that are whole or not there: everything is written to a temporary name and renamed."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; renamed to `path` at the end, removed if anything went wrong."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            _sync(file)
        before = path.with_name(f".{path.name}.before.tmp")
        shutil.rmtree(before, ignore_errors=True)
        if path.exists():
            path.replace(before)  # deleting takes time in which there would be neither
        temporary.replace(path)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path, *names: str, older: float = 0.0) -> None:
    """Removes what writers that were killed left half written.

    Args:
        folder: where; folders in it are left alone.
        names: what they were writing, `*.safetensors` for instance.
        older: seconds since it was written to; 0 where nobody else may be writing.
    """
    for path in (path for name in names for path in folder.glob(f".{name}.*tmp")):
        with suppress(OSError):
            if not older or time.time() - path.stat().st_mtime > older:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(path: Path) -> None:
    """Reaches the disk before the rename does, so that a crash leaves the old file or the new one."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
