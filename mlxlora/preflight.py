"""What is checked before anything is loaded: that the packages which options need are there, and that the folder may be written."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from .adapters import CONFIG, WEIGHTS
from .card import CARD
from .config import Output
from .errors import InputError
from .files import sweep
from .folders import writing
from .records import METRICS, PAGE, PICTURE, SAMPLES, SETTINGS

PACKAGES = {"plot": "matplotlib", "wandb": "wandb", "swanlab": "swanlab", "trackio": "trackio", "tensorboard": "tensorboardX"}
"""The package that each extra of pyproject.toml brings."""


def check_extras(output: Output) -> None:
    """Checks that what --plot and --report-to need can be imported.

    Raises:
        InputError: it is not installed.
    """
    wanted = {"--plot": "plot"} if output.plot else {}
    wanted |= {f"--report-to {name}": name for name in output.report_to or ()}
    for flag, extra in wanted.items():
        if find_spec(PACKAGES[extra]) is None:
            raise InputError(f"{flag} needs {PACKAGES[extra]}: pip install 'mlxlora[{extra}]'")


@contextmanager
def claimed(output: Output) -> Iterator[None]:
    """The folder of a run while nobody else writes there, without what a killed run left half written.

    It is checked before anything expensive happens.

    Raises:
        InputError: an earlier run is there and neither --resume nor --overwrite was given, another one is writing there now,
            nothing can be written, or a package is missing.
        RunError: the folder can no longer be written, because the disk is full for instance.
    """
    check_extras(output)
    if output.dry_run:
        yield
        return
    directory = Path(output.adapter_path)
    _check_writable(directory)
    with writing(directory, "--adapter-path"):
        _check_unused(directory, output)
        sweep(directory, WEIGHTS, CONFIG, METRICS, SAMPLES, SETTINGS, CARD, PAGE, PICTURE)
        sweep(directory / "checkpoints", "[0-9]*")
        yield


def _check_unused(directory: Path, output: Output) -> None:
    used = [name for name in (WEIGHTS, METRICS, "checkpoints") if (directory / name).exists()]
    if used and not (output.resume or output.overwrite):
        raise InputError(
            f"--adapter-path {directory} already holds a run ({', '.join(used)}); "
            "continue it with --resume, replace it with --overwrite, or name another folder"
        )
    if output.resume and output.overwrite:
        raise InputError("--resume and --overwrite exclude each other")


def _check_writable(directory: Path) -> None:
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"--adapter-path {directory}: {existing} is a file")
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"--adapter-path {directory}: cannot write to {existing} ({error.strerror})") from None
