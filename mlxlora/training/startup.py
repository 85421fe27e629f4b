"""What is checked and printed before the first step."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

import yaml

from ..adapters.files import CONFIG, WEIGHTS
from ..config.options import AdapterOptions, Output, Training
from ..data.sources import Split
from ..data.tokenize import Counts
from ..errors import InputError
from ..reporting.card import CARD
from ..reporting.history import METRICS, PAGE, PICTURE, SAMPLES, SETTINGS
from ..reporting.terminal import Terminal
from ..utils.files import sweep
from ..utils.folders import writing
from .run import Run
from .run_folder import check_run

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


def introduce(run: Run) -> None:
    """What will be trained on: counts, what was cut, the first example with its scored part marked."""
    if run.output.show_config:
        run.tell("note", yaml.safe_dump(dict(run.config), sort_keys=False).rstrip())
    for name in ("reward_file", "objective"):
        if file := run.config.get(name):
            run.tell("note", f"runs your Python code: {file} (--{name.replace('_', '-')})")
    for name, split in run.splits.items():
        _count(run, name, split)
    if not run.splits["valid"].items:
        run.tell("note", "no validation split: --valid-fraction 0.1 would make one")
    if run.tokenizer.has_chat_template and not run.source.data.use_chat_template and _plain(run):
        run.tell(
            "note",
            "rows are plain text; the model has a chat template: --use-chat-template would wrap prompts and completions in it",
        )
    first = run.source.examples(run.splits["train"].items[0])[0]
    for reporter in run.reporters:
        if isinstance(reporter, Terminal):
            reporter.example(first.tokens.tolist(), first.loss_mask.tolist(), run.tokenizer.decode)


def _count(run: Run, name: str, split: Split) -> None:
    counts: Counts = split.counts
    if not counts.rows:
        return
    run.tell("note", f"{name}: {counts.rows} rows")
    limit = f"--max-seq-length {run.source.data.max_seq_length}"
    if counts.truncated:
        run.tell("note", f"{name}: {counts.truncated} rows were cut to {limit}", warning=True)
    if counts.dropped:
        run.tell("note", f"{name}: {counts.dropped} rows dropped: too long for {limit}", warning=True)


def _plain(run: Run) -> bool:
    """Whether the first row, which stands for all, was not rendered by the template."""
    first = run.source.examples(run.splits["train"].items[0])[0]
    return "<|" not in run.tokenizer.decode(first.tokens.tolist()[:8])


_WHOLE = ("adafactor", "muon")


def check_options(training: Training, adapter: AdapterOptions, *, online: bool, with_teacher: bool) -> None:
    """Checks that what --fully-shard is asked to train can be trained in slices.

    Raises:
        InputError: it cannot.
    """
    if not training.fully_shard:
        return
    refused = {
        f"--train-type {adapter.train_type}: adapters are small; use --train-type full, or leave --fully-shard out": (
            adapter.train_type != "full"
        ),
        f"--optimizer {training.optimizer} looks at whole matrices; use adam, adamw, lion or sgd": training.optimizer in _WHOLE,
        "--qat rounds whole matrices; leave one of the two out": adapter.qat is not None,
        "--resume-adapter-file: make a model with `mlxlora fuse` and name it with --model": bool(adapter.resume_adapter_file),
        "a rank samples at its own pace, with a whole model; use sft, dpo, cpo, orpo or kto, or leave the flag out": online,
        "a teacher is whole on every rank; use sft on its answers, or leave the flag out": with_teacher,
    }
    for problem in (text for text, holds in refused.items() if holds):
        raise InputError(f"--fully-shard: {problem}")
