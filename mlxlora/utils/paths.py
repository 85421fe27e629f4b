"""The one place where paths that a user gives are checked, before anything is read or written."""

import os
from pathlib import Path

from ..errors import InputError, plain

NAME_BYTES, PATH_BYTES = 230, 1000
"""File systems take 255 and 1,024; while a result is written, its name is up to 25 bytes longer."""


def checked_path(path: str | os.PathLike[str], flag: str) -> Path:
    """The path that a user gave, with `~` expanded.

    >>> checked_path("a/b", "--data").as_posix()
    'a/b'

    Raises:
        InputError: no file system takes it: it is empty, too long, has control characters or is not UTF-8.
    """
    text = os.fspath(path)
    fault = _fault(text)
    if fault:
        raise InputError(f"{flag} {plain(text)}: {fault}; name another path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{flag} {plain(text)}: there is no such user; write the path in full") from None


def _fault(text: str) -> str:
    """What is wrong with a path; empty if nothing is."""
    try:
        written = text.encode()
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    if not text.strip():
        return "the name is empty"
    if any(byte < 32 or byte == 127 for byte in written):
        return "the name has a control character"
    longest = max(map(len, written.split(b"/")))
    if longest > NAME_BYTES:
        return f"a name of {longest} bytes is too long, {NAME_BYTES} are the limit"
    return f"a path of {len(written)} bytes is too long, {PATH_BYTES} are the limit" if len(written) > PATH_BYTES else ""


def not_special(path: Path, flag: str) -> Path:
    """A path that is read: a file, a folder, or nothing yet.

    Raises:
        InputError: it is a pipe or a device, which a run would read only once or wait for.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        kind = "a pipe" if path.is_fifo() else "a device or socket"
        raise InputError(f"{flag} {path} is {kind}, which is read only once; write its content to a file and name that")
    return path


def real(path: str | os.PathLike[str]) -> Path:
    """The path without links; links in a circle stay."""
    return Path(os.path.realpath(path))


# --- links ------------------------------------------------------------------------------------


def within(file: Path) -> Path:
    """The path of a file that belongs to its folder, before it is opened.

    Raises:
        InputError: it is a link that leaves the folder.
    """
    if leaves_folder(file):
        raise InputError(f"{plain(str(file))} is a link that leaves its folder, so it is not read; copy the file there")
    return file


def leaves_folder(file: Path) -> bool:
    """Whether a file is a link to something outside of its folder. The files of the hub's cache are links, into `blobs`."""
    if not file.is_symlink():
        return False
    target = real(file)
    cached = target.parent.name == "blobs" and target.parents[1].name.startswith(("models--", "datasets--"))
    return not cached and not target.is_relative_to(real(file.parent))


def check_links(folder: Path, named: str, *, apart_from: str = "") -> None:
    """Checks that the files of a foreign folder lie in it, because their content is copied to results.

    Args:
        folder: of a model or a tokenizer; what is no folder passes.
        named: what a message calls it.
        apart_from: the end of the names of files that need not; empty: none.

    Raises:
        InputError: a file is a link that leaves the folder.
    """
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if leaves_folder(file) and not (apart_from and file.name.endswith(apart_from)):
            raise InputError(
                f"{named}: {plain(file.name)} is a link that leaves the folder, so it is not read; copy the file there"
            )


def checked_exists(path: str) -> bool:
    """Whether there is something at a path; False for a text that no file system takes."""
    try:
        return os.path.exists(checked_path(path, "path"))  # noqa: PTH110 - of a text from a file
    except InputError:
        return False
