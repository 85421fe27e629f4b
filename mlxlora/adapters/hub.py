"""Finished folders on the Hugging Face hub: what others can use, nothing of how and where it was made on this machine."""

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
from ..reporting.card import CARD, portable, write_card
from ..reporting.history import METRICS, SETTINGS, read_record, read_settings
from .files import CONFIG, WEIGHTS
from .peft import PEFT_WEIGHTS

_KINDS = {
    WEIGHTS: (WEIGHTS, CONFIG, SETTINGS, METRICS, CARD),
    PEFT_WEIGHTS: (PEFT_WEIGHTS, CONFIG, CARD),
    "config.json": ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", CARD),
}
"""What is uploaded, by the file that tells what a folder is: adapters, adapters of peft, a model."""


def connect(repo: str, api: Any = None) -> Any:
    """The hub's client, once it is known who is logged in; before anything expensive happens.

    Args:
        repo: ORG/NAME.
        api: a `huggingface_hub.HfApi`, or what behaves like one.

    Raises:
        InputError: the name is none, or nobody is logged in.
        RunError: the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _explained(repo):
        validate_repo_id(repo)
        api = api or HfApi()
        api.whoami()
    return api


def push(folder: str | Path, repo: str, *, public: bool = False, api: Any = None) -> str:
    """Uploads a finished folder: adapters, adapters exported for peft, or a fused model.

    Checkpoints, samples and whatever else lies there stay here; absolute paths in the configuration are shortened to their
    last part. A run's folder without a card gets one.

    Args:
        folder: what to upload.
        repo: ORG/NAME; made if there is none.
        public: for everyone to see; only for a repository that is made now.
        api: a `huggingface_hub.HfApi`, or what behaves like one.

    Returns:
        Its address.

    Raises:
        InputError: nothing to upload, no such place, nobody logged in, or no right to write there.
        RunError: the hub does not answer.
    """
    folder = Path(folder)
    patterns = _patterns(folder)
    api = connect(repo, api)
    with TemporaryDirectory() as temporary, _explained(repo):
        stage(folder, Path(temporary), patterns)
        address = api.create_repo(repo_id=repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=temporary, commit_message="Upload with mlxlora")
    return str(address)


def _patterns(folder: Path) -> tuple[str, ...]:
    found = next((patterns for marker, patterns in _KINDS.items() if (folder / marker).is_file()), None)
    if found is None:
        raise InputError(f"{folder}: nothing to upload; expected one of {', '.join(_KINDS)} there")
    return found


def stage(folder: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Fills `target` with what may be uploaded: texts without this machine's paths, links to everything else."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns):
            _stage_file(file, target / file.name)
    if SETTINGS in patterns and not (target / CARD).exists():
        write_card(target, read_record(target))


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
    """The hub's errors in one line, with the remedy."""
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
            raise InputError(f"--push-to-hub {repo}: the token is not accepted; run `hf auth login`, or set HF_TOKEN") from None
        if status == 403:
            raise InputError(f"--push-to-hub {repo}: you may not write there; use a name and a token with write access") from None
        raise RunError(f"--push-to-hub {repo}: {_line(error)}") from None
    except (OSError, ConnectionFailed) as error:  # no network, offline mode
        raise RunError(f"--push-to-hub {repo}: the hub cannot be reached ({_line(error)})") from None


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
