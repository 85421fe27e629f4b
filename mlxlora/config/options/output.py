"""Options of files and reports."""

from collections.abc import Callable, Sequence
from typing import Any

from attrs import validators as v

from ..fields import EachOf, group, option, python_option
from ..given import PathOrName


@group("Output")
class Output:
    """What a run writes and prints, and how often it validates."""

    adapter_path: PathOrName = option("adapters", "Folder for adapters, metrics, configuration and checkpoints.")
    overwrite: bool = option(False, "Replace the files of an earlier run in --adapter-path.")
    resume: bool = option(False, "Continue the run in --adapter-path exactly from its last checkpoint.")
    allow_changed: bool = option(False, "Continue a run whose rows, base weights or tokenizer changed since.")
    steps_per_report: int = option(10, "Steps between two reports.", v.ge(1))
    steps_per_eval: int = option(200, "Steps between two validations; 0 = only after the last step.", v.ge(0))
    val_batches: int = option(25, "Batches of a validation; -1 = all, 0 = none.", v.ge(-1))
    save_every: int = option(100, "Steps between two checkpoints; 0 = only after the last step.", v.ge(0))
    save_total_limit: int = option(2, "Number of checkpoints to keep, the newest ones; 0 = all.", v.ge(0))
    keep_best: bool = option(False, "Write the adapters of the best validation loss, not of the last step.")
    patience: int = option(0, "Stop after this many validations without a better loss; 0 = off.", v.ge(0))
    test: bool = option(False, "Evaluate on the test split after training.")
    quiet: bool = option(False, "Print results and warnings only.")
    dry_run: bool = option(
        False, "Check everything, take real steps on the longest batch and report time and memory; write nothing."
    )
    show_config: bool = option(False, "Print every option of the run before it starts.")
    answers: int = option(1, "Number of validation prompts to answer before, during and after training; 0 = none.", v.ge(0))
    plot: bool = option(False, "Draw the metrics as metrics.png (pip install 'mlxlora[plot]').")
    report_to: Sequence[str] | None = option(
        None,
        "Send metrics to wandb, swanlab, trackio or tensorboard (pip install 'mlxlora[wandb]', ...).",
        EachOf("wandb", "swanlab", "trackio", "tensorboard"),
    )
    project_name: str | None = option(None, "Project of --report-to in wandb, swanlab and trackio; default: mlxlora.")
    callbacks: Sequence[Any] | Callable[..., Any] = python_option(
        (), "Functions (step, metrics), or objects with on_start, on_step, on_evaluate, on_sample, on_checkpoint or on_end."
    )
