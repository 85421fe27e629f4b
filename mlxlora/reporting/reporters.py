"""Chooses the reporters of a run."""

from pathlib import Path

from ..config.options import Output
from ..utils.console import safe_console
from .card import CUSTOM, MethodInfo
from .history import METRICS, SAMPLES
from .html import Page
from .notebook import Live, in_notebook
from .plot import Plot
from .reporter import MetricsFile, Reporter, SamplesFile
from .screen import Screen
from .terminal import Terminal
from .trackers import Tracker


def reporters(output: Output, method: MethodInfo = CUSTOM) -> tuple[Reporter, ...]:
    """The terminal and, unless it is a dry run, the files of the run and the trackers of --report-to."""
    directory, terminal = Path(output.adapter_path), terminal_for(method, quiet=output.quiet or in_notebook())
    if output.dry_run:
        return (terminal,)
    trackers = [Tracker(name, directory, lambda text: terminal.note(text, warning=True)) for name in output.report_to or ()]
    files = (MetricsFile(directory / METRICS), SamplesFile(directory / SAMPLES))
    live = [Live()] if in_notebook() and not output.quiet else []
    pictures = (*live, Page(directory, method), *([Plot(directory)] if output.plot else []))
    return (terminal, *files, *trackers, *pictures)


def terminal_for(method: MethodInfo, *, quiet: bool = False) -> Terminal:
    """A table for a person at a terminal; lines for a pipe or a file."""
    console = safe_console()
    if console.is_terminal:
        return Screen(method.columns, quiet, console, evaluated=method.evaluated)
    return Terminal(quiet, evaluated=method.evaluated)
