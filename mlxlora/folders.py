"""Folders that a command writes whole: none is mixed with what was there, and nothing else is ever deleted."""

from collections.abc import Iterable
from pathlib import Path

from .errors import InputError


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
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag} {path} is a file; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise InputError(f"{flag} {path} exists and is not empty; replace it with --overwrite, or name another folder")
    if not (folder / marker).is_file():
        raise InputError(f"{flag} {path} has no {marker}, so --overwrite would delete something else; name another folder")
    return folder
