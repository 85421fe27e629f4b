"""report.html: one file that shows a run, or compares several; its HTML is `report.html.jinja`."""

import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
from attrs import field, frozen

from ..data.formats import last_text
from ..utils.device import device_name, package_version
from ..utils.files import atomic_file
from .card import CUSTOM, MethodInfo, changed_options, portable
from .history import METHOD, PAGE, SPLITS, Record, differing, method_of, outcome, read_record
from .reporter import Reporter, Values
from .svg import Line, chart

COLORS = 8  # of lines, in the style of the page
_PACKAGES = ("mlxlora", "mlx", "mlx-lm", "transformers", "numpy")
_SECTIONS: dict[str, Callable[[str], bool]] = {
    "Loss and rewards": lambda n: n in ("loss", "reward", "perplexity") or (n.startswith("rewards/") and not n.endswith("/std")),
    "Completions": lambda n: n.startswith(("completions/", "frac_")) or n.endswith(("reward_std", "/std")) or n == "entropy",
    "Optimizer": lambda n: n in ("grad_norm", "learning_rate"),
    "Speed and memory": lambda n: "seconds" in n or "tokens" in n or n == "peak_memory_gb",
    "Everything else": lambda _: True,
}


class Page(Reporter):
    """Writes report.html into the folder of a run when it ends or is interrupted.

    Args:
        directory: of the run.
        method: of the run.
    """

    def __init__(self, directory: str | Path, method: MethodInfo = CUSTOM) -> None:
        self.directory, self._method = Path(directory), method
        self._answers: Sequence[Values] = ()

    def answers(self, rows: Sequence[Values]) -> None:
        self._answers = rows

    def finish(self, summary: Values) -> None:
        """Reads the files of the run, so that the page of a resumed run shows all of it."""
        parts = PageParts(summary, self._answers, environment())
        write(self.directory / PAGE, run_page(read_record(self.directory), self._method, parts))


