"""report.html: one file that shows a run, or several over each other; no script, nothing fetched, light or dark like its reader."""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..data.formats import last_text
from ..utils.device import device_name, package_version
from ..utils.files import atomic_file
from .card import changed_options, method_of, portable
from .history import METHOD, PAGE, SPLITS, Record, Row, differing, outcome, read_record
from .reporter import Reporter
from .svg import Line, chart

COLORS = 8
_PACKAGES = ("mlxlora", "mlx", "mlx-lm", "transformers", "numpy")
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2530; --dim: #5d6b7a; --rule: #dfe5ec; --panel: #f6f8fa;
  --c0: #1f6fb5; --c1: #d0661b; --c2: #2d8a57; --c3: #8a4fb0; --c4: #b8323a; --c5: #7a6a10; --c6: #0f8794; --c7: #b0417f; }
@media (prefers-color-scheme: dark) { :root { --back: #12171d; --text: #e3e8ee; --dim: #93a1b0; --rule: #2c3641; --panel: #1a2129;
  --c0: #6cb2f2; --c1: #f2a05c; --c2: #6fcf97; --c3: #c79bea; --c4: #f28b8f; --c5: #d9c65a; --c6: #5cc9d6; --c7: #f08fc4; } }
body { margin: 0 auto; max-width: 1400px; padding: 24px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 32px 0 10px; }
.dim { color: var(--dim); margin: 2px 0 0; }
.grid-of { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px; }
figure { margin: 0; padding: 6px; background: var(--panel);
  border: 1px solid var(--rule); border-radius: 8px; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--text); }
svg .title { font-size: 13px; font-weight: 600; } svg .tick { fill: var(--dim); }
svg .grid { stroke: var(--rule); } svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .hidden { fill-opacity: 0; } svg .hidden:hover { fill-opacity: 1; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: 4px 18px 4px 0;
  border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; } th { color: var(--dim); font-weight: 500; }
td.text { white-space: pre-wrap; font: 13px/1.5 ui-monospace, monospace; min-width: 160px; } .wide { overflow-x: auto; }
summary { cursor: pointer; color: var(--dim); margin: 8px 0; } .stopped { color: var(--c4); }
""" + "\n".join(f"svg .line{i} {{ stroke: var(--c{i}); }} svg .fill{i} {{ fill: var(--c{i}); }}" for i in range(COLORS))

_SECTIONS: dict[str, Callable[[str], bool]] = {
    "Loss and rewards": lambda n: n in ("loss", "reward", "perplexity") or (n.startswith("rewards/") and not n.endswith("/std")),
    "Completions": lambda n: n.startswith(("completions/", "frac_")) or n in ("reward_std", "entropy") or n.endswith("/std"),
    "Optimiser": lambda n: n in ("grad_norm", "learning_rate"),
    "Speed and memory": lambda n: "seconds" in n or "tokens" in n or n == "peak_memory_gb",
    "Everything else": lambda _: True,
}


class Page(Reporter):
    """Writes report.html into the folder of a run when it ends, early or not."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._answers: Sequence[Row] = ()

    def answers(self, rows: Sequence[Row]) -> None:
        self._answers = rows

    def finish(self, summary: Row) -> None:
        """Reads the files that the run wrote, so that a resumed run is shown whole."""
        write(self.directory / PAGE, run_page(read_record(self.directory), summary, self._answers, environment()))


def write(file: Path, text: str) -> None:
    """A whole file or none."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def environment() -> dict[str, str]:
    """What a run's numbers depend on besides its options; nothing that names the machine or its user."""
    return {
        **{name: package_version(name) or "not installed" for name in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{str(mx.default_device()).removeprefix('Device(').split(',')[0]} {device_name() or platform.machine()}",
        "written": datetime.now().astimezone().isoformat(" ", "minutes"),
    }


def run_page(
    record: Record, summary: Row | None = None, answers: Sequence[Row] = (), environment: Mapping[str, str] | None = None
) -> str:
    """The HTML of one run.

    Args:
        record: its files.
        summary: its results, or why it stopped.
        answers: prompts with the model's answer before and after training.
        environment: versions and device.
    """
    config, results = portable(record.config), portable({k: v for k, v in (summary or {}).items() if k != "report"})
    method, changed = method_of(config), dict(changed_options(config))
    title = f"{method.upper() or 'Training'}: {config.get('model') or 'a model'}"
    location = f"{config.get('data') or 'data given in Python'} → {Path(record.name).name}"
    stopped = f'<p class="stopped">Stopped {escape(str(results["stopped"]))}</p>' if "stopped" in results else ""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">{escape(location)}</p>{stopped}',
        _section("Results", _pairs(results or outcome(record))),
        *_curves(record),
        _section("Before and after", _answers(answers)),
        _section("Completions, first and last", _completions(record.samples)),
        _section("Configuration", _pairs(changed) + _folded("All options", _pairs(config)) if config else ""),
        _section("Environment", _pairs(environment or {})),
    ]
    return _html(title, parts)


def comparison_page(records: Sequence[Record]) -> str:
    """The HTML of several runs: what they reached, where their options differ, and their curves over each other."""
    names = [record.name for record in records]
    parts = [
        f"<h1>{len(records)} runs</h1>",
        _section("Results", _columns(names, reached(records))),
        _section("Options that differ", _columns(names, portable(differences(records)))),
        _section("Curves", _figures(_overlaid(records))),
    ]
    return _html(f"{len(records)} runs", parts)


def reached(records: Sequence[Record]) -> dict[str, list[str]]:
    """What each run reached, one line a metric; the losses of different methods have lines of their own."""
    outcomes = [
        {name + _apart(name.split()[1].rstrip(","), label): value for name, value in outcome(record).items()}
        for record, label in zip(records, _methods(records), strict=True)
    ]
    return {name: [found.get(name, "") for found in outcomes] for name in dict.fromkeys(n for o in outcomes for n in o)}


def _methods(records: Sequence[Record]) -> list[str]:
    """What tells the metrics of a run from those of other methods; nothing where all runs are of one."""
    methods = [method_of(record.config) or "own objective" for record in records]
    return [f" ({method})" if len(set(methods)) > 1 else "" for method in methods]


def _apart(metric: str, label: str) -> str:
    """The label, for a metric that means something else in each method."""
    alike = ("Completions", "Optimiser", "Speed and memory")
    return "" if metric == "reward" or any(_SECTIONS[title](metric) for title in alike) else label


def differences(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The methods if they are not one, and the options that are not the same in all runs."""
    methods = [method_of(record.config) for record in records]
    return ({METHOD: methods} if len(set(methods)) > 1 else {}) | differing(records)


def _html(title: str, parts: Iterable[str]) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'


def _curves(record: Record) -> list[str]:
    """A section for each kind of metric that the run has."""
    left, sections = record.curves(), []
    for title, belongs in _SECTIONS.items():
        names = [name for name in left if belongs(name)]
        charts = [chart(name, [Line(s, left[name][s], i) for i, s in enumerate(SPLITS) if s in left[name]]) for name in names]
        sections.append(_section(title, _figures(charts)))
        left = {name: splits for name, splits in left.items() if name not in names}
    return sections


def _overlaid(records: Sequence[Record]) -> list[str]:
    """A chart for each metric of each split, the runs in the colours of their place; losses of each method by themselves."""
    charts: dict[tuple[str, str], list[Line]] = {}
    for i, (record, label) in enumerate(zip(records, _methods(records), strict=True)):
        for name, splits in record.curves().items():
            for split, points in splits.items():
                lines = charts.setdefault((name, f"{split} {name}{_apart(name, label)}"), [])
                lines.append(Line(record.name, points, i % COLORS))
    ordered = sorted(charts.items(), key=lambda entry: (entry[0][0] != "loss", entry[0][0] != "reward"))
    return [chart(title, lines) for (_, title), lines in ordered]


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def _figures(charts: Iterable[str]) -> str:
    figures = "\n".join(f"<figure>{svg}</figure>" for svg in charts if svg)
    return f'<div class="grid-of">\n{figures}\n</div>' if figures else ""


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _pairs(values: Mapping[str, Any]) -> str:
    return _table((), [(name, _text(value)) for name, value in values.items()]) if values else ""


def _columns(names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> str:
    return _table(("", *names), [(name, *map(_text, values)) for name, values in rows.items()]) if rows else ""


def _answers(rows: Sequence[Row]) -> str:
    columns = ("prompt", *(["expected"] if any(row.get("expected") for row in rows) else []), "before", "after")
    return _table(columns, [[row.get(name, "") for name in columns] for row in rows], "text") if rows else ""


def _completions(samples: Sequence[Row]) -> str:
    """Of the first and of the last report that has any."""
    steps = sorted({row.get("step", 0) for row in samples})
    chosen = [row for row in samples if row.get("step", 0) in {*steps[:1], *steps[-1:]}]
    columns = [name for name in ("step", "prompt", "expected", "completion", "reward") if any(row.get(name) for row in chosen)]
    texts = {"prompt": last_text, "completion": last_text}
    lines = [[texts.get(name, _text)(row.get(name)) for name in columns] for row in chosen]
    return _table(columns, lines, "text") if lines else ""


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    first = f"<tr>{''.join(f'<th>{escape(text)}</th>' for text in head)}</tr>" if head else ""
    cell = f'<td class="{kind}">' if kind else "<td>"
    rows = "\n".join(f"<tr>{''.join(f'{cell}{escape(str(text))}</td>' for text in line)}</tr>" for line in lines)
    return f'<div class="wide"><table>{first}{rows}</table></div>'
