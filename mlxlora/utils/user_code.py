"""A user's own Python file, executed only when a flag names it."""

import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError

_PACKAGES = {"PIL": "pillow", "bs4": "beautifulsoup4", "cv2": "opencv-python", "sklearn": "scikit-learn"}
"""Packages that are not called as their modules are."""


def execute(file: str, flag: str, stand_ins: Mapping[str, ModuleType] | None = None) -> ModuleType:
    """Runs a Python file as a module; its folder is importable for it.

    Args:
        file: the Python file.
        flag: what names it.
        stand_ins: modules, with the packages that they are in, for it to import where these packages are not installed.

    Raises:
        InputError: no such file, or it raised: with the line of the file.
    """
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{flag} {file}: no such file")
    if str(path.parent.resolve()) not in sys.path:
        sys.path.append(str(path.parent.resolve()))  # so that it can import its neighbours
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
    """Modules that stand in for those that are not installed, while the context lasts."""
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
    """What to do about an import of something that is not there; None: the error is another one."""
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
    module = execute(file, flag)
    if not hasattr(module, name):
        raise InputError(f"{flag} {reference}: {file} defines no {name}")
    return getattr(module, name)


def line_in(error: BaseException, file: str) -> int | None:
    """The innermost line of `file` that an error passed through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None


def one_line(error: BaseException) -> str:
    """Type and message of an error, without line breaks."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
