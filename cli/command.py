"""Commands whose help fits narrow terminals, and which take the flags of mlx-lm, mlx-lm-lora and TRL."""

from typing import Any

import typer
from typer.core import TyperCommand

from mlxlora.methods import METHODS

from .flags import without_peers
from .help_text import ALL, write_help
from .spellings import spelled


class Command(TyperCommand):
    """A command whose help shows flags and words in full; that of a method shows the most used options, `--help-all` all."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if ALL in args[: args.index("--") if "--" in args else None] and not ctx.resilient_parsing:
            write_help(ctx, self, short=False)
            ctx.exit()
        own = {flag for parameter in self.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        args = spelled(ctx.info_name or "", self.params, args)
        return super().parse_args(ctx, without_peers(ctx, own, args))

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        write_help(ctx, self, short=ctx.info_name in METHODS)
