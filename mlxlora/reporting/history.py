"""Reads the files of a run, and the curves that the page, the plot and the terminal draw from its records."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson
from attrs import field, frozen

from ..config.config_file import METHOD
from ..errors import InputError, plain
from ..utils.parse import MOST_LINES, sound_records, sound_samples, yaml_mapping
from ..utils.paths import checked_path, within
from .reporter import Values, numbers

METRICS, SAMPLES, SETTINGS, PAGE, PICTURE = "metrics.jsonl", "samples.jsonl", "config.yaml", "report.html", "metrics.png"
SPLITS = ("train", "valid", "test")

Points = list[tuple[float, float]]
"""(step, value), in the order of the records."""


@frozen
class StoredMethod:
    """The method that a run stores beside its options; None for an objective given in Python."""

    method: str | None


@frozen
class Record:
    """The files of a run.

    Attributes:
        name: the path of its folder.
        config: every option by name.
        metrics: the whole lines of metrics.jsonl.
        samples: the whole lines of samples.jsonl: completions, with their rewards if the run trained on them.
    """

    name: str
    config: Values = field(factory=dict)
    metrics: Sequence[Values] = ()
    samples: Sequence[Values] = ()

    def curves(self) -> dict[str, dict[str, Points]]:
        """The curves of all metrics, see `curves`."""
        return curves(self.metrics)


def curves(records: Iterable[Values]) -> dict[str, dict[str, Points]]:
    """{metric: {split: [(step, value), ...]}}, in the order of the records.

    Omits what is not a number, and `nll` if it equals the loss.

    >>> curves([{"step": 5, "split": "train", "loss": 2.5, "kl": None}])
    {'loss': {'train': [(5, 2.5)]}}
    """
    found: dict[str, dict[str, Points]] = {}
    for record in records:
        for name, value in numbers(record).items():
            found.setdefault(name, {}).setdefault(str(record.get("split")), []).append((record.get("step", 0), value))
    return {name: curve for name, curve in found.items() if name != "nll" or curve != found.get("loss")}


def method_of(config: Values) -> str:
    """The method that a run stored; empty for an objective given in Python.

    >>> method_of({"method": "sft", "iters": 5}), method_of({"method": None})
    ('sft', '')
    """
    name = config.get(METHOD)
    return name if isinstance(name, str) else ""


def past_run(directory: str | Path) -> Record:
    """Reads the run in a folder.

    Raises:
        InputError: the folder has no run.
    """
    if not (checked_path(directory, "report") / METRICS).is_file():
        raise InputError(f"{directory}: no {METRICS} there; name the --adapter-path of a run")
    return read_record(directory)


def read_record(directory: str | Path) -> Record:
    """Reads the files of a run; missing files count as empty."""
    folder = Path(directory)
    return Record(
        str(directory),
        read_settings(folder / SETTINGS),
        sound_records(read_lines(folder / METRICS)),
        sound_samples(read_lines(folder / SAMPLES)),
    )


def read_settings(file: Path) -> dict[str, Any]:
    """Reads the options that a run stored; a missing file has none.

    Raises:
        InputError: the file is damaged.
    """
    try:
        config = yaml_mapping(file) if file.is_file() else {}
    except InputError:
        raise
    except Exception as error:  # PyYAML raises more than YAMLError: a KeyError for `!!bool x`
        raise InputError(f"{file}: damaged: not the options of a run ({plain(str(error))})") from None
    return {name: value if name not in _TEXTS or value is None else str(value) for name, value in config.items()}


_TEXTS = {"model", "data", METHOD, "train_type", "quantize", "adapter_path"}  # others would be no options of a run


def read_lines(file: Path) -> list[Values]:
    """Reads the objects of a JSONL file; skips the half line that a killed run left. A missing file has none."""
    rows = []
    if file.is_file() and file.stat().st_size > MOST_LINES:
        raise InputError(f"{file}: {file.stat().st_size:,} bytes, {MOST_LINES:,} are the limit")
    for line in within(file).read_bytes().splitlines() if file.is_file() else ():
        try:
            rows.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def outcome(record: Record) -> dict[str, str]:
    """The best and last values of a run: {"valid loss, best": "0.4008 (step 40)", ...}.

    Best means the lowest loss, or the highest reward or accuracy, after step 0.
    """
    found: dict[str, str] = {}
    for name, splits in record.curves().items():
        for split in (s for s in ("valid", "test", "train") if s in splits):
            points = splits[split]
            later = [p for p in points if p[0]] or points
            if split == "valid" and (best := _BEST.get(name)):
                step, value = best(later, key=lambda point: point[1])
                found[f"valid {name}, best"] = f"{compact(value)} (step {step:,})"
            if split != "train" or "valid" not in splits:
                found[f"{split} {name}"] = compact(points[-1][1])
    return found


_BEST: dict[str, Any] = {"loss": min, "reward": max, "rewards/accuracies": max}


def compact(value: float) -> str:
    """Formats a number for a label.

    >>> compact(0.0), compact(12345.6), compact(0.00012), compact(2.5)
    ('0', '12,346', '1.2e-04', '2.5')
    """
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def differing(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Options that all runs have but with different values, and these values; ignores where a run writes to.

    >>> differing([Record("a", {"iters": 5, "seed": 0}), Record("b", {"iters": 9, "seed": 0})])
    {'iters': [5, 9]}
    """
    names = [name for name in records[0].config if name not in _NO_DIFFERENCE and all(name in r.config for r in records)]
    columns = {name: [record.config[name] for record in records] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


_NO_DIFFERENCE = {"adapter_path", "overwrite", "resume", "quiet", "show_config", "plot", "report_to", "project_name"}
