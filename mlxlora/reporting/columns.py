"""The table that a terminal shows while a run trains: its columns, and cells that never exceed their width."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen
from rich.text import Text

from .reporter import Values
from .text import duration, leading_metric

StepRecords = Mapping[str, Values]
"""The records of one step by split."""

STEP = 6
"""Width of the step, which stands before the columns."""


@frozen
class Column:
    """A column of the table.

    Attributes:
        title: of the heading.
        width: of its cells; longer texts lose digits.
        read: the records of a step to the value that is compared with the one above; None: there is none.
        shown: the value and the records to a text.
        better: 1 if a rise is good, -1 if a fall is, 0: not marked.
        unless: options of the run with which the column would be empty or constant.
        metric: of training that it shows; empty: of validation, or none of the record.
    """

    title: str
    width: int
    read: Callable[[StepRecords], float | None]
    shown: Callable[[float, StepRecords], str]
    better: int = 0
    unless: Mapping[str, Any] = {}
    metric: str = ""


def short_number(value: float) -> str:
    """A number of at most seven characters.

    >>> [short_number(value) for value in (0.0, 2.34567, -16.05, 1e-5, 12345.6, -1234567.0, float("nan"))]
    ['0', '2.3457', '-16.05', '1e-05', '12,346', '-1e+06', 'nan']
    """
    size = abs(value)
    if not size < float("inf") or not value:
        return str(value) if value else "0"
    if size < 1e-3 or size >= 1e5:
        text = f"{value:.1e}".replace(".0e", "e")
        return text if len(text) <= 7 else f"{value:.0e}"
    decimals = 4 if size < 10 else 2 if size < 1e3 else 0
    return f"{value:,.{decimals}f}"


def percent(value: float) -> str:
    """A share in percent.

    >>> percent(0.515)
    '52%'
    """
    return f"{value:.0%}"


def _of(metric: str, split: str = "train") -> Callable[[StepRecords], float | None]:
    def read(rows: StepRecords) -> float | None:
        value = rows.get(split, {}).get(metric)
        return value if isinstance(value, int | float) else None

    return read


def _leading(rows: StepRecords) -> float | None:
    """The metric that a run is watched by, of its validation."""
    row = rows.get("valid", {})
    return _of(leading_metric(row), "valid")(rows)


def _with_accuracy(value: float, rows: StepRecords) -> str:
    accuracy = rows["valid"].get("rewards/accuracies")
    return short_number(value) if accuracy is None else f"{short_number(value)} {accuracy_text(rows['valid']):>4}"


def accuracy_text(row: Values) -> str:
    """The share of pairs that the policy ranks right; a tie where it still equals the reference.

    >>> accuracy_text({"step": 0, "rewards/accuracies": 0.0, "rewards/margins": 0.0})
    'tie'
    """
    return "tie" if is_tie(row) else percent(row["rewards/accuracies"])


def is_tie(row: Values) -> bool:
    """Whether a record is of a policy that does not differ from its reference yet, so that only rounding decides."""
    return row.get("step") == 0 and abs(row.get("rewards/margins", 1.0)) < 1e-4


def _with_deviation(value: float, rows: StepRecords) -> str:
    deviation = rows["train"].get("reward_std")
    text = f"{value:.3f}" if abs(value) < 100 else short_number(value)
    return text if not isinstance(deviation, int | float) else f"{text} ±{short_number(round(deviation, 2))[:4]}"


def _plain(
    title: str, width: int, metric: str, shown: Callable[[float], str] = short_number, better: int = 0, **unless: Any
) -> Column:
    return Column(title, width, _of(metric), lambda value, _: shown(value), better, unless, metric)


TABLE_COLUMNS: dict[str, Column] = {
    "loss": _plain("loss", 7, "loss", better=-1),
    "valid": Column("valid", 7, _leading, lambda value, _: short_number(value), better=-1),
    "valid reward": Column("valid", 7, _leading, lambda value, _: short_number(value), better=1),
    "valid pairs": Column("valid acc", 11, _leading, _with_accuracy, better=-1),
    "reward": Column("reward ± std", 12, _of("reward"), _with_deviation, better=1, metric="reward"),
    "accuracy": _plain("accuracy", 8, "rewards/accuracies", percent, better=1),
    "margin": _plain("margin", 8, "rewards/margins", better=1),
    "chosen": _plain("chosen", 8, "rewards/chosen", better=1),
    "rejected": _plain("rejected", 8, "rewards/rejected", better=-1),
    "length": _plain("length", 6, "completions/mean_length", lambda value: f"{value:,.0f}"),
    "no signal": _plain("no signal", 9, "frac_reward_zero_std", percent),
    "KL": _plain("KL", 7, "kl", beta=0.0),
    "lr": _plain("lr", 7, "learning_rate", lambda value: f"{value:.1e}"),
    "tok/s": _plain("tok/s", 7, "tokens_per_second", lambda value: f"{value:,.0f}" if value < 1e6 else short_number(value)),
    "left": _plain("left", 8, "seconds left", duration),
}
"""Every column by the name that a method's row uses."""

