"""report.html: one file that shows a run, or compares several; its HTML is `report.html.jinja`."""

import base64
import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from attrs import evolve, field, frozen

from ..data.formats import last_text
from ..utils.device import device_name, package_version
from ..utils.files import atomic_file
from .card import CUSTOM, MethodInfo, changed_options, portable
from .charts import SECTIONS, in_words, main_metrics, metric_chart, told_apart
from .compared import best_of
from .history import METHOD, PAGE, Record, differing, method_of, outcome, read_record
from .reporter import Reporter, Values
from .svg import Line, chart
from .text import amount, duration

if TYPE_CHECKING:
    from jinja2 import Template

COLORS = 8  # of lines, in the style of the page
_PACKAGES = ("mlxlora", "mlx", "mlx-lm", "transformers", "numpy")
_OFTEN = 15.0  # seconds between two pages of a run that goes on, at least
_COST = 0.03  # share of the time of a run that pages may take


class Page(Reporter):
    """Writes report.html into the folder of a run: every few reports, when it ends, and when it is interrupted.

    Args:
        directory: of the run.
        method: of the run.
        clock: current time in seconds.
    """

    def __init__(self, directory: str | Path, method: MethodInfo = CUSTOM, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory, self._method, self._clock = Path(directory), method, clock
        self._answers: Sequence[Values] = ()
        self._facts: Values = {}
        self._began = self._due = clock() + _OFTEN

    def overview(self, facts: Values) -> None:
        self._facts = facts

    def record(self, row: Values) -> None:
        """Writes the page if the last one is old; pages that take long are written less often."""
        if (now := self._clock()) >= self._due:
            self._write({})
            self._due = now + max(_OFTEN, (self._clock() - now) / _COST)

    def answers(self, rows: Sequence[Values]) -> None:
        self._answers = rows

    def finish(self, summary: Values) -> None:
        """Reads the files of the run, so that the page of a resumed run shows all of it."""
        self._write(summary)

    def _write(self, summary: Values) -> None:
        parts = PageParts(summary, self._answers, environment(), self._facts)
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
    """Lines of values, under names if `head` has any; `long` values are monospaced, keep their line breaks and are folded.

    `best` has the number of the marked value of each line.
    """

    lines: Sequence[Sequence[Any]]
    head: Sequence[str] = ()
    long: bool = False
    best: Sequence[int | None] = ()


@frozen
class Section:
    """A part of a page: charts (SVG elements), a table, and a part that is folded under its title; or folded as a whole.

    The charts of the main part are large. `legend` has the names of the colors in all charts.
    """

    title: str
    table: Table | None = None
    charts: Sequence[str] = ()
    folded: "Section | None" = None
    is_folded: bool = False
    is_main: bool = False
    legend: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.charts or (self.table and self.table.lines) or self.folded)


@frozen
class PageParts:
    """What a page shows besides the files of the run, all of it optional.

    Attributes:
        summary: the results of the run, or why it stopped.
        answers: prompts with the model's answers before and after training.
        environment: versions and device.
        facts: what the run is, as the terminal shows it.
    """

    summary: Values = field(factory=dict)
    answers: Sequence[Values] = ()
    environment: Mapping[str, str] = field(factory=dict)
    facts: Values = field(factory=dict)


FILES_ALONE = PageParts()


def run_page(record: Record, method: MethodInfo = CUSTOM, more: PageParts = FILES_ALONE) -> str:
    """The HTML of one run.

    Args:
        record: its files.
        method: of the run.
        more: what the page shows besides.
    """
    config, results = portable(record.config), portable({k: v for k, v in more.summary.items() if k not in _NOT_SHOWN})
    return _html(
        title=f"{method_of(config).upper() or 'Training'}: {config.get('model') or 'a model'}",
        subtitle=f"{config.get('data') or 'data given in Python'} → {Path(record.name).name}",
        stopped=results.get("stopped"),
        figures=figures(record, more),
        sections=[
            Section("", charts=_main_charts(record, method), is_main=True),
            Section("Before and after", _answers(more.answers)),
            Section("Completions, first and last", _completions(record.samples)),
            *_other_charts(record, method),
            Section("Results", _pairs(results or outcome(record)), is_folded=True),
            _configuration(config, method),
            Section("Environment", _pairs(more.environment), is_folded=True),
        ],
    )


_NOT_SHOWN = ("report",)


def figures(record: Record, more: PageParts = FILES_ALONE) -> list[tuple[str, str]]:
    """The headline of a page: (figure, what it is), as many as are known."""
    curves, reached_now = record.curves(), outcome(record)
    best = [(value.split(" ", 1), name.split()[1].rstrip(",")) for name, value in reached_now.items() if name.endswith(", best")]
    best = [entry for entry in best if entry[1] != "loss" or "reward" not in curves]  # of sampled runs, its negative
    found = [(value, f"best validation, {in_words(name).split(',')[0].lower()} {step}") for (value, step), name in best[:2]]
    if trained := str(more.facts.get("trained", "")).rpartition(", ")[2]:
        found.append((trained.split()[0], f"parameters trained {trained.partition(' parameters ')[2]}"))
    for metric, what, shown in (("tokens", "tokens read", amount), ("peak_memory_gb", "peak memory", "{:.2f} GB".format)):
        if points := curves.get(metric, {}).get("train"):
            found.append((shown(max(value for _, value in points)), what))
    steps = [row["step"] for row in record.metrics if isinstance(row.get("step"), int)]
    found += [(f"{max(steps):,}", "steps")] if steps else []
    if data := more.facts.get("data"):
        found.append((str(data).partition(" rows")[0], "training rows"))
    if seconds := more.summary.get("seconds"):
        found.append((duration(seconds), "time"))
    return found


