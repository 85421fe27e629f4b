"""The files of a run's folder: a run replaces, removes and extends only what a run wrote there."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from ..adapters.files import CONFIG, WEIGHTS
from ..errors import InputError, listed
from ..reporting.card import CARD
from ..reporting.history import METRICS, PAGE, PICTURE, SAMPLES, SETTINGS
from ..utils.marker import MARKER, mark, marker_of
from .checkpoint import FOLDER, checkpoints
from .reference import START

RUN = "run"
"""The command in the marker of a run's folder, the same for every method."""

_REPLACED = (WEIGHTS, CONFIG, METRICS, SAMPLES, SETTINGS, PAGE, PICTURE, START)
_FOLDERS = (FOLDER, "tensorboard")
_FILES = (*_REPLACED, CARD, *_FOLDERS)
_EXTENDED = (CARD, "tensorboard")  # a card that a person changed stays, and events of other runs too


def check_names(directory: Path, *, resume: bool) -> None:
    """Checks that a run replaces, removes and extends nothing but what a run wrote, and writes nowhere else.

    Args:
        directory: the folder of the run.
        resume: whether the run that is there goes on, so that its files are known without a marker.

    Raises:
        InputError: a name that a run writes is a link, is a folder in place of a file, or belongs to something else.
    """
    present = [name for name in _FILES if os.path.lexists(directory / name)]
    for name in present:
        path = directory / name
        if path.is_symlink():
            raise InputError(f"--adapter-path {directory}: {name} is a link; a run writes only into its folder: remove the link")
        if path.is_dir() != (name in _FOLDERS):
            kind = "a folder" if path.is_dir() else "no folder"
            raise InputError(f"--adapter-path {directory}: {name} is {kind}; move it, or name another folder")
    marker = marker_of(directory)
    known = marker.files if marker and marker.command == RUN else frozenset()
    unknown = [name for name in present if name not in known and name not in _EXTENDED]
    if unknown and not resume:
        raise InputError(
            f"--adapter-path {directory}: {listed(unknown)} there is not from a run ({MARKER} does not list it), and a run would "
            "replace it; move it, or name another folder"
        )


def mark_run(directory: Path) -> None:
    """Writes the marker of a run's folder, before its first file."""
    mark(directory, RUN, _FILES)


def clean(directory: Path) -> None:
    """Removes the files of an earlier run; its options stay until new ones replace them: they make the folder that of a run."""
    for name in _REPLACED:
        if name != SETTINGS:
            (directory / name).unlink(missing_ok=True)
    for checkpoint in checkpoints(directory):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with suppress(OSError):  # something else is there, such as a copy that somebody made, or no folder
        (directory / FOLDER).rmdir()
