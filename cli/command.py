"""Commands whose help fits narrow terminals, and which take the flags of mlx-lm and mlx-lm-lora."""

from typing import Any

import typer
from typer.core import TyperCommand

from .flags import without_peers


class Command(TyperCommand):
    """A command whose help shows flags and long words in full; Typer ends them in an ellipsis in narrow terminals."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        own = {flag for parameter in self.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        return super().parse_args(ctx, without_peers(ctx, own, args))

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        from rich.table import Table
        from typer import rich_utils

        class Whole(Table):
            def add_row(self, *cells: Any, **options: Any) -> None:
                super().add_row(*cells, **options)
                for column, cell in zip(self.columns, cells, strict=False):
                    column.overflow = "fold"
                    column.no_wrap = column.no_wrap or str(cell).startswith("--")
                    for part in getattr(cell, "renderables", ()):  # the help and the default
                        part.overflow = "fold"

        typers: Any = rich_utils
        typers.Table = Whole
        try:
            super().format_help(ctx, formatter)
        finally:
            typers.Table = Table
