"""The command line: `mlxlora COMMAND`, one small module per command; none imports mlx before it runs."""

import sys
from typing import Annotated

import typer

from mlxlora import __version__
from mlxlora.errors import InputError, RunError

from .cpo import cpo
from .dpo import dpo
from .eval import evaluate
from .generate import generate
from .grpo import grpo
from .init import init
from .orpo import orpo
from .sft import sft

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode="rich")
app.command("sft")(sft)
app.command("dpo")(dpo)
app.command("orpo")(orpo)
app.command("cpo")(cpo)
app.command("grpo")(grpo)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("init")(init)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mlxlora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Fine-tune language models on MLX."""


def main() -> None:
    """Runs the command line; a user's mistake is one line on stderr (exit code 2), a failed run another (exit code 1)."""
    try:
        app(prog_name="mlxlora")
    except (InputError, RunError) as error:
        typer.echo(f"mlxlora: error: {error}", err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
