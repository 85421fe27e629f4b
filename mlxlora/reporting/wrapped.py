"""Texts for a terminal: wrapped between words, with a hanging indent, escaped once."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import printable


def flat(text: str, newline: str = "⏎") -> str:
    """A text of data as one line: control characters escaped, line ends as a sign.

    >>> flat("a" + chr(10) + "b" + chr(27))
    'a⏎b\\\\x1b'
    """
    return printable(text.strip()).replace("\n", newline).replace("\t", " ")


def print_pairs(console: Console, pairs: Mapping[str, Any], *, indent: int = 1, styles: Mapping[str, str] | None = None) -> None:
    """Prints names and values in two columns; values wrap under themselves, words that are too long are folded."""
    if not pairs:
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs.items():
        shown = value if isinstance(value, Text) else Text(printable(str(value)))
        grid.add_row(Text(" " * indent + name, style="dim"), Text.assemble(shown, style=(styles or {}).get(name, "")))
    console.print(grid, soft_wrap=False)
