"""Which code may run and which paths may be written: only those that the user names on the command line.

Files that came with a model or with adapters, and files that a run stored, are foreign data: they cannot enable code, and
they cannot name places outside their own folder.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from ..errors import InputError
from .launch import launched_rank
from .output import say
from .paths import check_links

CODE = {"objective", "reward_file", "trust_remote_code"}
"""Options that run Python code."""

SENDS = {"push_to_hub", "report_to"}
"""Options that send something to a service."""

REPLACES = {"overwrite", "resume"}
"""Options that change an earlier result, which may lie in the default folder of a command."""

PLACES = {"adapter_path", "save_path", "peft", "gguf", "output"}
"""Options that name an output path."""

_MARKERS = ("adapter_config.json", "*.safetensors")
WEIGHTS_END = ".safetensors"
"""Ends the names of files of weights, which are numbers and hold no secrets."""

_MODEL_CONFIG = "config.json"
_HUB_CACHE = ("models--*", "datasets--*", "spaces--*")  # folders of the hub's cache, one a repository
_MOST_LINKS = 40  # as Linux follows


def announce(text: str) -> None:
    """Prints on standard error which code of a model will run, also with --quiet."""
    if not launched_rank():
        say(f"running Python code: {text}")


def came_with_model(file: str | Path) -> bool:
    """Whether a file lies in or below a folder of a model or of adapters, or in the hub's cache.

    Every folder above the file counts: as the path names them, and those of each link that the path follows, since the files of
    the hub's cache are links. A config.json that names no architecture counts in the file's own folder only. The folders that hold
    everything of a user (home, temporary files, root) are no models, unless the file lies there itself.
    """
    return any(_holds_model(folder, own) for folder, own in _parents_of(file).items())


def _parents_of(file: str | Path) -> dict[Path, bool]:
    """The folders above a file, by its name and by every link on the way to it; whether each is the file's own folder."""
    found: dict[Path, bool] = {}
    for path in _ways(Path(file)):
        for level, folder in enumerate(path.parents):
            found[folder] = found.get(folder, False) or not level
    return found


def _ways(file: Path) -> list[Path]:
    """The absolute paths of a file: as given, and with one link after the other replaced by its target."""
    ways = [file.absolute()]
    while len(ways) <= _MOST_LINKS:
        link = next((path for path in (*reversed(ways[-1].parents), ways[-1]) if path.is_symlink()), None)
        if link is None:
            break
        ways.append(link.parent / link.readlink() / ways[-1].relative_to(link))
    return [*ways, Path(os.path.realpath(file))]  # raises nothing where links make a circle


def _holds_model(folder: Path, own: bool) -> bool:
    if any(folder.match(name) for name in _HUB_CACHE):
        return True
    if not own and folder.resolve() in _shared_folders():
        return False
    found = any(next(folder.glob(marker), None) for marker in _MARKERS) if folder.is_dir() else False
    config = folder / _MODEL_CONFIG
    return found or (config.is_file() and (own or "model_type" in _object(config)))


def _shared_folders() -> set[Path]:
    """Folders that hold everything of a user."""
    return {path.resolve() for path in (Path.home(), Path(gettempdir()), Path(Path.cwd().anchor))}


def check_config(
    file: str | Path, values: Mapping[str, Any], named: Iterable[str], lines: Mapping[str, int], *, stored: bool = False
) -> None:
    """Refuses a foreign configuration file that asks for code, uploads, replaced files or paths outside its folder.

    Args:
        file: the configuration.
        values: its options.
        named: options on the command line, which override the file's.
        lines: line numbers of the options in the file.
        stored: a run wrote the file, so it is foreign wherever it lies.

    Raises:
        InputError: the file is foreign and asks for one of them.
    """
    watched = CODE | SENDS | REPLACES | PLACES
    asked = {name: value for name, value in values.items() if name in watched and value and name not in set(named)}
    if not asked or not (stored or came_with_model(file)):
        return
    homes = [path.parent for path in _ways(Path(file))]
    for name, value in asked.items():
        location = f"{file}:{lines[name]}: {name}" if name in lines else f"{file}: {name}"
        if deed := _deed(name, stored=stored):
            kept = "that a run stored" if stored else "beside a model or adapters"
            raise InputError(
                f"{location} {deed}, which a configuration {kept} may not; add {_flag(name, value)} to the command line to allow it"
            )
        if name in PLACES and not all(inside(str(value), home, Path()) for home in homes):
            raise InputError(
                f"{location} {value} points outside {homes[0]}, where this configuration came from; add {_flag(name, value)} to "
                "allow it"
            )


def _deed(name: str, *, stored: bool) -> str:
    """What an option does that a foreign configuration may not; a run's own file says how the run was started."""
    if name in CODE:
        return "runs code"
    if name in SENDS:
        return "uploads" if name == "push_to_hub" else "sends metrics to a service"
    return "changes earlier results" if name in REPLACES and not stored else ""


def _flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    if value is True:
        return flag
    return f"{flag} {','.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def inside(path: str | Path, folder: Path, start: Path | None = None) -> bool:
    """Whether a path, relative to `start` or else to the folder, is the folder or lies in it, after following links.

    >>> inside("a/b", Path("/m")), inside("a/../../n", Path("/m")), inside("/etc", Path("/m"))
    (True, False, False)
    """
    return ((folder if start is None else start) / path).resolve().is_relative_to(folder.resolve())


def check_model_code(folder: Path, flag: str, trusted: bool | None) -> None:
    """Refuses a model folder with Python code that would run, unless that is allowed; then prints which code runs.

    Links of its files may stay in the folder or lead into the hub's cache; those of weights may lead anywhere.

    Args:
        folder: of the model.
        flag: the option and value that name it, for messages.
        trusted: whether --trust-remote-code was given; None: never trust this model.

    Raises:
        InputError: the code is not trusted, or is not a file of the folder, or another link leads out of it.
    """
    check_links(folder, flag, apart_from=WEIGHTS_END)
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
