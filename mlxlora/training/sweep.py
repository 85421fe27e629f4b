"""Several runs of one method, one after the other: the model is loaded once, and what is finished is not run again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import orjson
from attrs import evolve

from ..config.given import PathOrName, is_path, storable
from ..config.options import ModelOptions
from ..errors import InputError, described
from ..models.loading import model_and_tokenizer
from ..reporting.history import PAGE, SETTINGS, Record, read_record
from ..reporting.html import comparison_page, write
from ..utils.files import atomic_file
from .checkpoint import FOLDER
from .results import RunResult, frame_of

FINISHED = "sweep.json"
"""The results of the finished runs of a sweep, in its folder."""

Train = Callable[..., RunResult]
_Options = Mapping[str, Any]
_HOW = {"overwrite", "resume", "quiet", "adapter_path", "adapter", "callbacks", "token_cache", "show_config", "plot", "report_to"}
"""Options that change no result."""


class SweepResult(Sequence[dict[str, Any]]):
    """The results of a sweep: for each run the options that vary, its results, and its folder as `adapters`.

    Attributes:
        page: the file that compares the runs.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], page: str) -> None:
        self._rows, self.page = list(rows), page

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    @property
    def best(self) -> dict[str, Any]:
        """The run with the lowest validation loss, or the highest reward; without validation, the lowest last training loss."""
        return self._rows[_best(self._rows)]

    def to_frame(self) -> Any:
        """The results as a frame of pandas, a line for each run.

        Raises:
            InputError: pandas is not installed.
        """
        return frame_of(self._rows, "the sweep itself is a list of dictionaries")


def sweep_over(
    method: Train, over: Mapping[str, Sequence[Any]], *, adapter_path: PathOrName = "sweep", **options: Any
) -> SweepResult:
    """Runs a method with every combination of some options.

    Each run has a folder of its own in `adapter_path`, which also gets `report.html`, a comparison with the best run marked.
    Called again, it continues: finished runs are not run again, an interrupted one is resumed.

    Args:
        method: such as `mlxlora.sft`.
        over: the values of each option that varies, such as `{"learning_rate": [1e-5, 1e-4], "rank": [4, 16]}`.
        adapter_path: the folder of the sweep.
        options: those that all runs have.

    Raises:
        InputError: nothing varies, or options that the method refuses.
    """
    if not callable(method):
        raise InputError(f"sweep: the method must be a function such as mlxlora.sft, got {described(method)}")
    for name, values in over.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InputError(f"sweep: over[{name!r}] must be a list of values, got {described(values)}")
    if not over:
        raise InputError("sweep: nothing varies; name the values of an option, such as over={'rank': [4, 16]}")
    chosen = [dict(zip(over, values, strict=True)) for values in product(*over.values())]
    return run_all(method, {folder_name(some): (some, {**options, **some}) for some in chosen}, str(adapter_path))


def folder_name(varied: _Options) -> str:
    """The name of the folder of a run.

    >>> folder_name({"learning_rate": 1e-5, "rank": 4})
    'learning_rate=1e-05,rank=4'
    """
    text = ",".join(f"{name}={storable(value)}" for name, value in varied.items())
    return "".join(character if character.isalnum() or character in "=,.+-_" else "_" for character in text)[:200]


def run_all(method: Train, runs: Mapping[str, tuple[_Options, _Options]], folder: str) -> SweepResult:
    """Runs what is not finished.

    Args:
        method: trains.
        runs: for each folder the options that vary, and all options.
        folder: of the sweep.
    """
    done, loaded, rows = _finished(Path(folder)), {}, []
    for name, (varied, options) in runs.items():
        place = Path(folder) / name
        fixed = storable({key: value for key, value in options.items() if key not in _HOW})
        if done.get(name, {}).get("options") != fixed or not place.is_dir():
            results = method(**_with_model(options, loaded), **_start(place, options), adapter_path=str(place))
            done[name] = {"options": fixed, "results": {**results}}
            Path(folder).mkdir(parents=True, exist_ok=True)
            with atomic_file(Path(folder) / FINISHED) as file:
                file.write_bytes(orjson.dumps(done, option=orjson.OPT_INDENT_2))
        rows.append({**storable(varied), **_last_loss(place), **done[name]["results"]})
    page = Path(folder) / PAGE
    write(page, comparison_page(_records(folder, list(runs), rows)))
    return SweepResult(rows, str(page))


def _with_model(options: _Options, loaded: dict[str, Any]) -> dict[str, Any]:
    """The options with the model in place of its name; each model is loaded once, and every run starts from it anew."""
    own = {field.name for field in attrs.fields(ModelOptions)}
    rest = {name: value for name, value in options.items() if name not in ("overwrite", "resume", "adapter_path", "adapter")}
    if options.get("model") is None or not is_path(options["model"]) or options.get("fully_shard"):
        return {**rest, "adapter": "fresh"}
    named = {name: value for name, value in options.items() if name in own}
    key = repr(sorted(named.items(), key=lambda entry: entry[0]))
    if key not in loaded:
        loaded.clear()  # one model at a time
        loaded[key] = model_and_tokenizer(ModelOptions(**named))
    return {**{name: value for name, value in rest.items() if name not in own}, "model": loaded[key], "adapter": "fresh"}


def _start(place: Path, options: _Options) -> dict[str, bool]:
    """Whether a run resumes the one in its folder, or replaces it."""
    if (place / SETTINGS).is_file() and (place / FOLDER).is_dir() and not options.get("overwrite"):
        return {"resume": True}
    return {"overwrite": place.is_dir()}


def _finished(folder: Path) -> dict[str, Any]:
    file = folder / FINISHED
    try:
        found = orjson.loads(file.read_bytes()) if file.is_file() else {}
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise InputError(f"{file}: damaged; remove it to run the sweep again")
    return found


def _last_loss(place: Path) -> dict[str, Any]:
    train = [row for row in read_record(place).metrics if row.get("split") == "train"]
    return {"train_loss": train[-1].get("loss")} if train else {}


def _best(rows: Sequence[_Options]) -> int:
    def rank(row: _Options) -> float:
        if "best_valid_reward" in row:
            return -row["best_valid_reward"]
        value = row.get("best_valid_loss", row.get("train_loss"))
        return float("inf") if value is None else value

    return min(range(len(rows)), key=lambda index: rank(rows[index]))


def _records(folder: str, names: Sequence[str], rows: Sequence[_Options]) -> list[Record]:
    records = [evolve(read_record(Path(folder) / name), name=name) for name in names]
    best = _best(rows)
    return [evolve(record, name=f"★ best: {record.name}") if i == best else record for i, record in enumerate(records)]
