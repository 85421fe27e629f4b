"""What is checked before anything is loaded: that the packages which options need are there, and that the folder may be written."""

from importlib.util import find_spec
from pathlib import Path

from .adapters import WEIGHTS
from .config import Output
from .errors import InputError
from .records import METRICS

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


def claim(output: Output) -> None:
    """Checks that a run may write to its folder, before anything expensive happens.

    Raises:
        InputError: an earlier run is there and neither --resume nor --overwrite was given, nothing can be written, or a package
            is missing.
    """
    check_extras(output)
    if output.dry_run:
        return
    directory = Path(output.adapter_path)
    used = [name for name in (WEIGHTS, METRICS, "checkpoints") if (directory / name).exists()]
    if used and not (output.resume or output.overwrite):
        raise InputError(
            f"--adapter-path {directory} already holds a run ({', '.join(used)}); "
            "continue it with --resume, replace it with --overwrite, or name another folder"
        )
    if output.resume and output.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    _check_writable(directory)


def _check_writable(directory: Path) -> None:
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"--adapter-path {directory}: {existing} is a file")
    try:
        probe = existing / ".mlxlora-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--adapter-path {directory}: cannot write to {existing} ({error.strerror})") from None