GENERAL = ("loss", "valid", "lr", "tok/s", "left")
"""Of an objective given in Python."""


@frozen
class Layout:
    """The columns that fit, and the spaces between them."""

    columns: Sequence[Column]
    gap: int

    @classmethod
    def of(cls, names: Sequence[str], config: Values, width: int) -> "Layout":
        """The first of the named columns that fit into a width, without those that the options of a run leave empty.

        >>> [column.title for column in Layout.of(GENERAL, {}, 30).columns]
        ['loss', 'valid', 'lr']
        """
        found = [TABLE_COLUMNS[name] for name in names]
        found = [column for column in found if not any(config.get(name) == value for name, value in column.unless.items())]
        while found and STEP + sum(column.width + 1 for column in found) > width:
            found.pop()
        room = width - STEP - sum(column.width for column in found)
        return cls(found, min(4, max(1, room // max(len(found), 1))))

    def heading(self) -> Text:
        """The titles."""
        line = Text(f"{'step':>{STEP}}")
        for column in self.columns:
            line.append(f"{'':{self.gap}}{column.title:>{column.width}}")
        line.stylize("bold")
        return line

    def line(self, rows: StepRecords, before: Mapping[str, float], unicode: bool = True) -> Text:
        """The cells of a step; `before` has the values above by title, for the marks of falls and rises."""
        row = next(iter(rows.values()))
        line = Text(f"{_step_text(row['step']):>{STEP}}")
        for column in self.columns:
            line.append(" " * self.gap)
            value = column.read(rows)
            line.append_text(
                _cell(column, "" if value is None else column.shown(value, rows), *_mark(column, value, before, unicode))
            )
        return line

    def values(self, rows: StepRecords) -> dict[str, float]:
        """The values of a step that the next one is compared with."""
        found = {column.title: column.read(rows) for column in self.columns}
        return {title: value for title, value in found.items() if value is not None}


def _step_text(step: int) -> str:
    return str(step) if step < 10**STEP else f"{step / 1e6:.4g}M"


def _cell(column: Column, text: str, mark: str, style: str) -> Text:
    """A text at the right of its column, with its mark right before it if there is room."""
    shown = text if len(text) <= column.width else f"{text[: column.width - 1]}~"
    mark = mark[: column.width - len(shown)]
    return Text(" " * (column.width - len(shown) - len(mark))).append(mark, style).append(shown)


def _mark(column: Column, value: float | None, before: Mapping[str, float], unicode: bool) -> tuple[str, str]:
    """The mark of a fall or a rise and its style: green if the value got better."""
    last = before.get(column.title)
    if not column.better or value is None or last is None or not abs(value - last) > 1e-3 * abs(last):
        return "", ""
    falls = value < last
    return ("↓↑" if unicode else "v^")[not falls], "green" if falls == (column.better < 0) else "red"
