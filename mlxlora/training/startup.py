"""Checks the folder and the options of a run, and introduces its data, before the first step."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml

from ..adapters.files import CONFIG, WEIGHTS
from ..config.given import name_of
from ..config.options import AdapterOptions, Output, Training
from ..data.formats import field_names, is_text
from ..data.rows import Row
from ..data.stop_tokens import never_stops, stops_told
from ..data.tokenize import Counts
from ..errors import InputError
from ..reporting.card import CARD
from ..reporting.history import METRICS, PAGE, PICTURE, SAMPLES, SETTINGS
from ..reporting.reporter import Reporter
from ..utils.files import sweep
from ..utils.folders import locked_folder
from ..utils.marker import MARKER
from ..utils.paths import checked_path
from .checkpoint import FOLDER
from .inputs import Run
from .run_files import check_names
from .run_folder import check_run

EXTRAS = {"plot": "matplotlib", "wandb": "wandb", "swanlab": "swanlab", "trackio": "trackio", "tensorboard": "tensorboardX"}
"""The package that each extra of pyproject.toml installs."""


def check_extras(output: Output) -> None:
    """Checks that the packages that --plot and --report-to need are installed.

    Raises:
        InputError: a package is missing.
    """
    wanted = {"--plot": "plot"} if output.plot else {}
    wanted |= {f"--report-to {name}": name for name in output.report_to or ()}
    for flag, extra in wanted.items():
        if find_spec(EXTRAS[extra]) is None:
            raise InputError(f"{flag} needs {EXTRAS[extra]}: pip install 'mlxlora[{extra}]'")


@contextmanager
def claimed(output: Output, method: str | None, *, evaluated: bool = False) -> Iterator[None]:
    """Holds the lock on the folder of a run, and removes files that a killed run left half written.

    Enter it before anything expensive.

    Args:
        output: names the folder.
        method: the method of the run, as `check_run` takes it.
        evaluated: whether `mlxlora eval` has its loss.

    Raises:
        InputError: the folder holds an earlier run, and neither --resume nor --overwrite was given; it holds no run of this method
            to resume; another run is writing there; it cannot be written; or a package is missing.
        RunError: the folder can no longer be written, for example because the disk is full.
    """
    check_extras(output)
    if output.dry_run:
        yield
        return
    directory = checked_path(output.adapter_path, "--adapter-path")
    _check_writable(directory)
    with locked_folder(directory, "--adapter-path"):
        _check_unused(directory, output, method, evaluated)
        sweep(directory, WEIGHTS, CONFIG, METRICS, SAMPLES, SETTINGS, CARD, PAGE, PICTURE, MARKER)
        sweep(directory / FOLDER, "[0-9]*")
        yield


def _check_unused(directory: Path, output: Output, method: str | None, evaluated: bool) -> None:
    used = [name for name in (WEIGHTS, METRICS, FOLDER) if (directory / name).exists()]
    if used and not (output.resume or output.overwrite):
        to_test = _how_to_test(directory, output, method, evaluated)
        raise InputError(
            f"--adapter-path {directory} already holds a run ({', '.join(used)}); {to_test}"
            "continue it with --resume, replace it with --overwrite, or name another folder"
        )
    if output.resume and output.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if output.resume:
        check_run(directory, method)
    check_names(directory, resume=output.resume)


def _how_to_test(directory: Path, output: Output, method: str | None, evaluated: bool) -> str:
    """Suggests `eval` if --test meets a finished run, which should not be trained again for a test."""
    if not output.test or method is None:
        return ""
    command = (
        f"eval --adapter-path {directory} --split test" if evaluated else f"{method} --resume --test --adapter-path {directory}"
    )
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


_ASKED = 100  # rows in which a stop token is looked for


def introduce(run: Run, row: Row, reporter: Reporter) -> None:
    """Reports what the run trains on: row counts, cut and dropped rows, the first example with its trained tokens marked.

    Args:
        run: its inputs.
        row: the first of training.
        reporter: is told.
    """
    config, data = run.options.config, run.source.data
    if run.options.output.show_config:
        reporter.note(yaml.safe_dump(dict(config), sort_keys=False).rstrip())
    for name in ("reward_file", "objective"):
        if file := config.get(name):
            reporter.note(f"runs your Python code: {file} (--{name.replace('_', '-')})")
    for name, split in run.splits.items():
        _report_counts(name, split.counts, data.max_seq_length, reporter)
    if not run.splits["valid"].items:
        reporter.note("no validation split: --valid-fraction 0.1 would make one")
    reporter.note(stops_told(run.tokenizer))
    if not run.source.online:
        items = run.splits["train"].items[:_ASKED]
        examples = [example for item in items for example in run.source.examples(item) if not example.truncated]
        if examples and never_stops(examples, run.tokenizer):
            remedy = "use the model's chat template, or name the token that ends your rows with --eos-token"
            reporter.note(f"no trained turn ends in a stop token, so answers will not end; {remedy}", warning=True)
    first = run.source.examples(run.splits["train"].items[0])[0]
    text = run.tokenizer.decode(first.tokens.tolist())
    has_parts = (
        run.source.online or first.prompt is not None or not first.loss_mask[1:].all() or not is_text(row, field_names(data))
    )
    may_wrap = run.tokenizer.has_chat_template and not data.use_chat_template and has_parts
    if may_wrap and not is_rendered(text, run.tokenizer):
        reporter.note(
            "rows are plain text; the model has a chat template: --use-chat-template would wrap prompts and completions in it"
        )
    if first.truncated:
        reporter.note(f"the first example is cut to --max-seq-length {data.max_seq_length}", warning=True)
    reporter.example(first.tokens.tolist(), first.loss_mask.tolist(), run.tokenizer.decode)


def _report_counts(name: str, counts: Counts, max_seq_length: int, reporter: Reporter) -> None:
    if not counts.rows:
        return
    reporter.note(f"{name}: {counts.rows} rows")
    limit = f"--max-seq-length {max_seq_length}"
    if counts.truncated:
        reporter.note(f"{name}: {counts.truncated} rows were cut to {limit}", warning=True)
    if counts.dropped:
        reporter.note(f"{name}: {counts.dropped} rows dropped: too long for {limit}", warning=True)


def is_rendered(text: str, tokenizer: Any) -> bool:
    """Whether a text has the marks that the chat template of a tokenizer puts around a message of the user.

    The marks are the end of the line before the message and the beginning of the line after it, unless that is a stop token, which
    ends plain rows too. A template that renders no such message has no marks that are known, so every text counts as rendered.
    """
    try:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": _MESSAGE}], tokenize=False)
    except Exception:  # templates are programs that raise what they like
        return True
    before, _, after = rendered.partition(_MESSAGE)
    before = before.removeprefix(getattr(tokenizer, "bos_token", None) or "")
    marks = [line.strip() for line in (*before.splitlines()[-1:], *after.splitlines()[:1])]
    stops = {tokenizer.decode([token]) for token in tokenizer.eos_token_ids}
    return any(mark and mark not in stops and mark in text for mark in marks)


_MESSAGE = "a message of the user"

_WHOLE_MATRICES = ("adafactor", "muon")


def check_options(training: Training, adapter: AdapterOptions, *, online: bool, with_teacher: bool) -> None:
    """Checks that --fully-shard can train with these options.

    Raises:
        InputError: an option excludes slices of parameters.
    """
    if not training.fully_shard:
        return
    optimizer = training.optimizer if isinstance(training.optimizer, str) else name_of(training.optimizer)
    refused = {
        f"--train-type {adapter.train_type}: adapters are small; use --train-type full, or leave --fully-shard out": (
            adapter.train_type != "full"
        ),
        f"--optimizer {optimizer} looks at whole matrices; use adam, adamw, lion or sgd": optimizer.lower() in _WHOLE_MATRICES,
        "--qat rounds whole matrices; leave one of the two flags out": adapter.qat is not None,
        "--resume-adapter-file: make a model with `mlxlora fuse` and name it with --model": bool(adapter.resume_adapter_file),
        "ranks sample at their own pace, each with a whole model; use sft, dpo, cpo, orpo or kto, or leave the flag out": online,
        "every rank would hold a whole teacher; use sft on its answers, or leave the flag out": with_teacher,
    }
    for problem in (text for text, holds in refused.items() if holds):
        raise InputError(f"--fully-shard: {problem}")
