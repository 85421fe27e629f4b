"""Uploads finished folders to the Hugging Face hub, without checkpoints, samples and paths of this machine."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import yaml

from ..errors import InputError, RunError
from ..reporting.card import CARD, CUSTOM, MethodInfo, card, portable, write_card
from ..reporting.history import METRICS, SETTINGS, read_record, read_settings
from ..utils.paths import checked_path, within
from .files import CONFIG, WEIGHTS
from .peft import PEFT_WEIGHTS

_KINDS = {
    WEIGHTS: (WEIGHTS, CONFIG, SETTINGS, METRICS, CARD),
    PEFT_WEIGHTS: (PEFT_WEIGHTS, CONFIG, CARD),
    "config.json": ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", CARD),
}
"""The files to upload, by the file that identifies a folder: adapters, adapters for peft, a model."""


def connect(repo: str, api: Any = None) -> Any:
    """The hub's client, after a check that someone is logged in, before anything expensive happens.

    Args:
        repo: ORG/NAME.
        api: a `huggingface_hub.HfApi` or a replacement.

    Raises:
        InputError: the name is not valid, or nobody is logged in.
        RunError: the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _explained(repo):
        validate_repo_id(repo)
        api = api or HfApi()
        api.whoami()
    return api


def push(folder: str | Path, repo: str, *, public: bool = False, method: MethodInfo = CUSTOM, api: Any = None) -> str:
    """Uploads a finished folder: adapters, adapters exported for peft, or a fused model.

    Does not upload checkpoints, samples and other files; keeps only the last part of absolute paths in the configuration. Adds
    a card to the folder of a run that has none.

    Args:
        folder: what to upload.
        repo: ORG/NAME; created if it does not exist.
        public: whether a new repository is public.
        method: of the run, for the card of a folder that has none.
        api: a `huggingface_hub.HfApi` or a replacement.

    Returns:
        The address of the repository.

    Raises:
        InputError: nothing to upload, a link that leaves the folder, no such repository, nobody logged in, or no write access.
        RunError: the hub does not answer.
    """
    folder = checked_path(folder, "push")
    patterns = _patterns(folder)
    api = connect(repo, api)
    with TemporaryDirectory() as temporary, _explained(repo):
        stage(folder, Path(temporary), patterns, method)
        address = api.create_repo(repo_id=repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=temporary, commit_message="Upload with mlxlora")
    return str(address)


def _patterns(folder: Path) -> tuple[str, ...]:
    found = next((patterns for marker, patterns in _KINDS.items() if (folder / marker).is_file()), None)
    if found is None:
        raise InputError(f"{folder}: nothing to upload; expected one of {', '.join(_KINDS)} there")
    return found


def stage(folder: Path, target: Path, patterns: tuple[str, ...], method: MethodInfo = CUSTOM) -> None:
    """Fills `target` with the files to upload: texts without paths of this machine, links to weights."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns):
            _stage_file(within(file), target / file.name)
    if SETTINGS in patterns and not (target / CARD).exists():
        write_card(target, card(read_record(target), method))


def _stage_file(file: Path, target: Path) -> None:
    if file.name == SETTINGS:
        target.write_text(yaml.safe_dump(portable(read_settings(file)), sort_keys=False))
    elif file.name in ("config.json", CONFIG):
        target.write_bytes(orjson.dumps(portable(orjson.loads(file.read_bytes())), option=orjson.OPT_INDENT_2))
    elif file.suffix in (".safetensors", ".gguf"):
        target.symlink_to(file.resolve())
    else:
        shutil.copy(file, target)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turns the hub's errors into one line with the remedy."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.errors import HTTPError as ConnectionFailed  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repo}: not a name such as org/name ({_line(error)})") from None
    except LocalTokenNotFoundError:
        raise InputError(f"--push-to-hub {repo}: not logged in; run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise InputError(f"--push-to-hub {repo}: the hub rejects the token; run `hf auth login`, or set HF_TOKEN") from None
        if status == 403:
            raise InputError(f"--push-to-hub {repo}: no write access; use a name and a token that have it") from None
        raise RunError(f"--push-to-hub {repo}: {_line(error)}") from None
    except (OSError, ConnectionFailed) as error:  # no network, offline mode
        raise RunError(f"--push-to-hub {repo}: cannot reach the hub ({_line(error)})") from None


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
