"""What a run left in its folder, read again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import yaml
from attrs import field, frozen

from ..errors import InputError, plain, quoted

METRICS, SAMPLES, SETTINGS, PAGE, PICTURE = "metrics.jsonl", "samples.jsonl", "config.yaml", "report.html", "metrics.png"
SPLITS = ("train", "valid", "test")
METHOD = "method"

Row = Mapping[str, Any]
Points = list[tuple[float, float]]
_PLACE = {"step", "split"}


@frozen
class Method:
    """What a run stores beside its options: the command that it is one of; None: an objective given in Python."""

    method: str | None


@frozen
class Record:
    """A run as its files tell it.

    Attributes:
        name: of its folder.
        config: every option by name.
        metrics: rows of metrics.jsonl, as far as they are whole.
        samples: rows of samples.jsonl: completions, with their rewards where they were trained on.
    """

    name: str
    config: Mapping[str, Any] = field(factory=dict)
    metrics: Sequence[Row] = ()
    samples: Sequence[Row] = ()

    def curves(self) -> dict[str, dict[str, Points]]:
        """{metric: {split: [(step, value), ...]}}, in the order of the reports.

        What is not a number is left out, and `nll` where it is the loss.

        >>> Record("run", metrics=[{"step": 5, "split": "train", "loss": 2.5, "kl": None}]).curves()
        {'loss': {'train': [(5, 2.5)]}}
        """
        found: dict[str, dict[str, Points]] = {}
        for row in self.metrics:
            for name, value in row.items():
                if name not in _PLACE and isinstance(value, int | float):
                    found.setdefault(name, {}).setdefault(str(row.get("split")), []).append((row.get("step", 0), value))
        return {name: curve for name, curve in found.items() if name != "nll" or curve != found.get("loss")}


def past_run(directory: str | Path) -> Record:
    """The run of a folder.

    Raises:
        InputError: there is none.
    """
    if not (Path(directory) / METRICS).is_file():
        raise InputError(f"{directory}: no {METRICS} there; name the --adapter-path of a run")
    return read_record(directory)


def read_record(directory: str | Path) -> Record:
    """The files of a run, as far as there are any."""
    folder = Path(directory)
    return Record(str(directory), read_settings(folder / SETTINGS), read_lines(folder / METRICS), read_lines(folder / SAMPLES))


def read_settings(file: Path) -> dict[str, Any]:
    """The options that a run stored; none where there is no file.

    Raises:
        InputError: the file is damaged.
    """
    try:
        config = (yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None) or {}
    except Exception as error:  # PyYAML raises a KeyError for `!!bool x`, and more of that kind
        raise InputError(f"{file}: damaged, not the options of a run ({plain(str(error))})") from None
    if not isinstance(config, dict):
        raise InputError(f"{file}: damaged, not the options of a run: {quoted(config)}")
    return config


def read_lines(file: Path) -> list[Row]:
    """The objects of a JSONL file, without a line that a killed run left half; none where there is no file."""
    rows = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            rows.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def outcome(record: Record) -> dict[str, str]:
    """The best and the last value of what matters: {"valid loss, best": "0.4008 (step 40)", ...}.

    Best is the least loss, the greatest reward or accuracy, after the first step.
    """
    found, curves = {}, record.curves()
    for name, splits in curves.items():
        for split in (s for s in ("valid", "test", "train") if s in splits):
            points = splits[split]
            later = [p for p in points if p[0]] or points
            if split == "valid" and (best := _BEST.get(name)):
                step, value = best(later, key=lambda point: point[1])
                found[f"valid {name}, best"] = f"{short(value)} (step {step:,})"
            if split != "train" or "valid" not in splits:
                found[f"{split} {name}"] = short(points[-1][1])
    return found


_BEST: dict[str, Any] = {"loss": min, "reward": max, "rewards/accuracies": max}


def short(value: float) -> str:
    """A number for a label.

    >>> short(0.0), short(12345.6), short(0.00012), short(2.5)
    ('0', '12,346', '1.2e-04', '2.5')
    """
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def differing(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The options that all runs have and that are not the same in all, with the values; where a run writes to is no difference.

    >>> differing([Record("a", {"iters": 5, "seed": 0}), Record("b", {"iters": 9, "seed": 0})])
    {'iters': [5, 9]}
    """
    names = [name for name in records[0].config if name not in _NO_DIFFERENCE and all(name in r.config for r in records)]
    columns = {name: [record.config[name] for record in records] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


_NO_DIFFERENCE = {"adapter_path", "overwrite", "resume", "quiet", "show_config", "plot", "report_to"}
