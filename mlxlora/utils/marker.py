"""The marker of a folder that mlxlora wrote: the command, and the files that it may replace or remove."""

import os
from collections.abc import Iterable
from pathlib import Path

import orjson
from attrs import field, frozen

from .files import atomic_file

MARKER = ".mlxlora"
_LARGEST = 1 << 20  # bytes


@frozen
class Marker:
    """What a folder's marker says.

    Attributes:
        command: that wrote the folder; "run" for all training commands.
        files: the paths that it wrote, relative to the folder.
    """

    command: str
    files: frozenset[str] = field(converter=frozenset)


def mark(folder: Path, command: str, files: Iterable[str] | None = None) -> None:
    """Writes the marker of a folder.

    Args:
        folder: that was written, or is about to be.
        command: that writes it.
        files: their paths, relative to the folder; default: all that are there.
    """
    named = sorted(files_of(folder) if files is None else files)
    with atomic_file(folder / MARKER) as temporary:
        temporary.write_bytes(orjson.dumps({"command": command, "files": named}, option=orjson.OPT_INDENT_2))


def marker_of(folder: Path) -> Marker | None:
    """The marker of a folder; None if there is none that can be read."""
    file = folder / MARKER
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > _LARGEST:
            return None
        read = orjson.loads(file.read_bytes())
        command, files = read["command"], read["files"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if not isinstance(command, str) or not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        return None
    return Marker(command, frozenset(files))


def files_of(folder: Path) -> set[str]:
    """The files, links and empty folders in a folder, by paths relative to it; follows no links."""
    found: set[str] = set()
    for root, folders, files in os.walk(folder):
        here = Path(root)
        links = [name for name in folders if (here / name).is_symlink()]
        found |= {(here / name).relative_to(folder).as_posix() for name in (*files, *links)}
        if not folders and not files and here != folder:
            found.add(here.relative_to(folder).as_posix())
    return found


def strangers(folder: Path, marker: Marker) -> list[str]:
    """What lies in a folder and is not listed in its marker, sorted."""
    return sorted(files_of(folder) - marker.files - {MARKER})
