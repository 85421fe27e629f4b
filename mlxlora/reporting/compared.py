"""Several runs to compare: which folders are runs, and which result is the best of its line."""

from collections.abc import Sequence

from ..utils.paths import checked_path
from .history import METRICS, Record, past_run


def found_runs(directories: Sequence[str]) -> tuple[list[Record], list[str]]:
    """The runs of some folders, and the folders that are none.

    A folder that is no run stands for the runs right below it, in the order of their names.

    Raises:
        InputError: no folder has a run.
    """
    runs, others = [], []
    for directory in directories:
        folder = checked_path(directory, "report")
        below = [] if (folder / METRICS).is_file() or not folder.is_dir() else sorted(folder.iterdir())
        inner = [str(path) for path in below if (path / METRICS).is_file()]
        if inner or (folder / METRICS).is_file():
            runs += [past_run(path) for path in inner or [directory]]
        else:
            others.append(directory)
    if not runs:
        past_run(directories[0])
    return runs, others


def best_of(metric: str, values: Sequence[str]) -> int | None:
    """The number of the best run in a line of results; None if no run is better or nobody can say.

    >>> best_of("valid loss, best", ["1.5 (step 3)", "1.25 (step 9)", ""]), best_of("valid reward", ["0.5", "0.5"])
    (1, None)
    """
    name = metric.split()[1].rstrip(",") if " " in metric else metric
    lower, higher = ("loss", "perplexity", "nll"), ("reward", "rewards/accuracies", "mean_token_accuracy", "tokens_per_second")
    if name not in (*lower, *higher):
        return None
    numbers = {i: float(value.split()[0].replace(",", "")) for i, value in enumerate(values) if value}
    if len(set(numbers.values())) < 2:
        return None
    return (min if name in lower else max)(numbers, key=numbers.__getitem__)
