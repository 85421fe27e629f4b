"""A user's own Python file, which runs only if a flag names it."""

import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError, one_line

_PACKAGES = {"PIL": "pillow", "bs4": "beautifulsoup4", "cv2": "opencv-python", "sklearn": "scikit-learn"}
"""Packages whose name is not that of their module."""


def run_file(file: str, flag: str, stand_ins: Mapping[str, ModuleType] | None = None) -> ModuleType:
    """Runs a user's Python file as a module; the file can import its neighbors.

    Args:
        file: the Python file.
        flag: the option that names it.
        stand_ins: modules by name that the file can import although their packages are not installed.

    Raises:
        InputError: no such file, or it raised an error; the message has the line of the file.
    """
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{flag} {file}: no such file")
    if str(path.parent.resolve()) not in sys.path:
        sys.path.append(str(path.parent.resolve()))
    loader = SourceFileLoader(f"mlxlora_user_{path.stem}", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    try:
        with _importable(stand_ins or {}):
            loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[loader.name]
        line = error.lineno if isinstance(error, SyntaxError) else line_in(error, str(path))
        raise InputError(f"{file}:{line or 1}: {flag} {_missing(error) or f'raised {one_line(error)}'}") from None
    return module


@contextmanager
def _importable(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """Makes modules importable while the context lasts, unless their packages are installed."""
    absent = {name: module for name, module in modules.items() if not _installed(name)}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


def _installed(name: str) -> bool:
    package = name.partition(".")[0]
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _missing(error: BaseException) -> str | None:
    """What to do about a failed import; None: the error is another one."""
    name = error.name.partition(".")[0] if isinstance(error, ImportError) and error.name else ""
    if not name or _installed(name):
        return None
    package = _PACKAGES.get(name, name.replace("_", "-"))
    return f"imports {name}, which is neither installed (pip install {package}) nor beside the file"


def load_object(reference: str, flag: str) -> Any:
    """The object that `file.py:name` names.

    Raises:
        InputError: malformed reference, or the file has no such name.
    """
    file, _, name = reference.rpartition(":")
    if not file or not name.isidentifier():
        raise InputError(f"{flag} {reference}: expected file.py:name")
    module = run_file(file, flag)
    if not hasattr(module, name):
        raise InputError(f"{flag} {reference}: {file} defines no {name}")
    return getattr(module, name)


def line_in(error: BaseException, file: str) -> int | None:
    """The innermost line of `file` in an error's traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None
