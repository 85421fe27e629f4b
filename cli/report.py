"""`mlxlora report`."""

import sys
from typing import Annotated

import typer

from mlxlora.utils.environment import set_up_mlx
from mlxlora.utils.output import echo

_WIDE = 1000  # columns if the output is not a terminal: one line per metric


def report(
    directories: Annotated[list[str], typer.Argument(metavar="DIR...", help="The --adapter-path of each run.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Also write a page with curves to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file in --output.")] = False,
) -> None:
    """Compare runs: their results, and the options in which they differ."""
    set_up_mlx()
    from mlxlora.methods import method_info
    from mlxlora.reporting.card import portable
    from mlxlora.reporting.history import past_run
    from mlxlora.reporting.html import comparison_page, differences, reached, run_page, write
    from mlxlora.utils.folders import check_new_file

    file = None if output is None else check_new_file(output, "--output", overwrite=overwrite)
    records = [past_run(directory) for directory in directories]
    _print("metric", directories, reached(records))
    _print("option", directories, portable(differences(records)))
    if file is not None:
        one = records[0] if len(records) == 1 else None
        write(file, run_page(one, method_info(one.config)) if one else comparison_page(records))
        echo(f"written: {output}")


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
