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
from .records import METRICS, PAGE, PICTURE, SAMPLES, SETTINGS, check_run

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
def claimed(output: Output, method: str | None) -> Iterator[None]:
    """The folder of a run while nobody else writes there, without what a killed run left half written.

    It is checked before anything expensive happens.

    Args:
        output: names the folder.
        method: of the run, as `check_run` takes it.

    Raises:
        InputError: an earlier run is there and neither --resume nor --overwrite was given, none or one of another method is
            there to be resumed, another one is writing there now, nothing can be written, or a package is missing.
        RunError: the folder can no longer be written, because the disk is full for instance.
    """
    check_extras(output)
    if output.dry_run:
        yield
        return
    directory = Path(output.adapter_path)
    _check_writable(directory)
    with writing(directory, "--adapter-path"):
        _check_unused(directory, output, method)
        sweep(directory, WEIGHTS, CONFIG, METRICS, SAMPLES, SETTINGS, CARD, PAGE, PICTURE)
        sweep(directory / "checkpoints", "[0-9]*")
        yield


def _check_unused(directory: Path, output: Output, method: str | None) -> None:
    used = [name for name in (WEIGHTS, METRICS, "checkpoints") if (directory / name).exists()]
    if used and not (output.resume or output.overwrite):
        raise InputError(
            f"--adapter-path {directory} already holds a run ({', '.join(used)}); {_how_to_test(directory, output, method)}"
            "continue it with --resume, replace it with --overwrite, or name another folder"
        )
    if output.resume and output.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if output.resume:
        check_run(directory, method)


def _how_to_test(directory: Path, output: Output, method: str | None) -> str:
    """Who asks for a test may want nothing else: without this advice the other would make them train again."""
    if not output.test or method is None:
        return ""
    of_rows = method in ("sft", "distill")  # the others have a loss of their own
    command = f"eval --adapter-path {directory} --split test" if of_rows else f"{method} --resume --test --adapter-path {directory}"
    return f"to test it, `mlxlora {command}`; to train, "


def _check_writable(directory: Path) -> None:
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"--adapter-path {directory}: {existing} is a file")
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"--adapter-path {directory}: cannot write to {existing} ({error.strerror})") from None
