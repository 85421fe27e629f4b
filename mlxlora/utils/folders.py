"""Folders that a command writes whole: none is mixed with what was there, and nothing else is ever deleted."""

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
    """The folder to write, once it is known to be free, before anything expensive happens.

    Args:
        path: of the folder.
        flag: the option that names it.
        overwrite: whether one with `marker` in it may be replaced.
        marker: a file that shows that the folder holds what is going to be written again.
        apart_from: folders that are read, which it must neither be nor contain.

    Raises:
        InputError: it may not be written.
    """
    folder = Path(path)
    for other in apart_from:
        if other is not None and Path(other).resolve().is_relative_to(folder.resolve()) and Path(other).exists():
            raise InputError(f"{flag} {path}: {other} is read from there; name another folder")
    with suppress(OSError, ValueError):  # it cannot be written, or has no name: whoever writes says so
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
def writing(folder: Path, flag: str) -> Iterator[None]:
    """A folder while one process has it for itself; made if there is none, and removed again if nothing was written.

    The system drops the lock with the process, however that ends.

    Args:
        folder: to write to.
        flag: the option that names it.

    Raises:
        InputError: another process has the folder, or it cannot be made.
        RunError: the disk became full, a quota is used up, or the folder cannot be written any more.
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
    """A handle of the folder, locked as long as it is open: the folder itself, so that no file is left to become stale."""
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
        os.close(handle)  # whoever made it has just removed it


def _within(error: OSError, folder: Path) -> bool:
    """Whether it is about the folder; a failed write does not say where it was, other failures do."""
    if error.filename is None:
        return error.errno in _FULL | {errno.EIO}
    return Path(os.fsdecode(error.filename)).absolute().is_relative_to(folder.absolute())


def _advice(error: OSError, folder: Path) -> str:
    remedy = "free some space" if error.errno in _FULL else "make the folder writable"
    return (
        f"{error.filename or folder}: cannot be written ({error.strerror}); checkpoints that were finished are kept: {remedy}, "
        "then go on with the same command and --resume"
    )
