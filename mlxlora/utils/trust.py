"""Which code may run and which paths may be written: only those that the user names on the command line.

Files that came with a model or with adapters, and files that a run stored, are foreign data: they cannot enable code, and
they cannot name places outside their own folder.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .launch import launched_rank

CODE = {"objective", "reward_file", "trust_remote_code"}
"""Options that run Python code."""

SENDS = {"push_to_hub"}
"""Options that upload something."""

PLACES = {"adapter_path", "save_path", "peft", "gguf"}
"""Options that name an output path."""

_MARKERS = ("adapter_config.json", "*.safetensors", "config.json")
_NEAR = 3  # folders above a file that are searched for a model


def announce(text: str) -> None:
    """Prints on standard error which code of a model will run, also with --quiet."""
    if not launched_rank():
        print(f"running Python code: {text}", file=sys.stderr, flush=True)


def came_with_model(file: str | Path) -> bool:
    """Whether a file lies in or just below a folder of a model or of adapters; a config.json counts in its own folder only."""
    folders = Path(file).resolve().parents[:_NEAR]
    markers = [_MARKERS, *[_MARKERS[:2]] * (len(folders) - 1)]
    return any(next(folder.glob(marker), None) for folder, some in zip(folders, markers, strict=True) for marker in some)


def check_config(
    file: str | Path, values: Mapping[str, Any], named: Iterable[str], lines: Mapping[str, int], *, stored: bool = False
) -> None:
    """Refuses a foreign configuration file that asks for code, uploads or paths outside its folder.

    Args:
        file: the configuration.
        values: its options.
        named: options on the command line, which override the file's.
        lines: line numbers of the options in the file.
        stored: a run wrote the file, so it is foreign wherever it lies.

    Raises:
        InputError: the file is foreign and asks for one of them.
    """
    asked = {name: value for name, value in values.items() if name in CODE | SENDS | PLACES and value and name not in set(named)}
    if not asked or not (stored or came_with_model(file)):
        return
    folder = Path(file).resolve().parent
    for name, value in asked.items():
        flag = "--" + name.replace("_", "-")
        flag = flag if value is True else f"{flag} {value}"
        location = f"{file}:{lines[name]}: {name}" if name in lines else f"{file}: {name}"
        if name in CODE | SENDS:
            told = "runs code" if name in CODE else "uploads"
            kept = "that a run stored" if stored else "beside a model or adapters"
            raise InputError(f"{location} {told}, which a configuration {kept} may not; add {flag} to the command line to allow it")
        if not inside(str(value), folder, Path()):
            raise InputError(
                f"{location} {value} points outside {folder}, where this configuration came from; add {flag} to allow it"
            )


def inside(path: str | Path, folder: Path, start: Path | None = None) -> bool:
    """Whether a path, relative to `start` or else to the folder, is the folder or lies in it, after following links.

    >>> inside("a/b", Path("/m")), inside("a/../../n", Path("/m")), inside("/etc", Path("/m"))
    (True, False, False)
    """
    return ((folder if start is None else start) / path).resolve().is_relative_to(folder.resolve())


def check_model_code(folder: Path, flag: str, trusted: bool | None) -> None:
    """Refuses a model folder with Python code that would run, unless that is allowed; then prints which code runs.

    Args:
        folder: of the model.
        flag: the option and value that name it, for messages.
        trusted: whether --trust-remote-code was given; None: never trust this model.

    Raises:
        InputError: the code is not trusted, or is not a file of the folder.
    """
    file = _object(folder / "config.json").get("model_file")
    if file is not None:
        if not isinstance(file, str) or not inside_by_name(file) or not (folder / file).is_file():
            raise InputError(f"{flag}: model_file in its config.json must name a Python file of the folder, got {file!r}")
        if not trusted:
            remedy = "use a model without" if trusted is None else "read it, then allow it with --trust-remote-code"
            raise InputError(f"{flag}: its config.json runs Python code of the model, {file}; {remedy}")
        announce(f"{folder / file} (model_file of {flag}, allowed by --trust-remote-code)")
    if trusted:
        for name in ("tokenizer_config.json", "config.json"):
            if classes := _object(folder / name).get("auto_map"):
                announce(f"{classes} (auto_map in {name} of {flag}, where transformers needs it; allowed by --trust-remote-code)")


def inside_by_name(path: str) -> bool:
    """Whether a relative path stays in its folder by its name; links do not count, because the hub's cache consists of links.

    >>> inside_by_name("a/b.py"), inside_by_name("../b.py"), inside_by_name("/b.py")
    (True, False, False)
    """
    return not Path(path).is_absolute() and ".." not in Path(path).parts


def _object(file: Path) -> dict[str, Any]:
    """A JSON object, read as mlx-lm reads it; empty if there is none, which its user reports."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
