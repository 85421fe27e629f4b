"""Output folders: never mixed with older content, and nothing else is ever deleted."""

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError, RunError, listed, plain
from .files import atomic_directory, check_replaceable, put_back
from .launch import warn
from .marker import MARKER, mark, marker_of, strangers
from .paths import checked_path, real

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.ESTALE}


def check_vacant(
    path: str | os.PathLike[str],
    flag: str,
    command: str,
    *,
    overwrite: bool | None,
    apart_from: Iterable[str | os.PathLike[str] | None] = (),
) -> Path:
    """Checks that a folder can be written, before anything expensive happens.

    Args:
        path: of the folder.
        flag: the option that names it.
        command: that writes it.
        overwrite: whether a folder that this command wrote may be replaced; None: the command has no --overwrite.
        apart_from: folders that are read; the output must neither be nor contain one of them.

    Returns:
        The folder.

    Raises:
        InputError: it may not be written.
    """
    folder = checked_path(path, flag)
    whole = real(folder)
    for other in apart_from:
        if other is not None and real(other).is_relative_to(whole) and Path(other).exists():
            raise InputError(f"{flag} {path}: {other} is read from there; name another folder")
    if Path.cwd().is_relative_to(whole):
        raise InputError(f"{flag} {path}: the command runs in there, and the folder appears whole; name a new folder")
    with suppress(OSError):  # unwritable: the writer reports it
        put_back(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        what = "a link to nothing" if folder.is_symlink() and not folder.exists() else "a file"
        raise InputError(f"{flag} {path} is {what}; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        remedy = "remove it" if overwrite is None else "replace it with --overwrite"
        raise InputError(f"{flag} {path} exists and is not empty; {remedy}, or name another folder")
    _check_ours(folder, f"{flag} {path}", command)
    return folder


def _check_ours(folder: Path, named: str, command: str) -> None:
    """Checks that --overwrite would remove nothing but what the command wrote."""
    marker = marker_of(folder)
    if marker is None or marker.command != command:
        why = f"has no {MARKER}" if marker is None else f"was written by `mlxlora {plain(marker.command)}`"
        raise InputError(f"{named} {why}, so --overwrite would delete something else than `{command}` wrote; name another folder")
    if others := strangers(folder, marker):
        raise InputError(
            f"{named}: {listed(others, shown=3)} there is not from `{command}`, so --overwrite would delete something else; move "
            "it, or name another folder"
        )


@contextmanager
def written_folder(folder: Path, flag: str, command: str) -> Iterator[Path]:
    """Yields a temporary folder, which replaces `folder` at the end, with a marker of what the command wrote.

    Args:
        folder: as `check_vacant` returned it.
        flag: the option that names it.
        command: that writes it.

    Raises:
        InputError: meanwhile, something else appeared in the folder.
        RunError: the folder cannot be written.
    """
    try:
        with atomic_directory(folder) as temporary:
            yield temporary
            mark(temporary, command)
            if folder.is_dir() and any(folder.iterdir()):
                _check_ours(folder, f"{flag} {folder}", command)
    except OSError as error:
        if not _within(error, real(folder).parent):
            raise
        raise RunError(f"{flag} {folder}: cannot be written ({error.strerror or error}); nothing there has changed") from error


def check_new_file(path: str | os.PathLike[str], flag: str, *, overwrite: bool) -> Path:
    """Checks that a file can be written, before anything expensive happens.

    Args:
        path: of the file.
        flag: the option that names it.
        overwrite: whether a file that is there may be replaced.

    Raises:
        InputError: it may not, or there is something else than a file.
    """
    file = checked_path(path, flag)
    if file.exists() and not file.is_file():
        raise InputError(f"{flag} {path} is {'a folder' if file.is_dir() else 'no plain file'}; name a file")
    check_replaceable(file, flag)
    parent = next(folder for folder in file.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise InputError(f"{flag} {path}: {parent} is a file; name another place")
    if os.path.lexists(file) and not overwrite:
        raise InputError(f"{flag} {path} exists; replace it with --overwrite, or name another file")
    return file


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
