"""Checks the folder of a run before it resumes."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, plain
from ..reporting.history import METHOD, METRICS, SETTINGS, read_lines, read_settings


def check_run(directory: str | Path, method: str | None) -> None:
    """Checks that a folder holds a run of this method; None: an objective given in Python.

    Raises:
        InputError: the folder holds no run, or a run of another method.
    """
    file = Path(directory) / SETTINGS
    if not file.is_file():
        raise InputError(f"--resume: {directory} holds no run (no {SETTINGS}); leave --resume out, or name the folder of a run")
    before = read_settings(file)
    if METHOD not in before or before[METHOD] == method:
        return
    name = plain(before[METHOD] or "")
    again = (
        f"{name}; continue it with `mlxlora {name} --resume --adapter-path {directory}`" if name else "a Python script; run that"
    )
    raise InputError(f"--resume: {directory} is a run of {again}")


def check_same(directory: Path, config: Mapping[str, Any], fixed: Collection[str] = ()) -> None:
    """Checks that a resumed run has the options of the run that was stopped.

    Args:
        directory: the folder of the run.
        config: its options now, by name.
        fixed: options that must not differ, of those that otherwise may.

    Raises:
        InputError: an option differs that may not.
    """
    file = directory / SETTINGS
    before = read_settings(file)
    changed = [k for k, v in fixed_options(config, fixed).items() if k in before and before[k] != v]
    if changed:
        differences = "; ".join(f"{k} was {before[k]!r} and is {config[k]!r}" for k in changed)
        raise InputError(f"--resume: {differences}; give the options of {file}, or start another run")


def fixed_options(config: Mapping[str, Any], fixed: Collection[str] = ()) -> dict[str, Any]:
    """The options that a resumed run may not change, and those of `fixed`."""
    return {name: value for name, value in config.items() if name not in _MAY_DIFFER.difference(fixed)}


def check_no_adapters(directory: Path, weights: str, first: int) -> None:
    """Checks that a folder without a checkpoint has no adapters that starting again would delete.

    Args:
        directory: the folder of the run.
        weights: the file of the adapters.
        first: the step of the first checkpoint, if the best adapters of a validation may be saved before it; else 0.

    Raises:
        InputError: it has, and not from a run that was stopped before its first checkpoint.
    """
    if not (directory / weights).exists():
        return
    steps = [row.get("step", 0) for row in read_lines(directory / METRICS)]
    if not steps or max(steps) >= first:
        raise InputError(
            f"--resume: {directory} has adapters ({weights}), but no checkpoint to resume from; replace them with --overwrite, "
            f"or start from them: --resume-adapter-file {directory / weights} and another --adapter-path"
        )


_MAY_DIFFER = {
    *("iters", "epochs", "steps_per_report", "steps_per_eval", "val_batches", "save_every", "save_total_limit", "keep_best"),
    *("patience", "test", "quiet", "resume", "overwrite", "adapter_path", "resume_adapter_file", "token_cache"),
    *(
        "micro_batch",
        "memory_limit",
        "grad_checkpoint",
        "fully_shard",
        "allow_changed",
        "dry_run",
        "show_config",
        "answers",
        "plot",
        "report_to",
        "project_name",
    ),
}  # options that a resumed run may change
