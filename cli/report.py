"""`mlxlora report`."""

import sys
from typing import Annotated

import typer

from mlxlora.utils.environment import set_up_mlx
from mlxlora.utils.output import echo, echo_written

_WIDE = 1000  # columns if the output is not a terminal: one line per metric


def report(
    directories: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="The --adapter-path of each run, or a folder of runs.")
    ],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Also write a page with curves to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file in --output.")] = False,
) -> None:
    """Compare runs: the options in which they differ, and their results with the best marked."""
    set_up_mlx()
    from mlxlora.methods import method_info
    from mlxlora.reporting.card import portable
    from mlxlora.reporting.compared import best_of, found_runs
    from mlxlora.reporting.html import comparison_page, differences, reached, run_page, write
    from mlxlora.utils.folders import check_new_file

    file = None if output is None else check_new_file(output, "--output", overwrite=overwrite)
    records, others = found_runs(directories)
    for other in others:
        echo(f"note: {other} is not a run: it has no metrics.jsonl")
    names, found = [record.name for record in records], reached(records)
    best = {metric: best_of(metric, values) for metric, values in found.items()}
    marked = {metric: [f"{v} *" if i == best[metric] else v for i, v in enumerate(values)] for metric, values in found.items()}
    _print("option", names, portable(differences(records)))
    _print("metric (* best)" if any(i is not None for i in best.values()) else "metric", names, marked)
    if file is not None:
        one = records[0] if len(records) == 1 else None
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, run_page(one, method_info(one.config)) if one else comparison_page(records))
        echo_written("report", output)


def _print(first: str, names: list[str], rows: dict[str, list]) -> None:
    from rich.table import Table
    from rich.text import Text

    from mlxlora.utils.console import safe_console

    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for name in (first, *names):
        table.add_column(Text(name), overflow="fold", no_wrap=name == first)
    for name, values in rows.items():
        table.add_row(Text(name), *(Text("" if value is None else str(value)) for value in values))
    safe_console(width=None if sys.stdout.isatty() else _WIDE).print(table)
