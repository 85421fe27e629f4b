"""Output folders: never mixed with older content, and nothing else is ever deleted."""

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError, RunError
from .files import put_back
from .launch import warn

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.ESTALE}


def check_vacant(
    path: str | Path, flag: str, *, overwrite: bool, marker: str, apart_from: Iterable[str | Path | None] = ()
) -> Path:
    """Checks that a folder can be written, before anything expensive happens.

    Args:
        path: of the folder.
        flag: the option that names it.
        overwrite: whether a folder with `marker` in it may be replaced.
        marker: a file that shows that the folder holds an older result of the same kind.
        apart_from: folders that are read; the output must neither be nor contain one of them.

    Returns:
        The folder.

    Raises:
        InputError: it may not be written.
    """
    folder = Path(path)
    for other in apart_from:
        if other is not None and Path(other).resolve().is_relative_to(folder.resolve()) and Path(other).exists():
            raise InputError(f"{flag} {path}: {other} is read from there; name another folder")
    with suppress(OSError, ValueError):  # unwritable or without a name: the writer reports it
        put_back(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag} {path} is a file; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise InputError(f"{flag} {path} exists and is not empty; replace it with --overwrite, or name another folder")
    if not (folder / marker).is_file():
        raise InputError(f"{flag} {path} has no {marker}, so --overwrite would delete something else; name another folder")
    return folder


@contextmanager
def locked_folder(folder: Path, flag: str) -> Iterator[None]:
    """Locks a folder for this process while the context lasts; makes it, and removes it again if it stays empty.

    The system releases the lock when the process ends, however it ends.

    Args:
        folder: to write to.
        flag: the option that names it.

    Raises:
        InputError: another process has the lock, or the folder cannot be made.
        RunError: the disk or a quota is full, or the folder is no longer writable.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        handle = _locked(folder, flag)
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot be made ({error.strerror})") from None
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE or not _within(error, folder):
            raise
        raise RunError(_advice(error, folder)) from error
    finally:
        for path in absent:
            with suppress(OSError):  # it is not empty
                path.rmdir()
        os.close(handle)


def _locked(folder: Path, flag: str) -> int:
    """An open handle that locks the folder: the folder itself, so that no lock file can become stale."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InputError(f"{flag} {folder}: another run is writing there; wait for it, or name another folder") from None
        except OSError as error:
            warn(f"{flag} {folder}: its file system has no locks ({error.strerror}); do not start a second run there")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        os.close(handle)  # another process has just removed it


def _within(error: OSError, folder: Path) -> bool:
    """Whether the error is about the folder; a failed write has no file name, other failures have."""
    if error.filename is None:
        return error.errno in _FULL | {errno.EIO}
    return Path(os.fsdecode(error.filename)).absolute().is_relative_to(folder.absolute())


def _advice(error: OSError, folder: Path) -> str:
    remedy = "free some space" if error.errno in _FULL else "make the folder writable"
    return (
        f"{error.filename or folder}: cannot be written ({error.strerror}); checkpoints that were finished are kept: {remedy}, "
        "then go on with the same command and --resume"
    )
