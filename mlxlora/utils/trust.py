"""Whose code runs and whose paths are written to: what a user named on the command line, nothing that came with a model.

What came with a model or with adapters, and what a run stored, is data from elsewhere: it may not name code that runs, nor
places outside its own folder.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .launch import launched_rank

CODE = {"objective", "reward_file", "trust_remote_code"}
"""Options that make somebody's Python code run."""

SENDS = {"push_to_hub"}
"""Options that send something away."""

PLACES = {"adapter_path", "save_path", "peft", "gguf"}
"""Options that name a place to write to."""

_MARKERS = ("adapter_config.json", "*.safetensors", "config.json")
_NEAR = 3  # folders above a file in which the model that it came with is looked for


def announce(text: str) -> None:
    """Says on standard error which code of a model is going to run, also under --quiet."""
    if not launched_rank():
        print(f"running Python code: {text}", file=sys.stderr, flush=True)


def came_with_model(file: str | Path) -> bool:
    """Whether a file lies in a folder of a model or of adapters, or just below one; a config.json counts beside it only."""
    folders = Path(file).resolve().parents[:_NEAR]
    markers = [_MARKERS, *[_MARKERS[:2]] * (len(folders) - 1)]
    return any(next(folder.glob(marker), None) for folder, some in zip(folders, markers, strict=True) for marker in some)


def check_config(
    file: str | Path, values: Mapping[str, Any], named: Iterable[str], lines: Mapping[str, int], *, stored: bool = False
) -> None:
    """Checks what a configuration file asks for beyond numbers.

    Args:
        file: the configuration.
        values: its options.
        named: options named on the command line, which win over the file's.
        lines: of the options in the file.
        stored: a run wrote it, wherever it lies.

    Raises:
        InputError: it came with a model or a run and names code, a place outside its folder, or somewhere to send to.
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
                f"{location} {value} leads out of {folder}, where this configuration came from; add {flag} to allow it"
            )


def inside(path: str | Path, folder: Path, start: Path | None = None) -> bool:
    """Whether a path, from `start` or else from the folder, is the folder or lies in it, links followed.

    >>> inside("a/b", Path("/m")), inside("a/../../n", Path("/m")), inside("/etc", Path("/m"))
    (True, False, False)
    """
    return ((folder if start is None else start) / path).resolve().is_relative_to(folder.resolve())


def check_model_code(folder: Path, flag: str, trusted: bool | None) -> None:
    """Refuses a model folder whose Python code would run, or names that code in the log.

    Args:
        folder: of the model.
        flag: option and value that name it, for messages.
        trusted: whether --trust-remote-code was given; None: such models are never trusted.

    Raises:
        InputError: there is such code and it is not trusted, or it is no file of the folder.
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
    """Whether a relative path stays in its folder, whatever is linked there: the hub's cache is made of links.

    >>> inside_by_name("a/b.py"), inside_by_name("../b.py"), inside_by_name("/b.py")
    (True, False, False)
    """
    return not Path(path).is_absolute() and ".." not in Path(path).parts


def _object(file: Path) -> dict[str, Any]:
    """A JSON object, read as mlx-lm reads it; empty where there is none, which whoever needs it says better."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