def comparison_page(records: Sequence[Record]) -> str:
    """The HTML of several runs: the options in which they differ, their results with the best marked, their curves together."""
    names = [record.name for record in records]
    found = reached(records)
    return _html(
        title=f"{len(records)} runs",
        sections=[
            Section("Options that differ", _columns(names, portable(differences(records)))),
            Section("Results", evolve(_columns(names, found), best=[best_of(name, values) for name, values in found.items()])),
            _curves(records),
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
    return "" if metric == "reward" or any(SECTIONS[title](metric) for title in alike) else label


def _main_charts(record: Record, method: MethodInfo) -> list[str]:
    kept, _ = told_apart(record.curves())
    return list(filter(None, (metric_chart(name, kept[name]) for name in main_metrics(method.columns, kept))))


def _other_charts(record: Record, method: MethodInfo) -> list[Section]:
    """Folded, a section for each kind of metric that is not at the top."""
    kept, others = told_apart(record.curves())
    top = main_metrics(method.columns, kept)
    left, sections = {name: splits for name, splits in kept.items() if name not in top}, []
    for title, belongs in SECTIONS.items():
        names = [name for name in left if belongs(name)]
        charts = list(filter(None, (metric_chart(name, left[name]) for name in names)))
        sections.append(Section(title, charts=charts, is_folded=True))
        left = {name: splits for name, splits in left.items() if name not in names}
    return [*sections, Section("Constant and equal metrics", _pairs(others), is_folded=True)]


def _curves(records: Sequence[Record]) -> Section:
    """Losses and rewards, which differ, and below them all other charts, folded."""
    matters = SECTIONS["Loss and rewards"]
    shown, folded = [], []
    for metric, svg, differs in _overlaid(records):
        (shown if differs and matters(metric) else folded).append(svg)
    names = _short_names(records)
    others = Section("Other curves", charts=folded, is_folded=True)
    return Section("Curves", charts=shown, legend=names if shown or folded else (), folded=others if folded else None)


def _short_names(records: Sequence[Record]) -> list[str]:
    """Names of runs, without the folders that all of them are in."""
    names = [record.name for record in records]
    parts = [Path(name).parts for name in names]
    same = 0
    while all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    return [str(Path(*part[same:])) if part else name for part, name in zip(parts, names, strict=True)]


def _overlaid(records: Sequence[Record]) -> list[tuple[str, str, bool]]:
    """For each metric of each split: the metric, its chart with a line per run in the run's color, and whether any value differs.

    Losses of each method are apart. Rewards come first, because the loss of a sampled run says little, then losses.
    """
    charts: dict[tuple[str, str], list[Line]] = {}
    names = _short_names(records)
    for i, (record, label) in enumerate(zip(records, _methods(records), strict=True)):
        for name, splits in record.curves().items():
            for split, points in splits.items():
                lines = charts.setdefault((name, f"{split} {name}{_apart(name, label)}"), [])
                lines.append(Line(names[i], points, i % COLORS, dotted=split != "train"))
    ordered = sorted(charts.items(), key=lambda entry: (entry[0][0] != "reward", entry[0][0] != "loss"))
    drawn = [(name, chart(_of_split(title, name), lines, title), _differs(lines)) for (name, title), lines in ordered]
    return [entry for entry in drawn if entry[1]]


def _differs(lines: Sequence[Line]) -> bool:
    return len({value for line in lines for _, value in line.points}) > 1


def _of_split(title: str, metric: str) -> str:
    """The title in words: `train loss (sft)` is `Loss (sft), train`."""
    split, _, rest = title.partition(" ")
    return f"{in_words(metric)}{rest.removeprefix(metric)}, {split}"


def _pairs(values: Values) -> Table:
    return Table(list(values.items()))


def _columns(names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> Table:
    return Table([(name, *values) for name, values in rows.items()], ("", *names))


def _configuration(config: Values, method: MethodInfo) -> Section:
    if not config:
        return Section("Configuration")
    folded = Section("All options", _pairs(config), is_folded=True)
    return Section("Configuration", _pairs(changed_options(config, method)), folded=folded)


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


def _html(
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    stopped: str | None = None,
    figures: Sequence[tuple[str, str]] = (),
) -> str:
    script = (Path(__file__).parent / "report.js").read_text(encoding="utf-8").strip()
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = {"title": title, "sections": sections, "subtitle": subtitle, "stopped": stopped, "figures": figures}
    return _template().render(**shown, colors=COLORS, script=script, allowed=allowed) + "\n"


@cache
def _template() -> "Template":
    """Compiled once for all pages of a process."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["text"] = _text
    return environment.get_template("report.html.jinja")