def write(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def environment() -> dict[str, str]:
    """What the numbers of a run depend on besides its options; without names of the machine or its user."""
    return {
        **{name: package_version(name) or "not installed" for name in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{str(mx.default_device()).removeprefix('Device(').split(',')[0]} {device_name() or platform.machine()}",
        "written": datetime.now().astimezone().isoformat(" ", "minutes"),
    }


# --- what a page shows ------------------------------------------------------------------------


@frozen
class Table:
    """Lines of values, under names if `head` has any; `long` values are monospaced and keep their line breaks."""

    lines: Sequence[Sequence[Any]]
    head: Sequence[str] = ()
    long: bool = False


@frozen
class Section:
    """A part of a page: charts (SVG elements), a table, and a table that is folded under a title of its own."""

    title: str
    table: Table | None = None
    charts: Sequence[str] = ()
    folded: "Section | None" = None

    def __bool__(self) -> bool:
        return bool(self.charts or (self.table and self.table.lines) or self.folded)


@frozen
class PageParts:
    """What a page shows besides the files of the run, all of it optional.

    Attributes:
        summary: the results of the run, or why it stopped.
        answers: prompts with the model's answers before and after training.
        environment: versions and device.
    """

    summary: Values = field(factory=dict)
    answers: Sequence[Values] = ()
    environment: Mapping[str, str] = field(factory=dict)


FILES_ALONE = PageParts()


def run_page(record: Record, method: MethodInfo = CUSTOM, more: PageParts = FILES_ALONE) -> str:
    """The HTML of one run.

    Args:
        record: its files.
        method: of the run.
        more: what the page shows besides.
    """
    config, results = portable(record.config), portable({k: v for k, v in more.summary.items() if k != "report"})
    return _html(
        title=f"{method_of(config).upper() or 'Training'}: {config.get('model') or 'a model'}",
        subtitle=f"{config.get('data') or 'data given in Python'} → {Path(record.name).name}",
        stopped=results.get("stopped"),
        sections=[
            Section("Results", _pairs(results or outcome(record))),
            *_curves(record),
            Section("Before and after", _answers(more.answers)),
            Section("Completions, first and last", _completions(record.samples)),
            _configuration(config, method),
            Section("Environment", _pairs(more.environment)),
        ],
    )


def comparison_page(records: Sequence[Record]) -> str:
    """The HTML of several runs: their results, the options in which they differ, and their curves in common charts."""
    names = [record.name for record in records]
    return _html(
        title=f"{len(records)} runs",
        sections=[
            Section("Results", _columns(names, reached(records))),
            Section("Options that differ", _columns(names, portable(differences(records)))),
            Section("Curves", charts=_overlaid(records)),
        ],
    )


def reached(records: Sequence[Record]) -> dict[str, list[str]]:
    """The results of each run by metric; the losses of different methods are metrics of their own."""
    outcomes = [
        {name + _apart(name.split()[1].rstrip(","), label): value for name, value in outcome(record).items()}
        for record, label in zip(records, _methods(records), strict=True)
    ]
    return {name: [found.get(name, "") for found in outcomes] for name in dict.fromkeys(n for o in outcomes for n in o)}


def differences(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The methods if the runs have several, and the options in which they differ."""
    methods = [method_of(record.config) for record in records]
    return ({METHOD: methods} if len(set(methods)) > 1 else {}) | differing(records)


def _methods(records: Sequence[Record]) -> list[str]:
    """Labels that tell the metrics of different methods apart; empty if all runs have one method."""
    methods = [method_of(record.config) or "custom objective" for record in records]
    return [f" ({method})" if len(set(methods)) > 1 else "" for method in methods]


def _apart(metric: str, label: str) -> str:
    """The label, for a metric that means something else in each method."""
    alike = ("Completions", "Optimizer", "Speed and memory")
    return "" if metric == "reward" or any(_SECTIONS[title](metric) for title in alike) else label


def _curves(record: Record) -> list[Section]:
    """A section for each kind of metric that the run has."""
    left, sections = record.curves(), []
    for title, belongs in _SECTIONS.items():
        names = [name for name in left if belongs(name)]
        charts = [chart(name, [Line(s, left[name][s], i) for i, s in enumerate(SPLITS) if s in left[name]]) for name in names]
        sections.append(Section(title, charts=list(filter(None, charts))))
        left = {name: splits for name, splits in left.items() if name not in names}
    return sections


def _overlaid(records: Sequence[Record]) -> list[str]:
    """A chart for each metric of each split, with a line per run in the run's color; losses of each method apart."""
    charts: dict[tuple[str, str], list[Line]] = {}
    for i, (record, label) in enumerate(zip(records, _methods(records), strict=True)):
        for name, splits in record.curves().items():
            for split, points in splits.items():
                lines = charts.setdefault((name, f"{split} {name}{_apart(name, label)}"), [])
                lines.append(Line(record.name, points, i % COLORS))
    ordered = sorted(charts.items(), key=lambda entry: (entry[0][0] != "loss", entry[0][0] != "reward"))
    return list(filter(None, (chart(title, lines) for (_, title), lines in ordered)))


def _pairs(values: Values) -> Table:
    return Table(list(values.items()))


def _columns(names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> Table:
    return Table([(name, *values) for name, values in rows.items()], ("", *names))


def _configuration(config: Values, method: MethodInfo) -> Section:
    if not config:
        return Section("Configuration")
    return Section("Configuration", _pairs(changed_options(config, method)), folded=Section("All options", _pairs(config)))


def _answers(rows: Sequence[Values]) -> Table:
    columns = ("prompt", *(["expected"] if any(row.get("expected") for row in rows) else []), "before", "after")
    return Table([[row.get(name, "") for name in columns] for row in rows], columns, long=True)


def _completions(samples: Sequence[Values]) -> Table:
    """The samples of the first and of the last report that has any."""
    steps = sorted({row.get("step", 0) for row in samples})
    shown = [row for row in samples if row.get("step", 0) in {*steps[:1], *steps[-1:]}]
    columns = [name for name in ("step", "prompt", "expected", "completion", "reward") if any(row.get(name) for row in shown)]
    read = {"prompt": last_text, "completion": last_text}  # of a conversation, its last message
    return Table([[read.get(name, _text)(row.get(name)) for name in columns] for row in shown], columns, long=True)


def _text(value: Any) -> str:
    """A value for a cell."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _html(title: str, sections: Sequence[Section], subtitle: str = "", stopped: str | None = None) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["text"] = _text
    page = environment.get_template("report.html.jinja")
    return page.render(title=title, sections=sections, subtitle=subtitle, stopped=stopped, colors=COLORS) + "\n"
